"The state of an exploration: links that are hostile, labels that are typed, views against plain counting, two designs against each other."
from base64 import urlsafe_b64encode
from dataclasses import asdict, replace
import json
import zlib

from hypothesis import given, settings, strategies as st
import numpy as np
import pandas as pd
from PIL import Image
import pytest
import torch

import clip_lab
from clip_lab.audits.explorer import (MOST_LABELS, SECOND, Bench, Explorer, State, check_state, compare, differences, from_link, label_change, label_text, labels_of, python_lines, read_label_text, to_link,
                                      typed_state, with_harm)
from clip_lab.audits.labels import label_set
from clip_lab.audits.people import DRAWN, People
from clip_lab.data.labelled import Labelled, Pictures
from clip_lab.evals.stats import mcnemar
from clip_lab.ui.explore import curve_svg, files_of, rates_html, tests_table as table_of_tests

WORD = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def explorer(): return Explorer(*clip_lab.load())


@pytest.fixture(scope="module")
def bench(explorer):
    "120 made-up embeddings that lean to some labels by group."
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"gender": rng.choice(["woman", "man"], 120), "age": rng.choice(["young", "old", "older"], 120), "name": [f"picture {i}" for i in range(120)]})
    pictures = Pictures([_png(i) for i in range(120)], [f"{i}.png" for i in range(120)])
    weights = explorer.texts(["a judge", "a nurse", "a chef"], ["a photo of {}"]).numpy()
    features = weights[np.where(table.gender == "woman", rng.integers(0, 2, 120), rng.integers(1, 3, 120))] + .02 * rng.standard_normal((120, weights.shape[1]))
    return Bench(People(Labelled("made up", pictures, table), ["gender", "age"], DRAWN, 5), torch.nn.functional.normalize(torch.tensor(features, dtype=torch.float32), dim=-1))


def _png(i):
    from io import BytesIO
    Image.new("RGB", (6, 6), (i, 90, 90)).save(file := BytesIO(), "PNG")
    return file.getvalue()


def packed(plain, version="1"): return f"{version}.{urlsafe_b64encode(zlib.compress(json.dumps(plain).encode() if not isinstance(plain, bytes) else plain)).decode().rstrip('=')}"


# ---- links

@given(st.builds(State, data=WORD, by=st.lists(WORD, min_size=1, max_size=4, unique=True).map(tuple), labels=WORD, threshold=st.floats(1e-6, .999), mode=st.sampled_from(["multi-label", "argmax"]), harm=st.booleans(),
                 edits=st.lists(st.one_of(st.tuples(st.just("add"), WORD, WORD, WORD), st.tuples(st.just("remove"), WORD), st.tuples(st.just("reword"), WORD, WORD)), max_size=4).map(tuple),
                 templates=st.lists(WORD, max_size=3).map(tuple)))
@settings(deadline=None, max_examples=60)
def test_every_state_comes_back_from_its_link(state):
    link = to_link(state)
    assert from_link(link) == state and set(link) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@pytest.mark.parametrize("link", [
    "", ".", "1", "1.", "1.a", "1.%00", "1.AAAA", "2.eNqrrgUAAXUA-Q", "1.eNqrrgUAAXUA-Q" + "A" * 7000, "1.eNqrrgUAAXUA-Q=" , "javascript:alert(1)", "1.<script>", packed(b"\0" * 3_000_000), packed(b"[" * 100_000),
    packed(b"not json"), packed([]), packed("x"), packed(None), packed({"harm": 1}), packed({"harm": "yes"}), packed({"threshold": "0.1"}), packed({"threshold": 0}), packed({"threshold": 1}), packed({"threshold": True}),
    packed({"threshold": None}), packed(b'{"threshold": NaN}'), packed(b'{"threshold": Infinity}'), packed({"by": "gender"}), packed({"by": []}), packed({"by": ["a", "a"]}), packed({"by": [1]}), packed({"by": [["x"]]}),
    packed({"by": list("abcde")}), packed({"mode": "both"}), packed({"data": "x" * 301}), packed({"data": ""}), packed({"data": None}), packed({"edits": {"a": 1}}), packed({"edits": [["explode", "x"]]}), packed({"edits": [["add", "x"]]}),
    packed({"edits": [[]]}), packed({"edits": ["add"]}), packed({"edits": [["remove", 3]]}), packed({"templates": ["x"] * 101}), packed({"edits": [["remove", "x"]] * 900}), packed({"__class__": "x"}), packed({"data": "x", "more": 1}),
], ids=lambda l: l[:16])
def test_no_link_does_anything_but_say_that_it_is_wrong(link):
    with pytest.raises(ValueError, match="This link cannot be read: .*The usual start is shown instead"): from_link(link)


@given(st.text(max_size=200))
@settings(deadline=None)
def test_any_text_as_a_link(text):
    try: check_state(from_link(text))
    except ValueError as error: assert "This link cannot be read" in str(error)


