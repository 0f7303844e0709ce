"""The study as people see it: a simulated participant in a real browser by keyboard alone, a server killed in the middle, a phone, and the researcher's pages.

With CLIP_LAB_SCREENSHOTS=1 the pictures of the documentation and nbs/studies/table02_recorded.csv are written anew: the two browser sessions then go through the whole demo study.
"""
import importlib.util
import os
from pathlib import Path
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from PIL import Image
import pytest

pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'clip_lab[apps]'")
pytest.importorskip("sqlalchemy", reason="the study's database needs SQLAlchemy: pip install 'clip_lab[study]'")

from clip_lab.humans.design import DONT_KNOW, demo_design, open_study, save_design
from clip_lab.humans.simulated import Crowd, simulate
from clip_lab.humans.store import Store, answers_table

ROOT = Path(__file__).parents[1]
APP = ROOT / "apps" / "human.py"
TOKEN = "the token of these tests"
RECORD = os.environ.get("CLIP_LAB_SCREENSHOTS") == "1"
SMALL = {} if RECORD else dict(classes=("Bahrain", "Barbados", "Belize", "Bhutan", "Brazil", "Brunei", "Canada", "Comoros", "Japan", "United Kingdom"), shots=(0, 1), pictures_per_participant=5, participants=20, break_every=7)

KILLED_AT = (4, 9, 40) if RECORD else (9,)     # so many answers were given when the server dies


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class App:
    "The real app as a process of its own, with some simulated people already in its database."
    def __init__(self, folder: Path):
        self.study, self.url, self.port = open_study(demo_design(**SMALL)), f"sqlite:///{folder}/study.db", free_port()
        save_design(self.study.design, folder / "study.yaml")
        self.words = [sys.executable, str(APP), "--study", str(folder / "study.yaml"), "--db", self.url, "--port", str(self.port), "--admin-token", TOKEN, "--tell-scores"]
        self.home, self.store, self.process = f"http://127.0.0.1:{self.port}", Store(self.url, self.study), None
        for seat, rows in simulate(self.study, Crowd(skill=0.35), seats=range(1, 7), seed=0).groupby("seat"):
            self.store.enrol(key := self.store.ticket())
            for row in rows.itertuples(): person = self.store.answer(key, row.trial, row.answer, min(row.seconds, 4.9))
        self.code = self.store.finish_code(person)

    def start(self):
        self.process = subprocess.Popen(self.words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        deadline = time.time() + 240
        while time.time() < deadline:
            if self.process.poll() is not None: raise AssertionError(self.process.stdout.read()[-3000:])
            try: return urllib.request.urlopen(f"{self.home}/api/health", timeout=5) and self
            except OSError: time.sleep(0.1)
        raise AssertionError("the app did not start within four minutes")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    app = App(tmp_path_factory.mktemp("study"))
    app.start()
    yield app
    app.kill()
    app.store.close()


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
    "visit(path, width, scheme, allowed) -> page; at the end of the test: no error in the console but those allowed, no request to anywhere else."
    problems, contexts = [], []
    def go(path="/", width=1280, scheme="light", allowed=(), height=900):
        phone = dict(has_touch=True, is_mobile=True, device_scale_factor=2) if width < 500 else {}
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **phone)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type == "error" and not any(a in m.text for a in allowed) else None)
        page.on("pageerror", lambda e: problems.append(f"page error: {e}"))
        page.on("request", lambda r: None if r.url.startswith((app.home, "data:", "blob:")) else problems.append(f"left this machine: {r.url}"))
        page.goto(app.home + path)
        return page
    yield go
    for context in contexts: context.close()
    assert not problems


def keep_shot(page, name: str, **options):
    "For the documentation: few colours, below 250 KB."
    if not RECORD: return
    file = ROOT / "nbs" / "images" / f"{name}.png"
    page.screenshot(path=file, **options)
    Image.open(file).convert("RGB").quantize(200, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, optimize=True)
    assert file.stat().st_size < 250_000


