"""All, Overlap and Clean against scipy and statsmodels directly; empty and full overlap; wrong input; the warnings; the report of two folders."""

import json

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import StratifiedTable
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from clip_lab.data import clipart
from clip_lab.evals.duplicates import plant
from clip_lab.evals.overlap import across, class_shift, implied_gap, overlap_analysis, overlap_report
from clip_lab.evals.published import published


def planted(n=1500, share=0.2, base=0.7, effect=0.1, seed=0):
    rng = np.random.default_rng(seed)
    overlap = rng.random(n) < share
    return rng.random(n) < base + effect * overlap, overlap, rng.integers(0, 5, n)


def test_every_number_is_scipys_or_statsmodels():
    right, overlap, labels = planted()
    result = overlap_analysis(right, overlap, labels)
    k_o, n_o, k_c, n_c = right[overlap].sum(), overlap.sum(), right[~overlap].sum(), (~overlap).sum()
    for part, k, n in (("overlap", k_o, n_o), ("clean", k_c, n_c), ("all", right.sum(), len(right)), ("share", n_o, len(right))):
        e = getattr(result, part)
        assert (e.value, e.n, e.level) == (pytest.approx(k / n), n, 0.995)
        assert (e.low, e.high) == pytest.approx(proportion_confint(k, n, 0.005, "beta"))
    assert result.tests["binomial"].p == pytest.approx(stats.binomtest(k_o, n_o, k_c / n_c, "greater").pvalue)
    assert result.tests["fisher"].p == pytest.approx(stats.fisher_exact([[k_o, n_o - k_o], [k_c, n_c - k_c]], "greater").pvalue)
    tables = [[[(r & o & (labels == c)).sum() for r in (right, ~right)] for o in (overlap, ~overlap)] for c in range(5)]
    pooled = StratifiedTable([np.array(t) for t in tables])
    assert result.within_classes.value == pytest.approx(pooled.oddsratio_pooled)
    assert result.tests["mantel-haenszel"].p == pytest.approx(pooled.test_null_odds().pvalue)
    counts = [[(o & (labels == c)).sum() for c in range(5)] for o in (overlap, ~overlap)]
    assert result.tests["classes"].p == pytest.approx(stats.chi2_contingency(counts, correction=False).pvalue)


@pytest.mark.parametrize("seed", range(5))
def test_identity(seed):
    right, overlap, _ = planted(seed=seed, share=0.1 + 0.15 * seed)
    r = overlap_analysis(right, overlap)
    assert r.all.value - r.clean.value == pytest.approx(r.share.value * (r.overlap.value - r.clean.value))
    assert r.shift.value == pytest.approx(r.all.value - r.clean.value) and r.shift.low < r.shift.value < r.shift.high
    assert implied_gap(r.shift.value, r.share.value) == pytest.approx(r.gap.value)


def test_published_numbers_keep_the_identity():
    for data in ("Birdsnap", "Country211"):
        number = {m: published("Section 5", data=data, metric=m).iloc[0] for m in ("overlap", "all minus clean", "overlap minus clean")}
        gap = implied_gap(number["all minus clean"].value, number["overlap"].value / 100)
        assert abs(gap - number["overlap minus clean"].value) <= number["overlap minus clean"].rounding
    with pytest.raises(ValueError, match="above 0"):
        implied_gap(0.1, 0)


def test_nothing_and_everything_overlap():
    right, _, labels = planted()
    none, every = (overlap_analysis(right, np.full(len(right), seen), labels, name=str(seen)) for seen in (False, True))
    assert none.overlap is None and none.shift is None and none.tests == {} and none.clean == none.all and "no overlap found" in none.notes[0]
    assert every.clean is None and every.tests == {} and every.overlap == every.all and "no Clean part" in every.notes[0]
    table = across([none, every]).set_index("data")
    assert table.loc["False", "shift"] == 0 and np.isnan(table.loc["True", "shift"]) and table.p_bonferroni.isna().all() and not table.significant.any()
    assert none.table().part.tolist() == ["All", "Clean"]
    for r in (none, every):
        json.dumps(r.to_dict())


def test_extreme_answers_are_defined():
    overlap = np.arange(40) < 10
    for right in (np.ones(40, bool), np.zeros(40, bool), overlap):
        r = overlap_analysis(right, overlap, np.arange(40) % 2)
        assert 0 <= r.tests["binomial"].p <= 1 and 0 <= r.tests["fisher"].p <= 1
        assert r.within_classes is None and any("Mantel-Haenszel is not defined" in note for note in r.notes)
        json.dumps(r.to_dict())
    one = overlap_analysis(overlap[::-1], overlap, np.zeros(40, int))
    assert "classes" not in one.tests and "all pictures are of one class" in one.notes


