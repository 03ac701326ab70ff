"""Mean, rank-median and rank-mean of saliencies, against figures worked out by hand."""

from __future__ import annotations

import families
import pytest
import torch
from transformers import LlamaConfig

from nirvana import NirvanaError, Saliency, allocate, score
from nirvana.saliency import combine

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=3, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
)
BLOCKS = ("model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp")


def saliency(*rows, **settings):
    return Saliency(dict(zip(BLOCKS, map(torch.tensor, rows), strict=True)), settings)


FIRST = saliency([1.0, 9.0], [5.0, 1.0, 3.0], [4.0, 2.0], [2.0, 2.0, 7.0], criterion="x", seed=1)
SECOND = saliency([30.0, 10.0], [100.0, 0.0, 500.0], [20.0, 40.0], [1.0, 2.0, 3.0], criterion="x", seed=2)
THIRD = saliency([0.1, 0.4], [0.3, 0.2, 0.1], [0.2, 0.3], [0.6, 0.5, 0.4], criterion="x", seed=3)


def as_lists(scores):
    return [scores[block].tolist() for block in BLOCKS]


def test_the_mean_is_the_mean_of_scores():
    mean = combine([FIRST, SECOND])
    assert as_lists(mean) == [[15.5, 9.5], [52.5, 0.5, 251.5], [12.0, 21.0], [1.5, 2.0, 5.0]]
    assert all(values.dtype == torch.float32 for values in mean.values())


def test_ranks_are_over_all_layers_of_a_kind():
    """Attention (1, 9, 4, 2) and (30, 10, 20, 40); MLP (5, 1, 3, 2, 2, 7), where two are equal, and the others."""
    ranks = combine([FIRST], how="rank-mean", model=CONFIG)
    expected = [[1 / 4, 4 / 4], [5 / 6, 1 / 6, 4 / 6], [3 / 4, 2 / 4], [2.5 / 6, 2.5 / 6, 6 / 6]]
    for mine, known in zip(as_lists(ranks), expected, strict=True):
        assert mine == pytest.approx(known, rel=1e-7)
    both = combine([FIRST, SECOND], how="rank-mean", model=CONFIG)
    expected = [[2 / 4, 2.5 / 4], [5 / 6, 1 / 6, 5 / 6], [2.5 / 4, 3 / 4], [2.25 / 6, 2.75 / 6, 5 / 6]]
    for mine, known in zip(as_lists(both), expected, strict=True):
        assert mine == pytest.approx(known, rel=1e-7)


def test_the_median_is_that_of_ranks():
    """MLP ranks: 5 1 4 2.5 2.5 6, then 5 1 6 2 3 4, then 3 2 1 6 5 4."""
    three = combine([FIRST, SECOND, THIRD], how="median", model=CONFIG)
    for mine, known in zip(as_lists(three)[1::2], [[5, 1, 4], [2.5, 3, 4]], strict=True):
        assert mine == pytest.approx([rank / 6 for rank in known], rel=1e-7)
    two = combine([FIRST, SECOND], how="median", model=CONFIG)
    assert as_lists(two)[1] == pytest.approx([5 / 6, 1 / 6, 5 / 6], rel=1e-7)


def test_one_batch_that_is_far_off_moves_the_mean_and_not_the_median():
    wild = Saliency({block: 1e6 * values.flip(0) for block, values in FIRST.items()}, {})
    batches = [FIRST, FIRST, wild]
    median = combine(batches, how="median", model=CONFIG)
    assert as_lists(median) == as_lists(combine([FIRST], how="median", model=CONFIG))
    assert combine(batches)[BLOCKS[1]].argmax() != FIRST[BLOCKS[1]].argmax()


@pytest.mark.parametrize("how", ["mean", "median", "rank-mean"])
def test_one_saliency_keeps_its_plan(how):
    model = families.build(families.CONFIGS["t5-gated"], 0)
    scores = score(model, criterion="random", seed=5)
    combined = combine([scores, scores], how=how, model=model)
    plans = [allocate(s, model, sparsity=0.4, gamma=1.5, align=1).kept for s in (scores, combined)]
    assert plans[0] == plans[1]
    assert list(combined) == list(scores)


def test_settings_say_from_what():
    settings = combine([FIRST, SECOND], how="median", model=CONFIG).settings
    assert settings == {"criterion": "x", "combined": {"how": "median", "of": [{"seed": 1}, {"seed": 2}]}}


def test_the_sum_of_two_criteria_is_the_mean_of_their_ranks():
    model = families.build(families.CONFIGS["qwen2"], 0)
    tokens = torch.randint(families.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    calls = []
    both = score(model, tokens, criterion="nirvana+mask-fisher", progress=lambda: calls.append(0))
    parts = [score(model, tokens, criterion=name) for name in ("nirvana", "mask-fisher")]
    expected = combine(parts, how="rank-mean", model=model)
    assert all(torch.equal(both[block], expected[block]) for block in expected)
    assert both.settings["criterion"] == "nirvana+mask-fisher"
    assert [part["objective"] for part in both.settings["combined"]["of"]] == ["max-logit", "nll"]
    assert len(calls) == 3 * (4 + 3 + 3), "biases of q, k and v count"
    assert allocate(both, model, sparsity=0.3).settings["criterion"] == "nirvana+mask-fisher"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([FIRST], "mode"), "--combine 'mode' is unknown; known are mean, median, rank-mean"),
        (([],), "no saliency to combine"),
        (([FIRST], "median"), "give the model"),
        (([FIRST, Saliency({})],), "block model.layers.0.self_attn has 2 scores in one saliency and 0 in another"),
        (([Saliency({}), FIRST],), "has 0 scores in one saliency and 2"),
        (([FIRST, saliency([1.0], [1.0], [1.0], [1.0])],), "2 scores in one saliency and 1 in another"),
        (([Saliency({})], "median", CONFIG), "no scores for block model.layers.0.self_attn"),
    ],
)
def test_what_cannot_be_combined_is_refused(arguments, message):
    with pytest.raises(NirvanaError, match=message):
        combine(*arguments)


@pytest.mark.parametrize("criterion", ["nirvana+", "nirvana+nirvana", "+", "", "nirvana+wanda"])
def test_a_sum_of_unknown_criteria_is_refused(criterion):
    with pytest.raises(NirvanaError, match="is unknown; known are nirvana, magnitude, mask-fisher"):
        score(families.build(families.CONFIGS["llama"], 0), torch.ones(1, 4).long(), criterion=criterion)
