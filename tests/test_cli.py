"""The command line where everything goes well. What it refuses stands in test_cli_errors.py."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import nirvana
from nirvana.cli import COMMANDS, main

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 20

PRUNE_OPTIONS = (
    "--sparsity",
    "--out",
    "--overwrite",
    "--calibration",
    "--num-examples",
    "--seq-len",
    "--packing",
    "--seed",
    "--batches",
    "--combine",
    "--candidates",
    "--probe",
    "--probe-examples",
    "--criterion",
    "--objective",
    "--gamma",
    "--rounding",
    "--align",
    "--scope",
    "--allocation",
    "--steps",
    "--repair",
    "--repair-ridge",
    "--repair-strength",
    "--ntk",
    "--preset",
    "--micro-batch",
    "--device",
    "--dtype",
    "--evaluate",
    "--json",
    "--quiet",
)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "night.txt"
    path.write_text(TEXT)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two weight files hold the same names, types and bits; their order in the file does not count."""
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].numpy().tobytes() == right[name].numpy().tobytes()
        for name in left
    )


def test_version(cli_here):
    assert cli_here("--version") == (0, f"nirvana {nirvana.__version__}\n", "")


def test_help_names_every_command(cli_here):
    outcome = cli_here("--help")
    assert (outcome.code, outcome.stderr) == (0, "")
    for name in COMMANDS:
        assert f"    {name} " in outcome.stdout
    assert "exit codes" in outcome.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_teaches(cli_here, command):
    outcome = cli_here(command, "--help")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert f"nirvana {command}" in outcome.stdout.partition("example")[2], "no example to copy"
    assert COMMANDS[command].HELP in " ".join(outcome.stdout.split())
    assert "--json" in outcome.stdout


def test_help_of_prune_lists_its_options(cli_here):
    shown = cli_here("prune", "--help").stdout
    assert [option for option in PRUNE_OPTIONS if option not in shown] == []


@pytest.fixture(scope="module", params=["llama", "t5"])
def both_ways(request, tmp_path_factory, tokens_file):
    """The same work done by `prune`, without its repair, and by its stages: (folder, folder)."""
    folder = tmp_path_factory.mktemp("both")
    model = request.getfixturevalue(f"{request.param}_folder")
    whole, stages = folder / "whole", folder / "stages"
    saliency, plan = folder / "saliency.safetensors", folder / "plan.json"
    choice = ["--sparsity", "0.3", "--gamma", "2"]
    handler = signal.getsignal(signal.SIGTERM)
    for command in (
        ["prune", model, *choice, "--calibration", tokens_file, "--repair", "none", "--out", whole],
        ["score", model, "--calibration", tokens_file, "--out", saliency],
        ["plan", model, *choice, "--saliency", saliency, "--out", plan],
        ["apply", model, "--plan", plan, "--out", stages],
    ):
        assert main([str(argument) for argument in command]) == 0
    signal.signal(signal.SIGTERM, handler)
    return whole, stages


def test_the_stages_do_what_prune_does(both_ways):
    whole, stages = both_ways
    left, right = (nirvana.PruningPlan.load(folder) for folder in both_ways)
    assert left == right
    assert any(len(block.kept) < block.size for block in left.blocks)
    assert same_tensors(whole / "model.safetensors", stages / "model.safetensors")
    assert contents(whole).keys() == contents(stages).keys()


@pytest.mark.parametrize(
    "file", ["nirvana_plan.json", "model.safetensors", "config.json", "generation_config.json", "tokenizer.json"]
)
def test_the_stages_write_the_bytes_that_prune_writes(both_ways, file):
    whole, stages = both_ways
    assert (whole / file).read_bytes() == (stages / file).read_bytes()


@pytest.mark.parametrize("command", ["prune", "score", "plan", "apply"])
def test_every_stage_says_where_its_result_lies(
    cli_here, tmp_path, llama_folder, tokens_file, saliency_file, plan_file, command
):
    options = {
        "prune": ("--sparsity", 0.3, "--calibration", tokens_file),
        "score": ("--calibration", tokens_file),
        "plan": ("--sparsity", 0.3, "--saliency", saliency_file),
        "apply": ("--plan", plan_file),
    }
    outcome = cli_here(command, llama_folder, *options[command], "--out", tmp_path / "result")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert str(tmp_path / "result") in outcome.stdout