def until(page, expression: str, arg=None, timeout: float = 60):
    "Ask again until the page says something; Playwright's own way compiles text in the page, which the page's rules forbid."
    deadline = time.time() + timeout
    while not (value := page.evaluate(expression, arg)):
        assert time.time() < deadline, f"waited {timeout} s for {expression}"
        page.wait_for_timeout(15)
    return value


class Mind:
    "A simulated participant: knows some classes at first, more with examples, and says so or guesses otherwise."
    def __init__(self, study, seed): self.study, self.random, self.known = study, random.Random(seed), {}

    def takes(self): return 450 + 400 * self.random.random()         # ms; quicker counts as too fast by the design's rules

    def answer(self, trial):
        if trial.instructed: return trial.instructed
        if self.known.setdefault(trial.picture, self.random.random()) < (0.4, 0.75, 0.85)[trial.shots]: return trial.truth
        return DONT_KNOW if self.random.random() < 0.5 else self.random.choice(self.study.classes)


def begin(page):
    page.get_by_role("checkbox").check()
    page.get_by_role("button", name="Take part").click()
    page.get_by_role("heading", name="Keep these two").wait_for()
    return page.evaluate("location.hash").removeprefix("#k=")


def screen(page) -> str:
    "What is on the page, once it stands still: 'begin', 'go on', 'trial' or 'end'."
    return until(page, """() => { const text = document.querySelector('main h1')?.textContent, on = document.querySelector('button.main:not(:disabled)');
        if (text === 'Thank you') return 'end'; if (on) return on.textContent.toLowerCase(); const b = document.querySelector('.choices button');
        return b && !b.disabled && !document.querySelector('.frame.waiting') ? 'trial' : null; }""")


def moved_on(page, what: str):
    "Wait until the button that was pressed is gone."
    until(page, "what => document.querySelector('button.main:not(:disabled)')?.textContent.toLowerCase() !== what || document.querySelector('main h1').textContent === 'Thank you'", what)


def stored(page, before: str):
    "Wait until the page goes on after an answer: another number, a button, or the end."
    until(page, "before => document.querySelector('#place').textContent !== before || document.querySelector('button.main:not(:disabled)') || document.querySelector('main h1').textContent === 'Thank you'", before)


def current(page, store, key):
    "The trial that is shown, by what the page says and by the store; both must agree."
    person = store.come_back(key)
    assert page.locator("#place").inner_text().endswith(f"{person.done + 1} of {len(person.trials)}")
    return person.current


# ---- a person by keyboard, and a server that is killed

