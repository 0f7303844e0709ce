"""Work counted from a configuration, ResNets grown by the paper's rule, and positions for another input size."""

import math

import pytest
import torch
from references import TINY_RESNET, TINY_VIT, inputs, tiny, transformers_model
from torch.utils.flop_counter import FlopCounterMode

from clip_lab.model import CONFIGS, CLIPConfig, build
from clip_lab.scaling import Cost, gflops, resize_grid, resize_positions, scale_resnet

ODD = CLIPConfig("odd", 24, 96, (1, 3, 2, 2), 48, context_length=9, vocab_size=600, text_width=96, text_heads=3, text_layers=3)


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET, ODD, CONFIGS["ViT-L/14@336px"], scale_resnet(CONFIGS["emoji"], 3)], ids=lambda c: c.name)
def test_work_equals_what_torch_counts(config):
    model = build(config, device="meta")
    with FlopCounterMode(display=False) as image:
        model.visual(torch.empty(1, 3, config.image_resolution, config.image_resolution, device="meta"))
    with FlopCounterMode(display=False) as text:
        model.transformer(torch.empty(1, config.context_length, config.text_width, device="meta"))[:, 0] @ model.text_projection
    assert gflops(config) == Cost(image.get_total_flops() / 2e9, text.get_total_flops() / 2e9)


@pytest.mark.parametrize("name, published", [("RN50", 6.1), ("RN50x64", 265.9)])      # the ends of the paper's Figure 9
def test_work_is_within_two_percent_of_the_published(name, published):
    assert gflops(CONFIGS[name], every_query=True).image == pytest.approx(published, rel=0.02)


def test_scaled_resnets_come_near_the_papers_and_can_be_built():
    for factor in (4, 16, 64):
        ours, theirs = scale_resnet(CONFIGS["RN50"], factor), CONFIGS[f"RN50x{factor}"]
        assert (ours.vision_width, ours.text_width, ours.text_heads, ours.text_layers) == (theirs.vision_width, theirs.text_width, theirs.text_heads, 12)
        assert abs(sum(ours.vision_layers) - sum(theirs.vision_layers)) <= 1 and abs(ours.image_resolution - theirs.image_resolution) <= 32
    for factor in (0.2, 0.9, 1.7, 5):
        config = scale_resnet(CONFIGS["emoji"], factor, name="mine")
        assert config.name == "mine" and config.image_resolution % 32 == 0 and config.text_width % config.text_heads == 0
        build(config, device="meta").visual(torch.empty(1, 3, config.image_resolution, config.image_resolution, device="meta"))
    costs = [gflops(scale_resnet(CONFIGS["RN50"], 2 ** i)).image for i in range(7)]
    assert costs == sorted(costs) and costs[-1] / costs[0] > 40


@pytest.mark.parametrize("config, factor, word", [("ViT-B/32", 4, "ViT"), ("RN50", 0, "positive"), ("RN50", math.inf, "positive"), ("RN50", math.nan, "positive")])
def test_what_cannot_be_scaled_is_said(config, factor, word):
    with pytest.raises(ValueError, match=word): scale_resnet(CONFIGS[config], factor)


@pytest.mark.parametrize("size", [16, 32, 48, 80])
def test_positions_are_those_of_transformers(size):
    theirs = transformers_model().vision_model.embeddings                       # 32 pixels, patches of 16
    table = theirs.position_embedding.weight.detach()
    want = theirs.interpolate_pos_encoding(torch.zeros(1, 1 + (size // 16) ** 2, 128), size, size)[0].detach()
    torch.testing.assert_close(resize_grid(table, size // 16), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=lambda c: c.name)
def test_only_the_positions_change(config):
    model, size = tiny(config), 2 * config.image_resolution
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wide = resize_positions(model.train(), size)
    after = wide.state_dict()
    changed = [k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])]
    assert list(after) == list(before) and changed == [k for k in before if k.startswith("visual") and k.endswith("positional_embedding")]
    assert wide.training and wide.config.name == f"{config.name}@{size}px" and wide.visual.input_resolution == size
    pictures, tokens = inputs(wide.config)
    per_image, _ = wide(pictures, tokens)
    per_image.sum().backward()                                                  # parameters that learn, in a model of its own
    assert wide.logit_scale.grad is not None and model.logit_scale.grad is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_same_size_is_the_same_model_and_half_precision_stays():
    model = tiny(TINY_VIT).half()
    same, small = resize_positions(model, 32), resize_positions(model, 16)
    assert same.config == model.config and all(torch.equal(v, same.state_dict()[k]) for k, v in model.state_dict().items())
    assert {p.dtype for p in small.parameters()} == {torch.float16} and small.visual.positional_embedding.shape == (2, 128)
    assert small.visual.positional_embedding.data_ptr() != model.visual.positional_embedding.data_ptr()
    assert torch.equal(small.visual.positional_embedding[0], model.visual.positional_embedding[0])


@pytest.mark.parametrize("config, size, word", [(TINY_VIT, 40, "multiple of 16, its patch size"), (TINY_RESNET, 80, "multiple of 32"), (TINY_RESNET, 0, "multiple of 32")])
def test_sizes_that_do_not_fit_are_said(config, size, word):
    with pytest.raises(ValueError, match=word): resize_positions(build(config, device="meta"), size)
