"""The near-duplicate detector and the search: shapes of data, faults, exactness; and that the shipped weights find planted copies."""

import json
import sys
import tarfile

import numpy as np
from PIL import Image
import pytest
import torch

from clip_lab.data import clipart, emoji
from clip_lab.data.labelled import Pictures
from clip_lab.embed import EmbeddingCache, embed_images
from clip_lab.evals import duplicates
from clip_lab.evals.detector import WEIGHTS, Blur, Detector, DetectorConfig, Squash, distort, held_out, load_detector, save_detector, train_detector
from clip_lab.evals.duplicates import BITS, borderline, find_duplicates, hash_pictures, open_pictures, plant, score_planted
from clip_lab.images import ImageError
from clip_lab.pretrained import weights_hash


@pytest.fixture(scope="module")
def pictures():
    return clipart.load().pictures.take(range(0, 400, 10))


@pytest.fixture(scope="module")
def copies(pictures):
    return plant(pictures, seed=3)


def test_shipped_weights_are_small_and_known():
    assert WEIGHTS.stat().st_size <= 1.5e6
    facts = json.loads(duplicates.Path(WEIGHTS).with_name("duplicates.log.jsonl").read_text().splitlines()[-1])
    assert facts["step"] == 599 and 150_000 <= sum(p.numel() for p in load_detector().parameters()) <= 450_000


def test_weights_survive_the_file(tmp_path):
    detector = load_detector()
    again = load_detector(save_detector(detector, tmp_path / "d.safetensors", {}))
    assert weights_hash(again) == weights_hash(detector) and again.config == detector.config
    other = Detector(DetectorConfig(widths=(16, 24), depth=1, embed_dim=32))
    back = load_detector(save_detector(other, tmp_path / "e.safetensors", {"a": 1}))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(back(x, normalize=True), other(x, normalize=True), atol=5e-3)
    from clip_lab.archives import write_tensors
    with pytest.raises(ValueError, match="is not a detector"):
        load_detector(write_tensors({"x": torch.zeros(1)}, tmp_path / "f.safetensors", {}))


def test_blur_is_the_binomial_filter():
    scipy_ndimage = pytest.importorskip("scipy.ndimage")
    x = torch.rand(1, 2, 12, 12, dtype=torch.float64)
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    expected = [scipy_ndimage.convolve(plane, kernel, mode="nearest")[::2, ::2] for plane in x[0].numpy()]
    assert np.allclose(Blur()(x)[0].numpy(), expected)


def test_gradients_reach_every_parameter():
    detector = Detector(DetectorConfig(widths=(16, 24), depth=1, embed_dim=16))
    detector(torch.rand(2, 3, 64, 64), normalize=True)[0, 0].backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_training_counts_what_it_leaves_out_and_depends_on_the_seed(pictures):
    config = DetectorConfig(widths=(8, 16), depth=1, embed_dim=16)
    options = dict(steps=2, batch=12, run=4, config=config)
    state = torch.random.get_rng_state()
    one, log = train_detector([*pictures[:20], pictures[0], b"broken"], seed=1, **options)
    assert torch.equal(state, torch.random.get_rng_state())                       # nobody else's random numbers moved
    assert (log[0]["step"], len(log)) == (0, 2) and not one.training
    assert weights_hash(one) == weights_hash(train_detector(pictures[:20], seed=1, **options)[0])      # a copy and a broken one change nothing
    assert weights_hash(one) != weights_hash(train_detector(pictures[:20], seed=2, **options)[0])


def test_distortions_follow_the_generator_alone(pictures):
    x = torch.stack([Squash()(p) for p in pictures[:20]])
    first = distort(x, torch.Generator().manual_seed(0))
    np.random.seed(3), torch.manual_seed(7)
    assert torch.equal(first, distort(x, torch.Generator().manual_seed(0)))
    assert not torch.equal(first, distort(x, torch.Generator().manual_seed(1)))
    assert first.shape == x.shape and first.min() >= 0 and first.max() <= 1


