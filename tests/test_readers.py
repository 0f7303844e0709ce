"""The readers, the loader and the check: every layout read back, every pair once, cut runs that continue to the bit, and what bad data are told."""
import io
import json
import logging
import shutil
import tarfile
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import csv, parquet

from clip_lab.data.check import STOPS, check
from clip_lab.data.loader import BadDataError, PairLoader, RandomCrop, caption_key
from clip_lab.data.readers import BadPair, RawPair, ShardError, decode, expand, grouped, open_pairs
from clip_lab.images import preprocess

N = 24


def encoded(i: int, size: int = 12) -> bytes:
    "A PNG that differs from every other one."
    stream = io.BytesIO()
    values = np.random.default_rng(i).integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
    Image.fromarray(values).save(stream, "png")
    return stream.getvalue()


PICTURES = [encoded(i) for i in range(N)]
CAPTIONS = [f"caption {i}, with a comma; and \"quotes\"" if i % 2 else f"Größe {i}\tein Tab" for i in range(N)]
CAPTIONS[3], CAPTIONS[5] = "NA", "007"                       # words, not a hole and a number


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    (root / "pictures").mkdir()
    (root / "json" / "deep").mkdir(parents=True)
    for i in range(N):
        (root / f"pictures/{i:02}.png").write_bytes(PICTURES[i])
        (root / f"pictures/{i:02}.txt").write_text(CAPTIONS[i] + "\n", "utf-8")
        (root / f"json/deep/v1.{i:02}.PNG").write_bytes(PICTURES[i])       # a dot in the name, a suffix in capitals
        (root / f"json/deep/v1.{i:02}.json").write_text(json.dumps({"caption": CAPTIONS[i], "other": "x"}))
    paths = [f"pictures/{i:02}.png" for i in range(N)]
    flat = pa.table({"id": list(range(N)), "filepath": paths, "title": CAPTIONS})
    csv.write_csv(flat, root / "pairs.csv")
    csv.write_csv(flat, root / "pairs.tsv", csv.WriteOptions(delimiter="\t"))
    (root / "pairs.jsonl").write_text("".join(json.dumps({"image": p, "text": c}) + "\n" for p, c in zip(paths, CAPTIONS)) + "\n")
    parquet.write_table(flat, root / "paths.parquet")
    parquet.write_table(pa.table({"image": PICTURES, "caption": CAPTIONS}), root / "bytes.parquet", row_group_size=5)
    structs = pa.table({"image": [{"bytes": p, "path": "x.png"} for p in PICTURES], "caption": CAPTIONS})
    (root / "parts").mkdir()
    parquet.write_table(structs.slice(0, 10), root / "parts/0.parquet")
    parquet.write_table(structs.slice(10), root / "parts/1.parquet")
    for s in range(4):
        mine = range(s * 6, s * 6 + 6)
        write_tar(root / f"s-{s:03}.tar", [part for i in mine for part in ((f"a/{i:04}.png", PICTURES[i]), (f"a/{i:04}.txt", CAPTIONS[i].encode()), (f"a/{i:04}.cls", b"3"))])
    return root


@pytest.fixture(scope="module")
def web(root):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_): pass

        def do_GET(self):
            if not self.path.startswith("/short"): return super().do_GET()
            data = (root / "s-000.tar").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) + 512))       # ends after the archive, but before what was announced
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def content(pair: RawPair) -> tuple[bytes, str]:
    return pair.image.read_bytes() if isinstance(pair.image, Path) else pair.image, pair.caption


def everything(source) -> list[RawPair]:
    if not hasattr(source, "iter_shard"): return [source[i] for i in range(len(source))]
    return [pair for j in range(len(source.shards)) for pair in source.iter_shard(j)]


TRUTH = list(zip(PICTURES, CAPTIONS))


# Layouts


