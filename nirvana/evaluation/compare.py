"""One dictionary with everything that is known about a model, and about a reference beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nirvana.architectures import describe
from nirvana.calibration import read_documents
from nirvana.calibration.batch import check_tokens
from nirvana.calibration.corpora import EVALUATION
from nirvana.calibration.rows import Document
from nirvana.errors import NirvanaError
from nirvana.evaluation.generation import PROMPT, continue_text
from nirvana.evaluation.latency import forward_seconds
from nirvana.evaluation.memory import peak_bytes
from nirvana.evaluation.text import check_windows, score_text, text_windows
from nirvana.models import resolve
from nirvana.progress import Progress


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = 16,
    prompt: str = PROMPT,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a model, and a reference (usually the dense model) on the same text.

    Args:
        model: Hub id, checkpoint folder, .gguf file or "demo".
        reference: likewise; adds KL(reference || model) and the same figures for the reference.
        text: corpus name (its test or validation split) or file, see `nirvana.calibration.read_documents`; None is the
            built-in held-out text (two novels that no calibration corpus holds).
        window: tokens per window. An encoder-decoder reads the first half of it and predicts the second.
        stride: tokens by which windows move on; None is `window`, no overlap.
        max_windows: evenly spaced windows to use; None is all.
        prompt: text that is continued greedily.
        dtype, device: see `nirvana.load`.
        trust_remote_code: let transformers run code that comes with a checkpoint.
        progress: told how far the work is.

    Returns:
        JSON-ready: ``{"text": {...}, "model": {...}, "reference": {...} or None}``; a model has name, perplexity,
        nll, kl, parameters, prunable_parameters, generated, forward_seconds and peak_memory_bytes.

    Raises:
        NirvanaError: a model cannot be opened, there is no tokenizer, or too little text.
    """
    progress = progress or Progress()
    documents = check_evaluation(text, window, stride, max_windows)
    stride = window if stride is None else stride
    names = [str(model)] + ([str(reference)] if reference is not None else [])
    sources = [resolve(name, trust_remote_code) for name in names]
    tokenizer = sources[0].tokenizer() or sources[-1].tokenizer()
    if tokenizer is None:
        raise NirvanaError(f"{model} has no tokenizer, so no text can be evaluated; save one with the checkpoint")
    windows = text_windows(tokenizer, documents, window, stride, max_windows)
    models = [source.model(dtype, device) for source in sources]
    if len({candidate.config.is_encoder_decoder for candidate in models}) > 1:
        raise NirvanaError(f"the reference {reference} is not of the same kind (decoder or encoder-decoder) as {model}")
    if models[0].config.is_encoder_decoder and stride != window:
        raise NirvanaError("an encoder-decoder model is evaluated on windows without overlap; leave --stride out")
    for candidate in models:
        check_tokens(torch.stack(windows), candidate.config)
    results = []
    for index, candidate in enumerate(models):
        dense = models[1] if index == 0 and len(models) > 1 else None
        label = "evaluate" if index == 0 else "evaluate reference"
        with progress.stage(label, len(windows)) as advance:
            score = score_text(candidate, windows, stride=stride, reference=dense, advance=advance)
        results.append(
            {
                "name": names[index],
                "perplexity": score.perplexity,
                "nll": score.nll,
                "kl": score.kl,
                **_sizes(candidate),
                "generated": continue_text(candidate, tokenizer, prompt),
            }
        )
    with progress.stage("latency and memory", 1 + len(models)) as advance:
        for result, seconds in zip(results, forward_seconds(models), strict=True):
            result["forward_seconds"] = seconds
        advance(1)
        del models, candidate
        for result in results:
            result["peak_memory_bytes"] = peak_bytes(result["name"], dtype=dtype, device=device)
            advance(1)
    about = {
        "source": "built-in held-out novels" if text is None else str(text),
        "window": window,
        "stride": stride,
        "windows": score.windows,
        "tokens": score.tokens,
    }
    return {"text": about, "model": results[0], "reference": results[1] if len(results) > 1 else None}


def check_evaluation(
    text: str | Path | None, window: int, stride: int | None, max_windows: int | None
) -> list[Document]:
    """The documents to evaluate on. Raises NirvanaError for what `evaluate` would refuse without opening a model."""
    check_windows(window, window if stride is None else stride, max_windows)
    return read_documents(EVALUATION if text is None else text, held_out=True)


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prunable_parameters": describe(model).prunable_parameters,
    }
