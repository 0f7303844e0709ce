"""Files of strangers, mutated by atheris towards whatever part of the readers they have not reached yet. `make faults` installs it where it has a wheel; without it these tests are skipped."""

import importlib.util
from pathlib import Path
import re
import subprocess
import sys

from PIL import Image
import pytest
import torch

from conftest import SEED, many, tally
from clip_lab.audits.labels import label_set, save_labels, shipped
from clip_lab.humans.design import demo_design, save_design

if importlib.util.find_spec("atheris") is None: pytest.skip("atheris is not here; `make faults` installs it where it has a wheel", allow_module_level=True)

PROGRAM = """
import sys
import atheris, numpy, torch, yaml
with atheris.instrument_imports(include=["clip_lab"]): from clip_lab.{room} import {reader}
from pathlib import Path
file = Path(sys.argv.pop(1))
def one(data):
    file.write_bytes(data)
    try: {reader}(file)
    except (ValueError, OSError): pass       # a refusal; anything else ends the run
atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""


def seeds(kind: str, folder: Path) -> None:
    "Good files to begin with."
    if kind == "label set": [save_labels(label_set(name), folder / f"{name}.yaml") for name in shipped()]
    elif kind == "design": save_design(demo_design(), folder / "demo.yaml")
    elif kind == "picture": [Image.new("RGB", (8, 8), "red").save(folder / f"a.{form.lower()}", form) for form in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")]
    else: torch.save({"a": torch.zeros(2), "b": {"c": 1}}, folder / "a.pt")


@pytest.mark.parametrize("kind, room, reader, suffix", [("label set", "audits.labels", "read_labels", ".yaml"), ("design", "humans.design", "read_design", ".yaml"),
                                                        ("picture", "images", "open_image", ".png"), ("checkpoint", "archives", "read_tensors", ".pt")])
def test_guided_mutations_are_read_or_refused(tmp_path, kind, room, reader, suffix):
    (corpus := tmp_path / "corpus").mkdir()
    seeds(kind, corpus)
    runs = many(1000, 50_000)
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(room=room, reader=reader), tmp_path / f"one{suffix}", f"-runs={runs}", f"-seed={SEED + 1}", "-max_len=4096", "-timeout=30", f"-artifact_prefix={tmp_path}/", corpus],
                          capture_output=True, timeout=900, cwd=tmp_path)
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0, said[-3000:]
    tally(f"{kind}, guided", "read or refused", int(re.search(r"Done (\d+) runs", said)[1]))
