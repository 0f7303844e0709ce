"""Representation: planted preferences lie in their intervals and are found, luck is not; NDKL, ties and association tests by hand, brute force and scipy; wrong input."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binom, fisher_exact, norm, permutation_test

from clip_lab.audits import representation as r
from clip_lab.audits.people import Grouping

REPEATS = 200


def grouped(codes, minimum=1):
    codes = np.asarray(codes, dtype=np.int64)
    return Grouping(("group",), [f"g{i}" for i in range(codes.max() + 1)], codes, minimum)


def within(hits, n, rate): return binom.ppf(1e-4, n, rate) <= hits <= binom.ppf(1 - 1e-4, n, rate)


def gallery(rng, n, shares, shift):
    "Groups and scores of a gallery in which the first group's scores are higher by `shift`."
    codes = np.r_[np.arange(len(shares)), rng.choice(len(shares), n - len(shares), p=shares)]
    return codes, rng.standard_normal(n) + shift * (codes == 0)


# ------------------------------------------------------------------ planted and not planted
def test_planted_skew_lies_in_its_interval_and_is_found():
    n, k, shares, shift = 400, 60, np.array([.5, .3, .2]), .7
    low, high = -10, 10                                                      # the threshold above which k / n of everybody lies, in the population
    for _ in range(80):
        t = (low + high) / 2
        low, high = (t, high) if shares[0] * norm.sf(t - shift) + shares[1:].sum() * norm.sf(t) > k / n else (low, t)
    truth = np.log(np.array([norm.sf(t - shift), norm.sf(t), norm.sf(t)]) / (k / n))
    covered, found = np.zeros(3), np.zeros(3)
    for seed in range(REPEATS):
        codes, scores = gallery(np.random.default_rng(seed), n, shares, shift)
        t = r.skew_at_k(scores[:, None], grouped(codes), ["q"], k, n_resamples=300, seed=seed)
        covered += ((t.low <= truth) & (truth <= t.high)).to_numpy()
        found += (t.p_adjusted <= .05).to_numpy()
    assert ((.9 < covered / REPEATS) & (covered / REPEATS < .985)).all(), covered / REPEATS
    assert found[0] > .8 * REPEATS and (found[1:] > .1 * REPEATS).all(), found / REPEATS


def test_luck_is_luck():
    codes = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [90, 70, 40]))
    g, skews, p, whole = grouped(codes), 0, [], 0
    for seed in range(REPEATS):
        scores = np.random.default_rng(seed).random((200, 5))
        t = r.skew_at_k(scores, g, list("abcde"), 30, n_resamples=1, seed=seed)
        skews += (t.p_adjusted <= .05).any()
        p += t.p.tolist()
    for seed in range(60):
        t = r.representation(np.random.default_rng(seed).random((200, 5)), g, list("abcde"), 30, n_resamples=99, seed=seed)
        whole += ((t.measure == "NDKL") & (t.p_adjusted <= .05)).any()
    assert skews <= binom.ppf(1 - 1e-4, REPEATS, .05), skews / REPEATS       # every discovery is false: the rate of any is that of all
    assert whole <= binom.ppf(1 - 1e-4, 60, .05), whole / 60
    assert np.mean(np.array(p) <= .05) <= .052                               # exact tests on counts: at most


def test_intervals_of_extremes_hold_the_median_of_new_galleries():
    n, k, shares, hit, asked = 200, 40, [.4, .3, .2, .1], np.zeros(3), 0
    for shift in (0.0, .4):
        rows = np.stack([(lambda c, s: c[r.ranked(s)])(*gallery(np.random.default_rng([9, seed]), n, shares, shift)) for seed in range(1500)])
        share = np.stack([(rows == g).mean(1) for g in range(4)], 1)
        truth = [np.median(v) for v in r._measures(rows, 4, k, share).values()]
        for seed in range(100):
            codes, scores = gallery(np.random.default_rng([10, seed]), n, shares, shift)
            t = r.representation(scores[:, None], grouped(codes), ["q"], k, n_resamples=200, seed=seed)
            hit += ((t.low <= truth) & (truth <= t.high)).to_numpy()
            asked += 1
    assert (hit[:2] / asked > .9).all() and hit[2] / asked > .85, hit / asked


def test_planted_association_is_recovered_and_luck_is_not():
    rng, size, true, found, covered = np.random.default_rng(0), 40, .8, 0, 0
    a, b = np.eye(2)[:1], np.eye(2)[1:]
    def targets(shift): # s of a target, cos - sin of its angle, is normal to first order
        return (lambda s: np.stack([np.cos(np.pi / 4 - s), np.sin(np.pi / 4 - s)], 1))(.05 * (rng.standard_normal(size) + shift))
    d = true / np.sqrt(1 + true ** 2 / 4)                                    # the spread of both kinds together holds their difference too
    for _ in range(REPEATS):
        t = r.association(targets(true), targets(0), a, b, n_resamples=199)
        covered += t.d.low <= d <= t.d.high
        found += t.p <= .05
    assert .9 < covered / REPEATS < .985, covered / REPEATS
    assert found > .85 * REPEATS, found / REPEATS
    false = sum(r.association(targets(0), targets(0), a, b, n_resamples=199, seed=s).p <= .05 for s in range(REPEATS))
    assert within(false, REPEATS, .05), false / REPEATS


# ------------------------------------------------------------------ by hand, brute force, scipy
def test_skew_by_brute_force():
    rng = np.random.default_rng(1)
    codes = np.r_[np.arange(3), rng.integers(0, 3, 47)]
    scores, want = rng.integers(0, 9, (50, 3)).astype(float), {"g0": .5, "g1": .3, "g2": .2}
    for expected in ("gallery", "uniform", want):
        t = r.skew_at_k(scores, grouped(codes), ["x", "y", "z"], [1, 7, 50], expected, n_resamples=20, seed=4)
        assert len(t) == 27
        for row in t.itertuples():
            q, g = ["x", "y", "z"].index(row.query), int(row.group[1])
            order = sorted(range(50), key=lambda i: (-scores[i, q], np.random.default_rng(4).permutation(50)[i]))
            found = [codes[i] for i in order[:row.k]].count(g)
            share = {"gallery": (codes == g).mean(), "uniform": 1 / 3}.get(expected) if isinstance(expected, str) else want[row.group]
            assert row.found == found and row.estimate == pytest.approx(np.log(found / row.k / share) if found else -np.inf) and row.low <= row.estimate <= row.high
            in_group = int((codes == g).sum())
            assert row.p == pytest.approx(fisher_exact([[found, row.k - found], [in_group - found, 50 - row.k - in_group + found]]).pvalue)
            cut = sorted(scores[:, q], reverse=True)[row.k - 1]
            assert row.tied == (int((scores[:, q] == cut).sum()) if row.k < 50 and sorted(scores[:, q], reverse=True)[row.k] == cut else 0)
    assert (t[t.k == 50].p == 1).all()                                       # whoever looks at everything finds everybody
    again = r.skew_at_k(scores, grouped(codes), ["x", "y", "z"], [1, 7, 50], want, n_resamples=20, seed=4)
    assert again.equals(t)


def test_ties_do_not_follow_the_file():
    codes = np.repeat([0, 1], 100)
    share = [np.bincount(codes[r.ranked(np.zeros(200), seed)[:50]], minlength=2)[0] for seed in range(200)]
    assert abs(np.mean(share) - 25) < 1 and len(set(share)) > 5
    assert (r.ranked(np.r_[np.zeros(5), 1.0]) == r.ranked(np.r_[np.zeros(5), 1.0])).all() and r.ranked(np.r_[np.zeros(5), 1.0])[0] == 5


def test_ndkl_by_hand_and_many_at_once():
    assert r.ndkl([0, 1, 0, 1], [.5, .5]) == pytest.approx((np.log(2) + 0 + (2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3)) / 2 + 0) / (1 + 1 / np.log2(3) + 1 / 2 + 1 / np.log2(5)))
    rows = np.random.default_rng(0).integers(0, 3, (6, 25))
    assert r.ndkl(rows, [.5, .3, .2]) == pytest.approx([float(r.ndkl(row, [.5, .3, .2])) for row in rows])
    assert r.ndkl([0, 0, 1, 1], [.5, .5]) > r.ndkl([0, 1, 0, 1], [.5, .5]) > 0


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_association_is_brute_force_and_scipys(alternative):
    rng = np.random.default_rng(3)
    x, y, a, b = (rng.standard_normal((n, 6)) for n in (4, 5, 3, 2))
    found = r.association(x, y, a, b, alternative)
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
    cos = unit(np.concatenate([x, y])) @ unit(np.concatenate([a, b])).T
    s = cos[:, :3].mean(1) - cos[:, 3:].mean(1)
    assert found.d.value == pytest.approx((s[:4].mean() - s[4:].mean()) / s.std(ddof=1)) and found.n == (4, 5, 3, 2)
    stat = s[:4].mean() - s[4:].mean()
    every = np.array([s[list(c)].mean() - np.delete(s, c).mean() for c in combinations(range(9), 4)])
    up, down = np.mean(every >= stat - 1e-12), np.mean(every <= stat + 1e-12)
    assert found.exact and found.dealt == 126 and found.p == pytest.approx({"greater": up, "less": down, "two-sided": min(1, 2 * min(up, down))}[alternative])
    big = [rng.standard_normal((30, 6)) + shift for shift in (.3, 0)]
    one = r.association(*big, a, b, alternative, n_resamples=499, seed=5)
    s = [unit(t) @ (unit(a).mean(0) - unit(b).mean(0)) for t in big]
    assert not one.exact and one.dealt == 499 and one.p == permutation_test(s, lambda p, q, axis: p.mean(axis) - q.mean(axis), vectorized=True, n_resamples=499, alternative=alternative, rng=np.random.default_rng(5)).pvalue
    exact = r.association(*(t[:8] for t in big), a, b, alternative, n_resamples=20_000)
    drawn = r.association(*(t[:8] for t in big), a, b, alternative, n_resamples=9_999, seed=1)
    assert exact.exact and not drawn.exact and abs(exact.p - drawn.p) < .03
    table = r.associations({"one": (*big, a, b), "two": (x, y, a, b)}, alternative, n_resamples=499)
    assert table.p_adjusted.tolist() == pytest.approx(sorted([table.p.min() * 2, table.p.max()], reverse=bool(table.p[0] > table.p[1])) if 2 * table.p.min() <= table.p.max() else [table.p.max()] * 2)


# ------------------------------------------------------------------ wrong input
@pytest.mark.parametrize("change, message", [
    (dict(k=0), "k is 0; the gallery has 6"), (dict(k=7), "k goes from 1 to 6"), (dict(queries=["a", "a"]), "'a' is there twice"), (dict(queries=["a"]), r"expected \(6, 1\)"),
    (dict(scores=np.full((6, 2), np.nan)), "picture 0 is not finite"), (dict(grouping=grouped([0] * 6)), "one group only"), (dict(expected="equal"), "expected 'gallery', 'uniform'"),
    (dict(expected={"g0": .5}), "the groups are g0, g1"), (dict(expected={"g0": 0.0, "g1": 1.0}), "above 0 and sum to 1"), (dict(grouping=Grouping(("x",), ["g0", "g1", "g2"], np.array([0, 0, 0, 1, 1, 1]))), "'g2' has no picture")])
def test_rankings_that_cannot_be_judged(change, message):
    given = dict(scores=np.random.default_rng(0).random((6, 2)), grouping=grouped([0, 0, 0, 1, 1, 1]), queries=["a", "b"], k=2, expected="gallery") | change
    for how in (r.skew_at_k, r.representation):
        with pytest.raises(ValueError, match=message): how(given["scores"], given["grouping"], given["queries"], given["k"], given["expected"], n_resamples=5)


def test_a_group_of_one():
    t = r.skew_at_k(np.arange(10.)[:, None], grouped(np.r_[0, np.ones(9, int)], 2), ["q"], 3, n_resamples=50)
    assert t.small.tolist() == [True, False] and np.isneginf(t.estimate[0]) and t.p[0] == pytest.approx(1) and np.isneginf(t.null_low[0])


@pytest.mark.parametrize("change, message", [
    (dict(x=np.ones((1, 3))), "1 targets X"), (dict(y=np.full((3, 3), np.nan)), "targets Y: row 0"), (dict(a=np.zeros((2, 3))), "attributes A: row 0"), (dict(b=np.ones((2, 4))), "must come from one model"),
    (dict(b=np.ones(3)), r"attributes B: shape \(3,\)"), (dict(alternative="both"), "expected 'two-sided'"), (dict(a=np.eye(3)[:1], b=np.eye(3)[:1]), "equally near")])
def test_associations_that_cannot_be(change, message):
    given = dict(x=np.eye(3), y=1 - np.eye(3), a=np.eye(3)[:2], b=np.eye(3)[2:], alternative="greater") | change
    with pytest.raises(ValueError, match=message): r.association(**given)
    with pytest.raises(ValueError, match="no tests"): r.associations({})


def test_neutral_queries_name_no_group():
    assert len(set(r.NEUTRAL)) == 2 * len(r.ADJECTIVES) == 16 and all(q.startswith(("a photo of a ", "a photo of an ")) and q.endswith(" person") for q in r.NEUTRAL)
    assert not any(w in q.split() for q in r.NEUTRAL for w in ("man", "woman", "white", "black")) and not any(" a " + v in q for q in r.NEUTRAL for v in "aeiou" if q.count(" a ") > 1)
