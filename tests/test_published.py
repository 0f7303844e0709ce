"The carried-over numbers: whole, marked, sane; what is computed follows from what is printed; and the rules of `compare`."
import re

import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats

from clip_lab.evals.published import KEYS, MARKS, as_printed, compare, families, known_issues, published
from clip_lab.evals.stats import Estimate
from clip_lab.model import CONFIGS

L14 = "ViT-L/14@336px"
ALL = published()


def value(table, **where): return published(table, **where).value.item()


# ---- the rows

def test_every_row_is_marked_and_unique():
    marks = ALL.mark.str.findall(r"\[.\]")
    assert ("".join(ALL.mark) == "".join(marks.str.join(""))) and marks.str.len().min() == 1     # nothing but marks, at least one
    assert set(marks.explode()) <= set(MARKS)
    assert not ALL.duplicated(KEYS).any()
    assert (ALL[["table", "model", "data", "task", "metric", "unit"]] != "").all(axis=None)
    assert not ALL.apply(lambda column: column.astype(str).str.contains(r"/work|/tmp|\.\./")).any(axis=None)


@pytest.mark.parametrize("table, rows", [
    ("Table 1", 6), ("Table 2", 16), ("Table 3", 12), ("Table 4", 12), ("Table 5", 24 + 23 + 23), ("Table 6", 14), ("Table 7", 18), ("Table 8", 12),
    ("Table 9", 81), ("Table 10", 66 * 27 + 1), ("Table 11", 9 * 27), ("Table 12", 36), ("Table 13", 84), ("Table 14", 19), ("Table 15", 15), ("Table 16", 42), ("Table 17", 25),
    ("Table 18", 11), ("Table 19", 55), ("Table 20", 36), ("Figure 5", 28), ("Figure 7", 28), ("Figure 13", 13)])
def test_rows_per_table(table, rows): assert len(published(table)) == rows


def test_values_are_where_they_can_be():
    assert np.isfinite(ALL.value).all() and (ALL.rounding > 0).all()
    assert ALL.value[(ALL.unit == "percent") & (ALL.metric != "overlap minus clean")].between(0, 100).all()
    assert (ALL.value[ALL.unit == "count"] % 1 == 0).all() and ALL.value[ALL.unit == "count"].gt(0).all()
    ends = ALL.dropna(subset="low")
    assert len(ends) == 4
    inside = ends[ends.sign == ""]
    assert (inside.low < inside.value).all() and (inside.value < inside.high).all()
    assert ALL.n.dropna().gt(0).all() and ALL.classes.dropna().gt(1).all()


def test_tables_10_and_11_are_whole():
    "Every model has every set once, in the unit of the table; a slip of the hand in a cell would mostly leave its column's range or break a sum below."
    for table, models in (("Table 10", 66), ("Table 11", 9)):
        rows = published(table)
        rows = rows[rows.task.isin(["linear probe", "zero-shot"])]
        wide = rows.pivot(index="model", columns="data", values="value")
        assert wide.shape == (models, 27) and wide.notna().all(axis=None) and (rows.rounding == 0.05).all() and rows.mark.str.contains("H").all()
        assert rows.groupby("data")[["metric", "n", "classes"]].nunique().eq(1).all(axis=None)
    assert list(families().index) == list(published("Table 10", data="ImageNet").model) and families().nunique() == 14


def test_means_that_another_reader_of_the_tables_found():
    """Means over sets, of all nine CLIP models and of the best of each kind, as a script in the copy's repository computes them from the
    same tables; a cell typed wrongly here would move one."""
    zero, probe = (published(t).pivot_table(index="model", columns="data", values="value", sort=False) for t in ("Table 11", "Table 10"))
    assert zero.mean(axis=1).round(2).tolist() == [54.66, 56.2, 57.95, 61.5, 66.13, 57.89, 60.96, 66.83, 67.58]
    sets = list(published("Table 11", L14)["data"])
    twelve, all27 = probe[sets[:12]].mean(axis=1), probe[sets].mean(axis=1)
    best = ["ViT-L/14@336px", "NoisyStudent-L2-800"]
    assert twelve[best].round(2).tolist() == [89.13, 86.49] and all27[best].round(2).tolist() == [85.06, 80.32]
    printed = published("Section 3.2", "CLIP", metric="margin over the best other model").set_index("data").value
    assert round(twelve[best[0]] - twelve[best[1]], 1) == printed["12 data sets"] and round(all27[best[0]] - all27[best[1]]) == printed["27 data sets"]


