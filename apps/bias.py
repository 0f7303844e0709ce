"""Whom do the labels follow? Move the threshold, change the labels, and see for whom.

Run with `python apps/bias.py`, or with `gradio apps/bias.py` while editing. Own pictures: upload a zip on the page, or start with
`python apps/bias.py --data FOLDER --csv TABLE.csv --provenance ABOUT.yaml`. It listens on 127.0.0.1 unless --host opens it, and sends nothing anywhere.
"""
import argparse
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

from clip_lab.ui.theme import CSS, chosen, exposed, keep_quiet, launch_options, listening, note_html, only_uploads

keep_quiet()

import gradio as gr

from clip_lab.audits.explorer import (MODES, OWN, SECOND, Explorer, State, compare, first_templates, from_link, label_text, own_lines, python_lines, to_link, typed_state, with_harm)
from clip_lab.audits.labels import shipped
from clip_lab.audits.people import People, Provenance, emoji_people
from clip_lab.audits.sources import open_people, read_provenance
from clip_lab.data import emoji
from clip_lab.data.upload import read_folder, read_zip
from clip_lab.evals.prompts import as_text
from clip_lab.pretrained import load
from clip_lab.ui.explore import (EXPLORE_CSS, ORDERS, PRESS, SLIDE, about_html, behind_html, chart_labels, come_and_go_table, compared_html, curve_svg, files_of, finding_html, presets_html, rates_html, rates_table, report_link,
                                 tests_table, threshold_html, told_html)
from clip_lab.ui.plots import download_links, table_html

QUESTION, EVERY, KEPT = "Whom do the labels follow?", "every group", "Everything below still shows the last complete choice."
ASKED = {"shows": "Whom or what do the pictures show?", "source": "Where do they come from?", "attributes": "Who said which group a picture belongs to, and how?", "consent": "Who agreed to what?",
         "limits": "What do numbers made with them not mean?"}
OTHERS = {"0.5 %": 0.005, "4 %": 0.04, "10 %": 0.1, "25 %": 0.25}

parser = listening(argparse.ArgumentParser(description=QUESTION))
parser.add_argument("--data", help="pictures to begin with: a folder or zip with its table, or a name as in `clip-lab audit`")
parser.add_argument("--csv", help="the table of a folder, where it lies elsewhere")
parser.add_argument("--provenance", help="a YAML file that answers " + ", ".join(ASKED) + "; without it, provenance.yaml in the folder")
parser.add_argument("--model", default="emoji", help="a model that is on this machine; see `clip-lab models`")
options = parser.parse_args(None if __name__ == "__main__" else [])

if gr.NO_RELOAD:        # editing this page reloads it in a second, without the weights
    EXPLORER, BENCHES, START = Explorer(*load(options.model, local_files_only=True), options.model, most_bytes=1 << 30), {}, State()

SETS = {style: f"Drawn people, {about.title}" + (", a style the model was trained on" if about.role == "train" else "") for style, about in emoji.STYLES.items()}
LINES, SOURCES = {"own": own_lines("pictures.zip")}, {style: dict(source=f"emoji:{style}", attributes=None, provenance=None, minimum=30, unknown=None) for style in emoji.STYLES}

def given():
    "The pictures named at start, and what was left out of them."
    if not options.csv: return open_people(options.data, None, options.provenance, unknown="not known")
    found = read_folder(options.data, options.csv)
    return People(found.data, found.attributes, read_provenance(options.provenance or Path(options.data) / "provenance.yaml"), unknown="not known"), found.told()[1:]

if options.data:
    try: people, told = given()
    except (ValueError, OSError) as error: parser.exit(2, f"{error}\n")
    print(f"{len(people):,} pictures, by {', '.join(people.attributes)}", *told, sep="\n")
    BENCHES["given"], START = EXPLORER.bench(people), State(data="given", by=(people.attributes[0],))
    if not options.csv: SOURCES["given"] = dict(source=options.data, attributes=None, provenance=options.provenance, minimum=30, unknown="not known")
    SETS, LINES["given"] = {"given": f"Given at start: {people.data.name}"} | SETS, own_lines(options.data, options.csv)

