"""`compare`: criteria side by side on one model, at the same size."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nirvana.architectures import describe
from nirvana.calibration import draw_batches, read_documents
from nirvana.calibration.corpora import EVALUATION
from nirvana.calibration.manifest import tokens_sha256
from nirvana.comparison.bench import Bench
from nirvana.comparison.cases import ALLOCATIONS, REFERENCE, Case, default_criteria, list_cases
from nirvana.comparison.plot import draw
from nirvana.comparison.record import PLOT, TABLE, Record, check_folder
from nirvana.comparison.scores import Scores
from nirvana.comparison.table import markdown
from nirvana.errors import NirvanaError
from nirvana.evaluation.text import check_windows, text_windows
from nirvana.evaluation.zero_shot import Task, read_tasks, zero_shot
from nirvana.models import resolve, resolve_dtype
from nirvana.progress import Progress
from nirvana.saliency import Saliency
from nirvana.selection import Probe
from nirvana.selection.state import model_fingerprint
from nirvana.widths import WidthRule

#: Name of the built-in held-out text.
NOVELS = "novels"

#: Windows that a forward pass takes at once.
WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        rows: JSON-ready, one for each case: criterion, sparsity, scope, allocation, repair; parameters, prunable and
            difference (kept, of all and of the prunable parameters; kept beyond the target); texts (name ->
            perplexity, kl) and tasks (name -> acc, acc_stderr, acc_norm, acc_norm_stderr, samples); note; or
            ``impossible`` with the reason.
        dense: texts and tasks of the dense model, and its parameters.
        scoring: criterion -> seconds and peak_bytes of its scoring pass, whether it reads_calibration, and where one
            pass scored several criteria, which ones it scored together. Sums cost what their parts did.
        settings, about: what the rows depend on, and where it came from.
        folder: where everything was written, or None.
        resumed: rows that an earlier run had finished.
    """

    rows: list[dict[str, Any]]
    dense: dict[str, Any]
    scoring: dict[str, dict[str, Any]]
    settings: dict[str, Any] = field(repr=False)
    about: dict[str, Any] = field(repr=False)
    folder: Path | None = None
    resumed: int = 0


