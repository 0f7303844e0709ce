"""What the benchmarks share: clocks, rounds in alternating order, ratios, memory, the peers' code, and one layout for what they write.

A file is {"about": machine and versions, "parts": {name: {"measured", "rows", "ratios", "facts"}}}. Parts that are not asked for stay in the file if they were measured under the same conditions.
  a row      what, size, side, and a number for each round: cpu and wall (seconds), peak_mib where memory was measured; or not_run, which says why, and what the size before lets one expect
  a ratio    what, size, ours, theirs, rounds, and [median, lowest, highest] of the rounds: cpu and wall are theirs to ours, above 1 ours is faster; peak_mib is ours to theirs, below 1 ours needs less
A part whose peer is not installed says so in not_run, and the others run.
"""
import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import types

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]


# ---- clocks and memory

def clocked(run, device: str = "cpu"):
    "What `run` returns, and its wall and CPU seconds; on CUDA when the device has finished."
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    sync(); wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    sync(); return found, dict(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)


def memory(key: str) -> int:
    "Bytes: VmRSS, resident now, or VmHWM, its highest mark. (ru_maxrss of a fresh process on Linux starts at its parent's mark.)"
    if sys.platform == "linux": return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mark_anew(device: str = "cpu") -> int:
    "The highest mark of memory starts anew; bytes held now."
    if device.startswith("cuda"): torch.cuda.reset_peak_memory_stats(); return torch.cuda.memory_allocated()
    if sys.platform == "linux": Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def peak_since(before: int, device: str = "cpu") -> float:
    "MiB of the highest mark above `before`."
    return ((torch.cuda.max_memory_allocated() if device.startswith("cuda") else memory("VmHWM")) - before) / 2 ** 20


# ---- rounds and ratios

def row(side: str, rounds: list[dict], **about) -> dict:
    "One row of a table: what it is, and each measure's number in every round."
    return about | dict(side=side) | {key: [r[key] for r in rounds] for key in rounds[0]}


def race(sides: dict, rounds: int, device: str = "cpu", **about):
    "What each side returned last, and a row for each side with its seconds in every round; the sides run one after the other, in alternating order."
    found, taken = {}, {side: [] for side in sides}
    print("  " + ", ".join(f"{key} {value}" for key, value in about.items()))
    for turn in range(rounds):
        for side in list(sides)[::-1 if turn % 2 else 1]:
            found[side], seconds = clocked(sides[side], device)
            taken[side].append(seconds)
    for side, each in taken.items(): print(f"    {side}: {statistics.median(s['cpu'] for s in each):.3f} s CPU, {statistics.median(s['wall'] for s in each):.3f} s", flush=True)
    return found, [row(side, each, **about) for side, each in taken.items()]


def ratios(rows: list[dict]) -> list[dict]:
    "The first side against each of the others, for what they did alike, round by round: median, lowest and highest."
    found = []
    measured = [r for r in rows if "not_run" not in r]
    for ours in measured:
        if ours["side"] != measured[0]["side"]: continue
        alike = {k: ours[k] for k in ("what", "size") if k in ours}
        for theirs in measured:
            if theirs["side"] == ours["side"] or any(theirs.get(k) != v for k, v in alike.items()): continue
            each = {key: [b / a if key != "peak_mib" else a / b for a, b in zip(ours[key], theirs[key])] for key in ("cpu", "wall", "peak_mib") if min([*ours.get(key, [0]), *theirs.get(key, [0])]) > 0}
            found.append(alike | dict(ours=ours["side"], theirs=theirs["side"], rounds=len(each["wall"])) | {key: [statistics.median(r), min(r), max(r)] for key, r in each.items()})
    return found


def told(ratio: dict) -> str:
    "A ratio as one line."
    numbers = ", ".join(f"{key} x{ratio[key][0]:.2f} ({ratio[key][1]:.2f} to {ratio[key][2]:.2f})" for key in ("cpu", "wall", "peak_mib") if key in ratio)
    return f"  {ratio['what']}, {ratio.get('size', '')}: {ratio['theirs']} / {ratio['ours']} {numbers}"


def part(rows: list[dict], **facts) -> dict: return dict(rows=rows, ratios=ratios(rows), facts=facts)


# ---- what is measured on

