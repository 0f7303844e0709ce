"""Query lists and the curation job: against brute force, with any number of workers, cut in the middle, and what bad input is told."""
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from math import log2

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from clip_lab.data import curate as room
from clip_lab.data import queries as lists

pytest.importorskip("ahocorasick", reason="pip install 'clip_lab[curate]'")

VOCABULARY = ["the", "photo", "cat", "dog", "hot dog", "new york", "education", "red", "car", "t-shirt", "zebra", "owl"]
QUERIES = pd.DataFrame({"query": VOCABULARY, "sources": "word"})
T = 25


# ---------------------------------------------------------------- queries

def test_normalise_is_idempotent_for_every_character():
    step = 7
    assert not [hex(c) for c in range(0, 0x110000, step) if lists.normalise(lists.normalise(chr(c))) != lists.normalise(chr(c))]


def test_bigrams_are_counted_within_phrases_only():
    words, bigrams = lists.count_corpus(iter(["red car, red dog (cat)", "RED   car", "red-car red/car"]))
    assert words == Counter({"red": 4, "car": 3, "dog": 1, "cat": 1, "red-car": 1})
    assert bigrams == Counter({("red", "car"): 2, ("red", "dog"): 1, ("red-car", "red"): 1})


def test_pmi_against_its_definition():
    words, bigrams = lists.count_corpus([" ".join(np.random.default_rng(0).choice(["a", "b", "c", "d"], 500, p=[0.5, 0.3, 0.15, 0.05]))])
    table = lists.bigram_queries(words, bigrams, min_pmi=-10, min_count=1).set_index("query").pmi
    for (a, b), n in bigrams.items():
        assert table[f"{a} {b}"] == pytest.approx(log2((n / 500) / (words[a] / 500 * words[b] / 500)))
    assert len(table) == len(bigrams) and table.is_monotonic_decreasing
    assert set(lists.bigram_queries(words, bigrams, min_pmi=0.1, min_count=3)["query"]) == {q for q in table.index[table >= 0.1] if bigrams[tuple(q.split())] >= 3}


def test_wordfreq_counts_are_wordfreqs_own():
    wordfreq = pytest.importorskip("wordfreq")
    counts = lists.wordfreq_counts(1e9)
    for word in ("the", "zebra", "photo"):      # word_frequency rounds to three digits
        assert counts[word] == pytest.approx(wordfreq.word_frequency(word, "en") * 1e9, rel=5e-3)
    assert counts["the"] > 10 ** 7 and min(counts.values()) >= 100 and not any(re.search(r"\d\d", w) for w in counts)
    with pytest.raises(ValueError, match=r"corpus_words of at most"): lists.wordfreq_counts(1e13)


@pytest.mark.skipif(not lists.WORDNET.is_dir(), reason="WordNet is not installed (Debian: wordnet-base)")
def test_wordnet_3_has_147306_different_words_and_phrases():
    found = lists.wordnet_queries()
    assert len(found) == 147_306 and found["query"].is_unique      # the number of lemma names that NLTK gives for WordNet 3.0
    assert {"golden retriever", "new york", "'hood"} <= set(found["query"])


@pytest.mark.parametrize("line", ["cat", "cat n x 1 @ 1 1 02121620", "cat q 1 1 @ 1 1 02121620", "cat n 2 1 @ 1 1 02121620"])
def test_wordnet_names_the_line(tmp_path, line):
    for part in ("noun", "verb", "adj", "adv"): (tmp_path / f"index.{part}").write_text("  1 licence\n")
    (tmp_path / "index.verb").write_text(f"  1 licence\nrun v 1 1 @ 1 1 02121620  \n{line}\n")
    with pytest.raises(ValueError, match=r"index\.verb, line 3"): lists.wordnet_queries(tmp_path)


def test_the_list_merges_and_says_what_it_dropped(tmp_path):
    (tmp_path / "names.txt").write_text("New  York\n\n!!\nCat\n", "utf-8")
    merged = lists.query_list(lists.word_queries({"cat": 200, "rare": 99}), lists.title_queries(tmp_path / "names.txt"))
    assert merged.values.tolist()[:1] == [["cat", "word+title", 200]] and merged["query"].tolist() == ["cat", "new york"]
    assert pd.isna(merged["count"][1]) and merged.attrs["dropped"] == 1
    with pytest.raises(ValueError, match="lacks"): lists.query_list(pd.DataFrame({"query": ["cat"]}))


@pytest.mark.parametrize("module, call, extra", [
    ("wordfreq", lambda: lists.wordfreq_counts(1e9), "curate"), ("ahocorasick", lambda: room.Matcher(["cat"]), "curate"), ("ray", lambda: room._each_on_ray(print, [], 1), "ray")])