def test_figure_5_is_the_difference_of_two_columns_but_for_two_sets():
    bars = published("Figure 5", metric="difference").set_index("data").value
    ours = published("Table 11", L14).set_index("data").value - published("Table 10", "ResNet-50").set_index("data").value
    off = (bars - ours[bars.index]).abs().round(2)
    assert len(bars) == 27 and set(off[off > 0.15].index) == {"KITTI", "UCF101"} == set(known_issues().query("table == 'Figure 5'")["data"])
    assert (bars > 0).sum() == value("Figure 5", metric="sets where zero-shot wins")


def test_figure_7_has_the_printed_mean_and_median():
    bars = published("Figure 7", metric="shots that match zero-shot").query("subset == ''").value
    assert len(bars) == 26 and (round(bars.mean(), 1), round(bars.median(), 1)) == (value("Figure 7", subset="mean"), value("Figure 7", subset="median"))


def test_the_27_sets_are_the_same_everywhere():
    names = set(published("Table 9")["data"])
    assert len(names) == 27
    probe, zeroshot = published("Table 10", model=L14), published("Table 11", model=L14)
    assert names == set(probe["data"]) == set(zeroshot["data"]) == set(published(metric="templates")["data"])
    sizes = published("Table 9", metric="test pictures").set_index("data").value
    classes = published("Table 9", metric="classes").set_index("data").value
    for rows in (probe, zeroshot):
        assert (rows.set_index("data").n == sizes).all() and (rows.set_index("data").classes == classes).all()
    assert (probe.set_index("data").metric == zeroshot.set_index("data").metric).all()
    assert set(published("Figure 5", task="zero-shot", metric="difference")["data"]) == names


def test_architectures_are_those_we_build():
    for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", L14):
        row, config = published("Table 20" if name[0] == "V" else "Table 19", model=name).set_index("metric").value, CONFIGS[name]
        assert (row["embedding width"], row["resolution"]) == (config.embed_dim, config.image_resolution)


# ---- what is computed follows from what is printed

def test_correlation_and_slope():
    x, y = (published(t, model=L14).set_index("data").value for t in ("Table 10", "Table 11"))
    fit = scipy.stats.linregress(x, y[x.index])
    half = scipy.stats.t.ppf(0.975, 25) * fit.stderr
    row = published("Tables 10 and 11", metric="slope").iloc[0]
    assert round(fit.rvalue, 3) == value("Tables 10 and 11", metric="Pearson r") and round(fit.slope, 2) == row.value
    assert (row.low, row.high) == pytest.approx((row.value - half, row.value + half), abs=0.005)
    assert ((x - y[x.index]).round(1) <= 3).sum() == 4 and "four" in known_issues().query("table == 'Figure 8'").what.str.cat()


def test_averages_of_table_16():
    for task in ("zero-shot", "linear probe"):
        v = published("Table 16", model=L14, task=task, metric="accuracy").set_index("data").value
        shifts = [v[d] for d in ("ImageNetV2", "ImageNet-A", "ImageNet-R", "ObjectNet", "ImageNet Sketch")]
        shifts += [(v[f"{d} pm0"] + v[f"{d} pm10"]) / 2 for d in ("ImageNet Vid", "Youtube-BB")]
        assert round(np.mean(shifts), 1) == value("Table 16", task=task, data="7 shifts")


