"""llama.cpp gives the token ids of the checkpoint's tokenizer, for every pre-tokenizer that is written."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from families import CONFIGS, build
from gguf import GGUFReader
from llamacpp import LlamaCpp
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_tokenizer_roundtrip import HELD_OUT, TRAINING
from test_tokenizer_roundtrip import llama as llama_by_bpe
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AddedToken,
    AutoTokenizer,
    GenerationConfig,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

import nirvana
from nirvana import NirvanaError
from nirvana.export.gguf.pre_tokenizer import NAMES

ROWS = 720

# As they stand in the tokenizer.json of Llama 3 and of Mistral Nemo.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


def byte_level(
    steps: pre_tokenizers.PreTokenizer, whole_words: bool = False, size: int = 700
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a token before each text; one frequent word cannot be reached by merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = steps, decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|turn|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TRAINING, "12 345 678 9 1999 2024"], trainer)
    data = json.loads(tokenizer.to_str())
    data["model"]["merges"] = [pair for pair in data["model"]["merges"] if "".join(pair) not in ("Ġmy", "Ġnot")]
    data["model"]["ignore_merges"] = whole_words
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def qwen2() -> Qwen2Tokenizer:
    model = json.loads(byte_level(split(LLAMA3)).backend_tokenizer.to_str())["model"]
    # llama.cpp takes a token of this text for an end token in every file; Qwen has no such one.
    model["vocab"]["</q>"] = model["vocab"].pop("</s>")
    return Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


#: llama.cpp's name -> tokenizer and the family that it goes with.
TOKENIZERS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "gpt-2": (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "llama"),
    "smollm": (
        lambda: byte_level(
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        ),
        "llama",
    ),
    "llama-bpe": (lambda: byte_level(split(LLAMA3), whole_words=True), "llama"),
    "smaug-bpe": (lambda: byte_level(split(LLAMA3)), "llama"),
    "qwen2": (qwen2, "qwen2"),
    "tekken": (lambda: byte_level(split(NEMO), whole_words=True), "mistral"),
}


def texts() -> list[str]:
    rng = random.Random(0)
    letters = [chr(code) for code in (*range(32, 127), *range(0xA0, 0x250), *range(0x4E00, 0x4E80), 0x1F642, 10, 9)]
    return [
        "",
        " ",
        "\n\n\t",
        "  two spaces before, two behind  ",
        "My monster's “naïve” résumé isn't MINE: I'LL pay 1024 × 3.14 in 2024, not 12345678.\r\n",
        "<|turn|>literal<|turn|> tokens </s>",
        "    def f(x):\n        return x**2  # !!!\n",
        "camelCase HTTPServer iPhone ÉCOLE/école ./path\n/",
        "你好, мир 🙂 ١٢٣ ½ x² Ⅷ",
        HELD_OUT,
        *(unicodedata.normalize("NFC", "".join(rng.choices(letters, k=40))) for _ in range(30)),
    ]


def export(folder: Path, tokenizer, family: str = "llama", **changes) -> nirvana.Exported:
    """A tiny model with this tokenizer as GGUF."""
    settings = CONFIGS[family].to_dict() | {"vocab_size": ROWS, "max_position_embeddings": 8} | changes
    config = type(CONFIGS[family])(**settings)
    model = build(config, seed=0)
    if (folder / "model" / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return nirvana.export(folder / "model", "gguf", folder / "model.gguf", type="q8_0")


def test_every_pre_tokenizer_is_tested():
    assert set(TOKENIZERS) == set(NAMES.values())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_of_byte_level_tokenizers(tmp_path, name):
    make, family = TOKENIZERS[name]
    made = export(tmp_path, make(), family)
    assert f"gpt2 ({name})" in made.details["tokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with LlamaCpp(made.path) as llama:
        for text in texts():
            assert llama.tokenize(text) == tokenizer(text)["input_ids"], repr(text)
            bare = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert llama.tokenize(text, special=False) == bare, repr(text)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    """A SentencePiece BPE model as of Llama 2: bytes for unknown characters, spaces kept."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_ids_of_sentencepiece_tokenizers(tmp_path, sentencepiece_model):
    tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_model.parent)
    made = export(tmp_path, tokenizer)
    assert "llama (default)" in made.details["tokenizer"]
    pieces = SentencePieceProcessor(model_file=str(sentencepiece_model))
    with LlamaCpp(made.path) as llama:
        for text in texts():
            if not any(special in text for special in ("<|turn|>", "</s>")):
                assert llama.tokenize(text, special=False) == pieces.encode(text), repr(text)
            if not text.startswith((" ", "▁")):
                # Before a text that starts with a space, SentencePiece puts another, the tokenizer of transformers not.
                assert llama.tokenize(text) == tokenizer(text)["input_ids"], repr(text)


REFUSED = {
    "no merge": llama_by_bpe,
    "no token 720": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), size=721),
    r"patterns ['\\d+']": lambda: byte_level(split(r"\d+")),
    "add_prefix_space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "and ignore_merges": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), whole_words=True),
    "BPE tokenizers": lambda: PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a")), eos_token="</s>"
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_tokenizer_with_other_ids_is_refused(tmp_path, reason):
    with pytest.raises(NirvanaError) as caught:
        export(tmp_path, REFUSED[reason]())
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_added_tokens_without_a_row_are_named(tmp_path):
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens([f"new{index}" for index in range(22)])
    made = export(tmp_path, tokenizer)
    assert made.notes[0] == "left out: 'new20', 'new21', for which the embeddings have no row"
    with LlamaCpp(made.path) as llama:
        assert llama.tokenize("new19", special=False) == [719]
        assert len(llama.tokenize("new20", special=False)) > 1


def test_special_tokens_and_templates(tmp_path):
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ tools }}"}
    (tmp_path / "model").mkdir()
    GenerationConfig(eos_token_id=[3, 2, 700]).save_pretrained(tmp_path / "model")
    made = export(tmp_path, tokenizer)
    assert made.notes[0].startswith("llama.cpp keeps the spaces around '<mask>'")
    reader = GGUFReader(made.path)
    found = {
        name.removeprefix("tokenizer."): field.contents()
        for name, field in reader.fields.items()
        if name.endswith(("_token_id", "_token")) or "chat_template" in name
    }
    assert found == {
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.eot_token_id": 3,
        "ggml.eom_token_id": 700,
        "ggml.padding_token_id": 0,
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": False,
        "chat_template": "{{ messages[0]['content'] }}",
        "chat_template.tool_use": "{{ tools }}",
        "chat_templates": ["tool_use"],
    }
    tokens, types = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "token_type"))
    assert (tokens[700], types[700]) == ("<mask>", 3)
    assert (tokens[719], types[719]) == ("[PAD719]", 5)


def test_no_end_token_is_refused(tmp_path):
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.eos_token = None
    with pytest.raises(NirvanaError, match="eos_token"):
        export(tmp_path, tokenizer, eos_token_id=None)
