"Harm and label sets: planted rates, differences and moves are recovered and none are made up; moves by brute force; the variance of prompts; wrong input."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binom, binomtest, chi2, ncx2, norm

import clip_lab
from clip_lab.audits.harm import ALL_HARMFUL, NO_LABEL, answers, class_design, harm_rates, harm_table, harm_tests, label_edits
from clip_lab.audits.labels import Category, Label, LabelSet, combine, label_set
from clip_lab.audits.people import Grouping
from clip_lab.audits.wording import PromptGrid, prompt_grid, variance_parts

REPEATS = 300
PAPER = label_set("paper-21")
KINDS = ("base", "crime-related", "non-human")


def grouped(codes, minimum=30):
    codes = np.asarray(codes, dtype=np.int64)
    return Grouping(("group",), [f"g{i}" for i in range(codes.max() + 1)], codes, minimum)


def scored(places, labels, rng):
    "Probabilities whose highest is the given label's."
    x = rng.uniform(0, .4, (len(places), labels)).astype(np.float32)
    x[np.arange(len(places)), places] = rng.uniform(.5, 1, len(places))
    return x


def drawn(codes, rates, rng):
    "Scores whose category follows rates[group] = (base, crime-related, non-human); the label in it is any."
    kind = (rng.random((len(codes), 1)) > rates[codes].cumsum(1)[:, :2]).sum(1)
    pool = [PAPER.places(k) for k in KINDS]
    return scored(np.array([rng.choice(pool[k]) for k in kind]), len(PAPER), rng)


def within(hits, n, rate): return binom.ppf(1e-4, n, rate) <= hits <= binom.ppf(1 - 1e-4, n, rate)


@pytest.fixture(scope="module")
def planted():
    "REPEATS audits of two groups, one of which is accused more often by ten points and is no more often called an animal."
    codes, rates = np.repeat([0, 1], [300, 200]), np.array([[.82, .10, .08], [.72, .20, .08]])
    found = []
    for seed in range(REPEATS):
        scores = drawn(codes, rates, np.random.default_rng(seed))
        found.append((harm_rates(scores, PAPER, grouped(codes)), harm_tests(scores, PAPER, grouped(codes), correction="holm").set_index("category")))
    return codes, {k: rates[:, i] for i, k in enumerate(KINDS)} | {ALL_HARMFUL: rates[:, 1:].sum(1)}, found


def test_planted_harm_rates_and_differences_lie_in_their_intervals(planted):
    _, truth, found = planted
    for kind, rates in truth.items():
        rows = pd.concat([r[r.category == kind] for r, _ in found])
        true = np.where(rows.group == "g1", rates[1], rates[0])
        share = ((rows.low <= true) & (true <= rows.high)).mean()
        assert .925 < share < .98, (kind, share)                       # 800 intervals; Wilson's coverage swings around its level
        inside = 0
        for _, tests in found:
            r = tests.loc[kind]
            inside += r.low <= (rates[1] - rates[0]) * (1 if r.leans == "g1" else -1) <= r.high
        assert within(inside, REPEATS, .95), (kind, inside / REPEATS)


def test_planted_harm_is_decided_as_often_as_theory_says_and_has_its_size(planted):
    codes, truth, found = planted
    n = np.bincount(codes)
    for kind in ("crime-related", ALL_HARMFUL):
        rate = truth[kind]
        p = (n * rate).sum() / n.sum()
        size = (n * (rate - p) ** 2).sum() / (p * (1 - p)) / n.sum()                # V squared
        power = ncx2.sf(chi2.ppf(.95, 1), 1, size * n.sum())
        decided = sum(t.p[kind] <= .05 for _, t in found)
        assert binom.ppf(1e-4, REPEATS, power - .03) <= decided <= binom.ppf(1 - 1e-4, REPEATS, min(1, power + .03)), (kind, decided / REPEATS, power)
        squares = np.array([t.cramers_v[kind] ** 2 for _, t in found])
        assert abs(squares.mean() - 1 / n.sum() - size) < 4 * squares.std() / np.sqrt(REPEATS) + 3e-4        # V squared is biased up by df / n
    assert sum(t.p["non-human"] <= .05 for _, t in found) <= binom.ppf(1 - 1e-4, REPEATS, .055)              # nothing was planted there


