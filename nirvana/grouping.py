"""Layers that have the same widths: joined, and moved from group to group.

`heads` and `neurons` are what each layer pays at each width, ``[layers, widths]``; infinite where it cannot have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np

from nirvana.errors import NirvanaError

Groups = list[list[int]]


def neighbours(groups: Groups) -> Iterator[Groups]:
    """Every way to move one layer to another group."""
    for old, new in permutations(range(len(groups)), 2):
        for layer in groups[old] if len(groups[old]) > 1 else ():
            changed = [[other for other in group if other != layer] for group in groups]
            changed[new] = sorted([*changed[new], layer])
            yield changed


def merge(groups: Groups, limit: int, heads: np.ndarray, neurons: np.ndarray) -> Groups:
    """Join the two groups whose common widths cost least more than their own, until `limit` are left."""
    groups = [list(group) for group in groups]
    columns = [(heads[group].sum(axis=0), neurons[group].sum(axis=0)) for group in groups]
    alone = [a.min() + b.min() for a, b in columns]

    def together(i: int, j: int) -> float:
        return (columns[i][0] + columns[j][0]).min() + (columns[i][1] + columns[j][1]).min() - alone[i] - alone[j]

    dearer = {pair: together(*pair) for pair in combinations(range(len(groups)), 2)}
    while len(groups) - groups.count([]) > limit:
        i, j = min(dearer, key=dearer.__getitem__)
        if not np.isfinite(dearer[i, j]):
            raise NirvanaError(
                f"--max-widths {limit} is impossible: the layers differ so much that no {limit} pairs fit them all"
            )
        groups[i] = sorted(groups[i] + groups[j])
        groups[j] = []
        columns[i] = columns[i][0] + columns[j][0], columns[i][1] + columns[j][1]
        alone[i] = columns[i][0].min() + columns[i][1].min()
        for pair in list(dearer):
            if j in pair:
                del dearer[pair]
            elif i in pair:
                dearer[pair] = together(*pair)
    return [group for group in groups if group]


def move(groups: Groups, heads: np.ndarray, neurons: np.ndarray) -> Groups:
    """Move single layers between the groups while the whole becomes cheaper."""
    groups = [list(group) for group in groups]

    def columns(layers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return heads[layers].sum(axis=0), neurons[layers].sum(axis=0)

    def cost(a: np.ndarray, b: np.ndarray) -> float:
        return a.min() + b.min()

    sums = [columns(group) for group in groups]
    costs = [cost(*pair) for pair in sums]
    home = {layer: number for number, group in enumerate(groups) for layer in group}
    still = 0
    while still < len(heads):
        for layer in range(len(heads)):
            still += 1
            old = home[layer]
            if len(groups[old]) == 1:
                continue
            left = columns([other for other in groups[old] if other != layer])
            added = [cost(a + heads[layer], b + neurons[layer]) - c for (a, b), c in zip(sums, costs, strict=True)]
            added[old] = np.inf
            new = int(np.argmin(added))
            saved = costs[old] - cost(*left)
            if added[new] < saved - 1e-12 * abs(saved) - 1e-12:
                groups[old].remove(layer)
                groups[new].append(layer)
                home[layer] = new
                for number in (old, new):
                    sums[number] = columns(groups[number])
                    costs[number] = cost(*sums[number])
                still = 0
    return [sorted(group) for group in groups]
