"""Damage, as hypothesis strategies: to bytes, to zip archives with their checksums made good again, to YAML and JSON."""
import io
import json
import struct
import zipfile

from hypothesis import strategies as st

NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0x7FFF_FFFF_FFFF_FFFF)


@st.composite
def damage(draw, most: int = 8):
    "A list of changes for `damaged`; places are shares of the length, so that they fit any file."
    place = st.one_of(st.floats(0, 1, exclude_max=True), st.floats(0, 0.02))      # headers are at the front
    kinds = [st.tuples(st.just("flip"), place, st.integers(1, 255)), st.tuples(st.just("set"), place, st.integers(0, 255)),
             st.tuples(st.just("number"), place, st.sampled_from([">H", "<H", ">I", "<I", "<Q"]), st.sampled_from(NUMBERS)),
             st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)), st.tuples(st.just("cut"), st.floats(0, 1)), st.tuples(st.just("drop"), place, st.integers(1, 64)),
             st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=24)), st.tuples(st.just("again"), place, place, st.integers(1, 200))]
    return draw(st.one_of(st.lists(st.one_of(kinds), min_size=1, max_size=2), st.lists(st.one_of(kinds), min_size=1, max_size=most)))


def damaged(data: bytes, changes) -> bytes:
    "The bytes after these changes."
    data = bytearray(data)
    for kind, where, *rest in changes:
        at = int(where * len(data))
        if kind == "flip" and data: data[at] ^= rest[0]
        elif kind == "set" and data: data[at] = rest[0]
        elif kind == "number":
            form, number = rest
            size = struct.calcsize(form)
            data[at:at + size] = struct.pack(form, number & (256 ** size - 1))
        elif kind == "cut": del data[at:]
        elif kind == "drop": del data[at:at + rest[0]]
        elif kind == "insert": data[at:at] = rest[0]
        elif kind == "again":
            start = int(rest[0] * len(data))
            data[at:at] = data[start:start + rest[1]]
    return bytes(data)


def repacked(archive: bytes, change, compress=None) -> bytes:
    "The zip with the content of each entry passed through change(name, data); None leaves the entry out. All sizes and checksums are right again."
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out := io.BytesIO(), "w") as new:
        for info in old.infolist():
            if (data := change(info.filename, old.read(info))) is not None: new.writestr(info.filename, data, compress if compress is not None else info.compress_type)
    return out.getvalue()


# ---- YAML

NAMES = st.sampled_from(["name", "version", "source", "labels", "label", "words", "category", "categories", "harm", "what", "templates", "note", "edits", "title", "question", "data", "classes", "shots", "exclude",
                         "consent", "translations", "de", "model", "steps", "betas", "output", "run", "seed", "shows", "attributes", "limits", "none", "display", "checks", "repeats", "=", "", "<<"])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.binary(max_size=5), st.sampled_from(["{}", "a photo of {}", "emoji", "en", "yes", "{x}", "{"]))
VALUES = st.recursive(LEAVES, lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(st.one_of(NAMES, LEAVES), v, max_size=5)), max_leaves=12)
SNIPPETS = ["!!python/object/apply:os.system [\"touch CANARY\"]", "!!python/object/new:os.system [\"touch CANARY\"]", "!!python/name:os.system", "!!python/module:os", "!!python/object/apply:builtins.eval [\"open('CANARY', 'w')\"]",
            "&a [*a]", "*nowhere", "<<: [1]", "? [a]\n: b", "!!binary x", "!!timestamp 2020-99-99", "2020-13-45", "1_000", "0o77", ".inf", ".nan", "~", "!!set {a}", "!!omap [a: 1]", "!!float x", "!!int 0b2", "1:99:99",
            "[" * 2000, "{a: " * 1500, "- " * 3000, "'\\x", "\"\\ud800\"", "\t", "%YAML 9.9\n---", "---\n---", "...", "&" + "a" * 50 + " 1", "9" * 5000, "!<tag:yaml.org,2002:python/none> x", "\x00", "\ufeff", "\x85"]


def bomb(levels: int = 30) -> str:
    "A few lines that stand for 2 ** levels values."
    return "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, levels)) + f"name: *a{levels - 1}\n"


def replaced(draw, values, kinds=VALUES):
    "The values with one of them, however deep, gone or something else."
    at, path = values, []
    while isinstance(at, (dict, list)) and at and (not path or draw(st.booleans())):
        path.append(draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at)))))
        at = at[path[-1]]
    inner = values
    for step in path[:-1]: inner = inner[step]
    if draw(st.booleans()): inner[path[-1]] = draw(kinds)
    else: del inner[path[-1]]
    return values


@st.composite
def edited(draw, text: str):
    "A YAML text with some of its pieces replaced."
    import yaml
    kind = draw(st.sampled_from(["bytes", "value", "snippet", "new"]))
    if kind == "bytes": return damaged(text.encode(), draw(damage(4)))
    if kind == "new": return yaml.safe_dump(draw(VALUES), allow_unicode=True).encode("utf-8", "surrogatepass")
    if kind == "value": return yaml.safe_dump(replaced(draw, yaml.safe_load(text)), allow_unicode=True).encode("utf-8", "surrogatepass")
    lines = text.split("\n")
    at = draw(st.integers(0, len(lines) - 1))
    head, colon, _ = lines[at].partition(":")
    lines[at] = f"{head}{colon} {draw(st.sampled_from(SNIPPETS))}" if draw(st.booleans()) else draw(st.sampled_from(SNIPPETS))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


JSON_VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-5, 70), st.integers(), st.floats(), st.text(max_size=12)), lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(st.text(max_size=5), v, max_size=3)), max_leaves=8)
JSON_TRAPS = ["", "null", "[]", "{}", "0", "\"x\"", "[" * 100_000, "{\"a\":" * 50_000, "9" * 5000, "{\"a\": NaN}", "{\"a\": 1e999}", "\ufeff{}", "{\"a\": \"\\ud800\"}", "{}{}", "// x\n{}"]


@st.composite
def edited_json(draw, text: str):
    "A JSON text with a few bytes, or one or two values, changed."
    kind = draw(st.sampled_from(["bytes", "value", "value", "values", "trap"]))
    if kind == "bytes": return damaged(text.encode(), draw(damage(4)))
    if kind == "trap": return draw(st.sampled_from(JSON_TRAPS)).encode("utf-8", "surrogatepass")
    values = json.loads(text)
    for _ in range(1 + (kind == "values")): values = replaced(draw, values, JSON_VALUES) if values else values
    return json.dumps(values).encode("utf-8", "surrogatepass")
