"""Documents -> examples of equal length: which tokens of which documents, decided by the seed alone.

Python's own generator is used, whose draws are the same on every platform and in every release.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from nirvana.calibration.rows import Document

#: How examples are cut; see `nirvana.calibration.draw_batches`.
PACKINGS = ("random", "contiguous")

#: Documents that are joined at once for contiguous windows, so that a large file need not be tokenised as a whole.
CHUNK = 4096

Place = tuple[int, ...]
Block = list[tuple[Place, Document]]
Tokenise = Callable[[Document], list[int]]


class Example(NamedTuple):
    """`ids` begin at token `offset` of the document at `place`."""

    place: Place
    offset: int
    ids: list[int]


class Drawn(NamedTuple):
    """`joined`: examples may run on into the documents that follow. `held`: what there was, in words."""

    examples: list[Example]
    joined: bool
    held: str


def draw_random(
    blocks: Iterable[Block], tokenise: Tokenise, num_examples: int, seq_len: int, count: int, seed: int
) -> Drawn:
    """Random documents that are long enough, none twice, a random window of each, as the published code does.

    Fewer documents than one batch needs (one book, say): random windows of the joined text that do not overlap.
    `count` batches of `num_examples`, or as many examples as there are; the first ones are the same for every count.
    """
    draw = random.Random(seed)
    examples: list[Example] = []
    for number, block in enumerate(blocks):
        if number == 0 and len(block) < num_examples:
            return _windows_of_few(block, tokenise, num_examples, seq_len, count, draw)
        for index in draw.sample(range(len(block)), len(block)):
            place, document = block[index]
            ids = tokenise(document)
            if len(ids) >= seq_len:
                start = draw.randint(0, len(ids) - seq_len)
                examples.append(Example(place, start, ids[start : start + seq_len]))
            if len(examples) == count * num_examples:
                return Drawn(examples, False, "")
    return Drawn(examples, False, f"{len(examples)} documents of at least {seq_len} tokens")


def draw_contiguous(
    blocks: Iterable[Block], tokenise: Tokenise, num_examples: int, seq_len: int, count: int, seed: int, eos: int
) -> Drawn:
    """Documents joined with the end-of-sequence token and cut into windows; a batch is a run of windows in order, and
    the seed chooses which run. Nothing overlaps."""
    draw = random.Random(seed)
    examples: list[Example] = []
    tokens = 0
    for block in blocks:
        for chunk in _chunks(block, draw):
            text = _Joined(chunk, lambda document: [*tokenise(document), eos])
            tokens += len(text.ids)
            runs = len(text.ids) // seq_len // num_examples
            for run in draw.sample(range(runs), runs):
                first = run * num_examples
                examples += [text.window(first + place, seq_len) for place in range(num_examples)]
                if len(examples) == count * num_examples:
                    return Drawn(examples, True, f"{tokens} tokens")
    return Drawn(examples, True, f"{tokens} tokens")


def _windows_of_few(
    block: Block, tokenise: Tokenise, num_examples: int, seq_len: int, count: int, draw: random.Random
) -> Drawn:
    text = _Joined(block, tokenise)
    windows: Iterable[int] = range(len(text.ids) // seq_len)
    examples: list[Example] = []
    for _ in range(count):
        # One draw a batch: random.sample gives other numbers where more are asked for.
        left = list(windows)
        drawn = draw.sample(left, min(num_examples, len(left)))
        examples += [text.window(start, seq_len) for start in drawn]
        taken = set(drawn)
        windows = [window for window in left if window not in taken]
    return Drawn(examples, True, f"{len(text.ids)} tokens")


def _chunks(block: Block, draw: random.Random) -> Iterator[Block]:
    starts = range(0, len(block), CHUNK)
    for start in draw.sample(starts, len(starts)):
        yield block[start : start + CHUNK]


class _Joined:
    """Token ids of documents one after the other, and which document each comes from."""

    def __init__(self, block: Block, tokenise: Tokenise):
        self.ids: list[int] = []
        self._places: list[Place] = []
        self._starts: list[int] = []
        for place, document in block:
            ids = tokenise(document)
            if ids:
                self._places.append(place)
                self._starts.append(len(self.ids))
                self.ids += ids

    def window(self, number: int, length: int) -> Example:
        start = number * length
        index = bisect_right(self._starts, start) - 1
        return Example(self._places[index], start - self._starts[index], self.ids[start : start + length])
