"""Speed of the evaluations beside the peers' code, both sides in one run on one machine, and whether both sides give the same numbers.

    python bench/evals.py bench/results/evals.json                                  # about half an hour on one thread
    python bench/evals.py out.json --parts classifier --classes 10 --rounds 1
    python bench/evals.py out.json --parts classifier --full                        # all of ImageNet's classes as well: hours on one thread

Parts:
  imports     seconds that importing clip_lab adds to importing torch, in fresh processes
  probe       the sweep over lambda of clip_lab.evals.probe, by scikit-learn and by torch on the processor, against a plain loop of scikit-learn's LogisticRegression
              over the lambdas it visited, and over the whole grid. clip_benchmark's probe wants a CUDA device; the run says so
  recall      clip_lab.evals.retrieval.evaluate_features against clip_benchmark's zeroshot_retrieval.evaluate (a model that hands features through, in batches of 64)
  search      an exact top-10 search in a million rows against faiss.IndexFlatIP, in a fresh process for each side, with the memory each needs
  classifier  clip_lab.evals.zeroshot.classifier against open_clip's build_zero_shot_classifier: ViT-B/32 with one set of random weights, names and templates of
              ImageNet from open_clip, its own tokenizer, 10 classes a batch (its default); on the smallest subset also 1 class a batch, which suits a small cache better.
              On random subsets of the classes, because all 1000 take open_clip hours; two sizes show whether the ratio depends on the size

In every round the sides run one after the other, in alternating order. A ratio is theirs to ours within a round: above 1, ours is faster; reported are the median round
and the range. CPU time is the measure to look at first, because a busy machine disturbs it less; wall time stands beside it. Where two sides should give the same
numbers, a difference beyond the tolerance stops the run. Parts that are not asked for stay in the output file if they were measured under the same conditions.
"""
import argparse
import importlib
import importlib.metadata
import json
from pathlib import Path
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import torch
import torch.nn.functional as F

from loss_memory import memory
from train_step import open_clip_modules

PIECE, WIDTH, K = 50_000, 512, 10      # rows made at a time; numbers in a feature; answers of a search


def clocked(run):
    "What `run` returns, and its wall and CPU seconds."
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return found, dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def race(sides: dict, rounds: int):
    "What each side returned last, and a row for each side with its seconds in every round."
    found, taken = {}, {side: [] for side in sides}
    for turn in range(rounds):
        for side in list(sides)[::-1 if turn % 2 else 1]:
            found[side], seconds = clocked(sides[side])
            taken[side].append(seconds)
            print(f"  {side}: {seconds['cpu']:.2f} s CPU, {seconds['wall']:.2f} s", flush=True)
    return found, [dict(side=side) | {key: [s[key] for s in seconds] for key in seconds[0]} for side, seconds in taken.items()]


def ratios(rows: list[dict], keys=("cpu", "wall")) -> list[dict]:
    "The first row against each of the others, round by round: median, lowest and highest."
    found = []
    for row in rows[1:]:
        each = {key: [theirs / ours for ours, theirs in zip(rows[0][key], row[key], strict=True)] for key in keys}
        found.append(dict(ours=rows[0]["side"], theirs=row["side"], rounds=len(each[keys[0]])) | {key: [statistics.median(r), min(r), max(r)] for key, r in each.items()})
        print(f"  {row['side']} / {rows[0]['side']}: " + ", ".join(f"{key} x{mid:.2f} ({low:.2f} to {high:.2f})" for key, (mid, low, high) in ((k, found[-1][k]) for k in keys)), flush=True)
    return found


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def imports(args):
    code = """
        import time
        clock = [(time.perf_counter(), time.process_time())]
        def lap(): clock.append((time.perf_counter(), time.process_time()))
        import torch; lap()
        import clip_lab; lap()
        clip_lab.load; lap()
        import clip_lab.evals.zeroshot; lap()
        print([b[i] - a[i] for i in (0, 1) for a, b in zip(clock, clock[1:])])"""
    each = [json.loads(subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout) for _ in range(7)]
    columns, names = list(zip(*each)), ("import torch", "then import clip_lab", "then the first use of load", "then import clip_lab.evals.zeroshot")
    rows = [dict(side=name, wall=columns[i], cpu=columns[i + len(names)]) for i, name in enumerate(names)]
    for row in rows: print(f"  {row['side']}: {statistics.median(row['cpu']):.3f} s CPU, {statistics.median(row['wall']):.3f} s")
    yield dict(rows=rows, ratios=[], facts=dict(processes=len(each)))


