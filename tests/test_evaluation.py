"""Perplexity, KL, generation, latency and memory against literal computations on tiny models."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config, T5Config

from nirvana import NirvanaError
from nirvana.evaluation.compare import evaluate
from nirvana.evaluation.generation import continue_text
from nirvana.evaluation.latency import forward_seconds
from nirvana.evaluation.memory import peak_bytes
from nirvana.evaluation.text import TextScore, score_text, text_windows
from nirvana.parameters import auto_class

VOCABULARY = 67

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=512,
    ),
    "qwen3": Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=28,
        tie_word_embeddings=True,
    ),
    "t5": T5Config(
        vocab_size=VOCABULARY,
        d_model=24,
        d_kv=6,
        num_heads=3,
        d_ff=30,
        num_layers=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny matrices: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, seed: int = 0):
    """A random model whose predictions are far from uniform."""
    config = copy.deepcopy(CONFIGS[name])
    model = auto_class(config).from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.2 * values if parameter.dim() == 1 else 1.5 * values / parameter.shape[1] ** 0.5)
    return model.eval()


def draw(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def words():
    """Word "w5" has the id 5."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def log_probabilities(model, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 log-probabilities and the tokens they are of, for every prediction that a window holds."""
    model = copy.deepcopy(model).double()
    if model.config.is_encoder_decoder:
        half = len(window) // 2
        target = window[half:]
        decoder = torch.cat([torch.tensor([0]), target[:-1]])
        logits = model(input_ids=window[None, :half], decoder_input_ids=decoder[None]).logits[0]
    else:
        target = window[1:]
        logits = model(input_ids=window[None]).logits[0, :-1]
    return (logits - logits.logsumexp(-1, keepdim=True)).detach(), target


def literal_nll(model, windows) -> tuple[float, int]:
    """Sum over the predicted tokens, and their number."""
    total, count = 0.0, 0
    for window in windows:
        logs, target = log_probabilities(model, window)
        total -= sum(float(logs[place, token]) for place, token in enumerate(target.tolist()))
        count += len(target)
    return total, count


def literal_kl(reference, model, windows) -> float:
    """Mean over the predicted tokens of sum p (log p - log q)."""
    total, count = 0.0, 0
    for window in windows:
        p, target = log_probabilities(reference, window)
        q, _ = log_probabilities(model, window)
        total += float((p.exp() * (p - q)).sum())
        count += len(target)
    return total / count


# ---- perplexity and KL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 16, 131, 257])
@pytest.mark.parametrize("name", CONFIGS)
def test_perplexity_is_that_of_float64(name, length):
    """Also where the window is longer than one part of 128 positions, by one, by none."""
    model, windows = build(name), [draw(length, seed) for seed in range(3)]
    score = score_text(model, windows)
    total, count = literal_nll(model, windows)
    per_window = length - length // 2 if name == "t5" else length - 1
    assert (score.tokens, score.windows) == (count, 3) == (3 * per_window, 3)
    assert score.nll == pytest.approx(total / count, rel=2e-6)
    assert score.perplexity == math.exp(score.nll)
    assert score.kl is None


@pytest.mark.parametrize("name", CONFIGS)
def test_kl_is_that_of_float64(name):
    reference, model, windows = build(name, 0), build(name, 1), [draw(140, seed) for seed in range(2)]
    score = score_text(model, windows, reference=reference)
    assert score.kl == pytest.approx(literal_kl(reference, model, windows), rel=1e-5)
    assert score.kl > 0.1
    # KL(reference || model), not the other way round.
    other = score_text(reference, windows, reference=model)
    assert other.kl == pytest.approx(literal_kl(model, reference, windows), rel=1e-5)
    assert other.kl != pytest.approx(score.kl, rel=1e-4)
    assert score.nll == score_text(model, windows).nll


@pytest.mark.parametrize("name", CONFIGS)
def test_kl_of_a_model_to_itself_is_zero(name):
    model, windows = build(name), [draw(33)]
    assert score_text(model, windows, reference=model).kl == 0
    assert score_text(model, windows, reference=copy.deepcopy(model)).kl == 0


def test_a_small_kl_is_not_lost_in_rounding():
    """Two models that differ by one part in a hundred: 1e-4 nats, still within a thousandth of the truth."""
    reference, windows = build("llama"), [draw(64)]
    model = copy.deepcopy(reference)
    model.lm_head.weight.data *= 1.01
    score = score_text(model, windows, reference=reference)
    assert 1e-5 < score.kl < 1e-3
    assert score.kl == pytest.approx(literal_kl(reference, model, windows), rel=1e-3)


