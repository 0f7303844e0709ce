"""Speed of the evaluations beside the peers' code, both sides in one run on one machine, and whether both sides give the same numbers.

    python bench/evals.py bench/results/evals.json
    python bench/evals.py out.json --parts classifier --classes 10 --rounds 1

Parts:
  imports     seconds that importing clip_lab adds to importing torch, in fresh processes
  probe       the sweep over lambda of clip_lab.evals.probe, by scikit-learn and by torch on the processor, against a plain loop of scikit-learn's LogisticRegression
              over the lambdas it visited, and over the whole grid. clip_benchmark's probe wants a CUDA device; the run says so
  recall      clip_lab.evals.retrieval.evaluate_features against clip_benchmark's zeroshot_retrieval.evaluate (a model that hands features through, in batches of 64)
  search      an exact top-10 search in up to a million rows against faiss.IndexFlatIP, in a fresh process for each side, with the memory each needs on top of the rows
  classifier  clip_lab.evals.zeroshot.classifier against open_clip's build_zero_shot_classifier: ViT-B/32 with one set of random weights, names and templates of ImageNet from open_clip, its own tokenizer,
              10 classes a batch (its default). On random subsets of the classes, because all 1000 take open_clip hours; several sizes show whether the ratio depends on the size

Where two sides should give the same numbers, a difference beyond the tolerance stops the run.
"""
import importlib
import json
from pathlib import Path
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import torch
import torch.nn.functional as F

from common import child, clocked, main, mark_anew, memory, model_of, part, peak_since, race, row, unit
from encode import open_clip_side

PIECE, WIDTH, K = 50_000, 512, 10      # rows made at a time; numbers in a feature; answers of a search


def imports(args):
    code = """
        import time
        clock = [(time.perf_counter(), time.process_time())]
        def lap(): clock.append((time.perf_counter(), time.process_time()))
        import torch; lap()
        import clip_lab; lap()
        clip_lab.load; lap()
        import clip_lab.evals.zeroshot; lap()
        print([[b[i] - a[i] for i in (0, 1)] for a, b in zip(clock, clock[1:])])"""
    each = [json.loads(subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout) for _ in range(7 if not args.short else 1)]
    names = ("import torch", "then import clip_lab", "then the first use of load", "then import clip_lab.evals.zeroshot")
    rows = [row("torch" if i == 0 else "clip_lab", [dict(wall=times[i][0], cpu=times[i][1]) for times in each], what=name) for i, name in enumerate(names)]
    for r in rows: print(f"  {r['what']}: {statistics.median(r['cpu']):.3f} s CPU, {statistics.median(r['wall']):.3f} s")
    yield part(rows, processes=len(each))


