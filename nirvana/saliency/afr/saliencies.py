"""Several of AFR's forms from one pair of walks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import describe
from nirvana.calibration.manifest import tokens_sha256
from nirvana.saliency.afr.forms import FORMS
from nirvana.saliency.afr.units import score_pairs
from nirvana.saliency.kinds import PairCriterion
from nirvana.saliency.objectives import OBJECTIVES
from nirvana.saliency.passes import check_request
from nirvana.saliency.scores import Saliency


def score_forms(
    model: PreTrainedModel,
    tokens: Tensor,
    rules: Mapping[str, PairCriterion] = FORMS,
    *,
    objective: str = "nll",
    attention_mask: Tensor | None = None,
    micro_batch: int | None = None,
    gradient_checkpointing: bool | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Saliency]:
    """Name of the criterion -> what `nirvana.score` gives for it, bit for bit, at the cost of one.

    Args:
        rules: names and rules, as registered.
        model, tokens, objective, attention_mask, micro_batch, gradient_checkpointing, progress: see `nirvana.score`.

    Raises:
        NirvanaError: as `nirvana.score`.
    """
    check_request(model, objective, tokens, micro_batch)
    shape, digest = list(tokens.shape), tokens_sha256(tokens)
    asked = (OBJECTIVES[objective], tokens, attention_mask, micro_batch, progress, gradient_checkpointing)
    scores = score_pairs(model, describe(model), rules, *asked)
    batch = {"objective": objective, "calibration_shape": shape, "calibration_sha256": digest}
    return {name: Saliency(found, {"criterion": name, **batch}) for name, found in scores.items()}
