"RareAct's measure against a restatement by plain loops, whose average precision is a sum over ranks written out here."
import numpy as np
import pandas as pd
import pytest

from clip_lab.evals.actions import COLUMNS, check_clips, groups, mean_precision, pair_precision


def made(seed, clips=160, ties=False):
    "Random annotations of 12 pairs of 4 verbs and 3 nouns, a few clips to a video, and scores."
    rng = np.random.default_rng(seed)
    c = rng.integers(12, size=clips)
    table = pd.DataFrame(dict(video_id=rng.integers(50, size=clips).astype(str), class_id=c, verb=[f"verb {i // 3}" for i in c], noun=[f"noun {i % 3}" for i in c], annotation=rng.choice(5, size=clips, p=[.3, .4, .1, .1, .1])))
    scores = rng.random((clips, 12))
    return table, scores.round(1) if ties else scores


def precision(truth, scores, weight):
    "Average precision of weighted rows, rows of one score taken together."
    total, value, found, seen = sum(w for t, w in zip(truth, weight) if t), 0.0, 0.0, 0.0
    for s in sorted(set(scores), reverse=True):
        now = sum(w for t, x, w in zip(truth, scores, weight) if x == s and t)
        seen += sum(w for x, w in zip(scores, weight) if x == s)
        found += now
        value += now / total * found / seen
    return value


def by_loops(table, scores):
    values = {}
    for c in sorted(set(table.class_id)):
        verb, noun = table[table.class_id == c][["verb", "noun"]].iloc[0]
        sides = {"yes": [], "no": [], "nearly": []}
        for i, r in enumerate(table.itertuples()):
            if r.class_id == c: sides["yes" if r.annotation == 1 else "no" if r.annotation == 0 else "nearly"].append(i)
            elif r.annotation == 1: sides["nearly" if r.verb == verb or r.noun == noun else "no"].append(i)
        if not sides["yes"]: continue
        rows = [(i, side) for side, at in sides.items() for i in at]
        weight = [1 / sum(table.video_id[j] == table.video_id[i] for j in sides[side]) for i, side in rows]
        values[c] = precision([side == "yes" for _, side in rows], [scores[i, c] for i, _ in rows], weight)
    return values


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_pair_as_by_loops(seed, ties):
    table, scores = made(seed, ties=ties)
    found = pair_precision(scores, table).set_index("class_id").estimate
    assert found.to_dict() == pytest.approx(by_loops(table, scores))


def test_one_clip_of_each_video_is_the_weighted_one():
    table, scores = made(5)
    alone = table.assign(video_id=[str(i) for i in range(len(table))])
    a, b = pair_precision(scores, alone), pair_precision(scores, alone, draws=3)
    assert a.estimate.tolist() == pytest.approx(b.estimate.tolist()) and (a.positives == a.videos).all()


def test_draws_have_a_seed_and_take_one_clip_of_each_video():
    table, scores = made(6)
    one, same, other = (pair_precision(scores, table, draws=5, seed=s).estimate for s in (0, 0, 1))
    assert one.tolist() == same.tolist() != other.tolist()
    # where all clips of a video score alike, it does not matter which is drawn, and the weighted number is the same
    table = table[table.annotation <= 1].reset_index(drop=True)
    alike = np.random.default_rng(0).random((50, 12))[table.video_id.astype(int)]
    assert pair_precision(alike, table).estimate.tolist() == pytest.approx(pair_precision(alike, table, draws=2).estimate.tolist())


def test_right_scores_are_one_and_guesses_are_chance():
    table, _ = made(7, 4000)
    right = np.zeros((len(table), 12))
    right[np.arange(len(table)), table.class_id] = table.annotation == 1
    assert pair_precision(right, table).estimate.tolist() == pytest.approx([1] * 12)
    guess = pair_precision(np.random.default_rng(0).random(right.shape), table)
    assert guess.estimate.mean() == pytest.approx(guess.chance.mean(), abs=0.05)
    e = mean_precision(guess)
    assert e.low < e.value < e.high and e.n == 12


def test_the_table_may_be_a_file_and_what_is_wrong_is_named(tmp_path):
    table, scores = made(8)
    table.to_csv(tmp_path / "rareact.csv", index=False)
    pd.testing.assert_frame_equal(pair_precision(scores, tmp_path / "rareact.csv"), pair_precision(scores, table))
    for change, message in ((dict(annotation=9), "expected 0 to 4"), (dict(verb="wash"), "a class is one pair"), (dict(annotation=0), "nothing can be ranked")):
        with pytest.raises(ValueError, match=message): groups(table.assign(**change))
    with pytest.raises(ValueError, match="lack noun"): check_clips(table.drop(columns="noun"))
    with pytest.raises(ValueError, match="row 3 are not finite"): pair_precision(np.where(np.arange(len(scores))[:, None] == 3, np.nan, scores), table)
    with pytest.raises(ValueError, match="expected .160 clips"): pair_precision(scores[1:], table)
    assert list(table.columns) == COLUMNS
