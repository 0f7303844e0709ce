"""Presets, the paper's memory savers, and what they must not change."""

from contextlib import nullcontext
from copy import deepcopy
import os
from pathlib import Path
import subprocess
import sys

from hypothesis import given, settings, strategies as st
import pytest
import torch
from references import TINY_RESNET, TINY_VIT, inputs, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel

from clip_lab.model import CONFIGS, build
from clip_lab.train.memory import HalfAdamW, checkpoint_blocks, half_text_weights, saved_bytes, stochastic_round
from clip_lab.train.optim import PRESETS, build_optimizer, clamp_logit_scale, parameter_groups, preset

HALVES = [torch.bfloat16, torch.float16]
both_towers = pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=lambda c: c.name)


def test_presets_are_those_of_tables_18_to_20():
    assert set(PRESETS) == set(CONFIGS) - {"emoji"}
    assert [PRESETS[n].lr for n in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")] == [5e-4, 5e-4, 5e-4, 4e-4, 3.6e-4]
    assert [PRESETS[n].lr for n in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")] == [5e-4, 5e-4, 4e-4, 2e-5]
    for name, p in PRESETS.items():
        assert (p.betas[1], p.eps) == ((0.98, 1e-6) if CONFIGS[name].is_vit else (0.999, 1e-8)) and p.resolution == CONFIGS[name].image_resolution
        assert (p.batch_size, p.warmup, p.weight_decay, p.max_logit_scale, p.epochs) == (32_768, 2000, 0.2, 100, 1 if "336" in name else 32)
    with pytest.raises(ValueError, match="ViT-B/32"): preset("ViT-B-32")


def test_the_built_optimiser_carries_the_preset():
    optimizer = build_optimizer(tiny(TINY_VIT), preset("ViT-B/32"), HalfAdamW, moments=torch.float32)
    assert isinstance(optimizer, HalfAdamW) and [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    assert all((g["lr"], g["betas"], g["eps"], g["moments"]) == (5e-4, (0.9, 0.98), 1e-6, torch.float32) for g in optimizer.param_groups)


def gradients(model, autocast=False, kernels=None, twice=False):
    "Outputs, gradients and buffers of a step in the mode that the model is in."
    pictures, tokens = inputs(model.config, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), sdpa_kernel(kernels) if kernels else nullcontext():
        images, texts = model.encode_image(pictures, normalize=True), model.encode_text(tokens, normalize=True)
    loss = (model.logit_scale.exp() * images.float() @ texts.float().T).log_softmax(1).diagonal().sum()
    loss.backward(retain_graph=twice)
    if twice: loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters()], *model.buffers()]


@both_towers
@pytest.mark.parametrize("training, autocast, kernels, twice", [(True, False, None, False), (False, False, None, False), (True, True, None, False),
                                                               (True, False, [SDPBackend.MATH], False), (True, False, None, True)],
                         ids=["train", "eval", "autocast", "a chosen kernel", "two backward passes"])
def test_checkpointing_changes_nothing(config, training, autocast, kernels, twice):
    plain = tiny(config).train(training); again = deepcopy(plain)
    blocks = checkpoint_blocks(again)
    assert blocks == 4 if config is TINY_VIT else blocks == 7
    assert list(again.state_dict()) == list(plain.state_dict())
    for a, b in zip(gradients(plain, autocast, kernels, twice), gradients(again, autocast, kernels, twice), strict=True): assert torch.equal(a, b)
    if config is TINY_RESNET: assert again.visual.layer1[0].bn1.num_batches_tracked == training


@both_towers
def test_checkpointing_keeps_less_and_can_be_undone(config):
    model = tiny(config).train()
    pictures, tokens = inputs(config, 6)
    kept = lambda: saved_bytes(lambda: model(pictures, tokens), [*model.parameters(), pictures])
    stored = kept()
    checkpoint_blocks(model)
    assert kept() < 0.6 * stored
    with torch.no_grad(): assert kept() == 0
    assert checkpoint_blocks(model, on=False) == 0 and kept() == stored and type(model) is type(tiny(config))


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from(HALVES), st.integers(0, 2 ** 31))
def test_rounding_goes_to_a_neighbour(value, dtype, seed):
    x = torch.full((16,), value, dtype=torch.float32)
    top = torch.finfo(dtype).max
    drawn = stochastic_round(x, dtype, torch.Generator().manual_seed(seed)).double()
    exact = x[0].double().clamp(-top, top)
    near = x[0].to(dtype)                                            # torch's own rounding is one of the two neighbours
    if near.isinf(): assert (drawn == exact.sign() * top).all(); return
    low, high = (torch.nextafter(near, torch.tensor(side, dtype=dtype)).double() for side in (-torch.inf, torch.inf))
    allowed = [near.double()] + ([high] if exact > near.double() else [low] if exact < near.double() else [])
    assert all(any(d == a for a in allowed) or d.abs() == top for d in drawn)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_unbiased_from_subnormal_to_large(dtype):
    form, g, draws = torch.finfo(dtype), torch.Generator().manual_seed(0), 40_000
    values = torch.tensor([1.00037, -1.00037, 0.1, -3.3e-4, 999.77, form.tiny * 1.0003, form.tiny * 0.313, -form.tiny * form.eps * 0.25, form.tiny * form.eps * 1.75])
    drawn = stochastic_round(values.expand(draws, -1).contiguous(), dtype, g).double()
    spacing = drawn.amax(0) - drawn.amin(0)
    share = (values.double() - drawn.amin(0)) / spacing              # of draws that go up
    error = (drawn.mean(0) - values.double()).abs() / spacing
    assert (spacing > 0).all() and (error < 4.5 * (share * (1 - share) / draws).sqrt()).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_leaves_what_it_must(dtype):
    top = torch.finfo(dtype).max
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 3.4e38, -3.4e38, top])
    drawn = stochastic_round(x, dtype).float()
    assert torch.equal(drawn[:2], x[:2]) and drawn[2].isnan() and drawn[3:].tolist() == [0, top, -top, top]
    for wrong, to in ((x.double(), dtype), (x, torch.float32), (x, torch.float64)):
        with pytest.raises(TypeError, match="at random"): stochastic_round(wrong, to)


