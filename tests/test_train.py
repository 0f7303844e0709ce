"""The training command as a user starts it: real processes, real files."""

import json
import subprocess
import sys

import pytest

import clip_lab

SMALL = ["--cpu", "--steps", "3", "--warmup", "1", "--batch-size", "32", "--save-every", "2", "--precision", "no",
         "--styles", "noto", "--clipart-share", "0"]


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_real_processes_train_one_model(tmp_path):
    done = run("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "clip_lab.train", *SMALL, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and 0 < last["loss"] < 10
    model, preprocess = clip_lab.load(tmp_path / "run" / "model.safetensors")
    assert model.encode_text(model.tokenize(["a cat"])).isfinite().all()


@pytest.mark.slow
def test_accelerate_launch_and_what_it_refuses(tmp_path):
    out = tmp_path / "run"
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "clip_lab.train"]
    done = run(*launch, *SMALL, "--output", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "checkpoint").is_dir() and not (out / "checkpoint.writing").exists()

    again = run("clip_lab.train", *SMALL, "--output", str(out))
    assert again.returncode != 0 and "--resume" in again.stderr

    (out / "checkpoint.writing").mkdir()        # what a kill in the middle of writing leaves
    (out / "checkpoint.writing" / "model.safetensors").write_bytes(b"half")
    more = run("clip_lab.train", *SMALL, "--output", str(out), "--resume")
    assert more.returncode == 0, more.stderr[-3000:]
    assert len((out / "log.jsonl").read_text().splitlines()) == 1     # nothing left to do after step 3


def test_unknown_flag_is_refused():
    done = run("clip_lab.train", "--stepz", "3")
    assert done.returncode == 2 and "stepz" in done.stdout + done.stderr
