"""Build the pictures and captions that clip_lab ships, from the studios' own packages.

    pip install -e ".[build]"                  # adds resvg-py; npm comes with Node.js
    sudo apt-get install openclipart-png openclipart-svg
    python tools/build_data.py --work build/   # about ten minutes on two cores

`--work` is where the npm archives are kept: an archive that is already there is used, a missing one is fetched with
`npm pack`. Every archive is checked against the sha512 written below. The result goes to `clip_lab/assets`:

    emoji/concepts.parquet      one row per concept: names, tags, groups, skin tone, gender, split
    emoji/{style}.parquet       one row per picture of one studio, 64 x 64 RGBA as WebP
    clipart.parquet             one row per drawing: its captions as found, and the picture
    manifest.json               sources, counts, what is missing and why, sha256 of every file

The same inputs and the same versions of Pillow, pyarrow and resvg-py (they are in the manifest) give the same bytes.
"""
from __future__ import annotations

import argparse
import base64
import hashlib
import html
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image
from tqdm import tqdm

SIZE = 64  # pixels, both sides, every picture
QUALITY = 87  # of the WebP's colours: about 33 dB on white, where halved chroma, not quantisation, is what remains
ALPHA_QUALITY = 60  # of its transparency, 42 dB on white: lossless edges would make the package a third larger
HELD_OUT = 300  # concepts whose captions no training run may see
HELD_OUT_SALT = "clip_lab-heldout-1"
LEFT_OUT_GROUPS = ("extras-openmoji", "extras-unicode", "component")  # OpenMoji's own additions, and lone modifiers


# ------------------------------------------------------------------------------------------------ sources

