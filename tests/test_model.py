"""The towers against implementations that nobody here wrote, the published sizes, and bad input."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clip_lab.layouts import to_openai
from clip_lab.model import CONFIGS, CLIPConfig, Attention, AttentionPool2d, build
from references import TINY_RESNET, TINY_VIT, inputs, open_clip, open_clip_tiny, shaken, tiny, transformers_model  # noqa: F401

# openai/CLIP's own code on the meta device: parameters, of the image tower, entries of the state dict
PUBLISHED = {
    "RN50": (102_007_137, 38_316_896, 489), "RN101": (119_688_033, 56_259_936, 795), "RN50x4": (178_300_601, 87_137_080, 669),
    "RN50x16": (290_979_217, 167_328_912, 921), "RN50x64": (623_258_305, 420_380_352, 1353),
    "ViT-B/32": (151_277_313, 87_849_216, 302), "ViT-B/16": (149_620_737, 86_192_640, 302),
    "ViT-L/14": (427_616_513, 303_966_208, 446), "ViT-L/14@336px": (427_944_193, 304_293_888, 446),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    model = build(name, device="meta")
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert (count(model), count(model.visual), len(model.state_dict())) == PUBLISHED[name]


def test_the_embedded_model_is_small():
    assert sum(p.numel() for p in build("emoji", device="meta").parameters()) <= 12_000_000


@torch.no_grad()
@pytest.mark.parametrize("theirs, ours", [("quick_gelu", "quickgelu"), ("gelu", "gelu")])
@pytest.mark.parametrize("eos", [599, 2], ids=["pools at the first end", "pools at the largest id"])
def test_vit_and_text_tower_equal_transformers(theirs, ours, eos):
    reference = transformers_model(theirs, eos=eos)
    state, _ = to_openai(reference.state_dict())
    model = build(replace(TINY_VIT, activation=ours, text_heads=2, vision_heads=2))
    model.load_state_dict(state)
    pictures, tokens = inputs(TINY_VIT)
    expected = reference(pixel_values=pictures, input_ids=tokens).logits_per_image
    torch.testing.assert_close(model(pictures, tokens)[0], expected, atol=1e-4, rtol=0)
    other = build(replace(model.config, activation="gelu" if ours == "quickgelu" else "quickgelu"))
    other.load_state_dict(state)
    assert (other(pictures, tokens)[0] - expected).abs().max() > 1e-3      # the comparison can tell the activations apart


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET, replace(TINY_VIT, activation="gelu"), replace(TINY_RESNET, vision_layers=(2, 1, 3, 1), vision_width=16)],
                         ids=["ViT", "ResNet", "ViT with GELU", "deeper ResNet"])
def test_both_kinds_of_tower_equal_open_clip(open_clip, config):
    reference = open_clip_tiny(open_clip, config)
    model = build(config)
    model.load_state_dict(reference.state_dict())
    pictures, tokens = inputs(config)
    torch.testing.assert_close(model.encode_image(pictures), reference.encode_image(pictures), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_text(tokens), reference.encode_text(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(pictures, tokens)[0], reference.get_logits(pictures, tokens)[0], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torch(causal):
    ours, theirs = Attention(64, 4), torch.nn.MultiheadAttention(64, 4, batch_first=True)
    shaken(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.full((7, 7), float("-inf")).triu(1) if causal else None
    torch.testing.assert_close(ours(x, causal), theirs(x, x, x, need_weights=False, attn_mask=mask)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_pooling_equals_torch():
    pool = shaken(AttentionPool2d(2, 64, 4, 16))
    x = torch.randn(3, 64, 2, 2, generator=torch.Generator().manual_seed(1))
    tokens = x.flatten(2).permute(2, 0, 1)                                      # (4, 3, 64)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + pool.positional_embedding[:, None]
    expected, _ = F.multi_head_attention_forward(
        tokens[:1], tokens, tokens, 64, 4, None, torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight)
    torch.testing.assert_close(pool(x), expected[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_follows_the_end_of_a_text_changes_nothing():
    model, (_, tokens) = tiny(TINY_VIT), inputs(TINY_VIT)
    rubbish = torch.where(tokens == 0, torch.tensor(17), tokens)
    torch.testing.assert_close(model.encode_text(rubbish), model.encode_text(tokens), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(tokens[:, :5]), model.encode_text(tokens), atol=1e-5, rtol=0)


def all_tokens(encode, model):
    "What `encode` finds when a hook on the last blocks waits for all tokens, and what the hooks saw."
    seen = []
    hooks = [blocks[-1].register_forward_hook(lambda block, inputs, output: seen.append(output)) for blocks in (model.visual.transformer.resblocks, model.transformer.resblocks)]
    try: return encode(model), seen
    finally:
        for hook in hooks: hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2e-2)])
def test_one_token_of_the_last_block_is_that_of_all_tokens(dtype, atol, n):
    pictures, tokens = inputs(TINY_VIT, n)
    model = tiny(TINY_VIT).to(dtype)
    for encode, length in ((lambda m: m.encode_image(pictures, True), 5), (lambda m: m.encode_text(tokens, True), None)):
        want, seen = all_tokens(encode, model)
        assert len(seen) == 1 and seen[0].ndim == 3 and length in (None, seen[0].shape[1])
        torch.testing.assert_close(encode(model), want, atol=atol, rtol=0)


def looked_at(what):
    "Somebody looks at a part of a tower; what was seen goes to the list."
    def parts(transformer): return {"transformer": transformer, "block": transformer.resblocks[-1], "attention": transformer.resblocks[-1].attn, "activation": transformer.resblocks[-1].mlp.gelu}
    return lambda transformer, seen: parts(transformer)[what].register_forward_hook(lambda module, x, y: seen.append(y.shape))


def another_function(transformer, seen):
    "The forward of the last attention is another one, as tools that draw attention maps do."
    attention, original = transformer.resblocks[-1].attn, transformer.resblocks[-1].attn.forward
    attention.forward = lambda *args: [seen.append((y := original(*args)).shape), y][1]


def another_block(transformer, seen):
    "The last block is of another class, without a second or third argument of ours but `causal`."
    class Block(torch.nn.Module):
        def __init__(self, inner): super().__init__(); self.inner = inner
        def forward(self, x, causal): seen.append((y := self.inner(x, causal)).shape); return y
    transformer.resblocks[-1] = Block(transformer.resblocks[-1])


@torch.no_grad()
@pytest.mark.parametrize("look", [*map(looked_at, ("transformer", "block", "attention", "activation")), another_function, another_block],
                         ids=["transformer", "block", "attention", "activation", "another function", "another block"])
def test_who_looks_at_the_last_block_sees_all_tokens(look):
    model, (pictures, tokens) = tiny(TINY_VIT), inputs(TINY_VIT)
    want = model.encode_image(pictures), model.encode_text(tokens)
    for i, (transformer, encode, length) in enumerate(((model.visual.transformer, lambda: model.encode_image(pictures), 5), (model.transformer, lambda: model.encode_text(tokens), None))):
        seen = []
        look(transformer, seen)
        torch.testing.assert_close(encode(), want[i], atol=1e-5, rtol=1e-5)
        length = length or int((tokens == TINY_VIT.vocab_size - 1).int().argmax(1).max()) + 1
        assert [s[:2] for s in seen] == [(len(pictures), length)]


def test_gradients_are_those_of_all_tokens():
    model, (pictures, tokens) = tiny(TINY_VIT).double(), inputs(TINY_VIT)
    last = [p for t in (model.visual.transformer, model.transformer) for p in t.resblocks[-1].parameters()]
    model.requires_grad_(False)
    for p in last: p.requires_grad_(True)             # the rest is frozen: one token asks, and the gradients are still whole
    def gradients(model): return torch.autograd.grad((model.encode_image(pictures, True) @ model.encode_text(tokens, True).T).diag().sum(), last)
    want, _ = all_tokens(gradients, model)
    torch.testing.assert_close(gradients(model), want, atol=1e-12, rtol=1e-12)
    assert all(g.abs().max() > 0 for g in want)


@pytest.mark.parametrize("mode", [lambda m: m.train(), lambda m: m.eval()], ids=["training", "evaluation with gradients"])
def test_with_gradients_the_digits_are_those_of_all_tokens(mode):
    model, (pictures, tokens) = mode(tiny(TINY_VIT).requires_grad_(True)), inputs(TINY_VIT)
    for encode in (lambda m: m.encode_image(pictures), lambda m: m.encode_text(tokens)): assert torch.equal(encode(model), all_tokens(encode, model)[0])


@torch.no_grad()
def test_traced_and_exported_towers_compute_the_same():
    model, (pictures, tokens) = tiny(TINY_VIT), inputs(TINY_VIT)
    want, text = model.encode_image(pictures), model.encode_text(tokens)
    traced = torch.jit.trace(model.visual, pictures[:2])
    exported = torch.export.export(model.visual, (pictures[:2],), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    compiled = torch.compile(model.visual, backend="eager")
    for tower in (traced, exported, compiled): torch.testing.assert_close(tower(pictures), want, atol=1e-5, rtol=1e-5)
    model.transformer.compile(backend="eager", dynamic=True)      # what training does
    torch.testing.assert_close(model.encode_text(tokens), text, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=lambda c: c.name)
def test_bfloat16_stays_near(config):
    pictures, tokens = inputs(config)
    exact, rounded = tiny(config), tiny(config).to(torch.bfloat16)
    for a, b in ((exact.encode_image(pictures, True), rounded.encode_image(pictures, True)), (exact.encode_text(tokens, True), rounded.encode_text(tokens, True))):
        assert b.dtype == torch.bfloat16 and F.cosine_similarity(a, b.float()).min() > 0.995


def test_a_seed_gives_the_same_model_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = build(TINY_VIT, seed=1), build(TINY_VIT, seed=1), build(TINY_VIT, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.visual.proj, b.visual.proj) and not torch.equal(a.visual.proj, c.visual.proj)
    assert not a.training


@pytest.mark.parametrize("call, message", [
    (lambda: build("ViT-B-32"), "unknown model 'ViT-B-32'"),
    (lambda: replace(TINY_VIT, activation="relu"), "'relu' is not known"),
    (lambda: replace(TINY_VIT, vision_patch_size=None), "does not fit vision_patch_size=None"),
    (lambda: CLIPConfig.from_dict({"name": "x", "depth": 3}), "unknown configuration keys ['depth']"),
    (lambda: Attention(64, 5), "width 64 is not a multiple of 5 heads"),
    (lambda: build(TINY_VIT).encode_image(torch.zeros(1, 3, 33, 32)), "shape (n, 3, 32, 32), got (1, 3, 33, 32)"),
    (lambda: build(TINY_VIT).encode_text(torch.zeros(1, 17, dtype=torch.long)), "up to 16), got (1, 17)"),
    (lambda: build(TINY_VIT).encode_text(torch.tensor([[598, 4, 599], [598, 4, 5]])), "row 1 has no end-of-text token (id 599)"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError) as error: call()
    assert message in str(error.value)


def test_configurations_survive_json():
    import json
    for config in (*CONFIGS.values(), TINY_RESNET): assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
