"""What is in this picture? Tell it what might be there, and watch it change its mind as you type.

Run with `python apps/zeroshot.py`, with `gradio apps/zeroshot.py` while editing, or with `make demo`. It listens on 127.0.0.1 unless --host opens it, and sends nothing anywhere.
"""
import argparse
from dataclasses import replace
import json
import os
from pathlib import Path
import tempfile
from threading import Lock

from clip_lab.ui.theme import exposed, keep_quiet, launch_options, listening, note_html, picture_input

keep_quiet()

import gradio as gr
from PIL import Image
import torch

from clip_lab.cli import model_table
from clip_lab.data import emoji, offline
from clip_lab.data.export import csv_text
from clip_lab.evals.prompts import SOURCES, TEMPLATES, templates_for
from clip_lab.evals.wording import contributions, read_labels, read_templates
from clip_lab.evals.zeroshot import TextWeights, classify_features
from clip_lab.pretrained import load, weights_hash
from clip_lab.ui.plots import bars_html, download_links, picture_buttons, table_html, verdict_html

QUESTION = "What is in this picture?"
LABELS = "a cat\na lion\nsomething to eat\na vehicle\na musical instrument\na building"
EXAMPLES = ("cat face", "pizza", "bicycle", "guitar", "rocket", "penguin", "hot beverage", "umbrella with rain drops", "octopus", "castle", "violin", "sailboat")
START = os.environ.get("CLIP_LAB_MODEL", "emoji")        # the model that answers at first; `make demo PHOTOS=1` sets photos
PHOTOGRAPHS = ("cup of coffee", "cat", "rocket", "man with a camera", "astronaut", "coins")
SENTENCES = 5000        # labels x templates: what a laptop reads in a few seconds

if gr.NO_RELOAD:        # editing this page reloads it in a second, without the weights
    MODELS, EXAMPLE_FILES, PHOTO_FILES, LOADING = {}, {}, {}, Lock()

def ready(name):
    "(model, preprocess, text weights, hash) of a model on this machine, loaded at its first use. Weights are shared, what a user gives is not."
    with LOADING:
        if name not in MODELS:
            try: model, preprocess = load(name, local_files_only=True)
            except ImportError as error: raise ValueError(str(error)) from None
            except FileNotFoundError: raise FileNotFoundError(f"{name} is not on this machine yet. To fetch it once, run: clip-lab models --fetch {name}") from None
            MODELS[name] = model, replace(preprocess, orient=True), TextWeights(model), weights_hash(model)[:16]
        if len(MODELS[name][2]) > 50_000: MODELS[name] = *MODELS[name][:2], TextWeights(MODELS[name][0]), MODELS[name][3]
        return MODELS[name]

def example_files():
    "The shipped pictures as files, so that the gallery and the picture show the same bytes: path -> name."
    folder, data = Path(tempfile.mkdtemp(prefix="clip-lab-")), emoji.load("twemoji")
    for name in EXAMPLES:
        row = list(data.table["name"]).index(name)
        path = folder / f"twemoji-{row}.png"
        data.pictures[row].save(path)
        EXAMPLE_FILES[str(path)] = name

def photo_files():
    "Photographs of scikit-image, where it is installed and the model for photographs is here: path -> name and rights."
    if not models.set_index("model").here["photos"]: return
    try: data = offline.load("photographs").data
    except (ImportError, FileNotFoundError): return
    folder = Path(tempfile.mkdtemp(prefix="clip-lab-"))       # Gradio serves files of its own, of the temporary and of the working folder only
    for row, source in zip(data.table.itertuples(), data.pictures.sources):
        if row.name not in PHOTOGRAPHS: continue
        path = folder / f"photograph-{row.Index}{Path(source).suffix}"
        path.write_bytes(Path(source).read_bytes())
        PHOTO_FILES[str(path)] = f"{row.name} ({row.licence.split(',')[0]})"

if gr.NO_RELOAD:
    models = model_table()
    ready(START)
    example_files()
    photo_files()

