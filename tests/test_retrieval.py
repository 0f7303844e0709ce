"Retrieval: against NumPy's sorting, scikit-learn, open_clip's formula and FAISS; ties, tiles, and the message of every bad input."
import ast
import importlib.util
from itertools import combinations
import json
from pathlib import Path
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.metrics import top_k_accuracy_score
from torch.utils._python_dispatch import TorchDispatchMode

from clip_lab.embed import embed_images, embed_texts
from clip_lab.evals import retrieval
from clip_lab.evals.retrieval import DIRECTIONS, chance, choose_captions, evaluate, evaluate_features, faiss_index, first_hits, search
from clip_lab.images import preprocess
from clip_lab.model import CLIPConfig, build

TINY = CLIPConfig("tiny", embed_dim=16, image_resolution=32, vision_layers=1, vision_width=64, vision_patch_size=16,
                  context_length=24, vocab_size=514 + 256, text_width=64, text_heads=2, text_layers=2)


def unit(n, d=16, seed=0): return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def spoiled(rows, place, value=float("nan")):
    rows = rows.clone()
    rows[place, 1] = value
    return rows


whole = st.integers(-1, 1)      # products of whole numbers are exact, and tie often
seeds = st.integers(0, 2 ** 32 - 1)


def drawn(seed, *shape): return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float32)


# --- search

@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(1, 6), m=st.integers(1, 40), data=st.data())
def test_search_is_a_stable_sort_whatever_the_tiles(seed, n, m, data):
    k, chunk, rows = (data.draw(st.integers(1, top)) for top in (m, m + 3, n))
    queries, gallery = drawn(seed, n, 3), drawn(seed + 1, m, 3)
    scores = queries @ gallery.T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "QUERIES", rows)
        values, found = search(queries, gallery, k, chunk)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, axis=1))


@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal"])
@pytest.mark.parametrize("k", [1, 3, 200])
def test_search_looks_past_spans_that_hold_nothing_better(order, k):
    rng = np.random.default_rng(0)
    queries, gallery = rng.integers(-3, 4, (5, 4)).astype(np.float32), rng.integers(-9, 10, (4096, 4)).astype(np.float32)     # whole numbers: exact, with many ties
    if order == "equal": gallery[:] = gallery[0]
    if order in ("rising", "falling"): gallery = gallery[np.argsort((gallery @ queries[0]) * (1 if order == "rising" else -1), kind="stable")]
    scores = queries @ gallery.T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    for chunk in (128, 512, 1000, 4096):
        values, found = search(queries, gallery, k, chunk=chunk)
        assert (found.numpy() == expected).all() and (values.numpy() == np.take_along_axis(scores, expected, 1)).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_gallery_on_disk_gives_the_same_answers(tmp_path, dtype):
    rows = unit(300).numpy().astype(dtype)
    np.save(tmp_path / "gallery.npy", rows)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")       # such as torch's about arrays that cannot be written
        values, found = search(unit(9, seed=1), mapped, 5, chunk=37)
    exact = unit(9, seed=1).numpy().astype(np.float64) @ rows.astype(np.float64).T
    np.testing.assert_array_equal(found, np.argsort(-exact, axis=1)[:, :5])
    np.testing.assert_allclose(values, -np.sort(-exact, axis=1)[:, :5], atol=1e-6)


def test_nothing_of_the_size_of_queries_times_gallery_is_made(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor): self.numel = max(self.numel, x.numel())
            return out
    monkeypatch.setattr(retrieval, "QUERIES", 50)
    n, m, chunk = 400, 600, 40
    with Largest() as largest:
        search(unit(n), unit(m, seed=1), 5, chunk)
        first_hits(unit(n), unit(m, seed=1), np.arange(n), np.arange(m), chunk)
    assert largest.numel <= max(50 * (chunk + 5), m * 16) < n * m / 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_row_is_named(value):
    with pytest.raises(ValueError, match="gallery: row 23 is not finite"): search(unit(4), spoiled(unit(30), 23, value), 2, chunk=7)
    with pytest.raises(ValueError, match="queries: row 2 is not finite"): search(spoiled(unit(4), 2, value), unit(30), 2)


