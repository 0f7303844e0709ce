"""Time and peak memory of an exact top-10 search in a million random unit rows, ours against faiss.IndexFlatIP, in one run.

    python bench/retrieval.py bench/results/retrieval.json
    python bench/retrieval.py out.json --rows 100000 --queries 100 --rounds 1

Sides:
  clip_lab   clip_lab.evals.retrieval.search over a float32 array in memory
  faiss      the same call over an IndexFlatIP (pip install faiss-cpu), which keeps a copy of the rows; left out where it is not installed

Each round starts a fresh process for each side, in alternating order. A process makes the same gallery from the same seed, piece by piece, so that no second copy of
it is ever there; then each number of queries is searched once. Peak memory is resident memory above what the process held before the gallery, making the gallery
included, and `search_mib` what the search alone added. Reported: the median over the rounds with their range, CPU seconds (which a busy machine disturbs
less), and whether both sides found the same rows (`same_rows`: share of answers that agree, order included). Ratios are ours to theirs, from this one run.
"""
import argparse
import hashlib
import importlib.util
import json
from pathlib import Path
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

from clip_lab.evals.retrieval import search

SIDES, PIECE = ("clip_lab", "faiss"), 50_000


def memory(key: str) -> int:
    "Bytes: VmRSS, resident now, or VmHWM, its highest mark. (ru_maxrss of a fresh process on Linux starts at its parent's mark.)"
    if sys.platform == "linux": return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fresh_mark() -> int:
    "The highest mark starts anew; bytes resident now."
    if sys.platform == "linux": Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def gallery_of(side: str, rows: int, dim: int):
    "The rows where the side keeps them."
    pieces = ((start, min(PIECE, rows - start)) for start in range(0, rows, PIECE))
    if side == "faiss":
        import faiss
        index = faiss.IndexFlatIP(dim)
        for start, n in pieces: index.add(unit(n, dim, 1 + start).numpy())
        return index
    gallery = np.empty((rows, dim), dtype=np.float32)
    for start, n in pieces: gallery[start:start + n] = unit(n, dim, 1 + start).numpy()
    return gallery


def measure(side: str, found_file: str, args) -> list[dict]:
    if side == "faiss":
        import faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
    search(unit(8, args.dim, 0), gallery_of(side, 2000, args.dim), args.k)     # loads what is loaded once
    before = fresh_mark()
    gallery, rows, answers = gallery_of(side, args.rows, args.dim), [], {}
    peak = memory("VmHWM")
    for n in args.queries:
        queries, held = unit(n, args.dim, 0), fresh_mark()
        wall, cpu = time.perf_counter(), time.process_time()
        _, found = search(queries, gallery, args.k)
        seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
        answers[str(n)], mark = found.numpy(), memory("VmHWM")
        rows.append(dict(queries=n, seconds=seconds, cpu_seconds=cpu, peak_mib=(max(peak, mark) - before) / 2 ** 20, search_mib=(mark - held) / 2 ** 20))
    np.savez(found_file, **answers)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the gallery")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(measure(*args.one, args)))

    sides = [side for side in SIDES if side == "clip_lab" or importlib.util.find_spec(side)]
    sizes, taken, found = ["--rows", args.rows, "--dim", args.dim, "--k", args.k, "--queries", *args.queries], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for side in sides if turn % 2 == 0 else sides[::-1]:
                file = Path(folder) / f"{side}.npz"
                done = subprocess.run([sys.executable, __file__, "-", *map(str, sizes), "--one", side, str(file)], capture_output=True, text=True)
                if done.returncode: raise SystemExit(f"{side} failed:\n{done.stderr}")
                taken += [dict(side=side, round=turn) | row for row in json.loads(done.stdout)]
                found[side] = dict(np.load(file))

    rows = []
    for n in args.queries:
        for side in sides:
            runs = [r for r in taken if (r["side"], r["queries"]) == (side, n)]
            rows.append(dict(side=side, queries=n, rounds=len(runs), range_s=[f([r["seconds"] for r in runs]) for f in (min, max)])
                        | {key: statistics.median(r[key] for r in runs) for key in ("seconds", "cpu_seconds", "peak_mib", "search_mib")}
                        | dict(found=hashlib.sha256(found[side][str(n)].tobytes()).hexdigest()[:16]))
            print(f"{n:,} queries | {side} | {rows[-1]['seconds']:.2f} s ({rows[-1]['cpu_seconds']:.2f} s CPU) | peak {rows[-1]['peak_mib']:,.0f} MiB, search {rows[-1]['search_mib']:,.0f} MiB")
    ratios = []
    if len(sides) == 2:
        for n in args.queries:
            ours, theirs = (next(r for r in rows if (r["side"], r["queries"]) == (side, n)) for side in sides)
            ratios.append({"queries": n, "same_rows": float((found["clip_lab"][str(n)] == found["faiss"][str(n)]).mean())}
                          | {key: ours[key] / theirs[key] for key in ("seconds", "cpu_seconds", "peak_mib")})
            print(f"{n:,} queries | ours / faiss: {ratios[-1]['seconds']:.2f} of the time ({ratios[-1]['cpu_seconds']:.2f} of the CPU time), {ratios[-1]['peak_mib']:.2f} of the memory; {ratios[-1]['same_rows']:.2%} of the answers agree")
    about = dict(device=platform.processor() or platform.machine(), torch=torch.__version__, threads=torch.get_num_threads(), rows=args.rows, dim=args.dim, k=args.k,
                 dtype="float32", faiss=importlib.import_module("faiss").__version__ if "faiss" in sides else None)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(dict(about=about, rows=rows, ratios=ratios, runs=taken), indent=1) + "\n")


if __name__ == "__main__": main()
