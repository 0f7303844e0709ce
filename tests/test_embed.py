"""Embeddings equal the plain computation, failures are reported, and the cache survives being killed."""
from dataclasses import replace
import io
import itertools
import os
import signal
import subprocess
import sys
import time

from hypothesis import given, settings, strategies as st
import numpy as np
from PIL import Image
import pytest
import torch
import torch.nn.functional as F

from clip_lab.embed import EmbeddingCache, cache_scope, content_hash, embed_images, embed_texts
from clip_lab.images import ImageError, preprocess as make_preprocess
from references import TINY_RESNET, TINY_VIT, tiny

PREPROCESS = make_preprocess(32)
MODEL = tiny(replace(TINY_VIT, context_length=77))


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (rng.integers(20, 60), rng.integers(20, 60), 3), dtype=np.uint8)) for _ in range(n)]


@torch.no_grad()
def plain(model, preprocess, items):
    "The definition: one picture at a time."
    return torch.cat([F.normalize(model.encode_image(preprocess(p)[None]), dim=-1) for p in items])


def close(a, b, atol=1e-5): torch.testing.assert_close(a, b, atol=atol, rtol=0, equal_nan=True)


# ---- pictures


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=lambda c: c.name)
@pytest.mark.parametrize("batch_size, workers", [(1, 0), (4, 0), (100, 0), (4, 2)])
def test_batches_and_workers_give_the_plain_result(config, batch_size, workers):
    model, preprocess, items = tiny(config), make_preprocess(config.image_resolution), pictures(9)
    found = embed_images(model, preprocess, items, batch_size=batch_size, workers=workers)
    close(found.features, plain(model, preprocess, items))
    assert found.ok.all() and found.errors == [] and found.features.dtype == torch.float32 and not found.features.requires_grad


def test_every_kind_of_source(tmp_path):
    picture = pictures(1)[0]
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    expected = plain(MODEL, PREPROCESS, [picture] * 5)
    for cache in (None, EmbeddingCache(tmp_path)):
        close(embed_images(MODEL, PREPROCESS, [picture, tmp_path / "a.png", str(tmp_path / "a.png"), data, io.BytesIO(data)], cache=cache).features, expected)


def test_a_lazy_sequence_is_read_once_and_in_order():
    class Lazy:
        def __init__(self): self.items, self.read = pictures(7), []
        def __len__(self): return 7
        def __getitem__(self, i):
            self.read.append(i)
            return self.items[i]
    lazy = Lazy()
    close(embed_images(MODEL, PREPROCESS, lazy, batch_size=3).features, plain(MODEL, PREPROCESS, lazy.items))
    assert lazy.read == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_unreadable_pictures_are_reported_and_nothing_moves(workers, cached, tmp_path):
    good = pictures(3)
    good[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    bag = [good[0], tmp_path / "missing.png", good[1], b"not a picture", tmp_path / "cut.png", tmp_path, good[2]]
    cache = EmbeddingCache(tmp_path / "cache") if cached else None
    with pytest.warns(UserWarning, match="4 of 7 pictures could not be read; the first is picture 1 .*missing.png"):
        found = embed_images(MODEL, PREPROCESS, bag, batch_size=2, workers=workers, cache=cache)
    assert found.ok.tolist() == [True, False, True, False, False, False, True]
    assert [i for i, *_ in found.errors] == [1, 3, 4, 5] and "cut.png" in found.errors[2][1]
    assert found.features[~found.ok].isnan().all()
    close(found.features[found.ok], plain(MODEL, PREPROCESS, good))
    with pytest.raises(ImageError, match=r"picture 1 \(.*missing.png\)"): embed_images(MODEL, PREPROCESS, bag, on_error="raise", cache=cache)


def test_nothing_readable_and_nothing_at_all():
    with pytest.warns(UserWarning, match="1 of 1"): assert not embed_images(MODEL, PREPROCESS, [b"x"]).ok.any()
    found = embed_images(MODEL, PREPROCESS, [])
    assert found.features.shape == (0, 16) and len(found) == 0 and found.ok.shape == (0,)


def test_mistakes_in_the_code_are_not_taken_for_bad_pictures():
    class Broken(list):
        def __getitem__(self, i): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): embed_images(MODEL, PREPROCESS, Broken([1]))


def test_raw_and_normalised_share_a_cache(tmp_path):
    cache, items = EmbeddingCache(tmp_path), pictures(4)
    raw = embed_images(MODEL, PREPROCESS, items, cache=cache, normalize=False).features
    assert (raw.norm(dim=-1) - 1).abs().min() > 1e-3
    close(embed_images(MODEL, PREPROCESS, items, cache=cache).features, F.normalize(raw, dim=-1))
    assert cache.count() == 4


