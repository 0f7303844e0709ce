"""Attribute accuracy: planted gaps lie in their intervals and none are made up, also when subjects repeat; MetricFrame; FairFace's own files to the layouts of Tables 3 and 5; wrong input."""

import sys

import numpy as np
import pandas as pd
from PIL import Image
import pytest
from scipy.stats import binom
import torch

import clip_lab
from clip_lab.audits import attributes as a
from clip_lab.audits.labels import label_set
from clip_lab.audits.people import FAIRFACE, Grouping, People, Provenance, emoji_people, from_evalset
from clip_lab.data.labelled import Labelled, Pictures
from clip_lab.data.sets import open_set
from clip_lab.embed import embed_images

REPEATS = 300
NOBODY = Provenance("numbers", "this test", "this test", "nobody was asked, nobody is shown", "everything")


def grouped(codes, minimum=30):
    codes = np.asarray(codes, dtype=np.int64)
    return Grouping(("group",), [f"g{i}" for i in range(codes.max() + 1)], codes, minimum)


def drawn(rng, codes, rates, subjects=None, shared=0.0):
    "Truth and answers of two classes, right with probability rates[group]; with `shared`, so much of the luck is the subject's."
    truth = rng.choice(["x", "y"], len(codes))
    luck = rng.standard_normal(len(codes)) if subjects is None else np.sqrt(shared) * rng.standard_normal(subjects.max() + 1)[subjects] + np.sqrt(1 - shared) * rng.standard_normal(len(codes))
    from scipy.special import ndtri
    return truth, np.where(luck < ndtri(np.asarray(rates))[codes], truth, np.where(truth == "x", "y", "x"))


def within(hits, n, rate): return binom.ppf(1e-4, n, rate) <= hits <= binom.ppf(1 - 1e-4, n, rate)


def no_frame(monkeypatch): monkeypatch.setattr(a, "metric_frame", lambda answers, truth, grouping: FakeFrame(answers, truth, grouping))


class FakeFrame:
    "What of MetricFrame is used, for the long simulations; that both agree is asserted in `test_metric_frame_is_brute_force`."
    def __init__(self, answers, truth, grouping):
        right = np.asarray(answers, dtype=object) == np.asarray(truth, dtype=object)
        self.by_group = pd.DataFrame(dict(accuracy=grouping.counts(right.astype(bool)) / grouping.n, n=grouping.n), index=grouping.names)
    def difference(self, method): return pd.Series(dict(accuracy=np.ptp(self.by_group.accuracy)))
    def ratio(self, method): return pd.Series(dict(accuracy=self.by_group.accuracy.min() / self.by_group.accuracy.max()))


# ------------------------------------------------------------------ planted and not planted
def test_planted_gaps_lie_in_their_intervals(monkeypatch):
    no_frame(monkeypatch)
    codes, rates = np.repeat([0, 1, 2], [250, 160, 90]), np.array([.92, .80, .86])
    exact = newcombe = ratio = found = largest = 0
    for seed in range(REPEATS):
        truth, answers = drawn(np.random.default_rng(seed), codes, rates)
        t = a.accuracy_by_group(answers, truth, grouped(codes))
        exact += ((t.low <= rates) & (rates <= t.high)).sum()
        pair = a.gaps(answers, truth, grouped(codes), "pairs").iloc[0]
        newcombe += pair.low <= rates[0] - rates[1] <= pair.high
        ratio += pair.ratio_low <= rates[0] / rates[1] <= pair.ratio_high
        found += pair.p_adjusted <= .05
        s = a.spread(answers, truth, grouped(codes), n_resamples=99, seed=seed).iloc[0]
        largest += s.low <= .12 <= s.high
    assert exact / REPEATS / 3 >= .95                                     # Clopper-Pearson never covers less
    assert within(newcombe, REPEATS, .95) and within(ratio, REPEATS, .95), (newcombe, ratio)
    assert largest >= binom.ppf(1e-4, REPEATS, .95)                       # holds at once, so at least
    assert found > .7 * REPEATS                                          # and most of them are found


