"""The numbers of an evaluation beside those of CLIP_benchmark (Schuhmann, Cherti and others), on the same model, pictures and templates."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

import clip_lab
from clip_lab.data import emoji
from clip_lab.data.evalset import EvalSet, Target
from clip_lab.evals.suite import run

TEMPLATES = ["{}", "an emoji of {}", "a drawing of {}"]


class Batches(list):
    "What CLIP_benchmark takes for a data loader."
    def __init__(self, x, y, classes=(), size=64):
        super().__init__((x[i:i + size], y[i:i + size]) for i in range(0, len(x), size))
        self.dataset = type("Set", (), {"classes": list(classes)})()


@pytest.fixture(scope="module")
def mine():
    data, labels, names = emoji.task("twemoji", "subgroup")       # without exact twins, whose ties we count as wrong and CLIP_benchmark as they fall
    chosen = np.sort(np.random.default_rng(0).permutation(np.flatnonzero((data.table.tone == "") & (data.table.twins == 0)))[:300])
    used = np.unique(labels[chosen])                          # it averages over classes that have pictures, as we do
    names, labels = [names[i] for i in used], np.searchsorted(used, labels[chosen])
    some = data.select(chosen)
    captions = [[name, f"a drawing of {name}"] for name in some.table["name"]]
    model, preprocess = clip_lab.load()
    s = EvalSet("some", some, {"subgroup": Target(names, labels, {"test": np.arange(300)}, TEMPLATES, metric="mean per class")}, captions)
    x = torch.stack([preprocess(p) for p in some.pictures])
    return model, x, names, labels, captions, {b.asked["task"]: b.rows for b in run(model, preprocess, [s], ["zeroshot", "retrieval"], progress=False)}


def test_zero_shot_classification(mine):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", reason="clip-benchmark is not installed (pip install --no-deps clip-benchmark)")
    model, x, names, labels, _, ours = mine
    weights = theirs.zero_shot_classifier(model, lambda texts: model.tokenize(texts), names, [t.replace("{}", "{c}") for t in TEMPLATES], "cpu", amp=False)
    logits, target = theirs.run_classification(model, weights, Batches(x, torch.from_numpy(labels)), "cpu", amp=False)
    rows, k = ours["zeroshot"].set_index("metric").estimate, range(len(names))          # its own accuracy() fails with numpy 2.4, so scikit-learn counts
    assert top_k_accuracy_score(target, logits, k=1, labels=k) == pytest.approx(rows["top-1"], abs=1e-9)
    assert top_k_accuracy_score(target, logits, k=5, labels=k) == pytest.approx(rows["top-5"], abs=1e-9)
    assert balanced_accuracy_score(target, logits.argmax(1)) == pytest.approx(rows["mean per class"], abs=1e-9)


def test_retrieval(mine):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason="clip-benchmark is not installed (pip install --no-deps clip-benchmark)")
    model, x, _, _, captions, ours = mine
    found = theirs.evaluate(model, Batches(x, captions), lambda texts: model.tokenize(texts), "cpu", amp=False, recall_k_list=[1, 5, 10])
    rows = ours["retrieval"].set_index(["subset", "metric"]).estimate
    for k in (1, 5, 10):
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(rows["text->image", f"R@{k}"], abs=1e-6)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(rows["image->text", f"R@{k}"], abs=1e-6)