def train(model, optimizer, steps=4):
    "A few steps with the clipping and clamping of the training loop."
    for seed in range(steps):
        pictures, tokens = inputs(model.config, 4, seed)
        with torch.autocast("cpu", torch.bfloat16): images, texts = model.encode_image(pictures, normalize=True), model.encode_text(tokens, normalize=True)
        loss = -(model.logit_scale.exp() * images.float() @ texts.float().T).log_softmax(1).diagonal().mean()
        optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(); clamp_logit_scale(model)
    return [p.detach() for p in model.parameters()]


@both_towers
def test_with_full_moments_it_is_adamw(config):
    a, b = tiny(config).train(), tiny(config).train()
    ours = train(a, HalfAdamW(parameter_groups(a, 0.2), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, moments=torch.float32))
    theirs = train(b, torch.optim.AdamW(parameter_groups(b, 0.2), lr=1e-3, betas=(0.9, 0.98), eps=1e-6))
    for p, q in zip(ours, theirs): torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("half", [None, *HALVES], ids=str)
def test_a_restored_state_continues_bit_for_bit(half, tmp_path):
    def make():
        model = tiny(TINY_VIT).train()
        if half: assert half_text_weights(model, half) == sum(p.nbytes for p in model.parameters() if p.dtype == half)
        return model, HalfAdamW(parameter_groups(model, 0.2), lr=1e-3)
    model, optimizer = make()
    train(model, optimizer)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    want, (other, restored) = train(model, optimizer), make()
    weights, state = torch.load(tmp_path / "state.pt")
    other.load_state_dict(weights); restored.load_state_dict(state)
    moments = [m for s in restored.state.values() for m in (s["exp_avg"], s["exp_avg_sq"])]
    assert {m.dtype for m in moments} == {torch.bfloat16} and sum(m.nbytes for m in moments) == 4 * sum(p.numel() for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(want, train(other, restored)))
    assert half is None or model.transformer.resblocks[0].mlp.c_fc.weight.dtype == half and model.transformer.resblocks[0].mlp.c_fc.bias.dtype == torch.float32


def test_accelerate_saves_and_restores_the_moments(tmp_path):
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    make = lambda: (model := tiny(TINY_RESNET).train(), HalfAdamW(parameter_groups(model, 0.2), lr=1e-3))
    model, optimizer = accelerator.prepare(*make())
    train(model, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    want = [p.clone() for p in train(model, optimizer)]
    state = deepcopy(optimizer.state_dict()["state"])
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(p, q) for p, q in zip(want, train(model, optimizer)))
    assert all(torch.equal(state[k][m], s[m]) for k, s in optimizer.state_dict()["state"].items() for m in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("options, word", [(dict(moments=torch.float16), "underflows"), (dict(betas=(0.9, 1.0)), "betas"), (dict(lr=-1.0), "lr")])
def test_wrong_settings_are_said(options, word):
    with pytest.raises(ValueError, match=word): HalfAdamW(tiny(TINY_VIT).parameters(), **options)
    with pytest.raises(ValueError, match="bfloat16 or torch.float16"): half_text_weights(tiny(TINY_VIT), torch.float32)


RANK = '''
import hashlib, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, os.environ["TESTS"])
from references import TINY_RESNET, inputs, tiny
from clip_lab.train.memory import HalfAdamW, checkpoint_blocks, half_text_weights
from clip_lab.train.optim import parameter_groups

class Towers(torch.nn.Module):
    def __init__(self, clip): super().__init__(); self.clip = clip
    def forward(self, x, t): return self.clip.encode_image(x, True), self.clip.encode_text(t, True), self.clip.logit_scale

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
clip = tiny(TINY_RESNET).train()
checkpoint_blocks(clip); half_text_weights(clip)
towers = torch.nn.parallel.DistributedDataParallel(Towers(clip))
optimizer = HalfAdamW(parameter_groups(clip, 0.2), lr=1e-3)
for step in range(3):
    with torch.autocast("cpu", torch.bfloat16): a, b, scale = towers(*inputs(TINY_RESNET, 4, seed=2 * step + dist.get_rank()))
    loss = -(scale.exp() * a.float() @ b.float().T).log_softmax(1).diagonal().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
weights = torch.cat([p.detach().float().flatten() for p in clip.parameters()])
both = [torch.empty_like(weights) for _ in range(2)]
dist.all_gather(both, weights)
assert torch.equal(*both) and weights.isfinite().all() and not torch.equal(weights, torch.cat([p.detach().flatten() for p in tiny(TINY_RESNET).parameters()]))
print(f"alike {dist.get_world_size()}\\n", end="")      # one write: two processes share the line
import os, sys
dist.barrier()
sys.stdout.flush()
os._exit(0)      # not through the interpreter's end, where a thread of torch that still wants it may abort
'''


@pytest.mark.slow
def test_two_real_processes_round_alike(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
                          capture_output=True, text=True, timeout=900, env=os.environ | {"TESTS": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("alike 2") == 2
