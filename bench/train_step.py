"""Speed and peak memory of one training step, ours against open_clip's: same model, same batch, same precision, same optimiser, in one run.

    python bench/train_step.py bench/results/train_step.json
    python bench/train_step.py out.json --cases "ViT-B/32:32:fp32" --rounds 3

A step is: both towers forward, the contrastive loss, backward, AdamW, the clamp of the temperature. Pictures and captions (of the shipped drawings, resized) are ready before the clock starts. open_clip's side is its
model.py and loss.py as installed with the lines of its train_one_epoch; its texts are padded to the context length, as its tokenizer makes them. Ours is `Towers` and `contrastive_loss` of clip_lab.train.

Each round starts a fresh process for each side, in alternating order; a process does one step to warm up, then times each of the following and answers with the median. Peak memory is that above what the process held
before the model was built: resident memory on a processor, torch.cuda.max_memory_allocated on CUDA.
"""
import statistics

import torch

from common import child, clocked, main, mark_anew, model_of, open_clip_model, open_clip_modules, part, peak_since, row

SIDES = ("clip_lab", "open_clip")
CASES = {"cpu": ("emoji:32:fp32", "emoji:128:fp32", "emoji:256:fp32", "emoji:256:bf16", "ViT-B/32:32:fp32", "ViT-B/32:32:bf16"), "cuda": ("ViT-B/32:256:bf16", "ViT-B/32:1024:bf16", "RN50:256:bf16")}


def batch_of(config, n: int):
    "Shipped drawings at the model's size and their captions as padded token ids."
    from clip_lab.data import emoji
    from clip_lab.images import preprocess
    from clip_lab.tokenizer import Tokenizer
    data, transform = emoji.load("noto"), preprocess(config.image_resolution)
    images = torch.stack([transform(data.pictures[i]) for i in range(n)])
    tokenize = Tokenizer(n_merges=config.vocab_size - 514, context_length=config.context_length)
    return images, tokenize([f"a photo of a {name}." for name in data.table.name[:n]], truncate=True)


def stepper(side: str, clip, device: str, amp):
    settings = dict(lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    if side == "clip_lab":
        from clip_lab.train.setup import Towers
        from clip_lab.train.objectives import contrastive_loss
        from clip_lab.train.optim import clamp_logit_scale, parameter_groups
        clip.train().visual.to(memory_format=torch.channels_last)
        towers, optimizer = Towers(clip), torch.optim.AdamW(parameter_groups(clip, 0.2), **settings)
        def step(images, tokens):
            with amp(): image, text, scale = towers(images, tokens)
            total = contrastive_loss(image.float(), text.float(), scale)
            total.backward()
            optimizer.step(); optimizer.zero_grad(set_to_none=True)
            clamp_logit_scale(clip)
            return float(total.detach())
        return step
    model, loss = clip.train(), open_clip_modules()[1].ClipLoss()
    gains = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([dict(params=gains, weight_decay=0.0), dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=0.2)], **settings)
    def step(images, tokens):
        optimizer.zero_grad()
        with amp(): image, text, scale = model(images, tokens)[:3]; total = loss(image, text, scale)
        total.backward()
        optimizer.step()
        with torch.no_grad(): model.logit_scale.clamp_(0, 4.6052)
        return float(total.detach())
    return step


def once(asked: list[str], args) -> dict:
    "One process: the median of its steps, its peak memory, and the loss of the first step."
    side, (name, n, precision) = asked[0], asked[1].split(":")
    amp = lambda: torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")
    weights = model_of(name, args.short)
    config, weights = weights.config, weights.state_dict()
    images, tokens = (x.to(args.device) for x in batch_of(config, int(n)))
    if side == "clip_lab": images = images.contiguous(memory_format=torch.channels_last)
    before = mark_anew(args.device)
    model = model_of(name, args.short, args.device) if side == "clip_lab" else open_clip_model(config, args.device)
    model.load_state_dict(weights)
    step, taken = stepper(side, model, args.device, amp), []
    first = step(images, tokens)
    for i in range(args.steps): taken.append(clocked(lambda: step(images, tokens), args.device)[1])
    return {key: statistics.median(t[key] for t in taken) for key in ("cpu", "wall")} | dict(peak_mib=peak_since(before, args.device), loss=first)


def steps(args):
    rows, losses = [], {}
    open_clip_modules()                                              # is it there?
    for case in args.cases or CASES[args.device.split(":")[0]]:
        found, (name, n, precision) = {side: [] for side in SIDES}, case.split(":")
        for turn in range(args.rounds):
            for side in SIDES[::-1 if turn % 2 else 1]: found[side].append(child(__file__, [side, case], args, "--steps", args.steps))
        losses[case] = {side: each[0].pop("loss") for side, each in found.items()}
        ours, theirs = losses[case].values()
        assert abs(ours - theirs) < (1e-3 if precision == "fp32" else 5e-2) * theirs, losses       # the same weights, pictures and captions
        rows += [row(side, each, what=f"{name}, {precision}", size=int(n)) for side, each in found.items()]
        yield part(rows, steps=args.steps, loss=losses)


if __name__ == "__main__":
    main(__doc__, dict(steps=steps), ("open-clip-torch",), one=once, short=dict(cases=["emoji:4:fp32"], steps=1),
         options=dict(cases=dict(nargs="+", help="model:batch:precision"), steps=dict(type=int, default=3, help="timed steps a process")))
