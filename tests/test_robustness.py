"Effective robustness against closed forms, statsmodels and redrawn rows; the message of every bad input."
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import statsmodels.api as sm
from scipy.special import expit, logit

from clip_lab.evals.robustness import (BASELINES, Baseline, alpha_robustness, effective_robustness, few_shot_curve, fit_baseline, relative_robustness,
                                       robustness, to_logit)

FLAT = Baseline("identity", 1.0, 0.0, 1.0)     # expects the accuracy it is given


def models(n=60, slope=0.8, intercept=-0.6, noise=0.15, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 2.5, n)
    return pd.DataFrame({"acc_id": expit(x), "acc_ood": expit(slope * x + intercept + noise * rng.standard_normal(n))})


def test_fit_and_band_equal_ordinary_least_squares():
    table = models()
    line = fit_baseline(table, "planted", n_resamples=4000)
    ols = sm.OLS(logit(table.acc_ood), sm.add_constant(logit(table.acc_id))).fit(cov_type="HC1")     # pairs are redrawn: no equal variances assumed
    assert (line.intercept, line.slope, line.r2) == pytest.approx((*ols.params, ols.rsquared))
    grid = np.linspace(0.3, 0.9, 7)
    theory = expit(ols.get_prediction(sm.add_constant(logit(grid))).conf_int())
    assert np.stack(line.band(grid), 1) == pytest.approx(theory, abs=0.004)
    assert line.n == 60 and line.id_range == (table.acc_id.min(), table.acc_id.max())


def test_the_band_holds_the_true_line():
    "A promise about repetition: 100 tables of 40 models, one true line."
    bands = [fit_baseline(models(40, seed=seed), "", 400).band([0.6]) for seed in range(100)]
    held = sum(bool(low[0] <= expit(0.8 * logit(0.6) - 0.6) <= high[0]) for low, high in bands)
    assert scipy.stats.binomtest(held, 100, 0.95).pvalue > 0.001


def test_only_standard_models_make_the_line_and_the_seed_decides():
    table = models()
    judged = pd.DataFrame({"acc_id": [0.5, 0.6], "acc_ood": [0.9, 0.95], "standard": [False, False]})
    mixed = fit_baseline(pd.concat([table.assign(standard=True), judged]), "", seed=4)
    alone, other = fit_baseline(table, "", seed=4), fit_baseline(table, "", seed=5)
    assert (mixed.slope, mixed.intercept, mixed.n) == (alone.slope, alone.intercept, alone.n)
    assert (mixed.lines == alone.lines).all() and not np.array_equal(alone.lines, other.lines)
    assert alone.lines.shape == (1000, 2)


def test_ends_move_by_half_a_picture():
    assert to_logit([0, 1, 0.25], [50, 50, 4]) == pytest.approx([np.log(0.01 / 0.99), np.log(0.99 / 0.01), np.log(1 / 3)])
    table = models().assign(n_id=1000, n_ood=200)
    table.loc[0, "acc_ood"] = 1.0
    moved = table.copy()
    moved.loc[0, "acc_ood"] = 1 - 0.5 / 200
    assert fit_baseline(table, "").slope == fit_baseline(moved, "").slope
    assert effective_robustness(1.0, 0.9, FLAT, n_id=100) == pytest.approx(0.9 - 0.995)


def test_printed_lines():
    assert len(BASELINES) == 7 and all("[C]" in b.source and b.lines is None and b.n is None for b in BASELINES.values())
    assert {k for k, b in BASELINES.items() if "contradicts" in b.source} == {"imagenet-vid-pm0", "youtube-bb-pm0"}
    b = BASELINES["imagenet-a"]
    odds = np.exp(-7.632) * (0.9 / 0.1) ** 1.990                     # the same line without logits
    assert effective_robustness([0.9], [0.5], b) == pytest.approx([0.5 - odds / (1 + odds)])
    assert all(np.all(b.expected([0.3, 0.6, 0.9]) < [0.3, 0.6, 0.9]) for b in BASELINES.values())   # every shift costs accuracy
    assert not b.extrapolates(0.01)


