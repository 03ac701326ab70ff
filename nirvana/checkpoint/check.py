"""Is this folder whole, and what opens it?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import transformers
from packaging.version import Version

from nirvana.architectures import describe
from nirvana.checkpoint.runtimes import Opener, Shape, openers, tensor_parallel_sizes
from nirvana.checkpoint.sums import SUMS_FILE, check_sums
from nirvana.checkpoint.verify import Verified, verify
from nirvana.errors import NirvanaError
from nirvana.models import resolve
from nirvana.plan import PLAN_FILE
from nirvana.progress import Progress


@dataclass(frozen=True)
class CheckReport:
    """What `check` found in a folder that is whole.

    Attributes:
        model_type: as in ``config.json``.
        tensors, bytes: how many weights there are and how large they are.
        hashed: files whose SHA-256 was compared; None where the folder has no list or it was not asked for.
        notes: what is no fault, yet worth knowing.
        openers: every runtime with what it needs.
        tensor_parallel: numbers of devices over which every layer can be split.
    """

    folder: Path
    model_type: str
    tensors: int
    bytes: int
    hashed: int | None
    notes: tuple[str, ...]
    openers: tuple[Opener, ...]
    tensor_parallel: tuple[int, ...]


def check(folder: str | Path, *, hashes: bool = False, progress: Progress | None = None) -> CheckReport:
    """Verify a checkpoint folder and say what opens it. Reads headers only, and nothing is run from the folder.

    Args:
        folder: what nirvana wrote, or any checkpoint of a supported family with safetensors weights.
        hashes: also read every file and compare it with the SHA-256 that was written with it.
        progress: told the bytes hashed.

    Raises:
        NirvanaError: the first fault: a missing or damaged file, a tensor of another shape than the configuration
            says, a plan of another model, an unknown model type, a newer format, a file that was changed.
    """
    if not Path(folder).is_dir():
        raise NirvanaError(f"no folder {folder}; give a checkpoint folder")
    folder = Path(folder).absolute()  # a folder called "demo" is a folder here
    config = resolve(folder).config()
    verified = verify(folder, config)
    hashed = None
    if hashes:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        with (progress or Progress()).stage("hash", size, "B") as advance:
            hashed = check_sums(folder, advance)
    written = json.loads((folder / "config.json").read_text())
    reference = written.get("auto_map", {}).get("AutoConfig", "")
    code = f"{reference.split('.')[0]}.py"
    shape = Shape.of(describe(config), code if (folder / code).is_file() else None)
    info = verified.tensors.info()
    return CheckReport(
        folder,
        config.model_type,
        len(info),
        sum(tensor.nbytes for tensor in info.values()),
        hashed,
        tuple(_notes(folder, written, shape, verified, hashes and hashed is None)),
        tuple(openers(shape)),
        tuple(tensor_parallel_sizes(shape)),
    )


def _notes(folder: Path, written: dict, shape: Shape, verified: Verified, no_list: bool) -> list[str]:
    notes = []
    if verified.plan is None:
        notes.append(f"no {PLAN_FILE}: not written by nirvana, or saved again since")
    elif not verified.applied:
        notes.append(f"{PLAN_FILE} is not applied: the weights have the widths before it")
    if no_list:
        notes.append(f"no {SUMS_FILE}: contents cannot be compared")
    version = str(written.get("transformers_version") or "0")
    if Version(version) > Version(transformers.__version__):
        notes.append(f"written with transformers {version}, installed is {transformers.__version__}")
    if shape.code and (folder / shape.code).read_bytes() != (Path(__file__).parent / shape.code).read_bytes():
        notes.append(f"{shape.code} is not the one of this nirvana: read it before you trust it")
    unused = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in verified.tensors.files())
    if unused:
        notes.append(f"{unused[0]} belongs to no index and is not read")
    return notes
