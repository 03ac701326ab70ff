"""The tokenizer next to a smaller checkpoint gives the ids of the one it came from, under every model type.

transformers picks the tokenizer class by the model type, and pruning changes that: to `pruned_llama`, or to `mistral`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from families import CONFIGS, build, random_plan, uniform_plan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5Tokenizer

import nirvana

BOOKS = Path(nirvana.__file__).parent / "data"
TRAINING = (BOOKS / "calibration" / "frankenstein.txt").read_text()[20_000:80_000].splitlines()
HELD_OUT = (BOOKS / "evaluation" / "the_time_machine.txt").read_text()[9_000:12_000]


def byte_level() -> PreTrainedTokenizerFast:
    """Like Llama 3 and SmolLM: byte-level BPE that puts a token first, with added tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.add_tokens(["monster"])
    fast.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    fast.chat_template = "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    return fast


def llama() -> LlamaTokenizer:
    """Like Llama 2: BPE over ▁ with bytes for what it does not know, in a class of its own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def t5() -> T5Tokenizer:
    """Like T5: Unigram, an end token, and sentinels."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    tokenizer.train_from_iterator(TRAINING[:300], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return T5Tokenizer(vocab=[tuple(piece) for piece in model["vocab"]], extra_ids=5)


#: Tokenizer, model, kept KV groups for equal widths (None: unequal widths), model type of the result.
CASES = [
    (byte_level, "llama", None, "pruned_llama"),
    (byte_level, "llama", 2, "llama"),
    (byte_level, "llama", 3, "mistral"),
    (byte_level, "qwen2", None, "pruned_qwen2"),
    (byte_level, "qwen2-tied", 2, "seed_oss"),
    (byte_level, "qwen3", None, "pruned_qwen3"),
    (llama, "llama", None, "pruned_llama"),
    (llama, "llama", 2, "llama"),
    (llama, "llama", 3, "mistral"),
    (llama, "mistral", None, "pruned_mistral"),
    (t5, "t5", None, "pruned_t5"),
    (t5, "t5", 3, "t5"),
]


def texts() -> list[str]:
    rng = random.Random(0)
    letters = [
        chr(code) for code in (*range(32, 127), *range(0xA0, 0x250), *range(0x4E00, 0x4E80), *range(0x1F600, 0x1F650))
    ]
    return [
        "",
        " ",
        "\n\n\t",
        "  two spaces before, two behind  ",
        "The monster's “naïve” résumé, 1024 × 3.14\r\n",
        "<s> literal </s> tokens <|turn|> and <extra_id_0> <pad>",
        "    def f(x):\n        return x**2\n",
        "你好, мир 🙂",
        HELD_OUT,
        *("".join(rng.choices(letters, k=40)) for _ in range(20)),
    ]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}-to-{case[3]}")
def pair(request, tmp_path_factory) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizers that transformers opens from the source checkpoint and from the smaller one."""
    make, name, groups, model_type = request.param
    folder = tmp_path_factory.mktemp("tokenizer")
    model = build(CONFIGS[name], seed=0)
    model.save_pretrained(folder / "source")
    make().save_pretrained(folder / "source")
    plan = random_plan(model, seed=0) if groups is None else uniform_plan(model, groups, neurons=8, seed=0)
    nirvana.apply_checkpoint(folder / "source", plan, folder / "small")
    assert json.loads((folder / "small" / "config.json").read_text())["model_type"] == model_type
    return AutoTokenizer.from_pretrained(folder / "source"), AutoTokenizer.from_pretrained(folder / "small")


def test_ids_and_texts_are_equal(pair):
    source, small = pair
    assert len(small) == len(source)
    lengths = set()
    for text in texts():
        for special in (True, False):
            ids = source(text, add_special_tokens=special)["input_ids"]
            assert small(text, add_special_tokens=special)["input_ids"] == ids, text
            assert small.decode(ids) == source.decode(ids), text
            lengths.add(len(ids))
    assert max(lengths) > 500


def test_special_tokens_are_equal(pair):
    source, small = pair
    assert small.special_tokens_map == source.special_tokens_map
    assert small.all_special_ids == source.all_special_ids
    assert small.chat_template == source.chat_template


def test_batches_are_padded_on_the_same_side(pair):
    """A decoder that is padded on the right generates nonsense for the shorter rows."""
    source, small = pair
    for tokenizer in pair:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = ["short", "a longer text than the other"]
    assert small(batch, padding=True)["input_ids"] == source(batch, padding=True)["input_ids"]


def test_checkpoint_without_tokenizer_gets_none(tmp_path):
    model = build(CONFIGS["llama"], seed=0)
    model.save_pretrained(tmp_path / "source")
    out = nirvana.apply_checkpoint(tmp_path / "source", random_plan(model, seed=0), tmp_path / "small")
    assert [file.name for file in out.iterdir() if "token" in file.name] == []
