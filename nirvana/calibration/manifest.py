"""What a calibration batch was made of, so that it can be made again and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nirvana.calibration.packing import Drawn


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does to a text without special tokens: its serialised form where it is a fast one,
    without the padding and truncation that a call leaves behind; its vocabulary where it is not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        content["padding"] = content["truncation"] = None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tokenizer_entries(tokenizer: PreTrainedTokenizerBase, chats: bool) -> dict[str, str]:
    """How text became ids: `tokenizer_sha256`, and the hash of the chat template where one was used."""
    entries = {"tokenizer_sha256": tokenizer_sha256(tokenizer)}
    if chats:
        template = json.dumps(tokenizer.chat_template, sort_keys=True)
        entries["chat_template_sha256"] = hashlib.sha256(template.encode()).hexdigest()
    return entries


def tokens_sha256(tokens: Tensor) -> str:
    """SHA-256 of the ids as little-endian int64, row by row."""
    return hashlib.sha256(tokens.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def batch_settings(manifests: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """What a saliency says of the batches that it was made on, one or several that were combined."""
    return {
        "calibration": str(manifests[0]["source"]),
        "seed": seed,
        "calibration_manifest": manifests[0] if len(manifests) == 1 else list(manifests),
    }


def package_versions(origins: list[dict[str, Any]]) -> dict[str, str]:
    """Installed releases of the libraries that made ids of this text: those that tokenise, and those that read it."""
    names = ["transformers", "tokenizers"]
    on_hub = any("hub" in origin for origin in origins)
    if on_hub:
        names.append("datasets")
    if on_hub or any(file.endswith(".parquet") for origin in origins for file in origin.get("files", ())):
        names.append("pyarrow")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def source_entry(name: str, about: dict[str, Any], drawn: Drawn) -> dict[str, Any]:
    """One source's part of a manifest.

    ``documents[i]`` is the number of the document in which this source's example i begins (among the documents that are
    not blank, from 0), ``offsets[i]`` the token within it; ``from_shards[i]`` is the file, for a data set of the Hub.
    """
    places = [example.place for example in drawn.examples]
    entry = {"name": name, **about, "joined": drawn.joined}
    if any(len(place) > 1 for place in places):
        entry["from_shards"] = [place[0] for place in places]
    entry["documents"] = [place[-1] for place in places]
    entry["offsets"] = [example.offset for example in drawn.examples]
    return entry