def test_missing_extras_are_named(monkeypatch, module, call, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(f"clip_lab[{extra}]")): call()


# ---------------------------------------------------------------- matching

def brute(queries: list[str], caption: str, whole_words: bool) -> list[int]:
    "One regular expression per query."
    def pattern(query):
        left = r"(?<![^\W_])" if whole_words and re.match(r"[^\W_]", query) else ""
        right = r"(?![^\W_])" if whole_words and re.match(r"[^\W_]", query[-1]) else ""
        return left + re.escape(query) + right
    return [i for i, query in enumerate(queries) if re.search(pattern(query), lists.normalise(caption))]


letters = st.text("abAB é-_'+1.ßк", max_size=24)

@given(st.lists(letters.map(lists.normalise).filter(bool), min_size=1, max_size=8, unique=True), st.lists(letters, min_size=1, max_size=6), st.booleans())
@settings(max_examples=150, deadline=None)
def test_matcher_against_brute_force(queries, captions, whole_words):
    matcher = room.Matcher(queries, whole_words)
    for caption in (*captions, " ".join(queries), "".join(queries)):
        assert matcher(caption) == brute(queries, caption, whole_words)


@pytest.mark.parametrize("queries, said", [([], "at least one"), (["cat", " "], "query 1 is empty"), (["cat", "Cat"], "query 1, 'Cat', is there twice")])
def test_bad_query_lists(queries, said):
    with pytest.raises(ValueError, match=said): room.Matcher(queries)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=80), st.integers(1, 12), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_limits_against_sorting(rows, t, buffer):
    q, h = np.array([r[0] for r in rows], np.int32), np.array([r[1] for r in rows], np.uint64)
    counts = np.bincount(q, minlength=6)
    limits = room.selection_limits(lambda: iter([(q[:30], h[:30]), (q[30:], h[30:])]), counts, t, buffer)
    for i in range(6):
        mine = np.sort(h[q == i])
        assert limits[i] == (mine[t] if len(mine) > t else room.NO_LIMIT)
        assert (mine < limits[i]).sum() <= t


# ---------------------------------------------------------------- the job

def pairs(n: int, seed: int = 0) -> list[tuple[str, str, bytes]]:      # key, caption, picture
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, len(VOCABULARY) + 3) ** 1.3
    words = [*VOCABULARY, "unheard", "of_no_use"]
    caption = lambda: " ".join(rng.choice(words, rng.integers(1, 5), p=share / share.sum())).title()
    return [(f"{i:05}", caption(), rng.bytes(20)) for i in range(n)]


def write_tar(file, items):      # items: key -> {suffix: bytes}
    with tarfile.open(file, "w") as tar:
        for key, parts in items.items():
            for suffix, content in parts.items():
                info = tarfile.TarInfo(f"set/{key}.{suffix}")
                info.size, info.mtime, info.uname = len(content), 1234567890, "somebody"
                tar.addfile(info, io.BytesIO(content))
    return file


def write_shards(folder, data, size=50):
    "Every other shard a tar, every other one Parquet, the same keys in both."
    folder.mkdir()
    for i in range(0, len(data), size):
        part = data[i:i + size]
        if i // size % 2: write_tar(folder / f"s{i:05}.tar", {k: {"bin": p, "txt": c.encode(), "json": b"{}"} for k, c, p in part})
        else:
            table = pa.table({"k": [f"set/{k}" for k, *_ in part], "caption": [c for _, c, _ in part], "picture": [p for *_, p in part]}, metadata={"made": "here"})
            pq.write_table(table, folder / f"s{i:05}.parquet", row_group_size=20)
    return sorted(folder.iterdir())