@pytest.mark.parametrize("location", ["pairs.csv", "pairs.tsv", "pairs.jsonl", "paths.parquet", "bytes.parquet", "parts", "parts/{0..1}.parquet",
                                      "pictures", "json", "s-{000..003}.tar", "s-*.tar"])
def test_every_layout_is_read_back(root, location):
    source = open_pairs(root / location)
    pairs = everything(source)
    assert [content(p) for p in pairs] == TRUTH
    assert len({p.key for p in pairs}) == N and source.name
    assert source.fingerprint == open_pairs(root / location).fingerprint
    assert decode(pairs[0]).size == (16, 12)


@pytest.mark.parametrize("location", ["pipe:cat {root}/s-{{000..003}}.tar", "{web}/s-{{000..003}}.tar"])
def test_streams_are_read_back(root, web, location):
    source = open_pairs(location.format(root=root, web=web))
    assert len(source.shards) == 4 and [content(p) for p in everything(source)] == TRUTH


def test_shards_from_disk_as_a_stream_and_compressed(root, tmp_path):
    assert [content(p) for p in everything(open_pairs(root / "s-*.tar", kind="stream"))] == TRUTH
    write_tar(tmp_path / "x.tar.gz", [("0.png", PICTURES[0]), ("0.txt", b"a cat")], "w:gz")
    assert content(everything(open_pairs(tmp_path / "x.tar.gz", kind="stream"))[0]) == (PICTURES[0], "a cat")
    with pytest.raises(ShardError, match="x.tar.gz.*gzip -dc"): open_pairs(tmp_path / "x.tar.gz", kind="shards")


def test_fingerprints_tell_sources_apart(root):
    locations = ["pairs.csv", "pairs.tsv", "pairs.jsonl", "bytes.parquet", "parts", "pictures", "json", "s-*.tar", "s-00{0..2}.tar"]
    prints = [open_pairs(root / where).fingerprint for where in locations]
    prints += [open_pairs(root / "pairs.csv", caption="id").fingerprint, open_pairs(root / "s-*.tar", kind="stream").fingerprint]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("location, kind", [("pairs.csv", "auto"), ("pictures", "auto"), ("s-*.tar", "shards"), ("s-*.tar", "stream")])
def test_data_may_move(root, tmp_path, location, kind):
    shutil.copytree(root, tmp_path / "elsewhere")
    assert open_pairs(tmp_path / "elsewhere" / location, kind=kind).fingerprint == open_pairs(root / location, kind=kind).fingerprint


def test_columns_that_are_named(root, tmp_path):
    assert open_pairs(root / "pairs.csv", caption="id")[7].caption == "7"
    rows = [{"image": str(root / "pictures/00.png"), "captions": ["a", "b", "c"]}, {"image": None, "captions": None}, {"image": "gone.png", "captions": 5}]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    many = open_pairs(tmp_path / "many.jsonl")
    assert (many[0].caption, many[0].others) == ("a", ("b", "c")) and many[0].image == root / "pictures/00.png"
    assert (many[1].image, many[1].caption, many[2].caption) == (None, None, None)
    write_tar(tmp_path / "t.tar", [("1.webp", b"w"), ("1.png", b"p"), ("1.txt", b"from txt"), ("1.json", b'{"alt": "from json"}')])
    assert content(open_pairs(tmp_path / "t.tar")[0]) == (b"p", "from txt")
    assert content(open_pairs(tmp_path / "t.tar", image="webp;png", caption="alt")[0]) == (b"w", "from json")


def test_two_pictures_of_one_caption_are_two_pairs(tmp_path):
    for name, data in (("a.png", PICTURES[0]), ("a.jpg", PICTURES[1]), ("a.txt", b"both"), ("b.txt", b"alone"), ("c.png", PICTURES[2]), (".x.png", b"")):
        (tmp_path / name).write_bytes(data)
    pairs = everything(open_pairs(tmp_path))
    assert [(p.key, p.image and p.image.name, p.caption) for p in pairs] == [("a", "a.jpg", "both"), ("a", "a.png", "both"), ("b", None, "alone"), ("c", "c.png", None)]