def test_two_runs_write_the_same_bytes(cli, cli_here, tmp_path, llama_folder, text_file):
    command = ("prune", llama_folder, "--sparsity", 0.3, "--calibration", text_file, "--num-examples", 4)
    command += ("--seq-len", 32, "--seed", 7, "--json", "--out")
    here, there = tmp_path / "here", tmp_path / "there"
    first = cli_here(*command, here)
    second = cli(*command, there, PYTHONHASHSEED="12345")
    assert (first.code, first.stderr) == (second.code, second.stderr) == (0, "")
    assert contents(here) == contents(there)
    # In a process of its own nothing but the JSON reaches stdout, whatever the libraries have to say.
    assert json.loads(second.stdout) == {**json.loads(first.stdout), "checkpoint": str(there)}


def test_prune_reports_what_it_wrote(cli_here, tmp_path, llama_folder, tokens_file):
    outcome = cli_here(
        "prune", llama_folder, "--sparsity", 0.4, "--calibration", tokens_file, "--out", tmp_path / "small", "--json"
    )
    assert (outcome.code, outcome.stderr) == (0, "")
    report = json.loads(outcome.stdout)
    totals = report["totals"]
    assert report["checkpoint"] == str(tmp_path / "small")
    assert report["sparsity"] == 1 - totals["prunable_after"] / totals["prunable_before"]
    assert report["sparsity"] == pytest.approx(0.4, abs=0.05)
    small = nirvana.load(report["checkpoint"], device="cpu")
    assert totals["parameters_after"] == sum(parameter.numel() for parameter in small.parameters())
    assert totals["prunable_after"] == nirvana.describe(small).prunable_parameters
    assert torch.isfinite(small(torch.arange(12)[None]).logits).all()


def test_tables_show_prunable_and_all_parameters(cli_here, tmp_path, llama_folder, tokens_file):
    outcome = cli_here(
        "prune", llama_folder, "--sparsity", 0.4, "--calibration", tokens_file, "--out", tmp_path / "small"
    )
    totals = nirvana.PruningPlan.load(tmp_path / "small").totals
    rows = {line[:20].strip(): line.split() for line in outcome.stdout.splitlines() if "parameters" in line[:20]}
    for label, key in (("prunable parameters", "prunable"), ("all parameters", "parameters")):
        assert f"{totals[f'{key}_before']:,}" in rows[label]
        assert f"{totals[f'{key}_after']:,}" in rows[label]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_uniform_allocation_gives_a_stock_checkpoint(cli_here, tmp_path, tokens_file, family, request):
    model = request.getfixturevalue(f"{family}_folder")
    choice = ("--sparsity", 0.3, "--allocation", "uniform", "--calibration", tokens_file)
    outcome = cli_here("prune", model, *choice, "--out", tmp_path / "stock")
    assert (outcome.code, outcome.stderr) == (0, "")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] in {"llama": ("llama", "mistral"), "t5": ("t5",)}[family]
    assert "auto_map" not in config
    blocks = nirvana.PruningPlan.load(tmp_path / "stock").blocks
    for unit in ("kv_group", "neuron"):
        assert len({len(block.kept) for block in blocks if block.unit == unit}) == 1
    assert any(len(block.kept) < block.size for block in blocks)


def test_unequal_widths_survive_the_checkpoint(cli_here, tmp_path, llama_folder, plan_file):
    assert cli_here("apply", llama_folder, "--plan", plan_file, "--out", tmp_path / "small").code == 0
    plan = nirvana.PruningPlan.load(plan_file)
    assert len({len(block.kept) for block in plan.blocks if block.unit == "neuron"}) == 2, "the plan is too even"
    found = nirvana.describe(nirvana.load(tmp_path / "small", device="cpu")).blocks
    assert {block.name: block.size for block in found} == {name: len(kept) for name, kept in plan.kept.items()}