@pytest.mark.browser
@pytest.mark.slow
def test_a_participant_by_keyboard_alone_while_the_server_is_killed(app, visit):
    dead = ["ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE", "ERR_SOCKET_NOT_CONNECTED"]
    page = visit(allowed=dead)
    page.get_by_role("heading", level=1, name=app.study.design.title).wait_for()
    assert page.get_by_role("button", name="Take part").is_disabled() and "What is stored" in page.locator("dl").inner_text()
    page.get_by_role("checkbox").focus()
    page.keyboard.press("Space")
    page.keyboard.press("Tab"); page.keyboard.press("Enter")
    page.get_by_role("heading", name="Keep these two").wait_for()
    key = page.evaluate("location.hash").removeprefix("#k=")
    mind, answered, kills, undone, shots = Mind(app.study, 1), [], 0, False, set()
    while (what := screen(page)) != "end":
        if what != "trial":
            if what == "go on" and page.locator(".solution b").count(): assert page.locator(".solution b").inner_text() == answered[-1][0].wanted
            page.keyboard.press("Enter")
            moved_on(page, what)
            continue
        trial = current(page, app.store, key)
        if trial.instructed: assert trial.instructed in page.locator(".asks").inner_text()
        else: assert not page.locator(".asks").is_visible()
        alt = page.locator(".frame img").get_attribute("alt")
        assert "its name is the answer" in alt and not any(c in alt for c in app.study.classes)
        assert page.locator(".thumbs img").count() == (len(app.study.classes) * trial.shots if trial.block >= 0 else 0)
        if trial.kind == "study" and trial.shots not in shots:
            shots.add(trial.shots)
            if trial.shots == 1: until(page, "[...document.querySelectorAll('.thumbs img')].every(i => i.complete)"); keep_shot(page, "app-human-participant")
        answer = mind.answer(trial)
        before = page.locator("#place").inner_text()
        if RECORD: page.wait_for_timeout(mind.takes())
        if len(answered) in KILLED_AT:                                   # the server is dead when the answer is given
            app.kill()
            kills += 1
        if answer == DONT_KNOW: page.keyboard.press("0")
        else:
            page.keyboard.type(answer.lower())
            assert page.locator(".choices .first").inner_text().strip().startswith(answer)
            page.keyboard.press("Enter")
        if app.process.poll() is not None:
            page.get_by_text("Your last answer is not stored yet").wait_for()
            app.start()
        answered.append((trial, answer))
        stored(page, before)
        if not undone and len(answered) == 7 and screen(page) == "trial" and page.get_by_role("button", name="Take the last answer back").is_visible():
            page.keyboard.press("Backspace")
            until(page, "before => document.querySelector('#place').textContent === before", before)
            undone = True
            assert screen(page) == "trial" and current(page, app.store, key) == trial
            answered.pop()
            mind.random.seed(99)
        if len(answered) == 11:                                          # the browser is closed; the link opens it again where it was
            again = visit(f"/#k={key}", allowed=dead)
            if screen(again) != "trial": again.keyboard.press("Enter")
            screen(again)
            page = again
    rows = answers_table(app.store)
    person = app.store.come_back(key)
    mine = rows[rows.participant == person.id]
    assert kills == len(KILLED_AT) and undone and mine.trial.tolist() == [t.id for t in person.trials] and mine.answer.tolist() == [a for _, a in answered]
    assert (mine.timed_by == "browser").all() and (mine.seconds > 0).all()
    assert page.locator(".keep code").all_inner_texts()[0] == app.store.finish_code(person)
    page.get_by_role("heading", name="And the model?").wait_for()
    told = page.locator("dl dd").all_inner_texts()
    for shots, text in zip(app.study.blocks, told, strict=True):
        block = mine[(mine.kind == "study") & (mine.shots == shots)]
        assert text.startswith(f"you {(block.answer == block.truth).sum()} of {len(block)}, the model ")
    assert page.evaluate("localStorage.length") == 0                    # the device forgets a finished participant


# ---- a person with a phone

@pytest.mark.browser
@pytest.mark.slow
def test_a_participant_on_a_phone(app, visit):
    page = visit(width=390, scheme="dark", height=780)
    key, mind, answered = begin(page), Mind(app.study, 2), []
    while (what := screen(page)) != "end":
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        if what != "trial":
            page.get_by_role("button", name=["Begin", "Go on"][what == "go on"]).tap()
            moved_on(page, what)
            continue
        trial = current(page, app.store, key)
        if len(answered) == 6: keep_shot(page, "app-human-phone")
        answer, before = mind.answer(trial), page.locator("#place").inner_text()
        button = page.locator(f'button[data-value="{answer}"]')
        assert button.bounding_box()["height"] >= 43                     # a thumb
        if RECORD: page.wait_for_timeout(mind.takes())
        button.tap()
        answered.append((trial, answer))
        stored(page, before)
    person, rows = app.store.come_back(key), answers_table(app.store)
    assert rows[rows.participant == person.id].answer.tolist() == [a for _, a in answered] and person.finished
    page.get_by_role("heading", name="And the model?").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


# ---- two windows, somebody else at the same device, deleting

