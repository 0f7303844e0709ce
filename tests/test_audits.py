"Audits: planted differences are recovered and none are made up; counting against brute force; attributes, label files, scores and thresholds that are wrong."
import numpy as np
import pandas as pd
from PIL import Image
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binom, chi2, chi2_contingency, false_discovery_control, ncx2

from clip_lab.audits.labels import Category, Label, LabelSet, label_set, read_labels, save_labels, shipped
from clip_lab.audits.people import DRAWN, FAIRFACE, Grouping, People, emoji_people, from_evalset
from clip_lab.audits.thresholds import _Reached, associated, check_thresholds, come_and_go, most_associated, sweep, threshold_grid
from clip_lab.data.labelled import Labelled, Pictures
from clip_lab.data.sets import open_set

REPEATS = 400


def grouped(codes, minimum=30):
    codes = np.asarray(codes, dtype=np.int64)
    return Grouping(("group",), [f"g{i}" for i in range(codes.max() + 1)], codes, minimum)


def drawn_scores(rng, codes, rates):
    "Scores that reach 0.5 with probability rates[group, label], shape (n, labels)."
    given_ = rng.random((len(codes), rates.shape[1])) < rates[codes]
    return np.where(given_, rng.uniform(.5, 1, given_.shape), rng.uniform(0, .5, given_.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def planted():
    "REPEATS audits of 20 labels, of which the first three differ between two groups by known amounts."
    codes, rates = np.repeat([0, 1], [500, 350]), np.tile(np.linspace(.05, .6, 20), (2, 1))
    rates[1, :3] += [.07, .09, .12]
    found = []
    for seed in range(REPEATS):
        s = sweep(drawn_scores(np.random.default_rng(seed), codes, rates), grouped(codes), [f"l{j}" for j in range(20)], [.5])
        found.append((s, associated(s, .5).set_index("label")))
    return codes, rates, found


def within(hits, n, rate): return binom.ppf(1e-4, n, rate) <= hits <= binom.ppf(1 - 1e-4, n, rate)


def test_planted_rates_and_differences_lie_in_their_intervals(planted):
    _, rates, found = planted
    rows = pd.concat([s.rates() for s, _ in found])
    truth = np.array([rates[int(g[1:]), int(l[1:])] for g, l in zip(rows.group, rows.label)])
    covered = (rows.low <= truth) & (truth <= rows.high)
    assert .94 < covered.mean() < .965          # Wilson's coverage swings around its level with the rate; 16,000 intervals
    for j in range(3):
        inside = 0
        for _, tests in found:
            r = tests.loc[f"l{j}"]
            true = (rates[1, j] - rates[0, j]) * (1 if r.leans == "g1" else -1)
            inside += r.low <= true <= r.high
        assert within(inside, REPEATS, .95), (j, inside / REPEATS)


def test_planted_differences_are_decided_as_often_as_theory_says(planted):
    codes, rates, found = planted
    n = np.bincount(codes)
    for j in range(3):
        p = (n * rates[:, j]).sum() / n.sum()
        noncentral = (n * (rates[:, j] - p) ** 2 / (p * (1 - p))).sum()         # to first order
        power = ncx2.sf(chi2.ppf(.95, 1), 1, noncentral)
        decided = sum(t.loc[f"l{j}"].p <= .05 for _, t in found)
        assert binom.ppf(1e-4, REPEATS, power - .03) <= decided <= binom.ppf(1 - 1e-4, REPEATS, min(1, power + .03)), (j, decided / REPEATS, power)


def test_planted_effect_size_is_recovered(planted):
    codes, rates, found = planted
    n = np.bincount(codes)
    for j in range(3):
        p = (n * rates[:, j]).sum() / n.sum()
        v = np.sqrt((n * (rates[:, j] - p) ** 2).sum() / (p * (1 - p)) / n.sum())
        # V squared is biased up by df / n under sampling; its mean over repeats comes back to the truth when that is taken off
        mean = np.mean([t.loc[f"l{j}"].cramers_v ** 2 for _, t in found]) - 1 / n.sum()
        se = np.std([t.loc[f"l{j}"].cramers_v ** 2 for _, t in found]) / np.sqrt(REPEATS)
        assert abs(mean - v ** 2) < 4 * se + 2e-4, (j, mean, v ** 2)


def test_false_discoveries_are_held_with_and_without_a_planted_difference(planted):
    _, _, found = planted
    share = []
    for _, t in found:
        called = t.index[t.p_adjusted <= .05]
        share.append(sum(int(l[1:]) >= 3 for l in called) / max(1, len(called)))
    assert np.mean(share) <= .05 * 17 / 20 + 4 * np.std(share) / np.sqrt(REPEATS)        # Benjamini-Hochberg: at most 5 % times the share of true nulls
    codes, rates, any_called = np.repeat([0, 1, 2], [300, 200, 250]), np.tile(np.linspace(.05, .6, 20), (3, 1)), 0
    for seed in range(REPEATS):
        s = sweep(drawn_scores(np.random.default_rng(seed), codes, rates), grouped(codes), [f"l{j}" for j in range(20)], [.5])
        any_called += bool((associated(s, .5).p_adjusted <= .05).any())
    assert any_called <= binom.ppf(1 - 1e-4, REPEATS, .05), any_called / REPEATS         # every discovery is false here


@pytest.mark.parametrize("thresholds", [[-.9, -.5, -.25, -1e-40, 0, 1e-40, .5, .75], [-.5, -.1, -0., .1], [.5, np.nextafter(np.float32(.5), np.float32(1)), .50001, .9], threshold_grid(300)])
def test_every_kind_of_float_reaches_what_a_search_says(thresholds):
    "The ends of all intervals of the table and their neighbours, from minus infinity over both zeros to NaN."
    thresholds = np.asarray(thresholds, dtype=np.float32)
    upper = np.arange(1 << 18, dtype=np.uint32) << 14
    x = np.concatenate([upper, upper + 1, upper | (1 << 14) - 1, thresholds.view(np.uint32), thresholds.view(np.uint32) - 1, thresholds.view(np.uint32) + 1]).view(np.float32)
    want = np.where(np.isfinite(x), np.searchsorted(thresholds, np.nan_to_num(x), "right"), 255)
    assert np.array_equal(_Reached(thresholds)(x[None])[0], want)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 5), st.sampled_from(["multi-label", "argmax"]), st.sampled_from(["probability", "cosine"]), st.integers(1, 40))
