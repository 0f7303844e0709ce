"Prompts and zero-shot classification: against scikit-learn and plain loops, and the message of every bad input."
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn import metrics

from clip_lab.evals import zeroshot
from clip_lab.evals.prompts import SOURCES, TEMPLATES, DuplicateClassWarning, check_classnames, check_templates, fill, templates_for
from clip_lab.evals.zeroshot import TextWeights, classifier, classify, classify_features, evaluate, evaluate_features, ranks_of_truth
from clip_lab.images import preprocess
from clip_lab.model import CLIPConfig, build
from clip_lab.pretrained import weights_hash

TINY = CLIPConfig("tiny", embed_dim=16, image_resolution=32, vision_layers=1, vision_width=64, vision_patch_size=16,
                  context_length=24, vocab_size=514 + 256, text_width=64, text_heads=2, text_layers=2)
NAMES, THREE = ["cat", "dog", "fire engine"], ["{}", "a photo of a {}.", lambda name: f"many {name}s"]


@pytest.fixture
def model(): return build(TINY, seed=0)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)) for _ in range(12)]


def unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --- prompts

def test_fill_puts_names_in_literally():
    assert fill(["a {} b", "50% {x}"], ["{}!", "{0} is {}"]) == [["a {} b!", "{0} is a {} b"], ["50% {x}!", "{0} is 50% {x}"]]
    assert fill(["cat"], str.upper) == [["CAT"]]


def test_template_sets():
    assert TEMPLATES["imagenet7"] == (   # as OpenAI's notebook lists them
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
        "a {} in a video game.", "art of the {}.", "a photo of the small {}.")
    assert TEMPLATES["paper"] == ("A photo of a {}.",) and set(SOURCES) == set(TEMPLATES)
    assert templates_for("emoji") == TEMPLATES["emoji"] and templates_for("ViT-L/14") == TEMPLATES["paper"]


@pytest.mark.parametrize("call, error, message", [
    (lambda: check_templates([]), ValueError, "no templates"),
    (lambda: check_templates(["{}", "a photo"]), ValueError, r"template 1 \('a photo'\) has 0 places"),
    (lambda: check_templates("{} and {}"), ValueError, "template 0 .* has 2 places"),
    (lambda: check_templates([None]), TypeError, "template 0 is None"),
    (lambda: fill(["cat"], ["{}", lambda name: ""]), TypeError, "template 1 .* made '' of class 'cat'"),
    (lambda: check_classnames([]), ValueError, "no class names"),
    (lambda: check_classnames(["cat", "\t "]), ValueError, "class 1 has no name"),
    (lambda: check_classnames(["cat", 3]), TypeError, "class 1 is 3"),
    (lambda: check_classnames("cat"), TypeError, "expected a list of names"),
])
def test_bad_prompts(call, error, message):
    with pytest.raises(error, match=message): call()


