"""A picture of each question: ranks by brute force, several true classes, none, templates that are functions, and sets of every kind."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
import torch

import clip_lab
from clip_lab.data import offline
from clip_lab.data.evalset import EvalSet, Target
from clip_lab.data.labelled import Labelled, Pictures
from clip_lab.evals.examples import drawn, one_each
from clip_lab.evals.zeroshot import TextWeights, classifier


@pytest.fixture(scope="module")
def embedded(): return clip_lab.load()


def shapes(labels, classnames, **more):
    "Four plain pictures with such labels."
    pictures = Pictures([Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green", "yellow")], list("abcd"))
    metric = "11-point mAP" if np.ndim(labels) == 2 else "accuracy"
    return EvalSet("shapes", Labelled("shapes", pictures, pd.DataFrame(dict(i=range(4)))), {"what": Target(classnames, np.asarray(labels), {"test": np.arange(4)}, metric=metric, **more)})


@pytest.mark.parametrize("seed", range(3))
def test_ranks_by_brute_force(embedded, seed):
    model, preprocess = embedded
    data = offline.load("stamps")
    target = data.target("caption")
    found = one_each(model, preprocess, [(data, "caption")], top=4, seed=seed)
    place = found.answers.picture[0]
    assert place == drawn(target.splits["test"], seed, "stamps", "caption")[0]
    from clip_lab.evals.prompts import templates_for
    with torch.no_grad():
        weights = torch.cat([TextWeights(model, truncate=True)([name], target.templates or templates_for("emoji")) for name in target.classnames])
        scores = (weights @ model.encode_image(preprocess(data.data.pictures[place])[None], normalize=True)[0]).numpy()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert found.answers.classname.tolist()[:4] == [target.classnames[i] for i in order[:4]]
    true = found.answers[found.answers.right]
    assert true.classname.tolist() == [target.classnames[target.labels[place]]] and true["rank"].item() == 1 + order.index(target.labels[place])
    assert len(found.answers) == 4 + (true["rank"].item() > 4) and found.pictures[0].size == data.data.pictures[place].size


def test_several_true_classes_and_none(embedded):
    names = ["red", "blue", "green", "yellow", "a colour"]
    labels = np.zeros((4, 5), dtype=bool)
    labels[:3, [0, 4]] = True                                             # two of the first three, none of the last
    for place in range(4):
        seed = next(s for s in range(100) if drawn(np.arange(4), s, "shapes", "what")[0] == place)
        answers = one_each(*embedded, [(shapes(labels, names), "what")], top=2, seed=seed).answers
        assert (answers.picture == place).all()
        if place == 3: assert not answers.right.any() and len(answers) == 2
        else: assert set(answers[answers.right].classname) <= {"red", "a colour"} and answers.right.any()


def test_the_lot_is_even():
    counts = np.bincount([drawn(np.arange(5), seed, "a", "b")[0] for seed in range(2000)], minlength=5)
    assert (abs(counts - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)).all()


def test_more_answers_than_classes_and_templates_that_are_functions(embedded):
    def shout(name): return f"{name.upper()}!"
    found = one_each(*embedded, [(shapes([0, 1, 0, 1], ["red", "blue"], templates=[shout, "a {}"]), None)], top=5)
    assert len(found.answers) == 2 and set(found.answers.text) == {"RED!", "BLUE!"} and found.answers.probability.sum() == pytest.approx(1, abs=1e-6)
    assert found.measured["asked"][0]["templates"][0].startswith("<function") and found.measured["asked"][0]["question"] == "what"
    weights = classifier(embedded[0], ["red", "blue"], [shout, "a {}"])
    assert weights.shape == (2, 256)
    with pytest.raises(ValueError, match="top is 0"): one_each(*embedded, [(shapes([0, 1, 0, 1], ["red", "blue"]), None)], top=0)


@pytest.mark.parametrize("name", [n for n in offline.SETS if n not in ("photographs", "emoji-openmoji", "emoji-fluent")])
def test_every_set_at_hand_has_an_example(embedded, name):
    data = offline.load(name)
    asked = [(data, q) for q in data.targets if len(data.targets[q].classnames) < 1000]
    found = one_each(*embedded, asked)
    assert len(found.pictures) == len(asked) == found.answers.example.nunique() and found.answers.groupby("example").right.any().all()


def test_other_models_texts_are_refused_and_cut_sentences_told(embedded):
    with pytest.raises(ValueError, match="of another model"): one_each(*embedded, [(shapes([0, 1, 0, 1], ["red", "blue"]), None)], texts=TextWeights(clip_lab.load()[0]))
    long = "a very long name " * 30
    assert long in one_each(*embedded, [(shapes([0, 1, 0, 1], ["red", long], templates=["{}"]), None)]).measured["cut"]