def test_sweep_is_brute_force(seed, labels, groups, mode, kind, rows):
    rng = np.random.default_rng(seed)
    codes = np.r_[np.arange(groups), rng.integers(0, groups, 60)]
    t = np.unique(rng.uniform(.01 if kind == "probability" else -.9, .9, 7).astype(np.float32))
    near = np.concatenate([t, np.nextafter(t, np.float32(-2)), np.nextafter(t, np.float32(2)), np.float32([0, -0., 1e-38, -1e-38])])
    x = np.where(rng.random((len(codes), labels)) < .5, rng.choice(near, (len(codes), labels)), rng.uniform(-1, 1, (len(codes), labels))).astype(np.float32)
    found = sweep(x, grouped(codes), [str(j) for j in range(labels)], t, mode, kind, rows)
    for g in range(groups):
        for j in range(labels):
            for i, threshold in enumerate(t):
                own = [r for r, c in zip(x, codes) if c == g]
                assert found.counts[g, j, i] == sum(bool(r[j] >= threshold) and (mode == "multi-label" or int(np.argmax(r)) == j) for r in own)


def test_association_is_scipys():
    rng = np.random.default_rng(3)
    codes = np.r_[np.arange(4), rng.integers(0, 4, 500)]
    rates = np.clip(rng.uniform(0, .5, (4, 30)), .02, .9); rates[:, 0] = 0; rates[:, 1] = .003
    s = sweep(drawn_scores(rng, codes, rates), grouped(codes), [str(j) for j in range(30)], [.5])
    t, n = associated(s, .5).set_index("label"), s.grouping.n
    assert not t.loc["0"].tested and np.isnan(t.loc["0"].p_adjusted) and not t.loc["1"].tested
    for label, r in t[t.tested].iterrows():
        k = s.counts[:, int(label), 0]
        other = chi2_contingency(np.c_[k, n - k], correction=False)
        assert (r.chi2, r.p, r.df) == (pytest.approx(other.statistic), pytest.approx(other.pvalue), other.dof)
        assert r.leans == f"g{(k / n).argmax()}"
    assert t.p_adjusted[t.tested].to_numpy() == pytest.approx(false_discovery_control(t.p[t.tested].to_numpy()))
    top = most_associated(s, .5, top=3)
    assert (top.groupby("leans").label.nunique() <= 3).all() and (top.groupby("label").size() == 4).all() and ((top.low <= top.estimate) & (top.estimate <= top.high)).all()
    for _, part in top.drop_duplicates("label").groupby("leans"):
        assert part.label.map(t.k).is_monotonic_decreasing
    with pytest.raises(ValueError, match="one group only"): associated(sweep(drawn_scores(rng, codes * 0, rates), grouped(codes * 0), [str(j) for j in range(30)], [.5]), .5)


