"""The losses against torch's own numbers, open_clip's and transformers', on one process and on real groups of two and four."""
from copy import deepcopy
import importlib.util
import math
from pathlib import Path
import subprocess
import sys

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from clip_lab.train.cached import cached_backward
from clip_lab.train.objectives import chunked_contrastive_loss, contrastive_loss, sigmoid_loss


def rows(n, d=16, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1).to(dtype)


def scalar(value): return torch.tensor(value, dtype=torch.float64)


def slopes(loss, *inputs):
    "The loss and its gradients with respect to all inputs."
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def assert_same(a, b, tolerance):
    assert len(a) == len(b)
    for x, y in zip(a, b): assert (x.double() - y.double()).abs().max() <= tolerance * max(1, y.abs().max()), f"{x} is not {y}"


def load_open_clip_loss():
    spec = importlib.util.find_spec("open_clip")
    if spec is None: pytest.skip("open_clip is not installed (pip install --no-deps open-clip-torch)")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(spec.submodule_search_locations[0]) / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KNOWN = torch.rand(11, 11, generator=torch.Generator().manual_seed(5)) < 0.2


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 2048])
@pytest.mark.parametrize("known", [None, KNOWN], ids=["all", "also-true left out"])
def test_tiles_have_the_slopes_of_finite_differences(chunk_size, known):
    also_true = None if known is None else lambda r, c: known[r, c]
    inputs = [x.requires_grad_() for x in (rows(11, 5, 0), rows(11, 5, 1), scalar(1.5), scalar(-2.0))]
    assert torch.autograd.gradcheck(lambda *x: chunked_contrastive_loss(*x, also_true, chunk_size), inputs[:3])
    assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, also_true, chunk_size), inputs)


@pytest.mark.parametrize("chunk_size", [3, 2048])
def test_same_as_open_clips_loss(chunk_size):
    theirs = load_open_clip_loss().ClipLoss(local_loss=True, gather_with_grad=True)
    inputs = rows(23), rows(23, seed=1), scalar(math.log(30.0))
    expected = slopes(lambda i, t, s: theirs(i, t, s.exp()), *inputs)
    assert_same(slopes(contrastive_loss, *inputs), expected, 1e-6)                                            # through float32
    assert_same(slopes(lambda *x: chunked_contrastive_loss(*x, chunk_size=chunk_size), *inputs), expected, 1e-12)


def test_same_as_open_clips_sigmoid_loss():
    theirs = load_open_clip_loss().SigLipLoss()
    inputs = rows(9), rows(9, seed=1), scalar(math.log(10.0)), scalar(-10.0)
    expected = slopes(lambda i, t, s, b: theirs(i, t, s.exp(), b), *inputs)
    assert_same(slopes(lambda *x: sigmoid_loss(*x, chunk_size=4), *inputs), expected, 1e-12)


