"""kill -9 at random points: afterwards everything is readable, what was acknowledged is there, and the work goes on.

Half of the kills come before a random line of the library, the other half after a random time, which may be in the middle of a write. Both are drawn from the seed of the run.
"""
from itertools import chain
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import threading

from conftest import SEED, many, tally
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
import torch

import nursery
from clip_lab.archives import read_tensors
from clip_lab.audits.card import read_audit
from clip_lab.data.curate import CurateReport, open_shard
from clip_lab.embed import EmbeddingCache
from clip_lab.evals.results import Results
from clip_lab.model import CONFIGS
from clip_lab.train.checkpoints import Checkpoints
from clip_lab.train.config import read_config


class Nursery:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, nursery.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, kind: str, folder: Path, seed: int = 0, **death) -> tuple[dict, list]:
        "What became of a writer, and what it said."
        folder.mkdir(parents=True, exist_ok=True)
        said = folder.parent / "said.jsonl"
        for file in (said, Path(f"{said}.lines"), Path(f"{said}.error")): file.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps(dict(kind=kind, folder=str(folder), said=str(said), seed=seed, **death)) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        if found["code"] not in (0, -signal.SIGKILL): raise AssertionError(Path(f"{said}.error").read_text())
        return found, [json.loads(line) for line in said.read_text().splitlines()] if said.exists() else []


@pytest.fixture(scope="module")
def start():
    found = Nursery()
    yield found
    found.process.stdin.close()
    assert found.process.wait(60) == 0


def deaths(kind: str, whole: dict, n: int):
    "n ways to die within a run that takes as long as the whole one did."
    rng = np.random.default_rng([SEED, *kind.encode()])
    for i in range(n): yield dict(line=int(rng.integers(1, whole["lines"] + 1))) if i % 2 == 0 else dict(after=float(rng.uniform(0, whole["seconds"])))


def survived(kind: str, start, folder: Path, check, seed=lambda i: i, kills: tuple[int, int] = (3, 60), begin=lambda folder: None) -> None:
    "Kill a writer again and again in the same folder; check(folder, said, so far) after each."
    whole, _ = start(kind, folder.parent / "whole" / "here", seed=seed(0))
    assert whole["code"] == 0
    killed, before, i = 0, [], 0
    ways = deaths(kind, whole, 10 * many(*kills))
    while killed < many(*kills):
        begin(folder)
        found, said = start(kind, folder, seed=seed(i), **next(ways))
        i += 1
        check(folder, said, before)
        before += said
        if found["code"] == -signal.SIGKILL: killed += 1
        tally(f"kills, {kind}", "killed" if found["code"] else "finished first")
    return whole


def test_embedding_cache(start, tmp_path):
    def check(folder, said, before):
        if not (folder / "embeddings.sqlite").exists(): assert not said and not before; return
        store = EmbeddingCache(folder)
        items = sorted(store.items("scope"))
        assert items == [nursery.key_of(n) for n in range(len(items))] and len(items) % 4 == 0
        assert len(items) >= 4 * (max([*before, *said], default=-1) + 1)
        if items: assert torch.equal(store.get("scope", items), torch.cat([nursery.rows_of(n) for n in range(len(items))]))
    survived("cache", start, tmp_path / "x", check, kills=(3, 80))


def test_results(start, tmp_path):
    def check(folder, said, before):
        store, last = Results(folder), {}
        for question, edition in [*before, *said]: last[question] = edition
        for bundle in store:
            question, edition = int(bundle.asked["data"][4:]), round(bundle.rows.estimate[0] * 100_000)
            wanted = nursery.bundle_of(question, edition)
            assert bundle.id == wanted.id and (bundle.answers is None) == (wanted.answers is None)
            if bundle.answers is not None: pd.testing.assert_frame_equal(bundle.answers, wanted.answers)        # never the rows of one and the answers of another
            assert edition >= last.get(question, 0)           # what was acknowledged, or the one that was being written
        assert {int(b.asked["data"][4:]) for b in store} >= set(last)
    survived("results", start, tmp_path / "x", check, kills=(3, 80))


def test_answers_that_were_replaced_are_gone(start, tmp_path):
    for i in range(3): start("results", tmp_path / "x", seed=i)
    store = Results(tmp_path / "x")
    named = {json.loads(f.read_text())["answers"] for f in (tmp_path / "x").glob("*.json")}
    assert {f.name for f in (tmp_path / "x").glob("*.parquet")} == named - {None} and len(store.names()) == 4


def test_audit_report(start, tmp_path):
    def check(folder, said, before):
        told = [*before, *said]
        if not (folder / "report").exists() and not (folder / ".report.before").exists(): assert not told; return
        found = read_audit(folder / "report")           # the seal is checked
        edition = found.asked["edition"]
        assert edition >= max(told, default=0) and (found.tables["table0"].k == edition).all() and (folder / "report" / "index.html").read_text() == f"<p>{edition}</p>"
    survived("audits", start, tmp_path / "x", check, seed=lambda i: i + 1, kills=(3, 80))
    left = {f.name for f in (tmp_path / "x").iterdir()}
    assert left <= {"report", ".report.writing", ".report.before"}      # nothing piles up
    start("audits", tmp_path / "x", seed=10_000)
    assert {f.name for f in (tmp_path / "x").iterdir()} == {"report"}