@pytest.mark.parametrize("change, message", [
    (dict(overlap=[True] * 3), "expected one for each picture"), (dict(overlap=np.full(4, np.nan)), "True and False"), (dict(right=[0, 1, 2, 1]), "right"),
    (dict(right=[0, 1, np.nan, 1]), "right"), (dict(labels=[0, 1]), "labels have shape"), (dict(labels=[0.0, 1, 2, 3]), "whole numbers"), (dict(plain=[True]), "plain"),
    (dict(right=[]), "shape"), (dict(level=1.0), "level"), (dict(level=99.5), "level")])
def test_wrong_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        overlap_analysis(**dict(right=[1, 0, 1, 1], overlap=[1, 0, 0, 1]) | change)


def test_plain_frames_warn():
    right, overlap, _ = planted()
    few, many = (overlap & (np.cumsum(overlap) <= n) for n in (5, 40))
    assert overlap_analysis(right, overlap, plain=few).warnings == []
    assert "plain frames" in overlap_analysis(right, overlap, plain=many).warnings[0]


def test_class_shift_warns_and_names_the_class():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 2000)
    overlap = rng.random(2000) < np.where(labels == 2, 0.3, 0.1)
    result = overlap_analysis(rng.random(2000) < 0.7, overlap, labels, ["cat", "dog", "crow"])
    assert "'crow'" in result.warnings[0] and "within classes" in result.warnings[0]
    even = overlap_analysis(rng.random(2000) < 0.7, rng.random(2000) < 0.2, labels)
    assert even.warnings == []


def test_redrawn_p_meets_chi_squared_where_both_hold():
    rng = np.random.default_rng(2)
    labels, overlap = rng.integers(0, 12, 3000), rng.random(3000) < 0.02
    p = class_shift(labels, overlap, n_resamples=20_000)
    assert p.detail["least_expected"] < 5 and p.test == "chi-squared, redrawn"
    counts = [[(o & (labels == c)).sum() for c in range(12)] for o in (overlap, ~overlap)]
    assert p.p == pytest.approx(stats.chi2_contingency(counts, correction=False).pvalue, abs=0.02)
    with pytest.raises(ValueError, match="one class"):
        class_shift(np.zeros(10, int), np.arange(10) < 5)


def test_across_corrects_over_what_was_tested():
    results = [overlap_analysis(*planted(seed=i, share=0 if i < 3 else 0.2)[:2], name=f"set {i}") for i in range(10)]
    table = across(results)
    tested = table.p.notna()
    assert tested.sum() == 7
    for method in ("bonferroni", "holm"):
        assert np.allclose(table[f"p_{method}"][tested], multipletests(table.p[tested], method=method)[1])
    assert table["shift"].is_monotonic_decreasing
    with pytest.raises(ValueError, match="one name"):
        across([results[0], results[0]])
    with pytest.raises(ValueError, match="no results"):
        across([])


def test_report_of_two_places(tmp_path):
    pictures = clipart.load().pictures.take(range(0, 300, 10))
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    for i in range(20):
        (tmp_path / "a" / f"{i:02d}.png").write_bytes(pictures.encoded(i))
    copies, _ = plant(pictures[:5], {"resize": lambda p, rng: p.resize((50, 50))})
    for i, picture in enumerate([*copies, *pictures[25:30]]):
        picture.convert("RGB").save(tmp_path / "b" / f"{i:02d}.png")
    (tmp_path / "b" / "99.png").write_bytes(b"broken")
    right = [1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 1]
    with pytest.warns(UserWarning, match="could not be read"):
        report = overlap_report(tmp_path / "a", tmp_path / "b", threshold=0.9, right=right, labels=[0, 1] * 5 + [0])
    assert report.overlap.tolist() == [True] * 5 + [False] * 6
    assert {("00.png", "00.png"), ("04.png", "04.png")} <= set(zip(report.pairs.a_name, report.pairs.b_name))
    assert (report.analysis.overlap.n, report.analysis.clean.n, report.analysis.overlap.value) == (5, 5, 0.8)
    summary = report.summary().set_index("what").value
    assert summary["unreadable in B"] == 1 and summary["share that overlaps"] == 0.5
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="11 pictures of B"):
        overlap_report(tmp_path / "a", tmp_path / "b", right=right[:-1])
