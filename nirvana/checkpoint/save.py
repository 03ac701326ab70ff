"""The checkpoint folder: weights, configuration, tokenizer and plan, under the names that transformers reads."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from nirvana.checkpoint.atomic import atomic_directory
from nirvana.checkpoint.sums import write_sums
from nirvana.checkpoint.writer import SHARD_SIZE, write_weights
from nirvana.errors import NirvanaError
from nirvana.plan import PLAN_FILE, PruningPlan
from nirvana.progress import Progress
from nirvana.slicing import SlicedTensors

#: Text whose token ids must survive the change of model type: words, numbers, spaces, newlines, accents, code.
PROBE = "The 3 naïve résumés, 1024 tokens\n\n    def f(x): return x**2  # “quoted” … 你好"


def save_checkpoint(
    out: str | Path,
    sliced: SlicedTensors,
    plan: PruningPlan,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    overwrite: bool = False,
    shard_size: str | int = SHARD_SIZE,
    progress: Progress | None = None,
) -> Path:
    """Write the folder. It appears whole or not at all.

    Raises:
        NirvanaError: `out` exists and `overwrite` is false, or it cannot be written.
    """
    tensors = sliced.info()
    stage = (progress or Progress()).stage("save", sum(info.nbytes for info in tensors.values()), "B")
    with atomic_directory(out, overwrite) as folder:
        with stage as advance:
            sums = write_weights(folder, tensors, sliced.load, shard_size, advance)
        config = copy.deepcopy(sliced.config)
        config.dtype = sliced.dtype
        config.save_pretrained(folder)
        if not getattr(config, "scale_decoder_outputs", True) and "lm_head.weight" in tensors:
            _tell_own_head(folder / "config.json")
        if generation_config is not None:
            generation_config.save_pretrained(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        (folder / PLAN_FILE).write_text(plan.to_json())
        write_sums(folder, sums)
    return Path(out).absolute()


def _tell_own_head(file: Path) -> None:
    """T5 v1.1 has a vocabulary head of its own and does not scale its outputs; `tie_word_embeddings: false` says both.

    transformers 5 holds it as true in memory, ties or unties by the tensors that it finds, and would write that true;
    transformers 4 and whoever else reads the file would drop the head.
    """
    config = json.loads(file.read_text()) | {"tie_word_embeddings": False}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save, open again, compare: transformers may pick another tokenizer class for another model_type, silently."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the Rust code of tokenizers raises bare exceptions where the disk is full
        raise OSError(f"{error}") from None
    # The side stands in the class unless it is written down, and the class may change with the model type.
    file = folder / "tokenizer_config.json"
    sides = {"padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side}
    file.write_text(json.dumps(json.loads(file.read_text()) | sides, indent=2, ensure_ascii=False) + "\n")
    saved = AutoTokenizer.from_pretrained(folder)
    if saved(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        raise NirvanaError(
            f"the tokenizer {type(tokenizer).__name__} is read back as {type(saved).__name__} with other token ids; "
            "save it as a fast tokenizer (tokenizer.json) in the source checkpoint"
        )