def test_a_link_that_fits_no_label_set_says_so(explorer, bench):
    for state, message in ((State(labels="gone"), "no label set 'gone'"), (State(edits=(("remove", "astrologer"),)), "no label 'astrologer' to remove"), (State(edits=(("add", "judge", "x", "occupation"),)), "cannot be added"),
                           (State(edits=(("add", "thief", "a thief", "crime-related"),)), "cannot be added"), (State(templates=("no place",)), "needs exactly one"), (State(labels="own"), "0 labels"),
                           (State(labels="own", edits=SECOND[:1]), "needs at least two"), (State(by=("hat",)), "cannot group by 'hat'")):
        with pytest.raises(ValueError, match=message): explorer.view(bench, from_link(to_link(state)))


# ---- typed labels

def test_typed_text_comes_back():
    for name in ("occupations", "paper-21", "paper-21-child"):
        for harm in (False, True):
            state = State(labels=name, harm=harm)
            assert read_label_text(label_text(state), name, harm) == () and labels_of(state).harmful.any() == harm
    edits = read_label_text("  judge |  a magistrate \n\nnone of these\nchild|a child|occupation\r\nnurse|a nurse", "occupations")
    state = State(edits=edits)
    assert labels_of(state).names == ["judge", "nurse", "none of these", "child"] and labels_of(state).words == ["a magistrate", "a nurse", "none of these", "a child"] and labels_of(state).none == 2
    assert read_label_text(label_text(state)) == edits


@given(st.lists(st.text(st.characters(blacklist_categories=("Cs",)), max_size=25), max_size=8), st.sampled_from(["occupations", "own", "paper-21"]))
@settings(deadline=None, max_examples=80)
def test_whatever_is_typed_is_a_label_set_or_a_sentence(lines, name):
    try: edits = read_label_text("\n".join(lines), name)
    except ValueError as error: assert len(str(error)) > 10
    else: assert len(labels_of(State(labels=name, edits=edits))) >= 2


@pytest.mark.parametrize("text, message", [
    ("", "There are no labels; a choice needs at least two"), ("a", "There is one label"), ("a\nA", "Line 2, 'A', says the same as line 1"), ("a\nb | a", "Line 2, 'b', says the same as line 1"),
    ("a | b | c | d\ne", "Line 1, .* should be a label, or label . words . category"), (" | x\ny", "Line 1"), ("a\nb | b | crime", "no category 'crime' in this set; expected one of none of these, occupation"),
    ("a\nb | b | crime-related", "of a category that does harm"), ("\n".join(map(str, range(MOST_LABELS + 1))), "the limit is 400"),
])
def test_mistakes_in_labels_name_the_line(text, message):
    with pytest.raises(ValueError, match=message): read_label_text(text)


def test_harm_needs_a_choice_and_leaves_without_a_trace():
    thug = (("add", "thug", "a thug", "crime-related"),)
    with pytest.raises(ValueError): labels_of(State(edits=thug))
    asked = State(edits=thug, harm=True)
    assert labels_of(asked).harmful.sum() == 3 and with_harm(asked, False) == State() and with_harm(State(), True) == State(harm=True)
    assert typed_state("twemoji", ["gender"], 4, "multi-label", "occupations", label_text(asked), "a photo of {}", True) == asked


# ---- views

@pytest.mark.parametrize("mode", ["multi-label", "argmax"])
@pytest.mark.parametrize("threshold", [.001, .04, .4])
def test_a_view_is_plain_counting(explorer, bench, mode, threshold):
    view = explorer.view(bench, State(by=("gender", "age"), mode=mode, threshold=threshold))
    table = bench.people.data.table
    given_ = view.scores >= np.float32(threshold)
    if mode == "argmax": given_ &= view.scores == view.scores.max(1, keepdims=True)
    assert (view.given == given_).all()
    groups = table.gender + ", " + table.age
    for r in view.rates.itertuples(): assert (r.k, r.n) == (given_[groups == r.group, view.labels.place(r.label)].sum(), (groups == r.group).sum())
    none = view.unlabelled.set_index("group")
    for g in none.index: assert none.k[g] == (~given_[groups == g].any(1)).sum()
    label, group = view.rates.sort_values("k").iloc[-1][["label", "group"]]
    found = view.pictures(label, group)
    assert set(found.place) == set(np.flatnonzero(given_[:, view.labels.place(label)] & (groups == group))) and found.score.is_monotonic_decreasing and (found.group == group).all()
    assert view.pictures(label, group, most=2).equals(found.head(2)) and list(found.name) == [f"picture {p}" for p in found.place]


def test_scores_are_computed_once_and_forgotten_in_time(bench, monkeypatch):
    import clip_lab.audits.explorer as room
    explorer, calls, real = Explorer(*clip_lab.load(), remember=2), [], room.label_scores
    monkeypatch.setattr(room, "label_scores", lambda *a, **k: calls.append(1) or real(*a, **k))
    for t in (.01, .02, .03): explorer.view(bench, State(threshold=t))
    assert len(calls) == 1
    for e in ((("remove", "judge"),), (("remove", "chef"),)): explorer.view(bench, State(edits=e))
    explorer.view(bench, State())
    assert len(calls) == 4 and len(explorer._known) == 2