def test_grouping_and_braces():
    names = ["d/1.jpg", "d/1.txt", "d/2.seg.png", "d/2.jpg", "d/1.jpg", "d", "e/.x", "e/noext"]
    assert [(k, sorted(p)) for k, p in grouped((n, n) for n in names)] == [("d/1", ["jpg", "txt"]), ("d/2", ["jpg", "seg.png"]), ("d/1", ["jpg"])]
    assert expand("{a,b}{9..11}") == ["a9", "a10", "a11", "b9", "b10", "b11"] and expand("x{y}") == ["x{y}"]


def test_the_writer_of_webdataset(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=10, verbose=0) as writer:
        for i in range(N): writer.write({"__key__": f"{i:05}", "png": PICTURES[i], "json": {"caption": CAPTIONS[i]}})
    assert [content(p) for p in everything(open_pairs(tmp_path))] == TRUTH


# Hugging Face datasets


@pytest.fixture(scope="module")
def hf():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64"), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": [{"bytes": p, "path": None} for p in PICTURES], "label": [0] * N, "text": CAPTIONS}, features=features)


def test_hugging_face_dataset_is_read_undecoded(hf, tmp_path):
    assert [content(p) for p in everything(open_pairs(hf))] == TRUTH
    hf.save_to_disk(str(tmp_path / "saved"))
    saved = open_pairs(tmp_path / "saved")
    assert [content(p) for p in everything(saved)] == TRUTH and saved.fingerprint == open_pairs(tmp_path / "saved").fingerprint
    with pytest.raises(ValueError, match="no column 'caption'.*'image', 'label', 'text'"): open_pairs(hf, caption="caption")


def test_hugging_face_iterable(hf):
    source = open_pairs(hf.to_iterable_dataset(num_shards=3))
    assert len(source.shards) == 3 and sorted(content(p) for p in everything(source)) == sorted(TRUTH)
    keys = [key for batch in take(loader(source, size=N), 1) for key in batch.keys]
    assert len(set(keys)) == N


def test_a_dataset_dict_is_asked_for_its_split(hf, tmp_path):
    import datasets
    both = datasets.DatasetDict({"train": hf, "test": hf})
    with pytest.raises(ValueError, match="'train', 'test'"): open_pairs(both)


# What a wrong layout is told


@pytest.mark.parametrize("more, error, says", [
    (dict(location="none.csv"), FileNotFoundError, "none.csv does not exist"),
    (dict(location="s-{003..005}.tar"), FileNotFoundError, "s-004.tar does not exist.*nor do 1 more"),
    (dict(location="s-{5..4}.tar"), ValueError, "no file at all"),
    (dict(location="pictures/00.png"), ValueError, "no reader for .png; expected .csv"),
    (dict(location="pairs.csv", kind="excel"), ValueError, "'excel' is not known; expected auto"),
    (dict(location="pairs.csv", image="img"), ValueError, "no column 'img'; its columns are 'id', 'filepath', 'title'.*image="),
    (dict(location="pairs.tsv", separator="|"), ValueError, "is the separator right"),
    (dict(location="pictures", kind="shards"), FileNotFoundError, "no .tar files"),
    (dict(location=["pairs.csv", "pairs.tsv"]), ValueError, "expected one"),
])
def test_wrong_locations(root, more, error, says):
    where = more.pop("location")
    with pytest.raises(error, match=says): open_pairs([root / w for w in where] if isinstance(where, list) else root / where, **more)


@pytest.mark.parametrize("name, text, says", [
    ("a.csv", "image,caption\n", "a.csv has no rows"),
    ("a.csv", "image,caption\nx.png,a,b\n", "a.csv cannot be read as csv.*Expected 2 columns"),
    ("a.csv", "image,caption\nhttps://example.org/1.png,a\n", "holds addresses"),
    ("a.jsonl", '{"image": "x", "caption": "y"}\n{"image": "x", "cap', "line 2: not JSON"),
    ("a.jsonl", "[1, 2]", "line 1: expected an object"),
    ("a.jsonl", '{"url": 1}', "its columns are 'url'"),
    ("a.parquet", "PAR?", "a.parquet cannot be read as parquet"),
])
def test_wrong_tables(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says): open_pairs(tmp_path / name)


