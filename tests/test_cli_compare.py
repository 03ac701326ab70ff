"""nirvana compare as users run it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import cli_command
from transformers import AutoTokenizer

import nirvana
from nirvana.comparison.record import FILE
from nirvana.evaluation.zero_shot import zero_shot

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--num-examples", 4, "--seq-len", 16, "--window", 24, "--windows", 5, "--align", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts that are quick to tokenise."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("hills", "seas", "dunes"):
        (folder / f"{name}.txt").write_text(" ".join(f"{name} of the number {number}" for number in range(200)))
    return folder


@pytest.fixture
def command(llama_folder, texts):
    """The command line for a folder, with more options."""
    base = ["compare", llama_folder, *SMALL, "--calibration", texts / "hills.txt", "--text", f"seas={texts}/seas.txt"]
    return lambda out, *more: [*base, "--out", out, *more]


def without_times(document):
    """Seconds, and memory that depends on what the process did before."""
    if isinstance(document, list):
        return [without_times(entry) for entry in document]
    if not isinstance(document, dict):
        return document
    return {
        key: without_times(value)
        for key, value in document.items()
        if key not in ("seconds", "pruning_seconds", "peak_bytes", "pruning_peak_bytes")
    }


def test_what_is_printed_and_written(cli_here, command, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    outcome = cli_here(*command(out, "--criteria", "nirvana,flap", "--sparsity", ".2,.8", "--quiet"))
    assert outcome.code == 0, outcome
    assert outcome.stderr == ""
    names = ["compare.json", "compare.md", "compare.png", "saliency-flap.safetensors", "saliency-nirvana.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((out / FILE).read_text())
    assert len(document["rows"]) == 2 * 2 * 3
    for printed in (outcome.stdout, (out / "compare.md").read_text()):
        assert "0.2 of the prunable parameters removed, scope both" in printed
        assert printed.count("impossible: --sparsity 0.8 ") == 3
        for row in document["rows"]:
            if "impossible" not in row:
                assert f"{row['parameters']:,}" in printed
                assert f"{row['texts']['seas']['perplexity']:.1f}" in printed
    assert re.search(r"nirvana +common +none +[\d,]+ +[+-]\d+ +[\d.]+ +[\d.]+ +[\d.]+ s", outcome.stdout)
    assert "the same tokens for all" in outcome.stdout
    # Once more: nothing is left to do, and the answer is the same.
    again = cli_here(*command(out, "--criteria", "nirvana,flap", "--sparsity", ".2,.8", "--json"))
    report = json.loads(again.stdout)
    assert report["resumed"] == 12
    assert report["rows"] == document["rows"]


def test_more_is_added_to_what_is_there(cli_here, command, texts, tmp_path):
    """Criteria, sparsities and texts that come later; finished rows keep their figures, seconds and all."""
    out = tmp_path / "out"
    assert cli_here(*command(out, "--criteria", "magnitude", "--sparsity", ".3", "--scope", "mlp")).code == 0
    before = json.loads((out / FILE).read_text())
    more = ("--criteria", "random,magnitude", "--sparsity", ".3,.2", "--scope", "mlp")
    outcome = cli_here(*command(out, *more, "--text", f"dunes={texts}/dunes.txt", "--quiet"))
    assert outcome.code == 0, outcome
    after = json.loads((out / FILE).read_text())
    assert [(row["criterion"], row["sparsity"]) for row in after["rows"]] == [
        ("magnitude", 0.3),
        ("random", 0.3),
        ("random", 0.2),
        ("magnitude", 0.2),
    ]
    assert all(set(row["texts"]) == {"seas", "dunes"} for row in after["rows"])
    assert after["rows"][0]["texts"]["seas"] == before["rows"][0]["texts"]["seas"]
    assert after["scoring"]["magnitude"] == before["scoring"]["magnitude"]
    assert after["dense"]["texts"].keys() == {"seas", "dunes"}
    # All at once gives the same.
    whole = cli_here(*command(tmp_path / "whole", *more, "--text", f"dunes={texts}/dunes.txt", "--json"))
    rows = {(r["criterion"], r["sparsity"]): r for r in without_times(json.loads(whole.stdout)["rows"])}
    assert rows == {(r["criterion"], r["sparsity"]): r for r in without_times(after["rows"])}


def test_questions_that_come_later(cli_here, command, tmp_path):
    """Finished rows get their accuracy; what they had stays. The dense model is asked as well."""
    pytest.importorskip("lm_eval")
    rows = [
        {"context": f"Which is {n}?", "choices": [f"hill {n}", f"sea {n + 1} again"], "label": n % 2} for n in range(9)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, options = tmp_path / "out", ("--criteria", "magnitude", "--sparsity", ".3,.8", "--scope", "mlp")
    assert cli_here(*command(out, *options)).code == 0
    before = json.loads((out / FILE).read_text())
    outcome = cli_here(*command(out, *options, "--tasks", f"mine={file}", "--limit", 7, "--quiet"))
    assert outcome.code == 0, outcome
    assert outcome.stderr == ""
    after = json.loads((out / FILE).read_text())
    assert after["rows"][0]["texts"] == before["rows"][0]["texts"]
    assert after["dense"]["texts"] == before["dense"]["texts"]
    model = nirvana.load(command(out)[1], device="cpu")
    saliency = nirvana.Saliency.load(out / "saliency-magnitude.safetensors")
    small = nirvana.apply(model, nirvana.allocate(saliency, model, sparsity=0.3, align=4, scope="mlp"))
    tokenizer = AutoTokenizer.from_pretrained(command(out)[1])
    assert after["dense"]["tasks"] == zero_shot(model, tokenizer, {"mine": file}, limit=7)
    assert after["rows"][0]["tasks"] == zero_shot(small, tokenizer, {"mine": file}, limit=7)
    assert "tasks" not in after["rows"][1]  # impossible
    accuracy = f"{100 * after['rows'][0]['tasks']['mine']['acc']:.1f}/"
    for printed in (outcome.stdout, (out / "compare.md").read_text()):
        assert accuracy in printed
        assert f"mine ({file}, 7 questions)" in printed
    for more in (("--limit", 8), ("--limit", 7, "--task-dtype", "bfloat16")):
        other = cli_here(*command(out, *options, "--tasks", f"mine={file}", *more))
        assert other.code == 2
        assert "holds results of another task mine" in other.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--num-examples", 5), "another calibration batch"),
        (("--seed", 1), "another calibration batch"),
        (("--align", 8), "--align 4 instead of 8"),
        (("--gamma", 2), "--gamma 3.36 instead of 2.0"),
        (("--windows", 4), "another text seas"),
        (("--dtype", "bfloat16"), "another model"),
    ],
)
def test_other_settings_are_refused(cli_here, command, tmp_path_factory, options, says, finished):
    outcome = cli_here(*command(finished, "--criteria", "magnitude", *options))
    assert outcome.code == 2
    assert outcome.stdout == ""
    remedy = "choose another --out or pass --overwrite"
    assert outcome.stderr == f"nirvana compare: {finished / FILE} holds results of {says}; {remedy}\n"


@pytest.fixture(scope="module")
def finished(llama_folder, texts, tmp_path_factory):
    """A comparison that is there already. Do not change."""
    out = tmp_path_factory.mktemp("finished") / "out"
    names = [name.strip("-").replace("-", "_") for name in SMALL[::2]]
    asked = {"criteria": ["magnitude"], "sparsity": [0.3], "scope": ["mlp"], "texts": {"seas": texts / "seas.txt"}}
    nirvana.compare(
        llama_folder, **dict(zip(names, SMALL[1::2], strict=True)), **asked, calibration=texts / "hills.txt", out=out
    )
    return out


def test_overwrite_begins_anew(cli_here, command, finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for file in finished.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    options = ("--criteria", "random", "--sparsity", ".2", "--scope", "mlp", "--align", 8)
    outcome = cli_here(*command(out, *options, "--overwrite", "--json"))
    assert outcome.code == 0, outcome
    assert [row["criterion"] for row in json.loads((out / FILE).read_text())["rows"]] == ["random"]
    assert not (out / "saliency-magnitude.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--criteria", "nirvanna"), "--criteria 'nirvanna' is unknown; known are nirvana, "),
        (("--criteria", "flap,flap"), "--criteria names flap 2 times; name it once"),
        (("--sparsity", "1.5"), "--sparsity 1.5 must be above 0 and below 1"),
        (("--sparsity", "some"), "invalid numbers with commas value: 'some'"),
        (("--scope", "heads"), "--scope 'heads' must be one of both, attention, mlp"),
        (("--allocation", "own"), "--allocation 'own' must be one of common, published"),
        (("--repair", "lora"), "--repair 'lora' must be one of least-squares, bias, none"),
        (("--align", 0), "--align 0 must be at least 1"),
        (("--gamma", 0), "--gamma 0.0 must be a positive number"),
        (("--windows", 0), "--windows 0 must be at least 1"),
        (("--window", 100000), "one window needs 100000; lower --window"),
        (("--text", "nowhere"), "no corpus or file 'nowhere'"),
        (("--text", "x=/no/file.txt"), "no corpus or file '/no/file.txt'"),
        (("--text", "seas=a.txt"), "--text names seas twice; give each a name of its own"),
        (("--text", "x="), "--text 'x=' is neither a name nor NAME=FILE"),
        (("--tasks", "a=/no/file.jsonl"), "--tasks: no file /no/file.jsonl"),
        (("--tasks", "a=x.jsonl,a=y.jsonl"), "--tasks names a twice"),
        (("--task-dtype", "int8"), "--task-dtype 'int8' must be one of auto, float32, bfloat16, float16"),
        (("--limit", 0), "--limit 0 must be at least 1"),
        (("--num-examples", 0), "at least 1 example of 2 tokens is needed"),
        (("--calibration", "nowhere"), "no corpus or file 'nowhere'"),
    ],
)
def test_refusals(cli_here, command, tmp_path, options, says):
    outcome = cli_here(*command(tmp_path / "out", *options))
    assert outcome.code == 2
    assert says in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_overwritten(cli_here, command, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / FILE).write_text("{")
    for name, says in (
        ("home", "holds something other than a comparison"),
        ("file", "is a file"),
        ("broken", "cannot be read"),
    ):
        more = () if name == "broken" else ("--overwrite",)
        outcome = cli_here(*command(tmp_path / name, "--criteria", "magnitude", *more))
        assert outcome.code == 2
        assert says in outcome.stderr
        assert len(outcome.stderr.splitlines()) == 1
    assert (tmp_path / "home" / "letter.txt").read_text() == (tmp_path / "file").read_text() == "dear"


def test_without_matplotlib(cli_here, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ("--criteria", "magnitude", "--sparsity", ".3", "--scope", "mlp")
    outcome = cli_here(*command(tmp_path / "out", *options))
    assert outcome.code == 0, outcome
    assert "no plot: it needs matplotlib (pip install 'nirvana[bench]')" in outcome.stdout
    assert not (tmp_path / "out" / "compare.png").exists()


def test_interrupted_and_continued(cli, cli_here, command, tmp_path):
    """Ctrl-C in a process of its own; the same command then does the rest, and the result is that of one run."""
    out = tmp_path / "out"
    options = ("--criteria", "random,flap", "--sparsity", ".2,.3")
    line = command(out, *options, "--json")
    one_thread = {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        cli_command(*line),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **one_thread},
        # A shell that runs tests in the background lets them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while process.poll() is None and not ((out / FILE).exists() and json.loads((out / FILE).read_text())["rows"]):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (130, "")
    kept = json.loads((out / FILE).read_text())
    count = len(kept["rows"])
    assert 1 <= count < 2 * 2 * 3
    says = (
        rf"nirvana compare: interrupted; {count} finished rows are in {out / FILE}; the same command goes on from there"
    )
    assert says in stderr
    assert not [path for path in out.iterdir() if ".partial" in path.name]
    outcome = cli(*line, **one_thread)
    assert outcome.code == 0, outcome
    assert json.loads(outcome.stdout)["resumed"] == count
    document = json.loads((out / FILE).read_text())
    assert document["rows"][:count] == kept["rows"]  # seconds and all: they were not computed again
    assert document["scoring"]["random"] == kept["scoring"]["random"]
    whole = cli_here(*command(tmp_path / "whole", *options, "--json"))
    assert whole.code == 0, whole
    assert without_times(json.loads((tmp_path / "whole" / FILE).read_text())) == without_times(document)