def test_rho_of_a_standard_model_on_the_line_is_zero():
    line = fit_baseline(models(noise=0), "")
    table = models(noise=0, seed=9)
    assert effective_robustness(table.acc_id, table.acc_ood, line) == pytest.approx(np.zeros(60), abs=1e-9)
    assert line.extrapolates([0.01, 0.6, 0.99]).tolist() == [True, False, True]


def test_interval_of_rho_is_newcombe_like_under_the_identity():
    "With the line y = x, rho is a plain difference of two accuracies, for which other intervals exist."
    from statsmodels.stats.proportion import confint_proportions_2indep
    a, b = np.repeat([1, 0], [1500, 500]), np.repeat([1, 0], [1300, 700])
    e = robustness(a, b, FLAT, n_resamples=20_000)
    assert e.value == pytest.approx(-0.1) and e.n == 4000 and e.method == "bootstrap of pictures"
    assert (e.low, e.high) == pytest.approx(confint_proportions_2indep(1300, 2000, 1500, 2000, method="wald"), abs=0.001)


def test_paired_interval_redraws_rows():
    rng = np.random.default_rng(0)
    a = rng.random(600) < 0.7
    b = np.where(rng.random(600) < 0.8, a, rng.random(600) < 0.3)
    line = BASELINES["objectnet"]
    ours = robustness(a, b, line, paired=True, n_resamples=10_000)
    rows = rng.integers(600, size=(10_000, 600))
    theirs = np.quantile(b[rows].mean(1) - line.expected(a[rows].mean(1)), [0.025, 0.975])
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=0.003) and ours.n == 600
    fitted = robustness(a, b, fit_baseline(models(), ""), paired=True)
    assert fitted.method == "bootstrap of pictures and models" and fitted == robustness(a, b, fit_baseline(models(), ""), paired=True)
    high = robustness(np.ones(50), np.ones(50), fit_baseline(models(), ""))       # every answer right: moved by half a picture, and said to be outside
    assert high.measure == "effective robustness, line extrapolated" and np.isfinite([high.value, high.low, high.high]).all()


def test_relative_robustness_by_sign_flips():
    "An interval that excludes zero and a permutation test by brute force agree, in both directions."
    rng = np.random.default_rng(2)
    before = rng.random(400) < 0.5
    for after, differs in ((before ^ (rng.random(400) < 0.1), False), (before | (rng.random(400) < 0.1), True)):
        e = relative_robustness(before, after)
        gaps = after.astype(int) - before.astype(int)
        flipped = (rng.choice([-1, 1], size=(5000, 400)) * gaps).sum(1)
        p = (np.abs(flipped) >= abs(gaps.sum())).mean()
        assert e.value == pytest.approx(gaps.mean()) and (not e.low <= 0 <= e.high) == (p < 0.05) == differs


def test_few_shot_curve_is_a_t_interval():
    rng = np.random.default_rng(0)
    results = pd.DataFrame({"shots": np.repeat([1, 4, 16], [5, 5, 1]), "acc_id": rng.uniform(0.4, 0.6, 11), "acc_ood": rng.uniform(0.3, 0.5, 11)})
    curve = few_shot_curve(results, FLAT, level=0.9)
    for row in curve.itertuples():
        gaps = (results.acc_ood - results.acc_id)[results.shots == row.shots]
        assert row.rho == pytest.approx(gaps.mean()) and row.draws == len(gaps)
        if row.draws > 1: assert (row.low, row.high) == pytest.approx(tuple(scipy.stats.ttest_1samp(gaps, 0).confidence_interval(0.9)))
        else: assert np.isnan(row.low) and np.isnan(row.high)
    perfect = pd.DataFrame({"shots": [1, 1], "acc_id": [1.0, 0.5], "acc_ood": [0.5, 0.5], "n_id": [50, 50]})
    assert few_shot_curve(perfect, FLAT).rho[0] == pytest.approx((0.5 - 0.99 + 0) / 2)
    with pytest.raises(ValueError, match="infinite logit"): few_shot_curve(perfect.drop(columns="n_id"), FLAT)


