"""LoRAP's criterion for neurons (arXiv 2404.09695): norms of weights, each weighted by the size of what it reads.

Neuron j gets |W_up[j] sqrt(S_x)|_2 + |W_gate[j] sqrt(S_x)|_2 + |W_down[:, j]|_2 sqrt(S_h,j), where S is the mean over
tokens of the squared input. The lowest 1 % of an MLP's neurons are protected, as published: they get the score of its
best one. The same rate in every layer.

LoRAP factors attention by SVD and removes no heads. To plan attention as well, KV groups get here the same formula over
their rows of q, k, v and columns of o, without protection; its own scope is the MLP. The published re-propagation of
pruned outputs is left out (`ActivationCriterion` says why), and so is its rank formula, which is wrong for grouped
queries.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nirvana.architectures import Block
from nirvana.ops import group_saliency
from nirvana.saliency.kinds import ActivationCriterion, Part, Published

PROTECTED = 0.01


def _score(block: Block, parts: Sequence[Part]) -> Tensor:
    *rows, output = parts
    columns = group_saliency(output.weight, None, axis=1, group=1, statistics="squared").double()
    scores = output.of_units(columns * output.inputs.mean_square).sqrt()
    for part in rows:
        sizes = part.weight.float().square() @ part.inputs.mean_square.float()
        scores += part.of_units(sizes.double()).sqrt()
    if not block.is_attention:
        scores[scores.argsort(stable=True)[: int(PROTECTED * len(scores))]] = scores.max()
    return scores


CRITERION = ActivationCriterion(_score, reads_inputs=True, published=Published("uniform", scope="mlp"))
