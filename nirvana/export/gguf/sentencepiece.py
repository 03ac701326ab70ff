"""Scores for a SentencePiece tokenizer of the Llama 2 and Mistral kind.

llama.cpp joins the neighbours whose joint piece has the best score. A tokenizer.json holds merges instead: pairs in
order of preference. Both are the same if every way to cut a piece in two pieces is a merge, which is so for all that
were converted from SentencePiece; then the rank of a piece's merges is its score.
"""

from __future__ import annotations

from typing import Any

from nirvana.errors import NirvanaError

SPACE = "▁"


def scores(model: dict[str, Any], whole: set[str]) -> dict[str, float]:
    """Piece -> score; pieces that no merge makes (characters, bytes) have none.

    Args:
        model: the `model` of a tokenizer.json.
        whole: pieces that are matched as they stand (added tokens) and never merged.

    Raises:
        NirvanaError: the merges are not those of a SentencePiece model.
    """
    vocabulary = model["vocab"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    result: dict[str, float] = {}
    previous = None
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if piece != previous:
            if piece in result:
                raise _refusal(f"the merges of {piece!r} do not stand together")
            result[piece] = -float(rank)
        previous = piece
    known = set(merges)
    for piece in vocabulary:
        if piece in whole or is_byte(piece):
            continue
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in vocabulary and pair[1] in vocabulary and not whole.intersection(pair) and pair not in known:
                raise _refusal(f"{pair[0]!r} + {pair[1]!r} = {piece!r} is no merge")
    for byte in range(256):
        if f"<0x{byte:02X}>" not in vocabulary:
            raise _refusal(f"the byte token <0x{byte:02X}> is missing")
    return result


def adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space goes before the text.

    Raises:
        NirvanaError: the normaliser or the pre-tokenizer does something else.
    """
    steps = _steps(tokenizer["normalizer"], "normalizers") + _steps(tokenizer["pre_tokenizer"], "pretokenizers")
    prefix = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            prefix = prefix or step.get("prepend_scheme", "always") != "never"
        elif not (kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE):
            raise _refusal(f"llama.cpp has nothing like its step {step}")
    return prefix


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _refusal(reason: str) -> NirvanaError:
    return NirvanaError(f"the tokenizer is not of the SentencePiece kind that llama.cpp knows: {reason}")
