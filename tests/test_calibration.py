"Calibration against scikit-learn and brute force, intervals against repetition, temperature against a general optimiser; every bad input."
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss

from clip_lab.evals.calibration import (brier, expected_calibration_error, fit_temperature, log_loss, reliability, temperature_scaling, top1)


def sure(n=500, seed=0, shift=.1):
    rng = np.random.default_rng(seed)
    confidence = rng.beta(3, 2, n)
    return confidence, rng.random(n) < np.clip(confidence - shift, 0, 1)


def logits(n=400, classes=5, T=2., seed=0):
    rng = np.random.default_rng(seed)
    z = 3 * rng.standard_normal((n, classes))
    return z, np.array([rng.choice(classes, p=row) for row in softmax(z / T, axis=1)])


def brute_ece(confidence, right, edges):
    total = 0.
    for i, (low, high) in enumerate(zip(edges, edges[1:])):
        inside = [j for j, c in enumerate(confidence) if (low < c or (i == 0 and low == c)) and c <= high]
        if inside: total += abs(sum(right[j] for j in inside) - sum(confidence[j] for j in inside)) / len(confidence)
    return total


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
@pytest.mark.parametrize("spacing, strategy", [("width", "uniform"), ("mass", "quantile")])
def test_bins_equal_scikit_learns_and_ece_brute_force(bins, spacing, strategy):
    confidence, right = sure()
    table = reliability(confidence, right, bins, spacing)
    accuracy, mean = calibration_curve(right, confidence, n_bins=bins, strategy=strategy)
    some = table[table.n > 0]
    assert some.accuracy.to_numpy() == pytest.approx(accuracy) and some.confidence.to_numpy() == pytest.approx(mean) and table.n.sum() == 500
    edges = np.r_[table.above, table.upto.iloc[-1]]
    assert expected_calibration_error(confidence, right, bins, spacing, n_resamples=10).ece.value == pytest.approx(brute_ece(confidence, right, edges))
    assert (np.abs(some.gap) * some.n).sum() / 500 == pytest.approx(brute_ece(confidence, right, edges))


def test_edges_belong_below_and_empty_bins_stay():
    table = reliability([0., .5, .5, 1.], [0, 1, 0, 1], 4)
    assert table.n.tolist() == [1, 2, 0, 1] and np.isnan(table.accuracy[2]) and table.low[:2].notna().all()
    same = reliability([.3, .3, .3], [0, 1, 0], 10, "mass")                # one value: one bin
    assert same.n.tolist() == [3] and same.confidence[0] == pytest.approx(.3)


def test_equal_mass_bins_hold_equally_many():
    confidence, right = sure(600)
    assert set(reliability(confidence, right, 10, "mass").n) == {60}


def test_interval_and_null_band_hold_their_level():
    "A promise about repetition, for a calibrated model, one that is a little too sure, and one that is much too sure."
    edges, grid = np.linspace(0, 1, 16), np.random.default_rng(9).beta(3, 2, 400_000)
    for shift in (0., .05, .15):
        gap = np.clip(grid - shift, 0, 1) - grid
        truth = np.abs(np.bincount(np.searchsorted(edges[1:-1], grid), weights=gap)).sum() / len(grid)
        found = [expected_calibration_error(*sure(400, seed, shift), n_resamples=150, seed=seed) for seed in range(80)]
        held = np.mean([e.ece.low <= truth <= e.ece.high for e in found])
        assert held >= .9
        inside = np.mean([e.null_band[0] <= e.ece.value <= e.null_band[1] for e in found])
        assert inside >= .88 if shift == 0 else inside < .9
        if shift == 0:
            assert np.mean([e.p < .05 for e in found]) <= .12
            assert abs(np.mean([e.excess for e in found])) < .006 < np.mean([e.ece.value for e in found])     # the ECE itself is not 0


def test_luck_shrinks_with_pictures_and_the_seed_decides():
    few, many = (expected_calibration_error(*sure(n, shift=0), n_resamples=200) for n in (200, 20_000))
    assert few.null > 5 * many.null and many.null > 0
    a, b, c = (expected_calibration_error(*sure(), n_resamples=100, seed=s) for s in (1, 1, 2))
    assert a.ece == b.ece and a.null_band == b.null_band != c.null_band
    assert a.signed == pytest.approx(sure()[0].mean() - sure()[1].mean())


