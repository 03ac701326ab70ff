"""Texts whose tokens tell where they come from, and batches made again from nothing but their manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nirvana.calibration import read_documents, token_ids

SHARED = Path(__file__).parents[2] / "shared" / "data"

EOS = 1001


def shared_file(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the repository (../shared/data)")
    return path


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Word "d7w3" has the id 703: a window of ids tells document and place."""
    vocabulary = {f"d{d}w{w}": 100 * d + w for d in range(10) for w in range(100)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "[UNK]": 1000, "[EOS]": EOS}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte. Nothing is trained, so that its ids are the same in every release."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**{letter: number for number, letter in enumerate(alphabet)}, "</s>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def document(d: int, length: int) -> str:
    return " ".join(f"d{d}w{w}" for w in range(length))


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, documents: list[str]) -> Path:
    return write_rows(path, [{"text": text, "url": "x"} for text in documents])


def write_parquet(path: Path, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def remade(manifest: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The tokens that a manifest of local files describes."""
    length = manifest["seq_len"]
    parts = []
    for source in manifest["sources"]:
        end = [tokenizer.eos_token_id] if manifest["packing"] == "contiguous" else []
        documents = [token_ids(tokenizer, text) + end for text in read_documents(source["name"])]
        rows = []
        for number, offset in zip(source["documents"], source["offsets"], strict=True):
            ids = documents[number][offset:]
            if source["joined"]:
                ids = ids + [token for later in documents[number + 1 :] for token in later]
            rows.append(ids[:length])
        parts.append(rows)
    return [parts[row % len(parts)][row // len(parts)] for row in range(manifest["num_examples"])]
