"""Accuracy through lm-eval: against log-likelihoods and choices computed by hand, on models of several families."""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import sys

import families
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import VOCABULARY

import nirvana
from nirvana import NirvanaError
from nirvana.evaluation.zero_shot import read_questions, read_tasks, zero_shot

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("lm_eval")

WORDS = ["sea", "hill", "stone", "letter", "night", "ship", "father", "winter", "monster", "light", "hand", "friend"]


def questions(count, seed, choices=(2, 5)):
    """Random questions of random lengths; answers share words, one may begin with another, spaces at the end stay."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        answers = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(rng.randint(*choices))]
        answers[-1] = answers[0] + rng.choice([" again ", " once more"])
        made.append({"context": " ".join(rng.choices(WORDS, k=rng.randint(1, 25))) + "?", "choices": answers})
        made[-1]["label"] = rng.randrange(len(answers))
    return made


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def decoder(family, seed=0):
    """A model of a family with the tests' tokenizer's vocabulary."""
    config = families.CONFIGS[family].to_dict() | {"vocab_size": VOCABULARY, "max_position_embeddings": 256}
    model = families.build(type(families.CONFIGS[family])(**config), seed)
    # Sharper answers: far from chance, so that a mistake shows.
    model.get_output_embeddings().weight.data.mul_(3)
    return model


def log_likelihoods(model, tokenizer, row):
    """Of each answer: sums of log-probabilities in float64, one answer at a time, without padding and cache."""
    prompt = f"Question: {row['context']}\nAnswer:"
    start = len(tokenizer.encode(prompt))
    sums = []
    for answer in row["choices"]:
        ids = torch.tensor([tokenizer.encode(f"{prompt} {answer}")])
        with torch.no_grad():
            logs = torch.log_softmax(model(ids).logits[0].double(), -1)
        sums.append(sum(logs[position - 1, ids[0, position]].item() for position in range(start, ids.shape[1])))
    return np.array(sums)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3-tied"])
def test_accuracy_is_that_of_log_likelihoods_by_hand(family, tokenizer, tmp_path):
    """Of dense models and of pruned ones with unequal layers, at batch sizes that leave a rest.

    Two thirds of the questions get the answer that the model prefers: accuracies are not those of chance.
    """
    model = decoder(family)
    rows = questions(9, seed=3)
    for row in rows[3:]:
        row["label"] = int(log_likelihoods(model, tokenizer, row).argmax())
    file = written(tmp_path / "q.jsonl", rows)
    for one in (model, nirvana.apply(model, families.random_plan(model, seed=1))):
        labels = np.array([row["label"] for row in rows])
        sums = [log_likelihoods(one, tokenizer, row) for row in rows]
        lengths = [np.array([len(answer.encode()) for answer in row["choices"]]) for row in rows]
        acc = np.mean([each.argmax() for each in sums] == labels)
        norm = np.mean([(each / length).argmax() for each, length in zip(sums, lengths, strict=True)] == labels)
        for size in (1, 4):
            found = zero_shot(one, tokenizer, {"q": file}, batch_size=size)["q"]
            assert (found["acc"], found["acc_norm"]) == (pytest.approx(acc), pytest.approx(norm))
            assert found["samples"] == 9
            assert found["acc_stderr"] == pytest.approx(np.sqrt(acc * (1 - acc) / 8))
        assert one is not model or acc >= 6 / 9


def test_log_likelihoods_are_those_of_the_stock_wrapper(tokenizer):
    """Number by number; the stock wrapper pads, and runs every answer with its question."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from nirvana.evaluation.shared_prompts import SharedPrompts

    model = decoder("llama-tied")
    pairs = [
        (f"Question: {row['context']}\nAnswer:", " " + answer)
        for row in questions(9, seed=5)
        for answer in row["choices"]
    ]
    pairs += [("Question: who?\nAnswer:", " a"), ("Question: who?\nAnswer:", " b")]  # of one token
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    mine = SharedPrompts(pretrained=model, tokenizer=tokenizer)
    mine.questions = 4
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    got, expected = mine.loglikelihood(requests), stock.loglikelihood(requests, disable_tqdm=True)
    assert [pair[1] for pair in got] == [pair[1] for pair in expected]
    np.testing.assert_allclose([pair[0] for pair in got], [pair[0] for pair in expected], rtol=1e-5, atol=1e-4)
    assert any(len(tokenizer.encode(answer)) == 1 for _, answer in pairs)


