"""Text -> calibration batch: int64 token ids ``[examples, tokens]``. Same source and seed, same batch, everywhere."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nirvana.calibration.corpora import read_documents
from nirvana.errors import NirvanaError

__all__ = ["load_batch", "read_documents", "token_ids"]


def load_batch(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_examples: int = 32,
    seq_len: int = 128,
    seed: int = 0,
) -> Tensor:
    """Draw a calibration batch.

    Many documents: random ones that are long enough, none twice, a random window of each, as the published code does.
    Few (one book, say): random windows of the joined text that do not overlap.

    Args:
        source: corpus name, .txt, .jsonl, .parquet, a folder of .txt; or a .npy of integers ``[examples, tokens]``,
            which is used as it is (`num_examples`, `seq_len` and `seed` then mean nothing).
        tokenizer: the model's; may be None for a .npy.
        num_examples: examples in the batch.
        seq_len: tokens per example.
        seed: of the draw. Python's own generator is used, so the batch is the same on every platform.

    Returns:
        int64 ``[examples, tokens]``.

    Raises:
        NirvanaError: unreadable source, or less text than asked for.
    """
    if Path(source).suffix == ".npy":
        return _load_npy(Path(source))
    if num_examples < 1 or seq_len < 2:
        raise NirvanaError(f"{num_examples} examples of {seq_len} tokens: at least 1 example of 2 tokens is needed")
    if tokenizer is None:
        raise NirvanaError(f"the model has no tokenizer, so {source} cannot be tokenised; give a .npy of token ids")
    documents = read_documents(source)
    draw = random.Random(seed)
    if len(documents) >= num_examples:
        examples = _from_documents(documents, tokenizer, num_examples, seq_len, draw)
        found = f"{len(examples)} documents of at least {seq_len} tokens"
    else:
        ids = [token for document in documents for token in token_ids(tokenizer, document)]
        windows = len(ids) // seq_len
        starts = draw.sample(range(windows), min(num_examples, windows))
        examples = [ids[start * seq_len : (start + 1) * seq_len] for start in starts]
        found = f"{len(ids)} tokens"
    if len(examples) < num_examples:
        raise NirvanaError(
            f"{source} holds only {found}, {num_examples} examples of {seq_len} were asked for; "
            "lower --num-examples or --seq-len, or give more text"
        )
    return torch.tensor(examples, dtype=torch.int64)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a running text, without the special tokens that would mark its ends."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _from_documents(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, num_examples: int, seq_len: int, draw: random.Random
) -> list[list[int]]:
    examples = []
    for index in draw.sample(range(len(documents)), len(documents)):
        ids = token_ids(tokenizer, documents[index])
        if len(ids) >= seq_len:
            start = draw.randint(0, len(ids) - seq_len)
            examples.append(ids[start : start + seq_len])
        if len(examples) == num_examples:
            break
    return examples


def _load_npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise NirvanaError(f"no calibration file at {path}") from None
    except (OSError, ValueError, EOFError, MemoryError):
        # A pickled array lands here: it is never unpickled, because that could run any code.
        raise NirvanaError(f"{path} is not a plain .npy array of numbers; save one with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim != 2:
        what = f"{array.dtype} of shape {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise NirvanaError(f"{path} holds {what}; give integers [examples, tokens]")
    return torch.from_numpy(array.astype(np.int64))
