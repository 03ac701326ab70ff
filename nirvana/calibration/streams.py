"""A streamed data set -> documents, in an order that depends on nothing but the data set and the seed.

Nothing here knows the network: any `datasets.IterableDataset` will do. The library's own shuffle is not used, because
its order has changed between releases; a plan names its calibration by corpus and seed, so that order must not change.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from nirvana.calibration.rows import Document, Form, is_blank, row_document

if TYPE_CHECKING:
    from datasets import IterableDataset

#: Where a document stands: (shard, number of the document within it).
Place = tuple[int, ...]

#: Documents that are drawn from at once: the first so many of the stream, then the next so many if they do not suffice.
BUFFER = 4096

#: Never more documents than this are read of a stream; 65 536 documents of C4 are about 150 MB of text.
LIMIT = 16 * BUFFER

#: Shards (files) that are read in turn, so that a buffer is not one end of the corpus. The seed chooses which.
OPEN_SHARDS = 4

#: Length in characters from which a passage of consecutive rows is a document.
PASSAGE = 4096


def shuffled(
    dataset: IterableDataset, seed: int, *, field: str | None = None, form: Form | None = None, join: str | None = None
) -> Iterator[tuple[Place, Document]]:
    """At most `LIMIT` documents, one from each of `OPEN_SHARDS` open shards in turn; the seed orders the shards.

    Args:
        field, form: what of a row is its text; None recognises it.
        join: ends each row where consecutive rows make one passage; None: every row is a document.

    Raises:
        RowError: a row without text.
    """
    count = dataset.num_shards
    waiting = random.Random(seed).sample(range(count), count)
    reading = [_shard(dataset, waiting.pop(0), field, form, join) for _ in range(min(OPEN_SHARDS, count))]

    def in_turn() -> Iterator[tuple[Place, Document]]:
        turn = 0
        while reading:
            turn %= len(reading)
            found = next(reading[turn], None)
            if found is not None:
                yield found
                turn += 1
            elif waiting:
                reading[turn] = _shard(dataset, waiting.pop(0), field, form, join)
            else:
                del reading[turn]

    return islice(in_turn(), LIMIT)


def in_order(
    dataset: IterableDataset, *, field: str | None = None, form: Form | None = None, join: str | None = None
) -> Iterator[Document]:
    """At most `BUFFER` documents as they are stored, for running text to evaluate on."""
    count = dataset.num_shards
    documents = (doc for shard in range(count) for _, doc in _shard(dataset, shard, field, form, join))
    return islice(documents, BUFFER)


def _shard(
    dataset: IterableDataset, shard: int, field: str | None, form: Form | None, join: str | None
) -> Iterator[tuple[Place, Document]]:
    rows = dataset if dataset.num_shards == 1 else dataset.shard(dataset.num_shards, shard)
    documents = (form.document(row) if form else row_document(row, field) for row in rows)
    if join is not None:
        documents = _passages(documents, join)
    number = 0
    for document in documents:
        if not is_blank(document):
            yield (shard, number), document
            number += 1


def _passages(documents: Iterator[Document], join: str) -> Iterator[Document]:
    parts: list[str] = []
    length = 0
    for document in documents:
        if isinstance(document, list):
            yield document
        elif document.strip():
            parts.append(document + join)
            length += len(parts[-1])
            if length >= PASSAGE:
                yield "".join(parts)
                parts, length = [], 0
    yield "".join(parts)
