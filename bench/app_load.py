"""An app under load: so many people at once, over the HTTP that its pages use, for a set time.

    python bench/app_load.py apps/zeroshot.py bench/results/load_zeroshot.json                     # 50 people, 60 seconds
    python bench/app_load.py apps/bias.py bench/results/load_bias.json --seconds 300
    python bench/app_load.py apps/human.py bench/results/load_human.json --seconds 300

zeroshot, bias: everybody has a session, a picture and labels of their own, sends the next request when the last one is answered, and checks that the answer is about what they asked; in the bias app they also pin a view as A,
and check that it stays theirs. human: everybody takes part in a study of its own database, thinks for a second on average, and enrols again when done; the last of them is the researcher, who opens the pages behind the token.
Meanwhile somebody else opens the first page, once a second. An error, or an answer that is somebody else's, makes the exit code 1.
Reported are the times from question to answer, in seconds, and the memory of the app's process as it goes. Both depend on the machine, and nothing here judges them.
"""
import argparse
import asyncio
from collections import Counter, defaultdict
from html import escape
import io
import json
import os
from pathlib import Path
import platform
import random
import secrets
import socket
import subprocess
import sys
from tempfile import TemporaryDirectory
import time

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


# ---- what is asked: (values by place in the endpoint's inputs, what its answer must hold)

def ask_zeroshot(user: int, turn: int, picture: dict) -> tuple[dict, list[str]]:
    own = f"thing {user} of {turn % 7}"
    return {0: picture, 1: f"a cat\na house\n{own}"}, [f">{own}<", f"picture = 'user{user}.png'"]


def ask_bias(user: int, turn: int, picture: dict) -> tuple[dict, list[str]]:
    share = (1 + user) / 100 + (turn % 5) / 1000          # as nobody else has; everybody pins the first one
    return {2: round(100 * share, 4)}, [f"threshold={round(share, 6):g}"] * (turn % 5 > 0 or user != 3) + [f"threshold {1 + user:.3g}\u00a0%"] * (turn > 0)      # 4 % is the usual one, and not written out


# ---- one app, one user

def start(app: Path, *words: str) -> tuple[subprocess.Popen, str]:      # words: for its command line
    "The app in a process of its own, answering; and its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = open(os.devnull, "w")
    if app.stem == "human": words = ("--port", str(port), *words)
    process = subprocess.Popen([sys.executable, str(app), *words], env=os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        if process.poll() is not None: raise RuntimeError(f"{app} ended with code {process.returncode} before it answered")
        try:
            if httpx.get(url, timeout=5).status_code == 200: return process, url
        except httpx.HTTPError: time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"{app} did not answer within two minutes")


async def upload(client: httpx.AsyncClient, user: int) -> dict:
    Image.new("RGB", (120, 90), (user * 37 % 256, user * 91 % 256, 120)).save(file := io.BytesIO(), "PNG")
    reply = await client.post("/gradio_api/upload", files={"files": (f"user{user}.png", file.getvalue(), "image/png")})
    reply.raise_for_status()
    return {"path": reply.json()[0], "meta": {"_type": "gradio.FileData"}}


async def ask(client: httpx.AsyncClient, name: str, data: list, session: str) -> tuple[str, str]:
    "(last event, its data): 'complete' and what the page would show, or 'error'."
    sent = await client.post(f"/gradio_api/call/{name}", content=json.dumps({"data": data, "session_hash": session}), headers={"Content-Type": "application/json"})
    if sent.status_code != 200: return f"HTTP {sent.status_code}", sent.text[:200]
    event, last = "nothing", ""
    async with client.stream("GET", f"/gradio_api/call/{name}/{sent.json()['event_id']}") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("event:"): event = line[6:].strip()
            elif line.startswith("data:"):
                last = line[5:].strip()          # and on to the end of the stream, as a page does
    return event, last


async def asked_once(url: str, app: str) -> str:
    "The first question of a visitor, and its answer."
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        if app == "human":
            key = (await client.get("/api/study")).json()["key"]
            return (await client.post("/api/enrol", json={"consent": True}, headers={"Authorization": f"Bearer {key}"})).raise_for_status().text
        name, question = (MAIN[app], ask_zeroshot if app == "zeroshot" else ask_bias)
        info = (await client.get("/gradio_api/info")).json()["named_endpoints"][f"/{name}"]
        values, expected = question(0, 0, await upload(client, 0))
        event, answer = await ask(client, name, [values.get(i, p.get("parameter_default")) for i, p in enumerate(info["parameters"])], "first")
        said = "\n".join(map(str, json.loads(answer))) if event == "complete" else ""
        if any(e not in said for e in expected): raise RuntimeError(f"{app}: {event}: {answer[:200]}")
        return answer


