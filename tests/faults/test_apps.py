"""The apps as strangers see them, over HTTP: any payload gets an answer, an error or a refusal, and the next one is served; no file of the machine and no address is read for anybody; several people at once get their own answers, in all three apps, and nobody waits for somebody else's long request."""
import asyncio
import importlib.util
import io
import json
import os
from pathlib import Path
import signal
import zipfile

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


def stop(process):
    process.send_signal(signal.SIGTERM)
    process.wait(30)


@pytest.fixture(scope="module")
def bias():
    process, url = app_load.start(ROOT / "apps" / "bias.py")
    yield process, url
    stop(process)


TOKEN = "the token of these tests"

@pytest.fixture(scope="module")
def human():
    "The demo study, with its simulated people."
    pytest.importorskip("sqlalchemy", reason="the study's database needs SQLAlchemy: pip install 'clip_lab[study]'")
    process, url = app_load.start(ROOT / "apps" / "human.py", "--admin-token", TOKEN)
    yield process, url
    stop(process)


def crowd(name, process, url, users): judged(name, users, asyncio.run(app_load.together(name, url, process.pid, users=users, seconds=many(3, 60))))

def judged(name, users, found):
    "What the short form of bench/app_load.py found. Times are reported, not judged."
    assert found["errors"] == 0 and found["requests"] >= users / 2 and found["others"]["page"]["requests"], found
    if found["rss_mib"]: assert found["rss_mib"]["peak"] < 2 * found["rss_mib"]["mib"][0]
    tally(f"app {name}, people at once", "own answers", found["requests"])


def test_several_people_get_their_own_answers(app): crowd("zeroshot", *app, users=many(8, 50))
def test_several_people_get_their_own_view_and_keep_what_they_pinned(bias): crowd("bias", *bias, users=many(6, 50))
def test_several_participants_stay_who_they_are_and_only_the_token_opens_the_researchers_pages():
    "In a study that has a place for whoever comes again."
    pytest.importorskip("sqlalchemy", reason="the study's database needs SQLAlchemy: pip install 'clip_lab[study]'")
    judged("human", users := many(4, 50), app_load.load(ROOT / "apps" / "human.py", users, many(3, 60), think=many(0.05, 1)))


async def meanwhile(url: str, slow, others: dict) -> dict:
    "How often each of the others was done before the slow request was, which must have succeeded."
    done, finished = dict.fromkeys(others, 0), asyncio.Event()
    async def again(name, asking):
        while True:
            ok = await asking()
            if finished.is_set(): return
            assert ok, name
            done[name] += 1
            await asyncio.sleep(0.02)               # they come and go; they are not an attack
    async def waiting():
        try: assert await slow(), "the slow request failed"
        finally: finished.set()
    await asyncio.gather(waiting(), *(again(name, asking) for name, asking in others.items()))
    return done


def opens(client, path="/"):
    async def ask(): return (await client.get(path)).status_code == 200
    return ask


def test_thousands_of_new_sentences_do_not_keep_others_waiting(app):
    async def run():
        async with httpx.AsyncClient(base_url=app[1], timeout=600) as client:
            picture, plain = await app_load.upload(client, 1), "a cat\na house"
            async def slow():
                event, answer = await app_load.ask(client, "answer", [picture, "\n".join(f"a thing numbered {i} of many" for i in range(100)), "\n".join(f"{{}} in place {i}" for i in range(50)), "emoji"], "slow")
                return event == "complete" and "a thing numbered" in answer
            async def quick():
                event, answer = await app_load.ask(client, "answer", [picture, plain, "{}", "emoji"], "quick")
                return event == "complete" and "a house" in answer
            return await meanwhile(app[1], slow, {"answer": quick, "page": opens(client)})
    done = asyncio.run(run())
    assert done["answer"] >= 3 and done["page"] >= 3, done
    tally("app, others during a long request", "done", sum(done.values()))