def test_squash_takes_any_mode_and_shape():
    grey16 = Image.fromarray(np.linspace(0, 65535, 64 * 30).reshape(64, 30).astype(np.uint16))
    clear = Image.new("RGBA", (10, 90), (255, 0, 0, 0))
    for picture in (grey16, clear, Image.new("1", (3, 3)), Image.new("P", (64, 1)), Image.new("CMYK", (9, 9))):
        assert Squash()(picture).shape == (3, 64, 64)
    assert Squash()(clear).min() == 1 and Squash(background="black")(clear).max() == 0
    assert Squash().fingerprint() != Squash(background="black").fingerprint()
    with pytest.raises(ImageError):
        Squash()(b"nothing")


def test_planted_copies_are_found_with_their_originals(pictures, copies):
    planted, truth = copies
    found = find_duplicates(pictures, planted, hashes=False)
    best = found.pairs.loc[found.pairs.groupby("b").similarity.idxmax()].set_index("b")
    right = (best.a.reindex(range(len(truth))).to_numpy() == truth.original) & (truth.change != "mirror")
    assert right.sum() / (truth.change != "mirror").sum() > 0.9
    assert found.pairs.hash_distance.isna().all() and found.measured["hash_distance"] is None


def test_hash_distance_is_imagehashs(pictures, copies):
    imagehash = pytest.importorskip("imagehash")
    planted = copies[0][:30]
    found = find_duplicates(pictures, planted, floor=-1, hash_distance=BITS)
    for row in found.pairs.sample(40, random_state=0).itertuples():
        assert row.hash_distance == imagehash.phash(pictures[row.a]) - imagehash.phash(planted[row.b])


def test_search_equals_brute_force(pictures, copies):
    planted = copies[0][:50]
    found = find_duplicates(pictures, planted, hashes=False, floor=0.3, k=len(pictures), chunk=7)
    detector = load_detector()
    a, b = (embed_images(detector, Squash(), p, progress=False).features for p in (pictures, planted))
    cosine = (a @ b.T).numpy()
    expected = {(int(i), int(j)) for i, j in np.argwhere(cosine >= 0.3)}
    assert set(zip(found.pairs.a, found.pairs.b)) == expected
    assert np.allclose(found.pairs.similarity, cosine[found.pairs.a, found.pairs.b], atol=1e-5)


def test_within_one_set_is_each_pair_once_and_nothing_with_itself(pictures):
    doubled = [*pictures, *pictures[:5]]
    found = find_duplicates(doubled, floor=0.2)
    assert (found.pairs.a < found.pairs.b).all() and not found.pairs.duplicated(["a", "b"]).any()
    sure = found.above(0.9999)
    assert {(i, len(pictures) + i) for i in range(5)} <= set(zip(sure.a, sure.b))
    assert found.overlap(0.9999)[[0, 1, 2, 3, 4, *range(len(pictures), len(pictures) + 5)]].all()


def test_faiss_finds_the_same(pictures, copies):
    pytest.importorskip("faiss")
    planted = copies[0][:50]
    exact, indexed = (find_duplicates(pictures, planted, index=kind) for kind in (None, "Flat"))
    columns = ["a", "b", "similarity", "hash_distance"]
    assert set(zip(exact.pairs.a, exact.pairs.b)) == set(zip(indexed.pairs.a, indexed.pairs.b))
    assert np.allclose(exact.pairs[columns].sort_values(["a", "b"]), indexed.pairs[columns].sort_values(["a", "b"]), atol=1e-5)


def test_cache_gives_the_same_and_is_used(pictures, tmp_path):
    cache = EmbeddingCache(tmp_path)
    plain, first, second = (find_duplicates(pictures, hashes=False, cache=c) for c in (None, cache, cache))
    assert cache.count() == len(pictures)
    assert plain.pairs.equals(first.pairs) and first.pairs.equals(second.pairs)


