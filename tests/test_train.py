"""The training command as a user starts it: real processes, real files, real ways of dying."""

import csv
import http.server
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
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
@pytest.mark.parametrize("source, processes", [("drawings", 1), ("drawings", 2), ("files", 1), ("files", 2)])
def test_killed_at_any_step_a_run_continues_bit_for_bit(tmp_path, pairs, processes, source):
    data = DRAWINGS if source == "drawings" else ["--data", pairs, "--max-bad", "0.1", "--workers", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run(processes, *data, "--output", whole)
    assert done.returncode == 0, done.stderr[-3000:]
    assert yaml.safe_load((whole / "config.yaml").read_text())["run"]["processes"] == processes
    assert killed(processes, *data, "--output", cut, lines=3 if processes == 1 else 5, folder=cut) != 0
    (cut / "checkpoints" / ".writing-00000008").mkdir(parents=True, exist_ok=True)      # what a kill in the middle of writing leaves
    more = run(processes, *data, "--output", cut, "--resume", "auto")
    assert more.returncode == 0, more.stderr
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


RANK = '''
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
sys.path.insert(0, os.environ["TESTS"])
from references import TINY_VIT
from clip_lab.model import CONFIGS
from clip_lab.train import loop
from clip_lab.train.config import TrainConfig

started = AcceleratorState.__init__
def as_on_gpus(self, *args, fsdp_plugin=None, **more):      # accelerate shards on accelerators only, torch on processors too; only the choice is made here
    started(self, *args, fsdp_plugin=fsdp_plugin, **more)
    if fsdp_plugin is not None: self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
    if getattr(self, "fsdp_plugin", None): PartialState._shared_state["distributed_type"] = DistributedType.FSDP
if os.environ.get("ACCELERATE_USE_FSDP"): AcceleratorState.__init__ = as_on_gpus

class Slices:       # one process's feed, cut among all: every world trains on the same pairs
    def __init__(self, feed, rank, world): self.feed, self.rank, self.world = feed, rank, world
    def __getattr__(self, name): return getattr(self.feed, name)
    def batches(self):
        for b in self.feed.batches():
            n = len(b.texts) // self.world
            cut = slice(self.rank * n, (self.rank + 1) * n)
            yield replace(b, images=b.images[cut], texts=b.texts[cut], keys=b.keys[cut], levels=b.levels[cut], names=b.names[cut])

class Noted:        # a feed that writes down what it handed out
    def __init__(self, feed, file): self.feed, self.file = feed, file
    def __getattr__(self, name): return getattr(self.feed, name)
    def batches(self):
        for b in self.feed.batches():
            with open(self.file, "a") as file: file.write(json.dumps(b.names) + "\\n")
            yield b

class Looked(loop.Run):
    def __init__(self, config):
        super().__init__(config)
        if config.objective == "sigmoid": self.clip.logit_scale.data.fill_(6.0)       # too hot: to be clamped at ln 100
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in self.towers.parameters())
        acc, cut = self.accelerator, [k for k, p in self.towers.named_parameters() if isinstance(p, DTensor)]
        note = dict(world=acc.num_processes, kind=acc.distributed_type.value, share=held / sum(p.numel() for p in self.towers.parameters()), cut=len(cut))
        (Path(config.output).parent / f"{Path(config.output).name}-{acc.process_index}.json").write_text(json.dumps(note))

own_feed, own_save = loop.feed_of, loop.save
loop.feed_of = lambda config, transform, rank, world: (Slices(own_feed(config, transform), rank, world) if config.data == "emoji" else
    Noted(own_feed(config, transform, rank, world), f"{config.output}-{rank}.names"))
loop.save = lambda model, transform, file, dtype: own_save(model, transform, file, dtype=torch.float32)      # as trained, not rounded for the shelf
loop.Run, CONFIGS["tiny ViT"] = Looked, TINY_VIT
CONFIGS["one layer"] = replace(TINY_VIT, name="one layer", vision_layers=1, text_layers=1)
def report(line):
    if line["step"] == 3 and "die" in sys.argv: os.kill(os.getpid(), signal.SIGKILL)
for name, settings in json.loads(sys.argv[1]).items():
    loop.train(TrainConfig(**settings | dict(styles=("noto",)), output=Path(sys.argv[2]) / name), "resume" in sys.argv, report, lambda model, transform: dict(top1=float(model.logit_scale)))
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    os._exit(0)      # all is written and checked from outside; threads of torch may abort the interpreter's end, which is not what is tested
'''

TINY = dict(model="tiny ViT", steps=4, warmup=1, batch_size=16, save_every=2, log_every=1, precision="no", clipart_share=0.0, ema=0.0, cpu=True)
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def ranks(folder: Path, processes: int, runs: dict[str, dict], *words: str, sharded: bool = False) -> subprocess.CompletedProcess:
    "The training function on real processes, with a small model and, where asked, what accelerate does on GPUs only."
    folder.mkdir(exist_ok=True)
    (script := folder / "rank.py").write_text(RANK)
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([sys.executable, *launcher, script, json.dumps({name: TINY | changes for name, changes in runs.items()}), folder, *words], capture_output=True,
                          text=True, timeout=300, env=ENV | {"TESTS": str(Path(__file__).parent)} | (SHARDED if sharded else {}))


@pytest.mark.slow
def test_sharded_weights_end_where_one_process_and_plain_copies_end(tmp_path):
    runs = dict(plain=dict(eval_every=2), everything=dict(objective="sigmoid", accumulate=2, chunk=8, recompute=True, layer_decay=0.7))
    for name, processes in (("one", 1), ("copies", 2), ("sharded", 2)):
        done = ranks(tmp_path / name, processes, runs, sharded=name == "sharded")
        assert done.returncode == 0, done.stderr[-3000:]
    for run_name in runs:
        notes = [json.loads((tmp_path / "sharded" / f"{run_name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert all(note["world"] == 2 and note["kind"] == "FSDP" and note["cut"] > 40 and 0.49 < note["share"] < 0.51 for note in notes), notes
        assert json.loads((tmp_path / "copies" / f"{run_name}-1.json").read_text()) == dict(world=2, kind="MULTI_CPU", share=1.0, cut=0)
        one, *others = ({k: v for k, v in load_file(tmp_path / name / run_name / "model.safetensors").items() if v.is_floating_point()} for name in ("one", "copies", "sharded"))
        # After four steps of AdamW in float32; measured 1e-6, where a weight moves by up to 6e-3.
        for other in others: assert one.keys() == other.keys() and max((one[k] - other[k]).abs().max() for k in one) < 1e-5
        first, *rest = (log(tmp_path / name / run_name) for name in ("one", "copies", "sharded"))
        for lines in rest:
            for line, expected in zip(lines, first, strict=True): assert line == pytest.approx(expected, rel=1e-4), run_name
        if run_name == "everything": assert all(line["scale"] == pytest.approx(100) for line in first[:1])
    assert [line["step"] for line in log(tmp_path / "sharded" / "plain") if "top1" in line] == [2, 4]


@pytest.mark.slow
def test_a_sharded_run_continues_bit_for_bit_and_not_unsharded(tmp_path):
    runs = dict(drawings=dict(model="emoji"))      # with batch norm, whose statistics are no parameters
    assert ranks(tmp_path / "whole", 2, runs, sharded=True).returncode == 0
    assert ranks(tmp_path / "cut", 2, runs, "die", sharded=True).returncode != 0
    assert [f.name for f in (tmp_path / "cut" / "drawings" / "checkpoints").glob("step-*")] == ["step-00000002"]
    refused = ranks(tmp_path / "cut", 2, runs, "resume")
    assert refused.returncode != 0 and "sharded weights, this one has them whole" in refused.stderr, refused.stderr[-2000:]
    more = ranks(tmp_path / "cut", 2, runs, "resume", sharded=True)
    assert more.returncode == 0, more.stderr
    assert log(tmp_path / "cut" / "drawings") == log(tmp_path / "whole" / "drawings")
    a, b = (load_file(tmp_path / name / "drawings" / "model.safetensors") for name in ("whole", "cut"))
    assert all((a[key] == b[key]).all() for key in a)


@pytest.mark.slow
def test_sharding_that_would_not_happen_is_refused(tmp_path):
    done = subprocess.run(command(2, *DRAWINGS, "--ema", "0", "--output", tmp_path / "run"), capture_output=True, text=True, timeout=300, env=ENV | SHARDED)
    assert done.returncode == 1 and "clip_lab.train: FSDP was asked for, but accelerate runs MULTI_CPU, where it shards nothing" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_compiled_towers_take_the_same_steps(tmp_path):
    done = ranks(tmp_path, 1, {name: dict(model="one layer", steps=3, compile=name == "compiled") for name in ("eager", "compiled")})
    assert done.returncode == 0, done.stderr[-3000:]
    for line, expected in zip(log(tmp_path / "compiled"), log(tmp_path / "eager"), strict=True): assert line == pytest.approx(expected, rel=1e-5)      # float32, other sums


@pytest.mark.slow
def test_shards_over_http_are_shared_read_once_an_epoch_and_resumed_bit_for_bit(tmp_path):
    art, per_shard, asked = clipart.load(), 12, []
    for s in range(4):
        with tarfile.open(tmp_path / f"{s}.tar", "w") as shard:
            for i in range(s * per_shard, (s + 1) * per_shard):
                art.pictures[i].save(png := io.BytesIO(), "PNG")
                for suffix, content in (("png", png.getvalue()), ("txt", art.table.captions[i][0].encode())):
                    member = tarfile.TarInfo(f"pair{i:03}.{suffix}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))

    class Shelf(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=tmp_path)
        def log_message(self, form, *args): asked.append(args[0])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shelf) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        runs = dict(stream=dict(data=f"http://127.0.0.1:{server.server_port}/{{0..3}}.tar", steps=6, save_every=1, max_bad=0.0))
        whole = ranks(tmp_path / "whole", 2, runs)
        assert whole.returncode == 0, whole.stderr
        assert ranks(tmp_path / "cut", 2, runs, "die").returncode != 0
        assert (tmp_path / "cut" / "stream" / "checkpoints" / "step-00000002").exists()       # in the middle of an epoch of three steps
        more = ranks(tmp_path / "cut", 2, runs, "resume")
        assert more.returncode == 0, more.stderr
        server.shutdown()
    assert {line.split()[1] for line in asked} == {f"/{s}.tar" for s in range(4)}
    seen = [[json.loads(line) for line in (tmp_path / "whole" / f"stream-{rank}.names").read_text().splitlines()] for rank in (0, 1)]
    for epoch in (slice(0, 3), slice(3, 6)):
        names = [name for steps in seen for batch in steps[epoch] for name in batch]
        assert len(names) == len(set(names)) == 4 * per_shard
    assert seen[0][:3] != seen[0][3:]                      # another order in the next epoch
    for rank in (0, 1): assert [json.loads(line) for line in (tmp_path / "cut" / f"stream-{rank}.names").read_text().splitlines()][-4:] == seen[rank][2:]
    assert log(tmp_path / "cut" / "stream") == log(tmp_path / "whole" / "stream")
    a, b = (load_file(tmp_path / name / "stream" / "model.safetensors") for name in ("whole", "cut"))
    assert all((a[key] == b[key]).all() for key in a)