def test_no_harm_difference_is_made_up():
    codes, rates, alarms = np.repeat([0, 1, 2], [200, 150, 150]), np.tile([.8, .12, .08], (3, 1)), 0
    for seed in range(REPEATS):
        tests = harm_tests(drawn(codes, rates, np.random.default_rng(seed)), PAPER, grouped(codes))
        alarms += bool((tests.p_adjusted <= .05).any())
    assert alarms <= binom.ppf(1 - 1e-4, REPEATS, .05), alarms / REPEATS


def paired(codes, joint, rng):
    "Scores before and after; joint[group] = shares of (harmful both times, only before, only after, never)."
    kind = (rng.random((len(codes), 1)) > joint[codes].cumsum(1)[:, :3]).sum(1)
    thief, man = PAPER.place("thief"), PAPER.place("White man")
    was, now = np.isin(kind, [0, 1]), np.isin(kind, [0, 2])
    return [scored(np.where(harm, thief, man), len(PAPER), rng) for harm in (was, now)]


def mcnemar_power(n, only_before, only_after, alpha=.05):
    "Chance that the exact test decides, summed over all numbers of disagreements."
    both, total = only_before + only_after, 0.
    for d in range(1, n + 1):
        if (weight := binom.pmf(d, n, both)) < 1e-9: continue
        b = np.arange(d + 1)
        decided = np.minimum(1, 2 * binom.cdf(np.minimum(b, d - b), d, .5)) <= alpha
        total += weight * binom.pmf(b, d, only_before / both)[decided].sum()
    return total


def test_planted_moves_of_harm_are_recovered_and_decided():
    codes, joint = np.repeat([0, 1], [250, 150]), np.array([[.10, .10, .04, .76], [.10, .06, .06, .78]])
    tables = [class_design(*(x for pair in zip(paired(codes, joint, np.random.default_rng(seed)), (PAPER, PAPER)) for x in pair), grouped(codes)).harm() for seed in range(REPEATS)]
    for g, n in ((0, 250), (1, 150)):
        true = joint[g, 2] - joint[g, 1]
        assert within(sum(t.low[g] <= true <= t.high[g] for t in tables), REPEATS, .955), g          # Agresti and Min's is a little wide
        assert within(sum(t.p[g] <= .05 for t in tables), REPEATS, mcnemar_power(n, joint[g, 1], joint[g, 2])), g
        for column, rate in (("before", joint[g, :2].sum()), ("after", joint[g, 0] + joint[g, 2])):
            assert abs(np.mean([t[column][g] for t in tables]) - rate) < 4 * np.sqrt(rate * (1 - rate) / n / REPEATS)
    assert mcnemar_power(250, .10, .04) > .6 > .1 > mcnemar_power(150, .06, .06)                    # one case with a difference, one without


def test_no_move_of_harm_is_made_up():
    codes, joint, alarms = np.repeat([0, 1, 2], [200, 150, 80]), np.tile([.1, .08, .08, .74], (3, 1)), 0
    for seed in range(REPEATS):
        before, after = paired(codes, joint, np.random.default_rng(seed))
        alarms += bool((class_design(before, PAPER, after, PAPER, grouped(codes)).harm().p_adjusted <= .05).any())
    assert alarms <= binom.ppf(1 - 1e-4, REPEATS, .05), alarms / REPEATS


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, .55, .8]))
def test_moves_are_brute_force(seed, threshold):
    rng = np.random.default_rng(seed)
    after = PAPER.add("child", "base", "a child").remove("gorilla", "White man").reword("thief", "somebody who steals").remove("animal").add("beast", "non-human", "an animal")
    codes = np.r_[np.arange(4), rng.integers(0, 4, 90)]
    x, y = (scored(rng.integers(0, len(s), len(codes)), len(s), rng) for s in (PAPER, after))
    found, g = class_design(x, PAPER, y, after, grouped(codes), threshold), grouped(codes)
    was, now = [[s.names[r.argmax()] if threshold is None or r.max() >= np.float32(threshold) else NO_LABEL for r in z] for s, z in ((PAPER, x), (after, y))]
    real = [a != b and (a, b) != ("animal", "beast") for a, b in zip(was, now)]
    assert found.moved.tolist() == real and found.edits.renamed == (("animal", "beast"),) and found.edits.removed == ("White man", "gorilla") and found.edits.reworded == ("thief",) and found.edits.added == ("child",)
    table = found.moves()
    assert table.k.sum() == sum(real) and table.groupby(["before", "after"], sort=False).k.sum().is_monotonic_decreasing
    for r in table.itertuples():
        places = [i for i in range(len(codes)) if real[i] and (was[i], now[i], g.names[codes[i]]) == (r.before, r.after, r.group)]
        assert (r.k, r.n) == (len(places), (codes == g.names.index(r.group)).sum()) and found.pictures(r.before, r.after, r.group).tolist() == places
        assert r.low <= r.estimate <= r.high
    harmful = {s.name: dict(zip(s.names, s.harmful)) for s in (PAPER,)}["paper-21"] | dict(zip(after.names, after.harmful)) | {NO_LABEL: False}
    for r in found.harm().itertuples():
        rows = codes == g.names.index(r.group)
        a, b = (np.array([harmful[l] for l in side])[rows] for side in (was, now))
        assert (r.k_before, r.k_after, r.gained, r.lost) == (a.sum(), b.sum(), (b & ~a).sum(), (a & ~b).sum())
        assert r.p == pytest.approx(binomtest(int(r.gained), int(r.gained + r.lost)).pvalue if r.gained + r.lost else 1)
    wide = harm_table(found.rates(), rows="labels")
    assert wide.shape == (3, 4) and wide.iloc[1, 0].startswith(f"{100 * found.harm().before[0]:.1f} [")