def choices(session): return [(title, name) for name, title in SETS.items()] + [("Your own pictures", "own")] * bool(session.get("own"))
def bench_of(name, session):
    "The pictures of that name: drawings and those given at start are shared, a user's own are not. ValueError if they are not here."
    if name == "own" and session.get("own"): return session["own"]
    if name not in SETS: raise ValueError("The pictures of that view were somebody's own and are not here. Upload them again, or choose others.")
    if name not in BENCHES: BENCHES[name] = EXPLORER.bench(emoji_people(name))
    return BENCHES[name]

def pinned(session): return EXPLORER.view(bench_of(session["pin"].data, session), session["pin"])
def attempt(make):
    "What `make` gives, or the sentence that says why there is nothing."
    try: return make()
    except ValueError as error: return f'<p class="cl-muted">{escape(str(error))}</p>'

def page(state, session, order, label, group, other):
    "Everything that the page shows of a state, and the session that remembers it. ValueError in the user's terms."
    view = EXPLORER.view(bench_of(state.data, session), state)
    shown, query = chart_labels(view, order), f"?view={to_link(state)}" + f"&pin={to_link(session['pin'])}" * (session["pin"] != START)
    label, group = label if label in view.labels.names else shown[0], group if group in view.grouping.names else None
    had, offered = session["offered"], (view.labels.names, [EVERY, *view.grouping.names])
    session = session | {"state": state, "shown": (order, label, group, other), "offered": offered}
    return {note: "", about: about_html(view.bench, emoji.STYLES[state.data].attribution if state.data in emoji.STYLES else ""), finding: finding_html(view), bars: rates_html(view, order, chosen=(label, group)), presets: presets_html(len(view.labels)), session_state: session,
            table: table_html(rates_table(view, list(dict.fromkeys([*shown, label]))), "Per cent of each group, with 95 % intervals"), behind: behind_html(view, label, group),
            label_choice: chosen(label, offered[0], had[0]), group_choice: chosen(group or EVERY, offered[1], had[1]), curve: curve_svg(view.curve(label), state.threshold, label),
            goes: attempt(lambda: table_html(come_and_go_table(view, OTHERS[other]), f"Labels that a group gets at the lower of {100 * state.threshold:.3g} % and {other}, and not at the higher")),
            difference: attempt(lambda: compared_html(compare(before := pinned(session), view), before, view, label)), files: "", code: python_lines(view, LINES.get(state.data)),
            tests: table_html(tests_table(view), f"{int(view.tests.tested.sum())} of {len(view.tests)} labels are given and withheld often enough to be tested; the most different first"),
            link: f'<a class="cl-link" href="{query}">This view as a link</a>'}

def show(data, by, threshold, mode, base, text, templates, harm, order, label, group, other, session):
    "The page after any change; when something is wrong, a notice, and everything else as it was."
    try: return page(typed_state(data, by, threshold, mode, base, text, templates, harm), session, order, label, group, other)
    except (ValueError, OSError) as error: return {note: note_html(str(error), KEPT)}

def restored(state, session):
    "The page and its controls as a state has them."
    try:
        templates_ = map(as_text, state.templates or first_templates(state.labels))
        return page(state, session, *session["shown"]) | {
            data: gr.update(choices=choices(session), value=state.data), by: gr.update(choices=bench_of(state.data, session).people.attributes, value=list(state.by)), threshold: 100 * state.threshold,
            slider: threshold_html(state.threshold), mode: state.mode, base: state.labels, text: label_text(state), templates: "\n".join(templates_), harm: state.harm}
    except (ValueError, OSError) as error: return {note: note_html(str(error), KEPT)}