def test_same_as_the_loss_of_transformers_siglip():
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.SiglipConfig(text_config=dict(**size, vocab_size=50, max_position_embeddings=8), vision_config=dict(**size, image_size=16, patch_size=8))
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    with torch.no_grad(): model.logit_scale.fill_(math.log(10.0)); model.logit_bias.fill_(-3.0)
    out = model(input_ids=torch.randint(0, 50, (6, 8)), pixel_values=torch.randn(6, 3, 16, 16), return_loss=True)
    ours = sigmoid_loss(out.image_embeds, out.text_embeds, model.logit_scale, model.logit_bias, chunk_size=4)
    torch.testing.assert_close(ours, out.loss.reshape(ours.shape), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(out.loss, [model.logit_scale, model.logit_bias], retain_graph=True)
    assert_same(torch.autograd.grad(ours, [model.logit_scale, model.logit_bias]), wanted, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_highest_temperature_and_half_features(dtype):
    image, text, scale, bias = rows(40, dtype=dtype), rows(40, seed=1, dtype=dtype), torch.tensor(math.log(100.0)), torch.tensor(-10.0)
    text[:20] = image[:20]          # half of the pairs answered perfectly: logits of 100 next to logits of -60
    coarse = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]     # rounding of one similarity, times 100
    for loss, scalars in ((lambda *x: chunked_contrastive_loss(*x, chunk_size=16), (scale,)), (lambda *x: sigmoid_loss(*x, chunk_size=16), (scale, bias))):
        got = slopes(loss, image, text, *scalars)
        exact = slopes(loss, image.double(), text.double(), *(s.double() for s in scalars))
        assert [g.dtype for g in got[1:]] == [dtype, dtype] + [torch.float32] * len(scalars)
        for g, e in zip(got, exact):
            assert g.isfinite().all()
            assert (g.double() - e).abs().max() <= coarse * e.abs().max(), (g, e)


def test_opposite_pairs_do_not_overflow():
    image = torch.eye(4)
    opposite = chunked_contrastive_loss(image, -image, torch.tensor(math.log(100.0)), chunk_size=3)
    torch.testing.assert_close(opposite, torch.tensor(100 + math.log(3)), rtol=1e-6, atol=0)      # own logit -100, three others 0
    torch.testing.assert_close(sigmoid_loss(image, -image, torch.tensor(math.log(100.0)), torch.tensor(-80.0)), torch.tensor(180.0), rtol=1e-6, atol=0)


def test_a_gradient_scalers_factor_does_not_overflow_half_features():
    inputs = rows(40, dtype=torch.float16), rows(40, seed=1, dtype=torch.float16), torch.tensor(math.log(100.0))
    plain = slopes(lambda *x: chunked_contrastive_loss(*x, chunk_size=16), *inputs)
    scaled = slopes(lambda *x: 2.0 ** 12 * chunked_contrastive_loss(*x, chunk_size=16), *inputs)
    for a, b in zip(plain[1:], scaled[1:]): torch.testing.assert_close(b / 2 ** 12, a, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("loss", [chunked_contrastive_loss, lambda *x: sigmoid_loss(*x, torch.tensor(-10.0))], ids=["contrastive", "sigmoid"])
def test_a_surrounding_autocast_changes_nothing(loss):
    inputs = rows(12, dtype=torch.float32), rows(12, seed=1, dtype=torch.float32), torch.tensor(4.0)
    outside = slopes(loss, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = slopes(loss, *inputs)
    assert_same(inside, outside, 0)


def test_also_true_pairs_get_no_gradient_and_the_pair_itself_always_counts():
    image, text, everything = rows(4), rows(4, seed=1), lambda r, c: torch.ones(r.stop - r.start, c.stop - c.start, dtype=torch.bool)
    alone = slopes(lambda *x: chunked_contrastive_loss(*x, everything, 3), image, text, scalar(2.0))
    for x in alone: assert x.abs().max() < 1e-12                # one answer left, and it is right
    value, *_ = slopes(lambda *x: sigmoid_loss(*x, everything, 3), image, text, scalar(2.0), scalar(-3.0))
    own = math.exp(2.0) * (image * text).sum(1) - 3.0
    torch.testing.assert_close(value, -F.logsigmoid(own).mean())


@pytest.mark.parametrize("loss", [contrastive_loss, chunked_contrastive_loss, lambda *x: sigmoid_loss(*x, torch.tensor(0.0))], ids=["plain", "chunked", "sigmoid"])
@pytest.mark.parametrize("image,text,message", [
    (torch.ones(4, 8), torch.ones(3, 8), "4 pictures but 3 texts"), (torch.ones(0, 8), torch.ones(0, 8), "empty batch"),
    (torch.ones(4, 8), torch.ones(4, 9), "8 features but texts 9"), (torch.ones(8), torch.ones(8), r"features are \(8,\) and \(8,\); expected \(pairs, features\)"),
], ids=["lengths", "empty", "widths", "one row"])
def test_what_is_not_a_batch_of_pairs_is_refused(loss, image, text, message):
    with pytest.raises(ValueError, match=message): loss(image, text, torch.tensor(1.0))


def test_other_bad_input_is_named():
    x, t = torch.ones(4, 8), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"a mask is \(4, 3\); expected \(own pairs, all pairs\), \(4, 4\)"): contrastive_loss(x, x, t, torch.zeros(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"also_true gave \(4, 4\) for a tile of \(2, 2\)"):
        chunked_contrastive_loss(x, x, t, lambda r, c: torch.zeros(4, 4, dtype=torch.bool), 2)
    with pytest.raises(ValueError, match="chunk_size is 0"): chunked_contrastive_loss(x, x, t, chunk_size=0)
    with pytest.raises(TypeError, match="torch.float32, text_features torch.float16"): chunked_contrastive_loss(x, x.half(), t)
    with pytest.raises(TypeError, match="torch.float32, text_features torch.bfloat16"): sigmoid_loss(x, x.bfloat16(), t, t)


class Towers(nn.Module):
    def __init__(self, dropout=0.0, norm=nn.Identity):
        super().__init__()
        tower = lambda inputs: nn.Sequential(nn.Linear(inputs, 24), norm(24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 8))
        self.image, self.text, self.logit_scale = tower(10), tower(12), nn.Parameter(torch.tensor(2.6592))

    def forward(self, images, tokens):
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(tokens), dim=-1), self.logit_scale


def gradients(towers): return {k: p.grad for k, p in towers.named_parameters() if p.grad is not None}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(24, 10), torch.randn(24, 12)


def test_accelerates_autocast_and_backward_are_used(batch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state()      # of tests before this one, in another precision
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    torch.manual_seed(1)
    towers = Towers(dropout=0.3, norm=nn.BatchNorm1d)
    kept = deepcopy(towers)
    parts = list(zip(*(x.split(6) for x in batch)))

    torch.manual_seed(2)
    with accelerator.autocast(): outputs = [kept(*p) for p in parts]
    expected = contrastive_loss(*(torch.cat([o[side] for o in outputs]).float() for side in (0, 1)), kept.logit_scale)
    accelerator.backward(expected)

    torch.manual_seed(2)
    towers = accelerator.prepare(towers)
    value = cached_backward(towers, iter(parts), contrastive_loss, accelerator=accelerator)
    torch.testing.assert_close(value, expected.detach())
    assert not value.requires_grad
    ours, theirs = gradients(towers), gradients(kept)
    assert ours.keys() == theirs.keys() and all(g.abs().max() > 0 for g in ours.values())
    for name in theirs: torch.testing.assert_close(ours[name], theirs[name], rtol=0.02, atol=0.02 * theirs[name].abs().max().item())
    for (name, a), (_, b) in zip(towers.named_buffers(), kept.named_buffers()): torch.testing.assert_close(a, b, msg=name)


def test_gradients_add_up_a_frozen_tower_stays_and_backward_can_be_replaced(batch):
    towers = Towers()
    towers.image.requires_grad_(False)
    parts = list(zip(*(x.split([20, 4]) for x in batch)))
    cached_backward(towers, parts, contrastive_loss)
    once = {k: g.clone() for k, g in gradients(towers).items()}
    assert not any(k.startswith("image") for k in once) and "logit_scale" in once
    cached_backward(towers, parts, contrastive_loss, backward=lambda pull: (4 * pull).backward())
    for name, grad in gradients(towers).items(): torch.testing.assert_close(grad, 5 * once[name], rtol=1e-5, atol=1e-7)


def test_a_loss_sees_the_whole_local_batch_in_order_and_no_batch_is_an_error(batch):
    seen = []
    def loss(image, text, logit_scale):
        seen.append((image, text, logit_scale))
        return contrastive_loss(image, text, logit_scale)
    towers = Towers().eval()
    cached_backward(towers, list(zip(*(x.split([1, 16, 7]) for x in batch))), loss)
    assert len(seen) == 1
    assert_same(seen[0], towers(*batch), 1e-6)
    with pytest.raises(ValueError, match="no micro-batches"): cached_backward(towers, [], contrastive_loss)


GROUP = '''
import importlib.util, sys
from copy import deepcopy
from pathlib import Path
import torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from clip_lab.train.cached import cached_backward
from clip_lab.train.objectives import chunked_contrastive_loss, contrastive_loss, sigmoid_loss

class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(10, 8), nn.Linear(12, 8)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.6592)), nn.Parameter(torch.tensor(-10.0))
    def forward(self, images, tokens):
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(tokens), dim=-1), self.logit_scale, self.logit_bias

torch.manual_seed(0)
n, whole = 24, Towers().double()
images, tokens, known = torch.randn(n, 10).double(), torch.randn(n, 12).double(), torch.rand(n, n) < 0.15
also_true = lambda rows, columns: known[mine][rows, columns]
LOSSES = dict(plain=lambda i, t, s, b: contrastive_loss(i, t, s, known[mine], known.T[mine]) + 0 * b,
              chunked=lambda i, t, s, b: chunked_contrastive_loss(i, t, s, also_true, 5) + 0 * b,
              sigmoid=lambda i, t, s, b: sigmoid_loss(i, t, s, b, also_true, 5))
mine = slice(None)
def backward_of_whole(loss):
    whole.zero_grad(); value = loss(*whole(images, tokens)); value.backward()
    return value.item(), [p.grad.clone() for p in whole.parameters()]
expected = {name: backward_of_whole(loss) for name, loss in LOSSES.items()}

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
assert world == int(sys.argv[1]), f"{world} processes instead of {sys.argv[1]}"
m = n // world
mine = slice(rank * m, (rank + 1) * m)
def worst(name, towers): return max((p.grad - g).abs().max().item() for p, g in zip(towers.parameters(), expected[name][1]))

for name, loss in LOSSES.items():
    towers = DistributedDataParallel(deepcopy(whole)); towers.zero_grad()
    value = loss(*towers(images[mine], tokens[mine])); value.backward()
    mean = value.detach().clone(); dist.all_reduce(mean)
    assert abs(mean.item() / world - expected[name][0]) < 1e-6, (name, mean, expected[name][0])
    assert worst(name, towers) < 1e-6, (name, worst(name, towers))

    towers.zero_grad()
    sizes = [1, m - 3, 2] if rank == 0 else [m - 1, 1]            # processes may split differently
    cached_backward(towers, list(zip(images[mine].split(sizes), tokens[mine].split(sizes))), loss)
    assert worst(name, towers) < 1e-6, ("cached", name, worst(name, towers))

# Losses that do not weigh the same everywhere: the tiled form asks the others how much theirs do.
def weighted(loss):
    towers = deepcopy(whole); towers.zero_grad()
    ((rank + 1.0) / world * loss(*towers(images[mine], tokens[mine]))).backward()
    grads = [p.grad / world for p in towers.parameters()]
    for g in grads: dist.all_reduce(g)
    return grads
differences = [(a - b).abs().max().item() for a, b in zip(weighted(LOSSES["plain"]), weighted(LOSSES["chunked"]))]
assert max(differences) < 1e-6, ("weighted", differences)

spec = importlib.util.find_spec("open_clip")
if spec is not None:
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(spec.submodule_search_locations[0]) / "loss.py")
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    theirs = module.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    def slopes(loss):
        towers = deepcopy(whole); towers.zero_grad()
        value = loss(*towers(images[mine], tokens[mine])); value.backward()
        grads = [p.grad / world for p in towers.parameters() if p.grad is not None]
        for g in grads: dist.all_reduce(g)
        return [value.detach(), *grads]
    for ours in (contrastive_loss, lambda *x: chunked_contrastive_loss(*x, chunk_size=4)):
        pairs = list(zip(slopes(lambda i, t, s, b: theirs(i, t, s.exp())), slopes(lambda i, t, s, b: ours(i, t, s))))
        differences = [(a - b).abs().max().item() for a, b in pairs]
        assert len(differences) == 6 and max(differences) < 2e-6, ("open_clip", differences)      # contrastive_loss goes through float32
if rank == 0: print("all equal on", world, "processes,", "open_clip too" if spec is not None else "open_clip is not installed")
import os, sys
dist.barrier()
sys.stdout.flush()
os._exit(0)      # not through the interpreter's end, where a thread of torch that still wants it may abort
'''


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_real_processes_have_the_gradients_of_the_whole_batch(world, tmp_path):
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), str(script), str(world)],
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, next((line for line in done.stderr.splitlines() if "Error" in line), "") + done.stderr[-2000:]
    assert done.stdout.startswith(f"all equal on {world} processes"), done.stdout
