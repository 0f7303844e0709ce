"""Be the model for ten minutes, then compare: a study with people in a browser, and the pages of whoever runs it.

`python apps/human.py` runs the demo study, `python apps/human.py --study my.yaml --db sqlite:///study.db` runs yours; both print the link for participants and the researcher's link.
`gradio apps/human.py` shows the researcher's pages of the demo while you edit them. It listens on 127.0.0.1 unless --host opens it, and sends nothing anywhere.
"""
from html import escape
import os
import sys
import tempfile
import threading

from clip_lab.ui.theme import CSS, keep_quiet, launch_options, note_html, theme

keep_quiet()

import gradio as gr

from clip_lab.cli import model_table
from clip_lab.humans.models import model_answers
from clip_lab.humans.simulated import Crowd, simulate
from clip_lab.humans.store import Store, Unavailable, check_finish_codes
from clip_lab.humans.web import arguments, open_store, person_scores, serve, study_app
from clip_lab.pretrained import load
from clip_lab.ui.plots import table_html
from clip_lab.ui.researcher import balance_html, exports_html, people_html, recruitment_html, results_html

SIMULATED = 6        # people of the demo who are not real; the next ones are

def read_options():
    "The words of the command line, and the environment's; `gradio` gives none."
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tell-scores", action="store_true", help="tell people at the end how they and the shipped model did; not while others are still to come")
    return parser.parse_args(sys.argv[1:] if __name__ == "__main__" else [])

def demo_store(options) -> Store:
    "The demo study in a temporary file, with a few simulated people in it, so that its pages are not empty."
    folder = tempfile.TemporaryDirectory(prefix="clip-lab-study-")       # removed when Python ends
    options.db = f"sqlite:///{folder.name}/demo.db"
    store = open_store(options)
    store.folder = folder
    answers = simulate(store.study, Crowd(skill=0.35), seats=range(1, SIMULATED + 1), seed=0)
    for seat, rows in answers.groupby("seat"):
        store.enrol(key := store.ticket())
        for row in rows.itertuples(): store.answer(key, row.trial, row.answer, min(row.seconds, 4.9))       # a time that the server can believe
    return store

def answers_of(name: str):
    "The answers of a model to the pictures of this study, computed once."
    if name not in FOUND: FOUND[name] = model_answers(STORE.study, *load(name, local_files_only=True))
    return FOUND[name]

def scores(person) -> list:
    "What the last page tells a participant."
    return person_scores(STORE, person, answers_of("emoji"))

def alone(store: Store) -> str:
    "The participant's page of the demo on a port of its own, for `gradio apps/human.py`; its address."
    import secrets, socket, uvicorn
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(study_app(store, secrets.token_urlsafe(24), scores=scores), port=port, log_level="warning", access_log=False))
    threading.Thread(target=server.run, daemon=True).start()
    return f"http://127.0.0.1:{port}/"

if gr.NO_RELOAD:     # editing this page reloads it in a second, without the study and the weights
    OPTIONS = read_options()
    DEMO = not (OPTIONS.study or OPTIONS.db)
    try: STORE = demo_store(OPTIONS) if DEMO else open_store(OPTIONS)
    except (ValueError, OSError, Unavailable) as error: sys.exit(f"error: {error}")
    HERE = "GRADIO_WATCH_DIRS" in os.environ or __name__ != "__main__"       # shown by Gradio, not by our server
    PARTICIPANTS = alone(STORE) if HERE else "/"
    FOUND = {}       # model -> its answers to the pictures of this study

def state():
    "The parts that are looked at while a study runs."
    try: return "", recruitment_html(STORE), balance_html(STORE), people_html(STORE)
    except Unavailable as error: return note_html(str(error), "The page shows what it last knew."), gr.skip(), gr.skip(), gr.skip()

