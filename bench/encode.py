"""Text and pictures into tokens, tensors and embeddings: ours beside the peers, on the same inputs, in one run, in alternating order.

    python bench/encode.py bench/results/encode.json [--parts tokenizer preprocess towers classify start] [--batches 1 8 32 256]

  tokenizer   distinct captions to (n, 77) ids, in one call and one by one: clip_lab, open_clip's SimpleTokenizer (openai/CLIP's, kept alive there), transformers' CLIPTokenizerFast,
              instant-clip-tokenizer (Rust; ids only, without cleaning). Ids are asserted to agree where a peer cleans text as OpenAI does. Each call begins without memory of earlier ones.
  preprocess  JPEG files of 640 x 480 to (3, 224, 224): clip_lab, transformers' CLIPImageProcessor, and plain Pillow with numpy, the least that can be done. open_clip's transform needs torchvision and is left out.
  towers      encode_image and encode_text of ViT-B/32 and RN50 with one set of random weights: clip_lab, open_clip, transformers (ViT only). Captions as the data has them; the peers pad them to 77. Batches of 256: one round.
  classify    files to answer: ten JPEG files, ten classes, eight templates, cold (a new classifier) and warm (the same labels again), against the same steps with open_clip's model and our transform.
  start       a fresh Python: nothing, import torch, and from nothing to the first answer about a picture; then the apps, from the start of their process to the first answer of their endpoint, with their files in the
              page cache and without. What `import clip_lab` adds is in bench/evals.py.
"""
import asyncio
import importlib
import io
import json
import os
from pathlib import Path
import sys
import tempfile
import time

import numpy as np
from PIL import Image
import torch

from common import ROOT, clocked, main, model_of, open_clip_model, open_clip_modules, part, race, row


def captions(n: int) -> list[str]:
    "So many distinct captions: names of shipped drawings in sentences."
    from clip_lab.data import emoji
    names = list(dict.fromkeys(emoji.concepts()["name"]))
    frames = ("a photo of {}.", "{} on a white background", "a drawing of {} and {}", "{} next to {}, seen from above", "the {} that everybody knows")
    rng, found = np.random.default_rng(0), {}
    while len(found) < n:
        frame = frames[rng.integers(len(frames))]
        found[frame.format(*(names[i] for i in rng.integers(len(names), size=frame.count("{}"))))] = None
    return list(found)


def fast_tokenizer():
    "transformers' tokenizer with OpenAI's vocabulary, from ours."
    import transformers
    from clip_lab.tokenizer import vocabulary
    folder = Path(tempfile.mkdtemp())
    entries, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps({e: i for i, e in enumerate(entries)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8")
    return transformers.CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))


def fresh(simple):
    "open_clip's tokenizer remembers words as ours does; it starts each round without."
    simple.cache = {t: t for t in ("<start_of_text>", "<end_of_text>", "<|startoftext|>", "<|endoftext|>") if t in simple.cache}
    return simple


