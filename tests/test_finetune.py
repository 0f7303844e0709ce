"""Frozen towers, rates by depth, and weights between before and after."""

from copy import deepcopy

import pytest
import torch
from references import TINY_RESNET, TINY_VIT, inputs, tiny
from torch.optim.swa_utils import AveragedModel, update_bn

from clip_lab.model import CONFIGS, build
from clip_lab.train.finetune import FrozenBatchNorm2d, freeze, freeze_statistics, layer_decay_groups, layers_below_top, sweep, wise_ft


def stepped(model, seed=0):
    "One step of training in place."
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model.train()(*inputs(model.config, 4, seed))[0].diagonal().sum().backward()
    optimizer.step()
    return model


def test_frozen_statistics_survive_everything_that_would_change_them():
    model = tiny(TINY_RESNET)
    before = {k: v.clone() for k, v in model.named_buffers()}
    assert freeze_statistics(model) == freeze_statistics(model) == 22      # 3 in the stem, 3 in each of 5 blocks, a shortcut in each of 4 stages
    assert not any(m.training for m in model.train().modules() if isinstance(m, FrozenBatchNorm2d))
    pictures, _ = inputs(TINY_RESNET, 4)
    model.visual(pictures)
    update_bn([pictures], model.visual)
    copy = AveragedModel(model).module.train()
    copy.visual(pictures)
    for m in (model, copy): assert all(torch.equal(v, before[k]) for k, v in m.named_buffers())
    assert all(n.weight.requires_grad for n in model.modules() if isinstance(n, FrozenBatchNorm2d))


def test_frozen_batch_norm_gives_what_eval_mode_gives():
    model = tiny(TINY_RESNET)
    pictures, _ = inputs(TINY_RESNET)
    want = model.visual(pictures)
    freeze_statistics(model)
    assert torch.equal(model.train().visual(pictures), want)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=lambda c: c.name)
def test_a_frozen_tower_does_not_move(config, tower):
    model = tiny(config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    n = freeze(model, tower)
    assert n == sum(p.numel() for p in model.parameters() if not p.requires_grad) and model.logit_scale.requires_grad
    after = stepped(model).state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(k == "logit_scale" or k.startswith("visual.") == (tower == "text") for k in moved)


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32", "emoji"])
def test_every_parameter_has_its_rate_and_depth(name):
    model = build(name, device="meta")
    groups = layer_decay_groups(model, 1.0, 0.5, 0.1)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert all((g["weight_decay"] > 0) == (p.ndim > 1) for g in groups for p in g["params"])
    config = CONFIGS[name]
    depth = config.vision_layers if config.is_vit else sum(config.vision_layers)
    image = {layers_below_top(n, config) for n, _ in model.named_parameters() if n.startswith("visual.")}
    text = {layers_below_top(n, config) for n, _ in model.named_parameters() if not n.startswith("visual.")}
    assert image == set(range(depth + 2)) and text == set(range(config.text_layers + 2))      # no depth is skipped


def test_rates_follow_the_schedule_and_frozen_parameters_are_left_out():
    model = tiny(TINY_VIT)
    freeze(model, "text")
    groups = layer_decay_groups(model, 0.1, 0.5, 0.0)
    assert sum(len(g["params"]) for g in groups) == len([p for p in model.parameters() if p.requires_grad])
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    first = schedule.get_last_lr(); optimizer.step(); schedule.step()
    assert schedule.get_last_lr() == pytest.approx([lr / 2 for lr in first]) and min(first) == pytest.approx(0.1 * 0.5 ** 3)


@pytest.mark.parametrize("decay", [0, -1, 1.01, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="factor in"): layer_decay_groups(tiny(TINY_VIT), 1e-3, decay, 0.1)


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=lambda c: c.name)
def test_weights_in_between_are_those_of_the_wise_ft_formula(config):
    zero = tiny(config); tuned = stepped(deepcopy(zero))
    theta_0, theta_1 = ({k: v.clone() for k, v in m.state_dict().items()} for m in (zero, tuned))
    for alpha, model in wise_ft(zero, tuned, [0, 0.3, 0.5, 1]):
        assert not model.training
        for key, value in model.state_dict().items():
            if not value.is_floating_point(): assert torch.equal(value, theta_1[key]); continue
            torch.testing.assert_close(value, (1 - alpha) * theta_0[key] + alpha * theta_1[key], rtol=1e-6, atol=1e-6)
            if alpha in (0, 1): assert torch.equal(value, (theta_0, theta_1)[alpha][key])
    for m, theta in ((zero, theta_0), (tuned, theta_1)): assert all(torch.equal(v, theta[k]) for k, v in m.state_dict().items())


def test_half_precision_ends_stay_exact():
    zero, tuned = tiny(TINY_VIT).half(), tiny(TINY_VIT, seed=1).half()
    for (alpha, model), end in zip(wise_ft(zero, tuned, (0, 1)), (zero, tuned)):
        assert all(v.dtype == torch.float16 and torch.equal(v, end.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_sweep_is_a_tidy_table_and_asks_for_intervals():
    zero, tuned = tiny(TINY_VIT), tiny(TINY_VIT, seed=1)
    row = lambda model: [dict(task=t, value=0.5, low=0.4, high=0.6, n=100) for t in ("old", "new")]
    table = sweep(zero, tuned, row, alphas=(0, 0.5, 1))
    assert list(table.columns) == ["alpha", "task", "value", "low", "high", "n"] and table.alpha.tolist() == [0, 0, 0.5, 0.5, 1, 1]
    with pytest.raises(ValueError, match="without n; a row needs"): sweep(zero, tuned, lambda m: [dict(task="old", value=0.5, low=0.4, high=0.6)])
    with pytest.raises(ValueError, match="different configurations"): sweep(zero, tiny(TINY_RESNET), row)
    with pytest.raises(ValueError, match="alpha is -0.1"): sweep(zero, tuned, row, alphas=[-0.1])
    with pytest.raises(ValueError, match="no tower 'both'"): freeze(zero, "both")