def test_alpha_robustness_reads_what_the_sweep_writes():
    import torch
    from clip_lab.evals.stats import proportion
    from clip_lab.model import CLIP, CLIPConfig
    from clip_lab.train.finetune import sweep
    config = CLIPConfig("tiny", embed_dim=8, image_resolution=8, vision_layers=1, vision_width=64, vision_patch_size=8,
                        context_length=4, vocab_size=16, text_width=64, text_heads=1, text_layers=1)
    torch.manual_seed(0)
    before, after = CLIP(config), CLIP(config)
    before.logit_scale.data.fill_(0.0)
    after.logit_scale.data.fill_(1.0)
    def evaluate(model):                       # answers that follow the interpolated weight
        moved = float(model.logit_scale.detach())
        for task, k in (("id", round(600 + 200 * moved)), ("shift", round(500 + 100 * moved))):
            e = proportion(k, 1000)
            yield dict(task=task, value=e.value, low=e.low, high=e.high, n=e.n)
    table = alpha_robustness(sweep(before, after, evaluate, (0, 0.5, 1)), "id", {"shift": FLAT})
    assert table.rho.tolist() == pytest.approx([-0.1, -0.15, -0.2]) and table.relative.tolist() == pytest.approx([0, 0.05, 0.1])
    for row in table.itertuples():
        a, b = (np.arange(1000) < 1000 * x for x in (row.acc_id, row.acc_ood))
        alone = robustness(a, b, FLAT)
        assert (row.rho, row.low, row.high) == pytest.approx((alone.value, alone.low, alone.high))


SWEEP = pd.DataFrame({"alpha": [0, 0, 1, 1], "task": ["id", "s"] * 2, "value": [0.5, 0.4, 0.6, 0.5], "n": 10})

@pytest.mark.parametrize("call, message", [
    (lambda: to_logit(76.2), "accuracy 76.2 is no share"),
    (lambda: to_logit([0.5, float("nan")]), "accuracy nan is no share"),
    (lambda: to_logit([0.5, 0]), "accuracy 0 has an infinite logit"),
    (lambda: to_logit(0.5, 0), "at least 1; got 0"),
    (lambda: fit_baseline(pd.DataFrame({"acc_id": [0.1]}), "V2"), "no column acc_ood; it has acc_id"),
    (lambda: fit_baseline(models(2), "V2"), "V2: 2 standard models with 2 different accuracies"),
    (lambda: fit_baseline(models().assign(standard=False), "V2"), "V2: 0 standard models"),
    (lambda: fit_baseline(models().assign(acc_ood=1.0), "V2"), "infinite logit"),
    (lambda: BASELINES["objectnet"].band(0.5), "ObjectNet | classes was printed without its models"),
    (lambda: effective_robustness([0.5, 0.6], [0.5], FLAT), r"acc_id has shape \(2,\) and acc_ood \(1,\)"),
    (lambda: effective_robustness(0.5, 50, FLAT), "accuracy 50.0 is no share"),
    (lambda: robustness([], [1], FLAT), r"got shape \(0,\)"),
    (lambda: robustness([1, 0], [1, 0, 0], FLAT, paired=True), "2 answers against 3"),
    (lambda: robustness([0.5, 1], [1, 0], FLAT), r"right \(1\) or wrong \(0\)"),
    (lambda: relative_robustness([1, 0], [1, 0, 0]), r"lengths \[3, 2\]"),
    (lambda: few_shot_curve(pd.DataFrame({"shots": [], "acc_id": [], "acc_ood": []}), FLAT), "no rows"),
    (lambda: alpha_robustness(SWEEP.drop(columns="n"), "id", {"s": FLAT}), "no column n"),
    (lambda: alpha_robustness(pd.concat([SWEEP, SWEEP]), "id", {"s": FLAT}), "two rows for alpha 0, task 'id'"),
    (lambda: alpha_robustness(SWEEP, "id", {"other": FLAT}), "no row for alpha 0, task 'other'"),
    (lambda: alpha_robustness(SWEEP.assign(value=0.123), "id", {"s": FLAT}), "0.123 is no share of 10 pictures"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
