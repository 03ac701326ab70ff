"""The calls for a GPU, rehearsed on a CPU: what stages leave, limits, crashes, hangs, and what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from nirvana.benchmarks import correctness, environment, gpu, harness, profiled, report, runner, saliency, stages, tools
from nirvana.benchmarks.harness import Settings
from nirvana.benchmarks.runner import Result, Step
from nirvana.benchmarks.summary import Summary
from nirvana.ops.backends import reference

QUICK = Settings("cpu", rounds=2, quick=True)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Shapes this small gain nothing from two."""


def test_what_a_document_leaves_in_the_table_and_the_files(tmp_path):
    """Stages that really run, one after another in this process; what is printed fits, what is written is whole."""
    summary = Summary("check", tmp_path)
    for name in (
        "environment",
        "correctness torch",
        "ceilings",
        "saliency",
        "slice",
        "kl",
        "scoring",
        "grouped",
        "inference",
    ):
        summary.add(ran_here(name, tmp_path))
    whole = json.loads(summary.json_file.read_text())
    assert (whole["format"], whole["call"]) == ("nirvana-gpu", "check")
    assert whole["machine"]["torch"] == torch.__version__
    assert {stage["outcome"] for stage in whole["stages"].values()} == {"passed"}
    text = summary.markdown_file.read_text()
    for stage in whole["stages"].values():
        assert f"## {stage['document']['benchmark']}" in text
    # The measured copy beside every row; a CPU has no data sheet here.
    for stage in ("saliency", "slice", "kl", "grouped"):
        for job in whole["stages"][stage]["document"]["jobs"]:
            assert all(mine["of_copy"] > 0 and mine["of_peak"] is None for mine in job["ways"].values())
    assert "| of copy |" in text
    assert whole["stages"]["scoring"]["document"]["same_lowest_fifth"] == 1.0
    (records,) = whole["stages"]["inference"]["document"]["records"].values()
    assert records[1]["parameters"] < records[0]["parameters"]
    for lines in (60, 30, 0):
        table = summary.table(lines)
        assert len(table) <= max(lines, 3 + len(whole["stages"]))
        assert all(len(line) <= 180 for line in table)
        assert table[0].endswith("the figures mean nothing")
    assert sum("TB/s" in line for line in summary.table(60)) > 9
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [summary.json_file.name, summary.markdown_file.name]
    )
    assert re.fullmatch(r"[a-z0-9-]+-check\.json", summary.json_file.name)


def ran_here(name: str, folder: Path) -> Result:
    file = folder / "stage"
    outcome = stages.perform(name, replace(QUICK, compile=False, strict=False), str(file))
    document = json.loads(file.read_text())["document"]
    file.unlink()
    return Result(name, outcome, 1.0, document, "")


def test_a_job_that_fails_is_named_and_the_others_stay(tmp_path, monkeypatch):
    right = saliency.job

    def job(matrix, dtype, settings):
        if matrix.name == "down ":
            raise ValueError("broken on purpose")
        return right(matrix, dtype, settings)

    monkeypatch.setattr(saliency, "job", job)
    result = ran_here("saliency", tmp_path)
    assert result.outcome == "failed: ValueError: broken on purpose"
    assert len(result.document["jobs"]) == 4


def test_a_way_that_is_wrong_is_named_and_the_others_are_timed(tmp_path, monkeypatch):
    right = saliency.eager
    monkeypatch.setattr(saliency, "eager", lambda *arguments, **options: 1.1 * right(*arguments, **options))
    result = ran_here("saliency", tmp_path)
    assert result.outcome.startswith("failed: group_saliency gate 96x64 bfloat16, rows: eager: WrongResultError: ")
    assert len(result.document["jobs"]) == 5
    for job in result.document["jobs"]:
        assert list(job["failed"]) == ["eager"]
        assert "nirvana, torch" in job["ways"]
        assert job["ways"]["nirvana, torch"]["times_eager"] is None
    assert "| eager: failed, WrongResultError" in report.markdown(result.document)


def test_a_wrong_backend_fails_its_stage_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "gather", lambda weights, kept, axis, unit, outs: [out.zero_() for out in outs])
    result = ran_here("correctness torch", tmp_path)
    assert result.outcome.startswith("failed: torch: gather_slice")
    assert "is wrong" in result.document["records"]["backends"][0]["result"]


