"""Build the published class names and templates that clip_lab ships, from the distributions that publish them.

    pip install --no-deps clip-benchmark==1.6.2 open-clip-torch==3.3.0
    python tools/build_sets.py            # writes clip_lab/assets/sets/names.json
    python tools/build_sets.py --check    # only compares

Nothing is imported from them: their JSON is read, and their Python is parsed for the lists that it holds, so torchvision is not needed.
`{c}` in a template becomes `{}`. A set's `keys` are what its own files call the classes (ImageNet's folders, the numbers of a label file), in
the order of the names; where they are absent, names are matched with folders by their spelling or by their order.
"""
from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import runpy
from pathlib import Path

TARGET = Path(__file__).parents[1] / "clip_lab" / "assets" / "sets" / "names.json"
VERSIONS = {"clip-benchmark": "1.6.2", "open-clip-torch": "3.3.0"}

# our name -> the key of its class names and of its templates in clip-benchmark; None: it has none
IN_CLIP_BENCHMARK = {
    "caltech101": ("caltech101", "caltech101"), "cars": (None, "cars"), "cifar10": (None, "cifar10"), "cifar100": (None, "cifar100"),
    "clevr": ("clevr_count_all", "clevr_count_all"), "country211": ("country211", "country211"), "dtd": (None, "dtd"), "eurosat": ("eurosat", "eurosat"),
    "aircraft": (None, "fgvc_aircraft"), "fer2013": ("fer2013", "fer2013"), "flowers": ("flowers", "flowers"), "food101": (None, "food101"),
    "gtsrb": ("gtsrb", "gtsrb"), "kitti": ("kitti_closest_vehicle_distance", "kitti_closest_vehicle_distance"), "mnist": ("mnist", "mnist"),
    "pcam": ("pcam", "pcam"), "pets": ("pets", "pets"), "resisc45": (None, "resisc45"), "sst2": (None, "renderedsst2"), "stl10": (None, "stl10"),
    "sun397": (None, "sun397"), "svhn": ("svhn", "svhn"), "voc2007": (None, "voc2007_multilabel"),
}
# What the files of a set call its classes, in the order of the names: written down by hand, from the sets' own layouts.
KEYS = {
    "clevr": [str(n) for n in range(3, 11)], "flowers": [str(n) for n in range(1, 103)], "gtsrb": [str(n) for n in range(43)],
    "kitti": [str(n) for n in range(4)], "mnist": [str(n) for n in range(10)], "pcam": ["0", "1"], "svhn": [str(n) for n in range(10)],
    "fer2013": ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"],
    "eurosat": ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential", "River", "SeaLake"],
}


def folder(distribution: str, package: str) -> Path:
    """Where an installed distribution keeps a package; another version than the pinned one is refused."""
    found = importlib.metadata.distribution(distribution)
    if found.version != VERSIONS[distribution]: raise SystemExit(f"{distribution} is {found.version}; expected {VERSIONS[distribution]}")
    return Path(found.locate_file(package))


def literals(file: Path, *names: str) -> dict:
    """The lists, sets and tuples that a Python file assigns to these names, wherever in the file."""
    found = {}
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            found[node.targets[0].id] = ast.literal_eval(node.value)
    if missing := set(names) - set(found): raise SystemExit(f"{file} no longer holds {', '.join(sorted(missing))}")
    return found


def build() -> str:
    """The whole asset as text."""
    there = folder("clip-benchmark", "clip_benchmark") / "datasets"
    names, templates = (json.loads((there / f"en_{what}.json").read_text("utf-8")) for what in ("classnames", "zeroshot_classification_templates"))
    imagenet = runpy.run_path(str(folder("open-clip-torch", "open_clip") / "zero_shot_metadata.py"))
    lists = literals(there / "builder.py", "all_imagenet_wordnet_ids", "imagenet_a_wnids", "imagenet_r_wnids")
    voc = literals(there / "voc2007.py", "object_categories")["object_categories"]
    wnids = lists["all_imagenet_wordnet_ids"]
    sets = {}
    for name, (names_key, templates_key) in sorted(IN_CLIP_BENCHMARK.items()):
        part = {"templates": [t.replace("{c}", "{}") for t in templates[templates_key]], "source": "clip-benchmark"}
        if names_key: part["classnames"] = names[names_key]
        if name in KEYS: part["keys"] = KEYS[name]
        sets[name] = part
    sets["voc2007"] |= {"classnames": voc, "keys": voc}
    sets["imagenet"] = {"classnames": list(imagenet["IMAGENET_CLASSNAMES"]), "keys": wnids, "source": "open-clip-torch; folders: clip-benchmark",
                        "templates": [template("{}") for template in imagenet["OPENAI_IMAGENET_TEMPLATES"]]}
    subsets = {f"imagenet-{x}": [i for i, wnid in enumerate(wnids) if wnid in set(lists[f"imagenet_{x}_wnids"])] for x in "ar"}
    for part in sets.values():
        if "keys" in part and len(part["keys"]) != len(part["classnames"]): raise SystemExit(f"{len(part['keys'])} keys for {len(part['classnames'])} names")
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in sorted(sets.items()))
    return (f'{{\n "versions": {json.dumps(VERSIONS)},\n "imagenet_subsets": {json.dumps(subsets)},\n "sets": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file that is there, write nothing")
    made, asked = build(), parser.parse_args()
    if not asked.check: TARGET.write_text(made, "utf-8")
    elif TARGET.read_text("utf-8") != made: raise SystemExit(f"{TARGET} is not what the installed distributions make of it")
    print(f"{TARGET.name}: {len(made):,} bytes")
