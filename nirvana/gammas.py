"""gamma per kind of attention: encoder-decoders have three kinds, which need not give at the same rate."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Mapping

from nirvana.errors import NirvanaError
from nirvana.removal import Removal

#: Encoder self-attention, decoder self-attention and cross-attention (`Block.attention_kind`).
KINDS = ("encoder", "decoder", "cross")

_EXAMPLE = "--gamma encoder=3,decoder=2,cross=1.5"


def check_gamma(gamma: float | Mapping[str, float]) -> float | dict[str, float]:
    """`gamma` as it was given, a mapping in the order of `KINDS`.

    Raises:
        NirvanaError: not a positive number, or not one for each kind.
    """
    if not isinstance(gamma, Mapping):
        if not 0 < gamma < math.inf:  # False for nan as well
            raise NirvanaError(f"--gamma {gamma} must be a positive number; the published value is 3.36")
        return gamma
    for kind in gamma:
        if kind not in KINDS:
            raise NirvanaError(f"--gamma {kind}=... is not a kind of attention; known are {', '.join(KINDS)}")
    for kind in KINDS:
        if kind not in gamma:
            raise NirvanaError(f"--gamma has no value for {kind}; give all kinds, as {_EXAMPLE}")
        if not 0 < gamma[kind] < math.inf:
            raise NirvanaError(f"--gamma {kind}={gamma[kind]} must be a positive number")
    return {kind: gamma[kind] for kind in KINDS}


def read_gamma(text: str) -> float | dict[str, float]:
    """``3.36``, or ``encoder=3,decoder=2,cross=1.5``: a type for argparse."""
    if "=" not in text:
        return float(text)
    gamma: dict[str, float] = {}
    for entry in text.split(","):
        kind, _, value = (part.strip() for part in entry.partition("="))
        try:
            number = float(value)
        except ValueError:
            raise ArgumentTypeError(f"{entry!r} is not KIND=NUMBER; write {_EXAMPLE}") from None
        if kind in gamma:
            raise ArgumentTypeError(f"{kind} stands twice in {text!r}; write {_EXAMPLE}")
        gamma[kind] = number
    return gamma


read_gamma.__name__ = "number"  # argparse names the type in its error message


def attention_kinds(attention: Removal) -> dict[str, Removal]:
    """The attention blocks of each kind, ranked among themselves.

    Raises:
        NirvanaError: the model has one kind only.
    """
    kinds: dict[str, Removal] = {}
    for kind in KINDS:
        blocks = [block for block in attention.blocks if block.attention_kind == kind]
        if not blocks:
            raise NirvanaError(
                f"--gamma per kind is for encoder-decoders: this model has no {kind} attention; give one number"
            )
        kinds[kind] = Removal(blocks, attention.scores, attention.divisor)
    return kinds