def test_scores_equal_scikit_learns():
    z, y = logits()
    p = softmax(z, axis=1)
    assert brier(p, y).value == pytest.approx(brier_score_loss(y, p, labels=range(5), scale_by_half=False))
    assert log_loss(z, y).value == pytest.approx(sklearn_log_loss(y, p))
    assert brier(p[:, :2] / p[:, :2].sum(1, keepdims=True), y % 2).value == pytest.approx(2 * brier_score_loss(y % 2, (p[:, 1] / p[:, :2].sum(1))))
    assert np.isfinite(log_loss([[0, 5000.], [1, 0]], [0, 0]).value)             # its probability is 0 in double precision


@pytest.mark.parametrize("T", [.3, 1., 2., 30.])
def test_temperature_is_the_minimum_at_any_scale(T):
    z, y = logits(600, T=2.)
    z = z * T / 2
    found = fit_temperature(z, y)
    loss = lambda beta: -log_softmax(beta * z, axis=1)[np.arange(len(z)), y].mean()
    best = minimize(lambda b: loss(np.exp(b[0])), [-np.log(T)], method="Nelder-Mead", options=dict(xatol=1e-9, fatol=1e-13)).x[0]
    assert found.value == pytest.approx(np.exp(-best), rel=1e-4) and found.low < T < found.high


def test_the_temperatures_interval_holds_its_level():
    held = sum((e := fit_temperature(*logits(300, seed=seed))).low <= 2 <= e.high for seed in range(200))
    assert 182 <= held <= 198


def test_scaling_changes_no_answer_and_lowers_the_loss():
    z, y = logits(1200)
    T, table = temperature_scaling((z[:600], y[:600]), (z[600:], y[600:]), n_resamples=200)
    value = table.set_index(["when", "metric"])
    assert T.value == pytest.approx(fit_temperature(z[:600], y[:600]).value) and (table.n == 600).all()
    assert value.estimate["after", "log loss"] == pytest.approx(log_loss(z[600:] / T.value, y[600:]).value)
    assert all(value.estimate["after", m] < value.estimate["before", m] for m in ("ECE", "Brier score", "log loss"))
    assert value.p["before", "ECE"] < .01 < value.p["after", "ECE"] and np.isnan(value.p["after", "Brier score"])


Z, Y = logits(20)
C, R = sure(20)

@pytest.mark.parametrize("call, message", [
    (lambda: top1(Z, Y), "row 0 is no distribution"),
    (lambda: top1(softmax(Z, axis=1) * float("nan"), Y), "row 0 is no distribution"),
    (lambda: top1(softmax(Z, axis=1), Y[:3]), r"labels have shape \(3,\)"),
    (lambda: top1(softmax(Z, axis=1), [7] * 20), "label 7 in row 0 is out of range; with 5 classes"),
    (lambda: top1(np.ones((3, 1)), [0, 0, 0]), "one class only"),
    (lambda: top1([], []), r"probabilities have shape \(0,\)"),
    (lambda: reliability(C, R[:3]), r"confidence has shape \(20,\), right \(3,\)"),
    (lambda: reliability([.5, float("nan")], [1, 0]), "confidence nan of picture 1"),
    (lambda: reliability([.5, 23.], [1, 0]), "confidence 23.0 of picture 1 is no probability"),
    (lambda: reliability([], []), r"got shape \(0,\)"),
    (lambda: reliability(C, R, 0), "bins is 0"),
    (lambda: reliability(C, R, spacing="even"), "spacing is 'even'"),
    (lambda: expected_calibration_error([.5], [1]), "single picture"),
    (lambda: expected_calibration_error(C, R, level=95), "level is a share"),
    (lambda: brier([[.5, .5]], [0]), "single picture has no interval"),
    (lambda: log_loss(Z * float("inf"), Y), "logits of picture 0 are not finite"),
    (lambda: log_loss(Z[:, :1], Y * 0), "one class only"),
    (lambda: log_loss(Z, Y + .5), "labels are float64; expected whole numbers"),
    (lambda: fit_temperature(Z, Z.argmax(1)), "no temperature is cold enough"),
    (lambda: fit_temperature(Z, Z.argmin(1)), "no temperature is hot enough"),
    (lambda: fit_temperature(np.zeros((3, 2)), [0, 1, 0]), "no temperature"),
    (lambda: temperature_scaling((Z, Y), (Z[5:6], Y[5:6])), "row 5 of the one is row 0 of the other"),
    (lambda: temperature_scaling((Z, Y), (Z[:0], Y[:0])), r"logits have shape \(0, 5\)"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