def test_labels_that_come_and_go():
    x = np.float32([[.3, .7], [.1, .9], [.02, .98], [.4, .6]])
    s = sweep(x, grouped([0, 0, 1, 1]), ["a", "b"], [.05, .35, .65])
    gone = come_and_go(s, .05, .35)
    assert gone[["group", "label", "k_low", "k_high", "elsewhere"]].values.tolist() == [["g0", "a", 2, 0, "g1"]]
    assert len(come_and_go(s, .05, .65)) == 2 and come_and_go(s, .35, .65).label.tolist() == ["a"]
    for arguments, message in (((.35, .05), "two thresholds that rise"), ((.05, .36), "was not counted; the nearest is 0.35"), ((.05, .35, 0), "at least 1 picture")):
        with pytest.raises(ValueError, match=message): come_and_go(s, *arguments)


@pytest.mark.parametrize("thresholds, kind, message", [
    ([0, .1], "probability", "threshold 0;"), ([.1, 1], "probability", "threshold 1;"), ([-1, 0], "cosine", "threshold -1;"), ([.2, .1], "probability", "must rise"), ([.1, .1], "probability", "must rise"),
    ([np.nan], "probability", "threshold nan"), ([], "probability", "a row of numbers"), ([.1], "logit", "kind is"), (np.linspace(.001, .9, 254), "probability", "at most 253")])
def test_wrong_thresholds(thresholds, kind, message):
    with pytest.raises(ValueError, match=message): check_thresholds(thresholds, kind)


def test_wrong_scores():
    good, g = np.full((4, 3), .2, np.float32), grouped([0, 0, 1, 1])
    for bad in (np.nan, np.inf, -np.inf):
        x = good.copy(); x[2, 1] = bad
        for thresholds in ([.1], [.1, .2, .3, .4]):
            for mode in ("multi-label", "argmax"):
                with pytest.raises(ValueError, match=f"label 'b' for picture 2 is {bad}"): sweep(x, g, list("abc"), thresholds, mode, rows=2)
    for x, labels, message in ((good[:, :2], "abc", r"expected \(pictures, 3\)"), (good[:3], "abc", "scores for 3 pictures, groups for 4"), (np.r_[good, good], "abc", "more than 4 pictures"), (good[:, :1], "a", "label set of one")):
        with pytest.raises(ValueError, match=message): sweep(x, g, list(labels), [.1])
    with pytest.raises(ValueError, match="mode is 'top'"): sweep(good, g, list("abc"), [.1], "top")
    grid = threshold_grid(300)
    assert np.isin(np.float32([.005, .04, 1 / 300, 12 / 300]), grid).all() and (np.diff(grid) > 0).all()


def people(table, attributes, **more):
    table = pd.DataFrame(table)
    return People(Labelled("toy", Pictures([b""] * len(table)), table), attributes, DRAWN, **more)


def test_people_that_cannot_be_grouped():
    t = {"a": ["x", "y", "x", None], "b": [1, 1, 1, 1], "c": list("uvwx"), "d": ["p", "q", "q", "q"]}
    for attributes, message in (("z", "no column 'z'; expected some of a, b, c, d"), ("a", "not known for 1 of 4 pictures, the first is row 3"), ("b", "nobody to compare with"), ("c", "differs for every picture"),
                                ([], "no attributes"), (["d", "d"], "named twice")):
        with pytest.raises(ValueError, match=message): people(t, attributes)
    assert people(t, "a", unknown="?").group("a").names == ["?", "x", "y"]
    assert people(t | {"a": pd.Categorical(t["a"], ["y", "x"])}, "a", unknown="?").group("a").names == ["y", "x", "?"]
    with pytest.raises(ValueError, match="already; choose another name"): people(t, "a", unknown="x")
    alone = people(t, "d", minimum=2).group("d")
    assert alone.n.tolist() == [1, 3] and alone.small.tolist() == [True, False]                # a group of one is marked, not dropped
    with pytest.raises(ValueError, match="cannot group by 'a'; expected some of d"): people(t, "d").group("a")
    with pytest.raises(ValueError, match="provenance is None"): People(Labelled("toy", Pictures([b""] * 4), pd.DataFrame(t)), "d", None)
    with pytest.raises(ValueError, match="3 answers for 4 pictures"): alone.counts(np.ones(3, bool))