@dataclass(frozen=True)
class Package:
    """One npm package, pinned: `sha512` is the registry's integrity value of its archive."""
    name: str
    version: str
    sha512: str

    @property
    def archive(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"  # the file name `npm pack` gives it


PACKAGES = {
    "noto": Package("emoji-datasource-google", "16.0.0", "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="),
    "twemoji": Package("emoji-datasource-twitter", "16.0.0", "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="),
    "openmoji": Package("openmoji", "17.0.0", "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w=="),
    "fluent": Package("@lobehub/fluent-emoji-3d", "1.1.0", "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="),
    "emojibase": Package("emojibase-data", "17.0.0", "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA=="),
}

# Where each style's pictures lie inside which package.
STYLE_FOLDERS = {
    "noto": ("noto", "img/google/64", ".png"),
    "openmoji": ("openmoji", "color/svg", ".svg"),
    "fluent": ("fluent", "assets", ".webp"),
    "twemoji": ("twemoji", "img/twitter/64", ".png"),
    "openmoji-black": ("openmoji", "black/svg", ".svg"),
}


def fetch(package: Package, work: Path) -> Path:
    """The unpacked folder of an npm package, fetched into `work` when it is not there yet, and checked."""
    archive = work / package.archive
    if not archive.exists():
        if shutil.which("npm") is None:
            raise FileNotFoundError(f"{archive} is missing and there is no `npm` to fetch it with: install Node.js, or put the archive there")
        subprocess.run(["npm", "pack", f"{package.name}@{package.version}", "--silent"], cwd=work, check=True, stdout=subprocess.DEVNULL)
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise ValueError(f"{archive}: sha512 is {found}, expected {package.sha512}: delete the file and run again")
    folder = work / package.archive.removesuffix(".tgz")
    if not (folder / "package" / "package.json").exists():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package"


# ------------------------------------------------------------------------------------------------ concepts

TONES = {"1": "light", "2": "medium-light", "3": "medium", "4": "medium-dark", "5": "dark"}
GROUPS = {
    "smileys-emotion": "smileys & emotion", "people-body": "people & body", "animals-nature": "animals & nature",
    "food-drink": "food & drink", "travel-places": "travel & places", "activities": "activities",
    "objects": "objects", "symbols": "symbols", "flags": "flags",
}
# Unicode's subgroup keys as words that stand on their own in a prompt ("a picture of a mammal").
SUBGROUPS = {
    "face-smiling": "smiling face", "face-affection": "affectionate face", "face-tongue": "face with tongue", "face-hand": "face with hand",
    "face-neutral-skeptical": "neutral or skeptical face", "face-sleepy": "sleepy face", "face-unwell": "unwell face", "face-hat": "face with hat",
    "face-glasses": "face with glasses", "face-concerned": "concerned face", "face-negative": "angry face", "face-costume": "costume face",
    "cat-face": "cat face", "monkey-face": "monkey face", "heart": "heart", "emotion": "emotion symbol",
    "hand-fingers-open": "open hand", "hand-fingers-partial": "hand with some fingers raised", "hand-single-finger": "pointing hand",
    "hand-fingers-closed": "fist", "hands": "two hands", "hand-prop": "hand holding something", "body-parts": "body part", "person": "person",
    "person-gesture": "person gesturing", "person-role": "person with a job", "person-fantasy": "fantasy character", "person-activity": "person moving",
    "person-sport": "person doing sport", "person-resting": "person resting", "family": "couple or family", "person-symbol": "person symbol",
    "animal-mammal": "mammal", "animal-bird": "bird", "animal-amphibian": "amphibian", "animal-reptile": "reptile", "animal-marine": "sea animal",
    "animal-bug": "insect", "plant-flower": "flower", "plant-other": "plant",
    "food-fruit": "fruit", "food-vegetable": "vegetable", "food-prepared": "prepared food", "food-asian": "asian food", "food-sweet": "sweet",
    "drink": "drink", "dishware": "dishware",
    "place-map": "map", "place-geographic": "landscape", "place-building": "building", "place-religious": "religious building", "place-other": "place",
    "transport-ground": "land vehicle", "transport-water": "ship or boat", "transport-air": "aircraft", "hotel": "hotel", "time": "clock",
    "sky-weather": "sky and weather",
    "event": "celebration", "award-medal": "award", "sport": "sport", "game": "game", "arts-crafts": "arts and crafts",
    "clothing": "clothing", "sound": "sound", "music": "music", "musical-instrument": "musical instrument", "phone": "phone", "computer": "computer",
    "light-video": "light and video", "book-paper": "book or paper", "money": "money", "mail": "mail", "writing": "writing", "office": "office supplies",
    "lock": "lock", "tool": "tool", "science": "science", "medical": "medicine", "household": "household item", "other-object": "other object",
    "transport-sign": "transport sign", "warning": "warning sign", "arrow": "arrow", "religion": "religious symbol", "zodiac": "zodiac sign",
    "av-symbol": "player button", "gender": "gender symbol", "math": "mathematical sign", "punctuation": "punctuation mark", "currency": "currency",
    "other-symbol": "other symbol", "keycap": "key of a keypad", "alphanum": "letters or signs on a button", "geometric": "geometric shape",
    "flag": "flag", "country-flag": "flag of a country", "subdivision-flag": "flag of a region",
}
MALE = {"man", "men", "boy", "prince", "merman"}
FEMALE = {"woman", "women", "girl", "princess", "mermaid", "mrs."}


def key(hexcode: str) -> str:
    """A file or code name as every package can agree on it: upper case, four digits at least, no invisible selectors."""
    return "-".join(part.zfill(4) for part in re.split("[-_]", hexcode.upper()) if part not in ("FE0F", "E007F"))


def tone_of(entry: dict) -> str:
    """'' or the names of one or two skin tones: 'light', 'medium, dark'."""
    return ", ".join(TONES[t] for t in str(entry["skintone"]).split(",") if t)


def gender_of(entry: dict, emojibase: dict) -> str:
    """'man', 'woman' or '' as the name says it; a couple of both is ''."""
    if entry["group"] != "people-body":
        return ""  # a man's shoe is a shoe
    if "gender" in emojibase:
        return ("woman", "man")[emojibase["gender"]]
    words = set(re.findall(r"[a-z.]+", entry["annotation"].lower()))
    male, female = bool(words & MALE), bool(words & FEMALE)
    return "man" if male and not female else "woman" if female and not male else ""


def words_of(*lists) -> list[str]:
    """Lower-cased tags without duplicates, in the order of first appearance; a tag without any letter is none."""
    tags = (re.sub(r"[_\s]+", " ", str(t)).strip().lower() for tags in lists for t in tags)
    return list(dict.fromkeys(t for t in tags if re.search(r"[^\W\d_]", t)))


def read_concepts(openmoji: Path, emojibase: Path) -> list[dict]:
    """One dictionary per concept, in Unicode's order (OpenMoji's file order)."""
    entries = [e for e in json.loads((openmoji / "data/openmoji.json").read_text("utf-8")) if e["group"] not in LEFT_OUT_GROUPS]
    by_hex = {e["hexcode"]: e for e in entries}
    listed = json.loads((emojibase / "en/data.json").read_text("utf-8"))
    more = {key(e["hexcode"]): e for e in listed} | {key(s["hexcode"]): s for e in listed for s in e.get("skins", ())}
    codes: dict[str, list[str]] = {}
    for site in ("emojibase", "github", "iamcal", "joypixels"):
        for hexcode, names in json.loads((emojibase / f"en/shortcodes/{site}.json").read_text("utf-8")).items():
            codes.setdefault(key(hexcode), []).extend([names] if isinstance(names, str) else names)

    held_out = set(sorted(by_hex, key=lambda h: hashlib.sha256((HELD_OUT_SALT + h).encode()).hexdigest())[:HELD_OUT])
    base_of = {h: e["skintone_base_hexcode"] or h for h, e in by_hex.items()}
    seen_bases = {base_of[h] for h in by_hex if h not in held_out}

    rows = []
    for hexcode, entry in by_hex.items():
        base = by_hex[base_of[hexcode]]
        extra = more.get(key(base["hexcode"]), {})  # only the base has tags: a tone adds none
        rows.append({
            "concept": hexcode, "emoji": entry["emoji"], "name": entry["annotation"],
            "base": base["hexcode"], "base_name": base["annotation"],
            "tags": words_of(base["tags"].split(","), base["openmoji_tags"].split(","), extra.get("tags", ()), codes.get(key(base["hexcode"]), ())),
            "group": GROUPS[entry["group"]], "subgroup": SUBGROUPS[entry["subgroups"]],
            "tone": tone_of(entry), "gender": gender_of(entry, more.get(key(hexcode), {})),
            "split": "heldout" if hexcode in held_out else "train", "base_seen": base_of[hexcode] in seen_bases,
        })
    return rows


# ------------------------------------------------------------------------------------------------ pictures

def square(image: Image.Image) -> Image.Image:
    """RGBA, scaled to fit `SIZE` with its aspect kept, centred on a transparent square."""
    image = image.convert("RGBA")
    scale = SIZE / max(image.size)
    if scale != 1:
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    canvas = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return canvas


def webp(image: Image.Image) -> bytes:
    """The picture as lossy WebP with transparency."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, alpha_quality=ALPHA_QUALITY, method=6)
    return buffer.getvalue()


def draw(path: Path) -> bytes:
    """One emoji file (PNG, WebP or SVG) as a WebP of `SIZE` pixels."""
    if path.suffix == ".svg":
        # Drawn at four times the size and reduced, so that every style has been through the same filter.
        with Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_path=str(path), width=4 * SIZE, height=4 * SIZE, skip_system_fonts=True))) as image:
            return webp(square(image))
    with Image.open(path) as image:
        return webp(square(image))


def write(path: Path, columns: dict, schema: pa.Schema) -> dict:
    """Write a Parquet file; pictures are stored as they are (WebP does not compress), text with zstd."""
    texts = [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in schema if not pa.types.is_struct(f.type)]
    compression = {name: "zstd" for name in texts} | ({"image.bytes": "none", "image.path": "zstd"} if "image" in columns else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, compression=compression, use_dictionary=False, row_group_size=1024)
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CONCEPTS = pa.schema([
    *((name, pa.string()) for name in ("concept", "emoji", "name", "base", "base_name")), ("tags", pa.list_(pa.string())),
    *((name, pa.string()) for name in ("group", "subgroup", "tone", "gender", "split")), ("base_seen", pa.bool_()),
])


def build_emoji(work: Path, assets: Path, pool: ProcessPoolExecutor) -> dict:
    """concepts.parquet and one Parquet file per style; returns the manifest's part."""
    folders = {name: fetch(package, work) for name, package in PACKAGES.items()}
    concepts = read_concepts(folders["openmoji"], folders["emojibase"])
    columns = {name: [row[name] for row in concepts] for name in CONCEPTS.names}
    report = {"concepts": {"rows": len(concepts), **write(assets / "emoji/concepts.parquet", columns, CONCEPTS)}, "styles": {}}
    for style, (package, folder, suffix) in STYLE_FOLDERS.items():
        files = {key(p.stem): p for p in sorted((folders[package] / folder).iterdir()) if p.suffix == suffix}
        present = [row for row in concepts if key(row["concept"]) in files]
        paths = [files[key(row["concept"])] for row in present]
        pictures = list(tqdm(pool.map(draw, paths, chunksize=32), total=len(paths), desc=style))
        names = [row["concept"] for row in present]
        images = [{"bytes": data, "path": f"{style}/{name}.webp"} for name, data in zip(names, pictures)]
        size = write(assets / f"emoji/{style}.parquet", {"concept": names, "image": images}, pa.schema([("concept", pa.string()), ("image", IMAGE)]))
        missing = [row["concept"] for row in concepts if key(row["concept"]) not in files]
        report["styles"][style] = {"rows": len(names), "missing": missing, **size}
    return report


# ------------------------------------------------------------------------------------------------ clip art

# Fills and generated series, not pictures of anything, and a folder of copies.
LEFT_OUT_FOLDERS = ("special/gradients", "special/patterns", "unsorted/duplicates")
LEFT_OUT_TITLES = ("gramastar",)  # 1,375 machine-made star polygons that differ in two numbers
# Photographs of people traced into drawings, named living or recent persons, and two drawings unfit for a class room: nobody
# in this data set should be a real person who was not asked. Found by looking through every drawing in people/.
LEFT_OUT_PEOPLE = (
    "a_boy_plays_soccer", "a_happy_boy", "a_man_singing", "a_youngster", "blacksmiti_ganson", "brozo_the_clown", "cm1", "einstein", "enthusiast",
    "Evel_Knievel", "future_beckham", "grampa_39_n_gramma", "grandpa_01", "handstand_andrew", "hide_girl", "jazz_enrique", "john_coltrane",
    "man_crystal", "man_face_darek", "man_head_mikhail", "martin_luther_king", "my_lovely_baby", "self_portrait", "sexy_lady", "silvia",
    "stripper", "water_skier", "xbill",
)
JUNK = {"", "hash", "theme", "unsorted", "openclipart", "open clip art", "clipart", "clip art", "magick", "various cliparts", "unknown", "untitled", "drawing", "svg"}
COLLECTION = 10  # a title or description on as many drawings names a collection (or was pasted), not this drawing
LARGEST = 2**28  # pixels: two renderings of one stop sign are 20,990 x 29,700, 2.5 GB each once open
EMPTY_SHARE = 0.01  # a picture with less ink than this share of its square, on white, shows nothing at 64 pixels


def plain(text: str) -> str:
    """Lower case, entities resolved, tags dropped, one space between words."""
    text = re.sub(r"<[^>]*>", " ", html.unescape(text))
    return re.sub(r"[\s_]+", " ", unicodedata.normalize("NFC", text)).strip().lower()


def slug(text: str) -> str:
    """Words as the library's file names spell them: everything but ASCII letters and digits is an underscore."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def svg_words(path: Path) -> dict:
    """Title, description, keywords and authors from the metadata of one SVG, as found."""
    text = path.read_bytes().decode("utf-8", "replace")
    found = re.search(r"<metadata.*?</metadata>", text, re.S)
    meta = found.group(0) if found else ""
    agent = r"<(?:cc:)?Agent\b.*?</(?:cc:)?Agent>"  # authors, publishers and rights holders have titles too
    authors = [plain(t) for a in re.findall(agent, meta, re.S) for t in re.findall(r"<dc:title>(.*?)</dc:title>", a, re.S)]
    meta = re.sub(agent, "", meta, flags=re.S)

    def first(tag: str) -> str:
        hit = re.search(rf"<dc:{tag}\b[^>]*>(.*?)</dc:{tag}>", meta, re.S)
        return plain(hit.group(1)) if hit else ""

    links = re.findall(r"<image\b[^>]*?xlink:href=[\"']([^\"']*)", text, re.S)
    return {
        "broken": any(not link.startswith("data:") for link in links),  # Debian drew "linked image not found" in its place
        "title": re.sub(r"^clipart by nicu buculei - ", "", first("title")), "description": first("description"),
        "keywords": [plain(k) for k in re.findall(r"<rdf:li\b[^>]*>(.*?)</rdf:li>", meta, re.S)],
        "authors": [a for a in authors if a and a not in JUNK and not a.startswith(("open clip art", "public domain"))],
    }


def file_words(stem: str, authors: list[str], everybody: set[str]) -> str:
    """The words of a file name without its number and without its author, whose name is often cut off at the end."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", stem)
    words = [w for w in re.split(r"[_\-.\s]+", words.lower()) if w]
    if len(words) > 1 and re.fullmatch(r"0\d[a-z]?", words[-1]):
        words.pop()
    for start in range(1, len(words)):
        tail = re.sub(r"\d+$", "", slug("_".join(words[start:])))
        if (len(tail) > 2 and any(slug(a).startswith(tail) or tail in slug(a).split("_") for a in authors)) or tail in everybody:
            return " ".join(words[:start])
    return " ".join(words)