def test_without_a_difference_false_findings_are_held(monkeypatch):
    no_frame(monkeypatch)
    codes, any_found, spreads = np.repeat(np.arange(5), [100, 80, 80, 60, 40]), 0, 0
    for seed in range(REPEATS):
        truth, answers = drawn(np.random.default_rng(1000 + seed), codes, [.8] * 5)
        any_found += (a.gaps(answers, truth, grouped(codes)).p_adjusted <= .05).any()
        spreads += a.spread(answers, truth, grouped(codes), n_resamples=99, seed=seed).p[0] <= .05
    assert any_found <= binom.ppf(1 - 1e-4, REPEATS, .05) and spreads <= binom.ppf(1 - 1e-4, REPEATS, .05), (any_found, spreads)


def test_when_subjects_repeat_their_number_counts(monkeypatch):
    no_frame(monkeypatch)
    rng = np.random.default_rng(7)
    subjects, codes = np.repeat(np.arange(120), 6), np.repeat(rng.permutation(np.repeat([0, 1], 60)), 6)
    covered, naive, false, falsely = 0, 0, 0, 0
    for seed in range(REPEATS):
        truth, answers = drawn(np.random.default_rng(2000 + seed), codes, [.8, .8], subjects, shared=.7)
        for t, name in ((a.accuracy_by_group(answers, truth, grouped(codes), subjects=subjects), "own"), (a.accuracy_by_group(answers, truth, grouped(codes)), "naive")):
            hit = ((t.low <= .8) & (.8 <= t.high)).sum()
            covered, naive = (covered + hit, naive) if name == "own" else (covered, naive + hit)
        false += a.gaps(answers, truth, grouped(codes), subjects=subjects).p[0] <= .05
        falsely += a.gaps(answers, truth, grouped(codes)).p[0] <= .05
    assert covered / REPEATS / 2 > .925 and naive / REPEATS / 2 < .85, (covered, naive)
    assert within(false, REPEATS, .05) and falsely > .15 * REPEATS, (false, falsely)


# ------------------------------------------------------------------ against others
def test_metric_frame_is_brute_force(monkeypatch):
    rng = np.random.default_rng(0)
    codes = np.r_[np.arange(4), rng.integers(0, 4, 300)]
    truth, answers = rng.choice(list("abc"), 304), rng.choice(list("abcd"), 304)
    t, frame = a.accuracy_by_group(answers, truth, grouped(codes)), a.metric_frame(answers, truth, grouped(codes))
    for g, r in enumerate(t.itertuples()):
        own = [x == y for x, y, c in zip(answers, truth, codes) if c == g]
        assert (r.k, r.n) == (sum(own), len(own)) and frame.by_group.accuracy[r.group] == pytest.approx(sum(own) / len(own))
    s = a.spread(answers, truth, grouped(codes), n_resamples=9).estimate
    assert s[0] == pytest.approx(np.ptp(t.estimate)) and s[1] == pytest.approx(t.estimate.min() / t.estimate.max())
    monkeypatch.setattr(a, "metric_frame", lambda *given: FakeFrame(truth, truth, grouped(codes)))
    with pytest.raises(RuntimeError, match="MetricFrame and our own counts disagree"): a.accuracy_by_group(answers, truth, grouped(codes))


def test_without_fairlearn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairlearn", None)
    monkeypatch.setitem(sys.modules, "fairlearn.metrics", None)
    with pytest.raises(ImportError, match=r"clip_lab\[audits\]"): a.accuracy_by_group(list("xy"), list("xy"), grouped([0, 1]))


