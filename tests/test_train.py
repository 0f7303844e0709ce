"""The training command as a user starts it: real processes, real files, real ways of dying."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import clip_lab
from clip_lab.data import clipart

DRAWINGS = ["--styles", "noto", "--clipart-share", "0"]
SMALL = ["--cpu", "--steps", "8", "--warmup", "1", "--batch-size", "16", "--save-every", "2", "--log-every", "1", "--precision", "no"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def command(processes: int, *args) -> list[str]:
    launcher = [] if processes == 1 else ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return [sys.executable, "-m", *launcher, "clip_lab.train", *SMALL, *map(str, args)]


def run(processes: int, *args, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(processes, *args), capture_output=True, text=True, timeout=300, env=ENV, **options)


def log(folder: Path) -> list[dict]:
    "The lines that are whole, without what depends on the machine's speed."
    text = (folder / "log.jsonl").read_text() if (folder / "log.jsonl").exists() else ""
    return [{k: v for k, v in json.loads(line).items() if k not in ("pairs_per_s", "tflops")} for line in text.split("\n")[:-1]]


def killed(processes: int, *args, lines: int, folder: Path, how=signal.SIGKILL) -> int:
    "Start, wait until the log has so many lines, signal every process of the run at once; returns the exit code."
    started = subprocess.Popen(command(processes, *args), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
    deadline = time.monotonic() + 240
    while len(log(folder)) < lines and started.poll() is None and time.monotonic() < deadline: time.sleep(0.02)
    assert started.poll() is None, f"the run ended by itself with {started.returncode} after {len(log(folder))} lines"
    os.killpg(started.pid, how)
    return started.wait(120)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    "Clip art as a table of paths and captions, with one picture that is none."
    folder, art = tmp_path_factory.mktemp("pairs"), clipart.load()
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i in range(64):
            art.pictures[i].save(folder / f"{i}.png")
            table.writerow([f"{i}.png", art.table.captions[i][0]])
    (folder / "5.png").write_bytes(b"no picture")
    return folder / "pairs.csv"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("source", ["drawings", "files"])
def test_killed_at_any_step_a_run_continues_bit_for_bit(tmp_path, pairs, processes, source):
    data = DRAWINGS if source == "drawings" else ["--data", pairs, "--max-bad", "0.1", "--workers", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run(processes, *data, "--output", whole)
    assert done.returncode == 0, done.stderr[-3000:]
    assert yaml.safe_load((whole / "config.yaml").read_text())["run"]["processes"] == processes
    assert killed(processes, *data, "--output", cut, lines=3 if processes == 1 else 5, folder=cut) != 0
    (cut / "checkpoints" / ".writing-00000008").mkdir(parents=True, exist_ok=True)      # what a kill in the middle of writing leaves
    more = run(processes, *data, "--output", cut, "--resume", "auto")
    assert more.returncode == 0, more.stderr[-3000:]
    assert log(cut) == log(whole) and [line["step"] for line in log(cut)] == list(range(1, 9))
    a, b = (clip_lab.load(folder / "model.safetensors")[0].state_dict() for folder in (whole, cut))
    assert all((a[key] == b[key]).all() for key in a)


@pytest.mark.slow
def test_signals_save_and_leave_with_75_and_other_runs_are_refused(tmp_path):
    out = tmp_path / "run"
    for how, lines in ((signal.SIGTERM, 2), (signal.SIGUSR1, 5)):
        assert killed(1, *DRAWINGS, "--output", out, "--resume", "auto", "--save-every", "100", lines=lines, folder=out, how=how) == 75
        assert max(int(f.name[5:]) for f in (out / "checkpoints").glob("step-*")) == len(log(out))
    for processes, changed, told in ((2, [], "1 processes, this one has 2"), (1, ["--lr", "0.1"], "lr 0.0015 -> 0.1"), (1, ["--resume", "no"], "--resume auto")):
        done = run(processes, *DRAWINGS, "--output", out, "--resume", "auto", "--save-every", "100", *changed)
        assert done.returncode == 1 and told in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path):
    out = tmp_path / "run"
    assert run(1, *DRAWINGS, "--output", out, "--steps", "3").returncode == 0
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))      # no file above 2 MB, which every checkpoint is
    done = run(1, *DRAWINGS, "--output", tmp_path / "full", preexec_fn=limit)
    assert done.returncode == 1 and "checkpoint of step 2 could not be written" in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert list((tmp_path / "full" / "checkpoints").glob("*")) == []


@pytest.mark.slow
def test_accelerate_launch_measures_and_tracks(tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "clip_lab.train"]
    done = subprocess.run([sys.executable, "-m", *launch, *SMALL, *DRAWINGS, "--steps", "3", "--eval-every", "2", "--track", "tensorboard", "--output", str(out)],
                          capture_output=True, text=True, timeout=300, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = [line for line in log(out) if "top1" in line]
    assert [line["step"] for line in measured] == [2, 3] and all(line["top1_low"] <= line["top1"] <= line["top1_high"] and line["top1_n"] > 100 for line in measured)
    assert json.loads((out / "checkpoints" / "best.json").read_text())["step"] in (2, 3)
    assert list(out.rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_too_many_bad_pairs_stop_the_run(tmp_path, pairs):
    shutil.copytree(pairs.parent, tmp_path / "bad")
    for i in range(20, 40): (tmp_path / "bad" / f"{i}.png").write_bytes(b"")
    done = run(1, "--data", tmp_path / "bad" / "pairs.csv", "--steps", "40", "--output", tmp_path / "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "skipped" in done.stderr and "max_bad" in done.stderr