def arrive(session, request: gr.Request):
    "The view of the address, or the usual start."
    asked = request.query_params
    try: return restored(from_link(asked["view"]), session | {"pin": from_link(asked["pin"]) if "pin" in asked else START}) if "view" in asked else {note: ""}
    except ValueError as error: return {note: note_html(str(error))}

def other_pictures(name, session):
    "Other pictures have other attributes: the groups that both have, or the first."
    try: attributes = bench_of(name, session).people.attributes
    except (ValueError, OSError) as error: return {note: note_html(str(error), KEPT), data: session["state"].data}
    return {by: gr.update(choices=attributes, value=[a for a in session["state"].by if a in attributes] or attributes[:1])}

def other_labels(name, harmful, session):
    "The text of another label set, or of the same one with harmful labels or without."
    state = session["state"]
    if name == state.labels: return {text: label_text(with_harm(state, harmful))}
    return {text: label_text(State(labels=name, edits=SECOND if name == OWN else (), harm=harmful)), templates: "\n".join(map(as_text, first_templates(name)))}

def added(line, current): return current if line.partition(" |")[0] in [l.partition("|")[0].strip() for l in current.splitlines()] else f"{current.rstrip()}\n{line}"

def slid(moved: gr.EventData): return moved.percent
def preset(pressed: gr.EventData): return float(pressed.percent), threshold_html(float(pressed.percent) / 100)
def typed(per_cent): return threshold_html(per_cent / 100) if per_cent and 0 < per_cent < 100 else gr.skip()

def choose(session, pressed: gr.EventData):
    "The bar that was pressed, chosen for the whole page."
    order, _, _, other = session["shown"]
    return page(session["state"], session, order, pressed.label, pressed.group, other)

def pin(session): return page(session["state"], session | {"pin": session["state"]}, *session["shown"])

def both(session):
    "The view, and that of A where it can be compared."
    view = EXPLORER.view(bench_of(session["state"].data, session), session["state"])
    try: compare(before := pinned(session), view)
    except ValueError: before = None
    return view, before

def take(session):
    view, before = both(session)
    return download_links(files_of(view, *session["shown"][1:3], before))

def receive(archive, sheet, shows, source, attributes, consent, limits, session):
    "Own pictures, a few at a time, so that the page says how far it is and can be stopped; the uploads are deleted at once."
    try:
        answers = dict(zip(ASKED, (shows, source, attributes, consent, limits)))
        if not archive: raise ValueError("There is no zip yet: choose one with your pictures.")
        if missing := [ASKED[q] for q, a in answers.items() if not (a or "").strip()]: raise ValueError(f"One question is still open: “{missing[0]}” Answer it, with 'not known' if that is so.")
        found = read_zip(archive, sheet or None)
        people = People(found.data, found.attributes, Provenance(**answers), unknown="not known")
        for done, bench in EXPLORER.look(people): yield {report: told_html([f"{done:,} of {len(people):,} pictures are looked at"])}
        yield restored(replace(session["state"], data="own", by=(people.attributes[0],)), session | {"own": bench}) | {report: told_html(found.told())}
    except (ValueError, OSError) as error: yield {report: note_html(str(error), "The page still shows the pictures from before.")}
    finally:
        for file in filter(None, (archive, sheet)): Path(file).unlink(missing_ok=True)

def section(title, words): return gr.HTML(f'<div class="cl-section"><h2>{title}</h2><p>{words}</p></div>')
def left(*classes): return gr.Column(scale=4, min_width=320, elem_classes=list(classes))
def right(): return gr.Column(scale=7, min_width=320)