# ---- texts


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(alphabet="abc de", max_size=60), min_size=1, max_size=12), st.integers(1, 5))
def test_trimmed_texts_equal_padded_ones(texts, batch_size):
    close(embed_texts(MODEL, texts, batch_size=batch_size), MODEL.encode_text(MODEL.tokenize(texts), normalize=True))


def test_equal_texts_are_embedded_once_and_short_ones_cost_little(monkeypatch, tmp_path):
    seen, encode = [], MODEL.encode_text
    monkeypatch.setattr(MODEL, "encode_text", lambda tokens: seen.append(tuple(tokens.shape)) or encode(tokens))
    embed_texts(MODEL, ["b", "a a a a", "b", " B ", "a"] * 10, batch_size=2)
    assert seen == [(2, 6), (1, 3)]          # "a a a a" with start and end is 6 long; "b" or "a" rides along
    cache = EmbeddingCache(tmp_path)
    first = embed_texts(MODEL, ["b", "a a a a"], cache=cache)
    seen.clear()
    close(embed_texts(MODEL, ["a a a a", "b"], cache=cache), first.flip(0))
    assert seen == [] and cache.count() == 2


@torch.no_grad()
def test_a_batch_ends_where_the_length_changes_unless_it_is_small(monkeypatch):
    texts = [" ".join(rest) for n, length in ((20, 5), (20, 4), (3, 3), (16, 2)) for rest in list(itertools.product("abcd", repeat=length))[:n]]
    expected, seen, encode = MODEL.encode_text(MODEL.tokenize(texts), normalize=True), [], MODEL.encode_text
    monkeypatch.setattr(MODEL, "encode_text", lambda tokens: seen.append(tuple(tokens.shape)) or encode(tokens))
    close(embed_texts(MODEL, texts), expected)
    assert sorted(seen, reverse=True) == [(20, 7), (20, 6), (19, 5)]      # three are too few for a batch of their own


def test_no_texts(): assert embed_texts(MODEL, []).shape == (0, 16)


def test_a_text_that_is_too_long_is_named():
    texts = ["short", "a " * 100]
    with pytest.raises(ValueError, match="1.*102"): embed_texts(MODEL, texts)
    assert embed_texts(MODEL, texts, truncate=True).isfinite().all()


# ---- what would give wrong numbers


