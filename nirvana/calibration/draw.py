"""Source and seed -> calibration batches, each with a manifest of what it was made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nirvana.calibration import manifest, tokenised
from nirvana.calibration.corpora import Source, open_source, split_mixture
from nirvana.calibration.packing import PACKINGS, Drawn, Tokenise, draw_contiguous, draw_random
from nirvana.calibration.rows import Document
from nirvana.calibration.text import token_ids
from nirvana.errors import NirvanaError


@dataclass(frozen=True)
class CalibrationBatch:
    """What a model is scored on.

    Attributes:
        tokens: int64 ``[examples, tokens]``.
        manifest: JSON-ready: source, origin of its files (SHA-256) or data set (commit), document and token offset of
            every example, packing, seed, hash of the tokenizer, releases of the libraries.
    """

    tokens: Tensor = field(repr=False)
    manifest: dict[str, Any]


def draw_batches(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int = 1,
    num_examples: int = 32,
    seq_len: int = 128,
    seed: int = 0,
    packing: str = "random",
) -> list[CalibrationBatch]:
    """Draw calibration batches that have no text in common.

    Packing "random": documents in random order, those that are long enough, a random window of each, as the published
    code does; no document is used twice, in one batch or in two. Where there are fewer documents than a batch has
    examples (one book, say): random windows of the joined text that do not overlap. Packing "contiguous": documents are
    joined with the end-of-sequence token and cut into windows; a batch is a run of them in order, the seed says which.

    Args:
        source: corpus name, ``hub:OWNER/NAME:SPLIT:FIELD``, .txt, .jsonl, .parquet or folder, see `read_documents`;
            ``a+b`` is a mixture, one example from each in turn. A .npy of integers ``[examples, tokens]`` is used as it
            is: it is one batch, and `num_examples`, `seq_len`, `seed` and `packing` then mean nothing.
        tokenizer: the model's; may be None for a .npy.
        count: batches to draw. The first ones are the same for every count.
        num_examples: examples in each batch.
        seq_len: tokens per example.
        seed: of the draw, which is the same on every platform.
        packing: "random" or "contiguous".

    Raises:
        NirvanaError: unreadable source, or less text than asked for.
    """
    if Path(source).suffix == ".npy" and len(split_mixture(source)) == 1:
        return _from_npy(Path(source), count)
    if tokenizer is None:
        raise NirvanaError(f"the model has no tokenizer, so {source} cannot be tokenised; give a .npy of token ids")
    request = _Request(count, num_examples, seq_len, seed, packing, tokenizer.eos_token_id)
    names = split_mixture(source)
    _check_mixture(source, names, num_examples)
    parts = [open_source(name) for name in names]
    origins = [part.about() for part in parts]
    _check_origins(source, parts, origins)
    chats = False

    def tokenise(document: Document) -> list[int]:
        nonlocal chats
        chats = chats or not isinstance(document, str)
        return token_ids(tokenizer, document)

    # Examples come from each source in turn, so the first ones may give one more.
    shares = [len(range(first, num_examples, len(parts))) for first in range(len(parts))]
    drawn = [_draw(part, tokenise, request, share) for part, share in zip(parts, shares, strict=True)]
    made = {
        "source": str(source),
        "packing": packing,
        "seed": seed,
        "num_examples": num_examples,
        "seq_len": seq_len,
        **manifest.tokenizer_entries(tokenizer, chats),
        "packages": manifest.package_versions(origins),
    }
    batches = []
    for number in range(count):
        own = [_part_of(whole, number, share) for whole, share in zip(drawn, shares, strict=True)]
        tokens = torch.tensor([own[row % len(own)].examples[row // len(own)].ids for row in range(num_examples)])
        entries = [manifest.source_entry(*entry) for entry in zip(map(str, names), origins, own, strict=True)]
        about = {"batch": number, "tokens_sha256": manifest.tokens_sha256(tokens), "sources": entries}
        batches.append(CalibrationBatch(tokens, {**made, **about}))
    return batches


@dataclass(frozen=True)
class _Request:
    count: int
    num_examples: int
    seq_len: int
    seed: int
    packing: str
    eos: int | None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise NirvanaError(f"{self.count} calibration batches were asked for; at least 1 is needed")
        if self.num_examples < 1 or self.seq_len < 2:
            sizes = f"{self.num_examples} examples of {self.seq_len} tokens"
            raise NirvanaError(f"{sizes}: at least 1 example of 2 tokens is needed")
        if self.packing not in PACKINGS:
            raise NirvanaError(f"--packing {self.packing!r} must be one of {', '.join(PACKINGS)}")
        if self.packing == "contiguous" and self.eos is None:
            raise NirvanaError(
                "--packing contiguous joins documents with the end-of-sequence token, and the tokenizer has none; "
                "use --packing random"
            )


def _part_of(whole: Drawn, number: int, share: int) -> Drawn:
    return whole._replace(examples=whole.examples[number * share : (number + 1) * share])


def _draw(source: Source, tokenise: Tokenise, request: _Request, num_examples: int) -> Drawn:
    """One source's share of all batches: `num_examples` of each."""
    blocks = source.blocks(request.seed, num_examples)
    sizes = (num_examples, request.seq_len, request.count, request.seed)
    if request.packing == "random":
        drawn = draw_random(blocks, tokenise, *sizes)
    else:
        drawn = draw_contiguous(blocks, tokenise, *sizes, request.eos)
    if len(drawn.examples) == request.count * num_examples:
        return drawn
    held = f"{source.name} holds only {drawn.held}{source.scope}"
    asked = f"{num_examples} examples of {request.seq_len}"
    remedy = "lower --num-examples or --seq-len, or give more text"
    if request.count == 1:
        raise NirvanaError(f"{held}, {asked} were asked for; {remedy}")
    raise NirvanaError(
        f"{held}, which is {len(drawn.examples) // num_examples} disjoint batches of {asked} tokens, "
        f"{request.count} were asked for; ask for fewer, {remedy}"
    )


def _check_mixture(source: str | Path, names: list[str | Path], num_examples: int) -> None:
    if len(names) > num_examples:
        raise NirvanaError(
            f"{source}: {num_examples} examples cannot come from {len(names)} sources; raise --num-examples"
        )
    if any(Path(name).suffix == ".npy" for name in names):
        raise NirvanaError(f"{source}: a .npy is a whole batch and cannot be mixed; give text")


def _check_origins(source: str | Path, parts: list[Source], origins: list[dict[str, Any]]) -> None:
    """Two sources of the same text would draw the same examples."""
    seen: dict[object, str] = {}
    for part, origin in zip(parts, origins, strict=True):
        texts = set(origin["files"].values() if "files" in origin else [(origin["hub"], origin["config"])])
        for text in texts & set(seen):
            raise NirvanaError(f"{source}: {seen[text]} and {part.name} hold the same text; name it once")
        seen |= dict.fromkeys(texts, part.name)


def _from_npy(path: Path, count: int) -> list[CalibrationBatch]:
    if count != 1:
        raise NirvanaError(f"{path} is one batch of token ids, {count} were asked for; give text, or one .npy for each")
    tokens, digest = tokenised.load(path)
    entry = {"name": str(path), "files": {path.name: digest}}
    about = {"source": str(path), "tokens_sha256": manifest.tokens_sha256(tokens), "sources": [entry]}
    return [CalibrationBatch(tokens, about)]