def probe(args):
    from clip_lab.evals.probe import LAMBDAS, fit, objective, sweep
    from sklearn.linear_model import LogisticRegression
    rng, classes, sizes = np.random.default_rng(0), 20, sorted(args.examples)
    names, scales = [f"class {i}" for i in range(classes)], np.logspace(0, -1, WIDTH)      # a spectrum that falls, as that of real features does
    centers = 0.25 * rng.normal(size=(classes, WIDTH))
    def draw(n):
        y = np.arange(n) % classes
        return (centers[y] + rng.normal(size=(n, WIDTH))) * scales, y
    validation, rows, middle = draw(500), [], sizes[len(sizes) // 2]
    for n in sizes:
        x, y = train = draw(n)
        def loop(lambdas): return [int((LogisticRegression(C=1 / lam, max_iter=1000).fit(x, y).predict(validation[0]) == validation[1]).sum()) for lam in lambdas]
        visited = sweep(train, validation, names)["lambda"].tolist()
        sides = {"clip_lab": lambda: sweep(train, validation, names), "scikit-learn, the same lambdas": lambda: loop(visited)}
        if n == middle: sides |= {"clip_lab, torch": lambda: sweep(train, validation, names, device="cpu"), "scikit-learn, the whole grid": lambda: loop(LAMBDAS)}
        found, taken = race(sides, args.rounds, what="sweep", size=n)
        assert found["clip_lab"].k.tolist() == found["scikit-learn, the same lambdas"], "the sweep counts other answers than a plain loop"
        rows += taken
        if n == middle:
            best = [int(found["clip_lab"].k.max()), max(found["scikit-learn, the whole grid"])]
            def apart(tol):      # how far the two solvers end from one another, in the mean objective
                probes = [(fit(train, names, lam, tol=tol), fit(train, names, lam, tol=tol, device="cpu")) for lam in visited if lam >= 1]
                return max(abs(objective(a, x, y) - objective(b, x, y)) for a, b in probes)
            facts = dict(train=n, validation=len(validation[0]), classes=classes, width=WIDTH, lambdas=len(visited), grid=len(LAMBDAS), best=best, objective_apart={"1e-4": apart(1e-4), "1e-7": apart(1e-7)})
    assert facts["objective_apart"]["1e-7"] < 1e-6
    yield part(rows, **facts)
    from clip_benchmark.metrics import linear_probe as theirs
    try: theirs.evaluate(*[None] * 11, device="cpu")
    except AssertionError: facts["clip_benchmark"] = "not run: its linear probe asserts device == 'cuda'"
    yield part(rows, **facts)


def recall(args):
    from clip_lab.evals import retrieval
    from clip_benchmark.metrics import zeroshot_retrieval as theirs
    theirs.tqdm = lambda batches: batches
    each, ks, rows = 5, [1, 5, 10], []
    class Through: encode_image = encode_text = staticmethod(lambda features: features)
    for n in sorted(args.pictures):
        pictures, owners = unit(n, 0), torch.arange(n).repeat_interleave(each)
        captions = F.normalize(pictures[owners] + 6 * unit(len(owners), 1), dim=-1)
        batches = [(p, [list(c) for c in t]) for p, t in zip(pictures.split(64), captions.view(-1, each, WIDTH).split(64))]
        found, taken = race({"clip_lab": lambda: retrieval.evaluate_features(pictures, captions, owners.numpy(), ks), "clip_benchmark": lambda: theirs.evaluate(Through, batches, torch.stack, "cpu", amp=False, recall_k_list=ks)},
                            args.rounds, what="recall", size=n)
        rows += taken
    counts, between = {}, 0
    places, tie = np.arange(n), retrieval.TIE
    for direction, name, q, g, own, their in (("image->text", "text_retrieval", pictures, captions, places, owners.numpy()), ("text->image", "image_retrieval", captions, pictures, owners.numpy(), places)):
        retrieval.TIE = -tie         # near ties in favour of the right answer
        lenient = retrieval.first_hits(q, g, own, their)
        retrieval.TIE = tie
        for k in ks:
            ours, best, peer = round(found["clip_lab"].recall[direction][k].value * len(q)), int((lenient <= k).sum()), round(found["clip_benchmark"][f"{name}_recall@{k}"] * len(q))
            assert ours <= peer <= best, f"{direction} R@{k}: {peer} of {len(q)} by clip_benchmark, {ours} by clip_lab, {best} with near ties for the right answer"
            counts[f"{direction} R@{k}"], between = [ours, peer, len(q)], max(between, best - ours)
    yield part(rows, pictures=n, captions=len(owners), width=WIDTH, counts=counts, near_ties=between)


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


def search_once(asked: list[str], args) -> list[dict]:
    "One process: the gallery once, then each number of queries."
    from clip_lab.evals.retrieval import search as ours
    side, rows, file = asked[0], int(asked[1]), asked[2]
    ours(unit(8, 0), gallery_of(side, 2000), K)                     # loads what is loaded once
    answers, taken, gallery = {}, [], gallery_of(side, rows)
    for n in args.queries:
        queries, held = unit(n, 0), mark_anew()
        (_, found), seconds = clocked(lambda: ours(queries, gallery, K))
        answers[str(n)] = found.numpy()
        taken.append(seconds | dict(peak_mib=peak_since(held)))
    np.savez(file, **answers)
    return taken


def search(args):
    import faiss                                                    # noqa: is it there?
    sides, rows, same = ("clip_lab", "faiss, flat"), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sorted(args.rows):
            taken, found = {}, {}
            for turn in range(args.rounds):
                for side in sides[::-1 if turn % 2 else 1]:
                    file = Path(folder) / "found.npz"
                    for n, seconds in zip(args.queries, child(__file__, [side.split(",")[0], size, file], args, "--queries", *args.queries)): taken.setdefault((n, side), []).append(seconds)
                    found[side] = dict(np.load(file))
            for n in args.queries:
                rows += [row(side, taken[n, side], what=f"{n:,} queries", size=size) for side in sides]
                same[f"{n} queries, {size} rows"] = float((found[sides[0]][str(n)] == found[sides[1]][str(n)]).mean())
                assert min(same.values()) > 0.999, same             # two that are equally near may change places
            yield part(rows, gallery=max(args.rows), width=WIDTH, k=K, same_answers=same)


def positions(clip, names, templates) -> list[float]:
    "Tokens a sentence, and positions that `embed_texts` computes for one, both the mean over the distinct sentences."
    from clip_lab.embed import _batches
    lengths = sorted((len(ids) + 2 for ids in map(clip.tokenizer.encode, {t(name) for name in names for t in templates})), reverse=True)
    computed = sum(len(batch) * lengths[batch[0]] for batch in _batches(range(len(lengths)), lengths, 256))
    return [statistics.mean(lengths), computed / len(lengths)]


def classifier(args):
    from clip_lab.evals.zeroshot import classifier as ours
    clip = model_of("ViT-B/32", args.short)
    model = open_clip_side(clip)
    tokenizer, builder, metadata = (importlib.import_module(f"open_clip.{name}") for name in ("tokenizer", "zero_shot_classifier", "zero_shot_metadata"))
    tokenize, theirs, names, templates = tokenizer.SimpleTokenizer(), builder.build_zero_shot_classifier, metadata.IMAGENET_CLASSNAMES, metadata.OPENAI_IMAGENET_TEMPLATES
    rows, facts = [], dict(all_classes=len(names), templates=len(templates), cosine={}, tokens={str(len(names)): positions(clip, names, templates)} if not args.short else {})
    ours(clip, names[:1], templates[:4]); theirs(model, tokenize, names[:1], templates[:4])      # loads what is loaded once
    for size in sorted(args.classes):
        chosen = random.Random(size).sample(names, size)
        found, taken = race({"clip_lab": lambda: ours(clip, chosen, templates), "open_clip": lambda: theirs(model, tokenize, chosen, templates, num_classes_per_batch=10).T}, args.rounds, what=f"classes x {len(templates)} templates", size=size)
        facts["cosine"][str(size)] = cosine = float(F.cosine_similarity(found["clip_lab"].double(), found["open_clip"].double()).min())
        facts["tokens"][str(size)] = positions(clip, chosen, templates)
        assert cosine >= 0.99999, f"{size} classes: the weights differ, cosine {cosine}"
        rows += taken
        yield part(rows, **facts)


if __name__ == "__main__":
    main(__doc__, dict(imports=imports, probe=probe, recall=recall, search=search, classifier=classifier), ("open-clip-torch", "clip-benchmark", "scikit-learn", "faiss-cpu"), one=search_once,
         options=dict(classes=dict(type=int, nargs="+", default=[1, 3, 10], help="sizes of the subsets of ImageNet's classes"), examples=dict(type=int, nargs="+", default=[500, 2000, 8000], help="to fit a probe"),
                      pictures=dict(type=int, nargs="+", default=[500, 1500, 5000], help="of the recall, with five captions each"), rows=dict(type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of the galleries to search"),
                      queries=dict(type=int, nargs="+", default=[100, 1000])),
         short=dict(classes=[1], examples=[100], pictures=[50], rows=[2000], queries=[3]))