def files(folder: Path) -> dict: return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_curation(start, tmp_path):
    inside = tmp_path / "a" / "x"
    inside.mkdir(parents=True)
    nursery.shards(tmp_path / "a" / "in"), nursery.shards(tmp_path / "a" / "whole" / "in")
    rounds = [0]
    def begin(folder):
        if (folder / "out" / "report.json").exists() and not (folder / "out" / ".work").exists():
            assert files(folder / "out") == wanted(), "a killed job ended with other bytes"
            shutil.rmtree(folder / "out")
            rounds[0] += 1
    def wanted(): return files(tmp_path / "a" / "whole" / "here" / "out")
    def check(folder, said, before):
        out = folder / "out"
        for file in out.glob("shards/*.parquet"):        # a shard that is there is whole
            assert list(open_shard(file, key_column="k").captions()) and file.read_bytes() == wanted()[f"shards/{file.name}"]
        if said or (out / "report.json").exists(): assert CurateReport.load(out).pairs_out > 0
    survived("curation", start, inside, check, begin=begin, kills=(3, 60))
    start("curation", inside)
    begin(inside)
    assert rounds[0] >= 1


def test_study(start, tmp_path):
    "Eight people answer over HTTP while the server dies again and again: what was acknowledged is there, once, and everybody gets to the end."
    for name in ("sqlalchemy", "starlette", "uvicorn", "httpx"): pytest.importorskip(name, reason="the study's server needs: pip install 'clip_lab[apps]'")
    from clip_lab.humans.store import Store, answers_table
    from test_study_web import Simulated, free_port
    planned, port, stop = nursery.study_of(), free_port(), threading.Event()
    killed, rounds, ways, people = 0, 0, iter([{}]), []
    def stored(folder):
        store = Store(f"sqlite:///{folder}/study.db", planned)
        table = answers_table(store)
        store.close()
        assert not table.duplicated(["participant", "trial"]).any()
        return {(row.seat, row.trial): row.answer for row in table.itertuples()}
    def acknowledged(): return {(int(trial[1:].split("-")[0]), trial): answer for p in people for trial, answer in list(p.acknowledged.items())}
    try:
        while killed < many(3, 60):
            folder = tmp_path / str(rounds) / "x"
            people[:] = [Simulated(port, 100 * rounds + i, stop) for i in range(planned.seats)]
            for person in people: person.start()
            while any(p.is_alive() for p in people):
                found, _ = start("study", folder, seed=port, **next(ways))
                if not rounds and found["lines"]: ways = chain(ways, deaths("study", found, 1000))       # the first one was left alone
                killed += found["code"] == -signal.SIGKILL
                tally("kills, study", "killed" if found["code"] else "finished first")
                told = acknowledged()           # nothing can be acknowledged while there is no server
                if told: assert told.items() <= stored(folder).items()
            assert not [p.problems for p in people if p.problems] and all(p.finished for p in people)
            assert acknowledged() == stored(folder) and len(acknowledged()) == sum(len(planned.trials(s)) for s in range(1, planned.seats + 1))
            for person in people: assert person.order == [t.id for t in planned.trials(int(person.order[0][1:].split("-")[0]))]
            tally("kills, study", "answers acknowledged, there once", len(acknowledged()))
            rounds += 1
    finally: stop.set()


@pytest.mark.slow
def test_training(start, tmp_path, monkeypatch):
    "After each kill the newest checkpoint is whole and no older than before; the runs that were killed end with the weights of the one that was not."
    monkeypatch.setitem(CONFIGS, "tiny", nursery.TINY)      # to read its settings here
    state, ended = {"step": 0}, [0]
    def weights(folder): return next((folder / "run").glob("*.safetensors"))
    def begin(folder):
        if (folder / "run").exists() and list((folder / "run").glob("*.safetensors")) and state.get("done"):
            assert {k: v.tolist() for k, v in load_file(weights(folder)).items()} == {k: v.tolist() for k, v in load_file(weights(tmp_path / "whole" / "here")).items()}
            shutil.rmtree(folder / "run")
            state.update(step=0, done=False)
            ended[0] += 1
    def check(folder, said, before):
        run, steps = folder / "run", [s for s in said if s != "done"]
        if not run.exists(): assert not said; return
        kept = Checkpoints(run / "checkpoints")
        newest = kept.steps()[-1] if kept.steps() else 0
        assert newest >= state["step"] and newest >= max(steps, default=0) // 2 * 2 - 2, "a checkpoint that was there is gone"
        for step in kept.steps():
            for file in kept.folder(step).rglob("*.safetensors"): assert read_tensors(file).tensors
            for file in kept.folder(step).rglob("*.bin"): assert torch.load(file, weights_only=True) is not None
        if (run / "config.yaml").exists(): assert read_config(run / "config.yaml").steps == 12
        elif steps: raise AssertionError("a run without its settings")
        lines = (run / "log.jsonl").read_text().split("\n") if (run / "log.jsonl").exists() else [""]
        for line in lines[:-1]: json.loads(line)
        state.update(step=newest, done="done" in said)
        for file in run.glob("*.safetensors"): assert read_tensors(file).tensors
    whole = survived("training", start, tmp_path / "x", check, seed=lambda i: 0, begin=begin, kills=(1, 50))
    while not state.get("done"):
        found, said = start("training", tmp_path / "x")
        check(tmp_path / "x", said, [])
    begin(tmp_path / "x")
    assert ended[0] >= 1
    tally("kills, training", "runs ended bit for bit as the unkilled one", ended[0])
