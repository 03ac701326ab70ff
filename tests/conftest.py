"""What all tests share: tiny checkpoints with a real tokenizer, and the command line as users run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import nirvana
from nirvana import cli as command_line
from nirvana.calibration.corpora import BUILT_IN

VOCABULARY = 400

#: tests/test_triton.py runs these in a process of their own. Their conftest would take the place of this one, from
#: which tests import.
collect_ignore = ["interpreted"]


class Outcome(NamedTuple):
    """What a command left: exit code and everything it printed."""

    code: int
    stdout: str
    stderr: str


Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def one_thread():
    """Matrices this small gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on a built-in book."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(BUILT_IN["novels"] / "frankenstein.txt")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama checkpoint (2 layers, 4 KV groups of 2 query heads, 48 neurons) with a tokenizer. Do not change."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny T5 v1.1 checkpoint (2 + 2 layers, 4 heads, 48 neurons) with a tokenizer. Do not change."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    folder = tmp_path_factory.mktemp("models") / "t5"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokens_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration batch of token ids, [4, 16], that fits the tiny checkpoints."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY, (4, 16)))
    return path


@pytest.fixture(scope="session")
def saliency_file(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """Random scores for the tiny Llama, higher in its second layer, so that a plan cuts its layers unequally."""
    path = tmp_path_factory.mktemp("saliency") / "saliency.safetensors"
    generator = torch.Generator().manual_seed(0)
    blocks = nirvana.describe(AutoConfig.from_pretrained(llama_folder)).blocks
    scores = {b.name: torch.rand(b.size, generator=generator) * (1 + i // 2) for i, b in enumerate(blocks)}
    nirvana.Saliency(scores, {"criterion": "random", "seed": 0}).save(path)
    return path


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, saliency_file: Path) -> Path:
    """A plan for the tiny Llama that keeps different counts in its two layers."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    config = AutoConfig.from_pretrained(llama_folder)
    nirvana.allocate(nirvana.Saliency.load(saliency_file), config, sparsity=0.3, gamma=1.0).save(path)
    return path


def cli_command(*arguments: object) -> list[str]:
    """The command line of ``nirvana ARGUMENTS`` in a process of its own."""
    return [sys.executable, "-m", "nirvana.cli", *map(str, arguments)]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """``cli(*arguments, **environment)`` runs nirvana in a process of its own (about 5 s, most of it imports).

    ``before_start`` is called in the new process before it becomes Python, to set limits for it.
    """

    def run(*arguments: object, before_start: Callable[[], None] | None = None, **environment: str) -> Outcome:
        process = subprocess.run(
            cli_command(*arguments),
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            preexec_fn=before_start,
            timeout=120,
            check=False,
        )
        return Outcome(process.returncode, process.stdout, process.stderr)

    return run


@pytest.fixture
def cli_here(capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli_here(*arguments)`` runs nirvana in this process: the cheap way for the many cases."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = command_line.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Exception:
            # What Python itself does with an exception that nobody catches.
            code = 1
            traceback.print_exc()
        finally:
            signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