def probe(args):
    from clip_lab.evals.probe import LAMBDAS, fit, objective, sweep
    from clip_benchmark.metrics import linear_probe as theirs
    from sklearn.linear_model import LogisticRegression
    rng, classes = np.random.default_rng(0), 20
    names, scales = [f"class {i}" for i in range(classes)], np.logspace(0, -1, WIDTH)      # a spectrum that falls, as that of real features does
    centers = 0.25 * rng.normal(size=(classes, WIDTH))
    def draw(n):
        y = np.arange(n) % classes
        return (centers[y] + rng.normal(size=(n, WIDTH))) * scales, y
    (x, y), (xv, yv) = train, validation = draw(2000), draw(500)
    def loop(lambdas): return [int((LogisticRegression(C=1 / lam, max_iter=1000).fit(x, y).predict(xv) == yv).sum()) for lam in lambdas]
    visited = sweep(train, validation, names)["lambda"].tolist()
    loop(visited[-1:])
    ours = lambda: sweep(train, validation, names)
    found, rows = race({"clip_lab": ours, "scikit-learn, the same lambdas": lambda: loop(visited), "clip_lab, torch": lambda: sweep(train, validation, names, device="cpu")}, args.rounds)
    once, more = race({"clip_lab": ours, "scikit-learn, the whole grid": lambda: loop(LAMBDAS)}, 1)
    assert found["clip_lab"].k.tolist() == found["scikit-learn, the same lambdas"], "the sweep counts other answers than a plain loop"
    best = [int(found["clip_lab"].k.max()), max(once["scikit-learn, the whole grid"])]
    def apart(tol):      # how far the two solvers end from one another, in the mean objective
        probes = [(fit(train, names, lam, tol=tol), fit(train, names, lam, tol=tol, device="cpu")) for lam in visited if lam >= 1]
        return max(abs(objective(a, x, y) - objective(b, x, y)) for a, b in probes)
    facts = dict(train=len(x), validation=len(xv), classes=classes, width=WIDTH, lambdas=len(visited), grid=len(LAMBDAS), best=best,
                 lambda_clip_lab=found["clip_lab"]["lambda"][found["clip_lab"].chosen].item(), lambda_torch=found["clip_lab, torch"]["lambda"][found["clip_lab, torch"].chosen].item(),
                 objective_apart={"1e-4": apart(1e-4), "1e-7": apart(1e-7)})
    print(f"  the objectives of the two solvers, at lambdas from 1, differ by {facts['objective_apart']['1e-4']:.1e} at most at tolerance 1e-4 (the default), {facts['objective_apart']['1e-7']:.1e} at 1e-7")
    assert facts["objective_apart"]["1e-7"] < 1e-6
    try: theirs.evaluate(*[None] * 11, device="cpu")
    except AssertionError: facts["clip_benchmark"] = "not run: its linear probe asserts device == 'cuda'"
    print(f"  clip_benchmark: {facts['clip_benchmark']}")
    yield dict(rows=rows + more[1:], ratios=ratios(rows) + ratios(more), facts=facts)


