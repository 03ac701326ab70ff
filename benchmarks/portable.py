"""A real model in pieces small enough to be sent to a machine that takes little at a time and has no tokenizer.

    python -m nirvana.benchmarks.portable pack demo benchmarks/model   # where the model is
    python -m nirvana.benchmarks.portable unpack benchmarks/model      # where it is to be measured: checks and tells

Matrices become int8 rows with an fp32 scale a row, restored in bf16: not the model any more, but weights and gradients
as training leaves them, and the same ones on every machine. Needs only torch, numpy and transformers to restore.

A folder holds ``model-1.npz``, ... (numpy, no pickles: ``NAME.levels`` int8 ``[rows, columns]`` with ``NAME.scales``
fp32 ``[rows]``, or ``NAME.values`` fp32 for vectors), ``tokens.npy`` (int64 ``[examples, tokens]`` of the built-in
novels), and ``index.json``: the configuration, and the size and SHA-256 of every file.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from nirvana import models
from nirvana.calibration import load_batch
from nirvana.checkpoint.sums import sha256
from nirvana.errors import NirvanaError
from nirvana.parameters import auto_class

FORMAT, VERSION = "nirvana-portable", 1
INDEX, TOKENS = "index.json", "tokens.npy"
#: Bytes of a piece at most: a machine that takes 64 MiB at a time takes the repository (4.4 MB) beside it. The demo
#: model (120.3 MB) just fits two.
PIECE = 58 * 2**20
EXAMPLES, SEQ_LEN = 32, 128
#: The largest int8 level; -128 is not used.
LEVELS = 127


def pack(name: str, folder: str | Path, piece: int = PIECE) -> list[Path]:
    """Write the model NAME, as users write it, into an empty or new folder.

    Returns:
        The files.

    Raises:
        NirvanaError: no such model, something else is in the folder, or a tensor is too large for a piece.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and all(_is_ours(file) for file in folder.iterdir())):
        raise NirvanaError(f"{folder} holds something other than a packed model; choose another folder")
    source = models.resolve(name)
    model = source.model("float32", "cpu")
    tokens = load_batch("novels", source.tokenizer(), num_examples=EXAMPLES, seq_len=SEQ_LEN)
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    np.save(folder / TOKENS, tokens.numpy())
    files = [folder / TOKENS, *_write_pieces(model, folder, piece)]
    index = {
        "format": FORMAT,
        "version": VERSION,
        "model": name,
        "config": model.config.to_dict(),
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, default=str) + "\n")
    return [*files, folder / INDEX]


