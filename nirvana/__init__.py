"""nirvana: structured pruning for large language models.

    import nirvana
    result = nirvana.prune("meta-llama/Llama-3.1-8B", sparsity=0.5, out="llama-pruned")
    model = nirvana.load("llama-pruned")

Four stages, each usable alone: `score` -> `allocate` -> `apply` / `apply_checkpoint`, and `prune` for the whole way.
Importing the package lets transformers' Auto classes open pruned checkpoints.
"""

from nirvana import ops
from nirvana.allocation import allocate
from nirvana.architectures import describe
from nirvana.checkpoint.check import CheckReport, check
from nirvana.checkpoint.convert import apply_checkpoint
from nirvana.checkpoint.load import load
from nirvana.checkpoint.registration import register_pruned_types
from nirvana.comparison import Comparison, compare
from nirvana.compilation import compile_layers
from nirvana.errors import NirvanaError
from nirvana.export import Exported, export
from nirvana.masking import masked
from nirvana.plan import PruningPlan
from nirvana.pruning import PruneResult, prune
from nirvana.recipe import preset
from nirvana.saliency import Saliency, score
from nirvana.slicing import apply

__version__ = "0.1.0"

__all__ = [
    "CheckReport",
    "Comparison",
    "Exported",
    "NirvanaError",
    "PruneResult",
    "PruningPlan",
    "Saliency",
    "allocate",
    "apply",
    "apply_checkpoint",
    "check",
    "compare",
    "compile_layers",
    "describe",
    "export",
    "load",
    "masked",
    "ops",
    "preset",
    "prune",
    "score",
]

register_pruned_types()
