"""Writers that are killed: a process that has imported everything, and forks a child for each line it is told.

A line is JSON: {"kind": a writer below, "folder": where it writes, "said": the file where it says what is done, "seed", "line": kill it before so many lines of clip_lab have run, "after": or after so many seconds}.
The answer is a line: {"code": exit code or minus the signal, "lines": lines run, "seconds"}. What a writer says, it says after the library returned: that is what must be there afterwards.
"""
from functools import lru_cache
import io
import json
import os
from pathlib import Path
import signal
import sys
import threading
import time

import numpy as np
import pandas as pd
from PIL import Image
import torch

import clip_lab
from clip_lab.audits.card import Audit, write_audit
from clip_lab.data import curate as curating
from clip_lab.embed import EmbeddingCache
from clip_lab.evals.results import ROWS, Bundle, Results
from clip_lab.model import CONFIGS, CLIPConfig
from clip_lab.train.config import TrainConfig
from clip_lab.train.loop import train

TINY = CLIPConfig("tiny", 16, 32, 1, 64, 16, context_length=32, vocab_size=600, text_width=64, text_heads=1, text_layers=1)
HOME = str(Path(clip_lab.__file__).parent)


# ---- what is written: each is a function of (folder, say, seed) that goes on where a killed one stopped

def rows_of(n: int) -> torch.Tensor: return torch.tensor([[float(n)] * 64])
def key_of(n: int) -> bytes: return n.to_bytes(32, "big")


def cache(folder, say, seed):
    store = EmbeddingCache(folder)
    start = store.count() // 4
    for batch in range(start, start + 12):
        numbers = range(4 * batch, 4 * batch + 4)
        store.put("scope", [key_of(n) for n in numbers], torch.cat([rows_of(n) for n in numbers]))
        say(batch)


def bundle_of(question: int, edition: int) -> Bundle:
    rows = pd.DataFrame([dict(zip(ROWS, ["all", "accuracy", edition / 100_000, 0.0, 1.0, 50, 0.1]))])
    answers = None if edition % 3 == 0 else pd.DataFrame(dict(picture=np.arange(50), label="a", answer="b", rank=edition))
    return Bundle(dict(task="zero-shot", model="tiny", weights_hash="0", data=f"set {question}", data_hash="1", target="t"), rows, answers)


def results(folder, say, seed):
    store, rng = Results(folder), np.random.default_rng(seed)
    for edition in range(12 * seed + 1, 12 * seed + 13):       # later ones are larger
        question = int(rng.integers(4))
        store.save(bundle_of(question, edition))
        say([question, edition])


def audit_of(edition: int) -> Audit:
    table = pd.DataFrame(dict(group=[f"g{i}" for i in range(40)], k=edition, n=100))
    return Audit(dict(edition=edition), {f"table{i}": table for i in range(4)}, (f"edition {edition}",), dict(version="1", at="now"))


def audits(folder, say, seed):
    for edition in range(seed * 10, seed * 10 + 6):
        write_audit(audit_of(edition), folder / "report", **{"index.html": f"<p>{edition}</p>"})
        say(edition)


def shards(folder: Path) -> list[Path]:
    "Three small tables of captions; made once."
    folder.mkdir(parents=True, exist_ok=True)
    words = ["cat", "dog", "house", "tree", "sea", "unheard"]
    for i in range(3):
        file, rng = folder / f"s{i}.parquet", np.random.default_rng(i)
        if not file.exists(): pd.DataFrame(dict(caption=[" ".join(rng.choice(words, 2)) for _ in range(60)], k=[f"{i}-{j}" for j in range(60)])).to_parquet(file)
    return sorted(folder.glob("*.parquet"))


def curation(folder, say, seed):
    queries = pd.DataFrame(dict(query=["cat", "dog", "house", "tree", "sea"], sources="words"))
    report = curating.curate(shards(folder.parent / "in"), queries, folder / "out", t=15, key_column="k")
    say(report.pairs_out)