@pytest.mark.browser
def test_two_windows_leave_one_answer_and_tell(app, visit):
    first = visit(allowed=["409"])
    key = begin(first)
    second = visit(f"/#k={key}", allowed=["409", "404"])
    for page in (first, second):
        while screen(page) != "trial": page.keyboard.press("Enter"); page.wait_for_timeout(50)
    first.locator(".choices button").nth(0).click()
    first.locator(".solution b").wait_for()
    second.locator(".choices button").nth(1).click()
    second.get_by_text("Another window was ahead of this one").wait_for()
    person = app.store.come_back(key)
    rows = answers_table(app.store)
    assert person.done == 1 and rows[rows.participant == person.id].answer.tolist() == [app.study.classes[0]]
    # the same browser offers to go on; on this device nobody else is taken for that person
    page = first.context.new_page()
    page.goto(app.home)
    page.get_by_role("button", name="I am somebody else").click()
    page.get_by_role("checkbox").wait_for()
    # deleting, from the page that knows the code
    first.get_by_role("button", name="Delete my data").click()
    first.get_by_role("button", name="Delete everything of mine").click()
    first.get_by_text("1 answer was deleted").wait_for()
    assert person.id not in set(answers_table(app.store).participant)
    second.reload()
    second.get_by_role("heading", name="This link is not known").wait_for()


@pytest.mark.browser
def test_links_and_codes_that_are_none(app, visit):
    page = visit("/#k=" + "x" * 48, allowed=["404"])
    page.get_by_role("heading", name="This link is not known").wait_for()
    page.get_by_role("button", name="To the first page").click()
    page.get_by_role("checkbox").wait_for()
    page.get_by_role("button", name="Delete my data").click()
    page.get_by_label("Delete code").fill("<b>0000</b>")
    page.get_by_role("button", name="Delete everything of mine").click()
    page.get_by_text("That code is not known here").wait_for()


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(1280, "dark"), (390, "light")])
def test_the_first_page_fits_and_is_read_aloud(visit, width, scheme):
    page = visit(width=width, scheme=scheme)
    page.get_by_role("checkbox").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width and page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("document.activeElement.tagName") == "H1" and page.get_by_role("main").count() == 1
    ink, ground = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    assert (ink, ground) == (("rgb(244, 244, 245)", "rgb(24, 24, 27)") if scheme == "dark" else ("rgb(39, 39, 42)", "rgb(255, 255, 255)"))


# ---- other designs, on a server inside this process

EVIL = "<img src=x onerror=document.title='owned'>"


@pytest.fixture
def other(tmp_path, browser):
    "other(store changes...) -> (page, store) of a small study with four classes."
    import threading
    import uvicorn
    from clip_lab.humans.web import study_app
    servers, contexts = [], []
    def go(searchable=False, **changes):
        study = open_study(demo_design(**dict(classes=("Brazil", "Canada", "Japan", "Bhutan"), obvious=("Japan",), shots=(0,), pictures_per_participant=4, repeats=1, practice=0, checks=0) | changes))
        study.searchable = searchable
        store, port = Store(f"sqlite:///{tmp_path}/other.db", study), free_port()
        server = uvicorn.Server(uvicorn.Config(study_app(store, TOKEN), port=port, log_level="warning"))
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started: time.sleep(0.02)
        servers.append((server, store))
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}))
        page = contexts[-1].new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        begin(page)
        page.keyboard.press("Enter")
        return page, store
    yield go
    for context in contexts: context.close()
    for server, store in servers: server.should_exit = True; store.close()


def trial_on(page):
    while screen(page) != "trial": page.keyboard.press("Enter"); page.wait_for_timeout(60)


@pytest.mark.browser
def test_few_answers_have_digits_and_a_break_comes(other):
    page, store = other(break_every=2)
    trial_on(page)
    assert page.get_by_label("Find an answer").count() == 0 and page.locator(".choices kbd").all_inner_texts() == ["1", "2", "3", "4"]
    for key in "20":
        before = page.locator("#place").inner_text()
        page.keyboard.press("9")                                           # no such answer: nothing happens
        page.keyboard.press(key)
        stored(page, before)
        if key == "2": trial_on(page)
    page.get_by_role("heading", name="A short break").wait_for()
    assert "2 of 4 are done and stored" in page.locator(".lead").inner_text()
    assert answers_table(store).answer.tolist() == ["Canada", DONT_KNOW]


@pytest.mark.browser
def test_time_runs_out_as_i_dont_know(other):
    page, store = other(time_limit=1)
    trial_on(page)
    page.locator(".time").wait_for()
    until(page, "() => document.querySelector('main h1').textContent === 'Thank you'")
    rows = answers_table(store)
    assert (rows.answer == DONT_KNOW).all() and len(rows) == 4 and rows.seconds.between(0.95, 4).all()