def test_unreadable_pictures_are_counted_and_never_paired(pictures):
    with pytest.warns(UserWarning, match="could not be read"):
        found = find_duplicates([b"", *pictures[:5]], [pictures[2], b"broken", pictures[3]])
    assert [i for i, *_ in found.errors_a] == [0] and [i for i, *_ in found.errors_b] == [1]
    assert not (found.pairs.a == 0).any() and not (found.pairs.b == 1).any()
    assert found.ok_b.tolist() == [True, False, True] and found.share(0.9).n == 2
    with pytest.warns(UserWarning):
        nothing = find_duplicates([b"", b"x"], pictures[:2])
    assert len(nothing.pairs) == 0 and not nothing.overlap(0.9).any()
    with pytest.raises(ValueError, match="set B has no pictures"):
        find_duplicates(pictures, [])


def test_plain_frames_are_marked():
    black, nearly = Image.new("RGB", (64, 64)), Image.fromarray(np.random.default_rng(0).integers(0, 4, (64, 64, 3)).astype(np.uint8))
    found = find_duplicates([black], [black, nearly, emoji.load("noto").pictures[0]])
    assert found.plain_b.tolist() == [True, True, False]


def test_places(pictures, tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(pictures.encoded(i))
    (tmp_path / "notes.txt").write_text("no picture")
    folder = open_pictures(tmp_path)
    assert folder.names == [f"{i}.png" for i in range(6)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(6):
            tar.add(tmp_path / f"{i}.png", f"{i}.png"), tar.add(tmp_path / "notes.txt", f"{i}.cls")
    shard = open_pictures(tmp_path / "a.tar")
    assert [shard[i] for i in range(6)] == [pictures.encoded(i) for i in range(6)] and shard.names[0] == "a/0.png"
    (tmp_path / "b.csv").write_text("filepath,caption\n" + "".join(f"{i}.png,picture {i}\n" for i in range(6)) + "gone.png,none\n")
    with pytest.warns(UserWarning, match="could not be read"):
        found = find_duplicates(tmp_path / "b.csv", shard)
    same = found.above(0.9999).sort_values("a", ignore_index=True)
    assert same[["a", "b"]].to_numpy().tolist() == [[i, i] for i in range(6)]
    assert (same.a_name[0], same.b_name[0]) == ("b.csv#0", "a/0.png") and [i for i, *_ in found.errors_a] == [6]
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(OSError, match="cut.tar"):
        open_pictures(tmp_path / "cut.tar")
    with pytest.raises(FileNotFoundError):
        open_pictures(tmp_path / "nowhere.csv")


def test_a_missing_extra_says_how_to_get_it(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ImportError, match=r"clip_lab\[overlap\]"):
        hash_pictures(pictures[:1])
    assert find_duplicates(pictures[:3], pictures[:3], hashes=False).overlap(0.99).all()


def test_thresholds_outside_what_was_kept_are_refused(pictures):
    found = find_duplicates(pictures, pictures[:4], floor=0.6, hash_distance=8)
    for threshold, bits, message in ((0.5, None, "below the floor"), (0.7, 9, "above the 8")):
        with pytest.raises(ValueError, match=message):
            found.above(threshold, bits)
    above, below = borderline(found, 0.8)
    assert (above.similarity >= 0.8).all() and (below.similarity < 0.8).all()


def test_scores_of_planted_copies_by_hand():
    table = score_planted([0.9, 0.9, 0.4, 0.9, 0.1], [1, 2, 3, 4, 5], [1, 7, 3, -1, -1], ["a", "a", "b", "s", "s"], 0.5).set_index(["measure", "kind"])
    assert table.estimate.to_dict() == {("recall", "a"): 0.5, ("recall", "b"): 0.0, ("false alarms", "s"): 0.5, ("precision", "all"): pytest.approx(1 / 3)}
    assert table.n.tolist() == [2, 1, 2, 3]


def test_held_out_folders_do_not_move():
    folders = clipart.load().table.folder
    assert held_out(folders).sum() == 917 and held_out(["animals"] * 2).tolist() == [held_out(["animals"])[0]] * 2
