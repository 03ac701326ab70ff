"""Accuracy on multiple-choice questions without examples, scored by lm-eval (EleutherAI's evaluation harness).

A task is one that lm-eval knows by name, and then fetches from the Hub, or a JSONL file of rows ``{"context": question,
"choices": [answer, ...], "label": index of the right one}``. A file is asked as lm-eval asks ARC and PIQA: the prompt
is "Question: <context>\\nAnswer:", a space and an answer follow, and the answer with the highest log-likelihood counts
(``acc``), or with the highest log-likelihood divided by its length in bytes (``acc_norm``).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nirvana.errors import NirvanaError
from nirvana.models import resolve_dtype
from nirvana.patching import evaluation_mode, parameters_as

#: As in lm-eval's arc_easy and piqa.
PROMPT, DELIMITER = "Question: {{context}}\nAnswer:", " "

#: Questions of one forward pass. On a CPU more only pad more: SmolLM2-135M takes as long for ARC-easy and PIQA at 2 as
#: at 4, 6 % longer at 8, 28 % at 16.
BATCH, BATCH_ON_GPU = 4, 32


@dataclass(frozen=True)
class Task:
    """A set of questions.

    Attributes:
        name: what the user calls it.
        source: file, or lm-eval's name.
        identity: hash of the file's questions, or what lm-eval says of its version.
        questions: how many are asked.
        answers: how many they have, all choices counted.
        harness: lm-eval's object.
    """

    name: str
    source: str
    identity: str
    questions: int
    answers: int
    harness: Any = field(repr=False)


def read_tasks(tasks: Sequence[str] | Mapping[str, str | Path | None], limit: int | None = 500) -> list[Task]:
    """Tasks that can be asked.

    Args:
        tasks: names that lm-eval knows; or name -> JSONL file, None for one that lm-eval knows.
        limit: ask the first so many questions of each; None asks all.

    Raises:
        NirvanaError: lm-eval is not installed, a file cannot be read or has a row that is no question, an unknown name,
            or no way to the Hub.
    """
    named = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks)
    if limit is not None and limit < 1:
        raise NirvanaError(f"--limit {limit} must be at least 1")
    rows = {name: read_questions(file) for name, file in named.items() if file is not None}
    if not named:
        return []
    with _lm_eval():
        return [
            _from_hub(name, limit) if file is None else _from_rows(name, file, rows[name][:limit])
            for name, file in named.items()
        ]


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task] | Sequence[str] | Mapping[str, str | Path | None],
    *,
    limit: int | None = 500,
    batch_size: int | None = None,
    dtype: str = "auto",
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, Any]]:
    """Accuracy of `model`.

    Args:
        model: with its language-model head, dense or pruned, of any family; left as it was found.
        tokenizer: its own; left as it was found.
        tasks: see `read_tasks`, or what it returned: `limit` then means nothing.
        batch_size: questions of one forward pass; None takes 4 on a CPU, else 32.
        dtype: of the weights while questions are answered: "float32", "bfloat16", "float16"; "auto" leaves them. On a
            CPU with AVX512-BF16 SmolLM2-135M answers 2.1x faster in bfloat16 than in float32.
        advance: called with the number of answers that were scored, as they are.

    Returns:
        Task -> ``{"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "samples"}``: fractions, and how many questions.

    Raises:
        NirvanaError: see `read_tasks`; unknown dtype.
    """
    kind = resolve_dtype(dtype, "--task-dtype") or model.dtype
    if batch_size is None:
        batch_size = BATCH if model.device.type == "cpu" else BATCH_ON_GPU
    if batch_size < 1:
        raise NirvanaError(f"{batch_size} questions of one forward pass: at least 1 is needed")
    if isinstance(tasks, Mapping) or not all(isinstance(task, Task) for task in tasks):
        tasks = read_tasks(tasks, limit)
    if not tasks:
        return {}
    with _lm_eval(), evaluation_mode(model), _keeps_its_head(model), parameters_as(model, kind):
        from lm_eval.evaluator import evaluate

        from nirvana.evaluation.shared_prompts import SharedPrompts

        # Stands before an empty question; lm-eval asks for it always, and some tokenizers have neither.
        prefix = 0 if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None else None
        # A copy: lm-eval gives it a padding token.
        mine = copy.deepcopy(tokenizer)
        wrapped = SharedPrompts(pretrained=model, tokenizer=mine, batch_size=batch_size, prefix_token_id=prefix)
        wrapped.advance, wrapped.questions = advance, batch_size
        found = {}
        for task in tasks:
            result = evaluate(wrapped, {task.name: task.harness}, limit=task.questions, log_samples=False)
            found[task.name] = _figures(task, result["results"][task.harness.config.task])
    return found


def read_questions(file: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, checked.

    Raises:
        NirvanaError: it cannot be read, or a row is no question; the message names the line.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise NirvanaError(f"--tasks: no file {file}") from None
    except (OSError, ValueError) as error:
        raise NirvanaError(f"--tasks: {file} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_question(line, f"--tasks: {file}, line {number}"))
    if not rows:
        raise NirvanaError(f"--tasks: {file} holds no questions")
    return rows


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NirvanaError(f"{where} is not JSON: {error}") from None
    form = 'rows are {"context": text, "choices": [text, ...], "label": index}'
    if not isinstance(row, dict):
        raise NirvanaError(f"{where} is no object; {form}")
    for key in ("context", "choices", "label"):
        if key not in row:
            raise NirvanaError(f'{where} has no "{key}"; {form}')
    context, choices, label = row["context"], row["choices"], row["label"]
    if not isinstance(context, str) or not context.strip():
        raise NirvanaError(f'{where}: "context" is no text; {form}')
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise NirvanaError(f'{where}: "choices" must be two texts or more; {form}')
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise NirvanaError(f'{where}: "label" {label!r} is no index of the {len(choices)} choices, which count from 0')
    return {"context": context, "choices": choices, "label": label}


def _from_rows(name: str, file: str | Path, rows: list[dict[str, Any]]) -> Task:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = {
        "task": name,
        # Called instead of a download.
        "custom_dataset": lambda **options: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": PROMPT,
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": DELIMITER,
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }
    identity = hashlib.sha256(json.dumps([PROMPT, DELIMITER, rows], sort_keys=True).encode()).hexdigest()
    return _ready(name, str(file), identity, ConfigurableTask(config=config), len(rows))


def _from_hub(name: str, limit: int | None) -> Task:
    manager = _known_tasks()
    if name not in manager.all_subtasks:
        what = "a group of tasks: name one of them" if name in manager.all_tasks else "unknown to lm-eval"
        raise NirvanaError(f"--tasks {name!r} is {what}; give NAME=FILE.jsonl or a task such as arc_easy, piqa")
    try:
        (task,) = manager.load([name])["tasks"].values()
        questions = len(task.eval_docs)
    except Exception as error:  # of datasets, of the Hub's client, of HTTP libraries, and of the task's own code
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NirvanaError(
            f"--tasks {name}: lm-eval cannot fetch its questions from the Hub ({reason}); give NAME=FILE.jsonl"
        ) from None
    if task.OUTPUT_TYPE != "multiple_choice" or "acc" not in task.aggregation():
        raise NirvanaError(f"--tasks {name} has no choices with an accuracy; give a task such as arc_easy, piqa")
    asked = questions if limit is None else min(limit, questions)
    return _ready(name, f"lm-eval {name}", f"lm-eval {name} {task.VERSION}, {asked} questions", task, asked)


@functools.cache
def _known_tasks() -> Any:
    """All that lm-eval knows: it reads 14 000 descriptions, which takes 7 s."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _ready(name: str, source: str, identity: str, task: Any, questions: int) -> Task:
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(0)
    answers = sum(len(task.doc_to_choice(doc)) for _, doc in zip(range(questions), task.eval_docs, strict=False))
    return Task(name, source, identity, questions, answers, task)


def _figures(task: Task, result: Mapping[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric in ("acc", "acc_norm"):
        for label in (metric, f"{metric}_stderr"):
            value = result.get(f"{label},none")
            figures[label] = float(value) if isinstance(value, int | float) else None
    return {**figures, "samples": task.questions}


@contextlib.contextmanager
def _lm_eval() -> Iterator[None]:
    """Inside, lm-eval is there and says nothing; bars and notes of its own would go to the user's terminal.

    Raises:
        NirvanaError: it is not installed.
    """
    before = os.environ.copy()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            try:
                import lm_eval.evaluator
                import lm_eval.models.huggingface
                import lm_eval.tasks  # noqa: F401
            except ImportError as error:
                raise NirvanaError(
                    f"--tasks needs lm-eval: pip install 'nirvana[eval]' ({' '.join(str(error).split())})"
                ) from None
            finally:
                # Importing it sets options of the Hub's client.
                for name in os.environ.keys() - before.keys():
                    del os.environ[name]
            logger.setLevel(logging.ERROR)
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _keeps_its_head(model: PreTrainedModel) -> Iterator[None]:
    """Inside, nothing ties the head to the embedding: lm-eval asks for it, and T5 v1.1, declared tied, has its own."""
    own = model.__dict__.get("tie_weights")
    model.tie_weights = lambda *args, **options: None
    try:
        yield
    finally:
        if own is None:
            del model.tie_weights
        else:
            model.tie_weights = own