@pytest.mark.parametrize("call, message", [
    (lambda: search(unit(3), unit(5), 6), "best 6 of a gallery of 5 cannot be; k goes from 1 to 5"),
    (lambda: search(unit(3), unit(5), 0), "k goes from 1 to 5"),
    (lambda: search(unit(0), unit(5), 1), "queries: no rows"),
    (lambda: search(unit(3), unit(0), 1), "gallery: no rows"),
    (lambda: search(unit(3, 8), unit(5), 1), "queries have rows of 8 numbers, the gallery of 16"),
    (lambda: search(unit(3)[0], unit(5), 1), r"queries have shape \(16,\)"),
    (lambda: first_hits(unit(3), unit(2), np.arange(3), np.arange(2)), r"query 2 has no right answer in the gallery \(1 of 3"),
])
def test_what_cannot_be_searched(call, message):
    with pytest.raises(ValueError, match=message): call()


# --- FAISS

def test_faiss_agrees():
    pytest.importorskip("faiss")
    queries, gallery = unit(40), unit(3000, seed=1)
    values, found = search(queries, gallery, 10, chunk=700)
    index = faiss_index(gallery, chunk=900)
    theirs, rows = search(queries, index, 10)
    assert index.ntotal == 3000
    torch.testing.assert_close(theirs, values, atol=1e-6, rtol=0)
    assert torch.equal(rows, found)
    half = search(queries, faiss_index(gallery, "SQfp16"), 10)[0]                # half the memory, nearly the same scores
    torch.testing.assert_close(half, values, atol=1e-3, rtol=0)


def test_an_index_that_finds_too_little_says_so():
    pytest.importorskip("faiss")
    index = faiss_index(unit(400), "IVF8,Flat", sample=400)      # looks into one cell of eight
    with pytest.raises(ValueError, match=r"the index found \d+ of 399 rows for query 0; raise its nprobe"): search(unit(2, seed=1), index, 399)
    index.nprobe = 8
    assert torch.equal(search(unit(2, seed=1), index, 399)[1], search(unit(2, seed=1), unit(400), 399)[1])
    with pytest.raises(ValueError, match="k goes from 1 to 400"): search(unit(2), index, 401)
    with pytest.raises(ValueError, match="gallery: row 7 is not finite"): faiss_index(spoiled(unit(20), 7), chunk=5)


def test_without_faiss_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'clip_lab\[faiss\]'"): faiss_index(unit(5))


# --- ranks

@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(1, 6), extra=st.integers(0, 12), chunk=st.integers(1, 20))
def test_ranks_count_ties_against_the_model(seed, n, extra, chunk):
    rng = np.random.default_rng(seed)
    keys, gallery_keys = np.arange(n), np.r_[np.arange(n), rng.integers(0, n + 1, extra)]     # some belong to nobody
    queries, gallery = drawn(seed, n, 3), drawn(seed + 1, n + extra, 3)
    scores, right = queries @ gallery.T, keys[:, None] == gallery_keys
    expected = [1 + sum(s >= scores[i][right[i]].max() for s in scores[i][~right[i]]) for i in range(n)]
    shuffled = rng.permutation(n + extra)
    assert first_hits(queries, gallery, keys, gallery_keys, chunk).tolist() == expected
    assert first_hits(queries, gallery[shuffled], keys, gallery_keys[shuffled], chunk).tolist() == expected


def test_twins_tie_in_every_tile():
    rows = unit(64, 512)
    gallery = rows.repeat(9, 1)                # each picture nine times; one of the nine is right
    for chunk in (1, 50, 64, 1000): assert (first_hits(rows, gallery, np.arange(64), np.arange(576), chunk) == 9).all()


def test_recall_is_scikit_learns_top_k_accuracy():
    images, texts, owner = unit(30), unit(90, seed=1), np.r_[np.arange(30), np.random.default_rng(0).integers(0, 30, 60)]
    result = evaluate_features(images, texts, owner, ks=(1, 3, 10))
    for k, found in result.recall["text->image"].items():
        assert found.value == pytest.approx(top_k_accuracy_score(owner, (texts @ images.T).numpy(), k=k, labels=np.arange(30)))
        assert found.n == 90