def captions_of(words: dict, path: Path, common: set[str], everybody: set[str]) -> list[str]:
    """Every text about one drawing, most specific first, noisy as found; [] when nothing but its folder is known."""
    authors = set(words["authors"])

    def usable(text: str) -> bool:
        return (re.search(r"[^\W\d_]{2}", text) is not None and text not in JUNK and text not in authors
                and not any(a in text for a in authors if len(a) > 8) and not re.search(r"@|https?:|www\.|\b0x[0-9a-f]+", text))

    texts = [words["title"], words["description"]]
    texts = [t for t in texts if t not in common] + [file_words(path.stem, words["authors"], everybody)]
    texts = [t for t in texts if usable(t)]
    if not texts:
        return []
    keywords = list(dict.fromkeys(k for k in words["keywords"] if usable(k)))
    folders = [f.replace("_", " ").replace("-", " ") for f in reversed(path.parent.parts) if f.lower() not in JUNK | {"special", "examples"}]
    return list(dict.fromkeys(t for t in [*texts, ", ".join(keywords), ", ".join(folders)] if t))


def draw_clipart(path: Path) -> tuple[bytes, str, float] | None:
    """(WebP, sha256 of its pixels on white, share of the square that is not white) of one PNG; None above `LARGEST`."""
    Image.MAX_IMAGE_PIXELS = None  # Pillow's guard is for strangers' files; the next lines look at the size themselves
    with Image.open(path) as image:
        if image.width * image.height > LARGEST:
            return None
        picture = square(image)
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    ink = sum(on_white.convert("L").point(lambda v: 255 if v < 245 else 0).histogram()[255:]) / SIZE**2
    return webp(picture), hashlib.sha256(on_white.tobytes()).hexdigest(), ink