def test_a_large_upload_does_not_keep_others_waiting(bias, tmp_path):
    "Somebody brings a thousand pictures; somebody else's views go on, and theirs are not shown to them."
    rng = np.random.default_rng(SEED)
    with zipfile.ZipFile(tmp_path / "people.zip", "w") as z:
        for i in range(1000):
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file := io.BytesIO(), "PNG")
            z.writestr(f"{i}.png", file.getvalue())
        z.writestr("table.csv", "file,kind of person\n" + "".join(f"{i}.png,{'tall' if i % 2 else 'short'}\n" for i in range(1000)))
    async def run():
        async with httpx.AsyncClient(base_url=bias[1], timeout=600) as client:
            info = (await client.get("/gradio_api/info")).json()["named_endpoints"]["/view"]["parameters"]
            usual = [p.get("parameter_default") for p in info]
            reply = await client.post("/gradio_api/upload", files={"files": ("people.zip", (tmp_path / "people.zip").read_bytes(), "application/zip")})
            archive = {"path": reply.json()[0], "meta": {"_type": "gradio.FileData"}}
            async def slow():
                event, answer = await app_load.ask(client, "own", [archive, None, *["noise"] * 5], "slow")
                return event == "complete" and "1,000 pictures" in answer and "tall" in answer
            async def quick():
                event, answer = await app_load.ask(client, "view", [*usual[:2], 3.25, *usual[3:]], "quick")
                return event == "complete" and "threshold=0.0325" in answer and "tall" not in answer
            return await meanwhile(bias[1], slow, {"view": quick, "page": opens(client)})
    done = asyncio.run(run())
    assert done["view"] >= 2 and done["page"] >= 2, done
    tally("app, others during a long request", "done", sum(done.values()))


def test_the_researchers_results_do_not_keep_participants_waiting(human):
    async def run():
        async with httpx.AsyncClient(base_url=human[1], timeout=600) as client, httpx.AsyncClient(base_url=f"{human[1]}/researcher", timeout=600) as behind:
            key = (await client.get("/api/study")).json()["key"]
            head = {"Authorization": f"Bearer {key}"}
            state = (await client.post("/api/enrol", json={"consent": True}, headers=head)).json()
            await behind.post("/login", json={"token": TOKEN})
            async def slow():
                event, answer = await app_load.ask(behind, "results", [True, "emoji"], "slow")
                return event == "complete" and "Interim" in answer
            async def answers():
                nonlocal state
                if not state["trial"]: return await asyncio.sleep(0.1, True)       # all 81 are answered
                reply = await client.post("/api/answer", json={"trial": state["trial"]["id"], "answer": "I don't know", "seconds": 0.1}, headers=head)
                state, before = reply.json(), state["done"]
                return reply.status_code == 200 and state["done"] == before + 1
            return await meanwhile(human[1], slow, {"answer": answers, "page": opens(client)})
    done = asyncio.run(run())
    assert done["answer"] >= 5 and done["page"] >= 5, done
    tally("app, others during a long request", "done", sum(done.values()))


def test_a_file_input_takes_what_was_uploaded_and_nothing_else(tmp_path):
    "Also where a request leaves out the mark by which Gradio would know a file; an app that deletes an upload after reading it must not delete anything else."
    import gradio as gr
    from gradio.data_classes import FileData, ListFiles
    from clip_lab.ui.theme import only_uploads
    file = only_uploads(gr.File(render=False))
    (tmp_path / "precious.zip").write_text("x")
    for path in (str(tmp_path / "precious.zip"), "/etc/passwd", "x.zip", f"{file.GRADIO_CACHE}/../x.zip", f"{file.GRADIO_CACHE}x/x.zip"):
        for payload in (FileData(path=path), ListFiles(root=[FileData(path=path)])):
            with pytest.raises(gr.Error, match="was not uploaded here"): file.preprocess(payload)
    uploaded = Path(file.GRADIO_CACHE) / "0a" / "x.zip"
    uploaded.parent.mkdir(parents=True, exist_ok=True)
    uploaded.write_text("x")
    assert file.preprocess(FileData(path=str(uploaded))) == str(uploaded) and file.preprocess(None) is None
    tally("app, files and addresses", "refused", 10)
