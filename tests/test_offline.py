"""The sets that are always at hand: their answers by other means than the code that made them, their splits, and the model card's rows from them."""

import hashlib
import re
import sys
from importlib import resources

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from clip_lab.data import emoji, made, offline

HERE = [name for name in offline.SETS if name != "stamps"]


@pytest.fixture(scope="module")
def sets():
    pytest.importorskip("skimage", exc_type=ImportError)
    return {name: offline.load(name) for name in HERE}


def pieces(picture: Image.Image, far: int = 0) -> np.ndarray:
    "Boxes (height, width) of the connected pieces that differ by more than `far` from the commonest colour."
    pixels = np.asarray(picture).astype(int)
    packed, often = np.unique(pixels @ [65536, 256, 1], return_counts=True)
    ground = packed[often.argmax()] >> np.array([16, 8, 0]) & 255
    differs = np.abs(pixels - ground).max(-1) > far
    boxes = ndimage.find_objects(ndimage.label(differs, np.ones((3, 3)))[0])
    return np.array([[rows.stop - rows.start, columns.stop - columns.start] for rows, columns in boxes])


# ------------------------------------------------------------------ pictures say what their label says
def test_scenes_hold_as_many_things_as_they_say(sets):
    data = sets["counting"].data
    plain = data.select((data.table.ground == "plain") & (data.table.split == "test"))
    found = [len(pieces(p)) for p in plain.pictures]
    assert found == plain.table["count"].tolist() and set(found) == set(range(3, 11))
    asked = sets["counting"].target("count")
    assert [asked.classnames[i] for i in asked.labels[:2]] == ["three objects"] * 2 and asked.classnames[-1] == "ten objects"


def test_textured_scenes_have_their_things_too(sets):
    "The same things on the mottled ground: shapes are darker than any ground."
    data = sets["counting"].data
    textured = data.select((data.table.ground == "textured") & (data.table.kind == "shapes") & (data.table.split == "test"))
    assert np.mean([ndimage.label(np.asarray(p).min(-1) < 115, np.ones((3, 3)))[1] for p in textured.pictures] == textured.table["count"]) > 0.95


def test_words_have_as_many_letters_as_they_say(sets):
    "Upright-ish thin words fall into one piece a letter, and i and j have a dot."
    data = sets["rendered-words"].data
    upright = data.select((data.table.tilt.abs() < 4) & ~data.table.bold & (data.table["size"] > 34))
    expected = [len(w) + w.count("i") + w.count("j") for w in upright.table.word]
    found = [len(pieces(p, far=100)) for p in upright.pictures]
    assert len(found) > 50 and np.mean(np.array(found) == expected) > 0.85


@pytest.mark.parametrize("name", ["rendered-words", "rendered-sentiment", "counting"])
def test_nothing_is_cut_off_at_the_border(sets, name):
    for picture in sets[name].data.pictures[::7]:
        pixels = np.asarray(picture)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert len(np.unique(edge, axis=0)) == 1 or (name == "counting" and edge.min() > 100)     # mottled grounds vary, but are light


def test_sentences_fit_and_stand_on_lines(sets):
    data = sets["rendered-sentiment"].data
    for picture, sentence in zip(data.pictures[::50], data.table.sentence[::50]):
        ink = pieces(picture, far=100)
        assert 0.5 < len(ink) / len(re.sub(r"\s", "", sentence)) < 1.3


def test_opinions_by_hand(sets):
    table = sets["rendered-sentiment"].data.table.set_index("sentence")
    for text, truth in (("anything but dull", "positive"), ("anything but superb", "negative"), ("simply awful", "negative"), ("simply witty", "positive"), ("far from bland", "positive")):
        found = table[table.index.str.contains(text)]
        assert len(found) == 1 and found.sentiment.iloc[0] == truth, text
    assert not set(made.POSITIVE) & set(made.NEGATIVE) and len(set(made.POSITIVE)) == len(set(made.NEGATIVE)) == 40


