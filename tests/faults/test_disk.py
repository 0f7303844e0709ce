"""A disk that is full or read-only: the error says so and names the file, what was there is unchanged, and with room again the work goes on. Shards that are missing or damaged are named."""
from contextlib import contextmanager
from dataclasses import replace
import io
from pathlib import Path
import re
import shutil
import subprocess
import tarfile

from conftest import fuzz, no_hang, tally
from hypothesis import example, given, strategies as st
from mutations import damage, damaged
import pandas as pd
from PIL import Image
import pytest
import torch

import nursery
from clip_lab.archives import read_tensors, write_tensors
from clip_lab.audits.card import read_audit, write_audit
from clip_lab.audits.labels import label_set, read_labels, save_labels
from clip_lab.data.curate import curate
from clip_lab.data.readers import open_pairs
from clip_lab.embed import EmbeddingCache
from clip_lab.evals.results import Results
from clip_lab.images import preprocess
from clip_lab.pretrained import load, save
from clip_lab.train.__main__ import main
from clip_lab.train.checkpoints import Checkpoints
from clip_lab.train.config import TrainConfig, read_config, write_config
from clip_lab.model import build


@pytest.fixture
def disk(tmp_path):
    "A disk of two megabytes, in memory."
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode: pytest.skip(f"a small disk cannot be mounted here ({made.stderr.strip().splitlines()[-1]}); it takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    "Use up what room is left."
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True: file.write(bytes(size))
            except OSError: pass
    return folder / "filler"


@contextmanager
def read_only(folder: Path):
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try: yield
    finally: subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


def listing(folder: Path) -> dict: return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "filler"}


class Case:
    "Something that is written: how, how to look at it, and what it looks like afterwards."
    def __init__(self, write, read, names="", leaves=False): self.write, self.read, self.names, self.leaves = write, read, names, leaves


def put(folder, n): EmbeddingCache(folder / "c").put("scope", [nursery.key_of(n)], nursery.rows_of(n).expand(1, -1))
def big(n): return {f"t{i}": torch.full((64, 64), float(n)) for i in range(4)}
def tiny(n): return build(nursery.TINY, seed=n)
def step(folder, n): return Checkpoints(folder / "k", keep=1).write(n, lambda f: write_tensors(big(n), f / "weights.safetensors", {}))