def recall(args):
    from clip_lab.evals import retrieval
    from clip_benchmark.metrics import zeroshot_retrieval as theirs
    theirs.tqdm = lambda batches: batches
    each, pictures, ks = 5, unit(args.pictures, 0), [1, 5, 10]
    owners = torch.arange(args.pictures).repeat_interleave(each)
    captions = F.normalize(pictures[owners] + 6 * unit(len(owners), 1), dim=-1)
    class Through: encode_image = encode_text = staticmethod(lambda features: features)
    batches = [(p, [list(c) for c in t]) for p, t in zip(pictures.split(64), captions.view(-1, each, WIDTH).split(64))]
    found, rows = race({"clip_lab": lambda: retrieval.evaluate_features(pictures, captions, owners.numpy(), ks),
                        "clip_benchmark": lambda: theirs.evaluate(Through, batches, torch.stack, "cpu", amp=False, recall_k_list=ks)}, args.rounds)
    counts, between = {}, 0
    places, tie = np.arange(args.pictures), retrieval.TIE
    for direction, name, q, g, own, their in (("image->text", "text_retrieval", pictures, captions, places, owners.numpy()), ("text->image", "image_retrieval", captions, pictures, owners.numpy(), places)):
        retrieval.TIE = -tie         # near ties in favour of the right answer
        lenient = retrieval.first_hits(q, g, own, their)
        retrieval.TIE = tie
        for k in ks:
            ours, best, peer = round(found["clip_lab"].recall[direction][k].value * len(q)), int((lenient <= k).sum()), round(found["clip_benchmark"][f"{name}_recall@{k}"] * len(q))
            assert ours <= peer <= best, f"{direction} R@{k}: {peer} of {len(q)} by clip_benchmark, {ours} by clip_lab, {best} with near ties for the right answer"
            counts[f"{direction} R@{k}"], between = [ours, peer, len(q)], max(between, best - ours)
    print("  " + ", ".join(f"{key} {ours:,} and {peer:,} of {n:,}" for key, (ours, peer, n) in counts.items()) + f"; near ties decide {between} at most")
    yield dict(rows=rows, ratios=ratios(rows), facts=dict(pictures=args.pictures, captions=len(owners), width=WIDTH, counts=counts, near_ties=between))


def mark_anew() -> int:
    "The highest mark of resident memory starts anew; bytes resident now."
    if sys.platform == "linux": Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def gallery_of(side: str, rows: int):
    "The rows where the side keeps them, made piece by piece: no second copy is ever there."
    pieces = ((start, min(PIECE, rows - start)) for start in range(0, rows, PIECE))
    if side == "faiss":
        import faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(WIDTH)
        for start, n in pieces: index.add(unit(n, 1 + start).numpy())
        return index
    gallery = np.empty((rows, WIDTH), dtype=np.float32)
    for start, n in pieces: gallery[start:start + n] = unit(n, 1 + start).numpy()
    return gallery


def search_once(side: str, file: str, args) -> list[dict]:
    "One process: the gallery once, then each number of queries."
    from clip_lab.evals.retrieval import search as ours
    ours(unit(8, 0), gallery_of(side, 2000), K)                     # loads what is loaded once
    before, answers, rows = mark_anew(), {}, []
    gallery = gallery_of(side, args.rows)
    for n in args.queries:
        queries, held = unit(n, 0), mark_anew()
        (_, found), seconds = clocked(lambda: ours(queries, gallery, K))
        answers[str(n)] = found.numpy()
        rows.append(seconds | dict(gallery_mib=(held - before) / 2 ** 20, search_mib=(memory("VmHWM") - held) / 2 ** 20))
    np.savez(file, **answers)
    return rows


def search(args):
    sides, taken, found = ("clip_lab", "faiss"), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for side in sides[::-1 if turn % 2 else 1]:
                file = Path(folder) / f"{side}.npz"
                command = [sys.executable, __file__, "-", "--one", side, file, "--rows", args.rows, "--threads", args.threads, "--queries", *args.queries]
                done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
                if done.returncode: raise SystemExit(f"{side} failed:\n{done.stderr}")
                found[side] = dict(np.load(file))
                for n, row in zip(args.queries, json.loads(done.stdout)): taken.setdefault((n, side), []).append(row)
    rows, against, same = [], [], {}
    for n in args.queries:
        rows += (pair := [dict(size=n, side=side) | {key: [r[key] for r in taken[n, side]] for key in taken[n, side][0]} for side in sides])
        for row in pair: print(f"  {n:,} queries, {row['side']}: " + ", ".join(f"{key} {statistics.median(row[key]):,.2f}" for key in taken[n, side][0]))
        against += [dict(size=n) | r for r in ratios(pair)]
        same[str(n)] = float((found["clip_lab"][str(n)] == found["faiss"][str(n)]).mean())
        print(f"  {same[str(n)]:.3%} of the answers are the same rows in the same order")
        assert same[str(n)] > 0.999      # two that are equally near may change places
    yield dict(rows=rows, ratios=against, facts=dict(gallery=args.rows, width=WIDTH, k=K, same_answers=same))


