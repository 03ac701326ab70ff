"""Matrix shapes of the models that are measured. Figures from their published configurations."""

from __future__ import annotations

from typing import NamedTuple


class Matrix(NamedTuple):
    """A weight and the units that its scores are of.

    Attributes:
        name: with a blank behind it, or "".
        rows, columns: its shape.
        axis: 0 where rows are scored, 1 where columns are.
        group: rows or columns a unit.
    """

    name: str
    rows: int
    columns: int
    axis: int
    group: int


class Model(NamedTuple):
    """What of a configuration decides the shapes."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_size: int
    layers: int
    vocabulary: int
    gated: bool = True

    def layer_matrices(self) -> list[Matrix]:
        """The prunable matrices of one layer: key/value groups of the attention, neurons of the MLP."""
        queries = self.heads * self.head_size
        keys = self.key_value_heads * self.head_size
        per_group = queries // self.key_value_heads
        matrices = [
            Matrix("q ", queries, self.hidden, 0, per_group),
            Matrix("k ", keys, self.hidden, 0, self.head_size),
            Matrix("v ", keys, self.hidden, 0, self.head_size),
            Matrix("o ", self.hidden, queries, 1, per_group),
            Matrix("up ", self.intermediate, self.hidden, 0, 1),
            Matrix("down ", self.hidden, self.intermediate, 1, 1),
        ]
        if self.gated:
            matrices.insert(4, Matrix("gate ", self.intermediate, self.hidden, 0, 1))
        return matrices


QUICK = "tiny"
MODELS = {
    "Llama-3.2-1B": Model(2048, 8192, 32, 8, 64, 16, 128256),
    "Llama-3.1-8B": Model(4096, 14336, 32, 8, 128, 32, 128256),
    "Llama-3.1-70B": Model(8192, 28672, 64, 8, 128, 80, 128256),
    "Qwen2.5-7B": Model(3584, 18944, 28, 4, 128, 28, 152064),
    "T5-3B": Model(1024, 16384, 32, 32, 128, 48, 32128, gated=False),
    "SmolLM2-135M": Model(576, 1536, 9, 3, 64, 30, 49152),
    QUICK: Model(64, 96, 4, 2, 16, 2, 300),
}


def distinct_matrices(names: list[str]) -> list[Matrix]:
    """Every different reduction in these models, named after where it occurs first: gate and up are one."""
    seen: dict[tuple[int, ...], Matrix] = {}
    for name in names:
        for matrix in MODELS[name].layer_matrices():
            seen.setdefault(matrix[1:], matrix._replace(name=f"{name} {matrix.name}"))
    return list(seen.values())
