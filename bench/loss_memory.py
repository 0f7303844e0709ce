"""Peak memory and time of one forward and backward pass of the contrastive loss, for batches of 1,024 to 65,536 pairs.

    python bench/loss_memory.py bench/results/loss_memory.json            # the table, and the same numbers as JSON
    python bench/loss_memory.py out.json --sizes 1024 4096 --memory 4     # fewer sizes, nothing that needs over 4 GiB

Forms, all on random unit rows of `--dim` float32 features:
  plain      clip_lab.train.objectives.contrastive_loss: the similarity matrices whole
  chunked    clip_lab.train.objectives.chunked_contrastive_loss: tiles, made again in the backward pass
  open_clip  ClipLoss of open_clip's loss.py, loaded as a single file (pip install --no-deps open-clip-torch)
  cached     clip_lab.train.cached.cached_backward around the chunked loss, micro-batches of 1,024; each tower is one linear layer from 64
             inputs, so that what is measured is the cache: embeddings, their gradients, and one micro-batch

Extra memory is the highest mark above what the process held before the first pass, features not counted, their gradients counted; on a processor that
is resident memory in a fresh process for each case (with a small pass before, which loads what is loaded once), on CUDA
`torch.cuda.max_memory_allocated`. Time is the median of three passes up to 8,192 pairs, one pass above; on a processor also CPU seconds, which a busy
machine disturbs less. A case expected to exceed a limit (from the size before: four times its time, and four times its memory for
plain and open_clip, twice for the others) is not run, and says so.
"""
import argparse
import importlib.util
import json
from pathlib import Path
import platform
import re
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from clip_lab.train.cached import cached_backward
from clip_lab.train.objectives import chunked_contrastive_loss, contrastive_loss

FORMS = ("plain", "chunked", "open_clip", "cached")
MICRO_BATCH, INPUTS, START = 1024, 64, 2.6592


def open_clip_loss():
    spec = importlib.util.find_spec("open_clip")
    if spec is None: raise SystemExit("open_clip is not installed (pip install --no-deps open-clip-torch); leave it out with --forms plain chunked cached")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(spec.submodule_search_locations[0]) / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.ClipLoss()
    return lambda image, text, logit_scale: loss(image, text, logit_scale.exp())


class Linears(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.image, self.text, self.logit_scale = nn.Linear(INPUTS, dim), nn.Linear(INPUTS, dim), nn.Parameter(torch.tensor(START))

    def forward(self, images, tokens): return F.normalize(self.image(images), dim=-1), F.normalize(self.text(tokens), dim=-1), self.logit_scale


def one_pass(form: str, n: int, dim: int, device: str):
    "A function without arguments that runs forward and backward once and keeps no gradient, its inputs made already."
    if form == "cached":
        towers, (images, tokens) = Linears(dim).to(device), torch.randn(2, n, INPUTS, device=device)
        batches = list(zip(images.split(MICRO_BATCH), tokens.split(MICRO_BATCH)))
        return lambda: (cached_backward(towers, batches, chunked_contrastive_loss), towers.zero_grad())
    image, text = (F.normalize(torch.randn(n, dim, device=device), dim=-1).requires_grad_() for _ in range(2))
    logit_scale = torch.tensor(START, device=device, requires_grad=True)
    loss = {"plain": lambda: contrastive_loss, "chunked": lambda: chunked_contrastive_loss, "open_clip": open_clip_loss}[form]()
    return lambda: torch.autograd.grad(loss(image, text, logit_scale), (image, text, logit_scale))


def memory(key: str) -> int:
    "Bytes: VmRSS, resident now, or VmHWM, its highest mark. (ru_maxrss of a fresh process on Linux starts at its parent's mark.)"
    if sys.platform == "linux": return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(form: str, n: int, dim: int, device: str) -> dict:
    cuda = device.startswith("cuda")
    sync = torch.cuda.synchronize if cuda else lambda: None
    one_pass(form, 256, dim, device)()
    run, times = one_pass(form, n, dim, device), []
    if cuda: torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux": Path("/proc/self/clear_refs").write_text("5")     # the highest mark starts anew
    before = torch.cuda.memory_allocated() if cuda else memory("VmRSS")
    for _ in range(3 if n <= 8192 else 1):
        sync(); wall, cpu = time.perf_counter(), time.process_time()
        run()
        sync(); times.append((time.perf_counter() - wall, time.process_time() - cpu))
    peak = (torch.cuda.max_memory_allocated() if cuda else memory("VmHWM")) - before
    return dict(extra_mib=peak / 2 ** 20, seconds=statistics.median(t[0] for t in times), cpu_seconds=statistics.median(t[1] for t in times), passes=len(times))


def expected(form: str, smaller: dict) -> tuple[float, float]:
    "MiB and seconds of twice as many pairs."
    mib, seconds = (smaller.get(k, smaller.get(f"expected_{k}")) for k in ("extra_mib", "seconds"))
    return mib * (4 if form in ("plain", "open_clip") else 2), seconds * 4


def case(form: str, n: int, smaller: dict | None, args) -> dict:
    if smaller:
        mib, seconds = expected(form, smaller)
        reason = f"needs about {mib / 1024:.1f} GiB" if mib > args.memory * 1024 else f"would take about {seconds:,.0f} s" if seconds > args.seconds else None
        if reason: return dict(form=form, pairs=n, not_run=reason, expected_extra_mib=mib, expected_seconds=seconds)
    command = [sys.executable, __file__, "-", "--one", form, str(n), "--dim", str(args.dim), "--device", args.device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: return dict(form=form, pairs=n, not_run=f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return dict(form=form, pairs=n) | json.loads(done.stdout)


def cell(row: dict | None) -> str:
    if row is None: return ""
    return f"not run ({row['not_run']})" if "not_run" in row else f"{row['extra_mib']:,.0f} MiB, {row['seconds']:.2f} s ({row['cpu_seconds']:.2f} s CPU)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2 ** k for k in range(10, 17)], help="pairs, each twice the one before")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=float, default=8, help="GiB that no case may be expected to exceed")
    parser.add_argument("--seconds", type=float, default=120, help="seconds that no pass may be expected to exceed")
    parser.add_argument("--one", nargs=2, metavar=("FORM", "PAIRS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(measure(args.one[0], int(args.one[1]), args.dim, args.device)))

    rows = []
    about = dict(device=torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.processor() or platform.machine(),
                 torch=torch.__version__, threads=torch.get_num_threads(), dim=args.dim, dtype="float32", micro_batch=MICRO_BATCH,
                 memory_limit_gib=args.memory, time_limit_s=args.seconds)
    print("pairs | " + " | ".join(args.forms))
    for n in sorted(args.sizes):
        for form in args.forms:
            smaller = next((r for r in rows if r["form"] == form and r["pairs"] * 2 == n and {"extra_mib", "expected_extra_mib"} & r.keys()), None)
            rows.append(case(form, n, smaller, args))
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n")
        print(f"{n:,} | " + " | ".join(cell(next((r for r in rows if r["form"] == f and r["pairs"] == n), None)) for f in args.forms), flush=True)


if __name__ == "__main__": main()