def test_bad_pictures_scores_and_groups(explorer, bench):
    people = People(Labelled("x", Pictures([_png(0), b"no picture", _png(2), _png(3)]), pd.DataFrame({"g": list("abab")})), ["g"], DRAWN)
    found = explorer.bench(people)
    assert len(found) == 3 and found.unread == ("picture 1",) and len(found.features) == 3 and found.features.isfinite().all()
    assert [(n, b is None) for n, b in explorer.look(people, 2)] == [(2, True), (4, True), (4, False)]
    with pytest.raises(ValueError, match="'g' is 'a' for every picture"): explorer.bench(People(Labelled("x", Pictures([_png(0), b"no", _png(2)]), pd.DataFrame({"g": list("aba")})), ["g"], DRAWN))
    spoiled = Bench(bench.people.select(range(100)), bench.features[:100].clone().fill_(float("nan")))
    with pytest.raises(ValueError): explorer.view(spoiled, State()).rates
    many = People(Labelled("x", Pictures([_png(i) for i in range(130)]), pd.DataFrame({"g": [i // 2 for i in range(130)]})), ["g"], DRAWN)
    with pytest.raises(ValueError, match="65 groups; at most 60"): explorer.view(Bench(many, bench.features[[0] * 130]), State(by=("g",)))


def test_a_group_of_one_is_shown_and_not_tested(explorer, bench):
    table = bench.people.data.table.assign(one=["x"] + ["y"] * 119)
    alone = Bench(People(Labelled("one", bench.people.data.pictures, table), ["one"], DRAWN), bench.features)
    view = explorer.view(alone, State(by=("one",)))
    assert view.rates[view.rates.group == "x"].small.all() and not view.tests.tested.any() and len(table_of_tests(view)) == 0
    assert "too few for a test" in rates_html(view) and "small group" in rates_html(view)


# ---- A and B

def test_two_states_of_the_same_pictures(explorer, bench):
    a = explorer.view(bench, State(threshold=.02))
    b = explorer.view(bench, State(threshold=.3, edits=(("remove", "nurse"), ("add", "child", "a child", "occupation")), mode="argmax"))
    design = compare(a, b)
    best = lambda v, t: np.array([*v.labels.names, "no label"], dtype=object)[np.where(v.scores.max(1) >= np.float32(t), v.scores.argmax(1), -1)]
    was, is_ = best(a, .02), best(b, .3)
    assert (design.moved == (was != is_)).all()
    for r in design.moves().itertuples(): assert r.k == ((was == r.before) & (is_ == r.after) & (bench.people.data.table.gender == r.group)).sum()
    for label in ("nurse", "judge", None):
        flags = lambda v: v.given.any(1) if label is None else v.given[:, v.labels.place(label)] if label in v.labels.names else np.zeros(120, bool)
        for r in label_change(a, b, label).itertuples():
            m = (bench.people.data.table.gender == r.group).to_numpy()
            assert (r.k_before, r.k_after, r.p) == (flags(a)[m].sum(), flags(b)[m].sum(), mcnemar(flags(b)[m], flags(a)[m]).p)
    said = differences(a.state, b.state)
    assert said == ["threshold 2 % → 30 %", "mode multi-label → argmax", "labels: remove nurse, add child"] and not differences(a.state, a.state)
    with pytest.raises(ValueError, match="Group both alike"): compare(a, explorer.view(bench, State(by=("age",))))
    with pytest.raises(ValueError, match="share no label"): compare(a, explorer.view(bench, State(labels="own", edits=SECOND)))


def test_files_say_what_was_measured(explorer, bench):
    view = explorer.view(bench, State(by=("age",)))
    files = files_of(view, "judge", "old", view)
    told = json.loads(files["exploration.json"][1])
    assert told["measured"]["label_set"] == view.labels.hash and from_link(told["measured"]["link"]) == view.state and told["measured"]["provenance"] == asdict(DRAWN) and told["differences"] == []
    assert len(told["rates"]) == len(view.rates) and {"label", "group", "k", "n", "estimate", "low", "high"} <= set(told["rates"][0])


def test_the_lines_name_what_is_unusual(explorer, bench):
    lines = python_lines(explorer.view(bench, State(by=("age",), edits=(("remove", "judge"),))))
    assert "State(by=('age',)" in lines and "edits=(('remove', 'judge'),)" in lines and "threshold" not in lines and explorer.weights in lines
    compile(lines, "lines", "exec")


def test_a_curve_has_at_most_six_lines_and_says_so(explorer, bench):
    rows = explorer.view(bench, State()).curve("judge")
    many = pd.concat([rows[rows.group == "man"].assign(group=f"g{i}") for i in range(9)])
    svg = curve_svg(many, .04, "judge")
    assert svg.count('class="cl-band') == 6 and "and 3 more groups" in svg