def test_one_caption_each_is_open_clips_formula():
    spec = importlib.util.find_spec("open_clip_train")
    if spec is None: pytest.skip("open_clip is not installed (pip install --no-deps open-clip-torch)")
    source = (Path(next(iter(spec.submodule_search_locations))) / "train.py").read_text()
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "get_clip_metrics")
    names = dict(torch=torch, np=np)
    exec(compile(ast.Module([function], []), "train.py", "exec"), names)
    images, texts = unit(51), F.normalize(unit(51) + unit(51, seed=1), dim=-1)
    theirs, result = names["get_clip_metrics"](images, texts, torch.tensor(100.0)), evaluate_features(images, texts, np.arange(51))
    for ours, name in zip(DIRECTIONS, ("image_to_text", "text_to_image")):
        for k in (1, 5, 10): assert result.recall[ours][k].value == pytest.approx(theirs[f"{name}_R@{k}"])
        assert result.median_rank[ours].value == theirs[f"{name}_median_rank"]
        ranks = result.per_query[result.per_query.direction == ours]["rank"]
        assert ranks.mean() == pytest.approx(theirs[f"{name}_mean_rank"])
        assert result.mrr[ours].value == pytest.approx((1 / ranks).mean())


def test_chance_by_counting_every_draw():
    right = [1, 2, 4]
    for k in (1, 3, 6):
        hits = [np.mean([min(draw) < r for draw in combinations(range(7), k)]) for r in right]
        assert chance(np.array(right), 7, k) == pytest.approx(np.mean(hits))


# --- the result

def test_the_result_says_what_was_found():
    images, owner = unit(12), np.r_[np.arange(12), np.arange(12)]
    texts = torch.cat([images, unit(12, seed=1)])
    result = evaluate_features(images, texts, owner, ks=(1, 2), level=0.9)
    assert (result.n_pictures, result.n_captions) == (12, 24)
    assert result.recall["image->text"][1].value == 1 and result.recall["image->text"][1].level == 0.9
    table = result.table()
    assert table.metric.tolist() == ["R@1", "R@2", "MRR", "median rank"] * 2
    assert ((table.low <= table.estimate) & (table.estimate <= table.high)).all()
    for direction in DIRECTIONS:     # the table and the estimates are one
        row = table[(table.direction == direction) & (table.metric == "R@2")].iloc[0]
        e = result.recall[direction][2]
        assert (row.estimate, row.low, row.high, row.n) == (e.value, e.low, e.high, e.n)
    rows = result.per_query
    first = rows[rows.direction == "text->image"]
    assert ((owner[first["query"]] == first.answer) == (first["rank"] == 1)).all()
    assert rows.groupby("direction", sort=False)[["right", "gallery"]].first().to_numpy().tolist() == [[2, 24], [1, 12]]
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["recall"]["text->image"]["2"]["n"] == 24
    assert "R@2" in repr(result)


def test_two_pictures_are_enough():
    result = evaluate_features(torch.eye(2), torch.eye(2), [1, 0])
    assert list(result.recall["image->text"]) == [1] and result.recall["image->text"][1].value == 0
    median = result.median_rank["image->text"]
    assert (median.low, median.value, median.high) == (1, 2, 2)      # two queries exclude no rank


@pytest.mark.parametrize("change, message", [
    (dict(picture_of=[0, 1, 2, 2, 2]), r"picture 3 has no caption \(1 of 4"),
    (dict(picture_of=[0, 1, 2, 3, 4]), "caption 4 belongs to picture 4, which is not there; pictures go from 0 to 3"),
    (dict(picture_of=[0, 1, 2, 3, -1]), "caption 4 belongs to picture -1"),
    (dict(picture_of=[0, 1, 2, 3]), r"shape \(4,\) .* each of 5 captions"),
    (dict(picture_of=[0., 1, 2, 3, 3]), "type float64"),
    (dict(ks=(1, 4)), "R@4 among 4 pictures says nothing"),
    (dict(ks=(0,)), "K goes from 1 to 3"),
    (dict(image_features=unit(1), picture_of=[0] * 5), "one picture only"),
    (dict(image_features=unit(0)), "image features have shape .*at least one row"),
    (dict(text_features=unit(0)), "text features have shape .*at least one row"),
    (dict(text_features=unit(5, 8)), "embed_dim|rows of 16 numbers, the gallery of 8"),
    (dict(image_features=spoiled(unit(4), 2)), "image features: row 2 is not finite"),
    (dict(text_features=2 * unit(5)), "text features: row 0 has length 2, expected 1; pass normalize=True"),
])
def test_what_cannot_be_evaluated(change, message):
    good = dict(image_features=unit(4), text_features=unit(5), picture_of=[0, 1, 2, 3, 3])
    evaluate_features(**good)
    with pytest.raises(ValueError, match=message): evaluate_features(**good | change)


