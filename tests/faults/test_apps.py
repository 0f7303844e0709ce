"""The zero-shot app as strangers see it, over HTTP: any payload gets an answer, an error or a refusal, and the next one is served; no file of the machine and no address is read for anybody; several people at once get their own answers."""
import asyncio
import importlib.util
import json
import os
from pathlib import Path
import signal

from conftest import ROOT, SEED, many, tally
import httpx
import numpy as np
from PIL import Image
import pytest

pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'clip_lab[apps]'")
spec = importlib.util.spec_from_file_location("app_load", ROOT / "bench" / "app_load.py")
app_load = importlib.util.module_from_spec(spec)
spec.loader.exec_module(app_load)
from test_security import server      # noqa: E402, F401


@pytest.fixture(scope="module")
def app():
    process, url = app_load.start(ROOT / "apps" / "zeroshot.py")
    yield process, url
    process.send_signal(signal.SIGTERM)
    process.wait(30)


async def one(url, data, session="x"):
    async with httpx.AsyncClient(base_url=url, timeout=60) as client: return await app_load.ask(client, "answer", data, session)


async def good(url):
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        picture = await app_load.upload(client, 1)
        return await app_load.ask(client, "answer", [picture, "a cat\nan orange square", "{}", "emoji"], "good")


def test_no_file_and_no_address_is_read_for_anybody(app, server, tmp_path):
    process, url = app
    host, asked = server
    secret = tmp_path / "secret.png"
    Image.new("RGB", (60, 60), "orange").save(secret)           # a picture, so that an answer about it would tell
    for path in (str(secret), "/etc/passwd", "../../../../etc/passwd", f"http://{host}/x.png", f"http://{host}/x.png#.png", f"HTTP://{host}/x.png", f"file://{secret}", f"http://localhost:{host.split(':')[1]}/x.png", f"http://[::ffff:127.0.0.1]:{host.split(':')[1]}/x.png", str(ROOT / "apps" / "zeroshot.py")):
        for value in ({"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": "x.png", "url": path, "meta": {"_type": "gradio.FileData"}}, {"path": path}, {"path": path, "url": path, "is_stream": True, "meta": {"_type": "gradio.FileData"}}, path):
            event, answer = asyncio.run(one(url, [value, "a cat\na dog", "{}", "emoji"]))
            assert event == "error" and "Most likely" not in answer and "not a picture" not in answer and "not exist" not in answer, answer[:300]     # not even whether it is there
            tally("app, files and addresses", f"{event}, nothing read")
    for route in (f"/gradio_api/file={secret}", "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd", f"/gradio_api/file=http://{host}/x.png", f"/gradio_api/proxy=http://{host}/x.png", "/gradio_api/file=%2e%2e%2f%2e%2e%2fetc/passwd", "/file=/etc/passwd", "/static/../../../../etc/passwd", "/gradio_api/stream/x/y/../../etc/passwd"):
        reply = httpx.get(url + route, follow_redirects=False)
        assert b"PNG" not in reply.content and "root:" not in reply.text and (reply.status_code >= 300 or "<!doctype html" in reply.text.lower()), (route, reply.status_code)
        tally("app, files and addresses", "refused")
    for name in ("/etc/passwd", str(secret), "org/name", "../x"):
        event, answer = asyncio.run(one(url, [None, "a cat\na dog", "{}", name]))
        assert event == "error" or "complete" == event and "root:" not in answer
    assert asked == [] and process.poll() is None
    event, answer = asyncio.run(good(url))
    assert event == "complete" and "Most likely" in answer


def values(rng) -> list:
    "A payload that no page would send."
    odd = [None, True, -1, 1e308, "", "\x00", "a cat\na dog", "{}", "\ud83d\ude00" * 50, "x" * 200_000, [], {}, [[[]]], {"path": None}, {"path": ""}, {"path": []}, {"meta": {"_type": "gradio.FileData"}}, {"path": "x", "meta": 3}, {"__type__": "update"}, {"_type": "x"}, "<script>", "=1+1", "{" * 2000, "\n" * 5000, 10 ** 30, {"a": {"b": {"c": []}}}]
    return [odd[rng.integers(len(odd))] for _ in range(rng.integers(0, 7))]


def test_any_payload_leaves_the_app_answering(app):
    process, url = app
    rng = np.random.default_rng(SEED)
    async def throw():
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for _ in range(many(40, 2000)):
                event, _ = await app_load.ask(client, "answer", values(rng), "odd")
                assert event in ("complete", "error") or event.startswith("HTTP 4") or event.startswith("HTTP 5"), event
                tally("app, payloads", event)
            for body in (b"", b"{", b"[]", b'{"data": 3}', b'{"data": [}', b"\xff" * 100, b'{"data": ' + b"[" * 50_000, json.dumps({"data": [], "session_hash": [1]}).encode()):
                reply = await client.post("/gradio_api/call/answer", content=body, headers={"Content-Type": "application/json"})
                assert reply.status_code >= 400 or "event_id" in reply.text
                tally("app, payloads", f"HTTP {reply.status_code}" if reply.status_code >= 400 else "accepted")
            big = await client.post("/gradio_api/upload", files={"files": ("x.png", bytes(27_000_000), "image/png")})
            assert big.status_code == 413
            for name in ("../../x.png", "/etc/x.png", "a\\..\\b.png", "\u202egnp.exe"):
                reply = await client.post("/gradio_api/upload", files={"files": (name, b"x", "image/png")})
                assert reply.status_code >= 400 or ".." not in Path(reply.json()[0]).parts and str(reply.json()[0]).startswith(("/tmp", os.environ.get("GRADIO_TEMP_DIR", "/tmp"), os.environ.get("TMPDIR", "/tmp")))
    asyncio.run(throw())
    assert process.poll() is None and asyncio.run(good(url))[0] == "complete"


def test_several_people_get_their_own_answers(app):
    "The short form of bench/app_load.py. Times are reported, not judged."
    process, url = app
    found = asyncio.run(app_load.together(url, process.pid, *app_load.APPS["zeroshot"], users=many(8, 50), seconds=many(3, 60)))
    assert found["errors"] == 0 and found["requests"] >= found["users"], found
    if found["rss_mib"]: assert found["rss_mib"]["last"] < 2 * found["rss_mib"]["first"]
    tally("app, people at once", "own answers", found["requests"])
