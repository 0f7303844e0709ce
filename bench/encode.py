"""Text and pictures into tokens, tensors and embeddings: ours beside the peers, on the same inputs, in one run, in alternating order.

    python bench/encode.py bench/results/encode.json [--parts tokenizer preprocess towers classify start] [--batches 1 32 256]

  tokenizer   100,000 distinct captions to (n, 77) ids, in one call and one by one: clip_lab, open_clip's SimpleTokenizer (openai/CLIP's, kept alive there), transformers' CLIPTokenizerFast,
              instant-clip-tokenizer (Rust; ids only, without cleaning). Ids are asserted to agree where a peer cleans text as OpenAI does. A second pass over the same captions is timed apart: ours remembers words.
  preprocess  JPEG files of 640 x 480 to (3, 224, 224): clip_lab, transformers' CLIPImageProcessor, and plain Pillow with numpy, the least that can be done. open_clip's transform needs torchvision and is left out.
  towers      encode_image and encode_text of ViT-B/32 and RN50 with one set of random weights: clip_lab, open_clip, transformers (ViT only). Captions as the data has them; the peers pad them to 77.
  classify    files to answer: ten JPEG files, ten classes, eight templates, cold (a new classifier) and warm (the same labels again), against the same steps with open_clip's model and our transform.
  start       a fresh Python: nothing, import torch, and from nothing to the first answer about a picture. What `import clip_lab` adds is in bench/evals.py.

Seconds are of CPU and of the clock; ratios are theirs to ours, the median of the rounds with the lowest and highest. One thread.
"""

import argparse
import importlib
import importlib.metadata
import io
import json
from pathlib import Path
import platform
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image
import torch
import transformers      # before open_clip's files, beside which torchvision is a stub

from evals import open_clip_side, race, ratios
from train_step import open_clip_modules


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
    from clip_lab.tokenizer import vocabulary
    folder = Path(tempfile.mkdtemp())
    entries, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps({e: i for i, e in enumerate(entries)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8")
    return transformers.CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))


