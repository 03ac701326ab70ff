"""Sparsity and gamma -> pruning rates: how what is removed is divided between the kinds of units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nirvana.errors import NirvanaError


@dataclass(frozen=True)
class Rates:
    """Pruning rates per kind: removed fraction of the attention parameters and of the MLP parameters."""

    attention: float
    mlp: float


def split_sparsity(attention: int, mlp: int, sparsity: float, gamma: float, scope: str = "both") -> Rates:
    """Divide what is removed between the kinds: rate_attn = p (A + M) / (A + gamma M), rate_mlp = gamma rate_attn.

    Args:
        attention: prunable attention parameters A of the model; only the ratio to `mlp` matters.
        mlp: prunable MLP parameters M.
        sparsity: p, the removed fraction of A + M, whatever the scope: equal sparsity is equal size.
        gamma: MLP pruning rate / attention pruning rate.
        scope: "both", or the only kind that is pruned.

    Returns:
        The rates. One above 1 is clamped and the rest moved to the other kind.

    Raises:
        NirvanaError: the scope holds fewer parameters than are to be removed.
    """
    removed = sparsity * (attention + mlp)
    if scope != "both":
        share = attention if scope == "attention" else mlp
        if removed > share:
            raise NirvanaError(
                f"--sparsity {sparsity:g} of all prunable parameters exceeds the {scope} share of "
                f"{share / (attention + mlp):.1%}; lower it or use --scope both"
            )
        rate = removed / share
        return Rates(rate, 0.0) if scope == "attention" else Rates(0.0, rate)
    rate_attention = removed / (attention + gamma * mlp)
    rate_mlp = gamma * rate_attention
    if rate_mlp > 1:
        return Rates((removed - mlp) / attention, 1.0)
    if rate_attention > 1:
        return Rates(1.0, (removed - attention) / mlp)
    return Rates(rate_attention, rate_mlp)


def split_by_kind(sizes: Mapping[str, int], gamma: Mapping[str, float], removed: float) -> dict[str, float]:
    """Divide what is removed: each attention kind is pruned at (rate of the MLPs) / (gamma of the kind).

    rate_mlp = removed / (M + sum of A_k / gamma_k); a rate above 1 is clamped and the rest moved to the others, in the
    same proportions. With equal gammas these are the rates of `split_sparsity`.

    Args:
        sizes: prunable parameters of each attention kind, A_k, and of the MLPs of all stacks, M, under any other name.
        gamma: of each attention kind.
        removed: parameters to remove, at most all.

    Returns:
        The rate of each entry of `sizes`.
    """
    weights = {kind: 1 / gamma.get(kind, 1.0) for kind in sizes}
    rates: dict[str, float] = {}
    while len(rates) < len(sizes):
        free = [kind for kind in sizes if kind not in rates]
        rate = removed / sum(sizes[kind] * weights[kind] for kind in free)
        full = [kind for kind in free if rate * weights[kind] > 1]
        rates |= dict.fromkeys(full, 1.0) or {kind: rate * weights[kind] for kind in free}
        removed -= sum(sizes[kind] for kind in full)
    return rates
