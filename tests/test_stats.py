"Intervals against scipy and scikit-learn, which share no code with ours, and the message of every bad input."
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st
from sklearn.metrics import balanced_accuracy_score

from clip_lab.evals.stats import METHODS, Estimate, interval, mean_per_class, proportion

SCIPY = {"wilson": "wilson", "beta": "exact"}   # our names (statsmodels') and scipy's


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 50_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
       st.sampled_from([0.5, 0.9, 0.95, 0.995]), st.sampled_from(sorted(METHODS)))
def test_proportion_equals_scipy(counts, level, method):
    k, n = counts
    ours = proportion(k, n, level, method)
    theirs = scipy.stats.binomtest(k, n).proportion_ci(level, SCIPY[method])
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-8)
    assert 0 <= ours.low <= ours.value == k / n <= ours.high <= 1


def test_published_interval_of_the_paper():
    "Section 7.1: a rate of 14.4 % among about 1,400 people and the interval [12.6, 16.4] printed with it."
    e = proportion(202, 1400, method="beta")
    assert f"{e.value:.3f} {e.low:.3f} {e.high:.3f}" == "0.144 0.126 0.164"


def test_a_column_at_once_equals_one_by_one():
    k, n = np.array([0, 3, 9, 40]), np.array([4, 4, 10, 40])
    low, high = interval(k, n, 0.9)
    one_by_one = [proportion(*counts, level=0.9) for counts in zip(k, n)]
    assert low.tolist() == [e.low for e in one_by_one] and high.tolist() == [e.high for e in one_by_one]
    assert low[0] == 0 and high[-1] == 1


@pytest.mark.parametrize("call, message", [
    (lambda: proportion(0, 0), r"no observations \(n = 0\)"),
    (lambda: interval([1, 0], [2, 0]), r"n = 0 at entry 1"),
    (lambda: proportion(11, 10), "k = 11 of n = 10 cannot be"),
    (lambda: interval([1, -2], [3, 3]), "k = -2 of n = 3 at entry 1"),
    (lambda: proportion(0.8, 10), "k counts things and must be whole"),
    (lambda: proportion(float("nan"), 10), "must be whole"),
    (lambda: interval([1, 2], [3]), r"k has shape \(2,\) and n has shape \(1,\)"),
    (lambda: proportion(8, 10, level=95), "share between 0 and 1"),
    (lambda: proportion(8, 10, method="wald"), "unknown method 'wald'"),
    (lambda: mean_per_class([], []), "no class has a picture"),
    (lambda: mean_per_class([1], [2], level=1), "share between 0 and 1"),
    (lambda: mean_per_class([3], [2]), "k = 3 of n = 2"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_mean_per_class_value_is_balanced_accuracy():
    rng = np.random.default_rng(0)
    truth, answer = rng.integers(0, 12, 500), rng.integers(0, 12, 500)
    k, n = np.bincount(truth[truth == answer], minlength=13), np.bincount(truth, minlength=13)   # class 12 has no picture
    e = mean_per_class(k, n)
    assert e.value == pytest.approx(balanced_accuracy_score(truth, answer)) and e.n == 500
    assert e.low < e.value < e.high


def test_mean_per_class_interval_is_scipys_bootstrap():
    k, n = np.array([45, 20, 33]), np.array([50, 40, 35])
    answers = [np.repeat([1, 0], [right, total - right]) for right, total in zip(k, n)]
    theirs = scipy.stats.bootstrap(answers, lambda *c, axis: sum(x.mean(axis) for x in c) / len(c), confidence_level=0.9,
                                   method="percentile", n_resamples=20_000, rng=0).confidence_interval
    ours = mean_per_class(k, n, level=0.9, n_resamples=20_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_single_pictures_are_not_certain():
    right = np.arange(400) % 4 > 0
    e, wilson = mean_per_class(right, np.ones(400)), proportion(300, 400)
    assert (e.low, e.high) == pytest.approx((wilson.low, wilson.high), abs=0.01)
    mixed = mean_per_class([1, 0, 1, 1, 0, 90], [1, 1, 1, 1, 1, 100])
    assert mixed.low < mixed.value - 0.1 and mixed.high > mixed.value + 0.1


def test_the_seed_decides():
    k, n = [3, 9, 1], [4, 20, 7]
    assert mean_per_class(k, n, seed=1) == mean_per_class(k, n, seed=1) != mean_per_class(k, n, seed=2)
    state = np.random.get_state()[1].copy()
    mean_per_class(k, n)
    assert (np.random.get_state()[1] == state).all()   # nothing global is drawn from


def test_an_estimate_reads_well():
    assert str(Estimate(0.824, 0.806, 0.840, 1907)) == "82.4% [80.6, 84.0], n=1,907"
    assert Estimate(0.5, 0.4, 0.6, 9, 0.995, "beta").to_dict() == {
        "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "level": 0.995, "method": "beta"}
