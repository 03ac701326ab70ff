"""The benchmarks of quality run on a small model, go on after an interruption, and say what they compare."""

from __future__ import annotations

import json

import pytest

from nirvana.benchmarks import candidates, quality

#: No window of it is like another.
TEXT = " ".join(str(number) for number in range(4000))


@pytest.fixture
def arguments(llama_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    common = ["--model", llama_folder, "--calibration", text, "--text", f"numbers={text}", "--windows", 2]
    return [str(part) for part in [*common, "--seq-len", 8, "--out", tmp_path / "out.json"]]


def test_quality_goes_on_where_it_stopped(arguments, tmp_path, capsys):
    sizes = ["--num-examples", "8", "--seeds", "1"]
    assert quality.main([*arguments, *sizes, "--ways", "nirvana", "best"]) == 0
    first = json.loads((tmp_path / "out.json").read_text())
    assert quality.main([*arguments, *sizes, "--ways", "nirvana", "mask-fisher + selection", "random"]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["rows"][: len(first["rows"])] == first["rows"]
    assert [row["way"] for row in document["rows"]] == [
        way for way in ("nirvana", "best", "random", "mask-fisher + selection") for _ in quality.SPARSITIES
    ]
    for row in document["rows"]:
        alike = [other["prunable"] for other in document["rows"] if other["sparsity"] == row["sparsity"]]
        assert max(alike) - min(alike) <= 0.02 * max(alike)  # of a tiny model; of the demo model 0.02 %
        assert row["perplexity"]["numbers"] > 1
        assert row["kl"] > 0
    assert "mask-fisher + selection" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        quality.main([*arguments, "--num-examples", "16", "--seeds", "1"])


def test_candidates_are_compared_with_their_mean(arguments, tmp_path, capsys):
    sizes = ["--num-examples", "4", "--candidates", "3", "--repetitions", "2"]
    assert candidates.main([*arguments, *sizes]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert [len(one["candidates"]) for one in document["repetitions"]] == [3, 3]
    table = capsys.readouterr().out
    for one in document["repetitions"]:
        assert f"{min(each['kl'] for each in one['candidates']):.3f}" in table
    assert "chosen, against the mean" in table