def pairs(folder: Path) -> Path:
    "A table of forty pictures and captions; made once."
    folder.mkdir(parents=True, exist_ok=True)
    if not (table := folder / "pairs.csv").exists():
        for i in range(40): Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        table.write_text("image,caption\n" + "".join(f"{i}.png,a picture of number {i}\n" for i in range(40)))
    return table


def settings(folder: Path, **more) -> TrainConfig:
    return TrainConfig(model="tiny", data=str(pairs(folder.parent / "pairs")), output=folder / "run", warmup=1, batch_size=8, precision="no", save_every=2, log_every=1, cpu=True, **more)


def training(folder, say, seed):
    CONFIGS["tiny"] = TINY       # in the child alone
    config = settings(folder, steps=12)
    train(config, resume=True, report=lambda line: say(line["step"]))
    say("done")


PEOPLE = dict(classes=("Brazil", "Canada", "Japan", "United Kingdom"), obvious=(), shots=(0, 1), pictures_per_participant=8, practice=1, participants=8)


@lru_cache
def study_of():
    "The study that is served; opened before the first child, with all that a server imports."
    import alembic.runtime.migration, clip_lab.humans.web, sqlalchemy.dialects.sqlite, uvicorn.lifespan.on, uvicorn.protocols.http.auto      # noqa: F401
    from clip_lab.humans.design import demo_design, open_study
    return open_study(demo_design(**PEOPLE))


def study(folder, say, seed):
    "The participants' server on port `seed`; it leaves by itself after forty answers, or three seconds without one."
    import uvicorn
    from clip_lab.humans.store import Store
    from clip_lab.humans.web import study_app
    store = Store(f"sqlite:///{folder}/study.db", study_of())
    server = uvicorn.Server(uvicorn.Config(study_app(store, "the token of these tests", enrolments=1000), host="127.0.0.1", port=seed, log_level="error", access_log=False))
    answer, given, last = store.answer, [0], [time.monotonic()]
    def counted(*arguments):
        found = answer(*arguments)
        given[0], last[0] = given[0] + 1, time.monotonic()
        return found
    store.answer = counted
    def watch():
        while given[0] < 40 and time.monotonic() < last[0] + 3: time.sleep(0.02)
        server.should_exit = True
    threading.Thread(target=watch, daemon=True).start()
    server.run()


WRITERS = dict(cache=cache, results=results, audits=audits, curation=curation, training=training, study=study)


# ---- life and death

def live(order: dict) -> None:
    "The child: write, and die when it is time."
    said = os.open(order["said"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    def say(what): os.write(said, (json.dumps(what) + "\n").encode())
    count, last = [0], order.get("line")
    def line(frame, event, arg):
        if event == "line":
            count[0] += 1
            if last and count[0] >= last: os.kill(os.getpid(), signal.SIGKILL)
        return line
    def call(frame, event, arg): return line if frame.f_code.co_filename.startswith(HOME) else None
    threading.settrace(call)      # threads that begin later
    sys.settrace(call)
    try: WRITERS[order["kind"]](Path(order["folder"]), say, order["seed"])
    finally:
        sys.settrace(None)
        Path(order["said"] + ".lines").write_text(str(count[0]))


def tend(order: dict) -> dict:
    "Fork, wait, kill where the order says so."
    if order["kind"] == "study": study_of()
    start = time.monotonic()
    if not (child := os.fork()):
        code = 1
        try: live(order); code = 0
        except BaseException:
            import traceback
            Path(order["said"] + ".error").write_text(traceback.format_exc())
        finally: os._exit(code)
    if (after := order.get("after")) is not None:
        time.sleep(after)
        try: os.kill(child, signal.SIGKILL)
        except ProcessLookupError: pass
    status = os.waitpid(child, 0)[1]
    lines = Path(order["said"] + ".lines")
    return dict(code=os.waitstatus_to_exitcode(status), lines=int(lines.read_text()) if lines.exists() else None, seconds=time.monotonic() - start)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    for text in sys.stdin: print(json.dumps(tend(json.loads(text))), flush=True)