# The worked example is computed before the page is served, so that nobody ever sees it empty.
FIRST = {"pin": START, "state": START, "shown": ("differ", chart_labels(EXPLORER.view(bench_of(START.data, {}), START))[0], None, "0.5 %"), "offered": ((), ())}
with gr.Blocks(title=f"{QUESTION} clip_lab", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
    gr.HTML(f'<header class="cl-head"><h1>{QUESTION}</h1><p>A model that names what it sees names people, too, and not all alike. Move the threshold, change the labels, and see who gets which.</p></header>')
    note, about, session_state = gr.HTML(elem_classes="cl-sticky"), gr.HTML(), gr.State(FIRST, time_to_live=4 * 3600)
    with gr.Row(equal_height=False):
        with left("cl-side"):
            data = gr.Dropdown(choices({}), value=START.data, label="Pictures")
            by = gr.CheckboxGroup(bench_of(START.data, {}).people.attributes, value=list(START.by), label="Groups", info="Several make intersections, such as “woman, dark”.")
            mode = gr.Radio([(words, name) for name, words in MODES.items()], value=START.mode, label="A picture gets")
            threshold = gr.Number(100 * START.threshold, label="Threshold in per cent, typed or slid")
            presets, slider = gr.HTML(js_on_load=PRESS), gr.HTML(threshold_html(START.threshold), js_on_load=SLIDE)
        with right():
            finding = gr.HTML()
            order = gr.Radio([(words, key) for key, words in ORDERS.items()], value="differ", label="Labels shown")
            bars = gr.HTML(js_on_load=PRESS)
            with gr.Accordion("The same as a table", open=False): table = gr.HTML()
    section("Who is behind a bar?", "Press a bar above, or choose here.")
    with gr.Row(equal_height=False, elem_id="behind"):
        with left(): label_choice, group_choice = gr.Dropdown([], label="Label", allow_custom_value=True), gr.Dropdown([], label="Group", allow_custom_value=True)
        with right(): behind = gr.HTML()
    section("What happens when I move the threshold?", "The chosen label at every threshold, and the labels that appear or vanish between two.")
    with gr.Row(equal_height=False):
        with left(): other, goes = gr.Radio(list(OTHERS), value="0.5 %", label="Between the threshold above and"), gr.HTML()
        with right(): curve = gr.HTML()
    section("What if I change the label set?", "Whoever writes the labels decides what a model can say. A is pinned; change something, and see what moves, from where, for whom.")
    with gr.Row(equal_height=False):
        with left():
            base = gr.Dropdown([*shipped(), OWN], value=START.labels, label="Start from a label set")
            harm = gr.Checkbox(False, label="Also ask labels that do harm", info="Some sets hold labels that accuse people or deny that they are human. They exist to measure to whom a model would give them, and are left out until you choose so.")
            text = gr.Textbox(label_text(START), label="Labels, one a line", info="A new one may say how it reads: child | a child", lines=8, max_lines=14, max_length=60_000)
            with gr.Row(elem_classes="cl-buttons"): add_child, add_none = gr.Button("Add “child”", size="sm"), gr.Button("Add “none of these”", size="sm")
            templates = gr.Textbox("\n".join(map(as_text, first_templates(START.labels))), label="Templates, one a line; {} is the place of the label", lines=2, max_lines=8, max_length=20_000)
        with right():
            with gr.Row(elem_classes="cl-buttons"): pin_button, back_button = gr.Button("Pin this as A", size="sm"), gr.Button("Back to A", size="sm")
            difference = gr.HTML()
    section("Is that difference more than chance?", "Each label is tested on its own, so that with many labels some would differ by accident; the p-values are corrected for that. The effect size says whether it matters.")
    tests = gr.HTML()
    section("Your own pictures", "They stay on this machine, in memory, for this browser only, and at most four hours after the last change; the files are deleted as soon as they are read.")
    with gr.Accordion("Bring a zip and a table", open=False), gr.Row(equal_height=False):
        with left():
            archive, sheet = only_uploads(gr.File(label="Pictures, as a zip", file_types=[".zip"], height=130)), only_uploads(gr.File(label="Table (CSV), unless it is in the zip", file_types=[".csv", ".tsv"], height=130))
            gr.HTML('<p class="cl-muted cl-key">One row for each picture: a column <code>file</code> with its name, and a column for each attribute, such as <code>gender</code>.</p>')
        with right():
            answers = [gr.Textbox(label=question, lines=1, max_length=1000) for question in ASKED.values()]
            with gr.Row(elem_classes="cl-buttons"): read_button, stop_button = gr.Button("Read the pictures", variant="primary"), gr.Button("Stop")
            report = gr.HTML()
    section("Take it along", "The address restores this view. The files hold every number, the sealed report is for others to read and check, the lines make the same view in a notebook.")
    with gr.Row(equal_height=False):
        with left():
            link = gr.HTML()
            with gr.Row(elem_classes="cl-buttons"): take_button, seal_button = gr.Button("Make the files", size="sm"), gr.Button("Make a sealed report", size="sm")
            files = gr.HTML()
        with right(): code = gr.Code(language="python", label="Python", interactive=False, wrap_lines=True, show_line_numbers=False, lines=12, max_lines=12)
    for part, value in page(START, FIRST, *FIRST["shown"]).items():
        if part in (label_choice, group_choice): part.choices, part.value = [(c, c) for c in value["choices"]], value["value"]
        else: part.value = value

    shown = [note, about, finding, bars, table, behind, label_choice, group_choice, curve, goes, difference, tests, link, code, files, presets, session_state]
    steering = [data, by, threshold, slider, mode, base, text, templates, harm]
    one, long = ({"concurrency_id": name, "concurrency_limit": 1} for name in ("model", "long"))        # views in the order in which they were asked for; what takes long stands in a queue of its own
    quick = one | dict(show_progress="hidden", api_name=False)
    change = quick | dict(fn=show, inputs=[data, by, threshold, mode, base, text, templates, harm, order, label_choice, group_choice, other, session_state], outputs=shown, trigger_mode="always_last")
    gr.on([threshold.change, text.change, templates.change, by.input, mode.input, order.input, label_choice.input, group_choice.input, other.input], **change | dict(api_name="view"))
    slider.input(slid, None, threshold, **quick | dict(trigger_mode="always_last"))
    threshold.input(typed, threshold, slider, **quick)
    presets.click(preset, None, [threshold, slider], **quick)
    bars.click(choose, session_state, shown, **quick).then(None, js="() => document.getElementById('behind').scrollIntoView({block: 'nearest', behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'instant' : 'smooth'})")
    data.input(other_pictures, [data, session_state], [by, note, data], **one, show_progress_on=bars, api_name=False).then(**change)
    gr.on([base.input, harm.input], other_labels, [base, harm, session_state], [text, templates], **quick).then(**change)
    for button, line in ((add_child, "child | a child"), (add_none, "none of these")): button.click(partial(added, line), text, text, **quick)
    pin_button.click(pin, session_state, shown, **quick | dict(api_name="pin"))
    back_button.click(lambda session: restored(session["pin"], session), session_state, [*shown, *steering], **quick)
    take_button.click(take, session_state, files, **quick | dict(api_name="files"))
    seal_button.click(lambda session: report_link(*both(session), SOURCES.get(session["state"].data)), session_state, files, **long, show_progress_on=files, api_name="report")
    reading = read_button.click(receive, [archive, sheet, *answers, session_state], [*shown, *steering, report], **long, show_progress_on=report, api_name="own")
    stop_button.click(lambda: told_html(["Stopped. The page still shows the pictures from before."]), None, report, cancels=reading, queue=False, api_name=False)
    link.change(None, link, js="html => { const found = /href=\"([^\"]*)\"/.exec(html); if (found) history.replaceState(null, '', found[1]); }")
    demo.load(arrive, session_state, [*shown, *steering], **quick)

demo.queue(max_size=64, default_concurrency_limit=1)

def launching(port=None, host="127.0.0.1"): return launch_options(port, host) | {"css": CSS + EXPLORE_CSS, "max_file_size": "100mb"}
if __name__ == "__main__":
    if told := exposed(options.host): print(told, flush=True)
    demo.launch(**launching(options.port, options.host))
