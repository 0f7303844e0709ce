"Figures: what is drawn equals the table, files are the same twice and carry their sentence, wrong tables are named."
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib.pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
import numpy as np
import pandas as pd
from PIL import Image
import pytest

from clip_lab.evals.published import compare, published
from clip_lab.evals.robustness import BASELINES, fit_baseline
from clip_lab.ui import bias, by_set, figures as f, panel, scrutiny
from clip_lab.ui.describe import TABLES, describe

LONG = ["FacialEmotionRecognition2013", "a very long data set name with many words", "MNIST", "costs $5 & <more>"]
RNG = np.random.default_rng(0)

def estimates(n, low=0.2, high=0.8, **more):
    e = RNG.uniform(low, high, n)
    return pd.DataFrame({"data": [f"{LONG[i % 4]} {i}" for i in range(n)], "estimate": e, "low": e - 0.05, "high": e + 0.07, "n": RNG.integers(10, 50_000, n), **more})

def compared(n=3):
    theirs = published("Table 11", "ViT-L/14@336px", task="zero-shot", metric="accuracy").head(n)
    ours = pd.DataFrame({"data": theirs.data, "estimate": theirs["value"] / 100 - 0.05, "low": theirs["value"] / 100 - 0.06, "high": theirs["value"] / 100 - 0.04, "n": 400})
    return compare(ours, theirs, model="ViT-L/14@336px", task="zero-shot", metric="accuracy")