def tokenizer(args):
    import instant_clip_tokenizer
    from clip_lab.tokenizer import Tokenizer
    open_clip_modules()
    texts, simple, fast, instant = captions(args.captions), importlib.import_module("open_clip.tokenizer").SimpleTokenizer(), fast_tokenizer(), instant_clip_tokenizer.Tokenizer()
    few = texts[:args.captions // 10]
    ours = Tokenizer()
    def forgotten():
        ours._pieces.clear()
        return ours
    batch = {"clip_lab": lambda: forgotten()(texts, truncate=True), "open_clip (openai/CLIP)": lambda: fresh(simple)(texts), "transformers, fast": lambda: fast(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids,
             "instant-clip-tokenizer": lambda: torch.from_numpy(instant.tokenize_batch(texts, context_length=77).astype(np.int64))}
    print(f"  {len(texts):,} captions in one call")
    found, rows = race(batch, args.rounds)
    same = {side: float((found[side] == found["clip_lab"]).all(1).float().mean()) for side in batch}
    assert same["open_clip (openai/CLIP)"] == 1, same
    against = [dict(what="one call") | r for r in ratios(rows)]
    single = {"clip_lab": lambda: [ours(t, truncate=True) for t in few], "open_clip (openai/CLIP)": lambda: [simple(t) for t in few],
              "transformers, fast": lambda: [fast(t, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids for t in few], "instant-clip-tokenizer": lambda: [torch.from_numpy(instant.tokenize_batch([t], context_length=77).astype(np.int64)) for t in few]}
    print(f"  {len(few):,} of them, one by one, after the first pass")
    _, one = race(single, args.rounds)
    yield dict(rows=[dict(what="one call", n=len(texts)) | r for r in rows] + [dict(what="one by one", n=len(few)) | r for r in one], ratios=against + [dict(what="one by one") | r for r in ratios(one)], facts=dict(captions=len(texts), same_ids=same))


def fresh(simple):
    "open_clip's tokenizer remembers words as ours does; it starts each round without."
    simple.cache = {t: t for t in ("<start_of_text>", "<end_of_text>", "<|startoftext|>", "<|endoftext|>") if t in simple.cache}
    return simple


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
    from clip_lab.images import preprocess as ours
    files, transform = jpegs(args.pictures), ours(224)
    theirs = transformers.CLIPImageProcessor()
    def processed(data): return torch.as_tensor(np.asarray(theirs(images=Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="np")["pixel_values"][0]))
    sides = {"clip_lab": lambda: [transform(f) for f in files], "transformers": lambda: [processed(f) for f in files], "plain Pillow": lambda: [plain(f) for f in files]}
    found, rows = race(sides, args.rounds)
    apart = {side: float(max((a - b).abs().max() for a, b in zip(found["clip_lab"], found[side]))) for side in sides}
    yield dict(rows=rows, ratios=ratios(rows), facts=dict(pictures=len(files), largest_difference=apart, class_of_transformers=type(theirs).__name__))


def transformers_side(clip):
    "transformers' CLIPModel with our weights."
    from clip_lab.layouts import from_openai
    c = clip.config
    config = transformers.CLIPConfig(projection_dim=c.embed_dim, text_config=dict(hidden_size=c.text_width, intermediate_size=4 * c.text_width, num_hidden_layers=c.text_layers, num_attention_heads=c.text_heads, vocab_size=c.vocab_size, eos_token_id=c.vocab_size - 1),
                        vision_config=dict(hidden_size=c.vision_width, intermediate_size=4 * c.vision_width, num_hidden_layers=c.vision_layers, num_attention_heads=c.vision_width // 64, image_size=c.image_resolution, patch_size=c.vision_patch_size))
    model = transformers.CLIPModel(config).eval()
    model.load_state_dict(from_openai(clip.state_dict(), "hf"), strict=False)
    return model


def features(out): return getattr(out, "pooler_output", out) if not isinstance(out, torch.Tensor) else out


def towers(args):
    from clip_lab.embed import embed_texts
    from clip_lab.model import build
    texts, rows, against, facts = captions(max(args.batches)), [], [], dict(largest_difference={})
    for name in ("ViT-B/32", "RN50"):
        clip = build(name, seed=0)
        peers = {"open_clip": open_clip_side(clip)[0]} if name == "ViT-B/32" else {"open_clip": open_clip_resnet(clip)}
        if name == "RN50": clip.visual.to(memory_format=torch.channels_last)      # what training does; `load` leaves the order of the file
        if name == "ViT-B/32": peers["transformers"] = transformers_side(clip)
        for size in args.batches:
            if size > args.largest: continue
            pictures, tokens = torch.randn(size, 3, 224, 224, generator=torch.Generator().manual_seed(0)), clip.tokenize(texts[:size])
            padded = torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))
            def image(model): return features(model.get_image_features(pixel_values=pictures)) if hasattr(model, "get_image_features") else model.encode_image(pictures)
            def text(model): return features(model.get_text_features(input_ids=padded)) if hasattr(model, "get_text_features") else model.encode_text(padded)
            for what, sides in (("image", {"clip_lab": lambda: clip.encode_image(pictures)} | {k: lambda m=m: image(m) for k, m in peers.items()}),
                                ("text", {"clip_lab": lambda: clip.encode_text(tokens)} | {k: lambda m=m: text(m) for k, m in peers.items()})):
                print(f"  {name}, {what}, batch {size}")
                with torch.inference_mode():
                    for run in sides.values(): run()
                    found, taken = race(sides, args.rounds)
                facts["largest_difference"][f"{name} {what} {size}"] = {k: float((found[k] - found["clip_lab"]).abs().max()) for k in peers}
                rows += [dict(model=name, what=what, batch=size) | r for r in taken]
                against += [dict(model=name, what=what, batch=size) | r for r in ratios(taken)]
                yield dict(rows=rows, ratios=against, facts=facts)


def open_clip_resnet(clip):
    model_py, _ = open_clip_modules()
    c = clip.config
    model = model_py.CLIP(c.embed_dim, dict(image_size=c.image_resolution, width=c.vision_width, layers=c.vision_layers), dict(context_length=c.context_length, vocab_size=c.vocab_size, width=c.text_width, heads=c.text_heads, layers=c.text_layers), quick_gelu=True).eval()
    model.load_state_dict(clip.state_dict())
    return model


def classify(args):
    from clip_lab.evals.prompts import TEMPLATES
    from clip_lab.evals.zeroshot import TextWeights, classify as ours
    from clip_lab.images import preprocess as transform_of
    from clip_lab.model import build
    clip = build("ViT-B/32", seed=0)
    model, tokenize, builder, *_ = open_clip_side(clip)
    files, transform, names, templates = jpegs(10), transform_of(224), ["cat", "dog", "tree", "house", "bicycle", "guitar", "pizza", "rocket", "penguin", "castle"], list(TEMPLATES["imagenet7"]) + ["a picture of {}."]
    pictures = [Image.open(io.BytesIO(f)) for f in files]
    rows, against = [], []
    def theirs(weights=None):
        weights = builder(model, tokenize, names, [lambda c, t=t: t.format(c) for t in templates]) if weights is None else weights
        return model.encode_image(torch.stack([transform(f) for f in files]), normalize=True) @ weights
    kept = builder(model, tokenize, names, [lambda c, t=t: t.format(c) for t in templates])
    texts = TextWeights(clip)
    texts(names, templates)
    from clip_lab.embed import embed_images
    def warm(): return embed_images(clip, transform, files, progress=False).features @ texts(names, templates).T
    for what, sides in (("cold", {"clip_lab": lambda: embed_images(clip, transform, files, progress=False).features @ TextWeights(clip)(names, templates).T, "open_clip": theirs}), ("warm", {"clip_lab": warm, "open_clip": lambda: theirs(kept)})):
        print(f"  {what}")
        with torch.inference_mode(): found, taken = race(sides, args.rounds)
        assert (found["clip_lab"] - found["open_clip"]).abs().max() < 1e-4
        rows += [dict(what=what) | r for r in taken]
        against += [dict(what=what) | r for r in ratios(taken)]
    yield dict(rows=rows, ratios=against, facts=dict(pictures=len(files), classes=len(names), templates=len(templates)))


START = {"python": "pass", "torch": "import torch", "first answer": "import clip_lab\nfrom clip_lab.data import emoji\nfrom clip_lab.evals.zeroshot import classify\nmodel, preprocess = clip_lab.load()\n"
         "classify(model, preprocess, [emoji.load('twemoji').pictures[0]], ['a cat', 'a face'])"}


def start(args):
    taken = {what: [] for what in START}
    for turn in range(args.rounds + 1):
        for what in list(START)[::-1 if turn % 2 else 1]:
            code = f"import time, resource\n{START[what]}\nu = resource.getrusage(resource.RUSAGE_SELF); print('took', u.ru_utime + u.ru_stime)"
            seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])
            if turn: taken[what].append(seconds)      # the first turn fills the page cache
    medians = {what: statistics.median(t) for what, t in taken.items()}
    print("  " + ", ".join(f"{what}: {s:.2f} s CPU" for what, s in medians.items()))
    yield dict(rows=[dict(what=what, cpu=t) for what, t in taken.items()], ratios=[], facts=dict(medians=medians))


PARTS = dict(tokenizer=tokenizer, preprocess=preprocess, towers=towers, classify=classify, start=start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--largest", type=int, default=32, help="largest batch of pictures and captions; 256 takes minutes a round on a processor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: importlib.metadata.version(name) for name in ("open-clip-torch", "transformers", "instant-clip-tokenizer", "pillow")}
    about = dict(device=platform.processor() or platform.machine(), torch=torch.__version__, threads=1, dtype="float32") | versions
    output = Path(args.output)
    kept = json.loads(output.read_text()) if output.exists() else {}
    parts = kept["parts"] if kept.get("about") == about else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        print(name, flush=True)
        for parts[name] in PARTS[name](args): output.write_text(json.dumps(dict(about=about, parts={p: parts[p] for p in PARTS if p in parts}), indent=1) + "\n")


if __name__ == "__main__": main()
