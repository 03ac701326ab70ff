"""Text -> calibration batch: int64 token ids ``[examples, tokens]``. Same source and seed, same batch, everywhere."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nirvana.calibration.corpora import read_documents
from nirvana.calibration.draw import CalibrationBatch, draw_batches
from nirvana.calibration.text import token_ids

__all__ = ["CalibrationBatch", "draw_batches", "load_batch", "read_documents", "token_ids"]


def load_batch(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_examples: int = 32,
    seq_len: int = 128,
    seed: int = 0,
    packing: str = "random",
) -> Tensor:
    """The tokens of the first batch of `draw_batches`, which says what the arguments mean.

    Returns:
        int64 ``[examples, tokens]``.

    Raises:
        NirvanaError: unreadable source, or less text than asked for.
    """
    options = {"num_examples": num_examples, "seq_len": seq_len, "seed": seed, "packing": packing}
    return draw_batches(source, tokenizer, **options)[0].tokens