def unit(rows: int, seed: int, width: int = 512) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def model_of(name: str, short: bool, device: str = "cpu"):
    "A model with random weights, the same each time; in the short form one layer deep."
    from dataclasses import replace
    from clip_lab.model import CONFIGS, build
    config = CONFIGS[name]
    return build(replace(config, vision_layers=1 if config.is_vit else (1, 1, 1, 1), text_layers=1) if short else config, seed=0, device=device)


def open_clip_modules():
    "model.py and loss.py of open_clip, without torchvision, which they import for one class that nothing here uses."
    if "open_clip.loss" in sys.modules: return sys.modules["open_clip.model"], sys.modules["open_clip.loss"]
    spec = importlib.util.find_spec("open_clip")
    if spec is None: raise ModuleNotFoundError("No module named 'open_clip' (pip install --no-deps open-clip-torch)", name="open_clip")
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    stubs = {"open_clip": package, "open_clip.hf_model": types.ModuleType("open_clip.hf_model")} | {n: types.ModuleType(n) for n in ("torchvision", "torchvision.ops", "torchvision.ops.misc")}
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d, stubs["open_clip.hf_model"].HFTextEncoder = torch.nn.BatchNorm2d, object
    sys.modules.update(stubs)
    return importlib.import_module("open_clip.model"), importlib.import_module("open_clip.loss")


def open_clip_model(config, device: str = "cpu"):
    "open_clip's model of this shape, with random weights."
    model_py, _ = open_clip_modules()
    vision = dict(image_size=config.image_resolution, width=config.vision_width, patch_size=config.vision_patch_size, layers=config.vision_layers if config.is_vit else list(config.vision_layers))
    text = dict(context_length=config.context_length, vocab_size=config.vocab_size, width=config.text_width, heads=config.text_heads, layers=config.text_layers)
    return model_py.CLIP(config.embed_dim, vision, text, quick_gelu=config.activation == "quickgelu").to(device)


# ---- the command

def child(script: str, asked: list, args, *more) -> list | dict:
    "What a fresh process of the same script answers."
    command = [sys.executable, script, "-", "--threads", args.threads, "--device", args.device, *(["--short"] if args.short else []), *more, "--one", *asked]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{Path(script).name} {' '.join(map(str, asked))}: {(done.stderr.strip().splitlines() or ['no message, ended with ' + str(done.returncode)])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def version(name: str) -> str:
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return "not installed"


def main(doc: str, parts: dict, packages: tuple = (), options: dict = {}, short: dict = {}, one=None) -> None:
    "The command line of a benchmark: runs `parts`, each a generator of what has been found so far, and writes their file."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--short", action="store_true", help="tiny sizes, one round: does it run, and do the sides agree? Its times mean nothing")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    for name, about in options.items(): parser.add_argument(f"--{name}", **about)
    if "--short" in sys.argv: parser.set_defaults(rounds=1, **short)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ |= {name: str(args.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}      # for what is loaded later, such as SciPy's own BLAS
    from threadpoolctl import threadpool_limits
    with threadpool_limits(args.threads):      # numpy, scikit-learn and FAISS too
        if args.one: print(json.dumps(one(args.one, args))); return
        machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
        about = dict(device=machine, cores=os.cpu_count(), threads=args.threads, dtype="float32", short=args.short, python=platform.python_version(), torch=torch.__version__) | {name: version(name) for name in packages}
        output = Path(args.output)
        kept = json.loads(output.read_text()) if output.exists() else {}
        found = kept["parts"] if kept.get("about") == about else {}
        output.parent.mkdir(parents=True, exist_ok=True)
        for name in args.parts:
            began = dict(date=time.strftime("%Y-%m-%d"), load=round(os.getloadavg()[0], 1))
            print(f"{output.stem}: {name}", flush=True)
            try:
                for result in parts[name](args):
                    found[name] = dict(measured=began) | result
                    output.write_text(json.dumps(dict(about=about, parts={p: found[p] for p in parts if p in found}), indent=1) + "\n")
                for ratio in found[name]["ratios"]: print(told(ratio), flush=True)
            except ModuleNotFoundError as error:
                if error.name is None or error.name.split(".")[0] == "clip_lab": raise
                found[name] = dict(measured=began, rows=[], ratios=[], facts={}, not_run=f"{error.name} is not installed: pip install -e '.[bench]' and pip install --no-deps open-clip-torch clip-benchmark, as `make bench` does")
                print(f"  not run: {found[name]['not_run']}", flush=True)
                output.write_text(json.dumps(dict(about=about, parts={p: found[p] for p in parts if p in found}), indent=1) + "\n")
