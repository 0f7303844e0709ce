"""The notebooks where people run them: JupyterLab in a real browser, all cells of three notebooks, a slider moved by keyboard."""
import json
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install 'clip_lab[notebooks]'")
pytest.importorskip("ipywidgets", reason="needs ipywidgets: pip install 'clip_lab[notebooks]'")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ["ten_minutes.ipynb", "evals/34_flatmap.ipynb", "ui/65_widgets.ipynb"]
TOKEN = "only-for-this-test"
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"},                       # all cells are on the page, seen or not
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}}

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def alive_in_group(group: int) -> list[int]:
    "Processes that still belong to a process group, from /proc."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: fields = stat.read_text().rpartition(")")[2].split()
        except OSError: continue
        if int(fields[2]) == group and fields[0] != "Z": found.append(int(stat.parent.name))
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a JupyterLab on this machine only, with a copy of three notebooks and nothing of anybody's settings; it and its kernels are gone afterwards."
    home = tmp_path_factory.mktemp("lab")
    for name in NOTEBOOKS:
        (home / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "nbs" / name, home / "nbs" / name)
    for name, values in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    port = free_port()
    own = {f"JUPYTER{name}": str(home / name.strip("_").lower()) for name in ("_CONFIG_DIR", "_DATA_DIR", "_RUNTIME_DIR")} | {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "IPYTHONDIR": str(home / "ipython")}
    env = os.environ | own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={home / 'nbs'}", f"--IdentityProvider.token={TOKEN}",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"]
    with open(home / "log.txt", "w") as log: process = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try: urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=5); break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, f"JupyterLab did not start:\n{(home / 'log.txt').read_text()[-2000:]}"
                time.sleep(0.2)
        yield address
    finally:
        kernels = [] if process.poll() is not None else [int(p) for p in subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()]     # each leads a group of its own
        if process.poll() is None: process.send_signal(signal.SIGTERM)
        try: process.wait(15)
        except subprocess.TimeoutExpired: pass
        left = [g for g in (process.pid, *kernels) if alive_in_group(g)]
        for group in left: os.killpg(group, signal.SIGKILL)
        process.wait(10)
        assert not left, f"still running after JupyterLab was asked to end: {left}"


@pytest.fixture(scope="module")
def page(lab):
    "A page in a browser; in the end nothing has asked for anything outside this machine."
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None: pytest.skip("no Chromium on this machine: apt install chromium")
    outside = []
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(20_000)
        page.on("request", lambda r: None if r.url.startswith((lab, lab.replace("http", "ws"), "data:", "blob:")) else outside.append(r.url))
        yield page
        browser.close()
    assert not outside, outside


def run_all(page, lab: str, name: str) -> None:
    "Open a notebook and run all its cells, as a person does; a cell that fails, or that is not done in time, fails the test."
    page.goto(f"{lab}/lab/tree/{name}?token={TOKEN}&reset")
    notebook = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
    notebook.locator(".jp-CodeCell").first.wait_for()
    notebook.locator(".jp-OutputArea-output img").first.wait_for()     # the saved figure, before anything has run
    page.get_by_text("| Idle").wait_for(timeout=40_000)               # in the status bar, once the kernel is there
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    done = """() => { const cells = [...document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell')];
                      const failed = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden) [data-mime-type="application/vnd.jupyter.error"]');
                      return failed ? 'failed: ' + failed.textContent.slice(-600) : cells.length && cells.every(c => /\\[\\d+\\]/.test(c.querySelector('.jp-InputPrompt').textContent)) ? 'done' : '' }"""
    assert (said := page.wait_for_function(done, timeout=90_000).json_value()) == "done", f"{name} {said}"


@pytest.mark.parametrize("name", NOTEBOOKS[:2])
def test_all_cells_run(page, lab, name):
    run_all(page, lab, name)
    assert page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-OutputArea-output img").count() >= 1


def test_a_slider_moved_by_keyboard_changes_the_figure(page, lab):
    run_all(page, lab, NOTEBOOKS[2])
    with_slider = page.locator(".jp-CodeCell", has_text="slide = threshold_explorer(sweeps)")
    figure, sentence, slider = with_slider.locator("img"), with_slider.get_by_role("status"), with_slider.get_by_role("slider", name="threshold")      # the handle itself has the name, for who cannot see what stands beside it
    figure.wait_for()
    source, told = figure.get_attribute("src"), figure.get_attribute("alt")
    assert told == sentence.inner_text()                               # the sentence on the page is the picture's alt text
    slider.focus()
    for _ in range(5): page.keyboard.press("ArrowRight")
    page.wait_for_function("([img, before]) => img.isConnected ? img.src !== before : true", arg=[figure.element_handle(), source])
    page.wait_for_function("before => [...document.querySelectorAll('[role=status]')].every(s => s.innerText !== before)", arg=told)
    assert figure.get_attribute("alt") == sentence.inner_text() != told and figure.get_attribute("src") != source
    assert with_slider.locator(".widget-label:visible").all_inner_texts() == ["threshold", "label", "groups by"]             # every control has its name
    with_slider.get_by_label("groups by").select_option("tone")
    sentence.filter(has_text="medium-dark").wait_for()


def test_a_mistake_in_a_field_is_told_and_the_figure_stays(page):
    cell = page.locator(".jp-CodeCell", has_text="explore = prompt_explorer(")
    figure, sentence = cell.locator("img"), cell.get_by_role("status")
    before = figure.get_attribute("src")
    cell.get_by_label("templates").fill("a photo without a place")
    cell.get_by_text("The last figure is still shown").wait_for()
    assert "exactly one {}" in sentence.inner_text() and figure.get_attribute("src") == before
    cell.get_by_label("templates").fill("{}")
    cell.get_by_label("labels", exact=True).fill("a cat\na wheel\na violin")
    page.wait_for_function("([img, before]) => !img.isConnected || img.src !== before", arg=[figure.element_handle(), before])
    sentence.filter(has_text="Of 3 labels").wait_for()