def first(app: str, url: str) -> str: return asyncio.run(asked_once(url, app))


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try: process.wait(30)
    except subprocess.TimeoutExpired: process.kill(); process.wait()


class Seen:
    "What everybody notes together: times by what was asked for, what went wrong, memory."
    def __init__(self, seconds: float):
        self.began, self.until = time.monotonic(), time.monotonic() + seconds
        self.times, self.wrong, self.rss = defaultdict(list), Counter(), []

    @property
    def on(self) -> bool: return time.monotonic() < self.until

    async def timed(self, kind: str, asking):
        "What `asking` gives, its time noted; None, and the fault noted, where it fails."
        began = time.monotonic()
        try: return await asking
        except (httpx.HTTPError, ValueError, KeyError) as error: self.wrong[f"{kind}: {error!r:.100}"] += 1
        finally: self.times[kind].append(time.monotonic() - began)


async def visitor(url: str, user: int, name: str, question, seen: Seen, pin: str | None = None) -> None:      # pin: the endpoint that pins what is seen
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        info = (await client.get("/gradio_api/info")).json()["named_endpoints"][f"/{name}"]
        try: picture = await upload(client, user)
        except httpx.HTTPError as error: seen.wrong[f"upload: {error!r:.100}"] += 1; return
        turn, session = 0, f"load{user:05}"
        while turn == 0 or seen.on:          # everybody asks at least once, however slow the machine
            values, expected = question(user, turn, picture)
            data = [values.get(i, p.get("parameter_default")) for i, p in enumerate(info["parameters"])]
            event, answer = await seen.timed(name, ask(client, name, data, session)) or ("nothing", "")
            said = "\n".join(map(str, json.loads(answer))) if event == "complete" else ""
            if event != "complete": seen.wrong[f"{event}: {answer[:100]}"] += 1
            elif lost := [e for e in expected if e not in said]: seen.wrong[f"an answer without {lost[0]!r}"] += 1
            if pin and turn == 0: await ask(client, pin, [], session)
            turn += 1
            await asyncio.sleep(random.Random(user * 1000 + turn).uniform(0, 0.05))


async def participant(url: str, user: int, think: float, seen: Seen) -> None:
    "One study after another: what the page would send, with a thought before every answer; the server must never lose count."
    chance = random.Random(user)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        async def post(path, **body):
            reply = await client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
            if reply.status_code != 200: raise ValueError(f"HTTP {reply.status_code} {reply.text[:80]}")
            return reply.json()
        while seen.on:
            await asyncio.sleep(chance.random() * think)
            study = await seen.timed("page", client.get("/api/study"))
            key, done = study.json()["key"], 0
            state = who = await seen.timed("enrol", post("/api/enrol", consent=True))
            while state and state["trial"] and seen.on:
                trial = state["trial"]
                await seen.timed("picture", client.get(f"/picture/{trial['picture']}.png"))
                await asyncio.sleep(chance.expovariate(1 / think) if think else 0)
                answer = (trial["instructed"] or chance.choice(study.json()["choices"]))["value"]
                state, done = await seen.timed("answer", post("/api/answer", trial=trial["id"], answer=answer, seconds=0.0)), done + 1
                if state and (state["done"], state["participant"], state["delete_code"]) != (done, who["participant"], who["delete_code"]): seen.wrong["an answer about somebody else"] += 1


async def researcher(url: str, token: str, study: str, seen: Seen) -> None:
    "The pages behind the token: how the study stands, the results, a file; nobody else's cookie opens them."
    async with httpx.AsyncClient(base_url=f"{url}/researcher", timeout=600) as client:
        if (await client.get("/")).status_code != 401: seen.wrong["the researcher's page without a token"] += 1
        await client.post("/login", json={"token": token}, headers={"Origin": url})
        turn = 0
        while seen.on:
            page = await seen.timed("researcher", client.get("/"))
            if page is None or page.status_code != 200 or study not in page.text: seen.wrong["the researcher's page"] += 1
            event, answer = await seen.timed("state", ask(client, "state", [], "researcher")) or ("nothing", "")
            if event != "complete" or "seats finished" not in answer: seen.wrong[f"state: {event} {answer[:100]}"] += 1
            if turn % 4 == 1:
                event, answer = await seen.timed("results", ask(client, "results", [True, "emoji"], "researcher")) or ("nothing", "")
                if event != "complete" or "Interim" not in answer and "No study trial" not in answer: seen.wrong[f"results: {event} {answer[:100]}"] += 1
            if turn % 4 == 3:
                file = await seen.timed("export", client.get("/export/answers.csv"))
                if file is None or file.status_code != 200: seen.wrong["export"] += 1
            turn += 1
            await asyncio.sleep(min(10, max(seen.until - time.monotonic(), 0)))         # as often as the page asks by itself