def tokenizer(args):
    fast = fast_tokenizer()             # transformers before open_clip's files, beside which torchvision is a stub
    import instant_clip_tokenizer
    from clip_lab.tokenizer import Tokenizer
    open_clip_modules()
    simple, instant, ours = importlib.import_module("open_clip.tokenizer").SimpleTokenizer(), instant_clip_tokenizer.Tokenizer(), Tokenizer()
    def rust(texts): return torch.from_numpy(instant.tokenize_batch(texts, context_length=77).astype(np.int64))
    def padded(texts): return fast(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    rows, texts = [], captions(max(args.captions))
    for n in sorted(args.captions):
        some, unused = texts[:n], [Tokenizer() for _ in range(args.rounds)]          # each remembers nothing yet
        found, taken = race({"clip_lab": lambda: unused.pop()(some, truncate=True), "open_clip (openai/CLIP)": lambda: fresh(simple)(some), "transformers, fast": lambda: padded(some), "instant-clip-tokenizer": lambda: rust(some)}, args.rounds, what="one call", size=n)
        rows += taken
    same = {side: float((ids == found["clip_lab"]).all(1).float().mean()) for side, ids in found.items()}
    assert same["open_clip (openai/CLIP)"] == 1, same
    few = texts[:max(args.captions) // 10]
    rows += race({"clip_lab": lambda: [ours(t, truncate=True) for t in few], "open_clip (openai/CLIP)": lambda: [simple(t) for t in few], "transformers, fast": lambda: [padded(t) for t in few],
                  "instant-clip-tokenizer": lambda: [rust([t]) for t in few]}, args.rounds, what="one by one", size=len(few))[1]
    yield part(rows, captions=len(texts), same_ids=same)


def jpegs(n: int) -> list[bytes]:
    "Pictures of 640 x 480 as JPEG: pieces of the shipped drawings on mottled ground."
    from clip_lab.data import emoji
    data, rng, found = emoji.load("noto"), np.random.default_rng(0), []
    for i in range(n):
        ground = Image.fromarray(rng.integers(90, 166, (60, 80, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        for j in range(6): ground.paste(data.pictures[int(rng.integers(len(data)))].resize((160, 160)), (int(rng.integers(480)), int(rng.integers(320))))
        ground.save(file := io.BytesIO(), "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def plain(data: bytes) -> torch.Tensor:
    "The least that gives CLIP's tensor: Pillow, numpy, one division."
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    side = 224 / min(picture.size)
    picture = picture.resize((round(picture.width * side), round(picture.height * side)), Image.Resampling.BICUBIC)
    left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
    x = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32).transpose(2, 0, 1) / 255
    return torch.from_numpy((x - np.float32([0.48145466, 0.4578275, 0.40821073])[:, None, None]) / np.float32([0.26862954, 0.26130258, 0.27577711])[:, None, None])


def preprocess(args):
    import transformers
    from clip_lab.images import preprocess as ours
    files, transform = jpegs(args.pictures), ours(224)
    theirs = transformers.CLIPImageProcessor()
    def processed(data): return torch.as_tensor(np.asarray(theirs(images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="np")["pixel_values"][0]))
    found, rows = race({"clip_lab": lambda: [transform(f) for f in files], "transformers": lambda: [processed(f) for f in files], "plain Pillow": lambda: [plain(f) for f in files]}, args.rounds, what="JPEG to tensor", size=len(files))
    apart = {side: float(max((a - b).abs().max() for a, b in zip(found["clip_lab"], found[side]))) for side in found}
    assert apart["transformers"] < 1e-4, apart
    yield part(rows, pictures=len(files), largest_difference=apart, class_of_transformers=type(theirs).__name__)


def transformers_side(clip):
    "transformers' CLIPModel with our weights."
    import transformers
    from clip_lab.layouts import from_openai
    c = clip.config
    config = transformers.CLIPConfig(projection_dim=c.embed_dim, text_config=dict(hidden_size=c.text_width, intermediate_size=4 * c.text_width, num_hidden_layers=c.text_layers, num_attention_heads=c.text_heads, vocab_size=c.vocab_size, eos_token_id=c.vocab_size - 1),
                        vision_config=dict(hidden_size=c.vision_width, intermediate_size=4 * c.vision_width, num_hidden_layers=c.vision_layers, num_attention_heads=c.vision_width // 64, image_size=c.image_resolution, patch_size=c.vision_patch_size))
    model = transformers.CLIPModel(config).eval()
    model.load_state_dict(from_openai(clip.state_dict(), "hf"), strict=False)
    return model.to(clip.device)


def open_clip_side(clip):
    "open_clip's model with our weights."
    model = open_clip_model(clip.config, clip.device).eval()
    model.load_state_dict(clip.state_dict())
    return model


def features(out): return getattr(out, "pooler_output", out) if not isinstance(out, torch.Tensor) else out


def towers(args):
    texts, rows, apart = captions(max(args.batches)), [], {}
    for name in ("ViT-B/32", "RN50"):
        clip = model_of(name, args.short, args.device)
        peers = ({"transformers": transformers_side(clip)} if clip.config.is_vit else {})
        peers["open_clip"] = open_clip_side(clip)
        if name == "RN50": clip.visual.to(memory_format=torch.channels_last)      # what training does; `load` leaves the order of the file
        for size in args.batches:
            pictures, tokens = torch.randn(size, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(args.device), clip.tokenize(texts[:size])
            padded = torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))
            def image(model): return features(model.get_image_features(pixel_values=pictures)) if hasattr(model, "get_image_features") else model.encode_image(pictures)
            def text(model): return features(model.get_text_features(input_ids=padded)) if hasattr(model, "get_text_features") else model.encode_text(padded)
            for what, sides in (("image", {"clip_lab": lambda: clip.encode_image(pictures)} | {k: lambda m=m: image(m) for k, m in peers.items()}),
                                ("text", {"clip_lab": lambda: clip.encode_text(tokens)} | {k: lambda m=m: text(m) for k, m in peers.items()})):
                if what == "text" and name != "ViT-B/32": continue                # RN50's text tower has the same shape
                with torch.inference_mode():
                    if size < 256:
                        for run in sides.values(): run()
                    found, taken = race(sides, args.rounds if size < 256 else 1, args.device, what=f"{name} {what}", size=size)
                apart[f"{name} {what}, {size}"] = {k: float((found[k] - found["clip_lab"]).abs().max()) for k in peers}
                assert max(apart[f"{name} {what}, {size}"].values()) < 1e-3, apart
                rows += taken
    yield part(rows, largest_difference=apart)


def classify(args):
    from clip_lab.embed import embed_images
    from clip_lab.evals.prompts import TEMPLATES
    from clip_lab.evals.zeroshot import TextWeights
    from clip_lab.images import preprocess as transform_of
    clip = model_of("ViT-B/32", args.short)
    model = open_clip_side(clip)
    tokenize, builder = importlib.import_module("open_clip.tokenizer").SimpleTokenizer(), importlib.import_module("open_clip.zero_shot_classifier").build_zero_shot_classifier
    files, transform, templates = jpegs(2 if args.short else 10), transform_of(224), list(TEMPLATES["imagenet7"]) + ["a picture of {}."]
    names = ["cat", "dog", "tree", "house", "bicycle", "guitar", "pizza", "rocket", "penguin", "castle"]
    def built(): return builder(model, tokenize, names, [lambda c, t=t: t.format(c) for t in templates])
    def theirs(weights): return model.encode_image(torch.stack([transform(f) for f in files]), normalize=True) @ weights
    def ours(texts): return embed_images(clip, transform, files, progress=False).features @ texts(names, templates).T
    kept, texts, rows = built(), TextWeights(clip), []
    texts(names, templates)
    for what, sides in (("cold", {"clip_lab": lambda: ours(TextWeights(clip)), "open_clip": lambda: theirs(built())}), ("warm", {"clip_lab": lambda: ours(texts), "open_clip": lambda: theirs(kept)})):
        with torch.inference_mode(): found, taken = race(sides, args.rounds, what=what, size=len(files))
        assert (found["clip_lab"] - found["open_clip"]).abs().max() < 1e-4
        rows += taken
    yield part(rows, pictures=len(files), classes=len(names), templates=len(templates))


START = {"python": "", "import torch": "import torch", "first answer": "import clip_lab; from clip_lab.data import emoji; from clip_lab.evals.zeroshot import classify; model, preprocess = clip_lab.load(); "
         "classify(model, preprocess, [emoji.load('twemoji').pictures[0]], ['a cat', 'a face'])"}


def forget() -> bool:
    "Ask the system to drop the files of this Python and of this project from its page cache; False where it cannot be asked."
    if not hasattr(os, "posix_fadvise"): return False
    for folder in {Path(sys.prefix), Path(sys.base_prefix) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}", ROOT / "clip_lab", ROOT / "apps"}:
        for file in folder.rglob("*"):
            if not file.is_file() or file.is_symlink(): continue
            try:
                with open(file, "rb") as f: os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError: pass
    return True


def first_answer(app: str) -> dict:
    "Seconds from the start of an app's process to its first answer; CPU seconds are the process's own."
    import app_load
    import psutil
    began = time.perf_counter()
    process, url = app_load.start(ROOT / "apps" / f"{app}.py")
    try:
        app_load.first(app, url)
        wall, used = time.perf_counter() - began, psutil.Process(process.pid).cpu_times()
        return dict(cpu=used.user + used.system, wall=wall)
    finally: app_load.stop(process)


def start(args):
    taken = {what: [] for what in START}
    for turn in range(args.rounds):
        for what in list(START)[::-1 if turn % 2 else 1]:
            before = os.times()
            wall = clocked(lambda: os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", START[what] or "pass"]))[1]["wall"]
            after = os.times()
            taken[what].append(dict(cpu=after.children_user + after.children_system - before.children_user - before.children_system, wall=wall))
    rows = [row("clip_lab" if what == "first answer" else "without clip_lab", each, what=what) for what, each in taken.items()]
    yield part(rows, apps=[])
    for app in args.apps:
        if not args.short: first_answer(app)                              # fills the page cache
        rows.append(row("clip_lab", [first_answer(app) for _ in range(args.rounds)], what=f"{app} app, warm"))
        if not args.short and forget(): rows.append(row("clip_lab", [first_answer(app) for _ in range(args.rounds) if forget()], what=f"{app} app, cold"))
        for r in rows[len(START):][-2:]: print(f"  {r['what']}: {', '.join(f'{s:.1f}' for s in r['wall'])} s")
        yield part(rows, apps=args.apps)


if __name__ == "__main__":
    main(__doc__, dict(tokenizer=tokenizer, preprocess=preprocess, towers=towers, classify=classify, start=start), ("open-clip-torch", "transformers", "instant-clip-tokenizer", "pillow", "gradio"),
         options=dict(captions=dict(type=int, nargs="+", default=[1000, 10_000, 100_000]), pictures=dict(type=int, default=100), batches=dict(type=int, nargs="+", default=[1, 8, 32, 256]), apps=dict(nargs="*", default=["zeroshot", "bias", "human"])),
         short=dict(captions=[50, 200], pictures=3, batches=[1, 2], apps=["zeroshot"]))