def test_folders_and_shards_without_a_half(tmp_path):
    with pytest.raises(ValueError, match="no pictures.*found no files"): open_pairs(tmp_path)
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "table.csv").write_text("x")
    with pytest.raises(ValueError, match="no captions.*found .csv, .png; a table"): open_pairs(tmp_path)
    write_tar(tmp_path / "t.tar", [("1.txt", b"x"), ("1.npy", b"y")])
    with pytest.raises(ValueError, match="t.tar has no pictures.*found .npy, .txt"): open_pairs(tmp_path / "t.tar")


# Whole shards that cannot be read


@pytest.mark.parametrize("end", [0, 100, 512, 900, 2048, 5000, 8192])
def test_a_shard_cut_anywhere_is_an_error(root, tmp_path, end):
    whole = (root / "s-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:end])
    with pytest.raises(ShardError, match="cut.tar"): open_pairs(tmp_path / "cut.tar")
    with pytest.raises(ShardError, match="cut.tar"): everything(open_pairs(tmp_path / "cut.tar", kind="stream"))


def test_a_damaged_header_is_not_an_end(root, tmp_path):
    whole = bytearray((root / "s-000.tar").read_bytes())
    at = whole.index(b"a/0003.png")
    whole[at:at + 512] = b"\xff" * 512
    (tmp_path / "bad.tar").write_bytes(whole)
    with pytest.raises(ShardError, match="bad.tar"): open_pairs(tmp_path / "bad.tar")
    with pytest.raises(ShardError, match="bad.tar"): everything(open_pairs(f"pipe:cat {tmp_path}/bad.tar"))


def test_flows_that_end_early(root, web):
    with pytest.raises(ShardError, match="s-000.tar; exit 4.*code 4"): everything(open_pairs(f"pipe:cat {root}/s-000.tar; exit 4"))
    with pytest.raises(ShardError, match="/none.tar.*404"): everything(open_pairs(f"{web}/none.tar"))
    with pytest.raises(ShardError, match="/short.tar.*512 bytes too early"): everything(open_pairs(f"{web}/short.tar"))


# The loader


def loader(source, size=4, crop=8, **more) -> PairLoader:
    return PairLoader(source, RandomCrop(preprocess(crop)), size, **({"shuffle": 5} | more))


def take(batches, n: int) -> list:
    return [batch for _, batch in zip(range(n), batches)]


def same(a, b) -> bool:
    return torch.equal(a.images, b.images) and (a.texts, a.keys) == (b.texts, b.keys) and torch.equal(a.caption_keys, b.caption_keys)


SOURCES = {"indexed": dict(location="pairs.csv"), "sequential": dict(location="s-*.tar", kind="stream")}


def opened(root, which):
    return open_pairs(root / SOURCES[which]["location"], kind=SOURCES[which].get("kind", "auto"))


def test_a_batch(root):
    batch = next(iter(loader(opened(root, "indexed"))))
    assert batch.images.shape == (4, 3, 8, 8) and batch.images.dtype == torch.float32
    assert batch.caption_keys.dtype == torch.int64 and batch.caption_keys.tolist() == [caption_key(t) for t in batch.texts]
    assert all(CAPTIONS[int(key.split("#")[1])] == text for key, text in zip(batch.keys, batch.texts))


@pytest.mark.parametrize("which", SOURCES)
@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_see_each_pair_once_per_epoch(root, which, workers):
    source = opened(root, which)
    epochs = [Counter(), Counter()]
    for rank in range(2):                                                     # 12 pairs a rank and epoch: 6 batches of 2, 3 of each worker
        batches = take(loader(source, size=2, rank=rank, world=2, workers=workers), 12)
        for number, batch in enumerate(batches): epochs[number >= 6].update(batch.keys)
    assert all(len(epoch) == N and set(epoch.values()) == {1} for epoch in epochs)


def test_streams_run_on_without_dropping(root):
    keys = [key for batch in take(loader(opened(root, "indexed"), size=7), 24) for key in batch.keys]     # 168 = 7 epochs of 24
    assert all(len(set(keys[e * N:(e + 1) * N])) == N for e in range(7))
    assert keys[:N] != keys[N:2 * N]


@pytest.mark.parametrize("which", SOURCES)
def test_the_sample_does_not_depend_on_the_workers(root, which):
    alone, many = ({k: (x, t) for b in take(loader(opened(root, which), size=3, workers=w), 8) for k, x, t in zip(b.keys, b.images, b.texts)} for w in (0, 2))
    assert alone.keys() == many.keys() and all(torch.equal(alone[k][0], many[k][0]) and alone[k][1] == many[k][1] for k in alone)


@pytest.mark.parametrize("which", SOURCES)
@pytest.mark.parametrize("workers, cuts", [(0, (1, 4, 5, 10, 14)), (2, (1, 4))])
def test_resume_is_bit_equal(root, which, workers, cuts):
    whole = take(loader(opened(root, which), size=5, workers=workers), 18)   # 90 pairs: three epochs and a half
    for cut in cuts:
        before, after = (loader(opened(root, which), size=5, workers=workers) for _ in range(2))
        take(before, cut)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        rest = take(after, 18 - cut)
        assert all(map(same, rest, whole[cut:])) and len(rest) == 18 - cut
        assert after.seen == 90


def test_iterating_again_goes_on(root):
    whole, twice = take(loader(opened(root, "indexed")), 6), loader(opened(root, "indexed"))
    assert all(map(same, [*take(twice, 2), *take(twice, 4)], whole))


def test_another_seed_is_another_order_and_crops_change_by_epoch(root):
    a, b = (take(loader(opened(root, "indexed"), size=N, seed=s), 2) for s in (0, 1))
    assert a[0].keys != b[0].keys and a[0].keys != a[1].keys and set(a[0].keys) == set(a[1].keys)
    by_key = [dict(zip(batch.keys, batch.images)) for batch in a]
    assert any(not torch.equal(by_key[0][k], by_key[1][k]) for k in by_key[0])


def test_captions_are_drawn_again_each_epoch(tmp_path):
    parquet.write_table(pa.table({"image": PICTURES, "caption": [["a", "b", "c"]] * N}), tmp_path / "x.parquet")
    drawn = [tuple(t for _, t in sorted(zip(b.keys, b.texts))) for b in take(loader(open_pairs(tmp_path / "x.parquet"), size=N), 4)]
    assert len(set(drawn)) == 4 and {t for texts in drawn for t in texts} == {"a", "b", "c"}


def test_making_batches_leaves_the_global_generator_alone(root):
    state = torch.get_rng_state()
    take(loader(opened(root, "indexed"), workers=1), 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("more, says", [
    (dict(world=2), "world 1, this loader has 2"), (dict(workers=2), "workers 1, this loader has 2"), (dict(seed=7), "seed 0, this loader has 7"),
    (dict(shuffle=6), r"shuffle \[5\], this loader has \[6\]"),
])
def test_a_state_of_another_run_is_refused(root, more, says):
    saved = loader(opened(root, "sequential")).state_dict()
    with pytest.raises(ValueError, match=says): loader(opened(root, "sequential"), **more).load_state_dict(saved)


def test_a_state_of_other_data_is_refused(root):
    a, b = opened(root, "sequential"), open_pairs(root / "s-00{0..2}.tar", kind="stream")
    with pytest.raises(ValueError, match=f"{a.fingerprint}.*{b.fingerprint}"): loader(b).load_state_dict(loader(a).state_dict())


@pytest.mark.parametrize("more, says", [
    (dict(rank=2, world=2), "rank 2 of 2"), (dict(size=0), "batch_size=0"), (dict(max_bad=1.5), "max_bad is 1.5"), (dict(world=3, workers=2), "4 shards for 6 streams"),
])
def test_loaders_that_cannot_be(root, more, says):
    with pytest.raises(ValueError, match=says): loader(opened(root, "sequential"), **more)


# Bad samples


@pytest.fixture
def broken(tmp_path) -> list[tuple[str, bytes]]:
    "Parts of 60 good pairs and of one for each reason that shards can give."
    files = [part for i in range(60) for part in ((f"{i:03}.png", encoded(i)), (f"{i:03}.txt", b"fine"))]
    files += [("cut.png", PICTURES[0][:200]), ("cut.txt", b"cut"), ("blank.png", PICTURES[1]), ("blank.txt", b" \n"),
              ("mute.png", PICTURES[2]), ("lone.txt", b"lone"), ("odd.png", PICTURES[3]), ("odd.txt", b"\xff\xfe\xff")]
    write_tar(tmp_path / "broken.tar", files)
    return tmp_path / "broken.tar"


COUNTS = {"corrupt picture": 1, "empty caption": 1, "missing caption": 2, "missing picture": 1}


@pytest.mark.parametrize("kind", ["shards", "stream"])
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_skipped_counted_and_logged(broken, kind, workers, caplog):
    batches = loader(open_pairs(broken, kind=kind), size=10, max_bad=0.2, workers=workers)
    with caplog.at_level(logging.WARNING, "clip_lab.data"): keys = [key for batch in take(batches, 7) for key in batch.keys]
    assert len(set(keys[:60])) == 60 and len(keys) == 70 and all(batches.bad[reason] >= count for reason, count in COUNTS.items())
    assert batches.seen == 70 + batches.bad.total()
    assert all(any(f"broken/{key}" in message for message in caplog.messages) for key in ("cut", "blank", "mute", "lone", "odd"))
    assert len(caplog.messages) == batches.bad.total()


def test_missing_files_are_counted(root, tmp_path):
    rows = [{"image": str(root / f"pictures/{i:02}.png"), "caption": "x"} for i in range(20)] + [{"image": "gone.png", "caption": "x"}, {"image": "", "caption": "x"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    batches = loader(open_pairs(tmp_path / "x.jsonl"), size=20, max_bad=0.5)
    take(batches, 2)
    assert batches.bad["missing file"] >= 1 and batches.bad["missing picture"] >= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(broken, workers):
    batches = loader(open_pairs(broken), size=5, max_bad=0.05, min_seen=64, workers=workers)
    with pytest.raises(BadDataError, match=r"of [67]\d samples could not be used.*max_bad is 5.0%.*missing caption.*broken/.*Check the data"): take(batches, 14)
    patient = loader(open_pairs(broken), size=5, max_bad=0.05, min_seen=10_000, workers=workers)
    assert len(take(patient, 14)) == 14


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_bad_samples_does_not_hang(tmp_path, workers):
    parquet.write_table(pa.table({"image": [b"no picture"] * 30, "caption": ["x"] * 30}), tmp_path / "x.parquet")
    with pytest.raises(BadDataError, match="corrupt picture"): take(loader(open_pairs(tmp_path / "x.parquet"), min_seen=50, workers=workers), 1)


def test_bad_counts_survive_a_resume(broken):
    before, after = (loader(open_pairs(broken), size=10, max_bad=0.2) for _ in range(2))
    take(before, 8)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert (after.bad, after.seen) == (before.bad, before.seen) and after.bad.total() >= 5


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_shard_stops_the_run_by_name(root, tmp_path, workers):
    for s in range(2): (tmp_path / f"{s}.tar").write_bytes((root / f"s-00{s}.tar").read_bytes())
    (tmp_path / "1.tar").write_bytes((root / "s-001.tar").read_bytes()[:3000])
    with pytest.raises(ShardError, match="1.tar"): take(loader(open_pairs(tmp_path / "*.tar", kind="stream"), size=2, workers=workers), 20)


def test_pictures_of_two_shapes_are_named(root):
    odd = PairLoader(opened(root, "indexed"), lambda picture, g: torch.zeros(3, 4, int(torch.randint(4, 9, (), generator=g))), 8)
    with pytest.raises(ValueError, match=r"made \(3, 4, \d\) of pairs.csv#\d+ but"): take(odd, 1)


def test_a_bad_pair_travels_between_processes():
    import pickle
    error = pickle.loads(pickle.dumps(BadPair("missing file", "k", "gone")))
    assert (error.reason, error.key, str(error)) == ("missing file", "k", "k: missing file: gone")


# The check


@pytest.mark.parametrize("kind", ["shards", "stream"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_check_counts_what_the_loader_skips(broken, kind, workers):
    report = check(open_pairs(broken, kind=kind), workers=workers)
    assert report.n == 65 and {reason: report.counts[reason] for reason in COUNTS} == COUNTS
    assert report.counts["missing file"] == 0 and report.counts["duplicate caption"] == 59 and report.counts["duplicate key"] == 0
    assert report.counts["small picture"] == 60 and report.counts["duplicate picture"] == 0          # only pairs that can be used are compared
    assert not report.ok() and report.ok(max_bad=0.1)


def test_the_check_reports_duplicates_of_every_sort(tmp_path):
    files = [("a.png", PICTURES[0]), ("a.txt", b"A  cat"), ("b.png", PICTURES[1]), ("b.txt", b"a cat "), ("c.png", PICTURES[0]), ("c.txt", b"a dog"),
             ("a.png", PICTURES[2]), ("a.txt", b"word " * 90)]
    write_tar(tmp_path / "x.tar", files)
    report = check(open_pairs(tmp_path / "x.tar"))
    found = {k: v for k, v in report.counts.items() if v and k != "small picture"}
    assert found == {"over-long caption": 1, "duplicate caption": 1, "duplicate picture": 1, "duplicate key": 1}
    assert report.examples["duplicate picture"] == [("x/c", "the same as x/a")] and report.examples["duplicate caption"] == [("x/b", "the same as x/a")]
    assert report.examples["over-long caption"][0][1].startswith("92 tokens with start and end, 77 fit")
    table = report.table()
    assert table.set_index("problem").loc["duplicate key", ["effect", "count", "share", "n"]].tolist() == ["warning", 1, 0.25, 4]
    values = report.percentiles.set_index(["measure", "percentile"])["value"]
    assert (values["tokens", 0], values["tokens", 100], values["width", 50], values["height", 50]) == (4, 92, 16, 12)


def test_the_check_goes_on_after_a_broken_shard(root, tmp_path):
    for s in range(3): (tmp_path / f"{s}.tar").write_bytes((root / f"s-00{s}.tar").read_bytes())
    (tmp_path / "1.tar").write_bytes((root / "s-001.tar").read_bytes()[:700])
    report = check(open_pairs(tmp_path / "*.tar", kind="stream"))
    assert report.counts[STOPS] == 1 and "1.tar" in report.examples[STOPS][0][0] and report.n >= 12 and not report.ok(max_bad=0.9)


def test_the_check_stops_at_its_limit_and_takes_any_tokenizer(root):
    class Letters:
        def encode_batch(self, texts): return [list(map(ord, text)) for text in texts]

    source = opened(root, "indexed")
    report = check(source, tokenizer=Letters(), context_length=10, limit=10)
    assert report.n == 10 and report.counts["over-long caption"] == sum(len(c.strip()) + 2 > 10 for c in CAPTIONS[:10])
    assert report.name == "pairs.csv" and report.fingerprint == source.fingerprint
    assert check(opened(root, "sequential"), limit=7).n == 7