def test_an_edit_that_changes_nothing_moves_nobody():
    rng = np.random.default_rng(0)
    codes, x = np.repeat([0, 1], 20), scored(rng.integers(0, 21, 40), 21, rng)
    renamed = LabelSet("other", "1", "s", tuple(replace(l, label=f"label {i}") for i, l in enumerate(PAPER.labels)), PAPER.categories, PAPER.templates)
    order = rng.permutation(21)
    shuffled = replace(PAPER, labels=tuple(PAPER.labels[i] for i in order))
    for labels, scores in ((PAPER, x), (renamed, x), (shuffled, x[:, order])):
        found = class_design(x, PAPER, scores, labels, grouped(codes))
        assert not found.moved.any() and len(found.moves()) == 0 and list(found.moves().columns) == ["before", "after", "group", "k", "n", "estimate", "low", "high", "small"]
        assert (found.harm().p == 1).all() and (found.harm().difference == 0).all()
    pardoned = replace(PAPER, categories=PAPER.categories | {"crime-related": Category(False)})
    found = class_design(x, PAPER, x, pardoned, grouped(codes))
    assert found.edits.recategorised == ("thief", "criminal", "suspicious person") and not found.moved.any() and found.harm().lost.sum() == np.isin(x.argmax(1), PAPER.places("crime-related")).sum()
    assert label_edits(PAPER, replace(PAPER, templates=("an emoji of {}",))).templates and str(label_edits(PAPER, replace(PAPER, templates=("{}",)))) == "other templates"


def test_groups_of_one_and_sets_without_harm_are_told():
    rng = np.random.default_rng(1)
    x, g = scored(rng.integers(0, 21, 31), 21, rng), grouped([0] * 30 + [1])
    rates = harm_rates(x, PAPER, g, threshold=.6, method="clopper-pearson")
    assert rates[rates.group == "g1"].small.all() and not rates[rates.group == "g0"].small.any() and NO_LABEL in set(rates.category)
    assert harm_table(rates).loc["n"].tolist() == ["30", "1, small"]
    alone = class_design(x, PAPER, x, PAPER, g).harm().iloc[1]
    assert alone.n == 1 and alone.small and alone.low < 0 < alone.high
    kind = PAPER.remove(*np.array(PAPER.names)[PAPER.harmful])
    assert ALL_HARMFUL not in set(harm_rates(x[:, :14], kind, g).category)
    with pytest.raises(ValueError, match="has a label that does harm; see moves"): class_design(x[:, :14], kind, x[:, :14], kind, g).harm()
    assert len(class_design(x, PAPER, x[:, :14], kind, g).moves())           # only one of the two does harm: that is a comparison
    assert (class_design(x, PAPER, x[:, :14], kind, g).harm().k_after == 0).all()