def content(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def keys_in(folder):
    return {key for f in sorted((folder / "shards").iterdir()) for key, *_ in room.open_shard(f, key_column="k").captions()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The same job, done in one go in this process: data, shards, folder, report."
    folder = tmp_path_factory.mktemp("curate")
    data = pairs(600)
    shards = write_shards(folder / "in", data)
    return data, shards, folder / "out", room.curate(shards, QUERIES, folder / "out", t=T, key_column="k")


def test_the_job_against_a_plain_program(whole):
    data, _, folder, report = whole
    matched = {f"set/{k}": (room.pair_hash(f"set/{k}", c, 0), brute(VOCABULARY, c, True)) for k, c, _ in data}
    chosen = [sorted((number, key) for key, (number, found) in matched.items() if i in found)[:T] for i in range(len(VOCABULARY))]
    kept = {key for choice in chosen for _, key in choice}
    assert keys_in(folder) == kept and report.pairs_out == len(kept) and report.pairs_in == len(data)
    table = report.queries
    assert table.before.tolist() == [sum(i in found for _, found in matched.values()) for i in range(len(VOCABULARY))]
    assert table.chosen.tolist() == [len(c) for c in chosen] and table.chosen.max() == T == table.chosen[table.before > T].min()
    assert table.after.tolist() == [sum(i in matched[key][1] for key in kept) for i in range(len(VOCABULARY))]
    assert report.skipped == {"no query": sum(not found for _, found in matched.values())}
    assert (table.before > T).any() and (table.before < T).any()      # the example has a head and a tail


def test_what_lies_beside_the_caption_is_untouched(whole):
    data, shards, folder, _ = whole
    pictures, count = {f"set/{k}": p for k, _, p in data}, 0
    for shard in shards:
        out = folder / "shards" / shard.name
        if shard.suffix == ".tar":
            with tarfile.open(out) as tar:
                for member in tar:
                    assert (member.mtime, member.uname) == (1234567890, "somebody")
                    if member.name.endswith(".bin"): assert tar.extractfile(member).read() == pictures[member.name[:-4]]; count += 1
                    if member.name.endswith(".json"): assert tar.extractfile(member).read() == b"{}"
        else:
            table = pq.read_table(out)
            assert table.schema.equals(pq.read_table(shard).schema, check_metadata=True)
            for key, picture in zip(table["k"].to_pylist(), table["picture"].to_pylist()): assert picture == pictures[key]; count += 1
    assert count == len(keys_in(folder))


def test_the_choice_does_not_depend_on_the_grouping(whole, tmp_path):
    data, _, folder, report = whole
    mixed = [data[i] for i in np.random.default_rng(1).permutation(len(data))]
    other = room.curate(write_shards(tmp_path / "in", mixed, 170), QUERIES, tmp_path / "out", t=T, key_column="k", select_rows=100)
    assert keys_in(tmp_path / "out") == keys_in(folder) and other.queries.equals(report.queries)
    room.curate(sorted((tmp_path / "in").iterdir()), QUERIES, tmp_path / "seed", t=T, key_column="k", seed=1)
    assert keys_in(tmp_path / "seed") != keys_in(folder)


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_give_the_same_bytes(whole, tmp_path, workers):
    _, shards, folder, _ = whole
    room.curate(shards, QUERIES, tmp_path / "out", t=T, key_column="k", workers=workers)
    assert content(tmp_path / "out") == content(folder)


@pytest.mark.slow
def test_ray_gives_the_same_bytes(whole, tmp_path):
    ray = pytest.importorskip("ray", reason="pip install 'clip_lab[ray]'")
    _, shards, folder, _ = whole
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2 ** 20)
        room.curate(shards, QUERIES, tmp_path / "out", t=T, key_column="k", workers=2, executor="ray")
        (tmp_path / "bad.tar").write_bytes(b"no tar")
        with pytest.raises(ValueError, match="bad.tar"): room.curate([tmp_path / "bad.tar"], QUERIES, tmp_path / "bad", executor="ray")
    finally: ray.shutdown()
    assert content(tmp_path / "out") == content(folder)


KILLED = """
import os, signal, sys
from pathlib import Path
import pandas as pd
from clip_lab.data.curate import curate
into, out, last, t = sys.argv[1:]
renames, rename = iter(range(int(last))), os.replace
def replace(a, b):
    if next(renames, None) is None: os.kill(os.getpid(), signal.SIGKILL)      # written, not yet renamed
    rename(a, b)
os.replace = replace
curate(sorted(Path(into).iterdir()), pd.read_parquet(Path(out).parent / "queries.parquet"), out, t=int(t), key_column="k")
"""

def test_killed_twice_it_ends_with_the_same_bytes(whole, tmp_path):
    _, shards, folder, _ = whole
    QUERIES.to_parquet(tmp_path / "queries.parquet")
    out, done = tmp_path / "out", {}
    # Renames: 2 for the job, 2 for each of 12 shards in the first pass, the limits, 12 shards, 2 for the report. The first run is cut at the fourth
    # shard of pass 1; the second one does 18 for the rest of that pass, the limits, and is cut at the sixth shard of pass 2.
    for last in (8, 24):
        run = subprocess.run([sys.executable, "-c", KILLED, shards[0].parent, out, str(last), str(T)], capture_output=True, text=True)
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert list(out.glob("**/.*.part")) and not (out / "report.json").exists()
        now = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file() and not f.name.endswith(".part")}
        assert len(now) > len(done) and all(now[f] == time for f, time in done.items())      # what was finished is not done again
        done = now
    assert list((out / "shards").glob("s*"))
    room.curate(shards, QUERIES, out, t=T, key_column="k")
    assert content(out) == content(folder)