@torch.inference_mode()
def think(picture, labels, templates, name, seen):
    "Everything the page shows, as plain values, and what is worth remembering of the picture. ValueError or OSError in the user's terms."
    model, preprocess, texts, weights = ready(name)
    labels, templates = read_labels(labels), read_templates(templates)
    if len(labels) * len(templates) > SENTENCES:
        raise ValueError(f"{len(labels):,} labels in {len(templates)} templates are {len(labels) * len(templates):,} sentences; the limit is {SENTENCES:,}. Take some away.")
    if not picture: raise ValueError("There is no picture yet: choose one of the examples, or drop one into the frame.")
    if seen.get("of") != (picture, name):
        seen = {"of": (picture, name), "feature": model.encode_image(preprocess(picture)[None].to(model.device), normalize=True)[0].float().cpu()}
    prompts, scale = texts.prompts(labels, templates).cpu(), float(model.logit_scale.exp())
    answers = classify_features(seen["feature"][None], prompts, labels, scale, top=None)[["classname", "probability", "cosine", "low", "high"]]
    measured = {"model": name, "weights": weights, "transform": preprocess.fingerprint(), "labels": labels, "templates": templates}
    return answers, contributions(seen["feature"], prompts, labels, templates, scale), measured, seen

def python_lines(picture, answers, measured):
    "The same answer in a notebook."
    kind, _, number = Path(picture).stem.partition("-")
    ours = {"twemoji": ("emoji", "emoji.load('twemoji').pictures"), "photograph": ("offline", "offline.load('photographs').data.pictures")}.get(kind if number.isdigit() else "")
    given = f"{ours[1]}[{number}]" if ours else repr(Path(picture).name)
    lines = ["from dataclasses import replace", f"from clip_lab.data import {ours[0]}" if ours else "", "from clip_lab.evals.zeroshot import classify", "from clip_lab.pretrained import load", "\n",
             f"model, preprocess = load({measured['model']!r})        # weights {measured['weights']}",
             f"picture = {given}", f"labels = {measured['labels']!r}", f"templates = {measured['templates']!r}",
             "classify(model, replace(preprocess, orient=True), picture, labels, templates, top=None)"]
    return "\n".join(line.strip("\n") for line in lines if line)

def show(picture, labels, templates, name, seen):
    "The page after any change; when something is wrong, a notice, and everything else as it was."
    try: answers, wording, measured, seen = think(picture, labels, templates, name, seen)
    except (ValueError, OSError) as error:
        kept = "The last answer is still shown." if seen else ""
        if name not in MODELS:
            name = seen["of"][1] if seen else START
            kept = f"Still answering with {name}."
        return {note: note_html(str(error), kept), model_name: name}
    files = {"answers.csv": ("text/csv", csv_text(answers)),
             "answers.json": ("application/json", json.dumps(measured | {"answers": answers.to_dict("records")}, indent=1, ensure_ascii=False))}
    return {note: "", verdict: verdict_html(answers), bars: bars_html(answers), table: table_html(answers.rename(columns={"classname": "label"}), "Every label, the most probable first") + download_links(files),
            voices: table_html(wording, f"What each template would answer alone, and what it adds to “{answers.classname[0]}”"),
            code: python_lines(picture, answers, measured), model_name: name, state: seen}       # all of them: for what is left out, Gradio keeps a new component in the session at each answer

PRESS = "element.addEventListener('click', event => { const button = event.target.closest('button'); if (button) trigger('click', {index: Number(button.dataset.index)}); });"

def pick(pressed: gr.EventData):
    "The example that was pressed, as the picture."
    return list(EXAMPLE_FILES)[pressed.index]

def pick_photograph(pressed: gr.EventData):
    "The photograph that was pressed, and the model that knows photographs."
    return list(PHOTO_FILES)[pressed.index], "photos"

def section(title, text): return gr.HTML(f'<div class="cl-section"><h2>{title}</h2><p>{text}</p></div>')

# The worked example is computed before the page exists, so that nobody ever sees it empty.
first_picture, first_templates = next(iter(EXAMPLE_FILES)), "\n".join(templates_for("emoji"))
if START == "photos" and PHOTO_FILES: first_picture, first_templates = next(f for f, name in PHOTO_FILES.items() if "coffee" in name), "{}\na photo of {}\na picture of {}"
first_seen = think(first_picture, LABELS, first_templates, START, {})[-1]

