"""A disk that is full or read-only: the error says so and names the file, what was there is unchanged, and with room again the work goes on. Shards that are missing or damaged are named."""
from contextlib import contextmanager
from pathlib import Path
import re
import subprocess

from conftest import fuzz, no_hang, tally
from hypothesis import given, strategies as st
from mutations import damage, damaged
import pandas as pd
import pytest
import torch

import nursery
from clip_lab.archives import read_tensors, write_tensors
from clip_lab.audits.card import read_audit, write_audit
from clip_lab.data.curate import curate
from clip_lab.embed import EmbeddingCache
from clip_lab.evals.results import Results
from clip_lab.images import preprocess
from clip_lab.pretrained import load, save
from clip_lab.train.checkpoints import Checkpoints
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
