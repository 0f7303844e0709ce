"Linear probe, few-shot and what they are compared with: against scikit-learn, scipy and numpy, and the message of every bad input."
import json
import warnings

from hypothesis import given, settings, strategies as st
import numpy as np
from PIL import Image
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
import torch
import torch.nn.functional as F

from clip_lab.embed import EmbeddingCache, embed_images
from clip_lab.evals.efficiency import correlation, line, power_law, shots_to_match
from clip_lab.evals.probe import (LAMBDAS, bands, cut_validation, draw_shots, few_shot, feature_facts, fit, image_features, linear_probe, objective, peak,
                                  peak_search, sweep)
from clip_lab.images import preprocess
from clip_lab.model import CLIPConfig, build
from clip_lab.pretrained import weights_hash

VIT = CLIPConfig("tiny ViT", 16, 32, 1, 64, 16, context_length=24, vocab_size=514 + 256, text_width=64, text_heads=2, text_layers=1)
RESNET = CLIPConfig("tiny ResNet", 16, 32, (1, 1, 1, 1), 8, vision_heads=4, context_length=24, vocab_size=514 + 256, text_width=64, text_heads=2, text_layers=1)
NAMES = ["cat", "dog", "owl"]


def make(n, classes=3, width=6, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return np.random.default_rng(99).normal(size=(classes, width))[y] + noise * rng.normal(size=(n, width)), y


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]


# --- features

def test_features_before_the_projection_are_those_of_the_last_norm(pictures, tmp_path):
    model, transform = build(VIT, seed=0), preprocess(32)
    caught = []
    hook = model.visual.ln_post.register_forward_hook(lambda module, inputs, output: caught.append(output))
    projected = image_features(model, transform, pictures, projected=True, batch_size=2).features
    hook.remove()
    before, cache = weights_hash(model), EmbeddingCache(tmp_path)
    for _ in range(2): assert torch.equal(image_features(model, transform, pictures, batch_size=2, cache=cache).features, torch.cat(caught))
    assert cache.count() == 5
    assert torch.equal(image_features(model, transform, pictures, projected=True, batch_size=2, cache=cache).features, projected) and cache.count() == 10   # kept apart
    assert torch.equal(projected, embed_images(model, transform, pictures, batch_size=2, normalize=False).features)
    assert weights_hash(model) == before and model.config == VIT
    assert torch.allclose(image_features(model, transform, pictures, normalize=True).features.norm(dim=-1), torch.ones(5))


def test_a_resnet_has_no_before(pictures):
    model, transform = build(RESNET, seed=0), preprocess(32)
    assert torch.equal(*(image_features(model, transform, pictures, projected=p).features for p in (False, True)))
    assert "attention pooling" in feature_facts(model, transform)["features"]
    assert "before the projection" in feature_facts(build(VIT, seed=0), transform)["features"]


def test_an_unreadable_picture_is_reported_and_then_refused(pictures):
    with pytest.warns(UserWarning, match="1 of 6 pictures"): found = image_features(build(VIT, seed=0), preprocess(32), [*pictures, b"no picture"])
    assert found.ok.tolist() == [True] * 5 + [False]
    with pytest.raises(ValueError, match="the first is row 5; leave out"): fit((found.features, [0, 1, 2] * 2), NAMES, 1.0)


# --- one fit