def test_greedy_answers_are_told(tokenizer):
    from lm_eval.api.instance import Instance

    from nirvana.evaluation.shared_prompts import SharedPrompts

    model = decoder("llama")
    prompt = tokenizer.encode("Question: which?\nAnswer:", return_tensors="pt")
    with torch.no_grad():
        best = tokenizer.decode(model(prompt).logits[0, -1].argmax())
    context, answer = "Question: which?\nAnswer:", best
    if tokenizer.encode(context + answer) != [*prompt[0].tolist(), *tokenizer.encode(answer)]:
        pytest.skip("the most probable token melts into the prompt")
    requests = [Instance("loglikelihood", {}, (context, text), 0) for text in (answer, " zebra")]
    found = SharedPrompts(pretrained=model, tokenizer=tokenizer).loglikelihood(requests)
    assert [pair[1] for pair in found] == [True, False]


def test_limit_asks_the_first_questions(tokenizer, tmp_path):
    model = decoder("llama")
    rows = questions(7, seed=1)
    first = zero_shot(model, tokenizer, {"q": written(tmp_path / "a.jsonl", rows)}, limit=4)
    assert first["q"]["samples"] == 4
    assert first == zero_shot(model, tokenizer, {"q": written(tmp_path / "b.jsonl", rows[:4])}, limit=None)
    ask = read_tasks({"q": tmp_path / "a.jsonl"}, 4)
    assert ask[0].questions == 4
    assert ask[0].identity == read_tasks({"other": tmp_path / "b.jsonl"})[0].identity
    assert ask[0].identity != read_tasks({"q": tmp_path / "a.jsonl"}, 5)[0].identity
    counted = []
    assert zero_shot(model, tokenizer, ask, advance=counted.append) == first
    assert sum(counted) == ask[0].answers == sum(len(row["choices"]) for row in rows[:4])