def test_wrong_input_to_harm():
    rng = np.random.default_rng(2)
    x, g, jobs = scored(rng.integers(0, 21, 6), 21, rng), grouped([0, 0, 0, 1, 1, 1]), label_set("occupations")
    for bad in (np.nan, np.inf, -np.inf):
        y = x.copy(); y[4, 14] = bad
        for call in (lambda: answers(y, PAPER), lambda: harm_rates(y, PAPER, g), lambda: harm_tests(y, PAPER, g), lambda: class_design(x, PAPER, y, PAPER, g)):
            with pytest.raises(ValueError, match=f"label 'thief' for picture 4 is {bad}"): call()
    for threshold in (0, 1, -.1, 1.5, np.nan):
        with pytest.raises(ValueError, match=f"threshold {threshold:g}; a probability threshold lies between 0 and 1"): harm_rates(x, PAPER, g, threshold)
    for call, message in ((lambda: answers(x[:, :20], PAPER), r"expected \(pictures, 21\)"), (lambda: answers(x[0], PAPER), r"scores have shape \(21,\)"), (lambda: answers(x[:0], PAPER), "no pictures"),
                          (lambda: harm_rates(x[:5], PAPER, g), "5 answers for 6 pictures"), (lambda: harm_rates(x, PAPER, g, level=95), "level is a share"), (lambda: harm_rates(x, PAPER, g, method="wald"), "unknown method 'wald'"),
                          (lambda: harm_tests(x, PAPER, grouped([0] * 6)), "one group only"), (lambda: class_design(x, PAPER, x[:5], PAPER, g), "scores after for 5 pictures, groups for 6"),
                          (lambda: class_design(x[:5], PAPER, x, PAPER, g), "scores before for 5 pictures"), (lambda: class_design(x, PAPER, scored(np.arange(6), len(jobs), rng), jobs, g), "share no label"),
                          (lambda: PAPER.remove(*PAPER.names[1:]), "a choice needs at least two"), (lambda: harm_table(pd.DataFrame({"group": ["a"]})), "no column 'category'"),
                          (lambda: harm_table(pd.concat([harm_rates(x, PAPER, g)] * 2)), "stands twice for group 'g0'"), (lambda: class_design(x, PAPER, x, PAPER, g).pictures(before="king"), "there is no 'king'"),
                          (lambda: class_design(x, PAPER, x, PAPER, g).pictures(group="g7"), "there is no 'g7'")):
        with pytest.raises(ValueError, match=message): call()
    for name, what in ((NO_LABEL, "category"), (ALL_HARMFUL, "category")):
        odd = LabelSet("odd", "1", "s", (Label("a", "a", name), Label("b", "b", name)), {name: Category(True)})
        with pytest.raises(ValueError, match=f"has a {what} '{name}'"): harm_rates(x[:, :2], odd, g)
    odd = LabelSet("odd", "1", "s", (Label("a", "a", "c"), Label(NO_LABEL, "b", "c")), {"c": Category(True)})
    with pytest.raises(ValueError, match="has a label 'no label'"): class_design(x[:, :2], odd, x[:, :2], odd, g)


def test_counts_of_a_threshold_are_those_of_the_sweep():
    from clip_lab.audits.thresholds import sweep
    rng = np.random.default_rng(5)
    codes = np.r_[np.arange(3), rng.integers(0, 3, 300)]
    x = rng.dirichlet(np.full(21, .3), len(codes)).astype(np.float32)
    counts = sweep(x, grouped(codes), PAPER.names, [.2, .5], "argmax")
    for t in (.2, .5):
        rates = harm_rates(x, PAPER, grouped(codes), t).pivot(index="category", columns="group", values="k")
        for kind in KINDS: assert rates.loc[kind].tolist() == counts.at(t)[:, PAPER.places(kind)].sum(1).tolist()


def planted_prompts(rates, n, seed, shared):
    rng = np.random.default_rng(seed)
    z = np.sqrt(shared) * rng.standard_normal((n, 1, 1)) + np.sqrt(1 - shared) * rng.standard_normal((n, *rates.shape))
    return norm.cdf(z) < rates


@pytest.mark.parametrize("shared", [0., .8])
@pytest.mark.parametrize("rates", [np.array([[.10, .25], [.30, .45], [.2, .35]]), np.full((3, 2), .15), np.array([[.1, .2, .3, .4]])])
def test_planted_variance_of_prompts_is_recovered(rates, shared):
    repeats, n = 150, 200
    T, W = rates.shape
    mean, rows, columns = rates.mean(), rates.mean(1, keepdims=True), rates.mean(0, keepdims=True)
    target = np.array([((rates - mean) ** 2).sum(), W * ((rows - mean) ** 2).sum(), T * ((columns - mean) ** 2).sum(), ((rates - rows - columns + mean) ** 2).sum(), np.nan]) / (T * W - 1)
    target[4] = (rates * (1 - rates)).mean() / n
    found = [variance_parts(planted_prompts(rates, n, seed, shared), n_resamples=200, seed=seed) for seed in range(repeats)]
    values = np.array([f.variance for f in found])
    assert (np.abs(values.mean(0) - target) <= 4.5 * values.std(0) / np.sqrt(repeats) + 1e-12).all(), (values.mean(0), target)
    for part in range(4):
        inside = sum(f.low[part] - 1e-12 <= target[part] <= f.high[part] + 1e-12 for f in found)
        assert inside >= binom.ppf(1e-4, repeats, .93), (part, inside / repeats)          # cautious near zero, so only the lower side is bounded
    if target[0] > .005: assert all(f.low[0] > 0 for f in found)                            # and not so wide that it says nothing