def test_digits_are_scikit_learns(sets):
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score
    digits, truth = sets["digits"], load_digits()
    assert digits.target().labels.tolist() == truth.target.tolist()
    small = np.stack([np.asarray(p.convert("L").reduce(8)).ravel() for p in digits.data.pictures])
    same = [np.corrcoef(a, b)[0, 1] for a, b in zip(small, truth.data)]
    assert min(same) > 0.97                                           # enlarging and reducing keeps the digit
    train, test = (digits.target().splits[s] for s in ("train", "test"))
    answers = LogisticRegression(max_iter=300).fit(truth.data[train] / 16, truth.target[train]).predict(small[test] / 255)
    assert accuracy_score(truth.target[test], answers) > 0.9          # ink is light, as in the original


# ------------------------------------------------------------------ splits
def test_splits_do_not_meet_and_miss_no_class(sets):
    for name, s in sets.items():
        for question, t in s.targets.items():
            places = np.concatenate(list(t.splits.values()))
            assert len(places) == len(set(places.tolist())), (name, question)
            for mask in t.subsets.values(): assert set(np.flatnonzero(mask)) <= set(t.splits["test"].tolist()), (name, question)
            if "train" in t.splits:
                assert list(t.splits) == ["train", "validation", "test"]
                assert set(t.labels[t.splits["train"]]) == set(t.labels[t.splits["test"]]) == set(range(len(t.classnames))), (name, question)


@pytest.mark.parametrize("name, question, column", [("rendered-words", "first letter", "word"), ("rendered-sentiment", "sentiment", "word"), ("rendered-sentiment", "sentiment", "sentence"),
                                                    ("emoji-noto", "group (probe)", "base"), ("emoji-fluent", "subgroup (probe)", "base")])
def test_nothing_to_learn_by_heart_is_in_two_splits(sets, name, question, column):
    parts = [set(sets[name].split(split, question)[0].table[column]) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts))


def test_emoji_in_scenes_are_in_one_split(sets):
    table = sets["counting"].data.table
    owners = table[table.kind == "emoji"].explode("names").groupby("names").split.unique()
    assert owners.map(len).eq(1).all() and len(owners) == len(made.THINGS)


def test_a_thing_has_the_same_split_in_every_style(sets):
    seen = {}
    for name in (n for n in sets if n.startswith("emoji")):
        t = sets[name].target("group (probe)")
        for split, places in t.splits.items():
            for base in sets[name].data.table.base.iloc[places]: assert seen.setdefault(base, split) == split
    assert seen == offline.thing_splits().to_dict() and len(seen) == 1914


def test_things_are_dealt_by_their_hash():
    "The rule of the page, written once more from the words."
    things = emoji.concepts().drop_duplicates("base")
    for subgroup in ("fruit", "lock", "amphibian"):
        bases = things.base[things.subgroup == subgroup] if subgroup in set(things.subgroup) else []
        ordered = sorted(bases, key=lambda base: hashlib.sha256(f"clip_lab-probe-1 {base}".encode()).hexdigest())
        assert offline.thing_splits()[ordered].tolist() == (["train", "test", "train", "test", "validation", "test", "train", "test", "train", "test"] * 20)[:len(ordered)]


def test_no_picture_is_in_training_and_test(sets):
    "Not even as a copy under another name, but for the emoji, whose twins are listed in the datasheet."
    for name in ("digits", "rendered-words", "rendered-sentiment", "counting"):
        s = sets[name]
        assert len(set(s.data.pictures.sources)) == len(s.data), name


def test_flags_and_tones_by_name(sets):
    for name in ("emoji-noto", "emoji-openmoji-black"):
        s = sets[name]
        flag, tone, names = s.target("flag"), s.target("tone"), s.data.table["name"]
        assert all(names[i] == f"flag: {flag.classnames[flag.labels[i]]}" for i in flag.splits["test"])
        assert all(tone.classnames[tone.labels[i]] in names[i] for i in tone.splits["test"])
        assert not names[flag.labels < 0].str.startswith("flag: ").any()
        assert names[tone.labels < 0].str.count("skin tone").isin([0, 2]).all()
        twins = s.data.pictures.sources
        alone = np.flatnonzero(flag.subsets["no twin"])
        assert all(twins.count(twins[i]) == 1 for i in alone)