def load(folder: str | Path) -> tuple[PreTrainedModel, Tensor]:
    """The model in bf16 on the CPU in evaluation mode, and token ids, int64 ``[examples, tokens]``.

    Raises:
        NirvanaError: no packed model there, or a file of it is missing, damaged or of another one.
    """
    folder = Path(folder)
    index = _read_index(folder)
    for name, about in index["files"].items():
        _check(folder / name, about)
    try:
        config = _config(index["config"])
        with torch.device("cpu"):
            model = auto_class(config).from_config(config, dtype=torch.bfloat16).eval()
    except Exception as error:  # an architecture, or a configuration, that this version does not know
        reason = " ".join(str(error).split())[:200]
        raise NirvanaError(
            f"transformers {transformers.__version__} cannot make the model of {folder / INDEX} "
            f"({type(error).__name__}: {reason}); pack another, or use the version that packed it"
        ) from error
    wanted = dict(model.named_parameters())
    for name in index["files"]:
        if name != TOKENS:
            with np.load(folder / name, allow_pickle=False) as arrays:
                _restore(arrays, wanted, folder / name)
    if wanted:
        raise NirvanaError(f"{folder} holds no tensor {min(wanted)}; pack the model again")
    return model, torch.from_numpy(np.load(folder / TOKENS, allow_pickle=False))


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 ``[rows, columns]`` -> int8 levels of the same shape and fp32 scales ``[rows]``; a row of zeros has scale
    1."""
    scales = matrix.abs().amax(dim=1) / LEVELS
    scales[scales == 0] = 1
    return (matrix / scales[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8), scales


def _write_pieces(model: PreTrainedModel, folder: Path, piece: int) -> list[Path]:
    files: list[Path] = []
    archive = None
    for name, parameter in model.named_parameters():
        arrays = {f"{name}.values": parameter.detach().numpy()}
        if parameter.dim() == 2:
            levels, scales = quantise(parameter.detach())
            arrays = {f"{name}.levels": levels.numpy(), f"{name}.scales": scales.numpy()}
        # What the archive adds to the arrays: their headers, and an entry each in the directory at its end.
        size = sum(array.nbytes + 1024 for array in arrays.values())
        if size > piece:
            raise NirvanaError(
                f"{name} takes {size:,} bytes, a piece {piece:,} at most; this model is too large to pack"
            )
        if archive is None or archive.fp.tell() + size + 512 * len(archive.filelist) > piece:
            if archive is not None:
                archive.close()
            files.append(folder / f"model-{len(files) + 1}.npz")
            archive = zipfile.ZipFile(files[-1], "w", zipfile.ZIP_DEFLATED)
        for entry, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            archive.writestr(f"{entry}.npy", buffer.getvalue())
    archive.close()
    return files


def _restore(arrays: Any, wanted: dict[str, Tensor], file: Path) -> None:
    """Fill the parameters that are in one piece, and take them out of `wanted`."""
    for entry in arrays.files:
        name, kind = entry.rsplit(".", 1)
        if kind == "scales":
            continue
        if name not in wanted:
            raise NirvanaError(f"{file} holds {entry}, which the model does not have; pack the model again")
        values = torch.from_numpy(arrays[entry]).float()
        if kind == "levels":
            values *= torch.from_numpy(arrays[f"{name}.scales"])[:, None]
        if values.shape != wanted[name].shape:
            raise NirvanaError(
                f"{file}: {name} has shape {list(values.shape)}, the model {list(wanted[name].shape)}; pack it again"
            )
        wanted.pop(name).data.copy_(values)


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise NirvanaError(
            f"no packed model in {folder}: python -m nirvana.benchmarks.portable pack demo {folder}, "
            "where the demo model is installed"
        )
    try:
        index = json.loads((folder / INDEX).read_text())
        found = index["format"], index["version"]
        if found == (FORMAT, VERSION):
            # What else `load` takes from it.
            index["config"]["model_type"], index["files"][TOKENS]
            for about in index["files"].values():
                about["bytes"], about["sha256"]
            return index
        why = f"is {found[0]} version {found[1]}, not {FORMAT} version {VERSION}"
    except (ValueError, KeyError, TypeError) as error:
        why = f"cannot be read ({type(error).__name__}: {error})"
    raise NirvanaError(f"{folder / INDEX} {why}; pack the model again")


def _check(file: Path, about: dict[str, Any]) -> None:
    if not file.is_file():
        raise NirvanaError(f"{file} is missing; send it again ({about['bytes']:,} bytes)")
    size = file.stat().st_size
    if size != about["bytes"]:
        raise NirvanaError(f"{file} has {size:,} bytes instead of {about['bytes']:,}; send it again")
    if sha256(file) != about["sha256"]:
        raise NirvanaError(f"{file} is damaged or of another model: its SHA-256 is not that of {INDEX}; send it again")


def _config(values: dict[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    # What a newer transformers writes of itself is nothing to go by.
    values.pop("transformers_version", None)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _is_ours(file: Path) -> bool:
    return file.name in (INDEX, TOKENS) or (file.name.startswith("model-") and file.suffix == ".npz")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write a model and a calibration batch into a folder")
    packing.add_argument("model", metavar="MODEL", help="demo, a checkpoint folder, a .gguf file, a Hub id")
    packing.add_argument("folder", metavar="FOLDER")
    unpacking = commands.add_parser("unpack", help="check a folder, restore its model in memory and say what it is")
    unpacking.add_argument("folder", metavar="FOLDER")
    args = parser.parse_args()
    try:
        if args.command == "pack":
            for file in pack(args.model, args.folder):
                print(f"{file}  {file.stat().st_size:,} bytes")
        else:
            model, tokens = load(args.folder)
            count = sum(parameter.numel() for parameter in model.parameters())
            examples, length = tokens.shape
            print(f"{type(model).__name__}, {count:,} parameters in {model.dtype}; {examples} x {length} tokens")
    except NirvanaError as error:
        print(f"portable: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