@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("lam", [0.05, 1.0, 30.0])
def test_both_solvers_reach_the_same_objective(classes, lam):
    x, y = make(80, classes)
    names = [str(i) for i in range(classes)]
    theirs, ours = (fit((x, y), names, lam, tol=1e-8, device=device) for device in (None, "cpu"))
    assert objective(ours, x, y) == pytest.approx(objective(theirs, x, y), abs=1e-9) and ours.converged and theirs.converged
    reference = LogisticRegression(C=1 / lam, tol=1e-8, max_iter=1000).fit(x, y)
    for probe in (theirs, ours):
        np.testing.assert_allclose(F.softmax(torch.from_numpy(probe.logits(x)), -1), reference.predict_proba(x), atol=1e-5)
        assert (probe.predict(x) == reference.predict(x)).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_anchor_is_a_change_of_variables(classes):
    (x, y), names = make(60, classes), NAMES[:classes]
    anchor = np.random.default_rng(1).normal(size=(classes, 6))
    assert np.abs(fit((x, y), names, 1e9, anchor=anchor).weights - anchor).max() < 1e-6
    free = LogisticRegression(C=1 / 2.0, fit_intercept=False, tol=1e-9, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(F.softmax(torch.from_numpy(fit((x, y), names, 2.0, tol=1e-9, anchor=0 * anchor).logits(x)), -1), free.predict_proba(x), atol=1e-5)
    found = fit((x, y), names, 2.0, tol=1e-9, anchor=anchor)
    rng = np.random.default_rng(2)
    for _ in range(20):   # convex: no neighbour is better
        moved = found.weights + 1e-2 * rng.normal(size=found.weights.shape) * ([[0]] + [[1]] * (classes - 1) if classes == 2 else 1)
        assert objective(type(found)(moved, found.bias, found.lam, 0, True), x, y, anchor) > objective(found, x, y, anchor)


def test_a_fit_cut_short_says_so():
    x, y = make(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")      # recorded, not warned about, fit by fit
        assert not fit((x, y), NAMES, 1e-3, max_iter=2).converged and not fit((x, y), NAMES, 1e-3, max_iter=2, device="cpu").converged
    with pytest.warns(UserWarning, match="did not converge in 2 iterations"): assert not linear_probe((x, y), (x, y), NAMES, max_iter=2).sweep.converged.all()


def test_gradients_may_be_off_and_arrays_read_only():
    x, y = make(30)
    for a in (x, y): a.flags.writeable = False
    with torch.no_grad(): fit((x, y), NAMES, 1.0, device="cpu")
    assert torch.is_grad_enabled()


# --- the search

@given(st.integers(0, 96), st.lists(st.floats(0.01, 10), min_size=97, max_size=97))
@settings(max_examples=100, deadline=None)
def test_a_single_peak_is_always_found(top, steps):
    steps = np.array(steps) * np.where(np.arange(97) <= top, 1, -1)
    curve = np.cumsum(steps)
    scores = peak_search(lambda i: curve[i])
    assert peak(scores) == int(curve.argmax()) and len(scores) <= 15 and list(scores)[:7] == list(range(0, 97, 16))


def test_ties_go_to_the_stronger_penalty(): assert peak(peak_search(lambda i: 1.0)) == 96


def test_sweep_is_what_a_loop_over_scikit_learn_gives():
    train, validation = make(45), make(60, seed=1)
    table = sweep(train, validation, NAMES)
    for row in table.to_dict("records"):
        theirs = LogisticRegression(C=1 / LAMBDAS[row["index"]], max_iter=1000).fit(*train)
        assert row["k"] == int((theirs.predict(validation[0]) == validation[1]).sum()) and row["iterations"] == theirs.n_iter_[0] and row["n"] == 60
    assert table.chosen.sum() == 1 and table.k[table.chosen].item() == table.k.max()
    assert ((table.low <= table.estimate) & (table.estimate <= table.high)).all()


# --- the whole probe

def test_linear_probe_against_scikit_learn():
    train, validation, test = make(45), make(30, seed=1), make(62, seed=2)
    found = linear_probe(train, test, NAMES, validation, measured={"data_hash": "x"})
    both = [np.concatenate(pair) for pair in zip(train, validation)]
    answers = LogisticRegression(C=1 / found.probe.lam, max_iter=1000).fit(*both).predict(test[0])
    assert found.accuracy.value == accuracy_score(test[1], answers) and found.accuracy.n == 62
    assert found.mean_per_class.value == pytest.approx(balanced_accuracy_score(test[1], answers))
    assert found.measured["C"] == pytest.approx(1 / found.measured["lambda"]) and found.measured["data_hash"] == "x"
    assert found.per_class.n.sum() == 62 and "ProbeResult(3 classes" in repr(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_test_split_may_lack_a_class():
    found = linear_probe(make(45), (make(20)[0][[0, 1]], [0, 1]), NAMES)
    assert found.per_class.n.tolist() == [1, 1, 0] and np.isnan(found.per_class.estimate[2]) and found.to_dict()["per_class"][2]["estimate"] is None


@given(st.lists(st.integers(2, 9), min_size=2, max_size=4), st.floats(0.05, 0.95), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_cut_validation(sizes, share, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    fitted, held = cut_validation(labels, share, seed)
    assert sorted([*fitted, *held]) == list(range(len(labels)))
    assert set(labels[fitted]) == set(labels[held]) == set(labels.tolist())
    assert np.array_equal(held, cut_validation(labels, share, seed)[1])


# --- few-shot

def test_draws_are_nested_balanced_and_seeded():
    y = make(30)[1]
    for k in range(1, 10): assert set(draw_shots(y, k, NAMES, 1)) < set(draw_shots(y, k + 1, NAMES, 1))
    assert (np.bincount(y[draw_shots(y, 4, NAMES)]) == 4).all() and not np.array_equal(draw_shots(y, 4, NAMES, 0), draw_shots(y, 4, NAMES, 1))


def test_few_shot_rows_and_bands():
    train, test = make(60), make(40, seed=1)
    table = few_shot(train, test, NAMES, shots=(1, 4), draws=3, lam=2.0)
    assert table.equals(few_shot(train, test, NAMES, shots=(1, 4), draws=3, lam=2.0))
    places = draw_shots(train[1], 4, NAMES, (0, 2))
    theirs = LogisticRegression(C=0.5, max_iter=1000).fit(train[0][places], train[1][places])
    assert table.query("shots == 4 and draw == 2").estimate.item() == theirs.score(*test)
    four, values = bands(table).query("shots == 4"), table.query("shots == 4").estimate
    np.testing.assert_allclose(four[["low", "high"]].to_numpy()[0], np.clip(stats.t.interval(0.95, 2, values.mean(), stats.sem(values)), 0, 1))
    assert bands(few_shot(train, test, NAMES, shots=(1,), draws=1))[["low", "high"]].isna().all(axis=None)      # one draw: no band


def test_few_shot_tunes_on_the_first_draw():
    train, validation, test = make(60), make(30, seed=2), make(40, seed=1)
    places = draw_shots(train[1], 2, NAMES, (0, 0))
    best = sweep((train[0][places], train[1][places]), validation, NAMES).query("chosen")["lambda"].item()
    assert set(few_shot(train, test, NAMES, shots=(2,), draws=2, validation=validation)["lambda"]) == {best}


# --- what zero-shot is worth

@given(st.lists(st.floats(0.01, 0.2), min_size=4, max_size=4), st.floats(0, 1))
def test_shots_to_match_inverts_the_interpolation(steps, where):
    shots, accuracy = [1, 2, 4, 16], np.cumsum(steps)
    target = accuracy[0] + where * (accuracy[-1] - accuracy[0])
    found = shots_to_match(shots, accuracy, min(target, accuracy[-1]))
    assert found.how == "interpolated" and np.interp(np.log(found.shots), np.log(shots), accuracy) == pytest.approx(target, abs=1e-9)


def test_shots_to_match_takes_the_first_crossing_and_flags_guesses():
    assert shots_to_match([1, 2, 4, 8], [0.2, 0.4, 0.3, 0.6], 0.4).shots == pytest.approx(2)
    assert shots_to_match([1, 2, 4, 8], [0.2, 0.4, 0.3, 0.6], 0.7) == shots_to_match([4, 8], [0.3, 0.6], 0.7)
    assert str(shots_to_match([1, 2], [0.4, 0.5], 0.3)) == "0.5 (extrapolated below)"
    assert shots_to_match([1, 2], [0.5, 0.5], 0.6).how == shots_to_match([1, 2], [0.5, 0.4], 0.4999).how.replace("extrapolated below", "never") == "never"
    assert shots_to_match([1, 2], [0.5, 0.5], 0.5).shots == 1


def test_lines_against_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    y = 2 * x + rng.normal(size=20)
    found, (coefficients, covariance) = line(x, y), np.polyfit(x, y, 1, cov=True)
    half = stats.t.ppf(0.975, 18) * np.sqrt(np.diag(covariance))
    np.testing.assert_allclose([found.slope, found.intercept], coefficients)
    np.testing.assert_allclose([found.slope_high - found.slope, found.intercept_high - found.intercept], half)
    z = np.arctanh(np.corrcoef(x, y)[0, 1]) + np.array([-1, 1]) * stats.norm.ppf(0.975) / np.sqrt(17)
    np.testing.assert_allclose([found.r_low, found.r_high], np.tanh(z))
    assert correlation(zero_shot=y, probe=x) == found and json.dumps(found.to_dict())
    law = power_law([1, 10, 100, 1000], [0.8, 0.41, 0.19, 0.1])
    assert 10 ** law.at(2) == pytest.approx(np.exp(np.polyval(np.polyfit(np.log([1, 10, 100, 1000]), np.log([0.8, 0.41, 0.19, 0.1]), 1), np.log(100))))


# --- bad input

X, Y = make(30)

def broken():
    x = X.copy()
    x[7, 2] = np.nan
    return x

@pytest.mark.parametrize("call, message", [
    (lambda: fit((X, 0 * Y), ["cat"], 1.0), r"training split: one class only \(cat\)"),
    (lambda: fit((broken(), Y), NAMES, 1.0), "training split: 1 row is not finite, the first is row 7"),
    (lambda: fit((X, Y + 1), NAMES, 1.0), "training split: label 3 in row 2 is out of range; there are 3 classes, 0 to 2"),
    (lambda: fit((X, Y - 1), NAMES, 1.0), "label -1 in row 0"),
    (lambda: fit((X, Y.astype(float)), NAMES, 1.0), "labels are float64; expected whole numbers"),
    (lambda: fit((X[:, 0], Y), NAMES, 1.0), r"features have shape \(30,\)"),
    (lambda: fit((X, Y[:-1]), NAMES, 1.0), r"labels \(29,\)"),
    (lambda: fit((X[:0], Y[:0]), NAMES, 1.0), "no examples"),
    (lambda: fit((X[Y < 2], Y[Y < 2]), NAMES, 1.0), r"training split: no example of owl \(1 of 3"),
    (lambda: fit((X, Y), NAMES, 0.0), "lambda must be positive"),
    (lambda: fit((X, Y), NAMES, 1.0, anchor=np.zeros((3, 5))), r"anchor has shape \(3, 5\); expected \(3, 6\)"),
    (lambda: fit((X, Y), NAMES, 1.0, anchor=np.full((3, 6), np.inf)), "anchor: its values are not all finite"),
    (lambda: sweep((X, Y), (X, Y + 1), NAMES), "validation split: label 3 in row"),
    (lambda: sweep((X, Y), (X[:, :4], Y), NAMES), "validation split: features have width 4"),
    (lambda: linear_probe((X, Y), (X[:, :4], Y), NAMES), "test split: features have width 4"),
    (lambda: linear_probe((X, Y), (broken(), Y), NAMES), "test split: 1 row is not finite"),
    (lambda: linear_probe((X[:4], Y[:4]), (X, Y), NAMES), "class 1 has one example"),
    (lambda: cut_validation(Y, 1.0), "share lies between 0 and 1"),
    (lambda: draw_shots(Y, 11, NAMES), "11 examples per class are asked for, but cat has 10, dog has 10, owl has 10"),
    (lambda: few_shot((X, Y), (X, Y), NAMES), "16 examples per class are asked for"),
    (lambda: draw_shots(Y, 0, NAMES), "shots counts examples per class, from 1; got 0"),
    (lambda: shots_to_match([1, 2], [0.1], 0.1), "two of the same length"),
    (lambda: shots_to_match([2, 1], [0.1, 0.2], 0.1), "must be positive and rise"),
    (lambda: shots_to_match([1, 2], [0.1, np.nan], 0.1), "every accuracy be finite"),
    (lambda: line([1, 2], [1, 2]), "at least 3 points"),
    (lambda: line([1, 2, 3], [1, np.nan, 2]), r"y\[1\] is not finite"),
    (lambda: correlation([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]), "x is 0.5 at every point"),
    (lambda: power_law([0, 1, 2], [0.1, 0.2, 0.3]), r"compute\[0\] is 0; only what is above 0"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_a_validation_split_may_lack_a_class_and_the_result_says_so():
    some = Y > 0
    tried = sweep((X, Y), (X[some], Y[some]), NAMES)
    assert (tried.n == some.sum()).all()
    assert linear_probe((X, Y), (X, Y), NAMES, (X[some], Y[some])).measured["classes_without_validation"] == 1
    assert linear_probe((X, Y), (X, Y), NAMES).measured["classes_without_validation"] == 0