def test_apply_takes_a_folder_for_a_plan_and_cuts_shards(cli_here, tmp_path, llama_folder, plan_file):
    one, shards = tmp_path / "one", tmp_path / "shards"
    assert cli_here("apply", llama_folder, "--plan", plan_file, "--out", one).code == 0
    outcome = cli_here("apply", llama_folder, "--plan", one, "--out", shards, "--max-shard-size", "60KB", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["checkpoint"] == str(shards)
    files = sorted(shards.glob("model-*.safetensors"))
    assert len(files) > 1
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(one / "model.safetensors")
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    nirvana.load(shards, device="cpu")


def test_overwrite_replaces_a_checkpoint_whole(cli_here, tmp_path, llama_folder, tokens_file, plan_file):
    old, fresh = tmp_path / "old", tmp_path / "fresh"
    shutil.copytree(llama_folder, old)
    for out in (old, fresh):
        outcome = cli_here("apply", llama_folder, "--plan", plan_file, "--out", out, "--overwrite")
        assert (outcome.code, outcome.stderr) == (0, "")
    assert contents(old) == contents(fresh)
    assert sorted(tmp_path.iterdir()) == [fresh, old], "temporary folders are left"


@pytest.mark.parametrize("command", ["score", "plan"])
def test_overwrite_replaces_a_file(cli_here, tmp_path, llama_folder, tokens_file, saliency_file, command):
    out = tmp_path / "result"
    out.write_text("something old")
    options = ("--calibration", tokens_file) if command == "score" else ("--saliency", saliency_file, "--sparsity", 0.3)
    assert cli_here(command, llama_folder, *options, "--out", out, "--overwrite").code == 0
    assert list(tmp_path.iterdir()) == [out]
    (nirvana.Saliency if command == "score" else nirvana.PruningPlan).load(out)


def test_new_parent_folders_are_made(cli_here, tmp_path, llama_folder, plan_file):
    out = tmp_path / "some" / "where" / "small"
    assert cli_here("apply", llama_folder, "--plan", plan_file, "--out", out).code == 0
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("kind", ["txt", "folder", "jsonl", "parquet"])
def test_calibration_files(cli_here, tmp_path, llama_folder, text_file, kind):
    source = tmp_path / f"calibration.{kind}"
    if kind == "folder":
        source.mkdir()
        shutil.copy(text_file, source / "only.txt")
    elif kind == "txt":
        shutil.copy(text_file, source)
    elif kind == "jsonl":
        source.write_text(json.dumps({"text": TEXT, "more": 1}) + "\n\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": [TEXT]}), source)
    batch = ("--num-examples", 3, "--seq-len", 24, "--json")
    settings = []
    for calibration, name in ((source, "one"), (text_file, "other")):
        outcome = cli_here("score", llama_folder, "--calibration", calibration, *batch, "--out", tmp_path / name)
        assert (outcome.code, outcome.stderr) == (0, "")
        settings.append(json.loads(outcome.stdout)["settings"])
    assert settings[0]["calibration_shape"] == [3, 24]
    # The same text makes the same batch, whatever file it comes in.
    assert settings[0]["calibration_sha256"] == settings[1]["calibration_sha256"]
    assert settings[0]["calibration"] == str(source)


@pytest.mark.parametrize("dtype", ["int32", "uint16", ">i8"])
def test_token_files_are_used_as_they_are(cli_here, tmp_path, llama_folder, dtype):
    np.save(tmp_path / "tokens.npy", np.arange(30).reshape(3, 10).astype(dtype))
    np.save(tmp_path / "int64.npy", np.arange(30).reshape(3, 10))
    hashes = []
    for name in ("tokens.npy", "int64.npy"):
        batch = ("--calibration", tmp_path / name, "--num-examples", 32)
        outcome = cli_here("score", llama_folder, *batch, "--out", tmp_path / f"{name}.s", "--json")
        assert outcome.code == 0
        settings = json.loads(outcome.stdout)["settings"]
        assert settings["calibration_shape"] == [3, 10]
        hashes.append(settings["calibration_sha256"])
    assert hashes[0] == hashes[1]