# --- pictures and captions

@pytest.fixture(scope="module")
def model(): return build(TINY, seed=0)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)) for _ in range(5)]


CAPTIONS = [["a cat", "an animal"], ["a dog", "an animal"], ["a car"], ["a red house", "home"], ["a tree"]]


def test_evaluate_is_embedding_and_evaluating(model, pictures):
    transform = preprocess(32)
    result = evaluate(model, transform, pictures, CAPTIONS, prefix="a photo of", ks=(1, 2))
    texts = embed_texts(model, [f"a photo of {text}" for texts in CAPTIONS for text in texts])
    plain = evaluate_features(embed_images(model, transform, pictures).features, texts, [0, 0, 1, 1, 2, 3, 3, 4], ks=(1, 2))
    assert result.per_query.equals(plain.per_query) and result.recall == plain.recall
    assert result.measured["captions_shared"] == 2 and result.measured["captions_cut"] == 0 and result.measured["prefix"] == "a photo of"


def test_unreadable_pictures_leave_with_their_captions(model, pictures):
    transform = preprocess(32)
    with pytest.warns(UserWarning, match="1 of 5 pictures could not be read"):
        result = evaluate(model, transform, [*pictures[:3], "missing.png", pictures[4]], CAPTIONS, ks=(1,))
    alone = evaluate(model, transform, pictures[:3] + pictures[4:], CAPTIONS[:3] + CAPTIONS[4:], ks=(1,))
    assert result.n_unreadable == 1 and result.unreadable[0][:2] == (3, "missing.png")
    assert result.per_query.equals(alone.per_query)


def test_long_captions_are_named_or_counted(model, pictures):
    captions = [*CAPTIONS[:4], ["a tree", "very " * 30 + "long"]]
    with pytest.raises(ValueError, match=r"picture 4: 'very .* is longer than the 24 tokens that tiny reads \(1 of 9"): evaluate(model, preprocess(32), pictures, captions)
    assert evaluate(model, preprocess(32), pictures, captions, truncate=True).measured["captions_cut"] == 1


@pytest.mark.parametrize("captions, message", [
    (CAPTIONS[:4], "captions for 4 pictures, but there are 5"),
    ([*CAPTIONS, ["more"]], "captions for 6 pictures, but there are 5"),
    ([*CAPTIONS[:3], [], CAPTIONS[4]], "picture 3 has no caption"),
    ([*CAPTIONS[:3], "home", CAPTIONS[4]], "picture 3: its captions are one string, 'home'"),
])
def test_captions_that_do_not_fit(model, pictures, captions, message):
    with pytest.raises(ValueError, match=message): evaluate(model, preprocess(32), pictures, captions)


def test_captions_from_a_bank():
    images, bank = unit(6), unit(20, seed=1)
    names = [f"sentence {i}" for i in range(20)]
    chosen = choose_captions(images, bank, names, top=2)
    cosine = (images @ bank.T).numpy()
    first = chosen[chosen["rank"] == 1]
    assert first.caption.tolist() == [names[i] for i in cosine.argmax(1)]
    np.testing.assert_allclose(first.cosine, cosine.max(1), atol=1e-6)
    with pytest.raises(ValueError, match="19 sentences in the bank but 20 rows"): choose_captions(images, bank, names[1:])
    with pytest.raises(ValueError, match="sentence 19, 'sentence 3', stands in the bank before"): choose_captions(images, bank, [*names[:19], names[3]])
    with pytest.raises(ValueError, match="best 21 of a gallery of 20"): choose_captions(images, bank, names, top=21)