def test_duplicate_names_are_named_with_their_places():
    with pytest.warns(DuplicateClassWarning, match="'missile' at 0, 2; 'sunglasses' at 1, 4"):
        check_classnames(["missile", "sunglasses", "Missile", "cat", " sunglasses"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_classnames(["missile", "projectile"])


# --- text weights

def test_classifier_equals_the_plain_loop(model):
    rows = []
    for sentences in fill(NAMES, THREE):
        with torch.no_grad(): e = torch.cat([model.encode_text(model.tokenize([s])) for s in sentences])
        mean = (e / e.norm(dim=1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    weights = classifier(model, NAMES, THREE)
    assert weights.dtype == torch.float32 and weights.shape == (3, TINY.embed_dim)
    assert torch.allclose(weights, torch.stack(rows), atol=1e-5)
    assert torch.allclose(weights.norm(dim=1), torch.ones(3), atol=1e-6)


def test_text_weights_embed_only_what_is_new(model, monkeypatch):
    seen, plain = [], zeroshot.embed_texts
    monkeypatch.setattr(zeroshot, "embed_texts", lambda model, texts, **how: seen.append(list(texts)) or plain(model, texts, **how))
    texts = TextWeights(model)
    assert torch.allclose(texts(NAMES, THREE), classifier(model, NAMES, THREE), atol=1e-6)
    seen.clear()
    texts([*NAMES, "pizza"], THREE)
    texts(NAMES[::-1], THREE)
    texts(NAMES, [*THREE, "art of the {}."])
    assert seen == [["pizza", "a photo of a pizza.", "many pizzas"], [f"art of the {n}." for n in NAMES]]


def change_by_training(model):
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.encode_text(model.tokenize(NAMES)).square().sum().backward()
    optimiser.step()


@pytest.mark.parametrize("change", [
    change_by_training,
    lambda model: model.load_state_dict(build(TINY, seed=1).state_dict()),
    lambda model: model.double(),
])
def test_text_weights_notice_a_changed_model(model, change):
    texts = TextWeights(model)
    before = texts(NAMES, THREE)
    change(model)
    assert torch.allclose(texts(NAMES, THREE), classifier(model, NAMES, THREE), atol=1e-6)
    if change is change_by_training: assert not torch.allclose(before, texts(NAMES, THREE), atol=1e-3)


def test_text_weights_of_another_model(model, pictures):
    with pytest.raises(ValueError, match="another model"):
        classify(model, preprocess(32), pictures, NAMES, THREE, texts=TextWeights(build(TINY, seed=1)))


def test_too_long_a_sentence_is_quoted(model):
    with pytest.raises(ValueError, match=r"'(long ){30}dog' has \d+ tokens .* tiny reads 24"):
        classifier(model, ["cat", "long " * 30 + "dog"], THREE)


# --- classify

def test_classify_is_the_models_own_forward_pass(model, pictures):
    p = preprocess(32)
    table = classify(model, p, pictures, NAMES, "{}", top=None)
    with torch.no_grad(): logits, _ = model(torch.stack([p(x) for x in pictures]), model.tokenize(NAMES))
    wide = table.pivot(index="picture", columns="classname", values="probability")[NAMES]
    assert np.allclose(wide, logits.softmax(-1), atol=1e-5)
    assert table.n_classes.eq(3).all() and table.error.eq("").all()
    assert np.allclose(table.low, table.probability, atol=1e-5) and np.allclose(table.high, table.probability, atol=1e-5)


def test_spread_is_the_range_of_single_templates(model, pictures):
    p = preprocess(32)
    table = classify(model, p, pictures, NAMES, THREE, top=2)
    single = pd.concat([classify(model, p, pictures, NAMES, t, top=None) for t in THREE])
    reach = single.groupby(["picture", "classname"]).probability.agg(["min", "max"]).loc[list(zip(table.picture, table.classname))]
    assert len(table) == 24 and table["rank"].tolist() == [1, 2] * 12
    assert np.allclose(table.low, reach["min"], atol=1e-5) and np.allclose(table.high, reach["max"], atol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    x, prompts, y = unit(50, 8), unit(7, 3, 8, seed=1), np.arange(50) % 7
    names = list("abcdefg")
    before = classify_features(x, prompts, names, 10.0), ranks_of_truth(x, prompts[:, 0], y)
    monkeypatch.setattr(zeroshot, "_chunks", lambda f, width: [(i, f[i:i + 3]) for i in range(0, len(f), 3)])
    after = classify_features(x, prompts, names, 10.0), ranks_of_truth(x, prompts[:, 0], y)
    pd.testing.assert_frame_equal(before[0], after[0], rtol=1e-4, atol=1e-6)
    assert (before[1][0] == after[1][0]).all() and (before[1][1] == after[1][1]).all()


def test_classify_takes_one_picture_and_clips_top(model, pictures):
    table = classify(model, preprocess(32), pictures[0], ["cat"], "{}", top=5)
    assert len(table) == 1 and table.probability[0] == pytest.approx(1)


def test_unreadable_pictures_keep_a_row(model, pictures, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.warns(UserWarning, match="2 of 3"):
        table = classify(model, preprocess(32), [tmp_path / "notes.png", pictures[0], "missing.png"], NAMES, "{}", top=2)
    assert table.picture.tolist() == [0, 1, 1, 2] and table["rank"].isna().tolist() == [True, False, False, True]
    assert "notes.png" in table.error[0] and "missing.png" in table.error[3]
    with pytest.warns(UserWarning, match="1 of 1"):
        alone = classify(model, preprocess(32), "missing.png", NAMES)
    assert len(alone) == 1 and "missing.png" in alone.error[0] and list(alone) == list(table)


# --- evaluate

@settings(max_examples=60, deadline=None)
@given(st.integers(3, 12), st.integers(1, 80), st.integers(0, 2 ** 31))
def test_evaluate_features_equals_scikit_learn(classes, n, seed):
    rng = np.random.default_rng(seed)
    x, w, y = unit(n, 6, seed=seed), unit(classes, 6, seed=seed + 1), rng.integers(0, classes, n)
    result = evaluate_features(x, w, y, [f"c{i}" for i in range(classes)], topk=(1, 2))
    scores, every = (x @ w.T).numpy(), np.arange(classes)
    answer = scores.argmax(1)
    assert result.topk[1].value == pytest.approx(metrics.accuracy_score(y, answer))
    assert result.topk[2].value == pytest.approx(metrics.top_k_accuracy_score(y, scores, k=2, labels=every))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # scikit-learn remarks on classes that were answered and do not occur
        assert result.mean_per_class.value == pytest.approx(metrics.balanced_accuracy_score(y, answer))
    matrix = metrics.confusion_matrix(y, answer, labels=every)
    assert (result.confusion().to_numpy() == matrix).all()
    assert (result.per_class.n == matrix.sum(1)).all() and (result.per_class.k == matrix.diagonal()).all()
    off = matrix - np.diag(matrix.diagonal())
    assert (result.per_class.confused_n == off.max(1)).all()
    for i, other in enumerate(result.per_class.confused_with):
        assert (off[i, int(other[1:])] == off[i].max()) if isinstance(other, str) else off[i].max() == 0


def test_ties_go_to_the_earlier_class():
    x, w = torch.eye(3)[[0, 0, 0]], torch.eye(3)[[1, 0, 0]]        # the last two classes are twins, and right
    answers, ranks = ranks_of_truth(x, w, np.array([0, 1, 2]))
    assert answers.tolist() == [1, 1, 1] and ranks.tolist() == [3, 1, 2]


def test_topk_left_open_depends_on_the_classes():
    def ks(n): return list(evaluate_features(torch.eye(n), torch.eye(n), range(n), [f"c{i}" for i in range(n)]).topk)
    assert ks(2) == [1] and ks(5) == [1] and ks(6) == [1, 5]


EYE, ABC = torch.eye(3), ["a", "b", "c"]
BROKEN = EYE.clone().index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(float("nan")))

@pytest.mark.parametrize("args, options, message", [
    ((EYE, EYE, [0, 1, 3], ABC), {}, "label 3 in row 2 is out of range; with 3 classes, labels go from 0 to 2"),
    ((EYE, EYE, [0, -1, 2], ABC), {}, "label -1 in row 1 is out of range"),
    ((EYE, EYE, [0, 1], ABC), {}, "one class index for each of 3 pictures"),
    ((EYE, EYE, [0.0, 1.0, 2.0], ABC), {}, "labels are float64; expected whole numbers"),
    ((EYE, EYE, ["a", "b", "c"], ABC), {}, "expected whole numbers"),
    ((EYE, EYE, [0, 1, 2], ABC), {"topk": (1, 5)}, "top-5 among 3 classes says nothing"),
    ((EYE, EYE, [0, 1, 2], ABC), {"topk": (0,)}, "top-0 among 3 classes"),
    ((EYE, EYE[:1], [0, 0, 0], ABC[:1]), {}, "one class only"),
    ((EYE, EYE[:2], [0, 1, 2], ABC), {}, "2 rows of text weights for 3 class names"),
    ((BROKEN, EYE, [0, 1, 2], ABC), {}, "image features: row 1 has length nan.*not finite"),
    ((EYE, BROKEN, [0, 1, 2], ABC), {}, "text weights: row 1 has length nan.*not finite"),
    ((3 * EYE, EYE, [0, 1, 2], ABC), {}, "row 0 has length 3, expected 1; pass normalize=True"),
    ((torch.eye(4)[:3], EYE, [0, 1, 2], ABC), {}, "do both come from the same model"),
    ((EYE[:0], EYE, np.zeros(0, int), ABC), {}, "no pictures to look at"),
])
def test_bad_features_and_labels(args, options, message):
    with pytest.raises(ValueError, match=message): evaluate_features(*args, **options)


def test_evaluate_reports_what_it_measured(model, pictures):
    p, labels = preprocess(32), np.arange(12) % 3
    result = evaluate(model, p, pictures, labels, NAMES, THREE, topk=(1, 2), seed=7, data_hash="abc")
    by_hand = classify(model, p, pictures, NAMES, THREE, top=1)
    assert result.topk[1].value == np.mean(by_hand.classname == np.array(NAMES)[labels]) and result.n == 12
    assert result.measured["weights_hash"] == weights_hash(model) and result.measured["transform"] == p.fingerprint()
    assert result.measured["templates"][:2] == THREE[:2] and "lambda" in result.measured["templates"][2]
    assert result.measured["seed"] == 7 and result.measured["data_hash"] == "abc" and result.measured["classnames"] == NAMES
    again = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert again["topk"]["1"]["n"] == 12 and [r["classname"] for r in again["per_class"]] == NAMES
    assert result.table().metric.tolist() == ["top-1", "top-2", "mean per class"] and "top-1" in repr(result)


def test_evaluate_counts_unreadable_pictures_and_absent_classes(model, pictures):
    with pytest.warns(UserWarning, match="missing.png"):
        result = evaluate(model, preprocess(32), ["missing.png", *pictures[:3]], [2, 0, 1, 0], NAMES)
    assert result.n == 3 and result.n_unreadable == 1 and "missing.png" in result.unreadable[0][2]
    assert result.per_picture.picture.tolist() == [1, 2, 3] and result.per_picture.label.tolist() == [0, 1, 0]
    absent = result.to_dict()["per_class"][2]
    assert absent["n"] == 0 and absent["estimate"] is None
    json.dumps(result.to_dict(), allow_nan=False)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no pictures to look at"):
        evaluate(model, preprocess(32), ["missing.png"], [0], NAMES)


def test_evaluate_fails_before_it_embeds(model, monkeypatch):
    monkeypatch.setattr(zeroshot, "embed_images", lambda *args, **how: pytest.fail("embedded before the labels were checked"))
    with pytest.raises(ValueError, match="label 9 in row 1"): evaluate(model, preprocess(32), ["a.png", "b.png"], [0, 9], NAMES)
    with pytest.raises(ValueError, match="no templates"): evaluate(model, preprocess(32), ["a.png"], [0], NAMES, [])


def test_an_unchanged_seed_gives_the_same_result(model, pictures):
    runs = [evaluate(model, preprocess(32), pictures, np.arange(12) % 3, NAMES).to_dict() for _ in range(2)]
    assert runs[0] == runs[1]