CASES = {
    "embedding cache": Case(put, lambda f: EmbeddingCache(f / "c").get("scope", [nursery.key_of(1)])[0, 0].item(), "embeddings.sqlite", leaves=True),
    "results": Case(lambda f, n: Results(f / "r").save(nursery.bundle_of(1, n)), lambda f: float(round(next(iter(Results(f / "r"))).rows.estimate[0] * 100_000)), "r/"),
    "audit": Case(lambda f, n: write_audit(nursery.audit_of(n), f / "a", **{"index.html": "x" * 5000}), lambda f: float(read_audit(f / "a").asked["edition"]), "disk/a"),
    "weights": Case(lambda f, n: write_tensors(big(n), f / "w.safetensors", {}), lambda f: read_tensors(f / "w.safetensors").tensors["t0"][0, 0].item(), "w.safetensors"),
    "model": Case(lambda f, n: save(tiny(n), preprocess(32), f / "m.safetensors"), lambda f: float([n for n in (1, 2) if torch.equal(load(f / "m.safetensors")[0].visual.proj, tiny(n).visual.proj)][0]), "m.safetensors"),
    "label set": Case(lambda f, n: save_labels(replace(label_set("paper-21"), version=str(n)), f / "l.yaml"), lambda f: float(read_labels(f / "l.yaml").version), "l.yaml"),
    "run settings": Case(lambda f, n: write_config(TrainConfig(seed=n), f / "config.yaml"), lambda f: float(read_config(f / "config.yaml").seed), "config.yaml"),
    "checkpoint": Case(step, lambda f: read_tensors(Checkpoints(f / "k").newest() / "weights.safetensors").tensors["t0"][0, 0].item(), "(checkpoint of step 2|writing-00000002)"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_full_disk(disk, name):
    case = CASES[name]
    case.write(disk, 1)
    before, filler = listing(disk), fill(disk)
    with pytest.raises(OSError, match=case.names) as told: case.write(disk, 2)
    assert any(w in str(told.value).lower() for w in ("space", "full", "storage")), told.value
    filler.unlink()
    if not case.leaves: assert listing(disk) == before
    assert case.read(disk) == 1
    case.write(disk, 2)
    assert case.read(disk) == (1 if name == "embedding cache" else 2)
    tally(f"full disk, {name}", "said so, lost nothing, went on")


@pytest.mark.parametrize("name", CASES)
def test_a_read_only_disk(disk, name):
    case = CASES[name]
    case.write(disk, 1)
    before = listing(disk)
    with read_only(disk):
        with pytest.raises(OSError, match="(?i)read-?only|unable to open") as told: case.write(disk, 2)
        assert re.search(case.names, str(told.value))
        if name != "embedding cache": assert case.read(disk) == 1
    assert listing(disk) == before and case.read(disk) == 1
    tally(f"read-only disk, {name}", "said so, lost nothing")


def test_a_full_disk_in_the_middle_of_a_curation(disk, tmp_path):
    shards, queries = nursery.shards(tmp_path / "in"), pd.DataFrame(dict(query=["cat", "dog"], sources="words"))
    wanted = curate(shards, queries, tmp_path / "whole", t=15, key_column="k")
    curate(shards[:1], queries, disk / "first", t=15, key_column="k")
    filler = fill(disk)
    with pytest.raises(OSError, match="(?i)space"): curate(shards, queries, disk / "out", t=15, key_column="k")
    filler.unlink()
    found = curate(shards, queries, disk / "out", t=15, key_column="k")
    assert listing(disk / "out") == listing(tmp_path / "whole") and found.pairs_out == wanted.pairs_out
    tally("full disk, curation", "said so, went on to the same bytes")


@fuzz(40, 2000)
@given(changes=damage(4), which=st.integers(0, 2))
def test_a_damaged_shard_is_named(tmp_path_factory, changes, which):
    folder = tmp_path_factory.mktemp("shards")
    shards, queries = nursery.shards(folder / "in"), pd.DataFrame(dict(query=["cat", "dog"], sources="words"))
    whole = shards[which].read_bytes()
    shards[which].write_bytes(damaged(whole, changes))
    with no_hang():
        try: curate(shards, queries, folder / "out", t=15, key_column="k")
        except (ValueError, OSError) as error:
            assert shards[which].name in str(error)
            tally("damaged shard", "named")
        else: tally("damaged shard", "read all the same")


def test_a_missing_shard_is_named(tmp_path):
    shards = nursery.shards(tmp_path / "in")
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match="no such shard: .*s1.parquet"): curate(shards, pd.DataFrame(dict(query=["cat"], sources="words")), tmp_path / "out", key_column="k")
    tally("missing shard", "named")


# ---- what training reads

def picture(n: int) -> bytes:
    Image.new("RGB", (8, 8), (n, 99, 200)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "Thirty pairs in three shards, as webdataset and as parquet."
    folder = tmp_path_factory.mktemp("pairs")
    for shard in range(3):
        numbers = range(10 * shard, 10 * shard + 10)
        pd.DataFrame(dict(image=[picture(n) for n in numbers], caption=[f"number {n}" for n in numbers])).to_parquet(folder / f"p{shard}.parquet")
        with tarfile.open(folder / f"w{shard}.tar", "w") as tar:
            for n in numbers:
                for name, data in ((f"{n:03}.png", picture(n)), (f"{n:03}.txt", f"number {n}".encode())):
                    (entry := tarfile.TarInfo(name)).size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


def pairs_in(location, kind: str) -> list:
    source = open_pairs(location, kind=kind)
    return [p for j in range(len(source.shards)) for p in source.iter_shard(j)] if kind == "stream" else [source[i] for i in range(len(source))]


def told(pair) -> tuple: return pair.image, pair.caption


@fuzz(80, 4000)
@given(changes=damage(4), which=st.integers(0, 2), kind=st.sampled_from(["shards", "stream", "parquet"]))
@example(changes=[("flip", 0.203125, 128)], which=1, kind="parquet")      # found by the long form: a caption that is not UTF-8
def test_a_damaged_training_shard_is_named(pairs, tmp_path_factory, changes, which, kind):
    "Or it is read, with as many pairs as before; the pairs of the other shards are as they were. What is damaged within a picture shows when it is decoded; within a caption, a tar has nothing to check it with."
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.copytree(pairs, folder, dirs_exist_ok=True)
    letter, suffix = ("p", "parquet") if kind == "parquet" else ("w", "tar")
    (file := folder / f"{letter}{which}.{suffix}").write_bytes(damaged(file.read_bytes(), changes))
    with no_hang():
        try: found = pairs_in(str(folder / f"{letter}*.{suffix}"), kind)
        except (ValueError, OSError) as error: assert file.name in str(error), error; tally(f"damaged training shard, {kind}", "named")
        else:
            whole = pairs_in(str(pairs / f"{letter}*.{suffix}"), kind)
            assert len(found) == len(whole) == 30
            assert [told(p) for i, p in enumerate(found) if i // 10 != which] == [told(p) for i, p in enumerate(whole) if i // 10 != which]
            tally(f"damaged training shard, {kind}", "read all the same" if [*map(told, found)] == [*map(told, whole)] else "read, with other bytes in a picture or caption")


@pytest.mark.parametrize("what", ["missing", "cut", "a page instead", "empty"])
@pytest.mark.parametrize("form", ["w{0..2}.tar", "p{0..2}.parquet"])
def test_a_training_run_says_which_shard(pairs, tmp_path, capsys, what, form):
    folder = tmp_path / "in"
    shutil.copytree(pairs, folder)
    bad = folder / form.replace("{0..2}", "1")
    if what == "missing": bad.unlink()
    else: bad.write_bytes({"cut": bad.read_bytes()[:1500], "a page instead": b"<html>404</html>" * 100, "empty": b""}[what])
    code = main(["--data", str(folder / form), "--output", str(tmp_path / "run"), "--batch-size", "4", "--steps", "2", "--warmup", "1", "--cpu"])
    said = capsys.readouterr().err
    assert code == 1 and bad.name in said and said.count("\n") < 5, said
    assert not list(tmp_path.rglob("*.safetensors"))
    tally("training on a bad shard", f"{what}: named")
