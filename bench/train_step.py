"""Speed and peak memory of one training step, ours against open_clip's: same model, same batch, same precision, same optimiser, in one run.

    python bench/train_step.py bench/results/train_step.json
    python bench/train_step.py out.json --cases "ViT-B/32:32:fp32" --rounds 3

A step is: both towers forward, the contrastive loss, backward, AdamW, the clamp of the temperature. Pictures and captions (of the shipped drawings, resized) are ready
before the clock starts. open_clip's side is its model.py and loss.py as installed (pip install --no-deps open-clip-torch) with the lines of its train_one_epoch; its texts
are padded to the context length, as its tokenizer makes them. Ours is `Towers` and `contrastive_loss` of clip_lab.train.

Each round starts a fresh process for each side, in alternating order; a process does a few steps to warm up, then times each of the following. Reported: the median step over
all rounds with the range of the rounds' medians, pairs per second, CPU seconds (which a busy machine disturbs less), and peak memory above what the process held before the model was built:
resident memory on a processor, torch.cuda.max_memory_allocated on CUDA. Ratios are ours to theirs, from this one run.
"""
import argparse
import importlib
import importlib.util
import json
from pathlib import Path
import platform
import resource
import statistics
import subprocess
import sys
import time
import types

import torch

SIDES = ("clip_lab", "open_clip")
CPU_CASES = ("emoji:256:fp32", "emoji:256:bf16", "ViT-B/32:32:fp32", "ViT-B/32:32:bf16")
CUDA_CASES = ("ViT-B/32:1024:bf16", "RN50:256:bf16")


def open_clip_modules():
    "model.py and loss.py of open_clip, without torchvision, which they import for one class that a step never uses."
    if "open_clip.loss" in sys.modules: return sys.modules["open_clip.model"], sys.modules["open_clip.loss"]
    spec = importlib.util.find_spec("open_clip")
    if spec is None: raise SystemExit("open_clip is not installed (pip install --no-deps open-clip-torch)")
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    stubs = {"open_clip": package, "open_clip.hf_model": types.ModuleType("open_clip.hf_model")} | {n: types.ModuleType(n) for n in ("torchvision", "torchvision.ops", "torchvision.ops.misc")}
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d, stubs["open_clip.hf_model"].HFTextEncoder = torch.nn.BatchNorm2d, object
    sys.modules.update(stubs)
    return importlib.import_module("open_clip.model"), importlib.import_module("open_clip.loss")


def batch_of(config, n: int):
    "Shipped drawings at the model's size and their captions as padded token ids."
    from clip_lab.data import emoji
    from clip_lab.images import preprocess
    from clip_lab.tokenizer import Tokenizer
    data, transform = emoji.load("noto"), preprocess(config.image_resolution)
    images = torch.stack([transform(data.pictures[i]) for i in range(n)])
    tokenize = Tokenizer(n_merges=config.vocab_size - 514, context_length=config.context_length)
    return images, tokenize([f"a photo of a {name}." for name in data.table.name[:n]], truncate=True)


def stepper(side: str, name: str, device: str, amp):
    from clip_lab.model import CONFIGS, build
    config = CONFIGS[name]
    settings = dict(lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    if side == "clip_lab":
        from clip_lab.train.setup import Towers
        from clip_lab.train.objectives import contrastive_loss
        from clip_lab.train.optim import clamp_logit_scale, parameter_groups
        clip = build(name, device=device, seed=0).train()
        clip.visual.to(memory_format=torch.channels_last)
        towers, optimizer = Towers(clip), torch.optim.AdamW(parameter_groups(clip, 0.2), **settings)
        def step(images, tokens):
            with amp(): image, text, scale = towers(images, tokens)
            contrastive_loss(image.float(), text.float(), scale).backward()
            optimizer.step(); optimizer.zero_grad(set_to_none=True)
            clamp_logit_scale(clip)
        return step
    model_py, loss_py = open_clip_modules()
    vision = dict(image_size=config.image_resolution, width=config.vision_width, patch_size=config.vision_patch_size,
                  layers=config.vision_layers if config.is_vit else list(config.vision_layers))
    text = dict(context_length=config.context_length, vocab_size=config.vocab_size, width=config.text_width, heads=config.text_heads, layers=config.text_layers)
    model, loss = model_py.CLIP(config.embed_dim, vision, text, quick_gelu=config.activation == "quickgelu").to(device).train(), loss_py.ClipLoss()
    gains = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([dict(params=gains, weight_decay=0.0), dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=0.2)], **settings)
    def step(images, tokens):
        optimizer.zero_grad()
        with amp(): image, text, scale = model(images, tokens)[:3]; total = loss(image, text, scale)
        total.backward()
        optimizer.step()
        with torch.no_grad(): model.logit_scale.clamp_(0, 4.6052)
    return step