def test_seed_changes_the_draw(cli_here, tmp_path, llama_folder, text_file):
    def digest(seed: int, name: str) -> str:
        batch = ("--calibration", text_file, "--num-examples", 2, "--seq-len", 16, "--seed", seed)
        outcome = cli_here("score", llama_folder, *batch, "--out", tmp_path / name, "--json")
        return json.loads(outcome.stdout)["settings"]["calibration_sha256"]

    assert digest(1, "a") == digest(1, "b") != digest(2, "c")


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_criteria_without_calibration_need_no_tokenizer(cli_here, tmp_path, llama_folder, criterion):
    model = tmp_path / "model"
    shutil.copytree(llama_folder, model, ignore=shutil.ignore_patterns("tokenizer*"))
    outcome = cli_here("prune", model, "--sparsity", 0.3, "--criterion", criterion, "--out", tmp_path / "small")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert nirvana.PruningPlan.load(tmp_path / "small").settings["criterion"] == criterion


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_the_type_of_what_is_written(cli_here, tmp_path, llama_folder, tokens_file, plan_file, dtype):
    prune = ("prune", llama_folder, "--sparsity", 0.3, "--calibration", tokens_file)
    for number, command in enumerate((prune, ("apply", llama_folder, "--plan", plan_file))):
        out = tmp_path / str(number)
        assert cli_here(*command, "--dtype", dtype, "--out", out).code == 0
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {getattr(torch, dtype)}
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_info_shows_a_folder_and_a_file_alike(cli_here, tmp_path, llama_folder, plan_file):
    cli_here("apply", llama_folder, "--plan", plan_file, "--out", tmp_path / "small")
    from_folder, from_file = cli_here("info", tmp_path / "small"), cli_here("info", plan_file)
    assert from_folder == from_file
    assert (from_file.code, from_file.stderr) == (0, "")
    lines = from_file.stdout.splitlines()
    for block in nirvana.PruningPlan.load(plan_file).blocks:
        (line,) = [line for line in lines if line.startswith(f"{block.name} ")]
        assert line.endswith(f"{len(block.kept)} / {block.size}")
        assert 0 < line.count("█") < 25
        assert (line.count("·") == 0) == (len(block.kept) == block.size)


def test_info_json(cli_here, plan_file):
    outcome = cli_here("info", plan_file, "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    shown, plan = json.loads(outcome.stdout), nirvana.PruningPlan.load(plan_file)
    assert shown["architecture"] == "llama"
    assert shown["totals"] == plan.totals
    assert shown["settings"] == plan.settings
    assert shown["blocks"] == {
        block.name: {"unit": block.unit, "kept": len(block.kept), "size": block.size} for block in plan.blocks
    }


def test_eval_of_one_model(cli_here, llama_folder, text_file):
    outcome = cli_here("eval", llama_folder, "--text", text_file, "--window", 32, "--max-windows", 4, "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    result = json.loads(outcome.stdout)
    assert result["reference"] is None
    assert result["text"] == {"source": str(text_file), "window": 32, "stride": 32, "windows": 4, "tokens": 4 * 31}
    model = result["model"]
    assert model["kl"] is None
    assert 1 < model["perplexity"] < 1e6
    assert model["perplexity"] == pytest.approx(np.exp(model["nll"]))
    assert 0 < model["forward_seconds"] < 60
    assert model["peak_memory_bytes"] > 10**7
    assert model["generated"]


def test_eval_of_an_encoder_decoder_beside_the_dense_one(cli_here, tmp_path, t5_folder, tokens_file, text_file):
    small = tmp_path / "small"
    assert cli_here("prune", t5_folder, "--sparsity", 0.4, "--calibration", tokens_file, "--out", small).code == 0
    windows = ("--text", text_file, "--window", 32, "--max-windows", 4)
    outcome = cli_here("eval", small, "--reference", t5_folder, *windows)
    assert (outcome.code, outcome.stderr) == (0, "")
    rows = {line[:36].strip(): line[36:].split() for line in outcome.stdout.splitlines() if line.strip()}
    dense, pruned, _ = rows["perplexity"]
    assert float(dense) > 1
    assert float(pruned) > 1
    kl = rows["KL to the dense model (nats/token)"]
    assert float(kl[0]) == 0 < float(kl[1])
    before, after, change = rows["prunable parameters"]
    assert int(after.replace(",", "")) < int(before.replace(",", ""))
    assert float(change.rstrip("%")) == pytest.approx(-40, abs=2)
    # It predicts the second half of each window.
    assert f"4 windows of 32 tokens, stride 32, {4 * 16} predicted tokens" in outcome.stdout


@pytest.mark.parametrize(("option", "drawn"), [((), True), (("--quiet",), False), (("--json",), False)])
def test_progress_bars_on_a_terminal(
    cli_here, tmp_path, llama_folder, tokens_file, monkeypatch: pytest.MonkeyPatch, option, drawn
):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    with os.fdopen(master, "rb", buffering=0) as screen, os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        choice = ("--sparsity", 0.3, "--calibration", tokens_file)
        outcome = cli_here("prune", llama_folder, *choice, "--out", tmp_path / "small", *option)
        terminal.write("end")
        terminal.flush()
        shown = screen.read(2**16).decode()
    assert outcome.code == 0
    assert ("score" in shown and "save" in shown) == drawn
    assert drawn or shown == "end"
    assert "%|" not in outcome.stdout
