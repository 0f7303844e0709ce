"""Many evaluations in one go: the same numbers on one and on two processes, and after being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import clip_lab
from clip_lab.data import emoji
from clip_lab.data.evalset import EvalSet, Target
from clip_lab.data.labelled import Labelled, Pictures
from clip_lab.evals.metrics import map11
from clip_lab.evals.results import Bundle, Results
from clip_lab.evals.suite import TASKS, Unanswered, embed_set, plan, run
from references import TINY_VIT, tiny

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
SCRIPT = """
import sys, warnings
import numpy as np, torch
import clip_lab
from clip_lab.data import emoji
from clip_lab.data.evalset import EvalSet, Target
from clip_lab.evals.results import Results
from clip_lab.evals.suite import run
if "RANK" in __import__("os").environ: torch.distributed.init_process_group("gloo")
def some(style, shift_of=None):
    data, labels, names = emoji.task(style, "group")
    order = np.random.default_rng(0).permutation(len(data))[:700]
    return EvalSet(style, data.select(order), {"group": Target(names, labels[order], {"train": np.arange(500), "test": np.arange(500, 700)})},
                   captions=[[n] for n in data.table["name"][order]], shift_of=shift_of)
model, preprocess = clip_lab.load()
for bundle in run(model, preprocess, [some("noto"), some("twemoji", "noto")], ["zeroshot", "probe", "retrieval", "robustness"], Results(sys.argv[1]), batch_size=48):
    print(bundle.id, bundle.asked["task"], flush=True)
if torch.distributed.is_initialized():
    print(f"world {torch.distributed.get_world_size()}\\n", end="", flush=True)
    torch.distributed.barrier()
    __import__("os")._exit(0)      # not through the interpreter's end, where a thread of torch that still wants it may abort
