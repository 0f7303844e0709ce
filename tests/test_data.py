"""The shipped data and the rooms that read them: counts, splits, hashes, and what bad input is told."""
import hashlib
import io
import json
import pickle
import subprocess
import sys
import unicodedata
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clip_lab.data import clipart, emoji, labelled, stamps
from clip_lab.images import ImageError

ASSETS = resources.files("clip_lab") / "assets"
MANIFEST = json.loads((ASSETS / "manifest.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def concepts():
    return emoji.concepts()


def stored_files():
    yield "emoji/concepts.parquet", MANIFEST["emoji"]["concepts"]
    yield "clipart.parquet", MANIFEST["clipart"]
    for style, part in MANIFEST["emoji"]["styles"].items():
        yield f"emoji/{style}.parquet", part


@pytest.mark.parametrize("name, part", list(stored_files()), ids=lambda v: v if isinstance(v, str) else "")
def test_files_are_those_of_the_manifest(name, part):
    content = (ASSETS / name).read_bytes()
    assert len(content) == part["bytes"] and hashlib.sha256(content).hexdigest() == part["sha256"]


def test_the_data_stay_small():
    emoji_bytes = sum(part["bytes"] for name, part in stored_files() if name.startswith("emoji"))
    assert emoji_bytes <= 24e6 and MANIFEST["clipart"]["bytes"] <= 11e6


def test_concepts(concepts):
    assert (len(concepts), concepts.base.nunique(), concepts.subgroup.nunique(), concepts.group.nunique()) == (3944, 1914, 98, 9)
    assert concepts.concept.is_unique and concepts.name.is_unique and set(concepts.base) <= set(concepts.concept)
    plain = lambda codes: [c for c in codes if c != 0xFE0F]        # the invisible "draw me in colour" is optional
    assert all(plain(map(ord, e)) == plain(int(h, 16) for h in c.split("-")) for e, c in zip(concepts.emoji, concepts.concept))
    assert concepts.tags.map(len).min() > 0
    assert set(concepts.gender) == {"", "man", "woman"} and set(concepts.split) == {"train", "heldout"}


def test_tones_agree_with_the_unicode_standard(concepts):
    """The modifiers in the character itself, named by Python's own tables, against the column."""
    names = {"FITZPATRICK TYPE-1-2": "light", "FITZPATRICK TYPE-3": "medium-light", "FITZPATRICK TYPE-4": "medium", "FITZPATRICK TYPE-5": "medium-dark", "FITZPATRICK TYPE-6": "dark"}
    for row in concepts.itertuples():
        found = [names[unicodedata.name(c).removeprefix("EMOJI MODIFIER ")] for c in row.emoji if "FITZPATRICK" in unicodedata.name(c, "")]
        assert ", ".join(dict.fromkeys(found)) == row.tone, row.name      # a couple of one tone has one tone
        assert (row.concept == row.base) == (row.tone == ""), row.name


def test_held_out_concepts_follow_the_documented_rule(concepts):
    order = sorted(concepts.concept, key=lambda code: hashlib.sha256(("clip_lab-heldout-1" + code).encode()).hexdigest())
    held_out, train = (concepts[concepts.split == s] for s in ("heldout", "train"))
    assert set(held_out.concept) == set(order[:300]) and not set(held_out.concept) & set(train.concept)
    assert held_out.base_seen.tolist() == held_out.base.isin(set(train.base)).tolist() and train.base_seen.all()
    assert held_out.base_seen.sum() == 189


@pytest.mark.parametrize("style", emoji.STYLES)
def test_styles_agree_on_concepts(style, concepts):
    data, part = emoji.load(style), MANIFEST["emoji"]["styles"][style]
    order = {code: i for i, code in enumerate(concepts.concept)}
    places = data.table.concept.map(order)
    assert places.is_monotonic_increasing and places.is_unique and places.notna().all()
    assert set(concepts.concept) - set(data.table.concept) == set(part["missing"])
    both = data.table.drop(columns="twins")
    pd.testing.assert_frame_equal(both, concepts.iloc[places].reset_index(drop=True), check_dtype=False)
    pictures = [data.pictures[i] for i in range(0, len(data), 97)]
    assert all(p.size == (64, 64) and p.mode == "RGB" for p in pictures)
    assert emoji.load(style, background=None).pictures[0].mode == "RGBA"


def test_pictures_show_their_concept():
    """The same thing by other studios: a red heart is red, a green apple is green, in every coloured style."""
    for style in ("noto", "openmoji", "fluent", "twemoji"):
        data = emoji.load(style)
        for name, channel in (("red heart", 0), ("green apple", 1), ("blue heart", 2), ("red apple", 0), ("frog", 1)):
            pixels = np.asarray(data.pictures[data.table.index[data.table.name == name][0]]).reshape(-1, 3).astype(float)
            coloured = pixels[np.ptp(pixels, axis=1) > 60]
            assert coloured.mean(0).argmax() == channel, (style, name)


def test_twins_are_counted():
    black = emoji.load("openmoji-black").table
    assert (black[black.group == "flags"].twins == 258).sum() == 259
    assert (black[black.base == "1F44B"].twins >= 5).all()        # the waving hand and its five tones are one line drawing
    assert emoji.load("fluent").table.twins.sum() == 2


@pytest.mark.parametrize("target, n", [("concept", 3944), ("base", 1914), ("subgroup", 98), ("group", 9)])
def test_tasks_share_their_classes(target, n):
    tasks = {style: emoji.task(style, target) for style in emoji.STYLES}
    names = {tuple(classnames) for _, _, classnames in tasks.values()}
    assert len(names) == 1 and len(set(names.pop())) == n
    for data, labels, classnames in tasks.values():
        assert labels.dtype == np.int64 and len(labels) == len(data) and labels.min() >= 0
        assert [classnames[k] for k in labels] == data.table[emoji.TARGETS[target]].tolist()


def test_a_changed_table_changes_nobody_elses():
    for table in (emoji.concepts(), emoji.load("noto").table):
        table["name"] = "x"
    assert emoji.concepts().name[0] == emoji.load("noto").table.name[0] == "grinning face"


def test_data_hash_is_stable_and_sensitive():
    small = emoji.load("twemoji").select(range(20))
    assert small.data_hash == emoji.load("twemoji").select(range(20)).data_hash
    assert small.data_hash == "697280263a166ca08c43e5f946bf19ea7cbb6a8d0641f02dc789be63ac9fc946"
    others = [emoji.load("noto").select(range(20)), emoji.load("twemoji", background="black").select(range(20)), small.select(range(19, -1, -1)),
              labelled.Labelled("x", small.pictures, small.table.assign(group="x"))]
    assert len({small.data_hash, *(o.data_hash for o in others)}) == 5


def test_pictures_survive_a_trip_to_a_worker():
    pictures = emoji.load("noto").pictures[:3]
    again = pickle.loads(pickle.dumps(pictures))
    assert [np.array_equal(a, b) for a, b in zip(pictures, again)] == [True] * 3


def test_broken_bytes_name_the_picture():
    data = emoji.load("noto").select([5])
    cut = labelled.Pictures([data.pictures.encoded(0)[:200]], data.pictures.names)
    with pytest.raises(ImageError, match=r"noto/1F605.webp"):
        cut[0]


@pytest.mark.parametrize("call, message", [
    (lambda: emoji.load("apple"), "no emoji style 'apple'; expected one of noto, openmoji, fluent"),
    (lambda: emoji.task("apple", "group"), "no emoji style 'apple'"),
    (lambda: emoji.task("noto", "colour"), "no emoji task 'colour'; expected one of concept, base, group, subgroup"),
    (lambda: labelled.Labelled("mine", labelled.Pictures([b"x"]), pd.DataFrame({"a": [1, 2]})), "mine: 1 pictures but 2 rows"),
    (lambda: emoji.load("noto").select([True]), "noto: a mask of 1 for 3781"),
    (lambda: emoji.load("noto").select([0.5]), "noto: cannot select by float64"),
    (lambda: labelled.Pictures([b"x"], []), "0 names for 1 pictures"),
])
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_broken_parquet_files_are_named(tmp_path):
    (tmp_path / "cut.parquet").write_bytes((ASSETS / "emoji/concepts.parquet").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.parquet is not a readable Parquet file"):
        labelled.read_parquet(tmp_path / "cut.parquet")
    with pytest.raises(ValueError, match="expected one named 'image'"):
        labelled.read_parquet(ASSETS / "emoji/concepts.parquet")
    with pytest.raises(FileNotFoundError, match="tools/build_data.py"):
        labelled.read_parquet(tmp_path / "none.parquet")


def test_clipart():
    art = clipart.load()
    dropped = dict(MANIFEST["clipart"]["dropped"])
    assert len(art) == dropped.pop("found") - sum(dropped.values()) == MANIFEST["clipart"]["rows"]
    assert art.table.id.is_unique and art.table.captions.map(len).min() > 0
    texts = [t for captions in art.table.captions for t in captions]
    assert all(t == t.strip() for t in texts) and all(captions[0] == captions[0].lower() for captions in art.table.captions)
    assert not [t for t in texts if "@" in t or "http" in t or "hash(0x" in t]
    assert len({hashlib.sha256(p.tobytes()).digest() for p in art.pictures.take(range(0, len(art), 50))}) == len(range(0, len(art), 50))


def test_datasheet_and_licences_match_the_data():
    datasheet = (ASSETS / "DATASHEET.md").read_text("utf-8")
    for style, part in MANIFEST["emoji"]["styles"].items():
        table = emoji.load(style).table
        cells = f"| {style} | ", f"| {part['rows']:,} | {len(part['missing'])} | {(table.split == 'heldout').sum()} | {(table.twins > 0).sum():,} | {part['bytes'] / 1e6:.1f} |"
        assert any(line.startswith(cells[0]) and line.endswith(cells[1]) for line in datasheet.splitlines()), style
    for number in MANIFEST["clipart"]["dropped"].values():
        assert f"{number:,}" in datasheet
    licences = Path(__file__).parents[1].joinpath("LICENSE-DATA").read_text("utf-8")
    for style, facts in emoji.STYLES.items():
        assert f"emoji/{style}.parquet" in licences and facts.package in licences


def test_importing_clip_lab_leaves_arrow_alone():
    code = "import sys, clip_lab; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------ stamps, on a folder made here: the real ones need not be installed

@pytest.fixture
def stamp_folder(tmp_path):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (40, 30, 4), dtype=np.uint8) | np.array([0, 0, 0, 255], np.uint8))
    drawing = Image.new("RGBA", (40, 30), "red")
    stamps_made = {"animals/frog": photo, "animals/cartoon/cat": photo, "food/apple": drawing, "vehicles/bus": photo, "vehicles/bus_mirror": photo}
    for name, picture in stamps_made.items():
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        path.with_suffix(".txt").write_text(f"A {path.stem}.\nfr.utf8=Un {path.stem}.\n" if "bus" not in name else "A bus.\n", "utf-8")
    return tmp_path


def test_stamps_by_rule(stamp_folder, monkeypatch):
    assert stamps.load(stamp_folder).table.id.tolist() == ["animals/frog", "vehicles/bus"]
    assert stamps.load(stamp_folder, photographs=False).table.id.tolist() == ["animals/cartoon/cat", "animals/frog", "food/apple", "vehicles/bus"]
    monkeypatch.setenv("CLIP_LAB_STAMPS", str(stamp_folder))
    french = stamps.load(language="fr")
    assert french.table.caption.tolist() == ["Un frog."] and french.table.attrs["without_caption"] == 1
    (stamp_folder / "animals/frog.svg").write_text("<svg/>")
    assert stamps.load().table.id.tolist() == ["vehicles/bus"]


def test_stamp_messages(stamp_folder, tmp_path_factory, monkeypatch):
    monkeypatch.delenv("CLIP_LAB_STAMPS", raising=False)
    for root in ("/nowhere", tmp_path_factory.mktemp("empty")):
        with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
            stamps.load(root)
    with pytest.raises(ValueError, match="no stamp has a caption in 'xx'; expected one of en, fr"):
        stamps.load(stamp_folder, language="xx")
    (stamp_folder / "animals/frog.txt").write_text("A frog.\nno equals sign\n")
    with pytest.raises(ValueError, match="frog.txt, line 2"):
        stamps.load(stamp_folder)
    (stamp_folder / "animals/frog.txt").write_text("A frog.\n")
    (stamp_folder / "animals/frog.png").write_bytes(b"\x89PNG")
    with pytest.raises(ImageError, match="frog.png"):
        stamps.load(stamp_folder)


@pytest.mark.skipif(not stamps.ROOT.is_dir(), reason="needs `apt-get install tuxpaint-stamps-default`")
def test_installed_stamps():
    data = stamps.load()
    assert 250 < len(data) < 450 and data.table.photograph.all() and data.table.classname.nunique() > 10
    assert data.table.set_index("id").caption["animals/amphibians/frog"] == "A frog."
    drawn = stamps.load(photographs=False).select(range(0, 700, 50))
    assert io.BytesIO(drawn.pictures.encoded(0)).read(4) == b"\x89PNG"