def test_parts_of_the_correctness_pass_are_all_of_it():
    counts = [correctness.run(QUICK, ["torch"], (i, 3))["records"]["backends"][0]["checks_passed"] for i in range(3)]
    assert sum(counts) == len(list(correctness.checks(QUICK)))
    assert min(counts) > 0


def test_what_is_missing_is_a_reason_and_no_failure(tmp_path, monkeypatch):
    for stage, reason in (
        ("ncu", "not on a GPU"),
        ("memcheck", "not on a GPU"),
        ("triton warm-up", "Triton does not"),
        ("correctness triton", "needs an NVIDIA GPU"),
    ):
        assert ran_here(stage, tmp_path).outcome.startswith(f"skipped: {reason}")
    monkeypatch.setattr(tools, "call", lambda *_, **__: (tools.NO_TESTS, "no tests ran in 1.00s"))
    assert ran_here("tests", tmp_path).outcome == "skipped: no kernel serves cpu here"
    monkeypatch.setenv("NIRVANA_MODEL", str(tmp_path / "nowhere"))
    assert "portable pack demo" in ran_here("real model", tmp_path).outcome
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    assert ran_here("tests", tmp_path).outcome == "skipped: pytest is not installed"


def test_a_module_that_cannot_be_imported_is_a_failure(tmp_path, monkeypatch):
    """Nothing that a stage needs is optional without a reason of its own."""

    def broken(settings):
        raise ImportError("cannot import name 'language' from 'triton'")

    monkeypatch.setattr(stages, "STAGES", {"kl": broken})
    assert ran_here("kl", tmp_path).outcome.startswith("failed: ImportError: cannot import name")