with gr.Blocks(title=f"{QUESTION} clip_lab", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
    gr.HTML(f'<header class="cl-head"><h1>{QUESTION}</h1><p>Tell it what might be there, and watch it change its mind as you type. '
            "The model has no list of answers. It compares the picture with each of your sentences.</p></header>")
    note = gr.HTML(elem_classes="cl-sticky")
    state = gr.State(first_seen)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            picture = picture_input(value=first_picture, label="Picture", height=250, elem_classes="cl-picture", sources=["upload", "webcam", "clipboard"])
            gallery = gr.HTML(picture_buttons(map(Image.open, EXAMPLE_FILES), EXAMPLE_FILES.values(), "Or try one of these, in a style that the model was not trained on"), js_on_load=PRESS)
            album = gr.HTML(picture_buttons(map(Image.open, PHOTO_FILES), PHOTO_FILES.values(), "Or a photograph from scikit-image; the model photos answers") if PHOTO_FILES else "", js_on_load=PRESS, visible=bool(PHOTO_FILES))
            labels = gr.Textbox(LABELS, label="What might be there? One label a line", lines=6, max_lines=12, max_length=100_000)
        with gr.Column(scale=6, min_width=320):
            verdict, bars = gr.HTML(), gr.HTML()
            gr.HTML('<p class="cl-small">Bar: probability, a share among these labels only. Pale band: what single templates would have said alone. '
                    "Cosine: how well picture and label fit, whatever the others are.</p>")
    section("Does the wording matter?", "Every label is read in each of these sentences, and the readings are averaged.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            chosen_set = gr.Radio(list(TEMPLATES), value="emoji", label="Start from a set of templates", info=SOURCES["emoji"])
            templates = gr.Textbox(first_templates, label="Templates, one a line; {} is the place of the label", lines=7, max_lines=12, max_length=20_000)
        with gr.Column(scale=6, min_width=320): voices = gr.HTML()
    section("Which model answers?", "A model that is not on this machine is never fetched from here; the notice says how to fetch it.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            model_name = gr.Dropdown([(f"{row.model} ({'here' if row.here else 'not here yet'})", row.model) for row in models.itertuples()], value=START, label="Model")
        with gr.Column(scale=6, min_width=320), gr.Accordion("What the models are", open=False): gr.HTML(table_html(models, "Models, the embedded one first"))
    section("Take it along", "All labels as a table and as files, and the lines that give the same answer in a notebook.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320): table = gr.HTML()
        with gr.Column(scale=6, min_width=320): code = gr.Code(language="python", label="Python", interactive=False, wrap_lines=True, show_line_numbers=False, lines=17, max_lines=17)
    for part, value in show(first_picture, LABELS, first_templates, START, first_seen).items():
        if part in (verdict, bars, voices, table, code): part.value = value

    change = dict(fn=show, inputs=[picture, labels, templates, model_name, state], outputs=[note, verdict, bars, table, voices, code, model_name, state],
                  concurrency_id="model", concurrency_limit=4)        # so that thousands of new sentences of one user do not keep the others waiting
    live = change | dict(trigger_mode="always_last", show_progress="hidden")
    gr.on([picture.change, labels.change, templates.change], **live, api_name="answer")
    model_name.input(**change, show_progress_on=bars, api_name=False)
    chosen_set.input(lambda name: ("\n".join(TEMPLATES[name]), gr.Radio(info=SOURCES[name])), chosen_set, [templates, chosen_set], show_progress="hidden", api_name=False)
    gallery.click(pick, None, picture, show_progress="hidden", api_name=False)
    album.click(pick_photograph, None, [picture, model_name], show_progress="hidden", api_name=False)

demo.queue(max_size=64, default_concurrency_limit=1)

if __name__ == "__main__":
    options = listening(argparse.ArgumentParser(description=QUESTION)).parse_args()
    if told := exposed(options.host): print(told, flush=True)
    demo.launch(**launch_options(options.port, options.host))