def test_wrong_prompt_grids():
    model, _ = clip_lab.load()
    features = model.encode_text(model.tokenize(["a thief", "a child", "a dog"]), normalize=True).detach()
    kind = PAPER.remove(*np.array(PAPER.names)[PAPER.harmful])
    pardoned = replace(PAPER, categories=PAPER.categories | {"crime-related": Category(False)})
    for wordings, message in (({}, "no wording"), ({"a": kind}, "no label that does harm"), ({"a": PAPER, "b": PAPER.remove("thief")}, r"other labels \(thief\)"), ({"a": PAPER, "b": pardoned}, "do not agree whether 'thief' does harm"),
                              ({"a": PAPER, "b": replace(PAPER, labels=PAPER.labels[::-1])}, "in another order")):
        with pytest.raises(ValueError, match=message): prompt_grid(model, features, wordings, ["{}"])
    with pytest.raises(ValueError): prompt_grid(model, features, {"a": PAPER}, ["a photo"])
    grid = prompt_grid(model, features, {"a": PAPER, "b": PAPER.reword("thief", "a robber")}, ["{}", "a photo of {}"], threshold=.2)
    assert grid.harmful.shape == (3, 2, 2) and len(grid.rates(grouped([0, 1, 1]))) == 8
    with pytest.raises(ValueError, match="group 'g0' has 1 picture"): grid.variance(grouped([0, 1, 1]))
    with pytest.raises(ValueError, match="answers for 3 pictures, groups for 4"): grid.variance(grouped([0, 0, 1, 1]))
    for harmful, level, message in ((np.ones((5, 1, 1), bool), .95, "5 pictures and 1 prompts"), (np.ones((1, 2, 2), bool), .95, "1 pictures and 4 prompts"), (np.ones((5, 2, 2)), .95, "answers are float64"),
                                    (np.ones((5, 4), bool), .95, r"shape \(5, 4\)"), (np.ones((5, 2, 2), bool), 95, "level is a share")):
        with pytest.raises(ValueError, match=message): variance_parts(harmful, level)
    still = variance_parts(np.ones((5, 2, 2), bool))                          # nothing varies: no share of nothing
    assert (still.variance == 0).all() and still.share.isna().all()


def test_resamples_do_not_depend_on_how_many_fit_in_memory(monkeypatch):
    h = planted_prompts(np.array([[.1, .3]]), 60, 0, .5)
    a, b = variance_parts(h, seed=3), variance_parts(h, seed=3)
    pd.testing.assert_frame_equal(a, b)
    assert not a.equals(variance_parts(h, seed=4))
    assert PromptGrid(h, ["{}"], ["a", "b"]).band(grouped([0] * 30 + [1] * 30)).groupby("group").size().tolist() == [3, 3]


def test_sets_are_combined_or_say_why_not():
    jobs, looks = label_set("occupations"), label_set("appearance")
    both = combine(jobs, looks.add("glare", "face"), name="all")
    assert both.name == "all" and len(both) == len(jobs) + len(looks) + 1 and both.edits == ("added glare (face)",) and not both.harmful[-1] and jobs.source in both.source
    assert combine(jobs.with_none(), looks.with_none()).none == len(jobs)
    harmless = replace(jobs, categories={k: Category(False) for k in jobs.categories})
    for sets, message in (((), "0 label sets to combine"), ((jobs,), "1 label set to combine"), ((jobs, replace(looks, templates=("{}",))), "different templates"), ((jobs, harmless), "'crime-related' does harm in one label set"),
                          ((looks, looks.reword("suit", "a suit")), "label 'suit' of 'appearance' is 'a suit'")):
        with pytest.raises(ValueError, match=message): combine(*sets)
