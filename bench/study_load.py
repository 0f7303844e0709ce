"""Two hundred participants at once on one study: the real server as a process, SQLite on the disk, real HTTP; how long an answer takes from the request to the reply.

python bench/study_load.py bench/results/study_load.json [--people 200] [--answers 20] [--think 2] [--db sqlite:///... | postgresql://...]

Each participant has a connection of its own, enrols, fetches each picture, thinks, and answers; the reply to an answer comes after its commit. Two runs: thinking `--think` seconds on average
(exponential), as quick people do, and not thinking at all, where everybody always waits for the server. Server and participants share this machine.
"""
import argparse
import asyncio
import json
import os
from pathlib import Path
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

from clip_lab.humans.design import demo_design, open_study, save_design
from clip_lab.humans.store import Store, answers_table


class Browser:
    "One keep-alive connection that speaks just enough HTTP to cost the machine little."
    def __init__(self, port: int): self.port, self.streams, self.key = port, None, None

    async def ask(self, method: str, path: str, body: dict | None = None) -> bytes:
        if self.streams is None: self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        data = b"" if body is None else json.dumps(body).encode()
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: study\r\n{key}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        reply = await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
        if " 200 " not in head.split("\r\n")[0]: raise RuntimeError(f"{method} {path}: {head.splitlines()[0]} {reply[:200]}")
        return reply


async def participant(port: int, answers: int, think: float, seed: int, times: list, acknowledged: list):
    chance, browser = random.Random(seed), Browser(port)
    await asyncio.sleep(chance.random() * max(think, 0.5))
    study = json.loads(await browser.ask("GET", "/api/study"))
    browser.key = study["key"]
    state = json.loads(await browser.ask("POST", "/api/enrol", {"consent": True}))
    for _ in range(answers):
        trial = state["trial"]
        await browser.ask("GET", f"/picture/{trial['picture']}.png")
        if think: await asyncio.sleep(chance.expovariate(1 / think))
        start = time.perf_counter()
        reply = await browser.ask("POST", "/api/answer", {"trial": trial["id"], "answer": chance.choice(study["choices"])["value"], "seconds": 0.0})
        times.append(time.perf_counter() - start)
        acknowledged.append((browser.key, trial["id"]))
        state = json.loads(reply)


async def crowd(port, people, answers, think):
    times, acknowledged, start = [], [], time.perf_counter()
    await asyncio.gather(*(participant(port, answers, think, seed, times, acknowledged) for seed in range(people)))
    return np.array(times), acknowledged, time.perf_counter() - start


def run(people: int, answers: int, think: float, db: str | None, ready: float = 15) -> dict:
    design = demo_design(participants=people)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
        s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]; s.close()
        url = db or f"sqlite:///{folder}/study.db"
        save_design(design, Path(folder) / "study.yaml")
        server = subprocess.Popen([sys.executable, "-m", "clip_lab.humans.web", "--study", f"{folder}/study.yaml", "--db", url, "--port", str(port), "--enrolments-per-minute", str(2 * people)], stdout=subprocess.DEVNULL)
        try:
            while True:
                try: asyncio.run(Browser(port).ask("GET", "/api/health")); break
                except OSError: time.sleep(0.2)
            time.sleep(ready)                       # the server makes its pictures ready
            times, acknowledged, wall = asyncio.run(crowd(port, people, answers, think))
        finally:
            server.kill(); server.wait()
        store = Store(url, open_study(design))
        table = answers_table(store)
        assert len(table) == len(acknowledged) == people * answers and table.participant.nunique() == people
        store.close()
    p50, p95, p99 = (round(1000 * float(x), 1) for x in np.quantile(times, [0.5, 0.95, 0.99]))
    return dict(people=people, answers=len(times), think_seconds=think, answers_per_second=round(len(times) / wall, 1), p50_ms=p50, p95_ms=p95, p99_ms=p99, max_ms=round(1000 * float(times.max()), 1), database=url.split(":")[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?")
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--answers", type=int, default=20)
    parser.add_argument("--think", type=float, default=2.0)
    parser.add_argument("--db")
    parser.add_argument("--short", action="store_true", help="ten people, two answers each, quickly")
    words = parser.parse_args()
    if words.short: words.people, words.answers, words.think = 10, 2, 0.1
    rows = [run(words.people, words.answers, think, words.db, 2 if words.short else 15) for think in (words.think, 0)[:1 if words.short else 2]]
    result = dict(machine=dict(cores=len(os.sched_getaffinity(0)), load_before=round(os.getloadavg()[0], 1), platform=platform.platform(), python=platform.python_version()), rows=rows)
    for row in rows: print(row)
    if words.output:
        Path(words.output).parent.mkdir(parents=True, exist_ok=True)
        Path(words.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
