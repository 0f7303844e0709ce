"Refusal against scikit-learn's ROC curve and brute force; every bad input."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import roc_curve

from clip_lab.evals.refusal import judge_refusal, risk_coverage, risk_coverage_area, threshold_for


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.sampled_from([0, 1, 3]))
def test_risk_coverage_by_counting(seed, n, decimals):
    rng = np.random.default_rng(seed)
    right = rng.random(n) < .6
    score = np.round(rng.standard_normal(n), decimals)
    table = risk_coverage(score, right)
    assert table.threshold.tolist() == sorted(set(score), reverse=True)
    for row in table.itertuples():
        accepted = [i for i in range(n) if score[i] >= row.threshold]
        assert row.accepted == len(accepted) and row.coverage == len(accepted) / n and row.risk == pytest.approx(sum(not right[i] for i in accepted) / len(accepted))
    area, beside = risk_coverage_area(score, right, n_resamples=20)
    assert area.value == pytest.approx(np.mean([np.mean(~right[score >= s]) for s in score]))
    k = right.sum()                                                     # the perfect order: right ones first
    assert beside["perfect"] == pytest.approx(np.mean([max(0, i - k) / i for i in range(1, n + 1)])) and beside["useless"] == pytest.approx(1 - k / n)
    assert beside["perfect"] - 1e-12 <= area.value


def test_a_constant_score_is_useless_and_the_area_has_its_interval():
    right = np.random.default_rng(0).random(300) < .7
    area, beside = risk_coverage_area(np.zeros(300), right)
    assert area.value == pytest.approx(beside["useless"]) and area.low < area.value < area.high
    assert risk_coverage_area(right, right, seed=1)[0] == risk_coverage_area(right, right, seed=1)[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 60), st.floats(0, 1))
def test_thresholds_keep_their_promise_and_give_no_more_away(seed, n, target):
    rng = np.random.default_rng(seed)
    known = np.r_[True, False, rng.random(n - 2) < .5]
    score = np.round(known + rng.standard_normal(n), 1)
    fpr, tpr, _ = roc_curve(known, score, drop_intermediate=False)
    t = threshold_for(score, known, false_accept=target)
    assert (score[~known] >= t).mean() <= target + 1e-12
    assert (score[known] >= t).mean() == pytest.approx(tpr[fpr <= target + 1e-12].max())      # no lower threshold keeps it
    t = threshold_for(score, known, coverage=target)
    assert (score[known] >= t).mean() >= target - 1e-12
    higher = np.unique(score)[np.unique(score) > t]
    assert not len(higher) or (score[known] >= higher[0]).mean() < target


def test_a_promise_that_only_silence_keeps():
    assert threshold_for([3, 2, 1], [0, 1, 1], false_accept=0.) == np.inf
    assert threshold_for([3, 2, 1], [0, 1, 1], false_accept=1.) == 1
    assert threshold_for([3, 2, 1], [0, 1, 1], coverage=1.) == 1
    assert threshold_for([3, 2, 1], [0, 1, 1], coverage=0.) == 3


def test_judging_by_counting():
    rng = np.random.default_rng(0)
    known, accepted = rng.random(500) < .6, rng.random(500) < .7
    right = known & (rng.random(500) < .8)
    found = judge_refusal(accepted, right, known).set_index("measure")
    assert found.estimate["known answered (coverage)"] == accepted[known].mean()
    assert found.estimate["right among known answered"] == right[known & accepted].mean() and found.estimate["right among all answered"] == right[accepted].mean()
    assert found.estimate["unknown answered (false acceptance)"] == accepted[~known].mean()
    assert found.estimate["handled"] == sum((a and r) if k else not a for a, r, k in zip(accepted, right, known)) / 500
    silent = judge_refusal(accepted & False, right, known).set_index("measure")
    assert silent.n["right among all answered"] == 0 and np.isnan(silent.estimate["right among all answered"]) and silent.estimate["handled"] == (~known).mean()
    assert judge_refusal([1, 1], [1, 0], [1, 1]).set_index("measure").n["unknown answered (false acceptance)"] == 0


@pytest.mark.parametrize("call, message", [
    (lambda: risk_coverage([.1, float("nan")], [1, 0]), "the score of picture 1 is nan"),
    (lambda: risk_coverage([.1], [1, 0]), r"scores have shape \(1,\), right \(2,\)"),
    (lambda: risk_coverage([], []), r"got shape \(0,\)"),
    (lambda: risk_coverage([.1, .2], [1, 2]), r"right \(1\) or wrong \(0\)"),
    (lambda: risk_coverage_area([.1], [1]), "single picture"),
    (lambda: threshold_for([.1, .2], [1, 0]), "give either"),
    (lambda: threshold_for([.1, .2], [1, 0], .1, .1), "give either"),
    (lambda: threshold_for([.1, .2], [1, 0], false_accept=5), "false_accept is a share between 0 and 1; got 5"),
    (lambda: threshold_for([.1, .2], [1, 0], coverage=float("nan")), "coverage is a share"),
    (lambda: threshold_for([.1, .2], [1, 1], false_accept=.1), "no unknown picture"),
    (lambda: threshold_for([.1, .2], [0, 0], coverage=.1), "no known picture"),
    (lambda: judge_refusal([1], [1, 0], [1, 0]), "1 decisions, 2 answers, 2 flags"),
    (lambda: judge_refusal([0, 1], [1, 1], [0, 1]), "picture 0 is answered rightly and unknown"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