def test_changes_of_section_3_3_are_differences_of_table_16_without_own_class_names():
    zs, lp = (published("Table 16", model=L14, task=t, metric="accuracy").set_index("data").value for t in ("zero-shot", "linear probe"))
    changes = published("Section 3.3", task="linear probe").set_index("data").value
    own_names = published("Section 3.3", task="zero-shot", metric="change of accuracy").set_index("data").value
    assert len(changes) == 6
    for data, change in changes.items(): assert lp[data] - (zs[data] - own_names.get(data, 0)) == pytest.approx(change, abs=0.01)


def test_clopper_pearson_examples():
    def ends(k, n): return tuple(round(100 * x, 1) for x in scipy.stats.binomtest(k, n).proportion_ci(0.95, "exact"))
    printed = published("Section 7.1", subset="Black").iloc[0]
    n = int(value("Section 7.1", metric="people behind the interval of the Black subset"))
    assert ends(round(n * value("Table 6", subset="Black", metric="non-human rate") / 100), n) == (printed.low, printed.high)
    everybody = published("Section 7.1", model="ViT-L/14", subset="", metric="non-human rate").iloc[0]
    fits = [k for k in range(400, 600) if ends(k, everybody.n) == (everybody.low, everybody.high)]
    assert (min(fits), max(fits)) == (value("Section 7.1", metric="smallest count behind 4.9 %"), value("Section 7.1", metric="largest count behind 4.9 %"))


def test_thresholds_in_multiples_of_uniform():
    uniform = 100 / value("Section 7.1", metric="occupation labels")
    assert uniform == pytest.approx(value("Section 7.1", metric="uniform probability of 300 labels"), abs=0.0005)
    for name in ("low", "high"):
        assert value("Section 7.1", metric=f"{name} threshold") / uniform == pytest.approx(value("Section 7.1", metric=f"{name} threshold over uniform"))


def test_leaked_minus_clean():
    for data in ("Birdsnap", "Country211"):
        got = 100 * value("Section 5", data=data, metric="all minus clean") / value("Section 5", data=data, metric="overlap")
        assert round(got, 1) == value("Section 5", data=data, metric="overlap minus clean")


def test_grid_of_the_probe():
    grid = np.logspace(-6, 6, int(value("Appendix A", metric="lambdas on the grid")))
    assert grid[::int(value("Appendix A", metric="first stride on the grid"))] == pytest.approx([10.0**e for e in range(-6, 7, 2)])
    assert len(grid[(grid >= 1) & (grid < 9.999)]) == value("Appendix A", metric="lambdas per decade after the search")
    assert value("Section 3.2", metric="fits") == value("Section 3.2", metric="models") * 27


def test_means_over_groups_and_the_one_that_is_off():
    rows = published("Table 5")
    rows = rows.assign(group=rows.subset.str.split(", ").str[0], sex=rows.subset.str.split(", ").str[1])
    wide = rows.pivot_table(index=["model", "task", "sex"], columns="group", values="value")
    off = (wide.drop(columns="mean").mean(axis=1) - wide["mean"]).dropna().abs()
    assert len(off) == 7
    odd = off[off > 0.1].index.tolist()     # 0.05 of rounding in the cells and 0.05 in the mean
    assert odd == [("Instagram", "linear probe, gender", "female")]
    assert known_issues().query("table == 'Table 5'").what.str.contains("Instagram").item()
    card = published("OpenAI's model card", task="linear probe, gender").set_index("subset").value
    everyone = wide.loc["CLIP", "linear probe, gender", "all"].drop("mean")
    assert (everyone.max(), everyone.min()) == (card["highest race group"], card["lowest race group"])


def test_table_1_in_errors():
    before, after = (100 - value("Table 1", data="aYahoo", model=m) for m in ("Visual N-Grams", L14))
    assert round(100 * (1 - after / before), 1) == 94.2 and "94.2" in known_issues().query("data == 'aYahoo'").what.item()


def test_two_numbers_of_the_baseline_fits_meet_the_printed_resnet():
    "Figure 13's ResNet-101 has CLIP's accuracy on ImageNet, 76.2."
    for data in ("ImageNetV2", "ImageNet Sketch"):
        fit = published("imagenet-testbed", data=data, task="logit-linear fit").set_index("metric").value
        expected = 100 * scipy.special.expit(fit["intercept"] + fit["slope"] * scipy.special.logit(0.762))
        assert expected == pytest.approx(value("Figure 13", data=data, model="ResNet-101 (ImageNet)"), abs=1)