@pytest.mark.browser
def test_texts_of_a_design_stay_text(other):
    page, store = other(title=EVIL, question=EVIL, searchable=True)
    trial_on(page)
    assert page.get_by_role("heading", level=1).inner_text() == EVIL and page.title() == EVIL and page.locator("main img").count() == 1


# ---- the researcher

@pytest.mark.browser
def test_the_researchers_pages_open_with_the_token_only(app, visit):
    page = visit("/researcher", allowed=["401", "403", "404"])
    page.get_by_label("Token").fill("not the token at all")
    page.get_by_role("button", name="Open").click()
    page.get_by_text("That is not the token").wait_for()
    assert page.get_by_text("How is the study going?").count() == 0
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Open").click()
    page.get_by_role("heading", level=1, name="How is the study going?").wait_for()
    page.get_by_text("seats finished").wait_for()
    assert page.get_by_text("Hidden. Looking at results before the end").is_visible() and page.get_by_text("Rank correlation").count() == 0
    page.get_by_label("Show the results").check()
    page.get_by_text("Interim:").wait_for(timeout=120_000)
    page.get_by_role("heading", name="Table 2").wait_for()
    assert page.locator(".cl-figure").count() == 4 and all(figure.get_attribute("alt") for figure in page.locator(".cl-figure").all())
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.wait_for_timeout(300)
    keep_shot(page, "app-human-researcher", full_page=True, clip={"x": 0, "y": 0, "width": 1280, "height": 1560})
    page.get_by_label("Check finish codes").fill(f"{app.code} 0000-0000-0000")
    page.get_by_text("1 of 2 codes are good").wait_for()
    with page.expect_download() as download: page.get_by_role("link", name="answers.csv").click()
    assert Path(download.value.path()).read_text().startswith("participant,seat,trial,")


@pytest.mark.browser
def test_the_link_with_the_token_opens_and_does_not_keep_it(app, visit):
    page = visit(f"/researcher#token={TOKEN.replace(' ', '%20')}", width=390, scheme="dark", allowed=["401", "404"])
    page.get_by_text("seats finished").wait_for(timeout=60_000)
    assert "token" not in page.url and page.evaluate("document.documentElement.scrollWidth") <= 390


# ---- the app as a file

def test_the_app_is_thin(): assert len(APP.read_text().splitlines()) <= 250


def test_the_module_shows_the_demo(monkeypatch):
    "What `gradio apps/human.py` finds: `demo`, already filled, without the command line of whoever runs it."
    monkeypatch.setattr(sys, "argv", ["gradio", "--nonsense"])
    spec = importlib.util.spec_from_file_location("human_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.demo.analytics_enabled is False and "6 of 10" in module.seats.value and "simulated" in module.results(True, "emoji")
    assert "clip-lab models --fetch" in module.results(True, "ViT-B/16") or "Table 2" in module.results(True, "ViT-B/16")
    page = urllib.request.urlopen(module.PARTICIPANTS, timeout=30).read().decode()
    assert module.STORE.study.design.title in page
    module.STORE.close()


@pytest.mark.skipif(not RECORD, reason="writes nbs/studies/table02_recorded.csv with CLIP_LAB_SCREENSHOTS=1")
def test_the_sessions_are_recorded(app):
    "The answers of the two browser sessions above, for nbs/studies/table02_humans.ipynb; named as what they are."
    rows = answers_table(app.store)
    rows = rows[rows.seat > 6].drop(columns=["instructed", "timed_by", "number"])
    complete = [p for p, own in rows.groupby("participant") if len(own) == len(app.study.trials(int(own.seat.iloc[0])))]
    rows = rows[rows.participant.isin(complete)]
    rows["participant"] = "browser-" + (rows.participant.map({p: i for i, p in enumerate(dict.fromkeys(rows.participant), 1)})).astype(str)
    assert rows.participant.nunique() == 2
    rows["at"] = rows["at"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    rows.to_csv(ROOT / "nbs" / "studies" / "table02_recorded.csv", index=False)
