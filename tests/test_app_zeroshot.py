"""The zero-shot app: its endpoint through gradio_client, and what a person sees through a real browser."""
from base64 import b64decode
from io import StringIO
import importlib.util
import os
from pathlib import Path
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import httpx
import pandas as pd
from PIL import Image
import pytest

pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'clip_lab[apps]'")
import gradio as gr
from gradio_client import Client, handle_file

from clip_lab.ui.theme import exposed, launch_options

ROOT = Path(__file__).parents[1]
APP = ROOT / "apps" / "zeroshot.py"
LABELS, TEMPLATES = "a cat\na dog\na bicycle", "{}\nan emoji of {}"
EVIL = "<img src=x onerror=document.title='owned'>"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    "The app as a module, serving on a free port."
    before = dict(os.environ)
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    spec = importlib.util.spec_from_file_location("zeroshot_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.demo.launch(**module.launch_options(port=free_port()), prevent_thread_lock=True, quiet=True)
    yield module
    module.demo.close()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def client(app):
    return Client(app.demo.local_url, verbose=False)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "orange.png"
    Image.new("RGB", (80, 60), "#E69F00").save(path)
    return path


def ask(client, picture, labels=LABELS, templates=TEMPLATES, model="emoji"):
    names = ("note", "verdict", "bars", "table", "voices", "code", "model")
    return dict(zip(names, client.predict(picture and handle_file(str(picture)), labels, templates, model, api_name="/answer")))


def carried(page: dict, kind: str) -> str:
    "The text inside the download link of that kind."
    return b64decode(re.search(rf'download="answers.{kind}" href="data:[^,]*base64,([^"]*)"', page["table"])[1]).decode()


# ---- the endpoint

def test_the_answer_is_that_of_the_library(client, picture):
    from clip_lab.evals.zeroshot import classify
    from clip_lab.pretrained import load
    page = ask(client, picture)
    shown = pd.read_csv(StringIO(carried(page, "csv"))).set_index("classname")
    expected = classify(*load(), str(picture), LABELS.split("\n"), TEMPLATES.split("\n"), top=None).set_index("classname")
    assert shown.probability.sum() == pytest.approx(1, abs=1e-5)
    for column in ("probability", "cosine", "low", "high"):
        assert shown[column].to_dict() == pytest.approx(expected[column].to_dict(), abs=1e-4)
    assert page["note"] == "" and shown.index[0] in page["verdict"]


def test_the_python_lines_give_the_same_answer(client, picture, monkeypatch):
    page = ask(client, picture)
    monkeypatch.chdir(picture.parent)
    scope, (*lines, last) = {}, page["code"].strip().splitlines()
    exec("\n".join(lines), scope)
    table = eval(last, scope)
    shown = pd.read_csv(StringIO(carried(page, "csv")))
    assert table.classname.tolist() == shown.classname.tolist()
    assert table.probability.tolist() == pytest.approx(shown.probability.tolist(), abs=1e-5)


def test_a_turned_photograph_is_turned_upright(client, tmp_path):
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("#0072B2", (0, 0, 64, 20))
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    picture.save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6                                   # "rotate 90 degrees clockwise to see me upright"
    picture.rotate(90, expand=True).save(turned, exif=exif)
    assert carried(ask(client, upright), "csv") == carried(ask(client, turned), "csv")


@pytest.mark.parametrize("given, message", [
    (dict(labels=" \n "), "There are no labels yet"),
    (dict(labels="a cat\na dog\nA  cat"), "Label 3, &#x27;A  cat&#x27;, repeats label 1"),
    (dict(labels="\n".join(map(str, range(1001)))), "the limit is 1,000"),
    (dict(labels="\n".join(map(str, range(900))), templates="\n".join(f"{i} {{}}" for i in range(90))), "81,000 sentences"),
    (dict(labels="word " * 200), "tokens"),
    (dict(templates=""), "There are no templates yet"),
    (dict(templates="a photo"), "needs exactly one {}"),
    (dict(labels=EVIL + "\n" + EVIL), "&lt;img src=x"),
], ids=lambda x: x if isinstance(x, str) else next(iter(x)))
def test_mistakes_are_told_calmly(client, picture, given, message):
    page = ask(client, picture, **given)
    assert message in page["note"] and "<img" not in page["note"]


def test_a_model_that_is_not_here_is_not_fetched(client, picture, monkeypatch, tmp_path):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    page = ask(client, picture, model="ViT-B/16")
    assert "clip-lab models --fetch ViT-B/16" in page["note"] and "Still answering with emoji" in page["note"]
    assert page["model"] == "emoji" and not list(tmp_path.glob("models--*/snapshots/*/*"))


def test_unreadable_and_missing_pictures(client, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("this is not a picture")
    assert "broken.png" in (note := ask(client, broken)["note"]) and "is not a picture" in note
    assert "There is no picture yet" in ask(client, None)["note"]


def test_user_text_is_escaped_everywhere(client, picture):
    page = ask(client, picture, labels=f"{EVIL}\na cat", templates="<img alt={}>\n{}")
    for part in ("verdict", "bars", "table", "voices"): assert "<img" not in page[part]
    assert "&lt;img src=x" in page["bars"]


def test_it_listens_here_only_and_counts_nobody(app):
    assert app.demo.local_url.startswith("http://127.0.0.1:") and app.demo.share_url is None
    assert app.demo.analytics_enabled is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_the_app_is_thin():
    assert len(APP.read_text().splitlines()) <= 250


# ---- a person with a browser

@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None: pytest.skip("no Chromium on this machine: apt install chromium")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(app, browser):
    "visit(width, scheme) -> page; at the end of the test: no error in the console, no request to anywhere else."
    problems, contexts = [], []
    def go(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: problems.append(f"page error: {e}"))
        page.on("request", lambda r: None if r.url.startswith((app.demo.local_url, "data:", "blob:")) else problems.append(f"left this machine: {r.url}"))
        page.goto(app.demo.local_url)
        page.locator(".cl-bars").wait_for()
        page.wait_for_function("document.querySelector('.cl-picture img')?.complete")       # Gradio keeps a stream open: the network never idles
        return page
    yield go
    for context in contexts: context.close()
    assert not problems


def settled(page):
    "The page once nothing on it has moved for half a second: what moves under a pressed button takes the press away."
    page.wait_for_function("""() => {
        const seen = [document.documentElement.scrollHeight, scrollY].join();
        if (seen !== window.clSeen) [window.clSeen, window.clSince] = [seen, performance.now()];
        return performance.now() - window.clSince > 500; }""")
    return page


def nothing_jumps(page) -> bool:
    "Whether the page is as long before as after its end came into sight: an editor that guesses its height moves what is beside it."
    high = [settled(page).evaluate(f"scrollTo(0, {y}), document.documentElement.scrollHeight") for y in (0, 1_000_000)]
    return high == [high[0], settled(page).evaluate("document.documentElement.scrollHeight")] and page.evaluate("scrollTo(0, 0), true")


def labels_shown(page): return page.get_by_role("list").locator(".cl-label").all_inner_texts()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_answers_at_once_and_changes_its_mind(visit, width, scheme, tmp_path):
    page = visit(width, scheme)
    assert nothing_jumps(page)
    assert page.get_by_role("heading", level=1).inner_text() == "What is in this picture?"
    before = labels_shown(page)
    assert len(before) == 6 and before[0] in page.locator(".cl-says").inner_text()          # never an empty page
    assert page.evaluate("document.documentElement.scrollWidth") <= width                    # nothing sticks out
    shot = tmp_path / f"{width}-{scheme}.png"
    page.screenshot(path=shot)
    if os.environ.get("CLIP_LAB_SCREENSHOTS") == "1" and (width, scheme) == (1280, "light"):
        (ROOT / "nbs" / "images").mkdir(exist_ok=True)
        shutil.copy(shot, ROOT / "nbs" / "images" / "app-zeroshot.png")

    box = page.get_by_label("What might be there?")
    box.fill("a whisker\na wheel")
    page.locator(".cl-label", has_text="a wheel").wait_for()
    assert sorted(labels_shown(page)) == ["a wheel", "a whisker"]
    box.press_sequentially("\na moon", delay=20)
    page.locator(".cl-label", has_text="a moon").wait_for()
    assert sorted(labels_shown(page)) == ["a moon", "a wheel", "a whisker"]


@pytest.mark.browser
def test_the_colours_change_in_the_dark(visit):
    colours = [visit(scheme=s).evaluate("getComputedStyle(document.querySelector('.cl-label')).color") for s in ("light", "dark")]
    assert colours == ["rgb(39, 39, 42)", "rgb(244, 244, 245)"]


@pytest.mark.browser
def test_a_label_is_text_whatever_it_says(visit):
    page = visit()
    page.get_by_label("What might be there?").fill(f"{EVIL}\n${{document.title='owned'}} {{{{this}}}}")
    page.locator(".cl-label", has_text="onerror").wait_for()
    assert sorted(labels_shown(page)) == [f"${{document.title='owned'}} {{{{this}}}}", EVIL]
    assert "owned" not in page.title() and page.locator(".cl-bars img").count() == 0


@pytest.mark.browser
def test_a_mistake_keeps_the_last_answer(visit):
    page = visit()
    before = labels_shown(page)
    page.get_by_label("Templates, one a line").fill("a photo without a place")
    page.get_by_text("needs exactly one {}").wait_for()
    assert labels_shown(page) == before and page.get_by_text("The last answer is still shown").is_visible()
    page.get_by_label("Templates, one a line").fill("a photo of {}")
    page.get_by_text("needs exactly one {}").wait_for(state="detached")


@pytest.mark.browser
def test_the_keyboard_is_enough(visit):
    page = visit()
    first = page.locator(".cl-picture img").get_attribute("src")
    pizza = page.get_by_role("button", name="pizza")
    pizza.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("before => document.querySelector('.cl-picture img')?.src !== before", arg=first)
    page.get_by_label("What might be there?").focus()
    page.keyboard.press("Control+End")
    page.keyboard.type("\na slice of pizza")
    page.locator(".cl-label", has_text="a slice of pizza").wait_for()


# ---- opened to others

def test_a_login_closes_every_way_in(monkeypatch):
    "Page, questions and files are for those who have the name and the password; others get none of it (Gradio tells them what the questions are called)."
    monkeypatch.setenv("CLIP_LAB_LOGIN", "jo:a good:secret")
    with gr.Blocks() as page:
        gr.Button("Say it softly").click(lambda: "said it", None, gr.Textbox(), api_name="whisper")
    port = free_port()
    page.launch(**launch_options(port, "0.0.0.0"), prevent_thread_lock=True, quiet=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            def ask(): return client.post("/gradio_api/call/whisper", json={"data": []}).status_code
            def refused(): return [client.get("/gradio_api/info").status_code, client.get("/config").status_code, ask(), client.post("/gradio_api/upload", files={"files": ("x.png", b"x")}).status_code]
            assert "Say it softly" not in client.get("/").text and refused() == [401] * 4
            assert client.post("/login", data={"username": "jo", "password": "wrong"}).status_code == 400 and refused() == [401] * 4
            assert client.post("/login", data={"username": "jo", "password": "a good:secret"}).status_code == 200
            assert ask() == 200 and "Say it softly" in client.get("/config").text
    finally: page.close()


def test_what_an_open_address_means_is_said(monkeypatch, capsys):
    monkeypatch.delenv("CLIP_LAB_LOGIN", raising=False)
    for app in ("zeroshot", "bias"):
        seen = {}
        monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: seen.update(options))
        for words, host in (([], "127.0.0.1"), (["--host", "0.0.0.0", "--port", "7999"], "0.0.0.0")):
            monkeypatch.setattr(sys, "argv", [f"{app}.py", *words])
            runpy.run_path(str(ROOT / "apps" / f"{app}.py"), run_name="__main__")
            told = capsys.readouterr().out
            assert (seen["server_name"], seen["auth"]) == (host, None) and ("asked for nothing" in told) == bool(words)
    monkeypatch.setenv("CLIP_LAB_LOGIN", "jo:secret")
    assert "name and the password" in exposed("0.0.0.0") and "secret" not in exposed("0.0.0.0")
    monkeypatch.setenv("CLIP_LAB_LOGIN", "secret")
    with pytest.raises(ValueError, match="as name:password") as error: launch_options()
    assert "secret" not in str(error.value)


# ---- gradio's own command

@pytest.mark.slow
def test_gradio_command_has_the_same_look(tmp_path):
    port = free_port()
    env = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", "from gradio.cli import cli; cli()", "apps/zeroshot.py"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        page, deadline = None, time.time() + 300
        while page is None and time.time() < deadline and process.poll() is None:
            try: page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read().decode()
            except OSError: time.sleep(0.5)
        assert page is not None, process.stdout.read() if process.poll() is not None else "no answer within five minutes"
        assert ".cl-bars" in page and "fonts.googleapis.com/css" not in page
        theme = urllib.request.urlopen(f"http://127.0.0.1:{port}/theme.css", timeout=5).read().decode()
        assert "#27272a" in theme and "system-ui" in theme
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=20)