@pytest.mark.parametrize("family", ["llama", "qwen3-tied"])
def test_answers_in_another_type_are_those_of_the_model_in_it(family, tokenizer, tmp_path):
    """And its weights are afterwards what they were, tied ones too."""
    model = decoder(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that bfloat16 answers otherwise
    before = {name: (id(p), p.data_ptr(), p.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    file = written(tmp_path / "questions.jsonl", questions(60, seed=3))
    single = zero_shot(model, tokenizer, {"mine": file})
    found = zero_shot(model, tokenizer, {"mine": file}, dtype="bfloat16")
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(
        (id(after[name]), after[name].data_ptr()) == (key, place) and torch.equal(after[name], value)
        for name, (key, place, value) in before.items()
    )
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert found == zero_shot(loaded, tokenizer, {"mine": file})
    assert found != single


def test_encoder_decoder_and_its_own_head(t5_folder, tokenizer, tmp_path):
    """T5 v1.1 is declared tied and has a head of its own, which is there afterwards as before."""
    model = nirvana.load(t5_folder, device="cpu")
    model.lm_head.weight.data.mul_(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = questions(6, seed=2)
    found = zero_shot(model, tokenizer, {"q": written(tmp_path / "q.jsonl", rows)})["q"]
    right = []
    for row in rows:
        source = torch.tensor([tokenizer.encode(f"Question: {row['context']}\nAnswer:")])
        sums = []
        for answer in row["choices"]:
            labels = torch.tensor([tokenizer.encode(" " + answer)])
            with torch.no_grad():
                logs = torch.log_softmax(model(input_ids=source, labels=labels).logits[0].double(), -1)
            sums.append(logs.gather(1, labels[0, :, None]).sum().item())
        right.append(int(np.argmax(sums)) == row["label"])
    assert found["acc"] == pytest.approx(np.mean(right))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_texts_that_are_too_long_go_the_stock_way(tokenizer, tmp_path):
    model = decoder("llama")
    rows = questions(3, seed=4)
    rows[1]["context"] = " ".join(WORDS * 60)
    found = zero_shot(model, tokenizer, {"q": written(tmp_path / "q.jsonl", rows)})
    assert found["q"]["samples"] == 3


def test_nothing_is_printed_seeded_fetched_or_left_changed(tokenizer, tmp_path, capfd, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = decoder("llama").train()
    model.model.layers[0].eval()
    plain = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer)  # has no padding token
    file = written(tmp_path / "q.jsonl", questions(3, seed=0))
    environment, levels = dict(os.environ), {name: logging.getLogger(name).level for name in ("", "lm_eval")}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    capfd.readouterr()
    zero_shot(model, plain, {"q": file})
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert plain.pad_token is None
    assert model.training
    assert not model.model.layers[0].training
    assert "tie_weights" not in model.__dict__
    assert dict(os.environ) == environment
    assert {name: logging.getLogger(name).level for name in levels} == levels


GOOD = {"context": "Who?", "choices": ["he", "she"], "label": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no object"),
        ({**GOOD, "choices": None}, 'line 2: "choices" must be two texts or more'),
        ({"context": "Who?", "label": 0}, 'line 2 has no "choices"'),
        ({"choices": ["a", "b"], "label": 0}, 'line 2 has no "context"'),
        ({"context": "Who?", "choices": ["a", "b"]}, 'line 2 has no "label"'),
        ({**GOOD, "choices": ["he"]}, 'line 2: "choices" must be two texts or more'),
        ({**GOOD, "choices": ["he", ""]}, 'line 2: "choices" must be two texts or more'),
        ({**GOOD, "choices": ["he", 3]}, 'line 2: "choices" must be two texts or more'),
        ({**GOOD, "context": " "}, 'line 2: "context" is no text'),
        ({**GOOD, "label": 2}, 'line 2: "label" 2 is no index of the 2 choices'),
        ({**GOOD, "label": -1}, 'line 2: "label" -1 is no index'),
        ({**GOOD, "label": "1"}, "line 2: \"label\" '1' is no index"),
        ({**GOOD, "label": True}, 'line 2: "label" True is no index'),
    ],
)
def test_rows_that_are_no_questions(tmp_path, row, says):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(NirvanaError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"--tasks: {path}, {says}")
    assert "\n" not in str(error.value)


def test_files_that_cannot_be(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    for name, says in (("none", "no file"), ("empty", "holds no questions"), ("latin", "cannot be read")):
        with pytest.raises(NirvanaError, match=says):
            read_tasks({"q": tmp_path / f"{name}.jsonl"})
    for limit in (0, -1):
        with pytest.raises(NirvanaError, match=f"--limit {limit} must be at least 1"):
            read_tasks({"q": tmp_path / "none.jsonl"}, limit)


def test_without_lm_eval(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(NirvanaError, match=r"--tasks needs lm-eval: pip install 'nirvana\[eval\]'"):
        read_tasks({"q": written(tmp_path / "q.jsonl", [GOOD])})


def test_names_of_lm_eval(monkeypatch):
    """Without a network: what is unknown, a group, and a task that cannot be fetched are told apart."""

    def refuse(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it tries for 24 s
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name, says in (
        ("arc_eazy", "'arc_eazy' is unknown to lm-eval"),
        ("mmlu", "'mmlu' is a group of tasks"),
        ("arc_easy", "arc_easy: lm-eval cannot fetch its questions from the Hub"),
    ):
        with pytest.raises(NirvanaError) as error:
            read_tasks([name])
        assert says in str(error.value)
        assert "\n" not in str(error.value)
