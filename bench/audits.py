"""Counting labels at all thresholds: a million pictures, 300 labels, 50 thresholds, 14 groups, beside a loop over pandas.

python bench/audits.py bench/results/audits.json [--loop 5000]

Scores are synthetic. The large case streams one block of rows again and again with the groups of each picture, so that memory stays that of a block; the time includes nothing else.
The loop is timed on `--loop` pictures, on which both sides are asserted to agree, and scaled by the number of pictures, in which it is linear.
Ratios are of CPU time, which other work on the machine moves less than the clock.
"""

import argparse
import json
import os
import platform
import resource
import time
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd

import torch

from clip_lab.audits.people import Grouping
from clip_lab.audits.thresholds import sweep, threshold_grid

PICTURES, LABELS, THRESHOLDS, GROUPS, BLOCK = 1_000_000, 300, 50, 14, 20_000


def made(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = np.exp(2 * rng.standard_normal((n, LABELS), dtype=np.float32))
    return scores / scores.sum(1, keepdims=True), rng.integers(0, GROUPS, n)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--loop", type=int, default=5000, help="pictures for the pandas loop")
    args = parser.parse_args()
    grid, names, groups = threshold_grid(LABELS, THRESHOLDS, also=(), multiples=()), [f"l{i}" for i in range(LABELS)], [f"g{i}" for i in range(GROUPS)]
    scores, codes = made(args.loop)
    start, cpu = time.perf_counter(), time.process_time()
    frame = pd.DataFrame(scores)
    looped = np.stack([(frame >= t).groupby(codes).sum().to_numpy() for t in grid], axis=2)
    loop, loop_cpu = time.perf_counter() - start, time.process_time() - cpu
    assert (sweep(scores, Grouping(("g",), groups, codes), names, grid).counts == looped).all()
    block, _ = made(BLOCK)
    large = Grouping(("g",), groups, np.random.default_rng(1).integers(0, GROUPS, PICTURES))
    rows = [dict(what="pandas loop", pictures=args.loop, seconds=loop, cpu_seconds_per_million=loop_cpu * PICTURES / args.loop, note="measured, then scaled")]
    for mode in ("multi-label", "argmax"):
        before, start, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
        found = sweep(repeat(block, PICTURES // BLOCK), large, names, grid, mode)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert found.counts[:, :, 0].sum() > 0
        rows.append(dict(what=f"sweep, {mode}", pictures=PICTURES, seconds=wall, cpu_seconds_per_million=cpu, note=f"{more:.0f} MB more than before"))
    plain = rows[0]["cpu_seconds_per_million"]
    for r in rows: r |= dict(ratio=round(plain / r["cpu_seconds_per_million"], 1), seconds=round(r["seconds"], 3), cpu_seconds_per_million=round(r["cpu_seconds_per_million"], 2))
    about = dict(labels=LABELS, thresholds=len(grid), groups=GROUPS, cpus=os.cpu_count(), threads=1, numpy=np.__version__, pandas=pd.__version__, python=platform.python_version(),
                 load=round(os.getloadavg()[0], 1), date=time.strftime("%Y-%m-%d"))
    args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(pd.DataFrame(rows).to_string(index=False), about, sep="\n")


if __name__ == "__main__":
    main()