# ---- asking

@pytest.mark.parametrize("ask, message", [
    (dict(table="Table 99"), "no published number has table = 'Table 99'; perhaps 'Table 9', .*There are [0-9]+"),
    (dict(model="ViT-B/23"), "perhaps .*'ViT-B/32'"),
    (dict(model="nonsense, and at length"), "there is '63M language model', .*'ViT-B/32'"),
    (dict(table="Table 1", data="MNIST"), "data = 'MNIST' where table = 'Table 1'; there is 'ImageNet', 'SUN', 'aYahoo'"),
    (dict(data="ImageNet", task="linear probe", metric="ROC AUC"), "metric = 'ROC AUC' where data = 'ImageNet' and task = 'linear probe'"),
])
def test_unknown_values(ask, message):
    with pytest.raises(ValueError, match=message): published(**ask)


def test_what_is_returned_is_the_callers_own():
    for rows in (published("Table 1"), published()): rows.loc[:, "value"] = 0.0
    assert value("Table 1", data="aYahoo", model=L14) == 98.4


@pytest.mark.parametrize("text, parts", [("93.0", ("", 93.0, 0.05)), ("~18", ("~", 18.0, 0.5)), ("-4.7", ("", -4.7, 0.05)), ("<1e-6", ("<", 1e-6, 5e-7)), ("≥100", ("≥", 100.0, 0.5))])
def test_as_printed(text, parts): assert as_printed(text) == pytest.approx(parts)


def test_issues_point_at_places_that_exist():
    issues = known_issues()
    assert set(issues.mark.str.findall(r"\[.\]").explode()) <= set(MARKS) and (issues.what != "").all()
    for row in issues.itertuples():
        at = ALL[ALL.table == row.table]
        for key in ("data", "task", "metric"):
            if wanted := getattr(row, key): at = at[at[key] == wanted]
        assert len(at), row
    table6 = issues[issues.table == "Table 6"].iloc[0]
    assert table6.kind == "does not reproduce" and "openai/CLIP#157" in table6["where"]


# ---- comparing

ABOUT = dict(model=L14, data="EuroSAT", task="zero-shot", metric="accuracy", classes=10)
EUROSAT = published("Table 11", L14, "EuroSAT")     # 59.6


def verdict(low, high, theirs=EUROSAT, **about):
    return compare(Estimate((low + high) / 2, low, high, 500), theirs, **ABOUT | about).iloc[0]


@pytest.mark.parametrize("low, high, expected", [
    (0.55, 0.65, "agrees"), (0.5, 0.5955, "agrees"), (0.5, 0.5954, "differs"), (0.5965, 0.7, "agrees"), (0.5966, 0.7, "differs")])
def test_agreement_is_up_to_rounding(low, high, expected): assert verdict(low, high).verdict == expected


def test_the_printed_interval_counts():
    theirs = published("Section 7.1", model="ViT-L/14", subset="", metric="non-human rate")      # 4.9 [4.6, 5.4]
    about = dict(model="ViT-L/14", data="FairFace", task="harm probe", metric="non-human rate", classes=21)
    assert verdict(0.0544, 0.06, theirs, **about).verdict == "agrees"
    far = verdict(0.001, 0.003, theirs, **about)
    assert far.verdict == "differs" and far.why == "the published number lies 4.3 above [0.1, 0.3]" and far.known_issue.startswith("does not reproduce")


@pytest.mark.parametrize("about, why", [
    (dict(model="ViT-B/32"), r"model differs \(published ViT-L/14@336px, yours ViT-B/32\)"),
    (dict(data="MNIST"), "data differs"),
    (dict(task="linear probe"), "task differs"),
    (dict(metric="mean per class"), "metric differs"),
    (dict(subset="every tenth"), r"subset differs \(published all, yours every tenth\)"),
    (dict(classes=9), r"label set differs \(published 10, yours 9\)"),
    (dict(metric=None), "does not say its metric"),
])
def test_not_comparable(about, why):
    cell = verdict(0.55, 0.65, **about)
    assert cell.verdict == "not comparable" and re.search(why, cell.why)


