"Class names and mappings against brute force and a hand-made model; every bad input."
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.special import softmax

import clip_lab
from clip_lab.evals.classnames import (adapt_classnames, check_levels, compare_mappings, distinguish, evaluate_levels, groups_of, pool_classes, subset_accuracy,
                                       twins)
from clip_lab.evals.prompts import DuplicateClassWarning, check_classnames
from clip_lab.evals.stats import mcnemar
from clip_lab.evals.zeroshot import classifier


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 8), st.integers(1, 30))
def test_subset_and_pooling_by_brute_force(seed, classes, n):
    rng = np.random.default_rng(seed)
    scores, labels = rng.standard_normal((n, classes)), rng.integers(classes, size=n)
    subset = rng.permutation(classes)[:rng.integers(2, classes + 1)].tolist()
    labels[0] = subset[0]
    kept = [i for i in range(n) if labels[i] in subset]
    right = sum(max(subset, key=lambda c: scores[i, c]) == labels[i] for i in kept)
    e = subset_accuracy(scores, labels, subset)
    assert (e.value, e.n) == (right / len(kept), len(kept))
    group_of = rng.integers(0, 2, classes)
    group_of[:2] = 0, 1
    groups = [np.flatnonzero(group_of == g) for g in (0, 1)]
    assert pool_classes(scores, groups).argmax(1).tolist() == [group_of[row.argmax()] for row in scores]   # the best fine class decides


def test_comparing_mappings():
    labels = np.array([0, 1, 0, 1, 0, 1])
    perfect = np.eye(2)[labels]
    table, test = compare_mappings(1 - perfect, perfect, labels)
    assert table.estimate.tolist() == [0, 1] and table.n.tolist() == [6, 6] and test.p == pytest.approx(2 / 2 ** 6)
    assert test.detail == {"only_first": 0, "only_second": 6}


def test_twins_are_what_check_classnames_warns_of():
    names = ["crane", "hammer", " Crane ", "drill", "hammer"]
    assert twins(names) == {"crane": [0, 2], "hammer": [1, 4]} and twins(["a", "b"]) == {}
    with pytest.warns(DuplicateClassWarning, match="'crane' at 0, 2; 'hammer' at 1, 4"): check_classnames(names)
    told = distinguish(names, ["bird", "tool", "machine", "tool", "gun part"])
    assert told[3] == "drill" and twins(told) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_classnames(told)
        assert distinguish(["a", "b"], ["x", "x"]) == ["a", "b"]        # nothing to tell apart, nothing changed
    with pytest.raises(ValueError, match="classes 0, 1, 2 are all called"): distinguish(["hawk", "hawk (bird)", "hawk"], ["bird", "x", "bird"], "parentheses")


def test_a_made_name_that_is_taken_is_noticed():
    with pytest.raises(ValueError, match=r"classes 0, 2 are all called 'hawk \(bird\)'"):
        distinguish(["hawk", "hawk", "hawk (bird)"], ["bird", "party", "x"], "parentheses")


def world(n=120, dim=8, seed=0):
    "Eight kinds in four families in two realms, pictures near their kind."
    g = torch.Generator().manual_seed(seed)
    kinds = F.normalize(torch.randn(8, dim, generator=g), dim=-1)
    labels = torch.randint(8, (n,), generator=g)
    features = F.normalize(kinds[labels] + .7 * torch.randn(n, dim, generator=g), dim=-1)
    levels = {"kind": [f"k{i}" for i in range(8)], "family": [f"f{i // 2}" for i in range(8)], "realm": [f"r{i // 4}" for i in range(8)]}
    weights = {"kind": kinds, "realm": F.normalize(kinds.view(2, 4, dim).mean(1), dim=-1)}
    return features, labels.numpy(), levels, weights


