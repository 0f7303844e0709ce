"""An app under load: so many people at once, through the HTTP endpoint that its page uses, for a set time.

    python bench/app_load.py apps/zeroshot.py bench/results/load_zeroshot.json                     # 50 people, 60 seconds
    python bench/app_load.py apps/bias.py bench/results/load_bias.json --seconds 300

Everybody has a session, a picture and labels of their own, sends the next request when the last one is answered, and checks that the answer is about what they asked: an error, or somebody else's answer, makes the exit code 1.
Reported are the times from question to answer, in seconds, and the memory of the app's process as it goes. Both depend on the machine, and nothing here judges them.
"""
import argparse
import asyncio
from collections import Counter
import io
import json
import os
from pathlib import Path
import platform
import random
import socket
import statistics
import subprocess
import sys
import time

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


# ---- what is asked: (values by place in the endpoint's inputs, what its answer must hold)

def ask_zeroshot(user: int, turn: int, picture: dict) -> tuple[dict, str]:
    own = f"thing {user} of {turn % 7}"
    return {0: picture, 1: f"a cat\na house\n{own}"}, own


def ask_bias(user: int, turn: int, picture: dict) -> tuple[dict, str]:
    share = (1 + user) / 100 + (turn % 5) / 1000          # as nobody else has
    return {2: round(100 * share, 4)}, f"{round(share, 6):g}"


APPS = {"zeroshot": ("answer", ask_zeroshot), "bias": ("view", ask_bias)}


# ---- one app, one user

def start(app: Path) -> tuple[subprocess.Popen, str]:
    "The app in a process of its own, answering; and its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = open(os.devnull, "w")
    process = subprocess.Popen([sys.executable, str(app), *(["--port", str(port)] if app.stem == "human" else [])], env=os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        if process.poll() is not None: raise RuntimeError(f"{app} ended with code {process.returncode} before it answered")
        try:
            if httpx.get(url + ("/api/study" if app.stem == "human" else "/gradio_api/info"), timeout=5).status_code == 200: return process, url
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
                last = line[5:].strip()
                if event in ("complete", "error"): break
    return event, last


async def asked_once(url: str, app: str) -> str:
    "The first question of a visitor, and its answer."
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        if app == "human":
            key = (await client.get("/api/study")).json()["key"]
            reply = await client.post("/api/enrol", json={"consent": True}, headers={"Authorization": f"Bearer {key}"})
            return reply.raise_for_status().text
        name, question = APPS[app]
        info = (await client.get("/gradio_api/info")).json()["named_endpoints"][f"/{name}"]
        values, expected = question(0, 0, await upload(client, 0))
        event, answer = await ask(client, name, [values.get(i, p.get("parameter_default")) for i, p in enumerate(info["parameters"])], "first")
        if event != "complete" or expected not in answer: raise RuntimeError(f"{app}: {event}: {answer[:200]}")
        return answer


def first(app: str, url: str) -> str: return asyncio.run(asked_once(url, app))


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try: process.wait(30)
    except subprocess.TimeoutExpired: process.kill(); process.wait()


async def person(url: str, user: int, name: str, defaults: list, question, until: float, times: list, wrong: Counter) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        try: picture = await upload(client, user)
        except httpx.HTTPError as error: wrong[f"upload: {error!r:.100}"] += 1; return
        turn, session = 0, f"load{user:05}"
        while turn == 0 or time.monotonic() < until:          # everybody asks at least once, however slow the machine
            values, expected = question(user, turn, picture)
            data = [values.get(i, default) for i, default in enumerate(defaults)]
            began = time.monotonic()
            try: event, answer = await ask(client, name, data, session)
            except httpx.HTTPError as error: event, answer = f"{error!r:.100}", ""
            times.append(time.monotonic() - began)
            if event != "complete": wrong[f"{event}: {answer[:100]}"] += 1
            elif expected not in answer: wrong[f"an answer without {expected!r}"] += 1
            turn += 1
            await asyncio.sleep(random.Random(user * 1000 + turn).uniform(0, 0.05))


def memory(pid: int) -> float | None:
    "Resident MiB of a process, where the system tells."
    try: return next(int(line.split()[1]) / 1024 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    except (OSError, StopIteration): return None


async def watch(pid: int, until: float, seen: list) -> None:
    while time.monotonic() < until:
        seen.append(memory(pid))
        await asyncio.sleep(0.5)


async def together(url: str, pid: int, name: str, question, users: int, seconds: float) -> dict:
    info = httpx.get(f"{url}/gradio_api/info", timeout=60).json()["named_endpoints"][f"/{name}"]
    defaults, times, wrong, seen, until = [p.get("parameter_default") for p in info["parameters"]], [], Counter(), [], time.monotonic() + seconds
    await asyncio.gather(watch(pid, until, seen), *(person(url, user, name, defaults, question, until, times, wrong) for user in range(users)))
    times.sort()
    share = lambda q: round(times[min(len(times) - 1, int(q * len(times)))], 4) if times else None
    seen = [m for m in seen if m is not None] + [m for m in [memory(pid)] if m is not None]
    rss = dict(first=seen[0], half=statistics.median(seen[len(seen) // 2:len(seen) // 2 + 3]), last=seen[-1], peak=max(seen)) if seen else {}
    return dict(users=users, seconds=seconds, requests=len(times), errors=sum(wrong.values()), wrong=dict(wrong.most_common(5)), p50=share(0.5), p95=share(0.95), longest=times[-1] if times else None,
                rss_mib={k: round(v, 1) for k, v in rss.items()})


def load(app: Path, users: int = 50, seconds: float = 60) -> dict:
    "Start an app, send everybody, and report."
    name, question = APPS[app.stem]
    process, url = start(app)
    try: return dict(app=app.name, endpoint=name) | asyncio.run(together(url, process.pid, name, question, users, seconds)) | dict(alive=process.poll() is None)
    finally: stop(process)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("app", type=Path, help=f"an app: {', '.join(f'apps/{a}.py' for a in APPS)}")
    parser.add_argument("out", type=Path)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--short", action="store_true", help="three people, two seconds")
    args = parser.parse_args()
    if args.short: args.users, args.seconds = 3, 2
    found = load(args.app, args.users, args.seconds) | dict(processors=os.cpu_count(), machine=platform.platform(), python=platform.python_version())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 1 if found["errors"] or not found["requests"] or not found["alive"] else 0


if __name__ == "__main__": sys.exit(main())
