"""Candidate batches and the probe, from one or several corpora, no example in two of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nirvana.calibration import CalibrationBatch, draw_batches
from nirvana.calibration.corpora import split_mixture
from nirvana.errors import NirvanaError


@dataclass(frozen=True)
class Candidates:
    """What a selection chooses from, and what it measures on."""

    batches: tuple[CalibrationBatch, ...]
    probe: CalibrationBatch


def draw_candidates(
    calibration: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int = 8,
    num_examples: int = 32,
    seq_len: int = 128,
    seed: int = 0,
    probe: str | Path | None = None,
    probe_examples: int | None = None,
    **options: Any,
) -> Candidates:
    """Draw candidates from each corpus in turn; with several corpora, every so many are a mixture of all.

    Args:
        calibration: sources as for `nirvana.calibration.draw_batches`: "c4,wikitext2,gsm8k" or a list. Of 3 sources the
            candidates are c4, wikitext2, gsm8k, c4+wikitext2+gsm8k, c4, ...: each fourth is the mixture. A .npy that is
            asked for once is used as it is, else its rows are dealt out in order.
        tokenizer: the model's; may be None where all sources are .npy.
        count: number of candidates.
        num_examples, seq_len: size of each candidate.
        seed: of all draws.
        probe: source of the probe; by default all corpora in equal parts.
        probe_examples: examples of the probe; by default as many as of a candidate.
        options: further options of `nirvana.calibration.draw_batches`.

    Returns:
        Pairwise disjoint batches. Of one corpus the first candidate is what a run without selection would take.

    Raises:
        NirvanaError: no candidates or no probe are asked for, or a corpus cannot give so many disjoint examples.
    """
    probe_examples = num_examples if probe_examples is None else probe_examples
    if count < 1:
        raise NirvanaError(f"--candidates {count} must be at least 1; 8 is a good number")
    if num_examples < 1 or seq_len < 2:
        raise NirvanaError(f"{num_examples} examples of {seq_len} tokens: at least 1 example of 2 tokens is needed")
    if probe_examples < 1:
        raise NirvanaError(f"--probe-examples {probe_examples}: the probe is empty; at least 1 example is needed")
    sources = _sources(calibration)
    corpora = list(dict.fromkeys(corpus for source in sources for corpus in source))
    turns = [*sources, tuple(corpora)] if len(sources) > 1 else sources
    asked = [(turns[index % len(turns)], num_examples) for index in range(count)]
    asked.append((tuple(corpora) if probe is None else _corpora(str(probe)), probe_examples))
    shares = [_shares(*each) for each in asked]
    drawn: dict[str, _Examples] = {}
    for corpus, examples in sum(shares, Counter()).items():
        if _is_tokens(corpus):
            alone = [corpus in share for share in shares].count(True) == 1
            drawn[corpus] = _Examples(corpus, draw_batches(corpus, None), alone)
            continue
        # All that is wanted of one corpus is drawn at once: only within one draw are examples sure to be disjoint.
        batches = -(-examples // num_examples)
        sizes = {"num_examples": num_examples, "seq_len": seq_len, "seed": seed}
        try:
            drawn[corpus] = _Examples(corpus, draw_batches(corpus, tokenizer, count=batches, **sizes, **options))
        except NirvanaError as error:
            if batches == 1:
                raise
            raise NirvanaError(
                f"{error}; {count} candidates and the probe take {examples} disjoint examples of it: "
                "lower --candidates, or give another text with --probe"
            ) from None
    batches = [_assemble([drawn[corpus].take(part) for corpus, part in share.items()]) for share in shares]
    _check_disjoint(batches)
    return Candidates(tuple(batches[:-1]), batches[-1])


class _Examples:
    """The examples of one corpus, each handed out once, in the order of the draw.

    Args:
        whole: there is one taker, who gets everything whatever is asked for: a .npy file is used as it is.
    """

    def __init__(self, corpus: str, batches: list[CalibrationBatch], whole: bool = False):
        self._corpus, self._batches, self._whole = corpus, batches, whole
        self._left = [(number, row) for number, batch in enumerate(batches) for row in range(len(batch.tokens))]

    def take(self, examples: int) -> CalibrationBatch:
        if self._whole:
            return self._batches[0]
        if examples > len(self._left):
            raise NirvanaError(
                f"{self._corpus} has {len(self._left)} examples left where {examples} more are needed; lower "
                "--candidates or --num-examples, or give another text with --probe"
            )
        taken, self._left = self._left[:examples], self._left[examples:]
        rows: dict[int, list[int]] = {}
        for number, row in taken:
            rows.setdefault(number, []).append(row)
        if len(rows) == 1 and examples == len(self._batches[taken[0][0]].tokens):
            return self._batches[taken[0][0]]
        tokens = torch.stack([self._batches[number].tokens[row] for number, row in taken])
        parts = [{"rows": mine, "of": self._batches[number].manifest} for number, mine in rows.items()]
        return CalibrationBatch(tokens, {"source": self._corpus, "parts": parts})


def _assemble(parts: list[CalibrationBatch]) -> CalibrationBatch:
    """One batch of examples from each part in turn."""
    if len(parts) == 1:
        return parts[0]
    if len({part.tokens.shape[1] for part in parts}) > 1:
        shapes = ", ".join(f"{part.manifest['source']}: {part.tokens.shape[1]}" for part in parts)
        raise NirvanaError(f"examples of different lengths cannot be mixed ({shapes} tokens); give --seq-len that fits")
    longest = max(len(part.tokens) for part in parts)
    rows = [part.tokens[row] for row in range(longest) for part in parts if row < len(part.tokens)]
    source = "+".join(part.manifest["source"] for part in parts)
    return CalibrationBatch(torch.stack(rows), {"source": source, "parts": [part.manifest for part in parts]})


def _shares(corpora: tuple[str, ...], examples: int) -> Counter[str]:
    """Examples of each corpus, as equal as can be; a corpus that would give none is left out."""
    each, more = divmod(examples, len(corpora))
    shares = {corpus: each + (index < more) for index, corpus in enumerate(corpora)}
    return Counter({corpus: share for corpus, share in shares.items() if share})


def _check_disjoint(batches: list[CalibrationBatch]) -> None:
    """A corpus with doubled documents, or two names of one file, must not let the probe see a candidate."""
    probe = {tuple(example) for example in batches[-1].tokens.tolist()}
    for number, batch in enumerate(batches[:-1]):
        if any(tuple(example) in probe for example in batch.tokens.tolist()):
            raise NirvanaError(
                f"the probe shares an example with candidate {number} ({batch.manifest['source']}): the text holds it "
                "twice; remove doubles, or give another text with --probe"
            )


def _sources(calibration: str | Path | Sequence[str | Path]) -> list[tuple[str, ...]]:
    """The corpora of each source."""
    if isinstance(calibration, Path) or (isinstance(calibration, str) and Path(calibration).exists()):
        return [(str(calibration),)]
    listed = calibration.split(",") if isinstance(calibration, str) else list(calibration)
    return list(dict.fromkeys(_corpora(str(source)) for source in listed))


def _corpora(source: str) -> tuple[str, ...]:
    """The parts of a mixture "a+b", each once."""
    return tuple(dict.fromkeys(map(str, split_mixture(source))))


def _is_tokens(corpus: str) -> bool:
    return Path(corpus).suffix == ".npy"