def compare(
    model: str | Path | PreTrainedModel,
    *,
    criteria: Sequence[str] | None = None,
    sparsity: Sequence[float] = (0.2, 0.5),
    scope: Sequence[str] = ("both", "mlp"),
    allocation: Sequence[str] = ALLOCATIONS,
    repair: Sequence[str] = ("none",),
    calibration: str | Path = NOVELS,
    num_examples: int = 32,
    seq_len: int = 128,
    packing: str = "random",
    seed: int = 0,
    micro_batch: int | None = None,
    gamma: float = 3.36,
    align: int = 8,
    texts: Mapping[str, str | Path | None] | None = None,
    window: int = 512,
    windows: int = 16,
    tasks: Mapping[str, str | Path | None] | None = None,
    limit: int = 500,
    batch_size: int | None = None,
    task_dtype: str = "auto",
    out: str | Path | None = None,
    overwrite: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Prune a model by every criterion in every way asked for, at the same number of kept parameters, and evaluate.

    All see the same calibration tokens, and each criterion is scored once. Every row keeps the parameters that
    `sparsity` leaves, within half an aligned step (`nirvana.comparison.equal`); its ``difference`` says how many more.

    Args:
        model: Hub id, checkpoint folder, .gguf file, "demo", or a model in memory (which is left untouched).
        criteria: names of criteria, sums (a+b), or references (`nirvana.references`); None is every criterion.
        sparsity: removed fractions of the prunable parameters (attention + MLP matrices), whatever the scope.
        scope: "both", "mlp", "attention".
        allocation: "common" (`nirvana.allocate` with gamma) and "published" (each by the rule of its own paper).
        repair: "none", "least-squares", "bias"; none in a row of "published" is what the paper does.
        calibration, num_examples, seq_len, packing, seed: the calibration batch, see `nirvana.prune`.
        micro_batch: see `nirvana.score`.
        gamma, align: see `nirvana.allocate`.
        texts: name -> corpus or file to evaluate on, None for the built-in held-out novels, which are the default.
        window, windows: tokens a window; evenly spaced windows of each text.
        tasks: name -> JSONL file of questions, None for a task that lm-eval knows; see `nirvana.evaluation.zero_shot`.
        limit: the first so many questions of each task are asked.
        batch_size: questions of one forward pass; None takes what suits the device.
        task_dtype: of the weights while questions are answered, see `nirvana.evaluation.zero_shot`; "auto" leaves them.
        out: folder for compare.json, compare.md, compare.png and the scores. An interrupted comparison goes on from
            there, and one that is asked for more adds it.
        overwrite: begin anew instead.
        dtype, device: see `nirvana.load`.
        tokenizer: for a model in memory; otherwise the checkpoint's own.
        trust_remote_code: let transformers run code that comes with the checkpoint.
        progress: told how far the work is; silent by default.

    Raises:
        NirvanaError: bad input, or `out` holds something else. A case that cannot be is a row that says so.
    """
    progress = progress or Progress()
    cases = list_cases(default_criteria() if criteria is None else criteria, sparsity, scope, allocation, repair)
    WidthRule(cases[0].sparsity, gamma, align=align)  # refuses what is out of range
    if windows < 1:
        raise NirvanaError(f"--windows {windows} must be at least 1")
    check_windows(window, window, windows)
    if out is not None:
        check_folder(out)
    texts = {NOVELS: None} if texts is None else texts
    if not texts:
        raise NirvanaError("--text is empty; name at least one text")
    documents = {
        name: read_documents(EVALUATION if text is None else text, held_out=True) for name, text in texts.items()
    }
    asked = read_tasks(tasks or {}, limit)
    resolve_dtype(task_dtype, "--task-dtype")
    if not isinstance(model, PreTrainedModel):
        source = resolve(model, trust_remote_code)
        source.config()
        tokenizer = source.tokenizer()
        model = source.model(dtype, device)
    if tokenizer is None:
        raise NirvanaError("the model has no tokenizer, so no text can be evaluated; save one with the checkpoint")
    tokens_of = {
        name: torch.stack(text_windows(tokenizer, text, window, window, windows)) for name, text in documents.items()
    }
    sizes = {"num_examples": num_examples, "seq_len": seq_len, "seed": seed, "packing": packing}
    batch = draw_batches(calibration, tokenizer, **sizes)[0]
    answered = "" if task_dtype == "auto" else f" in {task_dtype}"
    settings = {
        "model_sha256": model_fingerprint(model),
        "calibration_sha256": tokens_sha256(batch.tokens),
        "seed": seed,
        "gamma": gamma,
        "align": align,
        "texts": {name: tokens_sha256(tokens) for name, tokens in tokens_of.items()},
        "tasks": {task.name: task.identity + answered for task in asked},
    }
    about = {
        "model": model.config._name_or_path,
        "calibration": batch.manifest,
        "texts": {
            name: {"source": str(texts[name] or "built-in held-out novels"), "shape": list(tokens.shape)}
            for name, tokens in tokens_of.items()
        },
        "tasks": {
            task.name: {"source": task.source, "questions": task.questions, "dtype": task_dtype} for task in asked
        },
    }
    record = Record(out, settings, about, overwrite)
    bench = Bench(model, batch.tokens, align=align, gamma=gamma, seed=seed, micro_batch=micro_batch)
    answering = {"batch_size": batch_size, "dtype": task_dtype}
    run = _Run(record, bench, _Evaluation(model, tokenizer, tokens_of, asked, answering), cases, progress)
    resumed = run.run()
    document = record.document
    if out is not None:
        record.write(TABLE, markdown(document).encode())
        if (picture := draw(document)) is not None:
            record.write(PLOT, picture)
    rows = [record.row(case) for case in cases]
    folder = None if out is None else Path(out)
    return Comparison(
        rows, document["dense"], document["scoring"], document["settings"], document["about"], folder, resumed
    )


class _Evaluation:
    """Everything that is measured of a model; the dense one is run once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Mapping[str, Tensor],
        tasks: Sequence[Task],
        answering: Mapping[str, Any],
    ):
        self._model, self._tokenizer = model, tokenizer
        self._tokens, self._tasks, self._answering = texts, tasks, answering
        self._probes: dict[str, Probe] = {}

    def complete(self, figures: Mapping[str, Any]) -> bool:
        """Whether `figures` has every text and task."""
        return not self._missing(figures, "texts", self._tokens) and not self._tasks_missing(figures)

    def add(self, figures: dict[str, Any], small: PreTrainedModel | None, progress: Progress) -> dict[str, Any]:
        """`figures` with what is missing; None stands for the dense model."""
        texts = dict(figures.get("texts", {}))
        for name in self._missing(figures, "texts", self._tokens):
            if name not in self._probes:
                self._probes[name] = Probe(self._model, self._tokens[name], micro_batch=WINDOWS_AT_ONCE)
            probe = self._probes[name]
            result = probe.dense() if small is None else probe.divergence(small)
            perplexity = result.perplexity if math.isfinite(result.perplexity) else None
            texts[name] = {"perplexity": perplexity, "nll": result.nll, "kl": result.kl}
        tasks = dict(figures.get("tasks", {}))
        if missing := self._tasks_missing(figures):
            model = self._model if small is None else small
            with progress.stage("questions", sum(task.answers for task in missing)) as advance:
                tasks |= zero_shot(model, self._tokenizer, missing, **self._answering, advance=advance)
        return {**figures, "texts": texts, "tasks": tasks}

    def _tasks_missing(self, figures: Mapping[str, Any]) -> list[Task]:
        names = self._missing(figures, "tasks", [task.name for task in self._tasks])
        return [task for task in self._tasks if task.name in names]

    @staticmethod
    def _missing(figures: Mapping[str, Any], kind: str, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in figures.get(kind, {})]


