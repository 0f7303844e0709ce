"""The four predictive and contrastive heads of Figure 2: chance, overfitting, references, leaks, smoothing, messages."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from clip_lab.model import CLIPConfig, build
from clip_lab.tokenizer import Tokenizer
from clip_lab.train.objectives import contrastive_loss
from clip_lab.train.predictive import BagOfWords, BagOfWordsContrastive, CaptionLM, NGrams, Vocabulary, vocabulary, words

TEXTS = ["a red heart", "a red car", "hot dog", "a dog", "a hot day, so hot", "snowman"]
TOKENIZER = Tokenizer(600, context_length=24)
WORDS, GRAMS = vocabulary(TEXTS, min_count=1), vocabulary(TEXTS, min_count=1, max_n=3)
MAKE = {"lm": lambda: CaptionLM(8, TOKENIZER, 32, 2, 2), "bow": lambda: BagOfWords(8, WORDS),
        "ngrams": lambda: NGrams(8, GRAMS), "contrastive": lambda: BagOfWordsContrastive(8, WORDS, 16)}


def features(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=MAKE)
def head(request):
    torch.manual_seed(0)
    return MAKE[request.param]()


def silent(head):
    for p in head.parameters(): torch.nn.init.zeros_(p)
    return head


# --- the vocabulary

def test_vocabulary_counts_captions_not_occurrences():
    v = vocabulary(["hot hot hot", "dog", "a dog", "Dog!"], min_count=2)
    assert v.grams == (("dog",),)
    assert v.known(["hot", "the DOG", "cat"]) == 1 / 3 and v.ids("dog hot dog") == [0, 0]


def test_kept_phrases_bring_their_words():
    v = vocabulary(TEXTS, min_count=2, max_n=3)
    assert ("a", "red") in v.grams and ("red", "heart") not in v.grams
    assert {(w,) for g in v.grams for w in g} <= set(v.grams)
    assert [len(g) for g in v.grams] == sorted(len(g) for g in v.grams)


def test_an_empty_vocabulary_is_an_error_with_its_numbers():
    with pytest.raises(ValueError, match="5 or more of 6 captions.*lower min_count"): vocabulary(TEXTS, min_count=5)
    with pytest.raises(ValueError, match="of 0 captions"): vocabulary([])


def test_words_are_cleaned_as_clip_cleans_them():
    assert words("  Piñata &amp; CONFETTI, 2nd. ") == ["piñata", "confetti", "2nd"]


# --- chance

@pytest.mark.parametrize("name,chance", [("lm", math.log(TOKENIZER.vocab_size)), ("bow", math.log(len(WORDS)))])
def test_loss_at_chance_is_the_log_of_the_vocabulary(name, chance):
    assert silent(MAKE[name]()).loss(features(6), TEXTS).item() == pytest.approx(chance, abs=1e-5)


def test_loss_at_chance_contrastive_is_log_n():
    head = MAKE["contrastive"]()
    assert head.loss(features(1).expand(6, -1), ["a dog"] * 6).item() == pytest.approx(math.log(6), abs=1e-5)


def test_loss_at_chance_ngrams_by_hand():
    head = silent(MAKE["ngrams"]())
    n_words, lam = len(WORDS), head.smoothing
    assert head.loss(features(1), ["snowman"]).item() == pytest.approx(math.log(n_words), abs=1e-5)
    # "dog" follows "hot" in one of its two continuations (dog, day); "a ... , so hot" ends the caption
    two = lam / 2 + (1 - lam) / n_words
    assert head.loss(features(1), ["hot dog"]).item() == pytest.approx((math.log(n_words) - math.log(two)) / 2, abs=1e-5)


# --- references that nobody here wrote

def test_bag_of_words_is_torchs_cross_entropy_with_soft_targets():
    head = MAKE["bow"]()
    target = torch.zeros(6, len(WORDS))
    for row, text in zip(target, TEXTS): row[sorted(set(WORDS.ids(text)))] = 1
    want = F.cross_entropy(head.words(features(6)), target / target.sum(1, keepdim=True))
    assert head.loss(features(6), TEXTS).item() == pytest.approx(want.item(), abs=1e-5)


def test_language_model_is_torchs_cross_entropy_on_each_caption_alone():
    head, x = MAKE["lm"](), features(6)
    each = []
    for i, text in enumerate(TEXTS):
        row = torch.tensor([[TOKENIZER.sot, *TOKENIZER.encode(text), TOKENIZER.eot]])
        each.append(F.cross_entropy(head.logits(x[i:i + 1], row[:, :-1])[0], row[0, 1:]))
    assert head.loss(x, TEXTS).item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-5)      # padding and neighbours change nothing


def test_contrastive_is_clips_loss_masks_included():
    head, x = MAKE["contrastive"](), features(6)
    mask = torch.zeros(6, 6, dtype=torch.bool); mask[0, 3] = mask[3, 0] = True
    want = contrastive_loss(F.normalize(x, dim=-1), head.encode_text(TEXTS), head.logit_scale, mask, mask)
    assert head.loss(x, TEXTS, mask, mask).item() == pytest.approx(want.item(), abs=1e-6)
    assert head.loss(x, TEXTS).item() != pytest.approx(want.item(), abs=1e-4)


def smoothed(head: NGrams, scores: dict, history: tuple, word: str) -> float:
    "Jelinek-Mercer as a recursion over dictionaries."
    following = {g[-1]: math.exp(s) for g, s in scores.items() if g[:-1] == history}
    lower = smoothed(head, scores, history[1:], word) if history else None
    if not following: return lower
    own = following.get(word, 0) / sum(following.values())
    return own if lower is None else head.smoothing * own + (1 - head.smoothing) * lower


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "red", "hot", "dog", "so", "heart", "day"]), min_size=1, max_size=7), st.integers(0, 99))
def test_ngrams_are_the_recursion_in_plain_python(spoken, seed):
    torch.manual_seed(seed)
    head, x = MAKE["ngrams"](), 3 * features(1, seed)
    with torch.no_grad(): scores = dict(zip(GRAMS.grams, head.grams(x)[0].tolist()))
    want = [math.log(smoothed(head, scores, tuple(spoken[max(0, i - 2):i]), w)) for i, w in enumerate(spoken)]
    assert head.loss(x, [" ".join(spoken)]).item() == pytest.approx(-sum(want) / len(want), rel=1e-4)


@pytest.mark.parametrize("history", ["", "a", "a hot", "dog dog", "zebra", "a zebra"])
def test_smoothed_probabilities_sum_to_one(history):
    torch.manual_seed(1)
    head = MAKE["ngrams"]()
    terms = [head._terms(f"{history} {g[0]}")[-1] for g in GRAMS.grams if len(g) == 1]
    with torch.no_grad(): p = head.word_logp(head.observed(5 * features(1)).expand(len(terms), -1), terms).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)


def test_ngrams_stay_finite_where_one_history_scores_far_below_another():
    head = silent(MAKE["ngrams"]())
    with torch.no_grad(): head.grams.bias[len(WORDS):] = -500.0
    assert head.loss(features(6), TEXTS).isfinite()


# --- what a score means

def test_language_model_sees_no_future_and_the_picture_at_every_position():
    head, x = MAKE["lm"](), features(2)
    tokens = TOKENIZER(["a red heart", "a hot day"])
    for cut in range(1, 5):
        other = tokens.clone(); other[:, cut:] = 3
        assert torch.allclose(head.logits(x, tokens)[:, :cut], head.logits(x, other)[:, :cut], atol=1e-5)
    moved = (head.logits(x, tokens) - head.logits(x.flip(0), tokens)).abs().amax(-1)
    assert (moved > 1e-4).all()


def test_class_scores_do_not_depend_on_the_other_classes_or_the_chunk():
    head, x = MAKE["lm"](), features(5)
    names = ["dog", "a hot day, so hot", "snowman"]
    whole = head.class_scores(x, names)
    assert whole.shape == (5, 3)
    for i, name in enumerate(names): assert torch.allclose(head.class_scores(x, [name], chunk=1)[:, 0], whole[:, i], atol=1e-4)
    assert torch.allclose(head.class_scores(x, names, ["{}", "a {}"]), (whole + head.class_scores(x, names, "a {}")) / 2, atol=1e-4)


def test_scores_take_no_gradient_and_leave_the_mode_alone(head):
    x = features(3).requires_grad_()
    scores = head.train().class_scores(x, ["dog", "red car"])
    assert scores.shape == (3, 2) and not scores.requires_grad and scores.isfinite().all() and head.training


# --- learning

def test_six_pairs_are_learned_by_heart(head):
    torch.manual_seed(0)
    x, texts = torch.nn.Parameter(features(6)), ["red heart", "car", "hot dog", "day", "snowman", "so"]
    optimizer = torch.optim.AdamW([x, *head.parameters()], lr=2e-2, weight_decay=0)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(x, texts)
        loss.backward()
        optimizer.step()
    # Two of the captions have two words, which share one softmax: ln 2 each; the n-grams, told "red", are surer of "heart": q (1 - 0.8 q) is at best 0.3125.
    floor = {BagOfWords: 2 * math.log(2) / 6, NGrams: -math.log(0.3125) / 6}.get(type(head), 0)
    assert floor - 1e-4 <= loss.item() < floor + 0.05
    assert (head.class_scores(x, texts).argmax(1) == torch.arange(6)).all()


def test_gradients_reach_every_weight_of_tower_and_head(head):
    tower = build(CLIPConfig("tiny", 8, 32, (1, 1, 1, 1), 8, text_width=16, text_heads=1, text_layers=1), seed=0).visual.train()
    for block in tower.modules():       # the last norm of each block starts at zero, which hides the weights below it
        if hasattr(block, "bn3") and hasattr(block, "downsample"): torch.nn.init.ones_(block.bn3.weight)
    head.loss(tower(torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))), TEXTS).backward()
    for name, p in (*tower.named_parameters(), *head.named_parameters()):
        assert p.grad is not None and p.grad.isfinite().all() and (p.grad.abs().sum() > 0 or name.endswith("k_proj.bias")), name


def test_a_caption_without_a_known_word_teaches_nothing():
    for name in ("bow", "ngrams"):
        head, x = MAKE[name](), features(2).requires_grad_()
        head.loss(x, ["a dog", "zebra"]).backward()
        assert x.grad[0].abs().sum() > 0 and x.grad[1].abs().sum() == 0
        assert head.loss(x, ["a dog", "zebra"]).item() == pytest.approx(head.loss(x[:1], ["a dog"]).item() / 2, abs=1e-5)     # still counted


# --- messages

def test_pictures_and_captions_must_pair_up(head):
    with pytest.raises(ValueError, match="3 pictures but 6 captions"): head.loss(features(3), TEXTS)


@pytest.mark.parametrize("name", ["bow", "ngrams", "contrastive"])
def test_unknown_words_are_named(name):
    head = MAKE[name]()
    with pytest.raises(ValueError, match="no word of 2 class names.*'zebra', 'gnu'.*lower min_count"): head.class_scores(features(1), ["dog", "zebra", "gnu"])
    with pytest.raises(ValueError, match="none of the 2 captions.*'zebra'"): head.loss(features(2), ["zebra", "gnu"])


def test_smoothing_must_leave_the_single_words_a_share():
    with pytest.raises(ValueError, match="smoothing is 1"): NGrams(8, GRAMS, smoothing=1)


def test_a_prompt_too_long_for_the_language_model_is_refused_not_cut():
    with pytest.raises(ValueError, match="context length is 24"): MAKE["lm"]().class_scores(features(1), ["dog " * 30])


def test_a_template_needs_a_place_for_the_name(head):
    for wrong in ("a photo", "{} {}", []):
        with pytest.raises(ValueError, match="exactly one"): head.class_scores(features(1), ["dog"], wrong)


def test_a_vocabulary_is_plain_data():
    assert Vocabulary((("a",), ("b",))) == Vocabulary((("a",), ("b",))) and len(WORDS) == 9