BANNER = "========= COMPUTE-SANITIZER\n"
READ = "========= Invalid __global__ read of size 4 bytes\n=========     at _tiles+0x10 in saliency.py:7\n"


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        ((0, BANNER), "passed", ""),
        ((9, f"{BANNER}{READ}========= ERROR SUMMARY: 1 error\n"), "failed", "ERROR SUMMARY: 1 error"),
        ((None, f"{BANNER}{READ}"), "failed", "but found: Invalid __global__ read of size 4 bytes"),
        ((None, BANNER), "skipped", "nothing found so far"),
        ((1, "========= Device not supported\n"), "skipped", "does not support this device"),
    ],
)
def test_what_a_sanitizer_finds_is_said_also_where_it_does_not_end(tmp_path, monkeypatch, answer, kind, says):
    monkeypatch.setattr(tools.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(tools.torch, "device", lambda name: mock.Mock(type="cuda"))
    monkeypatch.setattr(harness, "backends", lambda device: ["torch", "triton", "cuda"])
    monkeypatch.setattr(harness, "find_device", lambda name: name)
    monkeypatch.setattr(environment, "describe", lambda device: {"cpu": "", "threads": 1, "load": 0, "torch": ""})
    commands = []
    monkeypatch.setattr(tools, "call", lambda command, settings, **_: commands.append(command) or answer)
    outcome = ran_here("memcheck", tmp_path).outcome
    assert outcome.split(":")[0] == kind
    assert says in outcome
    assert commands[0][-2:] == ["--backend", "triton,cuda"]


@pytest.mark.parametrize(
    ("output", "outcome"),
    [
        (
            "[gw0] [  1%] PASSED tests/test_ops_gather.py::test_a[cuda-triton]\n",
            "passed, not finished in its time, 1% done",
        ),
        (
            "[gw0] [  1%] PASSED tests/x.py::test_a\n[gw1] [  2%] FAILED tests/x.py::test_b[cuda-cuda-(1, 3)] \n",
            "failed: not finished in its time, 2% done; FAILED tests/x.py::test_b[cuda-cuda-(1, 3)]",
        ),
        ("tests/x.py::test_b ERROR   [  2%]\n", "failed: not finished in its time, 2% done; tests/x.py::test_b ERROR"),
        ("created: 12/12 workers\n", "failed: not finished in its time, 0% done"),
    ],
)
def test_tests_that_do_not_end_name_what_has_failed_so_far(tmp_path, monkeypatch, output, outcome):
    monkeypatch.setattr(tools, "call", lambda *_, **__: (None, output))
    assert ran_here("tests", tmp_path).outcome == outcome


def step(name: str, script: str, seconds: float = 20) -> Step:
    """A stage in a few lines of Python that do not import torch."""
    before = "import json, os, subprocess, sys, time\ntask = json.loads(sys.stdin.readline())\n"
    before += "def write(o, d): open(task['file'], 'w').write(json.dumps({'outcome': o, 'document': d}))\n"
    return Step(name, seconds, [sys.executable, "-X", "faulthandler", "-c", before + script], {"stage": name})


def run_steps(*groups: list[Step], seconds: float = 30, workers: int = 2) -> dict[str, Result]:
    seen: list[Result] = []
    results = runner.run(groups, time.monotonic() + seconds, workers, seen.append)
    assert seen == results
    return {result.name: result for result in results}


def test_stages_that_crash_hang_or_say_nothing_do_not_stop_the_others(tmp_path, monkeypatch):
    """With its own limit each; what one has started ends with it."""
    monkeypatch.setattr(runner, "RESERVE", 0)
    child = tmp_path / "child"
    hang = f"""
write(None, {{"jobs": [1]}})
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(child)!r}, "w").write(str(process.pid))
print("hanging now", flush=True)
time.sleep(600)
"""
    start = time.monotonic()
    found = run_steps(
        [step("crash", "print('about to crash', flush=True); os.abort()", 2)],
        [step("hang", hang, 2)],
        [step("silent", "", 2), step("error", "sys.exit(3)", 2)],
        [step("late crash", "write('passed', {}); os.abort()", 2)],
        [step("good", "write('passed', {'jobs': []})", 2)],
        seconds=10,
    )
    assert time.monotonic() - start < 10 + runner.VANISHING
    assert found["crash"].outcome == "failed: SIGABRT without a result"
    assert found["crash"].log.startswith("about to crash")
    assert "Fatal Python error: Aborted" in found["crash"].log
    assert found["hang"].outcome.startswith("failed: killed after ")
    assert found["hang"].outcome.endswith(" s before its end")
    assert found["hang"].document == {"jobs": [1]}
    # Where it hangs.
    assert "hanging now" in found["hang"].log
    assert "most recent call first" in found["hang"].log
    assert not alive(int(child.read_text()))
    assert found["silent"].outcome == "failed: ended without a result"
    assert found["error"].outcome == "failed: exit code 3 without a result"
    assert found["late crash"].outcome == "failed: SIGABRT, after it had passed"
    assert found["good"].outcome == "passed"


def alive(process: int) -> bool:
    """Nothing that has ended and waits to be fetched."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_stage_leaves_of_its_time_goes_to_the_later_ones(monkeypatch):
    monkeypatch.setattr(runner, "RESERVE", 0)
    tell = "write('passed', {'seconds': task['until'] - time.monotonic()})"
    found = run_steps([step("first", tell, 5)], [step("second", tell, 5)], [step("third", tell, 10)], seconds=20)
    seconds = [found[name].document["seconds"] for name in ("first", "second", "third")]
    assert seconds[0] <= 5 < seconds[1] <= 10 < seconds[2] <= 20
    hung = run_steps([step("hung", "time.sleep(600)", 1)], [step("next", tell, 1)], [step("last", tell, 1)], seconds=9)
    assert hung["hung"].outcome == "failed: killed after 2 s without a result"
    assert hung["next"].document["seconds"] <= 2
    assert 5 < hung["last"].document["seconds"] < 7
    late = run_steps([step("first", tell, 5)], [step("second", tell, 5)], seconds=5)
    assert late["first"].outcome == "failed: no time left"
    assert late["second"].outcome == "passed"


def test_where_not_all_of_a_group_can_run_at_once_each_gets_its_share(monkeypatch):
    monkeypatch.setattr(runner, "RESERVE", 0)
    found = run_steps(
        [step(name, "time.sleep(600)", 6) for name in "ab"] + [step("c", "write('passed', {})", 6)],
        seconds=6,
        workers=1,
    )
    assert found["a"].outcome == "failed: killed after 2 s without a result"
    assert found["c"].outcome == "passed"


def test_a_stage_ends_when_the_call_is_killed(tmp_path):
    """Also what the stage has started: the call's process group does not hold them."""
    folder = str(Path(runner.__file__).parent)
    stage = f"""
import subprocess, sys, time
sys.path.insert(0, {folder!r})
import runner
task = runner.take_turn()
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "child.part")!r}, "w").write(str(process.pid))
import os; os.rename({str(tmp_path / "child.part")!r}, {str(tmp_path / "child")!r})
time.sleep(600)
"""
    call = f"""
import sys, time
sys.path.insert(0, {folder!r})
import runner
steps = [runner.Step("stage", 60, [sys.executable, "-c", {stage!r}], {{}})]
runner.run([steps], time.monotonic() + 60, 2, print)
"""
    process = subprocess.Popen([sys.executable, "-c", call])
    wait_for(lambda: (tmp_path / "child").exists())
    child = int((tmp_path / "child").read_text())
    assert alive(child)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(child))


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_whole_call_goes_on_after_a_crash_and_says_so(tmp_path, monkeypatch, capsys):
    """In real processes: the machine is asked, one stage crashes, what is written stays."""
    crash = step("crash", "print('last words', flush=True); os.abort()", 20)
    about = gpu.steps("measure", "cpu", 2, True)[0]
    summary = gpu.run("measure", [about, [crash]], 120, tmp_path, 2)
    assert summary.failed
    assert [result.outcome for result in summary.results] == ["passed", "failed: SIGABRT without a result"]
    assert "    | last words" in capsys.readouterr().out
    whole = json.loads(summary.json_file.read_text())
    assert whole["stages"]["crash"]["log"].startswith("last words\n")
    assert whole["machine"]["device"] == "cpu"


