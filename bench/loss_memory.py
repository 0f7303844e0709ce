"""Peak memory and time of one forward and backward pass of the contrastive loss, for batches of 1,024 to 65,536 pairs.

    python bench/loss_memory.py bench/results/loss_memory.json
    python bench/loss_memory.py out.json --sizes 1024 4096 --memory 4     # fewer sizes, nothing that needs over 4 GiB

Forms, all on random unit rows of `--dim` float32 features:
  clip_lab           clip_lab.train.objectives.chunked_contrastive_loss: tiles, made again in the backward pass
  plain              clip_lab.train.objectives.contrastive_loss: the similarity matrices whole
  open_clip          ClipLoss of open_clip's loss.py
  clip_lab, cached   clip_lab.train.cached.cached_backward around the chunked loss, micro-batches of 1,024; each tower is one linear layer from 64 inputs, so that what is measured is the cache:
                     embeddings, their gradients, and one micro-batch

Extra memory is the highest mark above what the process held before the first pass, features not counted, their gradients counted; on a processor that is resident memory in a fresh process for each case (with a small
pass before, which loads what is loaded once), on CUDA `torch.cuda.max_memory_allocated`. Three rounds up to 8,192 pairs, one above. A case expected to exceed a limit (from the size before: four times its time,
and four times its memory for plain and open_clip, twice for the others) is not run, and says so with what it was expected to take. The last two forms stop at 16,384 pairs: the rest of their curves is that of the first two.
"""
import statistics

import torch
import torch.nn.functional as F
from torch import nn

from common import child, clocked, main, mark_anew, open_clip_modules, part, peak_since, row

MICRO_BATCH, INPUTS, START = 1024, 64, 2.6592
MOST = {"clip_lab": 2 ** 31, "plain": 2 ** 31, "open_clip": 16_384, "clip_lab, cached": 16_384}


class Linears(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.image, self.text, self.logit_scale = nn.Linear(INPUTS, dim), nn.Linear(INPUTS, dim), nn.Parameter(torch.tensor(START))

    def forward(self, images, tokens): return F.normalize(self.image(images), dim=-1), F.normalize(self.text(tokens), dim=-1), self.logit_scale


def one_pass(form: str, n: int, dim: int, device: str):
    "A function without arguments that runs forward and backward once, keeps no gradient and returns the loss; its inputs are made already."
    from clip_lab.train.cached import cached_backward
    from clip_lab.train.objectives import chunked_contrastive_loss, contrastive_loss
    torch.manual_seed(0)
    if form == "clip_lab, cached":
        towers, (images, tokens) = Linears(dim).to(device), torch.randn(2, n, INPUTS, device=device)
        batches = list(zip(images.split(MICRO_BATCH), tokens.split(MICRO_BATCH)))
        def cached():
            cached_backward(towers, batches, chunked_contrastive_loss)
            towers.zero_grad()
        return cached
    image, text = (F.normalize(torch.randn(n, dim, device=device), dim=-1).requires_grad_() for _ in range(2))
    logit_scale = torch.tensor(START, device=device, requires_grad=True)
    def open_clip(image, text, logit_scale): return open_clip_modules()[1].ClipLoss()(image, text, logit_scale.exp())
    loss = {"plain": contrastive_loss, "clip_lab": chunked_contrastive_loss, "open_clip": open_clip}[form]
    def run():
        value = loss(image, text, logit_scale)
        torch.autograd.grad(value, (image, text, logit_scale))
        return float(value.detach())
    return run


def measure(asked: list[str], args) -> dict:
    form, n = asked[0], int(asked[1])
    one_pass(form, 256, args.dim, args.device)()
    run = one_pass(form, n, args.dim, args.device)
    before, rounds, value = mark_anew(args.device), [], None
    for _ in range(args.rounds if n <= 8192 else 1):
        value, seconds = clocked(run, args.device)
        rounds.append(seconds)
    peak = peak_since(before, args.device)
    return dict(rounds=[s | dict(peak_mib=peak) for s in rounds], loss=value)


def too_much(form: str, smaller: dict | None, args) -> dict | None:
    "Why twice as many pairs are not run, and what they would take; None where they are."
    if smaller is None: return None
    mib, seconds = (statistics.median(smaller[k]) if k in smaller else smaller[f"expected_{k}"] for k in ("peak_mib", "wall"))
    mib, seconds = mib * (4 if form in ("plain", "open_clip") else 2), seconds * 4
    reason = f"needs about {mib / 1024:.1f} GiB, and {args.memory:.1f} were allowed" if mib > args.memory * 1024 else f"would take about {seconds:,.0f} s, and {args.seconds:,.0f} were allowed" if seconds > args.seconds else None
    return reason and dict(not_run=reason, expected_peak_mib=mib, expected_wall=seconds)


def loss(args):
    if args.memory is None:
        import psutil
        args.memory = 0.8 * (torch.cuda.mem_get_info()[0] if args.device.startswith("cuda") else psutil.virtual_memory().available) / 2 ** 30
    rows, last, values = [], {}, {}
    for n in sorted(args.sizes):
        for form, most in MOST.items():
            if n > most: continue
            about = dict(what="forward and backward", size=n)
            why = too_much(form, last.get(form), args)
            if why is None:
                try:
                    found = child(__file__, [form, n], args, "--dim", args.dim, "--rounds", args.rounds)
                    last[form] = row(form, found["rounds"], **about)
                    if found["loss"] is not None: values.setdefault(n, {})[form] = found["loss"]
                except RuntimeError as error:
                    if "open_clip" not in str(error): raise
                    last[form] = about | dict(side=form, not_run=f"{error}", expected_peak_mib=float("inf"), expected_wall=float("inf"))
            else: last[form] = about | dict(side=form) | why
            rows.append(last[form])
            print(f"  {n:,} pairs, {form}: " + (last[form].get("not_run") or f"{last[form]['peak_mib'][0]:,.0f} MiB, {statistics.median(last[form]['wall']):.2f} s"), flush=True)
        if n in values: assert max(values[n].values()) - min(values[n].values()) < 1e-4 * max(values[n].values()), values[n]
        yield part([{k: v for k, v in r.items() if v != float("inf")} for r in rows], dim=args.dim, micro_batch=MICRO_BATCH, memory_limit_gib=round(args.memory, 1), time_limit_s=args.seconds, loss=values.get(n))


if __name__ == "__main__":
    main(__doc__, dict(loss=loss), ("open-clip-torch",), one=measure, short=dict(sizes=[256], dim=16),
         options=dict(sizes=dict(type=int, nargs="+", default=[2 ** k for k in range(10, 17)], help="pairs, each twice the one before"), dim=dict(type=int, default=512),
                      memory=dict(type=float, help="GiB that no case may be expected to exceed; unless given, four fifths of what is free"), seconds=dict(type=float, default=300, help="seconds that no pass may be expected to exceed")))