"""


def evaluated(folder: Path, processes: int = 1, **options) -> subprocess.CompletedProcess:
    (folder.parent / "script.py").write_text(SCRIPT)
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([sys.executable, *launcher, str(folder.parent / "script.py"), str(folder)], capture_output=True, text=True, timeout=400, env=ENV, **options)


def same(a: Results, b: Results):
    assert a.names() == b.names() and len(a.names()) == 7
    for name in a.names():
        x, y = a.get(name), b.get(name)
        pd.testing.assert_frame_equal(x.rows, y.rows, check_exact=True)
        assert (x.answers is None) == (y.answers is None) and (x.answers is None or x.answers.equals(y.answers))


@pytest.mark.slow
def test_one_process_two_processes_and_a_killed_run_agree_to_the_last_bit(tmp_path):
    one, two, cut = (tmp_path / name for name in ("one", "two", "cut"))
    done = evaluated(one)
    assert done.returncode == 0, done.stderr[-3000:]
    done = evaluated(two, 2)
    assert done.returncode == 0 and done.stdout.count("world 2") == 2, done.stderr[-3000:]
    started = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(cut)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
    deadline = time.monotonic() + 200
    while not list(cut.glob("*.json")) and started.poll() is None and time.monotonic() < deadline: time.sleep(0.01)
    assert started.poll() is None
    started.send_signal(signal.SIGKILL); started.wait(30)
    kept = {f: f.read_bytes() for f in cut.glob("*.json")}
    assert 1 <= len(kept) < 7 and all(json.loads(text)["rows"] for text in kept.values())
    done = evaluated(cut)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f.read_bytes() == text for f, text in kept.items())          # what was there was not made again
    same(Results(one), Results(two)), same(Results(one), Results(cut))


def drawings(n=60, broken=()):
    rng = np.random.default_rng(0)
    import io
    def png(i):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        return b"" if i in broken else file.getvalue()
    return Labelled("noise", Pictures([png(i) for i in range(n)]), pd.DataFrame({"i": range(n)}))


VIT, PREPROCESS = tiny(TINY_VIT), clip_lab.images.preprocess(32)


def test_a_vision_transformer_gets_both_kinds_of_features_from_one_pass():
    from clip_lab.embed import embed_images
    from clip_lab.evals.probe import image_features
    s = EvalSet("noise", drawings(), captions=[["a"]] * 60)
    f = embed_set(VIT, PREPROCESS, s, progress=False)
    assert torch.equal(f.raw, image_features(VIT, PREPROCESS, s.data.pictures).features)
    np.testing.assert_allclose(f.unit, embed_images(VIT, PREPROCESS, s.data.pictures, progress=False).features, atol=1e-6)


def test_only_what_is_needed_is_embedded():
    s = EvalSet("noise", drawings(), {"q": Target(["a", "b"], np.arange(60) % 2, {"train": np.arange(40), "test": np.arange(40, 60)})})
    seen = []
    hook = VIT.visual.conv1.register_forward_pre_hook(lambda module, x: seen.append(len(x[0])))
    try: list(run(VIT, PREPROCESS, [s], ["zeroshot"], progress=False))
    finally: hook.remove()
    assert sum(seen) == 20


def test_several_labels_a_picture():
    truth = np.random.default_rng(1).random((60, 3)) < 0.4
    s = EvalSet("noise", drawings(), {"q": Target(["a", "b", "c"], truth, {"train": np.arange(30), "test": np.arange(30, 60)}, metric="11-point mAP")})
    zero, probe = run(VIT, PREPROCESS, [s], ["zeroshot", "probe"], progress=False)
    f = embed_set(VIT, PREPROCESS, s, progress=False)
    from clip_lab.evals.zeroshot import classifier
    expected = map11((f.unit[30:] @ classifier(VIT, ["a", "b", "c"], "A photo of a {}.").T).numpy(), truth[30:])
    assert zero.rows.metric.tolist() == ["11-point mAP"] and zero.rows.estimate.item() == pytest.approx(expected.value, abs=1e-12)
    assert isinstance(probe, Unanswered) and "several labels" in probe.why


@pytest.mark.filterwarnings("ignore:.*could not be read")
def test_a_set_nobody_can_read_is_unanswered_not_fatal():
    s = EvalSet("noise", drawings(4, broken=range(4)), {"q": Target(["a", "b"], [0, 1, 0, 1], {"test": [0, 1, 2, 3]})})
    told, = run(VIT, PREPROCESS, [s], ["zeroshot"], progress=False)
    assert isinstance(told, Unanswered) and "none of 4 pictures could be read" in told.why


def test_robustness_needs_its_origin_and_a_training_split():
    target = Target(["a", "b"], np.arange(60) % 2, {"test": np.arange(60)})
    plain, shifted = EvalSet("plain", drawings(), {"q": target}), EvalSet("shifted", drawings(), {"q": target}, shift_of="plain")
    assert [t for _, t, _ in plan([shifted], list(TASKS))] == ["zeroshot"]
    assert "robustness" not in [t for _, t, _ in plan([plain, shifted], list(TASKS))]
    known = EvalSet("imagenet-a", drawings(), {"q": target}, shift_of="plain")
    assert "robustness" in [t for _, t, _ in plan([plain, known], list(TASKS))]


def test_a_result_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    asked = dict(task="zeroshot", model="m", weights_hash="w", data="d", data_hash="h", target="t")
    rows = pd.DataFrame([dict(subset="all", metric="top-1", estimate=0.5, low=0.4, high=0.6, n=10, chance=0.1)])
    results = Results(tmp_path)
    results.save(Bundle(asked, rows))
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    def full(self, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left.*unchanged"): results.save(Bundle(asked, rows.assign(estimate=0.6, high=0.7)))
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="lack chance"): Bundle(asked, rows.drop(columns="chance"))
    with pytest.raises(ValueError, match="must say its data_hash"): Bundle({k: v for k, v in asked.items() if k != "data_hash"}, rows)
