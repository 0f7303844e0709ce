"Selection of templates against brute force, paired intervals against repetition and the bootstrap, the variance split against a mixed model's moments; every bad input."
import itertools

import numpy as np
import pytest
import statsmodels.api as sm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from statsmodels.formula.api import ols
from statsmodels.stats.contingency_tables import cochrans_q
import pandas as pd

from clip_lab.evals.selection import (_Cosines, _spread, check_apart, forward_selection, leave_one_out, paired_difference, right_answers, sensitivity,
                                      shared_rows)
from clip_lab.evals.stats import bootstrap, mcnemar


def toy(n=200, classes=5, templates=4, dim=12, seed=0, noise=1.5):
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, 1, dim, generator=g)
    prompts = F.normalize(centre + 1.2 * torch.randn(classes, templates, dim, generator=g), dim=-1)
    labels = torch.randint(classes, (n,), generator=g)
    return F.normalize(centre[labels, 0] + noise * torch.randn(n, dim, generator=g), dim=-1), prompts, labels.numpy()


def names(k): return [f"t{i} {{}}" for i in range(k)]


def accuracy(features, prompts, labels, chosen):
    "By plain numpy in double precision, one picture and class at a time."
    f, p = features.double().numpy(), prompts.double().numpy()
    w = [np.mean([p[c, t] for t in chosen], axis=0) for c in range(len(p))]
    w = [x / np.linalg.norm(x) for x in w]
    return np.mean([max(range(len(w)), key=lambda c: x @ w[c]) == y for x, y in zip(f, labels)])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 5))
def test_forward_selection_is_the_plain_greedy_path(seed, classes, templates):
    features, prompts, labels = toy(60, classes, templates, seed=seed)
    chosen, best = [], -1
    while len(chosen) < templates:
        scores = {t: accuracy(features, prompts, labels, [*chosen, t]) for t in range(templates) if t not in chosen}
        t = max(scores, key=scores.get)                   # of equal ones the first
        if scores[t] <= best: break
        best, chosen = scores[t], [*chosen, t]
    path = forward_selection(prompts, names(templates), (features, labels))
    assert path.place.tolist() == chosen and path.selection.iloc[-1] == pytest.approx(best)
    assert path.test.isna().all() and (path.n_test == 0).all() and (path.n_selection == 60).all()


def test_the_whole_path_and_the_test_column():
    features, prompts, labels = toy(400, templates=6)
    halves = (features[:200], labels[:200]), (features[200:], labels[200:])
    path = forward_selection(prompts, names(6), *halves, stop=False)
    assert sorted(path.place) == list(range(6)) and path.step.tolist() == [1, 2, 3, 4, 5, 6]
    for i in range(6):
        assert path.test[i] == pytest.approx(accuracy(*[halves[1][0], prompts, halves[1][1]], path.place[:i + 1].tolist()))
    short = forward_selection(prompts, names(6), halves[0])
    assert short.place.tolist() == path.place[:len(short)].tolist()                # the test split decides nothing
    assert len(forward_selection(prompts, names(6), halves[0], steps=2, stop=False)) == 2


def test_ties_go_to_the_first_template():
    features, prompts, labels = toy(templates=2)
    same = prompts[:, [0, 0, 0, 1]]
    path = forward_selection(same, names(4), (features, labels), stop=False)
    assert path.place[0] in (0, 3) and path.place.tolist().index(0) < path.place.tolist().index(1) < path.place.tolist().index(2)


def test_little_memory_gives_the_same_answers():
    features, prompts, labels = toy(300, templates=5)
    much, little = _Cosines(features, prompts), _Cosines(features, prompts, memory=1000)
    assert much.kept is not None and little.kept is None and little.size < 20
    arguments = labels, prompts.sum(1), -1, range(5), range(5)
    assert np.array_equal(much.right(*arguments), little.right(*arguments))


def test_leave_one_out_by_brute_force():
    features, prompts, labels = toy(150, templates=4)
    table = leave_one_out(features, prompts, labels, names(4))
    whole = right_answers(features, prompts, labels)
    for t in range(4):
        rest = [j for j in range(4) if j != t]
        without = right_answers(features, prompts, labels, rest)
        assert table.without[t] == pytest.approx(accuracy(features, prompts, labels, rest)) and table.alone[t] == pytest.approx(accuracy(features, prompts, labels, [t]))
        assert table.adds[t] == pytest.approx(whole.mean() - without.mean()) and table.p[t] == mcnemar(whole, without).p
        assert table.adds_low[t] <= table.adds[t] <= table.adds_high[t]
    single = leave_one_out(features, prompts[:, :1], labels, names(1))
    assert single.adds.isna().all() and single.p_holm.isna().all() and single.alone[0] == single.whole[0]


def test_paired_difference_agrees_with_the_paired_bootstrap():
    rng = np.random.default_rng(0)
    a = rng.random(2000) < .6
    b = a ^ (rng.random(2000) < .15)
    e = paired_difference(a, b)
    again = bootstrap([a.astype(float), b.astype(float)], lambda x, y, axis=-1: x.mean(axis) - y.mean(axis), True, method="percentile")
    assert e.value == pytest.approx(again.value) and (e.low, e.high) == pytest.approx((again.low, again.high), abs=.002)