def test_retrieval_is_unambiguous(sets):
    for name in (n for n in sets if n.startswith("emoji")):
        s = sets[name]
        kept = [i for i, captions in enumerate(s.captions) if captions]
        names = [s.captions[i][0] for i in kept]
        assert len(set(names)) == len(names) and len({s.data.pictures.encoded(i) for i in kept}) == len(kept) > 1500
        assert names == s.data.table["name"].iloc[kept].tolist()


def test_shifts_have_the_classes_of_their_start(sets):
    for name, s in sets.items():
        if s.shift_of is None: continue
        start = sets[s.shift_of]
        assert set(s.targets) == set(start.targets) and s.role != "train" == start.role
        assert all(t.classnames == start.target(q).classnames for q, t in s.targets.items())
    assert [n for n, s in sets.items() if s.shift_of] == ["emoji-twemoji", "emoji-openmoji-black"]


# ------------------------------------------------------------------ the same again
def test_made_twice_is_made_the_same():
    first = made.counting().data_hash, made.words().data_hash, made.sentences().data_hash
    for cache in (made._scenes, made._words, made._opinions, made._shape, made._emoji, made._font): cache.cache_clear()
    assert (made.counting().data_hash, made.words().data_hash, made.sentences().data_hash) == first
    assert made.counting(seed=1).data_hash != first[0]


def test_tables_are_copies():
    table = made.words().table
    table.loc[:, "word"] = "spoiled"
    assert made.words().table.word[0] == "almond"


# ------------------------------------------------------------------ the list
def test_every_set_has_its_line_in_the_datasheet():
    text = (resources.files("clip_lab") / "assets" / "DATASHEET.md").read_text("utf-8")
    lines = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text, re.M))
    assert lines == {name: spec.line for name, spec in offline.SETS.items()}


def test_what_a_set_says_about_itself(sets):
    assert offline.catalogue().name.tolist() == list(offline.SETS)
    for name, s in sets.items():
        spec = offline.SETS[name]
        assert s.name == s.data.name == name and s.target(spec.default) is not None
        assert {"title", "source", "licence", "datasheet"} <= set(s.facts) and all(s.facts[k] for k in ("title", "source", "licence", "datasheet"))
    with pytest.raises(ValueError, match="no offline set 'mnist'; expected one of .*digits"): offline.load("mnist")


def test_photographs_are_files_of_scikit_image(sets):
    s = sets["photographs"]
    assert len(s.data) == len(offline.PHOTOGRAPHS) and all(len(c) == 1 for c in s.captions)
    assert len({c for (c,) in s.captions}) == len(s.data) and s.data.table.licence.str.len().gt(3).all()
    for picture in s.data.pictures: assert picture.mode == "RGB" and min(picture.size) > 90


def test_missing_extras_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"clip_lab\[photographs\]"): offline.load("photographs")
    monkeypatch.setenv("CLIP_LAB_STAMPS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="tuxpaint-stamps-default"): offline.load("stamps")


def test_stamps_where_they_are(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    for name, sentence in (("animals/frog", "A frog."), ("animals/cat", "A cat."), ("food/tomato", "A cat."), ("food/pear", "A pear.")):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(sentence + "\n", "utf-8")
    monkeypatch.setenv("CLIP_LAB_STAMPS", str(tmp_path))
    s = offline.load("stamps")
    t = s.target("caption")
    assert [t.classnames[i] for i in t.labels] == s.data.table.caption.tolist() and s.target("folder").classnames == ["animals", "food"]
    assert sorted(c for captions in s.captions for c in captions) == ["A frog.", "A pear."]      # "A cat." belongs to two pictures
