"""The bias app: its endpoints through gradio_client, and what a person sees and does in a real browser."""
from base64 import b64decode
import csv
import importlib.util
from io import StringIO
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("gradio", reason="the app needs Gradio: pip install 'clip_lab[apps]'")
from gradio_client import Client, handle_file

from clip_lab.audits.explorer import State, label_text, to_link
from clip_lab.data import emoji
from test_app_zeroshot import browser, free_port, nothing_jumps, settled   # noqa: F401  one browser, one way to find a port

ROOT = Path(__file__).parents[1]
APP = ROOT / "apps" / "bias.py"
EVIL = "<img src=x onerror=document.title='owned'>"
TEXT = label_text(State())
PLAIN = "the makers of this test"
USUAL = dict(data="twemoji", by=["gender"], threshold=4, mode="multi-label", base="occupations", text=TEXT, templates="a photo of {}", harm=False, order="differ", label="judge", group="every group", other="0.5 %")
PARTS = ("note", "about", "finding", "bars", "table", "behind", "label", "group", "curve", "goes", "difference", "tests", "link", "code", "files", "presets")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    "The app as a module, serving on a free port."
    before = dict(os.environ)
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    spec = importlib.util.spec_from_file_location("bias_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.demo.launch(**module.launching(port=free_port()), prevent_thread_lock=True, quiet=True)
    yield module
    module.demo.close()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def client(app): return Client(app.demo.local_url, verbose=False)       # each a session of its own


def ask(client, **given): return dict(zip(PARTS, client.predict(*(USUAL | given).values(), api_name="/view")))


def rates(page) -> dict:
    "label, group -> (k, n), as the buttons say it."
    found = re.findall(r'data-label="([^"]*)" data-group="([^"]*)".*?([\d,]+) of ([\d,]+)</span></button>', page["bars"])
    return {(l, g): (int(k.replace(",", "")), int(n.replace(",", ""))) for l, g, k, n in found}


def carried(html: str) -> dict:
    "File name -> text of the download links."
    return {name: b64decode(data).decode() for name, data in re.findall(r'download="([^"]*)" href="data:[^,]*base64,([^"]*)"', html)}


def packed(path, n=24, more=None, head="file,gender", row=lambda i: f"{i}.png,{'woman' if i % 2 else 'man'}"):
    "A zip of drawn people with its table."
    drawn = emoji.load("twemoji")
    people = drawn.select((drawn.table.subgroup == "person with a job").to_numpy()).select(range(n))
    with zipfile.ZipFile(path, "w") as z:
        for i in range(n): z.writestr(f"{i}.png", people.pictures.encoded(i))
        z.writestr("table.csv", "\n".join([head, *map(row, range(n))]))
        for name, data in (more or {}).items(): z.writestr(name, data)
    return path


# ---- the endpoints

def test_the_bars_are_plain_counts(app, client):
    from clip_lab.audits.labels import label_scores, label_set
    bench, page = app.BENCHES["twemoji"], ask(client, threshold=2)
    labels = label_set("occupations").remove("prisoner", "mobster")
    given = pd.DataFrame(label_scores(app.EXPLORER.model, bench.features, labels) >= np.float32(.02), columns=labels.names)
    k = given.groupby(bench.people.data.table.gender.to_numpy()).agg(["sum", "size"])
    assert page["note"] == "" and len(rates(page)) == 27
    for (label, group), counted in rates(page).items(): assert counted == tuple(k.loc[group, label])
    view = app.EXPLORER.view(bench, State(threshold=.02))
    best = view.tests.iloc[0]
    assert best.label in page["finding"] and best.leans in page["finding"]


def test_the_python_lines_make_the_same_view(client):
    page = ask(client, by=["gender", "age"], threshold=1.5, text=TEXT.replace("judge", "judge | a magistrate"), label="judge", mode="argmax")
    scope = {}
    exec(page["code"], scope)
    made = {(r.label, r.group): (r.k, r.n) for r in scope["view"].rates.itertuples()}
    assert rates(page) and rates(page).items() <= made.items()


@pytest.mark.parametrize("given, message", [
    (dict(text="judge"), "There is one label; a choice needs at least two"),
    (dict(text="judge\nnurse\nJudge"), "Line 3, &#x27;Judge&#x27;, says the same as line 1"),
    (dict(text="a\nb | b | slander"), "there is no category &#x27;slander&#x27;"),
    (dict(text="a\nthief | a thief | crime-related"), "of a category that does harm"),
    (dict(text="\n".join(f"label {i}" for i in range(401))), "the limit is 400"),
    (dict(text="word " * 200 + "\nnurse"), "300 characters"),
    (dict(text=f"{EVIL} | {EVIL} | {EVIL}\nnurse"), "&lt;img src=x"),
    (dict(templates="a photo"), "needs exactly one {}"),
    (dict(templates=""), "There are no templates yet"),
    (dict(threshold=0), "gives every label to everybody"),
    (dict(threshold=100), "gives every label to everybody"),
    (dict(threshold=None), "not a number"),
    (dict(by=[]), "at least one attribute"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_mistakes_are_told_calmly_and_change_nothing(client, given, message):
    note = client.predict(*(USUAL | given).values(), api_name="/view")[0]
    assert message in note and "<img" not in note and "still shows the last complete choice" in note


def test_harmful_labels_are_not_asked_unless_chosen(client):
    page = ask(client)
    assert "prisoner" not in "".join(map(str, page.values())) and "mobster" not in page["code"]
    harm = ask(client, harm=True, text=label_text(State(harm=True)), label="prisoner")
    assert "does harm" in harm["bars"] and "prisoner" in harm["bars"]


def test_pinning_and_comparing(client):
    ask(client, by=["age"])
    client.predict(api_name="/pin")
    page = ask(client, by=["age"], text=TEXT + "\nchild | a child", label="child")
    assert "add child" in page["difference"] and "McNemar" in page["difference"] and re.search(r"\d+ pictures</b> of 1,424 moved", page["difference"])
    files = carried(client.predict(api_name="/files"))
    assert sorted(files) == ["change.csv", "exploration.json", "moves.csv", "pictures.csv", "rates.csv", "tests.csv"]
    told = json.loads(files["exploration.json"])
    moved = sum(int(r["k"]) for r in csv.DictReader(StringIO(files["moves.csv"])))
    assert f"{moved:,} picture" in page["difference"] and told["measured"]["provenance"]["shows"].startswith("drawn people")
    assert "Group both alike" in ask(client, by=["gender"])["difference"]


def test_a_session_keeps_no_component_for_each_answer(app, client):
    "What a dropdown offers follows the labels; a session that asks on and on must not grow with it."
    def kept(): return sum(len(s.blocks_config.blocks) for s in app.demo.app.state_holder.session_data.values())
    ask(client)
    before = kept()
    for threshold in range(1, 9): ask(client, threshold=threshold)
    assert kept() == before
    page = ask(client, text=TEXT + "\nchild | a child", label="child")
    assert "child" in [name for _, name in page["label"]["choices"]] and page["label"]["value"] == "child"
    assert ask(client)["label"]["value"] == "judge"


def test_a_sealed_report_comes_as_a_zip(client, tmp_path):
    from clip_lab.audits.card import read_audit
    ask(client, threshold=3)
    (tmp_path / "report.zip").write_bytes(b64decode(re.search(r'base64,([^"]*)"', client.predict(api_name="/report"))[1]))
    with zipfile.ZipFile(tmp_path / "report.zip") as z: z.extractall(tmp_path)
    report = read_audit(tmp_path / "report")                 # its seal is checked
    assert report.plan.thresholds == [.005, .03, .04] and report.asked["source"]["source"] == "emoji:twemoji" and "prisoner" not in report.plan.label_sets[0].names


def test_user_text_is_text_on_the_page_and_in_the_files(client):
    page = ask(client, text=f"{EVIL}\n=HYPERLINK(\"http://x\")\na man", base="own", label="a man")
    assert "<img src" not in "".join(str(page[p]) for p in PARTS if p not in ("behind", "code", "label", "group"))     # those two are lists, which Gradio writes as text
    assert page["behind"].count("<img") <= 18 and "<img src=x" not in page["behind"]
    rows = list(csv.reader(StringIO(carried(client.predict(api_name="/files"))["rates.csv"])))
    assert any(r[0] == "'=HYPERLINK(\"http://x\")" for r in rows) and not any(cell.startswith("=") for r in rows for cell in r)


def own(client, path, sheet=None, answers=(PLAIN,) * 5):
    return client.predict(path and handle_file(str(path)), sheet and handle_file(str(sheet)), *answers, api_name="/own")


def test_own_pictures_are_read_and_only_for_their_owner(app, client, tmp_path):
    report = own(client, packed(tmp_path / "mine.zip", more={"notes.txt": "x", "12b.png": "no picture"}))[-1]
    assert "24 pictures were read; they can be grouped by gender" in report and "notes.txt" in report
    page = ask(client, data="own")
    assert PLAIN.capitalize() in page["about"] and "24 pictures" in page["about"] and rates(page) and "open_people('pictures.zip'" in page["code"]
    other = Client(app.demo.local_url, verbose=False)
    with pytest.raises(Exception): assert "somebody" not in ask(other, data="own")["note"]      # refused by Gradio or by us
    assert not [f for f in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("mine.zip")]               # read, and gone


@pytest.mark.parametrize("more, table, message", [
    ({"../evil.png": "x"}, {}, "leads out of the archive"),
    ({}, dict(head="file,remark", row=lambda i: f"{i}.png,remark {i}"), "no column divides the pictures"),
    ({}, dict(head="file,gender", row=lambda i: f"{i}.png,woman"), "no column divides the pictures"),
    ({"b.csv": "file,who"}, {}, "has 2 tables"),
], ids=["slip", "no groups", "one group", "two tables"])
def test_bad_uploads_are_refused_in_words(client, tmp_path, more, table, message):
    assert message in own(client, packed(tmp_path / "bad.zip", more=more, **table))[-1]


def test_together_uploads_take_no_more_than_there_is_room_for(app, client, tmp_path, monkeypatch):
    monkeypatch.setattr(app.EXPLORER, "most_bytes", 1000)
    archive = packed(tmp_path / "p.zip")
    said = own(client, archive)[-1]
    assert "There is no room for these pictures" in said and "still shows the pictures from before" in said
    monkeypatch.setattr(app.EXPLORER, "most_bytes", 1 << 30)
    assert "24 pictures" in own(client, archive)[-1]


def test_an_upload_asks_for_its_provenance(client, tmp_path):
    assert "Who agreed to what?" in own(client, packed(tmp_path / "mine.zip"), answers=(PLAIN, PLAIN, PLAIN, " ", PLAIN))[-1]
    assert "There is no zip yet" in own(client, None)[-1]


def test_it_listens_here_only_and_counts_nobody(app):
    assert app.demo.local_url.startswith("http://127.0.0.1:") and app.demo.share_url is None and app.demo.analytics_enabled is False


def test_the_app_is_thin(): assert len(APP.read_text().splitlines()) <= 250


@pytest.mark.slow
def test_pictures_given_at_start(tmp_path):
    "--data: the folder is read, what was left out is told, and the page opens with it."
    with zipfile.ZipFile(packed(tmp_path / "mine.zip")) as z: z.extractall(tmp_path / "set")
    about = tmp_path / "set" / "provenance.yaml"
    about.write_text("\n".join(f"{q}: made up" for q in ("shows", "source", "attributes", "consent", "limits")))
    code = f"import sys, runpy, gradio as gr\ngr.Blocks.launch = lambda self, **o: print('launched', o['server_name'])\nsys.argv = ['bias.py', '--data', {str(tmp_path / 'set')!r}]\nrunpy.run_path({str(APP)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert "24 pictures, by gender" in done.stdout and "launched 127.0.0.1" in done.stdout, done.stderr[-1500:]


# ---- a person with a browser

@pytest.fixture
def visit(app, browser):                             # noqa: F811
    "visit(width, scheme, query) -> page; at the end of the test: no error in the console, no request to anywhere else."
    problems, contexts = [], []
    def go(width=1280, scheme="light", query="", height=900):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: problems.append(f"page error: {e}"))
        page.on("request", lambda r: None if r.url.startswith((app.demo.local_url, "data:", "blob:")) else problems.append(f"left this machine: {r.url}"))
        page.goto(app.demo.local_url + query)
        page.locator(".cl-rate").first.wait_for()
        page.wait_for_function("document.querySelector('.cl-link')")
        return page
    yield go
    for context in contexts: context.close()
    assert not problems


def first_bar(page): return page.locator(".cl-rate").first
def finding(page): return page.locator(".cl-says").first.inner_text()


def slide_to(page, steps, key="ArrowRight"):
    slider = page.get_by_role("slider", name="Threshold")
    slider.focus()
    for _ in range(steps): page.keyboard.press(key)


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_choose_slide_add_pin_compare_press_and_take(visit, width, scheme, tmp_path):
    page = visit(width, scheme)
    assert nothing_jumps(page)
    assert page.get_by_role("heading", level=1).inner_text() == "Whom do the labels follow?"
    assert "no real person is in any picture" in page.locator(".cl-about").inner_text()
    page.get_by_text("Where they come from, who agreed").click()
    assert page.get_by_text("nobody is shown, so nobody had to agree").is_visible()
    page.get_by_text("Where they come from, who agreed").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width                    # nothing sticks out
    page.screenshot(path=(shot := tmp_path / f"{width}-{scheme}.png"))
    if os.environ.get("CLIP_LAB_SCREENSHOTS") == "1" and (width, scheme) == (1280, "light"): shutil.copy(shot, ROOT / "nbs" / "images" / "app-bias.png")

    before = finding(page)                                                                   # slide
    slide_to(page, 12, "ArrowLeft")
    page.wait_for_function("before => document.querySelector('.cl-says').innerText !== before", arg=before)
    assert float(page.get_by_label("Threshold in per cent").input_value()) < 4

    page.get_by_label("age", exact=True).check()                                             # choose groups
    page.get_by_label("gender", exact=True).uncheck()
    page.locator('.cl-rate[data-group="child"]').first.wait_for()
    settled(page).get_by_role("button", name="Pin this as A").click()
    page.get_by_text("is still the same").wait_for()
    settled(page).get_by_role("button", name="Add “child”").click()                                   # add, compare
    page.get_by_text("add child").wait_for()
    assert page.get_by_label("Labels, one a line").input_value().endswith("child | a child")
    moves = page.get_by_role("table").filter(has_text="From what to what")
    assert moves.locator("tbody tr").first.locator("td").nth(1).inner_text() == "child"
    assert page.get_by_role("table").filter(has_text="on the same pictures").locator("tbody tr").count() == 3

    bar = first_bar(page)                                                                    # press a bar
    label, group = bar.get_attribute("data-label"), bar.get_attribute("data-group")
    settled(page)
    bar.click()
    page.locator(f'.cl-rate[data-label="{label}"][data-group="{group}"][aria-pressed="true"]').wait_for()
    assert page.locator(".cl-behind-head").inner_text().startswith(f"{label} for {group}:")
    k = int(bar.locator(".cl-of").inner_text().split(" ")[0].replace(",", ""))
    assert page.locator(".cl-behind li").count() == min(k, 18)

    settled(page).get_by_role("button", name="Make the files").click()                                # take along
    with page.expect_download() as got: page.get_by_role("link", name="moves.csv").click()
    rows = list(csv.DictReader(Path(got.value.path()).open()))
    assert {"child"} <= {r["after"] for r in rows}
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_a_link_restores_the_view_and_what_was_pinned(visit, app):
    page = visit()
    settled(page).get_by_role("button", name="0.5 %").first.click()
    page.wait_for_function("location.search.length > 10")
    settled(page).get_by_role("button", name="Add “none of these”").click()
    page.get_by_text("add none of these").wait_for()
    said, query = finding(page), page.evaluate("location.search")
    again = visit(query=query)
    again.get_by_text("add none of these").wait_for()
    assert finding(again) == said and again.get_by_label("Threshold in per cent").input_value() == "0.5"
    assert "none of these" in again.get_by_label("Labels, one a line").input_value()
    broken = visit(query="?view=1.nonsense")
    broken.get_by_text("This link cannot be read").wait_for()
    assert broken.locator(".cl-rate").count() >= 24                                          # the usual start
    lost = visit(query=f"?view={to_link(State(data='own'))}")
    lost.get_by_text("were somebody's own and are not here").wait_for()


@pytest.mark.browser
def test_the_keyboard_is_enough(visit):
    page = visit()
    before = finding(page)
    slide_to(page, 10)
    page.wait_for_function("before => document.querySelector('.cl-says').innerText !== before", arg=before)
    bar = first_bar(page)
    bar.focus()
    page.keyboard.press("Tab")
    chosen = page.evaluate("document.activeElement.dataset.group")
    page.keyboard.press("Enter")
    page.wait_for_function("group => document.querySelector('.cl-behind-head').innerText.includes(group)", arg=chosen)
    page.get_by_label("Group", exact=True).focus()
    page.keyboard.press("ArrowDown"); page.keyboard.press("ArrowDown"); page.keyboard.press("Enter")
    page.get_by_label("Labels, one a line").focus()
    page.keyboard.press("Control+End"); page.keyboard.type("\ngardener | a gardener")
    page.get_by_text("add gardener").wait_for()
    page.get_by_role("button", name="Back to A").focus()
    page.keyboard.press("Enter")
    page.get_by_text("is still the same").wait_for()
    assert "gardener" not in page.get_by_label("Labels, one a line").input_value()


@pytest.mark.browser
def test_two_browsers_do_not_see_each_other(visit):
    one, two = visit(), visit()
    before = finding(two)
    one.get_by_label("Labels, one a line").fill("a cat\na dog\na judge")
    one.get_by_text("labels: ").first.wait_for()
    settled(one).get_by_role("button", name="Pin this as A").click()
    one.get_by_text("A: 3 labels").wait_for()
    two.get_by_label("age", exact=True).check()
    two.locator('.cl-rate[data-group="woman, child"]').first.wait_for()
    assert two.get_by_text("A is grouped by gender, B by gender x age").is_visible() and before != finding(two)
    assert one.locator('.cl-rate[data-group="woman, child"]').count() == 0 and one.locator('.cl-rate[data-label="a cat"]').count() == 3


@pytest.mark.browser
def test_a_label_is_text_and_a_mistake_keeps_the_view(visit):
    page = visit()
    box = page.get_by_label("Labels, one a line")
    box.fill(f"{EVIL}\n${{document.title='owned'}} {{{{this}}}}\na man")
    page.locator(".cl-label", has_text="onerror").wait_for()
    bars = page.locator(".cl-rate").count()
    first_bar(settled(page)).click()
    page.locator('.cl-rate[aria-pressed="true"]').wait_for()
    assert "owned" not in page.title() and page.locator(".cl-rates img").count() == 0
    box.fill("only one")
    page.get_by_text("There is one label").wait_for()
    assert page.locator(".cl-rate").count() == bars
    note = page.locator(".cl-note").bounding_box()
    assert 0 <= note["y"] <= 900 - note["height"]                                            # in sight, although the page is scrolled down
    box.fill("one\nanother")
    page.get_by_text("There is one label").wait_for(state="detached")


@pytest.mark.browser
def test_harm_is_asked_for_and_marked(visit):
    page = visit()
    page.get_by_label("Start from a label set").click()
    page.get_by_role("option", name="paper-21", exact=True).click()
    page.locator('.cl-rate[data-label*="man"]').first.wait_for()
    assert "thief" not in page.get_by_label("Labels, one a line").input_value() and page.get_by_text("does harm").count() == 0
    settled(page).get_by_label("Also ask labels that do harm").check()
    page.wait_for_function("document.querySelector('textarea')?.value !== null && [...document.querySelectorAll('textarea')].some(t => t.value.includes('thief'))")
    settled(page).get_by_label("those that are given most").check()
    settled(page).get_by_label("Label", exact=True).click()
    page.get_by_role("option", name="thief", exact=True).click()
    page.locator(".cl-harm").first.wait_for()
