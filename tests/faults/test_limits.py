"""A machine without room for a batch, and a clock that jumps: the error names the setting, and nothing depends on what time it is."""
from datetime import datetime, timedelta, timezone
import json
import os
from pathlib import Path
import subprocess
import sys
import time

from conftest import SEED, many, tally
import numpy as np
from PIL import Image
import pytest
import torch

import clip_lab
from clip_lab.data.loader import BadDataError
from clip_lab.embed import EmbeddingCache, embed_images, embed_texts, memory_for
from clip_lab.evals.results import Results
from clip_lab.model import CONFIGS
from clip_lab.train.checkpoints import Checkpoints
from clip_lab.train.config import TrainConfig, lighter
from clip_lab.train.loop import train
import nursery


# ---- memory

CHILD = """
import os, resource, sys
from PIL import Image
import clip_lab
from clip_lab.embed import embed_images, embed_texts
from clip_lab.train.__main__ import main
import torch
torch.set_num_threads(1)
model, preprocess = clip_lab.load()
pictures, texts = [Image.new("RGB", (8, 8))] * 500, [f"a picture of number {i} and many other words" for i in range(20_000)]
embed_images(model, preprocess, pictures[:2], progress=False), embed_texts(model, texts[:2], progress=False)
def limited(mib, what):
    room = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + mib * 2 ** 20
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    try: print(what())
    except MemoryError as error: print("MemoryError:", error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
limited(200, lambda: embed_images(model, preprocess, pictures, batch_size=500, progress=False).ok.all())
limited(200, lambda: embed_images(model, preprocess, pictures[:100], batch_size=10, progress=False).ok.all().item())
limited(200, lambda: len(embed_texts(model, texts, batch_size=20_000, progress=False)))
limited(500, lambda: main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is limited by way of /proc and setrlimit, as on Linux")
def test_what_does_not_fit_says_which_setting(tmp_path):
    "A process that may not grow by more than so much. The same pictures in smaller batches fit."
    words = ["--output", tmp_path / "run", "--batch-size", "512", "--steps", "2", "--warmup", "1", "--styles", "noto", "--clipart-share", "0", "--precision", "no", "--cpu", "--ema", "0"]
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, words)], capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    told = done.stdout.splitlines()
    assert [line.split(" (")[0] for line in told] == ["MemoryError: a batch of 500 pictures did not fit into memory; lower batch_size", "True", "MemoryError: a batch of 20000 texts did not fit into memory; lower batch_size", "1"], done.stdout + done.stderr[-2000:]
    assert "a step with 512 pairs did not fit into memory; raise accumulate above 1" in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    tally("no memory, embedding", "said which setting", 2), tally("no memory, training", "said which settings")


def test_a_device_without_memory_is_told_the_same_way(monkeypatch):
    model, preprocess = clip_lab.load()
    pictures = [Image.new("RGB", (8, 8))] * 3
    def raising(error):
        def encode(*_, **__): raise error
        return encode
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), MemoryError()):
        monkeypatch.setattr(model, "encode_image", raising(error)), monkeypatch.setattr(model, "encode_text", raising(error))
        with pytest.raises(MemoryError, match="a batch of 2 pictures did not fit into memory; lower batch_size"): embed_images(model, preprocess, pictures, batch_size=2, progress=False)
        with pytest.raises(MemoryError, match="a batch of 5 texts did not fit into memory; lower batch_size"): embed_texts(model, ["a cat"], batch_size=5, progress=False)
        tally("no memory, embedding", "said which setting", 2)
    monkeypatch.setattr(model, "encode_image", raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="^mat1 and mat2"): embed_images(model, preprocess, pictures, progress=False)
    with pytest.raises(BadDataError, match="^as it was"), memory_for("x", "y"): raise BadDataError("as it was")


def test_the_advice_leaves_out_what_is_done_already():
    first, last = TrainConfig(precision="no"), TrainConfig(accumulate=8, recompute=True, chunk=256, batch_size=64)
    for word in ("accumulate above 1", "recompute", "set chunk", "precision bf16", "batch_size below 512"): assert word in lighter(first)
    for word in ("recompute", "chunk", "precision"): assert word not in lighter(last)
    assert "accumulate above 8" in lighter(last) and "batch_size below 64" in lighter(last)


# ---- clocks

class Jumping:
    "A clock that jumps by up to a year, back or forth, at every look."
    def __init__(self, seed: int): self.random, self.looks = np.random.default_rng([SEED, seed]), 0
    def seconds(self) -> float:
        self.looks += 1
        return 1_700_000_000 + float(self.random.choice([self.random.uniform(-3e7, 3e7), self.random.uniform(-5, 5), 0]))
    def moment(self) -> datetime: return datetime.fromtimestamp(self.seconds(), timezone.utc)


@pytest.mark.parametrize("seed", range(many(2, 20)))
def test_a_study_on_a_clock_that_jumps(tmp_path, monkeypatch, seed):
    "Answers are kept once, in order, by nobody but their person; no time is negative; everything can be exported. A seat may be given away early, which is told."
    pytest.importorskip("sqlalchemy")
    from clip_lab.humans import store as storing
    from clip_lab.humans.design import demo_design, open_study
    from clip_lab.humans.exports import EXPORTS
    clock = Jumping(seed)
    monkeypatch.setattr(storing, "_now", clock.moment)
    study = open_study(demo_design(classes=("Japan", "Canada"), obvious=(), pictures_per_participant=2, repeats=3, practice=1))
    store = storing.Store(f"sqlite:///{tmp_path}/study.db", study)
    kept, moved = {}, 0
    keys = [store.ticket() for _ in range(study.seats + 2)]
    people = {}
    for key in keys:
        try: people[key] = store.enrol(key)
        except storing.Refused as told: assert told.kind == "full"
    assert len(people) >= study.seats
    for turn in range(1000):
        open_ = [key for key, person in people.items() if person and person.current]
        if not open_: break
        key = open_[int(clock.random.integers(len(open_)))]
        trial, answer, how = people[key].current, str(clock.random.choice(study.classes)), clock.random.integers(8)
        try:
            if how == 0: people[key] = store.come_back(key)
            else:
                people[key] = store.answer(key, trial.id, answer, seconds=[None, 1.5, -1.0, 1e9][int(how) % 4])
                kept[people[key].id, trial.id] = answer
        except storing.Refused as told:
            assert told.kind == "gone", told
            people[key], moved = None, moved + 1
    table = storing.answers_table(store)
    assert {(r.participant, r.trial): r.answer for r in table.itertuples()} == kept and len(table) == len(kept)
    assert (table.seconds >= 0).all() and np.isfinite(table.seconds).all() and set(table.timed_by) <= {"browser", "server"}
    progress = storing.people_table(store)
    assert (progress.minutes >= 0).all() and (storing.recruitment(store)[["free", "active", "silent", "finished", "left"]] >= 0).all(axis=None)
    storing.balance_table(store)
    for name, (_, _, make) in EXPORTS.items(): assert make(store) is not None, name
    assert clock.looks > 20
    store.close()
    tally("clock jumps, study", "answers kept once, no time negative", len(kept))
    if moved: tally("clock jumps, study", "a place given away early, and told", moved)


def test_the_stores_do_not_look_at_the_clock(tmp_path, monkeypatch):
    clock = Jumping(100)
    monkeypatch.setattr(time, "time", clock.seconds)
    cache, results, points = EmbeddingCache(tmp_path / "c"), Results(tmp_path / "r"), Checkpoints(tmp_path / "k", keep=2)
    for n in range(6):
        cache.put("scope", [nursery.key_of(n)], nursery.rows_of(n))
        results.save(nursery.bundle_of(1, n + 1))
        points.write(n, lambda f: (f / "x").write_text(str(n)))
        for file in tmp_path.rglob("*"): os.utime(file, (clock.seconds(), clock.seconds()))
    assert cache.get("scope", [nursery.key_of(n) for n in range(6)])[:, 0].tolist() == list(range(6))
    assert round(next(iter(results)).rows.estimate[0] * 100_000) == 6 and points.steps() == [4, 5] and (points.newest() / "x").read_text() == "5"
    tally("clock jumps, cache, results, checkpoints", "the newest is the last one written")


def test_training_on_a_clock_that_jumps(tmp_path, monkeypatch):
    "Speeds are positive numbers, and a run goes on from its last step, whatever the dates of its files."
    monkeypatch.setitem(CONFIGS, "tiny", nursery.TINY)
    clock = Jumping(200)
    monkeypatch.setattr(time, "time", clock.seconds)
    config = nursery.settings(tmp_path, steps=6)
    def stop(line):
        if line["step"] == 5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(config, report=stop)
    for file in (tmp_path / "run").rglob("*"): os.utime(file, (clock.seconds(), clock.seconds()))
    again = []
    assert train(config, resume=True, report=lambda line: again.append(line["step"])).exists() and again == [5, 6]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [l["step"] for l in lines] == list(range(1, 7)) and all(0 < l["pairs_per_s"] < float("inf") for l in lines)
    tally("clock jumps, training", "went on from the last step")


def test_times_are_measured_by_a_clock_that_cannot_jump():
    "time.time is for dates alone; what lasts is measured by the monotonic clock."
    import ast
    from conftest import ROOT
    allowed = {"clip_lab/humans/web.py": 2}            # until when the researcher's login holds, which is a date
    found = {}
    for file in [*(ROOT / "clip_lab").rglob("*.py"), *(ROOT / "apps").glob("*.py")]:
        text = file.read_text()
        if n := "time.time" in text and sum(isinstance(node, ast.Call) and ast.unparse(node.func) == "time.time" for node in ast.walk(ast.parse(text))):
            found[file.relative_to(ROOT).as_posix()] = n
    assert found == allowed
