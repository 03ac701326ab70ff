"""nirvana select as users run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import cli_command

import nirvana

pytestmark = pytest.mark.usefixtures("one_thread")

#: Candidates, so many that an interruption after the first comes well before the last.
COUNT = 25
SMALL = ("--sparsity", 0.3, "--align", 1, "--num-examples", 4, "--seq-len", 16, "--device", "cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Enough for all candidates, and quick to tokenise."""
    path = tmp_path_factory.mktemp("text") / "count.txt"
    path.write_text(" ".join(f"the number {number}" for number in range(900)))
    return path


@pytest.fixture
def run_options(llama_folder, text):
    return lambda out, *more: ["select", llama_folder, *SMALL, "--calibration", text, "--out", out, *more]


def test_what_is_written(cli_here, run_options, llama_folder, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    outcome = cli_here(*run_options(out, "--candidates", 3, "--gamma", "auto", "--seed", 2))
    assert outcome.code == 0, outcome
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # no state is left behind
    names = ["plan.json", "saliency.safetensors", "selection.json", "selection.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    report = json.loads((out / "selection.json").read_text())
    plan, saliency = nirvana.PruningPlan.load(out / "plan.json"), nirvana.Saliency.load(out / "saliency.safetensors")
    kls = [candidate["kl"] for candidate in report["candidates"]]
    assert report["best"] == kls.index(min(kls))
    assert len(report["manifests"]["candidates"]) == 3
    assert plan.settings["gamma"] == report["gamma"]["gamma"]
    assert plan.settings["selection"] == saliency.settings["selection"]
    assert plan.settings["selection"]["candidate"] == report["best"]
    assert (out / "selection.png").read_bytes().startswith(b"\x89PNG")
    assert f"{report['best']} <- best" in outcome.stdout
    assert f"gamma: {report['gamma']['gamma']:g}, KL" in outcome.stdout
    assert "removed 30" in outcome.stdout
    # The plan cuts, and the saliency makes the same plan.
    assert cli_here("apply", llama_folder, "--plan", out / "plan.json", "--out", tmp_path / "smaller").code == 0
    again = nirvana.allocate(
        saliency, nirvana.load(llama_folder), sparsity=0.3, align=1, gamma=report["gamma"]["gamma"]
    )
    assert again.blocks == plan.blocks


def test_several_corpora_as_json_and_overwriting(cli_here, run_options, tmp_path):
    files = []
    for name in ("sea", "hill"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name} {number}" for number in range(900)))
        files.append(str(tmp_path / f"{name}.txt"))
    options = ("--calibration", ",".join(files), "--candidates", 3, "--json")
    outcome = cli_here(*run_options(tmp_path / "out", *options))
    report = json.loads(outcome.stdout)
    assert [one["source"] for one in report["candidates"]] == [*files, "+".join(files)]
    assert report["probe"] == {"source": "+".join(files), "shape": [4, 16]}
    assert report["gamma"] == {"gamma": 3.36, "curve": []}
    refused = cli_here(*run_options(tmp_path / "out", *options))
    assert refused.code == 2
    assert "exists" in refused.stderr
    more = ("--overwrite", "--probe", "novels", "--probe-examples", 6)
    again = json.loads(cli_here(*run_options(tmp_path / "out", *options, *more)).stdout)
    assert again["probe"] == {"source": "novels", "shape": [6, 16]}
    assert json.loads((tmp_path / "out" / "selection.json").read_text())["probe"] == again["probe"]


def test_without_matplotlib(cli_here, run_options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = cli_here(*run_options(tmp_path / "out", "--candidates", 1))
    assert outcome.code == 0, outcome
    assert "no plot: it needs matplotlib (pip install 'nirvana[bench]')" in outcome.stdout
    assert not (tmp_path / "out" / "selection.png").exists()
    assert (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--candidates", 0), "--candidates 0 must be at least 1"),
        (("--candidates", 99999), "lower --candidates"),
        (("--probe-examples", 0), "the probe is empty"),
        (("--probe", "nowhere"), "no corpus or file 'nowhere'"),
        (("--gamma", 0), "--gamma 0.0 must be a positive number"),
        (("--gamma", "some"), "invalid number or 'auto' value: 'some'"),
        (("--gamma", "auto", "--scope", "mlp"), "--gamma auto means nothing with --scope mlp"),
        (("--criterion", "magnitude"), "needs no calibration batch"),
        (("--state", "/proc"), "/proc is a folder, a file is to be written there"),
    ],
)
def test_refusals(cli_here, run_options, tmp_path, options, says):
    outcome = cli_here(*run_options(tmp_path / "out", *options))
    assert outcome.code == 2
    assert says in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_plan_cannot_search_gamma(cli_here, llama_folder, saliency_file, tmp_path):
    options = ("--saliency", saliency_file, "--sparsity", 0.3, "--gamma", "auto", "--out", tmp_path / "plan.json")
    outcome = cli_here("plan", llama_folder, *options)
    assert outcome.code == 2
    assert "prune and select search it" in outcome.stderr


def test_interrupted_and_continued(cli, cli_here, run_options, tmp_path):
    """Ctrl-C in a process of its own; the same command then does the rest, and the result is that of one run."""
    command = run_options(tmp_path / "out", "--candidates", COUNT, "--json")
    state = tmp_path / "out.state"
    one_thread = {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        cli_command(*command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **one_thread},
        # A shell that runs tests in the background lets them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (130, "")
    assert f"finished candidates are kept in {state}; the same command goes on from there" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]
    kept = nirvana.Saliency.load(state).settings["selection_state"]["table"]
    assert 1 <= len(kept) < COUNT
    outcome = cli(*command, **one_thread)
    assert outcome.code == 0, outcome
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    report = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert report["candidates"][: len(kept)] == kept  # seconds and all: they were not computed again
    assert len(report["candidates"]) == COUNT
    whole = cli_here(*run_options(tmp_path / "whole", "--candidates", COUNT, "--json"))
    assert json.loads(whole.stdout)["best"] == report["best"]
    for name in ("plan.json", "saliency.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