@pytest.mark.parametrize("call, error, message", [
    (lambda: embed_images(MODEL, PREPROCESS, "a.png"), ValueError, "expected a sequence of pictures, got one: a.png; wrap it in a list"),
    (lambda: embed_images(MODEL, PREPROCESS, pictures(1)[0]), ValueError, "wrap it in a list"),
    (lambda: embed_texts(MODEL, "a cat"), ValueError, "got one string 'a cat'; wrap it in a list"),
    (lambda: embed_images(MODEL, PREPROCESS, [], on_error="ignore"), ValueError, "'ignore'; expected 'report' or 'raise'"),
    (lambda: embed_images(tiny(TINY_RESNET).train(), PREPROCESS, pictures(1)), ValueError, "training mode"),
    (lambda: embed_texts(tiny(TINY_VIT).train(), ["a"]), ValueError, "call model.eval() first"),
    (lambda: embed_images(tiny(TINY_VIT), make_preprocess(40), pictures(1)), ValueError, "shape (n, 3, 32, 32)"),
    (lambda: embed_texts(MODEL, ["a", 3]), TypeError, "1"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as e: call()
    assert message in str(e.value)


def test_an_overflow_is_an_error():
    model = tiny(TINY_VIT)
    with torch.no_grad(): model.visual.ln_post.bias[0] = torch.inf
    with pytest.raises(ValueError, match="non-finite embeddings for pictures 0 to 2"): embed_images(model, PREPROCESS, pictures(3))


def test_autocast_and_half_weights_stay_near():
    items, exact = pictures(4), plain(MODEL, PREPROCESS, pictures(4))
    for found in (embed_images(MODEL, PREPROCESS, items, autocast=torch.bfloat16), embed_images(tiny(MODEL.config).bfloat16(), PREPROCESS, items)):
        assert found.features.dtype == torch.float32
        assert F.cosine_similarity(found.features, exact).min() > 0.995 and not torch.equal(found.features, exact)


def test_no_bar_without_a_terminal(capsys):
    embed_images(MODEL, PREPROCESS, pictures(2))
    assert capsys.readouterr() == ("", "")


# ---- the cache


def test_the_content_decides(tmp_path):
    a, b = pictures(2)
    for name, p in (("a.png", a), ("renamed.png", a), ("b.png", b)): p.save(tmp_path / name)
    assert content_hash(tmp_path / "a.png") == content_hash(str(tmp_path / "renamed.png")) == content_hash((tmp_path / "a.png").read_bytes())
    assert content_hash(tmp_path / "a.png") != content_hash(tmp_path / "b.png")
    upside = a.copy()
    upside.getexif()[0x0112] = 3
    palette = a.convert("P")
    other = palette.copy()
    other.putpalette(bytes(reversed(palette.palette.tobytes())))
    keyed = palette.copy()
    keyed.info["transparency"] = 0
    assert len({content_hash(p) for p in (a, b, upside, a.convert("L"), a.transpose(Image.Transpose.ROTATE_90), palette, other, keyed)}) == 8


def test_nothing_is_shared_between_models_transforms_or_precisions():
    gelu = tiny(replace(MODEL.config, activation="gelu"))
    assert torch.equal(gelu.visual.proj, MODEL.visual.proj)      # the same weights, another function
    scopes = [cache_scope(MODEL, "text"), cache_scope(gelu, "text"), cache_scope(tiny(MODEL.config, seed=1), "text"), cache_scope(MODEL, "text", torch.bfloat16),
              *(cache_scope(MODEL, make_preprocess(32, **kw).fingerprint()) for kw in ({}, {"orient": True}, {"background": "white"}))]
    assert len(set(scopes)) == len(scopes)
    assert cache_scope(tiny(replace(MODEL.config, name="copy")), "text") == scopes[0]


def test_an_edited_file_is_embedded_again(tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    for p in pictures(2):
        p.save(tmp_path / "a.png")
        close(embed_images(MODEL, PREPROCESS, [tmp_path / "a.png"], cache=cache).features, plain(MODEL, PREPROCESS, [p]))
    assert cache.count() == 2


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    items, calls, encode = pictures(10), [], MODEL.encode_image
    def failing(x):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(len(x))
        return encode(x)
    cache = EmbeddingCache(tmp_path)
    monkeypatch.setattr(MODEL, "encode_image", failing)
    with pytest.raises(KeyboardInterrupt): embed_images(MODEL, PREPROCESS, items, batch_size=3, cache=cache)
    assert cache.count() == 6
    calls.clear()
    monkeypatch.setattr(MODEL, "encode_image", lambda x: calls.append(len(x)) or encode(x))
    found = embed_images(MODEL, PREPROCESS, items, batch_size=3, cache=cache).features
    assert sum(calls) == 4
    close(found, plain(MODEL, PREPROCESS, items))


WRITER = """
import sys, torch
from clip_lab.embed import EmbeddingCache
cache = EmbeddingCache(sys.argv[1])
for batch in range(100_000):
    numbers = range(batch * 8, batch * 8 + 8)
    cache.put("scope", [n.to_bytes(32, "big") for n in numbers], torch.tensor([[float(n)] * 512 for n in numbers]))
    print(batch, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
def test_a_killed_writer_leaves_whole_batches(delay, tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for _ in range(5): writer.stdout.readline()          # it is in full swing
    time.sleep(delay)
    os.kill(writer.pid, signal.SIGKILL)
    said = 4 + len(writer.stdout.readlines())            # the last batch that it called done
    assert writer.wait() == -signal.SIGKILL
    cache = EmbeddingCache(tmp_path)
    found = sorted(int.from_bytes(item, "big") for item in cache.items("scope"))
    assert len(found) % 8 == 0 and len(found) >= 8 * (said + 1) and found == list(range(len(found)))
    rows = cache.get("scope", [n.to_bytes(32, "big") for n in found])
    assert torch.equal(rows, torch.tensor(found, dtype=torch.float32)[:, None].expand(-1, 512))
    cache.put("scope", [b"after"], torch.ones(1, 512))
    assert cache.count() == len(found) + 1


def test_two_writers_share_a_folder(tmp_path):
    code = WRITER.replace("100_000", "20").replace('"scope"', "sys.argv[2]")
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], stdout=subprocess.DEVNULL) for name in ("one", "two")]
    assert [w.wait() for w in writers] == [0, 0]
    cache = EmbeddingCache(tmp_path)
    assert len(cache.items("one")) == len(cache.items("two")) == 160 and cache.count() == 320


def test_a_cache_that_is_none(tmp_path):
    (tmp_path / "embeddings.sqlite").write_text("something else entirely")
    with pytest.raises(ValueError, match="embeddings.sqlite cannot be used as an embedding cache.*choose another folder"): EmbeddingCache(tmp_path)
    cache = EmbeddingCache(tmp_path / "good")
    with pytest.raises(KeyError, match="has no row for 78"): cache.get("scope", [b"x"])