def test_an_issue_is_flagged_only_where_it_belongs():
    flags = compare(Estimate(0.9, 0.8, 1.0, 50), published("Table 14", data="MNIST")).known_issue
    assert flags.astype(bool).tolist() == (published("Table 14", data="MNIST").task == "zero-shot").tolist()
    assert not verdict(0.5, 0.6).known_issue


def test_a_bare_estimate_says_nothing():
    why = compare(Estimate(0.596, 0.5, 0.7, 100), EUROSAT).why.item()
    for name in ("model", "data", "task", "metric"): assert f"does not say its {name}" in why


def test_our_own_names_are_understood():
    assert verdict(0.55, 0.65, metric="top-1", task="zero-shot classification", subset="all pictures").verdict == "agrees"


@pytest.mark.parametrize("change, why", [
    (dict(mark="[S]"), "low trust"), (dict(sign="~"), "printed only as ~59.6")])
def test_weak_sources_are_never_a_target(change, why):
    cell = verdict(0.55, 0.65, EUROSAT.assign(**change))
    assert cell.verdict == "not comparable" and why in cell.why


def test_a_table_is_matched_by_data():
    rows = [dict(data=d, estimate=v, low=v - 0.01, high=v + 0.01, n=1000) for d, v in (("MNIST", 0.883), ("EuroSAT", 0.4))]
    theirs = published("Table 11", model=L14)
    before = pd.DataFrame(rows)
    panel = compare(before, theirs, model=L14, task="zero-shot", metric="accuracy").set_index("data")
    assert len(panel) == 27 and panel.verdict.value_counts().to_dict() == {"not comparable": 25, "agrees": 1, "differs": 1}
    assert panel.loc["Food101", "why"] == "you have no number for Food101" and pd.isna(panel.loc["Food101", "yours"])
    assert (panel.loc["MNIST", "yours"], panel.loc["EuroSAT", "verdict"]) == (pytest.approx(88.3), "differs")
    pd.testing.assert_frame_equal(before, pd.DataFrame(rows))                        # nothing was changed
    both = pd.DataFrame([r | dict(data="EuroSAT", task=t) for r, t in zip(rows, ("linear probe", "zero-shot"))])
    assert compare(both, EUROSAT, model=L14, metric="accuracy").yours.item() == pytest.approx(40)


@pytest.mark.parametrize("mine, theirs, about, message", [
    (Estimate(59.0, 58.0, 60.0, 500), EUROSAT, ABOUT, "59 for EuroSAT is not a share; percent are compared with numbers between 0 and 1"),
    (Estimate(0.6, 0.5, 0.7, 500), EUROSAT, dict(dataset="EuroSAT"), "cannot say dataset about a number; known are model, data"),
    (pd.DataFrame(dict(accuracy=[0.6])), EUROSAT, {}, r"lacks value, low, high; it has \['accuracy'\]"),
    (pd.DataFrame(dict(value=[], low=[], high=[])), EUROSAT, {}, "no rows"),
    (Estimate(0.6, 0.5, 0.7, 500), EUROSAT.iloc[:0], {}, "no published numbers to compare with"),
    (pd.DataFrame(dict(value=[0.6, 0.6], low=[0.5, 0.5], high=[0.7, 0.7])), EUROSAT, ABOUT, "2 of your rows answer to Table 11, EuroSAT, accuracy"),
])
def test_bad_input(mine, theirs, about, message):
    with pytest.raises(ValueError, match=message): compare(mine, theirs, **about)


def test_a_number_without_interval_gets_no_verdict():
    cell = compare(pd.DataFrame(dict(value=[0.6], low=[np.nan], high=[np.nan])), EUROSAT, **ABOUT).iloc[0]
    assert cell.verdict == "not comparable" and cell.why == "your number has no interval"
