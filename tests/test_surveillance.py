"""The surveillance audit: what is in a drawn scene, by its pixels; close captions that are false; close-choice rates, areas and identities by brute force; wrong input."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from statsmodels.stats.proportion import proportion_confint

import clip_lab
from clip_lab.audits import surveillance as s
from clip_lab.data import personas, scenes
from clip_lab.data.found import LayoutError
from clip_lab.evals.suite import run


@pytest.fixture(scope="module")
def made(): return scenes.scenes()


# ------------------------------------------------------------------ scenes say what is in them
def test_things_are_where_the_list_says(made):
    "Only from the pixels: a beach by day has three flat colours, and whatever is far from them lies in the boxes, and fills them."
    rows, looked = scenes.things(), 0
    for i in np.flatnonzero((made.table.place == "beach") & (made.table.light == "day") & (made.table.noise < 4)):
        pixels = np.asarray(made.pictures[int(i)]).astype(int)
        packed, often = np.unique(pixels // 16 @ [256, 16, 1], return_counts=True)
        common = packed[often > 250]
        colours = np.stack([common // 256, common // 16 % 16, common % 16], 1) * 16 + 8
        far = np.abs(pixels[:, :, None] - colours).max(-1).min(-1) > 30
        box = np.zeros(far.shape, dtype=bool)
        for r in rows[rows.picture == i].itertuples():
            box[max(0, r.top - 2):r.top + r.height + 2, max(0, r.left - 2):r.left + r.width + 2] = True
            if r.size >= 15 and r.thing in ("ball", "dog", "backpack", "crab", "turtle"):
                assert far[r.top:r.top + r.height, r.left:r.left + r.width].sum() > 0.3 * r.pixels, (i, r)
                looked += 1
        assert (far & ~box).mean() < 0.002, i
    assert looked > 20


def test_boxes_fit_and_do_not_overlap(made):
    for _, r in scenes.things().groupby("picture"):
        assert (r.left >= 0).all() and (r.top >= 0).all() and (r.left + r.width <= scenes.SIDE).all() and (r.top + r.height <= scenes.SIDE).all()
        taken = np.zeros((scenes.SIDE, scenes.SIDE), dtype=int)
        for b in r.itertuples(): taken[b.top:b.top + b.height, b.left:b.left + b.width] += 1
        assert taken.max() == 1
        assert ((r[["width", "height"]].max(axis=1) - r["size"]).abs() <= 2).all() and (r.pixels <= r.width * r.height).all()


def test_table_and_list_agree(made):
    rows = scenes.things()
    assert rows.groupby("picture").thing.agg(lambda t: sorted(set(t))).tolist() == made.table.things.tolist()
    for place, caption, there in zip(made.table.place, made.table.caption, made.table.things):
        said = caption.split(" with ")
        assert said[0].split(" ", 1)[1] == place and said[1].split(" ", 1)[1] in there


def test_scenes_are_the_same_each_time(made):
    before = made.data_hash
    scenes._made.cache_clear()
    assert scenes.scenes().data_hash == before != scenes.scenes(seed=1).data_hash


def test_place_and_targets_are_independent(made):
    "Neither the light nor another target tells much about a target."
    there = pd.DataFrame({t: made.table.things.map(lambda x: t in x) for t in scenes.TARGETS}).astype(float)
    assert (np.abs(np.corrcoef(there.T.to_numpy()) - np.eye(6)) < 0.15).all()
    assert (there.groupby(made.table.light).mean().sub(0.5).abs() < 0.12).all(axis=None)


def test_scenes_run_in_the_suite():
    model, preprocess = clip_lab.load()
    found = list(run(model, preprocess, [scenes.load()], ["zeroshot"], progress=False))
    assert {b.asked["target"] for b in found} == {"place", *scenes.TARGETS}
    assert all((b.rows.low <= b.rows.estimate).all() and (b.rows.n == 640).all() for b in found)


# ------------------------------------------------------------------ close captions
def parts(caption):
    place, thing = caption.split(" with ")
    return place.split(" ", 1)[1], thing.split(" ", 1)[1]

@pytest.mark.parametrize("edit", ["thing", "place"])
def test_no_close_caption_is_true(made, edit):
    frames, count = s.scene_frames(made, edit=edit, close=1000), 0
    for true, close, others, place, there in zip(frames.captions, frames.close, frames.others, made.table.place, made.table.things):
        was = parts(true)
        for caption in close:
            now = parts(caption)
            assert (was[0] == now[0]) + (was[1] == now[1]) == 1                     # one word was exchanged
            assert not (now[0] == place and now[1] in there)                        # and the sentence is false
            assert now[1] not in there if edit == "thing" else now[0] != place
            count += 1
        assert all(parts(o)[0] != place for o in others)
    assert count > 3000


def test_close_captions_mend_articles_and_keep_capitals():
    assert s.close_captions("There is an anchor", {"thing": ["anchor", "dog"]}) == ["There is a dog"]
    assert s.close_captions("A Dog and a dog", {"thing": ["dog", "owl"]}) == ["An owl and a dog", "A Dog and an owl"]
    assert s.close_captions("a dogfight, a cartoon, a dog", {"thing": ["dog", "car", "cat"]}, {"car"}) == ["a dogfight, a cartoon, a cat"]     # whole words only
    assert s.close_captions("a dog", {"thing": ["dog", "cat"]}, {"cat"}) == []


def test_limit_draws_the_same_ones_again():
    words = {"thing": ["dog", *"abcdefgh"]}
    drawn = [s.close_captions("the dog", words, limit=3, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(map(tuple, drawn))) > 1 and all(len(set(d)) == 3 for d in drawn)


# ------------------------------------------------------------------ who was chosen
def ragged(n=200, seed=0):
    rng = np.random.default_rng(seed)
    others = [[f"o{k}" for k in rng.choice(20, rng.integers(5, 9), replace=False)] for _ in range(n)]
    close = [[f"c{k}" for k in rng.choice(10, rng.integers(0, 4), replace=False)] for _ in range(n)]
    return s.Frames("ragged", range(n), [f"t{k}" for k in rng.integers(6, size=n)], others, close)


def test_rates_by_brute_force():
    frames, make = ragged(), torch.Generator().manual_seed(0)
    texts = {t: F.normalize(torch.randn(8, generator=make), dim=0) for t in frames.texts()}
    x = F.normalize(torch.randn(len(frames), 8, generator=make), dim=1)
    rows = s.stress_rows(s.choose(x, texts, frames)).set_index(["test", "metric"])
    right = stressed = close = asked = 0
    for i in range(len(frames)):
        score = {t: float(x[i] @ texts[t]) for t in (frames.captions[i], *frames.others[i], *frames.close[i])}
        right += max([frames.captions[i], *frames.others[i]], key=score.get) == frames.captions[i]
        if frames.close[i]:
            best = max(score, key=score.get)
            asked, stressed, close = asked + 1, stressed + (best == frames.captions[i]), close + (best in frames.close[i])
    assert 100 < asked < 200 and min(right, stressed, close) > 5
    for key, k, n in ((("coarse", "accuracy"), right, 200), (("stressed", "accuracy"), stressed, asked), (("stressed", "close caption chosen"), close, asked)):
        row = rows.loc[key]
        assert row.estimate == k / n and row.n == n
        assert np.allclose((row.low, row.high), proportion_confint(k, n, method="wilson"))
    assert np.isclose(rows.chance[("stressed", "close caption chosen")], np.mean([len(c) / (1 + len(o) + len(c)) for o, c in zip(frames.others, frames.close) if c]))


def test_a_planted_close_rate_is_recovered():
    "Scores made so that 40 % prefer the close caption, 50 % the true one, which also wins ties: the rates lie inside their intervals 95 times of a hundred or so."
    letters, n, inside = ["t", *"abcdef", "z"], 400, np.zeros(3)
    texts = dict(zip(letters, torch.eye(8)))
    frames = s.Frames("planted", range(n), ["t"] * n, [list("abcdef")] * n, [["z"]] * n)
    for seed in range(100):
        won = np.random.default_rng(seed).choice([7, 0, 3], n, p=[0.4, 0.5, 0.1])
        rows = s.stress_rows(s.choose(torch.eye(8)[won], texts, frames))
        inside += (rows.low <= [0.9, 0.5, 0.4]) & ([0.9, 0.5, 0.4] <= rows.high)
    assert (inside >= 89).all()       # 95 expected, nearly three standard deviations


def test_sequences_widen_the_interval():
    answers = pd.DataFrame(dict(right=np.repeat([True, False] * 6, 40), stressed="", options=6, close=0))
    plain, grouped = s.stress_rows(answers).iloc[0], s.stress_rows(answers, np.repeat(np.arange(12), 40)).iloc[0]
    assert plain.estimate == grouped.estimate == 0.5 and grouped.high - grouped.low > 4 * (plain.high - plain.low) and "12 sequences" in grouped.method
    with pytest.raises(ValueError, match="one sequence"): s.stress_rows(answers, ["a"] * 480)
    with pytest.raises(ValueError, match="sequences of 3 frames"): s.stress_rows(answers, list("abc"))


def test_unreadable_frames_are_left_out_and_listed(made, tmp_path):
    model, preprocess = clip_lab.load()
    some = made.select(np.arange(0, 640, 40))
    whole = s.scene_frames(some)
    (broken := tmp_path / "broken.png").write_bytes(b"no picture")
    pictures = [*(some.pictures[i] for i in range(3)), str(broken), *(some.pictures[i] for i in range(4, 16))]
    frames = s.Frames("half", pictures, whole.captions, whole.others, whole.close)
    with pytest.warns(UserWarning, match="could not be read"): found = s.stress_test(model, preprocess, frames)
    assert found.rows.n.tolist() == [15] * 3 and len(found.unreadable) == 1 and 3 not in found.answers.frame.tolist() and found.answers.frame.max() == 15
    full = s.stress_test(model, preprocess, whole).answers.drop(index=3).reset_index(drop=True)
    pd.testing.assert_frame_equal(full, found.answers)


@pytest.mark.parametrize("change, message", [
    (dict(captions=["a"]), "captions of 1 frames; there are 2"),
    (dict(others=[list("bcdef"), list("abcde")]), "frame 1: 'a' stands there twice"),
    (dict(close=[["b"], ["x"]]), "frame 0: 'b' stands there twice"),
    (dict(close=[[""], ["x"]]), "frame 0: an empty caption"),
    (dict(others=[list("bcde"), list("bcdef")]), "frame 0: 5 captions to choose from; expected at least 6"),
    (dict(pictures=[]), "no frames"),
])
def test_frames_that_do_not_fit(change, message):
    given = dict(pictures=[1, 2], captions=["a", "a"], others=[list("bcdef")] * 2, close=[["x"], ["y"]]) | change
    with pytest.raises(ValueError, match=message): s.Frames("mine", **given)


def test_features_that_do_not_fit():
    frames = s.Frames("mine", range(2), ["a", "a"], [list("bcdef")] * 2, [[], []])
    texts = dict(zip("abcdef", torch.eye(6)))
    with pytest.raises(ValueError, match="features of 3 pictures for 2 frames"): s.choose(torch.eye(6)[:3], texts, frames)
    with pytest.raises(ValueError, match="1 captions have no features, such as 'f'"): s.choose(torch.eye(6)[:2], {k: v for k, v in texts.items() if k != "f"}, frames)
    with pytest.raises(ValueError, match="frame 1 has no finite features"): s.choose(torch.tensor([[1.0] * 6, [float("nan")] * 6]), texts, frames)
    assert s.stress_rows(s.choose(torch.eye(6)[:2], texts, frames)).test.tolist() == ["coarse"]      # nothing close, no stress


# ------------------------------------------------------------------ small things
def test_areas_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores, present = rng.integers(0, 12, (150, 3)) - 5.5, rng.random((150, 3)) < 0.4          # with many ties
    rows = s.presence_rows(scores, present, ["x", "y", "z"], n_resamples=50)
    areas = [roc_auc_score(present[:, t], scores[:, t]) for t in range(3)]
    got = rows[rows.metric == "AUC"].estimate
    assert np.allclose(got, [*areas, np.mean(areas)])
    weight = rng.multinomial(150, np.full(150, 1 / 150), 5)
    again = [roc_auc_score(np.repeat(present[:, 0], w), np.repeat(scores[:, 0], w)) for w in weight]
    assert np.allclose(s._areas(scores[:, 0], present[:, 0], weight.astype(float)), again)
    right = (scores > 0) == present
    assert np.allclose(rows[rows.metric == "accuracy"].estimate, [*right.mean(0), right.mean()])


def test_asked_pictures_only():
    rng = np.random.default_rng(1)
    scores, present, asked = rng.standard_normal((80, 2)), rng.random((80, 2)) < 0.5, rng.random((80, 2)) < 0.6
    rows = s.presence_rows(scores, present, ["x", "y"], asked, n_resamples=20)
    assert np.isclose(rows.query("thing == 'x' and metric == 'AUC'").estimate.item(), roc_auc_score(present[asked[:, 0], 0], scores[asked[:, 0], 0]))
    assert rows.query("thing == 'y'").n.unique().tolist() == [asked[:, 1].sum()]


@pytest.mark.parametrize("scores, present, message", [
    (np.zeros((4, 1)), np.ones((4, 1), dtype=bool), "'dog': all 4 pictures are of one class"),
    (np.zeros((4, 2)), np.ones((4, 1), dtype=bool), "expected \\(n, things\\)"),
    (np.full((4, 1), np.nan), np.array([[True], [False]] * 2), "'dog': score 0 is not finite"),
    (np.zeros((4, 1)), np.array([[1], [0]] * 2), "expected True and False"),
])
def test_presence_that_does_not_fit(scores, present, message):
    with pytest.raises(ValueError, match=message): s.presence_rows(scores, present, ["dog"], n_resamples=5)


# ------------------------------------------------------------------ worse cameras
def test_degrade_is_what_it_says():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8))
    assert s.degrade(picture, size=30).size == (20, 30) and s.degrade(picture, size=500).size == (40, 60)
    small = np.asarray(s.degrade(picture, size=30), dtype=float)
    blocks = np.asarray(picture, dtype=float).reshape(30, 2, 20, 2, 3).mean((1, 3))
    assert np.abs(small - blocks).max() <= 1
    assert np.asarray(s.degrade(picture, blur=3), dtype=float).std() < 0.4 * np.asarray(picture, dtype=float).std()
    for wrong in (dict(size=0), dict(blur=-1), dict(noise=-1)):
        with pytest.raises(ValueError, match="expected at least one pixel"): s.degrade(picture, **wrong)


def test_each_picture_has_noise_of_its_own():
    grey = [Image.new("RGB", (20, 20), "grey")] * 2
    first, second = s.Degraded(grey, noise=10, seed=1), s.Degraded(grey, noise=10, seed=2)
    assert first[0] == first[0] != first[1] and first[0] != second[0] and len(first) == 2


def test_settings_are_checked(made):
    model, preprocess = clip_lab.load()
    frames = s.scene_frames(made.select(np.arange(0, 640, 64)))
    with pytest.raises(ValueError, match="has zoom; expected some of size, blur, noise"): s.degradation(model, preprocess, frames, [{"zoom": 2}])
    with pytest.raises(ValueError, match="no settings"): s.degradation(model, preprocess, frames, [])


# ------------------------------------------------------------------ frames of one's own
@pytest.fixture
def folder(tmp_path):
    for i in range(7): Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path

def csv(folder, **change):
    table = pd.DataFrame(dict(frame=[f"{i}.png" for i in range(7)], caption=[f"a view of place {i}" for i in range(7)], close=[f"a sight of place {i}|a view of no place {i}" for i in range(7)])).assign(**change)
    table.to_csv(folder / "f.csv", index=False)
    return folder / "f.csv"


def test_own_frames_are_read_in_order(folder):
    frames = s.read_frames(folder, csv(folder, sequence=list("aabbccd")))
    assert [p.getpixel((0, 0))[0] for p in frames.pictures] == [30 * i for i in range(7)]
    assert frames.captions[3] == "a view of place 3" and frames.close[3] == ["a sight of place 3", "a view of no place 3"]
    assert frames.others[3] == [f"a view of place {i}" for i in (0, 1, 2, 4, 5, 6)] and frames.sequences == list("aabbccd")


def test_own_close_captions_are_generated_only_where_truth_is_told(folder):
    file = csv(folder, close="", true=["place|0"] * 7)
    frames = s.read_frames(folder, file, {"what": ["view", "place", "map"]}, limit=5)
    assert frames.close[0] == ["a map of place 0", "a view of view 0", "a view of map 0"]        # not 'a place of place': place is true
    with pytest.raises(LayoutError, match="true not among"): s.read_frames(folder, csv(folder), {"what": ["view"]})


@pytest.mark.parametrize("change, message", [
    (dict(frame="x.png"), "row 2: .*x.png is not there"), (dict(frame="/etc/passwd"), "row 2: /etc/passwd is outside"), (dict(frame="../0.png"), "is outside"),
    (dict(caption=""), "row 2: frame and caption must not be empty"), (dict(sequence=["a"] * 6 + [""]), "row 8: no sequence"), (dict(caption="the same"), "captions to choose from"),
])
def test_wrong_csv(folder, change, message):
    with pytest.raises(ValueError, match=message): s.read_frames(folder, csv(folder, **change))


def test_csv_that_is_none(folder):
    with pytest.raises(LayoutError, match="is not there; expected a CSV"): s.read_frames(folder, folder / "none.csv")
    (file := folder / "f.csv").write_text("picture,text\n")
    with pytest.raises(LayoutError, match="frame, caption, close not among picture, text"): s.read_frames(folder, file)
    file.write_text("frame,caption,close\n")
    with pytest.raises(LayoutError, match="no frames"): s.read_frames(folder, file)


# ------------------------------------------------------------------ identity
def test_identity_by_brute_force():
    make, m = torch.Generator().manual_seed(0), 60
    people = F.normalize(torch.randn(m, 6, generator=make), dim=1)
    gallery_of, probe_of = np.repeat(np.arange(m), 2), np.random.default_rng(0).permutation(m)
    gallery = F.normalize(people[gallery_of] + 0.4 * torch.randn(2 * m, 6, generator=make), dim=1)
    probes = F.normalize(people[probe_of] + 0.4 * torch.randn(m, 6, generator=make), dim=1)
    rows = s.identity(gallery, gallery_of, probes, probe_of, (7, 60), seed=3)
    order, right, asked = np.random.default_rng(3).permutation(m), 0, 0
    for block in (set(order[k:k + 7].tolist()) for k in range(0, 56, 7)):
        for x, who in zip(probes, probe_of):
            if who in block:
                nearest = max((i for i in range(2 * m) if gallery_of[i] in block), key=lambda i: float(x @ gallery[i]))
                right, asked = right + (gallery_of[nearest] == who), asked + 1
    assert rows.estimate[0] == right / asked and rows.n.tolist() == [56, 60] and rows.galleries.tolist() == [8, 1] and 0.05 < rows.estimate[1] < rows.estimate[0] < 1
    assert rows.estimate[1] == np.mean([gallery_of[int((gallery @ x).argmax())] == who for x, who in zip(probes, probe_of)])
    assert np.allclose(rows.chance, [1 / 7, 1 / 60])


def test_identity_of_noise_is_chance():
    make = torch.Generator().manual_seed(1)
    a, b = (F.normalize(torch.randn(2000, 16, generator=make), dim=1) for _ in range(2))
    rows = s.identity(a, range(2000), b, range(2000), (10, 100))
    assert ((rows.low <= rows.chance) & (rows.chance <= rows.high)).all()


def test_identity_that_does_not_fit():
    x = torch.eye(4)
    with pytest.raises(ValueError, match="a gallery of 5; there are 4"): s.identity(x, range(4), x, range(4), (5,))
    with pytest.raises(ValueError, match="nothing in the gallery, such as 9"): s.identity(x, range(4), x, [0, 1, 2, 9], (4,))
    with pytest.raises(ValueError, match="expected one each"): s.identity(x, range(3), x, range(4), (2,))
    with pytest.raises(ValueError, match="not finite"): s.identity(x * float("nan"), range(4), x, range(4), (2,))


def test_table_8_stands_beside_with_its_mark():
    mine = pd.DataFrame(dict(gallery=[100], galleries=[1], estimate=[0.2], low=[0.1], high=[0.3], n=[100], chance=[0.01]))
    both = s.beside_table8(mine, "mine")
    theirs = both[both.mark != "measured"]
    assert len(theirs) == 12 and set(theirs.mark) == {"[P]"} and theirs.low.isna().all() and (theirs.chance == 1 / theirs.gallery).all()
    assert theirs.loc[theirs.series.str.startswith("ViT-L/14"), "estimate"].round(3).tolist() == [0.592, 0.433, 0.422]


def test_personas_are_who_they_say():
    crowd = personas.personas(200, shots=3)
    assert crowd.table.groupby("persona")["shot"].agg(list).map(tuple).unique().tolist() == [(0, 1, 2)]
    assert len(set(crowd.pictures.sources)) == 600                                               # no view twice, so nothing is found by its bytes
    assert len(crowd.table.drop_duplicates(["persona", *personas.TRAITS])) == 200 == crowd.table.name.nunique()
    before = crowd.data_hash
    personas._made.cache_clear()
    assert personas.personas(200, shots=3).data_hash == before
    with pytest.raises(ValueError, match="at least one picture"): personas.personas(5, shots=0)


def test_celeba_wants_an_acknowledgement(tmp_path):
    (tmp_path / "img_align_celeba").mkdir()
    names = [f"{i:06}.jpg" for i in (1, 2, 3)]
    for i, name in enumerate(names): Image.new("RGB", (4, 4), (80 * i, 0, 0)).save(tmp_path / "img_align_celeba" / name)
    (tmp_path / "list_attr_celeba.txt").write_text("3\nMale Young\n" + "".join(f"{n} 1 -1\n" for n in names))
    (tmp_path / "list_eval_partition.txt").write_text("".join(f"{n} {i}\n" for i, n in enumerate(names)))
    for wrong in ("", "yes", s.ACKNOWLEDGE[:-1]):
        with pytest.raises(ValueError, match="out of scope"): s.celeba_identities(tmp_path, wrong)
    with pytest.raises(LayoutError, match="identity_CelebA.txt"): s.celeba_identities(tmp_path, s.ACKNOWLEDGE)
    (tmp_path / "identity_CelebA.txt").write_text(f"{names[2]} 77\n{names[0]} 5\n{names[1]} 77\n")
    data = s.celeba_identities(tmp_path, s.ACKNOWLEDGE)
    assert data.table.persona.tolist() == [5, 77, 77] and data.table.split.tolist() == ["train", "validation", "test"] and len(data.pictures) == 3
    (tmp_path / "identity_CelebA.txt").write_text(f"{names[2]} 77\n")
    with pytest.raises(LayoutError, match="2 pictures have no identity"): s.celeba_identities(tmp_path, s.ACKNOWLEDGE)