def open_clip_side(clip):
    "open_clip's model with our weights, its tokenizer, its builder, names and templates."
    model_py, _ = open_clip_modules()
    tokenizer, builder, names = (importlib.import_module(f"open_clip.{name}") for name in ("tokenizer", "zero_shot_classifier", "zero_shot_metadata"))
    c = clip.config
    model = model_py.CLIP(c.embed_dim, dict(image_size=c.image_resolution, width=c.vision_width, patch_size=c.vision_patch_size, layers=c.vision_layers),
                          dict(context_length=c.context_length, vocab_size=c.vocab_size, width=c.text_width, heads=c.text_heads, layers=c.text_layers), quick_gelu=True).eval()
    model.load_state_dict(clip.state_dict())
    return model, tokenizer.SimpleTokenizer(), builder.build_zero_shot_classifier, names.IMAGENET_CLASSNAMES, names.OPENAI_IMAGENET_TEMPLATES


def positions(clip, names, templates) -> list[float]:
    "Tokens a sentence, and positions that `embed_texts` computes for one, both the mean over the distinct sentences."
    from clip_lab.embed import _batches
    lengths = sorted((len(ids) + 2 for ids in map(clip.tokenizer.encode, {t(name) for name in names for t in templates})), reverse=True)
    computed = sum(len(batch) * lengths[batch[0]] for batch in _batches(range(len(lengths)), lengths, 256))
    return [statistics.mean(lengths), computed / len(lengths)]


def classifier(args):
    from clip_lab.evals.zeroshot import classifier as ours
    from clip_lab.model import build
    clip = build("ViT-B/32", seed=0)
    model, tokenizer, theirs, names, templates = open_clip_side(clip)
    sizes, rows, against, facts = sorted(args.classes) + [len(names)] * args.full, [], [], dict(all_classes=len(names), templates=len(templates), cosine={}, tokens={str(len(names)): positions(clip, names, templates)})
    ours(clip, names[:1], templates[:4]); theirs(model, tokenizer, names[:1], templates[:4])      # loads what is loaded once
    for size in sizes:
        chosen = random.Random(size).sample(names, size)
        sides = {"clip_lab": lambda: ours(clip, chosen, templates)} | {f"open_clip, {n} a batch": lambda n=n: theirs(model, tokenizer, chosen, templates, num_classes_per_batch=n).T
                                                                       for n in ((10, 1) if size == sizes[0] else (10,))}
        print(f"  {size} classes")
        found, taken = race(sides, 1 if size == len(names) else args.rounds)
        cosine = min(float(F.cosine_similarity(found["clip_lab"].double(), weights.double()).min()) for weights in found.values())
        facts["cosine"][str(size)] = cosine
        facts["tokens"][str(size)] = positions(clip, chosen, templates)
        print(f"  lowest cosine of the weights of a class, ours and theirs: 1 - {1 - cosine:.1e}; "
              "{:.1f} tokens a sentence, {:.1f} positions computed for one, by open_clip ".format(*facts["tokens"][str(size)]) + str(clip.context_length))
        assert cosine >= 0.99999, f"{size} classes: the weights differ, cosine {cosine}"
        rows += [dict(size=size) | row for row in taken]
        against += [dict(size=size) | row for row in ratios(taken)]
        yield dict(rows=rows, ratios=against, facts=facts)


PARTS = dict(imports=imports, probe=probe, recall=recall, search=search, classifier=classifier)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--classes", type=int, nargs="+", default=[5, 25], help="sizes of the subsets of ImageNet's classes")
    parser.add_argument("--full", action="store_true", help="all of ImageNet's classes too, one round")
    parser.add_argument("--pictures", type=int, default=5000, help="of the recall, with five captions each")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the gallery to search")
    parser.add_argument("--queries", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one: return print(json.dumps(search_once(*args.one, args)))
    from threadpoolctl import threadpool_limits
    versions = {name: importlib.metadata.version(name) for name in ("open-clip-torch", "clip-benchmark", "scikit-learn", "faiss-cpu")}
    about = dict(device=platform.processor() or platform.machine(), torch=torch.__version__, threads=args.threads, dtype="float32") | versions
    output = Path(args.output)
    kept = json.loads(output.read_text()) if output.exists() else {}
    parts = kept["parts"] if kept.get("about") == about else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        print(name, flush=True)
        with threadpool_limits(args.threads):      # numpy and scikit-learn too
            for parts[name] in PARTS[name](args): output.write_text(json.dumps(dict(about=about, parts={p: parts[p] for p in PARTS if p in parts}), indent=1) + "\n")


if __name__ == "__main__": main()