@pytest.mark.parametrize("n, p", [(40, (.5, .2, .1, .2)), (300, (.6, .05, .02, .33)), (300, (.7, .004, .004, .292))])
def test_paired_difference_holds_its_level(n, p):
    "A promise about repetition: 2,000 studies, cells (both, first only, second only, neither)."
    rng, held = np.random.default_rng(1), 0
    for both, first, second, neither in rng.multinomial(n, p, size=2000):
        x = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [both, first, second, neither], axis=0).astype(bool)
        e = paired_difference(x[:, 0], x[:, 1])
        held += e.low <= p[1] - p[2] <= e.high
    assert .935 <= held / 2000


def test_shared_rows_are_found_by_what_they_are():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 16)), rng.standard_normal((150, 16))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    b[[3, 77, 140]] = a[[9, 9, 150]] + 1e-8 * rng.standard_normal((3, 16))         # round-off of another batch
    brute = [(i, j) for i, j in itertools.product(range(200), range(150)) if np.linalg.norm(a[i] - b[j]) < 1e-5]
    assert shared_rows(a, b).tolist() == [list(p) for p in brute] == [[9, 3], [9, 77], [150, 140]]
    with pytest.raises(ValueError, match="row 9 of the one is row 3 of the other, 3 such pairs"): check_apart(a, torch.from_numpy(b))
    check_apart(a[:9], b)


def test_variance_split_equals_the_anova_table():
    rng = np.random.default_rng(0)
    n, T = 60, 7
    right = (rng.random((n, T)) < np.clip(.5 + .1 * rng.standard_normal(T) + .2 * rng.standard_normal((n, 1)), 0, 1)).astype(float)
    long = pd.DataFrame({"y": right.ravel(), "picture": np.repeat(np.arange(n), T), "template": np.tile(np.arange(T), n)})
    ms = (t := sm.stats.anova_lm(ols("y ~ C(picture) + C(template)", long).fit())).sum_sq / t.df
    sd, pictures, differ = _spread(right, .95)
    assert sd.value ** 2 == pytest.approx(max(0, (ms["C(template)"] - ms["Residual"]) / n))
    assert pictures ** 2 == pytest.approx((max(0, ms["C(picture)"] - ms["Residual"]) / T + ms["Residual"]) / n)
    assert (differ.statistic, differ.p) == pytest.approx((cochrans_q(right).statistic, cochrans_q(right).pvalue))


def test_the_interval_of_the_spread_holds_its_level():
    "Templates of a normal population, pictures independent: 300 worlds."
    held = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        right = (rng.random((300, 12)) < .5 + .05 * rng.standard_normal(12)).astype(float)
        e = _spread(right, .95)[0]
        held += e.low <= .05 <= e.high
    assert .92 <= held / 300 <= .99


def test_band_and_templates_that_do_not_differ():
    features, prompts, labels = toy(300, templates=5)
    found = sensitivity(features, prompts, labels, names(5))
    alone = leave_one_out(features, prompts, labels, names(5))
    assert found.per_template.accuracy.tolist() == alone.alone.tolist()
    band = found.band.set_index("mark")
    assert (band.accuracy["worst"], band.accuracy["median"], band.accuracy["best"]) == (alone.alone.min(), alone.alone.median(), alone.alone.max())
    assert band.accuracy["ensemble"] == alone.whole[0] and 0 <= found.template_share <= 1 and (band.n == 300).all()
    same = sensitivity(features, prompts[:, [0, 0, 0]], labels, names(3))
    assert same.template_sd.value == 0 and same.differ.p == 1 and same.template_share == 0


X, P, Y = toy(20, templates=3)

@pytest.mark.parametrize("call, message", [
    (lambda: right_answers(X, P, Y[:3]), r"labels have shape \(3,\)"),
    (lambda: right_answers(X, P, [9] * 20), "label 9 in row 0 is out of range"),
    (lambda: right_answers(X, P[0], Y), r"prompts have shape \(3, 12\)"),
    (lambda: right_answers(X, P[:1], Y * 0), "one class only"),
    (lambda: right_answers(X * float("nan"), P, Y), "image features: row 0 has length nan"),
    (lambda: right_answers(X * 2, P, Y), "image features: row 0 has length 2"),
    (lambda: right_answers(X, P, Y, []), "no template is chosen"),
    (lambda: paired_difference([1, 0], [1, 0, 0]), "2 answers against 3"),
    (lambda: paired_difference([1, 0], [1, 0], 95), "level is a share"),
    (lambda: leave_one_out(X, P, Y, ["{}"]), "1 templates for prompts"),
    (lambda: forward_selection(P, names(3), (X, Y), (X[:1], Y[:1])), "the selection split and the test split share pictures"),
    (lambda: forward_selection(P, names(3), (X[:0], Y[:0])), "no pictures"),
    (lambda: forward_selection(P, names(3), (X, Y), (X[:0], Y[:0])), "no pictures"),
    (lambda: forward_selection(P, names(3), (X, Y), steps=0), "steps is 0; with 3 templates expected 1 to 3"),
    (lambda: sensitivity(X, P[:, :1], Y, ["{}"]), "1 templates on 20 pictures"),
    (lambda: sensitivity(X[:1], P, Y[:1], names(3)), "3 templates on 1 pictures"),
    (lambda: shared_rows(X, P[0, :, :5]), "rows of 12 numbers against rows of 5"),
    (lambda: shared_rows(X[:0], X), r"the first rows have shape \(0, 12\)"),
    (lambda: shared_rows(X, X * float("inf")), "row 0 of the second is not finite"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