def build_clipart(root: Path, assets: Path, pool: ProcessPoolExecutor) -> dict:
    """clipart.parquet from Debian's openclipart-png and openclipart-svg; returns the manifest's part."""
    for kind in ("png", "svg"):
        if not (root / kind).is_dir():
            raise FileNotFoundError(f"{root / kind} is missing: `apt-get install openclipart-{kind}`, or point --clipart at a copy of /usr/share/openclipart")
    stems = sorted(p.relative_to(root / "png").with_suffix("") for p in (root / "png").rglob("*.png"))
    words = {stem: svg_words((root / "svg" / stem).with_name(stem.name + ".svg")) for stem in tqdm(stems, desc="clip art captions")}
    count = Counter(t for w in words.values() for t in {w["title"], w["description"]})
    common = {t for t, n in count.items() if n >= COLLECTION}
    everybody = {slug(a) for w in words.values() for a in w["authors"] if " " in a}

    dropped = Counter(found=len(stems))
    kept: dict[Path, list[str]] = {}
    for stem in stems:
        if str(stem.parent).startswith(LEFT_OUT_FOLDERS) or words[stem]["title"] in LEFT_OUT_TITLES:
            dropped["left_out_folders_and_series"] += 1
        elif stem.name.startswith(LEFT_OUT_PEOPLE):
            dropped["real_or_unfit_people"] += 1
        elif words[stem]["broken"]:
            dropped["linked_picture_missing"] += 1
        elif captions := captions_of(words[stem], stem, common, everybody):
            kept[stem] = captions
        else:
            dropped["no_usable_caption"] += 1

    files = [(root / "png" / stem).with_name(stem.name + ".png") for stem in kept]
    rows: dict[str, dict] = {}  # by the hash of the picture: an exact copy adds its captions to the first one
    for (stem, captions), drawn in zip(kept.items(), tqdm(pool.map(draw_clipart, files, chunksize=8), total=len(files), desc="clip art")):
        if drawn is None:
            dropped["too_large"] += 1
            continue
        data, digest, ink = drawn
        if ink < EMPTY_SHARE:
            dropped["near_empty"] += 1
        elif digest in rows:
            dropped["exact_copies"] += 1
            rows[digest]["captions"] = list(dict.fromkeys(rows[digest]["captions"] + captions))
        else:
            rows[digest] = {"id": stem.as_posix(), "folder": stem.parent.as_posix(), "captions": captions,
                            "image": {"bytes": data, "path": f"clipart/{stem.as_posix()}.webp"}}
    schema = pa.schema([("id", pa.string()), ("folder", pa.string()), ("captions", pa.list_(pa.string())), ("image", IMAGE)])
    size = write(assets / "clipart.parquet", {name: [r[name] for r in rows.values()] for name in schema.names}, schema)
    return {"rows": len(rows), "captions": sum(len(r["captions"]) for r in rows.values()), "dropped": dict(dropped), **size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build"), help="folder for the npm archives (default: build)")
    parser.add_argument("--clipart", type=Path, default=Path("/usr/share/openclipart"), help="where openclipart-png and -svg are installed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "clip_lab" / "assets", help="folder to write (default: the package's assets)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        manifest = {
            "sources": {p.name: {"version": p.version, "sha512": p.sha512} for p in PACKAGES.values()},
            "tools": {name: importlib.metadata.version(name) for name in ("pillow", "pyarrow", "resvg-py")},
            "picture": {"size": SIZE, "mode": "RGBA", "format": "WebP", "quality": QUALITY, "alpha_quality": ALPHA_QUALITY},
            "emoji": build_emoji(args.work, args.out, pool), "clipart": build_clipart(args.clipart, args.out, pool),
        }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    sizes = {"concepts": manifest["emoji"]["concepts"], **manifest["emoji"]["styles"], "clipart": manifest["clipart"]}
    for name, part in sizes.items():
        print(f"{name:15} {part['rows']:6,} rows {part['bytes'] / 1e6:7.2f} MB  {len(part.get('missing', ())):4} missing")
    print(f"{'all':15} {'':11} {sum(p['bytes'] for p in sizes.values()) / 1e6:7.2f} MB")


if __name__ == "__main__":
    main()