def test_a_first_stage_that_is_late_does_not_stop_the_others(tmp_path, monkeypatch):
    """Imports from a cold disk may take long; the machine is then named by those that come after."""
    monkeypatch.setattr(runner, "RESERVE", 0)
    about = json.dumps(
        {"environment": {"cpu": "Slow", "threads": 1, "load": 0, "torch": "2"}, "settings": {"quick": False}}
    )
    good = step("good", f"write('passed', json.loads({about!r}) | {{'benchmark': '', 'jobs': [], 'records': {{}}}})")
    summary = gpu.run("check", [[step("environment", "time.sleep(600)", 1)], [good]], 22, tmp_path, 2)
    assert [result.outcome for result in summary.results] == ["failed: killed after 2 s without a result", "passed"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["slow-check.json", "slow-check.md"]


def test_a_folder_that_can_no_longer_be_written_does_not_stop_the_call(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RESERVE", 0)
    (tmp_path / "out").touch()
    summary = gpu.run("check", [[step(name, "write('passed', None)")] for name in "ab"], 40, tmp_path / "out", 2)
    assert [result.outcome for result in summary.results] == ["passed", "passed"]
    assert capsys.readouterr().out.count("cannot write to") == 2


def test_ctrl_c_says_where_the_results_are(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    monkeypatch.setattr("sys.argv", ["gpu", "check", "--device", "cpu", "--out", str(tmp_path)])
    assert gpu.main() == 130
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("call", gpu.CALLS)
def test_limits_of_stages_add_up_to_the_calls(call):
    seconds, groups = gpu.CALLS[call]
    assert sum(max(group.values()) for group in groups) == seconds - gpu.RESERVE
    assert next(iter(groups[0])) == "environment"
    names = {name.removeprefix("quick ") for group in groups for name in group}
    assert names <= set(stages.STAGES)


def test_every_stage_has_its_place():
    names = {name.removeprefix("quick ") for _, groups in gpu.CALLS.values() for group in groups for name in group}
    assert names == set(stages.STAGES)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "--device", "tpu"], "'tpu'"),
        (["check", "--rounds", "1"], "--rounds 1"),
        (["check", "--stretch", "0"], "--stretch 0"),
        (["check", "--out", __file__], "is not a folder"),
        (["check", "--device", "cpu", "--out", f"{__file__}/below"], "nothing can be written in"),
    ],
)
def test_gpu_refuses_what_it_cannot_use_in_one_line(monkeypatch, capsys, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu", *arguments])
    assert gpu.main() == 2
    out, err = capsys.readouterr()
    assert says in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_nothing_runs_where_the_device_is_missing(monkeypatch, capsys, tmp_path):
    """The first stage finds out, in a process of its own: a broken driver must not take the call with it."""
    monkeypatch.setattr("sys.argv", ["gpu", "check", "--device", "cuda:77", "--out", str(tmp_path / "out")])
    assert gpu.main() == 2
    out, err = capsys.readouterr()
    assert "torch sees" in err
    assert len(err.splitlines()) == 1
    assert len(out.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_module_that_is_not_built_is_a_failure_and_a_missing_nvcc_a_note(monkeypatch, tmp_path):
    said = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nirvana").mkdir()
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(tools, "call", lambda command, settings, **wishes: said.append(wishes) or (0, ""))
    monkeypatch.setattr(tools.shutil, "which", lambda name: None)
    assert ran_here("build", tmp_path).outcome == "passed, without the CUDA module: nvcc is not on PATH"
    assert said == [{"NIRVANA_CUDA": "auto", "NIRVANA_CUDA_ARCHS": "90"}]
    monkeypatch.setattr(tools.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert ran_here("build", tmp_path).outcome == "passed, without the CUDA module: nvcc has no libcudart_static.a"
    (tmp_path / "nirvana" / f"_cuda.{sys.implementation.cache_tag}-x86_64-linux-gnu.so").touch()
    assert ran_here("build", tmp_path).outcome == "passed"
    monkeypatch.setattr(tools.shutil, "which", lambda name: None)
    assert ran_here("build", tmp_path).outcome == "passed, with an older CUDA module: nvcc is not on PATH"
    line = "nirvana: nirvana._cuda was not built, the install goes on without it: the compiler failed"
    for answer, says in (
        ((0, line), line),
        ((3, ""), "setup.py: exit code 3"),
        ((None, ""), "not finished in its time"),
    ):
        monkeypatch.setattr(tools, "call", lambda command, settings, answer=answer, **wishes: answer)
        assert ran_here("build", tmp_path).outcome.startswith("failed: RuntimeError: ")
        assert ran_here("build", tmp_path).outcome.endswith(says)


def test_what_ncu_prints_becomes_records():
    metrics = list(profiled.METRICS.values())
    header = ["ID", "Process ID", "Kernel Name", *metrics]
    units = ["", "", "", "usecond", "%", "Mbyte", "byte", "%", "%", "register/thread"]
    row = ["0", "7", "_tiles(int, float)", "42.5", "91.25", "1,234.5", "57,344", "12", "24.9", "124"]
    table = "\n".join(",".join(f'"{cell}"' for cell in line) for line in (header, units, row))
    (record,) = profiled.parse(f"==PROF== Connected to process 7\nsaliency rows triton\n{table}\n==PROF== bye\n")
    assert record["kernel"] == "_tiles(int, float)"
    assert (record["us"], record["memory"], record["registers"]) == (42.5, 91.25, 124)
    assert (record["read"], record["written"]) == (1_234_500_000, 57_344)
    # What a GPU does not count is no reason to lose the rest.
    (record,) = profiled.parse(table.replace('"24.9"', '"n/a"').replace(profiled.METRICS["issue"], "other"))
    assert (record["us"], record["warps"], record["issue"]) == (42.5, None, None)
    with pytest.raises(ValueError, match="no table"):
        profiled.parse("==ERROR== something else")


def test_the_profiled_calls_run(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["profiled", "--device", "cpu", "--quick"])
    profiled.main()
    printed = capsys.readouterr().out.splitlines()
    assert {line.rsplit(" ", 1)[0] for line in printed} == {name for name, _ in profiled.calls(QUICK)}


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 3.35), ("NVIDIA H200", 4.8), ("NVIDIA H100 PCIe", None), ("NVIDIA L4", None)],
)
def test_the_data_sheets_bandwidth(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert environment.peak_tb_per_s("cuda") == peak
    assert environment.peak_tb_per_s("cpu") is None