def one(side: str, case: str, steps: int, device: str) -> dict:
    name, n, precision = case.split(":")
    amp = lambda: torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")
    from clip_lab.model import CONFIGS
    images, tokens = (x.to(device) for x in batch_of(CONFIGS[name], int(n)))
    if side == "clip_lab": images = images.contiguous(memory_format=torch.channels_last)
    cuda = device.startswith("cuda")
    before = torch.cuda.memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step, walls, cpus = stepper(side, name, device, amp), [], []
    for i in range(3 + steps):
        wall, cpu = time.perf_counter(), time.process_time()
        step(images, tokens)
        if cuda: torch.cuda.synchronize()
        if i >= 3: walls.append(time.perf_counter() - wall); cpus.append(time.process_time() - cpu)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(seconds=statistics.median(walls), cpu_seconds=statistics.median(cpus), peak=peak - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="JSON file for the results; - for none")
    parser.add_argument("--cases", nargs="+", help="model:batch:precision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.one: print(json.dumps(one(*a.one, a.steps, a.device))); return
    cases, rows = a.cases or (CUDA_CASES if a.device.startswith("cuda") else CPU_CASES), []
    for case in cases:
        found = {side: [] for side in SIDES}
        for k in range(a.rounds):
            for side in SIDES[::-1] if k % 2 else SIDES:
                done = subprocess.run([sys.executable, __file__, "-", "--one", side, case, "--steps", str(a.steps), "--device", a.device, "--threads", str(a.threads)], capture_output=True, text=True)
                if done.returncode: raise SystemExit(f"{side} {case}: {done.stderr[-1500:]}")
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
        n = int(case.split(":")[1])
        for side, runs in found.items():
            seconds = [r["seconds"] for r in runs]
            rows.append(dict(case=case, side=side, pairs_per_s=n / statistics.median(seconds), seconds=statistics.median(seconds), fastest=min(seconds), slowest=max(seconds),
                             cpu_seconds=statistics.median(r["cpu_seconds"] for r in runs), peak_gib=statistics.median(r["peak"] for r in runs) / 2 ** 30))
        ours, theirs = rows[-2:]
        print(f"{case:20} ours {ours['pairs_per_s']:8.1f} pairs/s {ours['peak_gib']:6.2f} GiB   open_clip {theirs['pairs_per_s']:8.1f} pairs/s {theirs['peak_gib']:6.2f} GiB   "
              f"speed x{theirs['seconds'] / ours['seconds']:.2f} (CPU time x{theirs['cpu_seconds'] / ours['cpu_seconds']:.2f}), memory x{ours['peak_gib'] / theirs['peak_gib']:.2f}", flush=True)
    if a.output != "-":
        Path(a.output).parent.mkdir(parents=True, exist_ok=True)
        about = dict(torch=torch.__version__, device=torch.cuda.get_device_name() if a.device.startswith("cuda") else platform.processor() or platform.machine(),
                     threads=a.threads, rounds=a.rounds, steps=a.steps)
        Path(a.output).write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n")


if __name__ == "__main__": main()