def test_parts_of_any_length_give_the_same(monkeypatch):
    reference, model, windows = build("llama", 0), build("llama", 1), [draw(40)]
    whole = score_text(model, windows, reference=reference)
    for positions in (1, 7, 39):
        monkeypatch.setattr("nirvana.evaluation.text.POSITIONS", positions)
        parts = score_text(model, windows, reference=reference)
        assert parts.nll == pytest.approx(whole.nll, rel=1e-6)
        assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
        assert parts.tokens == whole.tokens


def test_another_vocabulary_is_refused():
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size += 1
    other = auto_class(config).from_config(config)
    with pytest.raises(NirvanaError, match="reference has a vocabulary of 68, the model 67"):
        score_text(build("llama"), [draw(8)], reference=other)


def test_advance_is_called_for_each_window():
    calls = []
    score_text(build("llama"), [draw(8)] * 3, advance=calls.append)
    assert calls == [1, 1, 1]


def test_perplexity_of_a_score():
    assert TextScore(nll=math.log(20), kl=None, tokens=5, windows=1).perplexity == pytest.approx(20, rel=1e-14)


# ---- windows --------------------------------------------------------------------------------------------------------


def text(ids: torch.Tensor) -> str:
    return " ".join(f"w{token}" for token in ids.tolist())


def starts_of(words, length, window, stride, limit, parts=1) -> list[int]:
    """Where the windows of a text of `length` different-enough tokens start."""
    ids = draw(length, 5)
    documents = [text(part) for part in ids.chunk(parts)]
    windows = text_windows(words, documents, window, stride, limit)
    places = {tuple(ids[start : start + window].tolist()): start for start in range(length - window + 1)}
    assert len(places) == length - window + 1
    assert all(w.dtype == torch.int64 and w.shape == (window,) for w in windows)
    return [places[tuple(w.tolist())] for w in windows]


def test_windows_cover_the_joined_documents(words):
    for parts in (1, 4):
        assert starts_of(words, 103, 10, 10, None, parts) == list(range(0, 94, 10))
    assert starts_of(words, 100, 10, 10, None) == list(range(0, 91, 10))
    assert starts_of(words, 30, 10, 4, None) == [0, 4, 8, 12, 16, 20]
    assert starts_of(words, 10, 10, 1, None) == [0]


def test_few_windows_are_evenly_spaced(words):
    assert starts_of(words, 160, 10, 10, 4) == [0, 40, 80, 120]
    assert starts_of(words, 165, 10, 10, 5) == [0, 30, 60, 90, 120]
    assert starts_of(words, 160, 10, 10, 16) == list(range(0, 151, 10))
    assert starts_of(words, 160, 10, 10, 99) == list(range(0, 151, 10))
    assert starts_of(words, 160, 10, 10, 1) == [0]
    for limit in range(2, 30):
        starts = starts_of(words, 297, 8, 8, limit)
        gaps = {b - a for a, b in pairwise(starts)}
        assert len(starts) == limit
        assert max(gaps) - min(gaps) <= 8


@pytest.mark.parametrize(
    ("window", "stride", "limit", "message"),
    [
        (1, 1, None, "a window needs 2 tokens"),
        (0, 0, None, "a window needs 2 tokens"),
        (8, 0, None, "1 <= stride <= window"),
        (8, -1, None, "1 <= stride <= window"),
        (8, 9, None, "--window 8 --stride 9"),
        (8, 8, 0, "--max-windows 0 must be at least 1"),
        (21, 21, None, "the text has 20 tokens, one window needs 21"),
    ],
)
def test_windows_out_of_range_are_refused(words, window, stride, limit, message):
    with pytest.raises(NirvanaError, match=message):
        text_windows(words, [text(draw(20))], window, stride, limit)