def test_levels_by_the_long_way():
    features, labels, levels, weights = world()
    scale = 20.
    table = evaluate_levels(features, labels, levels, weights, scale).set_index(["level", "way"])
    assert table.index.tolist() == [("kind", "own names"), ("family", "max over sub-classes"), ("family", "sum over sub-classes"),
                                    ("realm", "own names"), ("realm", "max over sub-classes"), ("realm", "sum over sub-classes")]
    cosines = (features @ weights["kind"].T).numpy()
    p = softmax(scale * cosines, axis=1)
    for name, size in (("family", 2), ("realm", 4)):
        by_max = cosines.argmax(1) // size == labels // size
        by_sum = np.array([np.argmax([sum(row[c] for c in range(8) if c // size == k) for k in range(8 // size)]) for row in p]) == labels // size
        assert table.estimate[name, "max over sub-classes"] == by_max.mean() and table.estimate[name, "sum over sub-classes"] == by_sum.mean()
    own = (features @ weights["realm"].T).argmax(1).numpy() == labels // 4
    assert table.estimate["realm", "own names"] == own.mean() and table.p["realm", "sum over sub-classes"] == mcnemar(own, by_sum).p
    assert np.isnan(table.p["family", "max over sub-classes"]) and table.classes["realm"].unique().tolist() == [2] and (table.n == 120).all()
    assert (table.low <= table.estimate).all() and (table.estimate <= table.high).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_sums_by_counting_and_one_member_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    p = softmax(3 * rng.standard_normal((10, 6)), axis=1)
    parents = rng.choice(list("xyz"), 6).tolist()
    names, groups = groups_of(parents)
    assert names == list(dict.fromkeys(parents)) and sorted(sum(groups, [])) == list(range(6))
    assert pool_classes(p, groups, "sum") == pytest.approx(np.stack([sum(p[:, i] for i in range(6) if parents[i] == name) for name in names], 1))
    alone = [[i] for i in range(6)]
    assert np.array_equal(pool_classes(p, alone), p) and np.array_equal(pool_classes(p, alone, "sum"), p)


def test_adapting_makes_the_classifier_of_the_new_names():
    model, _ = clip_lab.load()
    old, templates = ["a cat", "a dog", "an apple", "a pear"], ["{}", "a picture of {}"]
    weights, new = classifier(model, old, templates), classifier(model, ["animal", "fruit"], templates)
    labels = np.array([0, 0, 1, 1, 1])
    features = F.normalize(weights[[0, 1, 2, 3, 3]] + .3 * new[labels], dim=-1)
    made, table, test = adapt_classnames(model, features, labels, ["animal", "fruit"], templates, weights, [[0, 1], [2, 3]])
    assert torch.equal(made, new)
    own = (features @ new.T).argmax(1).numpy() == labels
    assert table.estimate.tolist() == [1, own.mean()] and test.p == mcnemar(np.ones(5, bool), own).p
    for groups, message in (([[0, 1]], "1 groups of old classes for 2 new names"), ([[0, 1], [1, 2]], "names a class twice"), ([[0], [9]], "group 1 has class 9")):
        with pytest.raises(ValueError, match=message): adapt_classnames(model, features, labels, ["animal", "fruit"], templates, weights, groups)


X = np.random.default_rng(0).standard_normal((3, 4))
FEATURES, LABELS, LEVELS, WEIGHTS = world(10)

@pytest.mark.parametrize("call, message", [
    (lambda: subset_accuracy(X, [0, 1, 4], [0, 1]), "label 4 of picture 2 is no class; expected 0 to 3"),
    (lambda: subset_accuracy(X, [0, 1], [0, 1]), r"labels have shape \(2,\)"),
    (lambda: subset_accuracy(np.full((3, 4), np.nan), [0, 1, 2], [0, 1]), "scores of picture 0 are not finite"),
    (lambda: subset_accuracy(X, [0, 1, 2], []), "the subset is empty"),
    (lambda: subset_accuracy(X, [0, 1, 2], [0, 7]), "the subset has class 7; expected 0 to 3"),
    (lambda: subset_accuracy(X, [0, 1, 2], [1, 1]), "the subset names a class twice"),
    (lambda: subset_accuracy(X, [0, 1, 2], [1]), "one class would always be right"),
    (lambda: subset_accuracy(X, [0, 0, 0], [1, 2]), "no picture belongs to the 2 classes"),
    (lambda: pool_classes(X, []), "the mapping as a whole is empty"),
    (lambda: pool_classes(X, [[0], []]), "group 1 is empty"),
    (lambda: pool_classes(X, [[0, 1], [1]]), "the mapping as a whole names a class twice"),
    (lambda: pool_classes(X, [[0, 1], [2]], "mean"), "how is 'mean'; expected 'max' or 'sum'"),
    (lambda: pool_classes(X, [[0, 1], [2]], "sum"), "only probabilities can be summed"),
    (lambda: pool_classes(X[0], [[0]]), r"scores have shape \(4,\)"),
    (lambda: distinguish(["a", "b"], ["x"]), "1 parents for 2 class names"),
    (lambda: distinguish(["a", "a"], ["x", "y"], "brackets"), "unknown way 'brackets'; expected one of parentheses, type of"),
    (lambda: distinguish(["a", "a"], ["x", "X"]), "classes 0, 1 are all called"),
    (lambda: distinguish(["a", " "], ["x", "y"]), "class 1 has no name"),
    (lambda: evaluate_levels(FEATURES, LABELS, LEVELS, {"realm": WEIGHTS["realm"]}, 1.), "no weights for the finest level 'kind'"),
    (lambda: evaluate_levels(FEATURES, LABELS, LEVELS, WEIGHTS | {"order": WEIGHTS["kind"]}, 1.), "weights for 'order', which is no level"),
    (lambda: evaluate_levels(FEATURES, LABELS, LEVELS, WEIGHTS | {"family": WEIGHTS["kind"]}, 1.), "8 rows of text weights for 4 class names"),
    (lambda: evaluate_levels(FEATURES * float("nan"), LABELS, LEVELS, WEIGHTS, 1.), "image features: row 0 has length nan"),
    (lambda: evaluate_levels(FEATURES[:0], LABELS[:0], LEVELS, WEIGHTS, 1.), "no pictures"),
    (lambda: evaluate_levels(FEATURES, LABELS + 8, LEVELS, WEIGHTS, 1.), "is no class; expected 0 to 7"),
    (lambda: check_levels({}), "no levels"),
    (lambda: check_levels({"kind": ["a", "b"], "group": ["x"]}), "level 'group' has 1 names for 2 finest classes"),
    (lambda: check_levels({"kind": ["a", "b"], "group": ["x", "x"]}), "level 'group' has one class only"),
    (lambda: check_levels({"kind": ["a", "A"]}), r"the name 'a' at \[0, 1\]"),
    (lambda: check_levels({"k": ["a", "b", "c"], "f": ["x", "x", "y"], "r": ["1", "2", "2"]}), "'x' of level 'f' lies in '1' and in '2' of level 'r'"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