class _Run:
    """The loop over the cases."""

    def __init__(self, record: Record, bench: Bench, evaluation: _Evaluation, cases: list[Case], progress: Progress):
        self._record, self._bench, self._evaluation = record, bench, evaluation
        self._cases, self._progress = cases, progress

    def run(self) -> int:
        """Do what is missing. Returns how many rows there were."""
        done = sum(self._finished(case) for case in self._cases)
        dense = self._record.document["dense"]
        scores = Scores(self._record, self._bench, [case.criterion for case in self._cases], self._progress)
        with self._progress.stage("compare", len(self._cases)) as advance:
            if not self._evaluation.complete(dense):
                totals = {
                    "parameters": describe(self._bench.model).parameters,
                    "prunable": self._bench.architecture.prunable_parameters,
                }
                self._record.document["dense"] = self._evaluation.add(dense | totals, None, self._progress)
                self._record.save()
            advance(done)
            for case in self._cases:
                if not self._finished(case):
                    saliency = None if case.allocation == REFERENCE else scores.of(case.criterion)
                    self._record.put(case, self._figures(case, saliency))
                    advance(1)
        return done

    def _finished(self, case: Case) -> bool:
        row = self._record.row(case)
        return row is not None and ("impossible" in row or self._evaluation.complete(row))

    def _figures(self, case: Case, saliency: Saliency | NirvanaError | None) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            if isinstance(saliency, NirvanaError):
                raise saliency
            pruned = self._bench.prune(case, saliency)
            row = {**(self._record.row(case) or {}), **pruned.facts}
            figures = self._evaluation.add(row, pruned.model, self._progress)
        except NirvanaError as error:
            return {"impossible": str(error)}
        return {**figures, "seconds": time.perf_counter() - started}