def test_gaps_against_a_group_and_the_rest():
    codes = np.repeat([0, 1, 2], [40, 40, 10])
    right = np.r_[np.ones(30), np.zeros(10), np.ones(20), np.zeros(20), np.ones(10)].astype(bool)
    truth = np.tile(["x", "y"], 45)
    answers = np.where(right, truth, "z")
    rest = a.gaps(answers, truth, grouped(codes)).set_index("group")
    assert rest.difference["g0"] == pytest.approx(.75 - 30 / 50) and rest.k_against["g0"] == 30 and rest.small.tolist() == [False, False, True]
    base = a.gaps(answers, truth, grouped(codes), "g1").set_index("group")
    assert list(base.index) == ["g0", "g2"] and base.ratio["g0"] == pytest.approx(1.5) and base.small.tolist() == [False, True]
    none = a.gaps(np.where(codes == 0, "z", truth), truth, grouped(codes), "g0")
    assert none.ratio.isna().all() and none.ratio_low.isna().all() and (none.difference == 1).all() and (none.p < 1e-6).all()       # nobody right: no ratio, but a gap


# ------------------------------------------------------------------ tables of others
def fairface(folder, sizes=(("train", 70), ("val", 84))):
    races = ("White", "Black", "East Asian", "Indian", "Latino_Hispanic", "Middle Eastern", "Southeast Asian")
    ages = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")
    for split, n in sizes:
        (folder / split).mkdir()
        lines = ["file,age,gender,race,service_test"]
        for i in range(n):
            gender = ("Male", "Female")[i // 7 % 2]
            Image.new("RGB", (32, 32), (20 * (i % 7), 200 if gender == "Male" else 20, 7 * (i % 30))).save(folder / split / f"{i + 1}.jpg")
            lines.append(f"{split}/{i + 1}.jpg,{ages[i % 9]},{gender},{races[i % 7]},{i % 2 == 0}")
        (folder / f"fairface_label_{split}.csv").write_text("\n".join(lines) + "\n")


def test_fairface_from_its_files_to_tables_3_and_5(tmp_path):
    fairface(tmp_path)
    found = open_set("fairface", tmp_path)
    people, train = a.together(from_evalset(found, FAIRFACE, split="train"), from_evalset(found, FAIRFACE))
    assert people.attributes == ["race", "race (2)", "gender", "age"] and len(people) == 154 and people.group("age").names[0] == "0-2"
    model, preprocess = clip_lab.load()
    features = embed_images(model, preprocess, people.data.pictures, progress=False).features
    zero_shot = a.classify_attributes(model, features, people, a.FAIRFACE_WORDS)
    assert set(zero_shot["race (2)"]) <= {"White", "Non-White"} and set(zero_shot.age) <= set(a.FAIRFACE_WORDS["age"])
    probed = a.probe_attributes(features, people, np.arange(len(people)), ["race (2)", "gender", "age"], train=train, lam=1.0)
    assert probed.answers.gender[70:].notna().all() and probed.answers.gender[:70].isna().all() and probed.folds.n_test.tolist() == [84] * 3
    methods = {"linear probe": probed.answers, "zero-shot": zero_shot, "zero-shot, seven merged": zero_shot.assign(**{"race (2)": a.one_against_all([*zero_shot.race, "White"], "White")[:-1]})}
    table = a.attribute_table(methods, people, ["race (2)", "gender", "age"], "race (2)")
    assert len(table) == 3 * 3 * 2 and set(table.n) == {12, 72}          # only the 84 pictures that all answered; every seventh is White
    white = table[(table.group == "White") & (table.attribute == "race (2)") & (table.method == "zero-shot")].iloc[0]
    assert white.k == sum((zero_shot["race (2)"] == "White") & (people.data.table["race (2)"] == "White") & probed.answers.gender.notna()) and white.small
    printed = a.wide(table)
    assert list(printed.index) == list(methods) and printed.columns.nlevels == 2 and {g for g, _ in printed.columns} == {"White", "Non-White"}
    assert [c for _, c in printed.columns[:3]] == ["race (2)", "gender", "age"] and printed.iloc[0, 0].count("[") == 1
    assert table[(table.method == "linear probe") & (table.attribute == "gender")].estimate.min() > .95                               # the colour gives it away, so the path works
    five = a.class_table(methods, people, "gender", "race")
    assert len(five) == 3 * 3 * 8 and list(dict.fromkeys(five.subset)) == ["Female", "Male", "all"] and five.group.iloc[7] == "average"
    for (m, s), rows in five.groupby(["method", "subset"]):
        groups, mean = rows[rows.group != "average"], rows[rows.group == "average"].iloc[0]
        assert mean.estimate == pytest.approx(groups.estimate.mean()) and mean.n == groups.n.sum() and mean.low <= mean.estimate <= mean.high
    assert a.wide(five, ("method", "subset"), ("group",)).shape == (9, 8)


def test_a_folder_and_a_csv_of_ones_own(tmp_path):
    for i in range(40): Image.new("RGB", (16, 16), (255 * (i % 2), 0, i % 3)).save(tmp_path / f"{i}.png")
    pd.DataFrame(dict(file=[f"{i}.png" for i in range(40)], chamber=["House" if i < 24 else "Senate" for i in range(40)], gender=["f" if i % 2 else "m" for i in range(40)], member=[i // 4 for i in range(40)])).to_csv(tmp_path / "congress.csv", index=False)
    table = pd.read_csv(tmp_path / "congress.csv")
    people = People(Labelled("congress", Pictures([tmp_path / f for f in table.file]), table), ["chamber", "gender"], NOBODY)
    model, preprocess = clip_lab.load()
    features = embed_images(model, preprocess, people.data.pictures, progress=False).features
    answers = a.classify_attributes(model, features, people, {"gender": {"f": "a woman", "m": "a man", "other": "something else"}})
    probed = a.probe_attributes(features, people, "member", ["gender"], folds=4, lam=1.0)
    t = a.attribute_table({"zero-shot": answers, "linear probe": probed.answers}, people, ["gender"], ("chamber", "gender"), subjects=table.member)
    assert set(t.group) == {"House, f", "House, m", "Senate, f", "Senate, m"} and t.n.tolist() == [12, 12, 8, 8] * 2 and (t.interval == "Korn-Graubard").all()
    assert t[t.method == "linear probe"].estimate.min() == 1 and t[t.method == "linear probe"].high.max() == 1 and t[t.method == "linear probe"].low.max() < .6     # six members, not twelve pictures
    with pytest.raises(ValueError, match="no words for gender 'f'"): a.classify_attributes(model, features, people, {"gender": {"m": "a man"}})
    with pytest.raises(ValueError, match="no attribute 'party'"): a.classify_attributes(model, features, people, {"party": {}})
    with pytest.raises(ValueError, match="two classes of gender have the same words"): a.classify_attributes(model, features, people, {"gender": {"f": "a person", "m": "a person"}})
    features[3] = float("nan")
    with pytest.raises(ValueError, match="row 3 has length nan"): a.classify_attributes(model, features, people, {"gender": {"f": "a woman", "m": "a man"}})
    with pytest.raises(ValueError, match="gender, fold 0: .*not finite"): a.probe_attributes(features, people, "member", ["gender"], folds=4, lam=1.0)


# ------------------------------------------------------------------ answers, splits
def test_answers_from_a_label_set():
    paper = label_set("paper-21")
    rng = np.random.default_rng(0)
    scores = rng.random((50, 21))
    plain = a.answers_of(scores, paper)
    assert plain.tolist() == [paper.names[i] for i in scores.argmax(1)]
    classes = {l: "White" if "white" in l.lower() else "other" for l in paper.names}
    assert a.answers_of(scores, paper, classes).tolist() == [classes[p] for p in plain]
    with pytest.raises(ValueError, match="no class is said for label"): a.answers_of(scores, paper, {"thief": "x"})
    with pytest.raises(ValueError, match="one label only"): a.answers_of(scores[:, :1], ["a"])
    scores[4, 2] = np.nan
    with pytest.raises(ValueError, match=f"label '{paper.names[2]}' for picture 4 is nan"): a.answers_of(scores, paper)


def test_no_subject_is_on_both_sides_and_all_are_asked():
    people = emoji_people("noto")
    t = people.data.table
    people = people.select(t.gender.isin(["woman", "man"]).to_numpy())
    whose, labels = people.data.table.base_name.to_numpy(), people.group("gender").codes
    asked = np.zeros(len(people), dtype=int)
    for train, test in a.split_by_subject(labels, whose, 4):
        assert not set(whose[train]) & set(whose[test]) and set(labels[train]) == {0, 1}
        asked[test] += 1
    assert (asked == 1).all()
    x = np.random.default_rng(0).standard_normal((len(people), 8))
    tuned = a.probe_attributes(x, people, "base_name", ["gender"], folds=2)
    assert (tuned.folds.shared == 0).all() and (tuned.folds["lambda"] > 0).all() and tuned.folds.subjects_test.sum() == len(set(whose))


@pytest.mark.parametrize("subjects, folds, message", [([0] * 6, 2, "1 subjects for 2 folds"), ([0, 0, 0, 1, 2, 3], 2, "class 0 has 1 subject"), (range(6), 1, "1 fold; expected at least two"), ([0, 1], 2, "2 subjects for 6 pictures"),
                                                       ([0, 1, None, 3, 4, 5], 2, "picture 2 has no subject")])
def test_splits_that_cannot_be(subjects, folds, message):
    with pytest.raises(ValueError, match=message): a.split_by_subject([0, 0, 0, 1, 1, 1], list(subjects), folds)


@pytest.mark.parametrize("answers, truth, codes, message", [
    (list("xx"), list("xy"), [0, 1, 1], "answers: shape"), (list("xxx"), ["x", None, "y"], [0, 1, 1], "truth: none for 1 of 3 pictures, the first is 1"), (list("xxx"), list("yyy"), [0, 1, 1], "'y' for every picture"),
    (list("XYX"), list("xyx"), [0, 1, 1], "no answer is ever a true class"), (list("XXX"), list("xyx"), [0, 1, 1], "spelled alike"), (list("abb"), list("xyx"), [0, 1, 1], "spelled alike"), (list("xyx"), list("xyy"), [0, 0, 0], "one group only")])
def test_what_cannot_be_compared(answers, truth, codes, message):
    for how in (a.gaps, a.spread):
        with pytest.raises(ValueError, match=message): how(answers, truth, grouped(codes))


def test_a_group_of_one_is_shown_as_what_it_is():
    codes, truth = np.r_[0, np.ones(40, int)], np.tile(["x", "y"], 21)[:41]
    t = a.accuracy_by_group(truth, truth, grouped(codes))
    assert t.small.tolist() == [True, False] and t.low[0] == pytest.approx(.025) and t.n[0] == 1
    own = a.accuracy_by_group(truth, truth, grouped(codes), subjects=np.arange(41))
    assert (own.low[0], own.high[0]) == (0, 1)


def test_tables_that_do_not_fit():
    people = People(Labelled("n", Pictures([b""] * 8), pd.DataFrame(dict(g=list("aabbaabb"), h=list("xyxyxyxy")))), ["g", "h"], NOBODY)
    full = pd.DataFrame(dict(h=list("xyxyxxxx")))
    with pytest.raises(ValueError, match="no methods"): a.attribute_table({}, people, ["h"], "g")
    with pytest.raises(ValueError, match="zs has no answers about 'g'; there is h"): a.attribute_table({"zs": full}, people, ["g"], "h")
    with pytest.raises(ValueError, match="about 7 pictures; there are 8"): a.attribute_table({"zs": full[:7]}, people, ["h"], "g")
    with pytest.raises(ValueError, match="no picture was answered by all of zs, lp"): a.attribute_table({"zs": full, "lp": full.assign(h=None)}, people, ["h"], "g")
    with pytest.raises(ValueError, match="'c' does not occur"): a.one_against_all(["a", "b"], "c")
    with pytest.raises(ValueError, match="no column 'who' that names subjects"): a.probe_attributes(np.zeros((8, 2)), people, "who")
    with pytest.raises(ValueError, match="features of 7 pictures for 8"): a.probe_attributes(np.zeros((7, 2)), people, np.arange(8))
    with pytest.raises(ValueError, match="expected the same"): a.together(people, People(people.data, ["g"], NOBODY))