async def opener(url: str, seen: Seen) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        while seen.on:
            page = await seen.timed("page", client.get("/"))
            if page is None or page.status_code != 200: seen.wrong["the page"] += 1
            await asyncio.sleep(1)


def memory(pid: int) -> float | None:
    "Resident MiB of a process, where the system tells."
    try: return next(int(line.split()[1]) / 1024 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    except (OSError, StopIteration): return None


async def watch(pid: int, seen: Seen) -> None:
    while seen.on:
        seen.rss.append((time.monotonic() - seen.began, memory(pid)))
        await asyncio.sleep(0.5)
    seen.rss.append((time.monotonic() - seen.began, memory(pid)))


def people(app: str, url: str, users: int, seen: Seen, think: float = 1, token: str = "", study: str = "") -> list:
    "Everybody who comes to an app, as coroutines."
    if app == "zeroshot": return [visitor(url, user, "answer", ask_zeroshot, seen) for user in range(users)]
    if app == "bias": return [visitor(url, user, "view", ask_bias, seen, pin="pin") for user in range(users)]
    return [*(participant(url, user, think, seen) for user in range(users - 1)), researcher(url, token, study, seen)]


MAIN = {"zeroshot": "answer", "bias": "view", "human": "answer"}      # the request that is reported first

def summary(times: list) -> dict:
    share = lambda q: round(times[min(len(times) - 1, int(q * len(times)))], 4)
    return dict(requests=len(times := sorted(times)), p50=share(0.5), p95=share(0.95), longest=round(times[-1], 4)) if times else dict(requests=0)


def every(rss: list, most: int = 60) -> dict:
    "The memory over time, thinned to some points: seconds and MiB."
    known = [(t, m) for t, m in rss if m is not None]
    kept = known[::max(1, len(known) // most)] + known[-1:] * (len(known) > 1)
    return dict(seconds=[round(t, 1) for t, _ in kept], mib=[round(m, 1) for _, m in kept], peak=round(max(m for _, m in known), 1)) if known else {}


async def together(app: str, url: str, pid: int, users: int, seconds: float, **more) -> dict:      # more: for `people`
    seen = Seen(seconds)
    await asyncio.gather(watch(pid, seen), opener(url, seen), *people(app, url, users, seen, **more))
    first = MAIN[app]
    return dict(app=f"{app}.py", users=users, seconds=seconds, asked=first, errors=sum(seen.wrong.values()), wrong=dict(seen.wrong.most_common(5)), **summary(seen.times.pop(first, [])),
                others={kind: summary(times) for kind, times in sorted(seen.times.items())}, rss_mib=every(seen.rss))


def load(app: Path, users: int = 50, seconds: float = 60, think: float = 1) -> dict:
    "Start an app, send everybody, and report."
    with TemporaryDirectory() as folder:
        words, more = [], {}
        if app.stem == "human":
            from clip_lab.humans.design import demo_design, save_design
            token, design = secrets.token_urlsafe(24), demo_design(participants=20 * users)
            save_design(design, Path(folder) / "study.yaml")
            words = ["--study", f"{folder}/study.yaml", "--db", f"sqlite:///{folder}/study.db", "--admin-token", token, "--enrolments-per-minute", str(20 * users)]
            more = dict(think=think, token=token, study=escape(design.title))
        process, url = start(app, *words)
        try: return asyncio.run(together(app.stem, url, process.pid, users, seconds, **more)) | dict(alive=process.poll() is None)
        finally: stop(process)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("app", type=Path, help=f"an app: {', '.join(f'apps/{a}.py' for a in MAIN)}")
    parser.add_argument("out", type=Path)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--think", type=float, default=1, help="seconds that a participant of the study thinks about an answer, on average")
    parser.add_argument("--short", action="store_true", help="three people, two seconds")
    args = parser.parse_args()
    if args.short: args.users, args.seconds = 3, 2
    found = load(args.app, args.users, args.seconds, args.think) | dict(processors=os.cpu_count(), machine=platform.platform(), python=platform.python_version())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print({k: v for k, v in found.items() if k != "rss_mib"}, f"memory {found['rss_mib'].get('mib')}", sep="\n")
    return 1 if found["errors"] or not found["requests"] or not found["alive"] else 0


if __name__ == "__main__": sys.exit(main())