def results(asked: bool, name: str):
    "The analysis against a model, when it was asked for."
    if not asked: return '<p class="cl-muted">Hidden. Looking at results before the end tempts one to stop when they look good.</p>'
    try: return results_html(STORE, answers_of(name), name, f"people ({SIMULATED} of them simulated)" if DEMO else "people")
    except FileNotFoundError: return note_html(f"{name} is not on this machine yet. To fetch it once, run: clip-lab models --fetch {name}")
    except (Unavailable, ValueError) as error: return note_html(str(error))

def codes(text: str):
    "Which finish codes are good."
    given = text.split()[:1000]
    if not given: return ""
    table = check_finish_codes(STORE, given)
    return table_html(table.assign(good=table.good.map({True: "good", False: "not known"})), f"{int(table.good.sum())} of {len(table)} codes are good")

def section(title, text): return gr.HTML(f'<div class="cl-section"><h2>{title}</h2><p>{text}</p></div>')

design = STORE.study.design
with gr.Blocks(title=f"Study {design.name}: clip_lab", analytics_enabled=False) as demo:
    gr.HTML(f'<header class="cl-head"><h1>How is the study going?</h1><p>{escape(design.title)}. Version {design.version}, design {design.hash}.<br>'
            f'<a href="{PARTICIPANTS}" target="_blank" rel="noopener">Open the page of the participants</a>' + ("" if HERE else ' · <a href="/researcher/logout">Close these pages</a>')
            + (f"<br>This is the demo: {SIMULATED} of its people are simulated, and its answers are gone when it stops." if DEMO else "") + "</p></header>")
    note = gr.HTML(elem_classes="cl-sticky")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320): seats = gr.HTML()
        with gr.Column(scale=6, min_width=320): balance = gr.HTML()
    section("Who took part", "Random ids that open nothing. Whom the design's rules would exclude is said here; who is excluded is decided by the analysis.")
    people = gr.HTML()
    section("Results", "Table 2, the curve over examples, and who finds what hard, against a model that answered the same pictures.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320): asked = gr.Checkbox(False, label="Show the results", info="Interim until every seat is finished, and marked as such.")
        with gr.Column(scale=6, min_width=320):
            models = model_table()
            model = gr.Dropdown([(f"{row.model} ({'here' if row.here else 'not here yet'})", row.model) for row in models.itertuples()], value="emoji", label="Model")
    analysis = gr.HTML(results(False, "emoji"))
    section("Take it along", "No file holds a link or a code. Cells that a spreadsheet would take for a formula begin with an apostrophe.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320): gr.HTML(exports_html() if not HERE else '<p class="cl-muted">With <code>python apps/human.py</code> the files are here.</p>')
        with gr.Column(scale=6, min_width=320):
            given = gr.Textbox(label="Check finish codes", info="One or many; the reply does not say whose answers they are.", lines=2, max_lines=8, max_length=20_000)
            checked = gr.HTML()
    for part, value in zip((note, seats, balance, people), state()): part.value = value

    quiet = dict(show_progress="hidden", api_name=False)
    gr.Timer(10).tick(state, None, [note, seats, balance, people], **quiet)
    demo.load(state, None, [note, seats, balance, people], **quiet | dict(api_name="state"))
    gr.on([asked.change, model.input], results, [asked, model], analysis, concurrency_id="model", concurrency_limit=1, api_name="results")
    given.change(codes, given, checked, **quiet)

demo.queue(max_size=64, default_concurrency_limit=4)

def add_pages(app):
    "The researcher's pages below /researcher of our server."
    keep = ("footer_links", "max_file_size", "ssr_mode", "pwa", "mcp_server", "enable_monitoring")
    gr.mount_gradio_app(app, demo, "/researcher", theme=theme(), css=CSS, show_error=False, run_history=False, **{k: v for k, v in launch_options().items() if k in keep})

if __name__ == "__main__":
    if HERE: demo.launch(**launch_options())
    else: serve(OPTIONS, STORE, add_pages, scores if DEMO or OPTIONS.tell_scores else None)
