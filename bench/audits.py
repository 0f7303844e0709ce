"""Counting labels at all thresholds: 300 labels, 50 thresholds, 14 groups, beside a loop over the thresholds in pandas.

    python bench/audits.py bench/results/audits.json

Scores are synthetic. Up to a hundred thousand pictures both sides count the same table in memory, and must agree; a million are streamed by ours alone, one block of rows again and again with the groups of each picture,
because the table would take more memory than a laptop has to spare for it; the time includes nothing else.
"""
from itertools import repeat

import numpy as np
import pandas as pd

from common import clocked, main, mark_anew, part, peak_since, race, row

LABELS, THRESHOLDS, GROUPS, BLOCK = 300, 50, 14, 20_000


def made(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = np.exp(2 * rng.standard_normal((n, LABELS), dtype=np.float32))
    return scores / scores.sum(1, keepdims=True), rng.integers(0, GROUPS, n)


def loop(scores, codes, grid, mode: str) -> np.ndarray:
    "What one writes with pandas: a table of flags, grouped, for each threshold."
    frame = pd.DataFrame(scores)
    if mode == "multi-label": return np.stack([(frame >= t).groupby(codes).sum().to_numpy() for t in grid], axis=2)
    best = pd.DataFrame(dict(group=pd.Categorical(codes, range(GROUPS)), label=pd.Categorical(frame.idxmax(axis=1), range(LABELS)), score=frame.max(axis=1)))
    return np.stack([best[best.score >= t].groupby(["group", "label"], observed=False).size().to_numpy().reshape(GROUPS, LABELS) for t in grid], axis=2)


def aggregation(args):
    from clip_lab.audits.people import Grouping
    from clip_lab.audits.thresholds import sweep, threshold_grid
    grid, names, groups, rows = threshold_grid(LABELS, THRESHOLDS, also=(), multiples=()), [f"l{i}" for i in range(LABELS)], [f"g{i}" for i in range(GROUPS)], []
    sweep(made(100)[0], Grouping(("g",), groups, made(100)[1]), names, grid)         # loads what is loaded once
    for n in sorted(args.pictures):
        scores, codes = made(min(n, args.block if n > args.most else n))
        for mode in ("multi-label", "argmax"):
            if n <= args.most:
                grouping = Grouping(("g",), groups, codes)
                found, taken = race({"clip_lab": lambda: sweep(scores, grouping, names, grid, mode).counts, "pandas": lambda: loop(scores, codes, grid, mode)}, args.rounds, what=mode, size=n)
                assert (found["clip_lab"] == found["pandas"]).all(), f"{mode}: the counts differ"
                rows += taken
            else:
                grouping, before = Grouping(("g",), groups, np.random.default_rng(1).integers(0, GROUPS, n)), mark_anew()
                each = [clocked(lambda: sweep(repeat(scores, n // len(scores)), grouping, names, grid, mode))[1] for _ in range(args.rounds)]
                rows += [row("clip_lab", [s | dict(peak_mib=peak_since(before)) for s in each], what=mode, size=n), dict(what=mode, size=n, side="pandas", not_run=f"the table alone takes {n * LABELS * 4 / 2 ** 30:.1f} GiB")]
            yield part(rows, labels=LABELS, thresholds=len(grid), groups=GROUPS)


if __name__ == "__main__":
    main(__doc__, dict(aggregation=aggregation), ("numpy", "pandas"), short=dict(pictures=[200, 1000], most=200, block=100),
         options=dict(pictures=dict(type=int, nargs="+", default=[10_000, 100_000, 1_000_000]), most=dict(type=int, default=100_000, help="pictures of the largest table held in memory"), block=dict(type=int, default=BLOCK)))