def test_groups_are_pandas():
    drawn = emoji_people(["twemoji", "noto"], several=True)
    g = drawn.group("gender", "tone", "style")
    expected = drawn.data.table.groupby(["gender", "tone", "style"], observed=True).size()
    assert dict(zip(g.names, g.n)) == {", ".join(k): n for k, n in expected.items()}
    flags = np.random.default_rng(0).random((len(drawn), 2)) < .3
    assert (g.counts(flags) == pd.DataFrame(flags).groupby(g.codes).sum().to_numpy()).all()
    assert not set(emoji_people("noto").data.table.subgroup) & {"couple or family", "fantasy character"} and "no real person" in drawn.provenance.shows


def test_fairface_as_its_owners_lay_it_out(tmp_path):
    for split, n in (("train", 2), ("val", 6)):
        (tmp_path / split).mkdir()
        for i in range(n): Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / split / f"{i}.jpg")
        rows = [f"{split}/{i}.jpg,{('0-2', 'more than 70', '3-9')[i % 3]},{('Male', 'Female')[i % 2]},{('White', 'Black', 'East Asian')[i % 3]},True" for i in range(n)]
        (tmp_path / f"fairface_label_{split}.csv").write_text("\n".join(["file,age,gender,race,service_test", *rows]) + "\n")
    found = from_evalset(open_set("fairface", tmp_path), FAIRFACE)
    assert len(found) == 6 and set(found.attributes) == {"race", "race (2)", "gender", "age"}
    assert len(found.group("race").names) == 3 and found.group("race (2)").n.sum() == 6 and len(found.group("age").names) == 3
    assert "not asked" in found.provenance.consent


def test_label_files_go_round_and_wrong_ones_are_named(tmp_path):
    for name in shipped():
        labels = label_set(name)
        again = read_labels(save_labels(labels, tmp_path / f"{name}.yaml"))
        assert again.hash == labels.hash and vars(again) == vars(labels)
        assert labels.harmful.any() == (name != "appearance") and labels.none is None and labels.with_none().none == len(labels) and not labels.with_none().harmful[-1]
        assert labels.reword(labels.names[0], "somebody else").hash != labels.hash
    text = (tmp_path / "paper-21.yaml").read_text()
    for old, new, message in (("version:", "verson:", "lacks version"), ("category: base", "catgory: base", "label 0 lacks category"), ("label: thief", "label: no", "label 14 has no label"), ("words: a thief", "words: A CRIMINAL", "same words"),
                              ("category: non-human", "category: beast", "of category 'beast'"), ("harm: true", "harm: perhaps", "expected true or false"), ("labels:", "labels: [", "not readable as YAML"),
                              ("name: paper-21", "name: !!python/object/apply:os.getcwd []", "not readable as YAML"), ("photo of {}", "photo", "places for the class name")):
        (tmp_path / "bad.yaml").write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=f"bad.yaml.*{message}"): read_labels(tmp_path / "bad.yaml")
    with pytest.raises(FileNotFoundError, match="Shipped ones are read by name: appearance, occupations"): read_labels(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="no label set 'paper'"): label_set("paper")


def test_edits_leave_the_original_alone():
    paper = label_set("paper-21")
    edited = paper.add("child", "base", "a child").remove("gorilla", "thief")
    assert len(paper) == 21 and len(edited) == 20 and edited.edits == ("added child (base)", "removed gorilla, thief") and edited.version == "1, edited"
    assert paper.add("child", "base", "a child").remove("child").hash == paper.hash
    with pytest.raises(ValueError, match="2 labels that mean no label"):
        LabelSet("n", "1", "s", (Label("a", "a", "none of these"), Label("b", "b", "none of these")), {"none of these": Category(False)})
    with pytest.raises(ValueError, match="has no source"): LabelSet("n", "1", " ", paper.labels, paper.categories)
