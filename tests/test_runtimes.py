"""The benchmark of runtimes measures what it says, and refuses a runtime that computes something else."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from nirvana.benchmarks import engines, report, runtimes
from nirvana.benchmarks.harness import Settings, WrongResultError
from nirvana.benchmarks.turns import Elsewhere, FailedError, Job, Measurement
from nirvana.errors import NirvanaError

QUICK = Settings("cpu", rounds=2, quick=True)
PROMPT = list(range(5, 21))

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_quick_run(llama_folder):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    names = ["transformers, fp32", "ONNX Runtime, fp32"]
    if not engines.why_not("llama.cpp, f16"):
        pytest.importorskip("nirvana.export.gguf")
        names += ["llama.cpp, f16", "llama.cpp, q8_0"]
    document = runtimes.run(QUICK, str(llama_folder), (*names, "vLLM, fp32"))
    sizes, prefill, decode, check, missing = document["records"].values()
    assert [row["pruned"] for row in sizes] == ["0%", "50%"]
    assert sizes[1]["prunable_parameters"] == pytest.approx(sizes[0]["prunable_parameters"] / 2, rel=0.1)
    for table in (prefill, decode):
        assert [row["runtime"] for row in table] == names
        assert all(row["0%"] == 1 and row["50%"] > 0 for row in table)
    assert all(0 <= abs(row["50%"]) <= engines.ENGINES[row["runtime"]].limit for row in check)
    assert [row["runtime"] for row in missing] == ["vLLM, fp32"]
    assert len(document["samples"][names[0]]["50%"]["decode_ms_per_token"]) == 2
    assert "runtime" in report.markdown(json.loads(json.dumps(document)))


def test_a_runtime_that_fails_does_not_take_the_others_with_it(llama_folder, monkeypatch, capsys):
    name = "llama.cpp, f16"

    def broken(checkpoint, exported):
        raise WrongResultError("first line\nno such instruction")

    broken_engine = engines.Engine(broken, "transformers", 1e-8)
    monkeypatch.setitem(engines.ENGINES, name, broken_engine)
    arguments = ["--quick", "--model", str(llama_folder), "--runtimes", f"{name}; transformers, fp32"]
    monkeypatch.setattr("sys.argv", ["runtimes", *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit, match=f"failed: {name}"):
        runtimes.main()
    shown = capsys.readouterr().out
    assert "no such instruction" in shown
    assert "transformers, fp32" in shown


@pytest.fixture
def job(llama_folder) -> Job:
    return Job("transformers, fp32", str(llama_folder), None, PROMPT, 3)


def test_a_runtime_that_forgets_is_refused(job, monkeypatch):
    """Only decoding is wrong: the first token after the prompt is not enough to see it."""

    class Forgetful(engines.Transformers):
        def decode(self, steps):
            self.forget()
            super().decode(steps)

    monkeypatch.setitem(engines.ENGINES, job.engine, engines.ENGINES[job.engine]._replace(open=Forgetful))
    with pytest.raises(WrongResultError, match="transformers, fp32 is wrong"):
        Measurement(job)


def test_a_pruned_model_in_place_of_the_dense_one_is_refused(job, plan_file, tmp_path):
    import nirvana

    small = nirvana.apply_checkpoint(job.checkpoint, nirvana.PruningPlan.load(plan_file), tmp_path / "small")
    runtime = engines.Transformers(str(small), None)
    assert engines.divergence(runtime, str(small), PROMPT, 3) < 1e-9
    assert engines.divergence(runtime, job.checkpoint, PROMPT, 3) > 1e-3


def test_a_process_of_its_own_takes_turns(job):
    way = Elsewhere(job)
    way.wait()
    assert abs(way.divergence) < 1e-9
    for _ in range(2):
        assert all(seconds > 0 for seconds in way.seconds())
    way.close()


def test_what_a_process_says_before_it_fails_is_told(job):
    way = Elsewhere(Job(**asdict(job) | {"checkpoint": "/nowhere"}))
    with pytest.raises(FailedError, match="no folder /nowhere"):
        way.wait()
    way.close()


def test_a_runtime_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["runtimes", "--runtimes", "abacus"])
    with pytest.raises(NirvanaError, match="'abacus' must be among"):
        runtimes.main()
