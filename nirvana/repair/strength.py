"""How much of a repair to keep, by KL on the probe: what was fitted to some tokens may hurt on others."""

from __future__ import annotations

from typing import Any

from nirvana.repair.weights import Blends
from nirvana.selection.probe import Probe

#: Fractions of the change of weights that are tried: all, half, none.
STRENGTHS = (1.0, 0.5, 0.0)


def choose_strength(blends: Blends, probe: Probe) -> dict[str, Any]:
    """Leave the model with the best mixture: first of the MLPs, then of the attention blocks. Five probes.

    Returns:
        JSON-ready: ``{"attention": 1.0, "mlp": 0.5, "curve": [{"attention": ..., "mlp": ..., "kl": ...}, ...]}``.
    """
    divergences: dict[tuple[float, float], float] = {}

    def kl(attention: float, mlp: float) -> float:
        if (attention, mlp) not in divergences:
            blends.set(attention, mlp)
            divergences[attention, mlp] = probe.divergence().kl
        return divergences[attention, mlp]

    mlp = min(STRENGTHS, key=lambda strength: kl(1.0, strength))
    attention = min(STRENGTHS, key=lambda strength: kl(strength, mlp))
    blends.set(attention, mlp)
    curve = [{"attention": a, "mlp": m, "kl": value} for (a, m), value in divergences.items()]
    return {"attention": attention, "mlp": mlp, "curve": curve}