@pytest.mark.parametrize(("window", "stride"), [(12, 12), (12, 6), (12, 5), (12, 1), (2, 1)])
def test_overlapping_windows_count_every_token_once(words, window, stride):
    """With the longest context that a window gives it: literally, token by token."""
    model, ids = build("llama"), draw(50)
    windows = text_windows(words, [text(ids)], window, stride, None)
    covered = window + stride * (len(windows) - 1)
    # The first token of a text has no context; without overlap neither has the first of each window.
    predicted = [t for t in range(1, covered) if stride < window or t % window]
    total = 0.0
    for t in predicted:
        number = max(0, math.ceil((t + 1 - window) / stride))
        context = ids[number * stride : t]
        logs, _ = log_probabilities(model, torch.cat([context, ids[t : t + 1]]))
        total -= float(logs[-1, ids[t]])
    score = score_text(model, windows, stride=None if stride == window else stride)
    assert score.tokens == len(predicted)
    assert score.nll == pytest.approx(total / len(predicted), rel=2e-6)


# ---- generation -----------------------------------------------------------------------------------------------------


def test_generation_is_greedy_whatever_the_checkpoint_says(words):
    model = build("llama")
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_k=3, top_p=0.5)
    ids = [3, 14, 15, 9]
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert continue_text(model, words, "w3 w14 w15 w9", new_tokens=12) == text(torch.tensor(ids))
    assert model.generation_config.temperature == 5.0


def test_an_encoder_decoder_answers_its_prompt(words):
    model = build("t5")
    model.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=None)
    ids = [0]
    for _ in range(6):
        ids.append(int(model(torch.tensor([[3, 14]]), decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert continue_text(model, words, "w3 w14", new_tokens=6) == f"w3 w14 => {text(torch.tensor(ids))}"


# ---- latency and memory ---------------------------------------------------------------------------------------------


def test_latency_grows_with_the_work():
    """Positive for every family; a model of 40 times the work takes longer than its small neighbour."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 80
    large = auto_class(config).from_config(config).eval()
    seconds = forward_seconds([build("llama"), large, build("t5")], tokens=32)
    assert all(0 < value < 60 for value in seconds)
    assert seconds[1] > 3 * seconds[0]


def checkpoint(folder: Path, vocabulary: int, dtype: torch.dtype = torch.float32) -> int:
    """A Llama that is nothing but its embedding; returns the bytes of its weights."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size, config.hidden_size, config.head_dim, config.tie_word_embeddings = vocabulary, 240, 40, True
    model = auto_class(config).from_config(config).to(dtype)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def test_peak_memory_holds_the_weights(tmp_path):
    """Two checkpoints that differ by 96 MB in their weights: so, at least, do the peaks; and by the logits at most."""
    small = checkpoint(tmp_path / "small", 100)
    large = checkpoint(tmp_path / "large", 100_000)
    peaks = [peak_bytes(tmp_path / name, tokens=8, device="cpu") for name in ("small", "large")]
    assert peaks[0] > small
    difference = large - small
    assert difference > 95e6
    assert 0.95 * difference < peaks[1] - peaks[0] < 2 * difference
    # A process that has loaded torch and transformers needs 150 MB and not 4 GB.
    assert 150e6 < peaks[0] < 4e9


def test_memory_of_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(NirvanaError, match=r"could not be measured: .*config\.json"):
        peak_bytes(tmp_path, device="cpu")


def test_evaluate_gathers_it_all(tmp_path, words):
    """Seven windows, and seven is the limit: all of them, so overlapping tokens are counted once here too."""
    model, ids = build("llama"), draw(70)
    model.save_pretrained(tmp_path / "m")
    words.save_pretrained(tmp_path / "m")
    (tmp_path / "t.txt").write_text(text(ids))
    result = evaluate(tmp_path / "m", text=tmp_path / "t.txt", window=20, stride=8, max_windows=7, prompt="w3 w4")
    assert json.loads(json.dumps(result)) == result
    assert result["reference"] is None
    about, figures = result["text"], result["model"]
    assert about == {"source": str(tmp_path / "t.txt"), "window": 20, "stride": 8, "windows": 7, "tokens": 67}
    windows = text_windows(words, [text(ids)], 20, 8, None)
    assert figures["nll"] == score_text(model, windows, stride=8).nll
    assert figures["perplexity"] == math.exp(figures["nll"])
    assert figures["kl"] is None
    assert figures["name"] == str(tmp_path / "m")
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    # Two layers of (6 + 2 + 2 + 6) heads of 4 and three MLP matrices, on 24 channels.
    assert figures["prunable_parameters"] == 2 * 24 * (16 * 4 + 3 * 40)
    assert figures["generated"].startswith("w3 w4 w")
    assert figures["forward_seconds"] > 0
    assert figures["peak_memory_bytes"] > 100e6