def test_another_job_in_the_same_folder_is_refused(whole, tmp_path):
    _, shards, folder, report = whole
    before = content(folder)
    again = room.curate(reversed(shards), QUERIES, folder, t=T, key_column="k", select_rows=7)
    assert again.queries.equals(report.queries) and again.settings == report.settings
    for change, said in ((dict(t=9), "t was 25 and is now 9"), (dict(t=T, seed=3), "seed was 0 and is now 3"), (dict(t=T, whole_words=False), "whole_words was True")):
        with pytest.raises(ValueError, match=said): room.curate(shards, QUERIES, folder, key_column="k", **change)
    with pytest.raises(ValueError, match="queries was"): room.curate(shards, QUERIES[::-1], folder, t=T, key_column="k")
    with pytest.raises(ValueError, match=r"shard s00550.* is now None"): room.curate(shards[:-1], QUERIES, folder, t=T, key_column="k")
    assert content(folder) == before


def test_unusable_pairs_are_counted_by_reason(tmp_path):
    shard = write_tar(tmp_path / "a.tar", {"1": {"bin": b"x", "txt": b"a cat"}, "2": {"bin": b"x"}, "3": {"txt": b"\xff\xfe cat"}, "4": {"txt": b" \n"}, "5": {"txt": b"nothing"}})
    table = pa.table({"caption": ["a dog", None, "", "a dog"], "k": ["1", "2", "3", "1"]})
    pq.write_table(table, tmp_path / "b.parquet")
    report = room.curate([shard, tmp_path / "b.parquet"], QUERIES, tmp_path / "out", key_column="k")
    assert (report.pairs_in, report.pairs_out) == (9, 2)
    assert report.skipped == {"duplicate": 1, "empty caption": 2, "no caption": 2, "no query": 1, "not UTF-8": 1}
    assert keys_in(tmp_path / "out") == {"set/1", "1"} and len(pq.read_table(tmp_path / "out" / "shards" / "b.parquet")) == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == report.skipped
    # A pair that lies in several shards ties with itself at the limit: at most t may mean none.
    for name in "cde": write_tar(tmp_path / f"{name}.tar", {"1": {"txt": b"a cat"}})
    assert room.curate([tmp_path / f"{n}.tar" for n in "cde"], QUERIES, tmp_path / "ties", t=2).queries.chosen.max() == 0


def test_bad_shards_are_named(tmp_path):
    run = lambda file, **how: room.curate([file], QUERIES, tmp_path / f"out-{next(number)}", **how)
    number = itertools.count()
    pq.write_table(pa.table({"text": ["a cat"], "tags": [["cat"]]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'caption'; it has text, tags"): run(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'tags' holds list"): run(tmp_path / "a.parquet", caption_column="tags")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"b\.parquet: "): run(tmp_path / "b.parquet")
    whole = write_tar(tmp_path / "c.tar", {str(i): {"bin": os.urandom(3000), "txt": b"a cat"} for i in range(9)}).read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[:12_000])
    with pytest.raises(ValueError, match=r"c\.tar: .*unexpected end of data"): run(tmp_path / "c.tar")
    (tmp_path / "d.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"suffix '\.gz'; expected \.tar"): run(tmp_path / "d.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*e\.tar"): run(tmp_path / "e.tar")


@pytest.mark.parametrize("change, said", [
    (dict(shards=[]), "no shards"), (dict(t=0), "t=0"), (dict(workers=0), "workers=0"), (dict(seed=-1), "seed=-1"), (dict(executor="threads"), "'threads'; expected 'processes' or 'ray'"),
    (dict(queries=pd.DataFrame({"query": ["cat"]})), "lack")])
def test_bad_arguments(whole, tmp_path, change, said):
    arguments = dict(shards=whole[1], queries=QUERIES, out=tmp_path / "out") | change
    with pytest.raises(ValueError, match=said): room.curate(**arguments)
    assert not (tmp_path / "out").exists()


def test_two_shards_of_one_name_are_refused(whole, tmp_path):
    other = tmp_path / whole[1][0].name
    other.write_bytes(whole[1][0].read_bytes())
    with pytest.raises(ValueError, match="two shards are called"): room.curate([*whole[1], other], QUERIES, tmp_path / "out")


def test_ray_must_be_connected(whole, tmp_path):
    ray = pytest.importorskip("ray", reason="pip install 'clip_lab[ray]'")
    assert not ray.is_initialized()
    with pytest.raises(RuntimeError, match="ray.init"): room.curate(whole[1], QUERIES, tmp_path / "out", key_column="k", executor="ray")


def test_no_report_without_a_finished_job(tmp_path):
    with pytest.raises(FileNotFoundError, match="no job was finished"): room.CurateReport.load(tmp_path)