def tables(n):
    "A good table of `n` rows for every figure, by the name of its function."
    rows, k = estimates(n), max(n, 4)
    probe = np.linspace(0.4, 0.95, k)
    return {
        f.prompt_strip: pd.concat([rows.assign(template=t, estimate=(rows.estimate + d).clip(0, 1)) for t, d in (("{}", 0.0), ("a {}", 0.01), ("the {}", 0.03))]),
        f.difference_bars: rows.assign(estimate=rows.estimate - 0.5, low=rows.low - 0.5, high=rows.high - 0.5),
        f.few_shot_plot: pd.DataFrame({"series": "own", "shots": 2.0 ** np.arange(n % 12 + 1), "estimate": 0.5, "low": 0.4, "high": 0.6, "n": 100}),
        f.efficiency_bars: pd.DataFrame({"data": rows.data, "shots": np.geomspace(0.2, 150, n), "how": ["interpolated", "extrapolated above"] * (n // 2) + ["interpolated"] * (n % 2)}),
        f.correlation_plot: pd.DataFrame({"data": [f"set {i}" for i in range(k)], "probe": probe, "zero_shot": probe - 0.1 - 0.05 * np.cos(np.arange(k))}),
        f.scaling_plot: pd.DataFrame({"model": [f"RN{i}" for i in range(4)] * 2, "compute": [6.0, 10, 70, 260] * 2, "error": [0.5, 0.42, 0.35, 0.3, 0.6, 0.5, 0.4, 0.4], "evaluation": ["a"] * 4 + ["b"] * 4}),
        scrutiny.robustness_scatter: pd.DataFrame({"kind": ["standard", "robust"] * (k // 2), "acc_id": probe[:k // 2 * 2], "acc_ood": probe[:k // 2 * 2] ** 2}),
        scrutiny.overlap_plot: rows.assign(overlap=np.linspace(0, 0.2, n), significant=np.arange(n) % 2 == 0),
        scrutiny.reliability_plot: pd.DataFrame({"confidence": (np.arange(n) + 0.5) / n, "estimate": 0.5, "low": 0.4, "high": 0.6, "n": 7}),
        scrutiny.risk_coverage: pd.DataFrame({"series": "all", "coverage": (np.arange(n) + 1) / n, "estimate": 0.1, "low": 0.05, "high": 0.2}),
        scrutiny.recall_curve: pd.DataFrame({"direction": "image->text", "k": np.arange(n) + 1, "estimate": 0.5, "low": 0.4, "high": 0.6, "n": 9, "chance": 0.1}),
        scrutiny.counts_plot: pd.DataFrame(np.eye(n, dtype=int) * 5 + 1, index=rows.data, columns=rows.data),
        panel.paper_vs_you: compared(min(n, 20)),
        by_set.transfer_scatter: pd.DataFrame({"model": [f"model {i}" for i in range(k)], "kind": ["labels", "words"] * (k // 2) + ["labels"] * (k % 2), "source": probe, "transfer": probe ** 2})} | by_group(rows)

def by_group(rows):
    "Good tables of the figures about groups, three groups in every row."
    groups = ["woman", "a group with a long name", "x"]
    t = pd.concat([rows.assign(label=rows.data, leans="x", group=g, k=3, small=g == "x", harm=True) for g in groups], ignore_index=True)
    return {bias.associated_bars: t, bias.moves_plot: t.assign(before=t.label, after="child"), bias.harm_bars: t.assign(category=t.group, group=t.label),
            bias.rate_curves: t.assign(label="judge", threshold=np.tile(np.geomspace(0.001, 0.5, len(rows)), 3), times_uniform=1.5)}

@pytest.mark.parametrize("n,width", [(1, 3.3), (1, 6.4), (20, 3.3)])
@pytest.mark.filterwarnings("error")       # such as a layout that could not be made
def test_all_figures_of_one_row_and_of_many_fit_a_column_and_a_page(n, width):
    for draw, table in tables(n).items():
        before = table.copy()
        ax = draw(table, width=width, title="A title long enough to need two lines in a column")
        ax.figure.draw_without_rendering()
        box = ax.figure.get_tightbbox()
        assert -0.05 <= box.x0 and box.x1 <= width + 0.05 and box.y1 <= ax.figure.get_figheight() + 0.05, (draw.__name__, box)
        assert ax.get_window_extent().width / ax.figure.dpi > 0.3 * width, draw.__name__
        assert (ax.get_xlabel() or ax.child_axes[0].get_xlabel()) and ax.alt_text.endswith("."), draw.__name__
        pd.testing.assert_frame_equal(table, before)
    assert plt.get_fignums() == []

def test_names_of_rows_do_not_touch():
    for draw in (f.difference_bars, f.efficiency_bars, f.prompt_strip):
        ax = draw(tables(40)[draw], width=3.3)
        ax.figure.draw_without_rendering()
        boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
        assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:])), draw.__name__

def test_every_figure_has_its_sentence_and_its_needs():
    for draw, table in tables(6).items():
        if draw is scrutiny.counts_plot: continue
        kind = draw.__name__
        for column in TABLES[kind]:
            with pytest.raises(ValueError, match=f"{kind}: the table has no column '{column}'"): draw(table.drop(columns=column))
        with pytest.raises(ValueError, match="no rows"): draw(table[:0])
        number = {"efficiency_bars": "shots", "correlation_plot": "probe", "scaling_plot": "error", "robustness_scatter": "acc_ood", "paper_vs_you": "published", "transfer_scatter": "transfer"}.get(kind, "estimate")
        with pytest.raises(ValueError, match=f"has no number in column '{number}'"): draw(table.assign(**{number: np.nan}))
        if {"estimate", "low"} <= set(TABLES[kind]):
            with pytest.raises(ValueError, match="estimate outside its interval"): draw(table.assign(low=table.estimate + 0.01))

def test_figures_about_groups_draw_every_rate_and_refuse_an_eighth_group():
    made = by_group(estimates(5))
    for draw in (bias.associated_bars, bias.harm_bars, bias.moves_plot):
        ax, t = draw(made[draw]), made[draw]
        assert np.allclose(sorted(b.get_width() for b in ax.patches), sorted(t.estimate)) and len({b.get_hatch() for b in ax.patches}) == 3        # not by colour alone
        ends = np.concatenate([np.array(c.get_segments())[:, :, 0] for c in ax.collections if hasattr(c, "get_segments") and len(c.get_segments())])
        assert np.allclose(ends[ends[:, 0].argsort()], t[["low", "high"]].sort_values("low"))
        assert {b.get_alpha() for b in ax.patches} == ({1, 0.4} if t.small.any() else {1})
    moves = made[bias.moves_plot]
    assert len(bias.moves_plot(moves, top=2).patches) == 6 and "of which 3 are not drawn" in bias.moves_plot(moves, top=2).alt_text
    many = pd.concat([moves.assign(group=f"group {i}") for i in range(8)])
    for draw in (bias.associated_bars, bias.moves_plot):
        with pytest.raises(ValueError, match="8 groups, and colours and patterns repeat after 7"): draw(many)
    with pytest.raises(ValueError, match="8 harmful categories"): bias.harm_bars(many.assign(category=many.group))
    with pytest.raises(ValueError, match="no category of this table does harm"): bias.harm_bars(made[bias.harm_bars].assign(harm=False))
    curves = made[bias.rate_curves]
    with pytest.raises(ValueError, match="no rows for label None; there is judge, nurse"): bias.rate_curves(pd.concat([curves, curves.assign(label="nurse")]))
    with pytest.raises(ValueError, match="threshold 0 has no place"): bias.rate_curves(curves.assign(threshold=0.0))
    drawn = {l.get_label().split(",")[0]: l.get_ydata() for l in bias.rate_curves(curves).lines}
    for group, rows in curves.groupby("group"): assert np.allclose(drawn[group], rows.estimate)

def test_bars_are_sorted_and_equal_the_table():
    table = estimates(7, -0.4, 0.4)
    ax = f.difference_bars(table)
    expected = table.sort_values("estimate", ascending=False)
    assert np.allclose([b.get_width() for b in ax.patches], expected.estimate)
    ends = np.array(ax.collections[0].get_segments())       # (rows, 2, 2)
    assert np.allclose(ends[:, 0, 0], expected.low) and np.allclose(ends[:, 1, 0], expected.high)
    assert [t.get_text().replace("\n", " ") for t in ax.get_yticklabels()] == list(expected.data)
    assert {b.get_hatch() for b, e in zip(ax.patches, expected.estimate) if e < 0} == {"////"}       # not by colour alone
    assert [t.get_text() for t in ax.texts if t.get_text()[0] in "+−"] == [f"{100 * e:+.1f}".replace("-", "−") for e in expected.estimate]

def test_extrapolated_bars_are_open_and_named_and_never_has_no_bar():
    ax = f.efficiency_bars(pd.DataFrame({"data": list("abcd"), "shots": [4.0, 0.5, 90, np.inf], "how": ["interpolated", "extrapolated below", "extrapolated above", "never"]}))
    found = {round(p.get_x() + p.get_width(), 6): p for p in ax.patches}
    assert sorted(found) == [0.5, 4.0, 90.0] and all(p.get_x() == 1 for p in ax.patches)
    assert found[4.0].get_hatch() in (None, "") and found[0.5].get_hatch() == found[90.0].get_hatch() == "////"
    assert to_hex(found[90.0].get_facecolor()) == "#ffffff"
    assert [t.get_text() for t in ax.texts] == ["never reached", "90 (extrapolated)", "4", "0.5 (extrapolated)"]
    with pytest.raises(ValueError, match="row 'a' has 0 shots"): f.efficiency_bars(pd.DataFrame({"data": ["a"], "shots": [0.0], "how": ["interpolated"]}))

def test_zero_shot_is_a_star_left_of_one_shot():
    zero = pd.DataFrame([dict(series="own", estimate=0.47, low=0.4, high=0.55, n=50)])
    ax = f.few_shot_plot(tables(4)[f.few_shot_plot], zero)
    star = next(l for l in ax.lines if l.get_marker() == "*" and len(l.get_xdata()))
    assert star.get_ydata()[0] == 0.47 and star.get_xdata()[0] < 1
    assert any(l.get_linestyle() == "--" and set(l.get_ydata()) == {0.47} for l in ax.lines)
    assert "0" in [t.get_text() for t in ax.get_xticklabels()]
    with pytest.raises(ValueError, match="give zero-shot as zero_shot="): f.few_shot_plot(tables(4)[f.few_shot_plot].assign(shots=0))

def test_series_differ_in_marker_and_line_not_only_in_colour():
    assert len({m for _, m, _ in f.SERIES}) == len({c for c, _, _ in f.SERIES}) == len(f.SERIES)
    assert len({str(s) for _, _, s in f.SERIES[:6]}) == 6

def test_robustness_points_line_and_band():
    models = tables(12)[scrutiny.robustness_scatter]
    baseline = fit_baseline(models, "a shift")
    ax = scrutiny.robustness_scatter(models, baseline)
    drawn = {l.get_label(): l for l in ax.lines}
    assert np.allclose(drawn["robust"].get_ydata(), models.acc_ood[models.kind == "robust"])
    line = drawn["standard models"]
    assert np.allclose(line.get_ydata(), baseline.expected(line.get_xdata())) and line.get_xdata().min() >= models.acc_id.min()
    assert ax.get_xscale() == ax.get_yscale() == "logit" and any("band" in c.get_label() for c in ax.collections)
    assert not any("band" in c.get_label() for c in scrutiny.robustness_scatter(models, BASELINES["imagenetv2"]).collections)
    assert all(0 < float(t.get_text()) < 100 for t in ax.get_xticklabels() if t.get_text())          # per cent, not shares or logits
    ends = scrutiny.robustness_scatter(models.assign(acc_ood=1.0, n_ood=50, n_id=50))
    assert np.allclose([l for l in ends.lines if l.get_label() == "robust"][0].get_ydata(), 1 - 0.5 / 50)

def test_significance_is_a_shape():
    table = tables(6)[scrutiny.overlap_plot]
    markers = {l.get_marker(): l for l in scrutiny.overlap_plot(table).lines}
    assert np.allclose(markers["^"].get_ydata(), table.estimate[table.significant]) and np.allclose(markers["o"].get_xdata(), table.overlap[~table.significant])

def test_counts_are_written_and_coloured_by_row():
    counts = pd.DataFrame([[8, 2], [0, 5]], index=["a", "b"], columns=["a", "b"])
    ax = scrutiny.counts_plot(counts)
    assert sorted(t.get_text() for t in ax.texts) == ["2", "5", "8"]
    assert np.allclose(ax.images[0].get_array(), [[0.8, 0.2], [0, 1]])
    with pytest.raises(ValueError, match="'a' answered as 'b' is 2.5"): scrutiny.counts_plot(counts.astype(float).replace(2, 2.5))
    with pytest.raises(ValueError, match="all counts are 0"): scrutiny.counts_plot(counts * 0)

def test_panel_draws_both_sides_and_the_verdict():
    table = compared(4)
    ax = panel.paper_vs_you(table)
    assert [l.get_xdata()[0] for l in ax.lines if l.get_marker() == "D"] == list(table.published)
    assert np.allclose([l.get_xdata()[0] for l in ax.lines if l.get_marker() == "o" and len(l.get_xdata())], table.yours)
    assert [t.get_text().split("  ") for t in ax.texts] == [[panel.VERDICTS[v][0], v] for v in table.verdict] and "differs" in set(table.verdict)
    assert ax.get_xlabel() == "accuracy (%)"
    class Cells(HTMLParser):
        def __init__(self): super().__init__(); self.cells = []
        def handle_data(self, data): self.cells.append(data)
    (page := Cells()).feed(panel.paper_vs_you_html(table.assign(why="<b> & so")))
    assert page.cells.count("≠ differs") == (table.verdict == "differs").sum() and "<b> & so" in page.cells

@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_files_are_the_same_twice_and_carry_the_sentence(tmp_path, kind):
    for draw, table in list(tables(3).items())[::3]:
        ax = draw(table, width=3.3)
        first, again = (f.save_figure(ax, tmp_path / f"{i}.{kind}").read_bytes() for i in range(2))
        assert first == again == f.save_figure(draw(table, width=3.3), tmp_path / f"2.{kind}").read_bytes(), draw.__name__
        if kind == "svg":
            root = ElementTree.fromstring(first)
            space = "{http://www.w3.org/2000/svg}"
            assert root.find(f"{space}desc").text == ax.alt_text and root.find(f"{space}title").text
            words = " ".join("".join(t.itertext()) for t in root.iter(f"{space}text"))
            assert all(line in words for line in ax.get_xlabel().split("\n")) and "Date" not in first.decode()
        elif kind == "pdf": assert first[:5] == b"%PDF-" and b"/Subject" in first and b"CreationDate" not in first and b"/Type3" not in first
        else:
            with Image.open(tmp_path / "0.png") as picture: assert picture.info["Description"] == ax.alt_text and abs(picture.info["dpi"][0] - 200) < 0.1 and abs(picture.width - 660) <= 1

def test_faults_of_saving(tmp_path):
    ax = f.difference_bars(estimates(2))
    with pytest.raises(ValueError, match="saved as .svg, .pdf or .png, not .jpg"): f.save_figure(ax, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="without a suffix"): f.save_figure(ax, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="make the folder first"): f.save_figure(ax, tmp_path / "no" / "a.svg")
    with pytest.raises(ValueError, match="carries no sentence"): f.save_figure(Figure(), tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []
    text = f.save_figure(ax, tmp_path / "b.svg", alt="less < more & so", title="a < b").read_text()
    root = ElementTree.fromstring(text)
    assert root.find("{http://www.w3.org/2000/svg}desc").text == "less < more & so"

def test_given_axes_are_used_and_colours_survive_the_small_picture():
    left, right = Figure(figsize=(8, 3), layout="constrained").subplots(1, 2)
    assert f.difference_bars(estimates(3), ax=left) is left and scrutiny.recall_curve(tables(5)[scrutiny.recall_curve], ax=right).figure is left.figure
    small = f.shown(left)
    assert small.alt == f"{left.alt_text} {right.alt_text}"
    from io import BytesIO
    colours = {c for _, c in Image.open(BytesIO(small.data)).convert("RGB").getcolors(1 << 20)}
    blue = np.array([0x00, 0x72, 0xB2])
    assert min(np.abs(np.array(c) - blue).max() for c in colours) <= 12

def test_sentences_count_what_the_table_holds():
    table = pd.DataFrame({"data": ["a", "b"], "shots": [3.0, np.inf], "how": ["interpolated", "never"]})
    assert describe("efficiency_bars", table) == "Labelled examples per class that match zero-shot on 2 data sets: from 3 (a) to 3 (a), median inf; 0 extrapolated, 1 never reached."
    assert "none is ever reached" in describe("efficiency_bars", table[1:])
    assert "12.0 % [10.0, 15.0] (chance 1.0 %)" in describe("recall_curve", pd.DataFrame({"direction": ["d"], "k": [1], "estimate": [0.12], "low": [0.1], "high": [0.15], "n": [50], "chance": [0.01]}))
    with pytest.raises(ValueError, match="no figure is called 'pie'"): describe("pie", table)


def test_sentences_count_one_thing_as_one():
    "No figure says '1 labels lean' or '1 data sets'."
    one = pd.DataFrame({"label": ["nanny", "nanny"], "leans": ["woman", "woman"], "group": ["woman", "man"], "estimate": [0.2, 0.1], "low": [0.1, 0.05], "high": [0.3, 0.2], "n": [50, 50]})
    assert "1 label leans to woman" in describe("associated_bars", one)
    two = pd.concat([one, one.assign(label="cook")])
    assert "2 labels lean to woman" in describe("associated_bars", two)
    bars = pd.DataFrame({"data": ["digits"], "estimate": [0.1], "low": [0.05], "high": [0.2], "n": [100]})
    assert "on 1 data set:" in describe("difference_bars", bars) and "of 1 interval lies" in describe("difference_bars", bars)
    counts = pd.DataFrame([[1]], index=["cat"], columns=["cat"])
    assert describe("counts_plot", counts).startswith("1 answer of 1 true class:")

# ------------------------------------------------------------------ set by set
def examples(n, letters=20, classes=6):
    "Answers to `n` questions: right first, right third, right far below, none of the classes, and so on."
    rows = []
    for i in range(n):
        true = (1, 3, 40, None)[i % 4]
        for rank in [*range(1, min(5, classes) + 1), *([40] if true == 40 else [])]:
            rows.append(dict(example=i, data=f"{LONG[i % 4]} {i}", question="which?", classes=1914, rank=rank, classname=f"class {rank} $x_1$", text="a photo of a " + "long " * (letters // 5) + f"{rank}", probability=0.6 / rank, right=rank == true))
    return pd.DataFrame(rows), [Image.new("RGB", (40 + 30 * (i % 2), 64), "grey") for i in range(n)]

@pytest.mark.parametrize("n,columns,width,letters", [(1, 3, 3.3, 5), (1, 1, 9.6, 60), (7, 3, 9.6, 5), (5, 2, 6.4, 200)])
@pytest.mark.filterwarnings("error")
def test_prediction_panels_keep_to_their_cells(n, columns, width, letters):
    table, pictures = examples(n, letters)
    before = table.copy()
    figure = by_set.prediction_panels(table, pictures, columns, "A title", width)
    figure.draw_without_rendering()
    shown, bars = figure.axes[::2], figure.axes[1::2]
    assert len(shown) == len(bars) == n and figure.axes[0].alt_text.endswith(".")
    edges = [min(columns, n) and i * width / min(columns, n) * figure.dpi for i in range(min(columns, n) + 1)]
    for i, ax in enumerate(bars):
        rows, words = table[table.example == i], ax.texts
        assert np.allclose([b.get_width() for b in ax.patches], rows.probability)
        assert sum(t.get_text().startswith("✓") for t in words) == int(rows.right.any()) and sum(t.get_text().startswith("✗") for t in words) == int(not rows.right.iloc[0])
        boxes = [t.get_window_extent() for t in words]
        assert all(edges[i % len(edges[1:])] <= b.x0 and b.x1 <= edges[i % len(edges[1:]) + 1] for b in boxes)
        assert not any(said.overlaps(percent) for said, percent in zip(boxes[::2], boxes[1::2]))
        assert shown[i].get_window_extent().x1 < ax.get_window_extent().x0
    pd.testing.assert_frame_equal(table, before)
    with pytest.raises(ValueError, match=f"{n + 1} pictures for {n} examples"): by_set.prediction_panels(table, [*pictures, pictures[0]])
    for column in TABLES["prediction_panels"]:
        with pytest.raises(ValueError, match=f"no column '{column}'"): by_set.prediction_panels(table.drop(columns=column), pictures)

def test_prediction_panels_tell_each_question():
    table, pictures = examples(4)
    said = by_set.prediction_panels(table, pictures).axes[0].alt_text
    assert "of 4 questions" in said and "is right on 1." in said and "(right)" in said and "has rank 3)" in said and "has rank 40)" in said and "(no class is true)" in said

@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.filterwarnings("error")
def test_score_panels_draw_the_table(n):
    rows = pd.concat([estimates(n).assign(series=s, compute=c) for s in ("probe", "zero-shot") for c in (4.0, 16.0, 60.0)], ignore_index=True).sample(frac=1, random_state=0)
    figure = by_set.score_panels(rows, title="A title")
    figure.draw_without_rendering()
    drawn = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title("left") for ax in drawn] and len(drawn) == n
    for ax, name in zip(drawn, dict.fromkeys(rows.data)):
        for line, series in zip(ax.lines, dict.fromkeys(rows.series)):
            own = rows[(rows.data == name) & (rows.series == series)].sort_values("compute")
            assert np.allclose(line.get_ydata(), own.estimate) and np.allclose(line.get_xdata(), own.compute)
    box, key = figure.get_tightbbox(), figure.legends[0].get_window_extent()
    assert box.x0 >= -0.05 and box.x1 <= 7.25 and not any(key.overlaps(ax.get_tightbbox()) for ax in drawn)
    assert f"on {n} data set" in figure.axes[0].alt_text
    with pytest.raises(ValueError, match="no column 'series'"): by_set.score_panels(rows.drop(columns="series"))
    with pytest.raises(ValueError, match="expected a share between 0 and 1"): by_set.score_panels(rows.assign(estimate=50, low=0.1, high=60))

def test_who_lies_above_the_line_of_standard_models():
    x = np.linspace(0.5, 0.9, 6)
    t = pd.concat([pd.DataFrame(dict(model=[f"{kind} {i}" for i in range(6)], kind=kind, source=x, transfer=0.1 + 0.6 * x + up)) for kind, up in (("labels", 0.002 * np.cos(9 * np.arange(6))), ("words", 0.05))])
    said = by_set.transfer_scatter(t, "labels").alt_text
    assert "slope 0.60" in said and "words +5.0" in said and "labels +" not in said
    assert "line of" not in by_set.transfer_scatter(t).alt_text

@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_figures_of_many_panels_are_saved_with_their_sentence(tmp_path, kind):
    table, pictures = examples(3)
    panels = pd.concat([estimates(3).assign(series="probe", compute=c) for c in (4.0, 16.0)])
    for figure in (by_set.prediction_panels(table, pictures), by_set.score_panels(panels)):
        first, again = (f.save_figure(figure, tmp_path / f"{i}.{kind}").read_bytes() for i in range(2))
        assert first == again
        if kind == "svg": assert ElementTree.fromstring(first).find("{http://www.w3.org/2000/svg}desc").text == figure.axes[0].alt_text
