"""The registry against what it was made from: the installed distributions, the published numbers, and the conventions of clip-benchmark's code."""
import ast
import importlib.metadata
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from clip_lab.data import registry, tables
from clip_lab.data.evalset import METRICS
from clip_lab.data.registry import card, cards, classnames_for, read_prompts, subset, words
from clip_lab.evals.prompts import check_templates
from clip_lab.evals.published import published

REPO = Path(__file__).parents[1]
ASSETS = resources.files("clip_lab") / "assets" / "sets"


def reference(name: str) -> Path:
    try:
        return Path(importlib.metadata.distribution("clip-benchmark").locate_file("clip_benchmark")) / "datasets" / name
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("clip-benchmark is not installed (pip install --no-deps clip-benchmark)")


def test_the_asset_is_what_the_distributions_make():
    for name in ("clip-benchmark", "open-clip-torch"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed (pip install --no-deps {name})")
    made = subprocess.run([sys.executable, REPO / "tools" / "build_sets.py", "--check"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_the_asset_is_small_and_has_its_notice():
    assert sum(p.stat().st_size for p in Path(str(ASSETS)).iterdir()) < 100_000
    notice, licence = (ASSETS / "NOTICE").read_text("utf-8"), (REPO / "LICENSE-DATA").read_text("utf-8")
    for name, version in json.loads((ASSETS / "names.json").read_text("utf-8"))["versions"].items():
        assert f"{name} {version}" in notice
    assert "clip_lab/assets/sets/names.json" in licence and "Mehdi Cherti" in licence


def test_numbers_are_those_of_table_9():
    printed = published(table="Table 9")
    for c in cards().values():
        if c.section != "Table 9": continue
        rows = printed[printed.data == c.published].set_index("metric")
        assert c.classes == rows.value["classes"] and c.sizes == {"train": rows.value["training pictures"], "test": rows.value["test pictures"]}
        assert c.marks["test"] == rows.mark["test pictures"] and rows.note["test pictures"].startswith(f"metric: {c.metric}")
    assert set(printed.data) == {c.published for c in cards().values() if c.section == "Table 9"}


def test_every_card_is_whole():
    names = [alias for c in cards().values() for alias in {registry._flat(n) for n in (c.name, c.title, c.published, *c.aliases)}]
    assert len(names) == len(set(names)), "two cards answer to one name"
    for c in cards().values():
        assert c.metric is None or c.metric in METRICS
        assert c.licence and c.homepage and c.section
        assert c.shift_of is None or c.shift_of in cards()
        assert set(c.sizes) <= set(registry.SPLITS) and set(c.release) <= set(registry.SPLITS)
        assert set(c.marks) >= set(c.sizes) | ({"classes"} if c.classes else set())
        if templates := words(c.name).templates: assert check_templates(templates) == list(templates)


@pytest.mark.parametrize("name", [c for c in cards() if words(c).classnames])
def test_names_and_keys_fit_together(name):
    w = words(name)
    assert w.keys is None or (len(w.keys) == len(w.classnames) == len(set(w.keys)))
    assert all(n.strip() for n in w.classnames)
    if name not in ("imagenet", "imagenetv2", "imagenet-sketch"): assert len(set(w.classnames)) == len(w.classnames)    # ImageNet has twins


def test_imagenets_twins_are_the_known_ones():
    names = words("imagenet").classnames
    assert sorted({n for n in names if names.count(n) > 1}) == ["missile", "sunglasses"]


def test_subsets_are_those_of_clip_benchmark():
    """Its own rule, re-stated: a mask over all folders, in order."""
    tree, lists = ast.parse(reference("builder.py").read_text("utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in ("all_imagenet_wordnet_ids", "imagenet_a_wnids", "imagenet_r_wnids"):
            lists[node.targets[0].id] = ast.literal_eval(node.value)
    classnames = json.loads(reference("en_classnames.json").read_text("utf-8"))["imagenet1k"]
    for x in "ar":
        mask = [wnid in set(lists[f"imagenet_{x}_wnids"]) for wnid in lists["all_imagenet_wordnet_ids"]]
        assert list(words(f"imagenet-{x}").classnames) == [n for n, m in zip(classnames, mask) if m]
        assert list(words(f"imagenet-{x}").keys) == sorted(lists[f"imagenet_{x}_wnids"])
        assert list(subset(f"imagenet-{x}")) == np.flatnonzero(mask).tolist()


def test_kitti_bounds_are_those_of_clip_benchmark():
    source = ast.parse(reference("kitti.py").read_text("utf-8"))
    function = next(n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == "_closest_vehicle_distance_pp")
    bounds = next(ast.literal_eval(n.args[0]) for n in ast.walk(function) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "array")
    assert tuple(bounds) == tables.BOUNDS
    for distance in (0.5, 7.99, 8.0, 8.01, 20.0, 20.01, 300.0, 1000.0):
        assert tables.distance_class(distance) == str(np.flatnonzero(np.array(bounds) - distance < 0).max())


def test_voc_classes_are_those_of_clip_benchmark():
    literals = {n.targets[0].id: n.value for n in ast.parse(reference("voc2007.py").read_text("utf-8")).body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
    assert list(words("voc2007").classnames) == ast.literal_eval(literals["object_categories"])


def test_one_class_too_few_is_not_matched_by_place():
    with pytest.raises(ValueError, match="by place all 102 must be there"): classnames_for("caltech101", [f"class {i}" for i in range(101)])
    assert classnames_for("caltech101", [f"class {i}" for i in range(102)])[2] == "by place"
    with pytest.raises(ValueError, match="unknown: 'n00000000'"): classnames_for("imagenet", ["n01440764", "n00000000"])
    with pytest.raises(ValueError, match="knows 200 classes"): classnames_for("imagenet-a", ["n01440764"])        # a tench, which -A does not have


def test_unknown_names_say_what_is_near():
    with pytest.raises(ValueError, match="perhaps flickr30k"): card("flicker30k")
    with pytest.raises(ValueError, match="perhaps objectnet"): card("object net 1")


def test_prompts_of_openai(tmp_path):
    file = tmp_path / "prompts.md"
    file.write_text("# Prompts\n\n## Birdsnap\n\n```bash\nclasses = [\n    'Anhinga',\n    \"Bird's nest\",\n]\n\ntemplates = [\n    'a photo of a {}, a type of bird.',\n]\n```\n\n## MNIST\n\n```bash\ntemplates = [\n    'a photo of the number: \"{}\".',\n]\n```\n")
    found = read_prompts(file)
    assert found["Birdsnap"].classnames == ("Anhinga", "Bird's nest") and found["MNIST"].classnames is None
    assert found["MNIST"].templates == words("mnist").templates
    for bad, why in (("no heading", "no heading like"), ("## X\nnothing\n", "X has neither"), ("## X\ntemplates = [\n __import__('os').getcwd(),\n]\n", "X has no readable list")):
        file.write_text(bad)
        with pytest.raises(ValueError, match=why): read_prompts(file)
