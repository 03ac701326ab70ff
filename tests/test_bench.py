"""The benchmarks run, check what they time, and refuse what is wrong. No time is asserted: only that there is one."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import nirvana
from nirvana.benchmarks import harness, mixture, plots, report, saliency, scoring
from nirvana.benchmarks.harness import Job, Settings, Way, WrongResultError
from nirvana.commands import bench
from nirvana.ops.backends import reference

QUICK = Settings("cpu", rounds=2, quick=True)
#: Ways that each quick benchmark must have timed. torch.compile may be missing: it needs a C++ compiler.
WAYS = {
    "saliency": ("eager, as published", "eager", "eager, buffers allocated before", "nirvana, torch"),
    "slice": ("boolean mask, as published", "index_select", "nirvana, torch", "nirvana, torch, kernel alone"),
    "kl": ("eager", "nirvana, torch"),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Shapes this small gain nothing from two."""


def assert_sane(job: dict) -> None:
    assert job["bytes"] > 0
    for mine in [*job["ways"].values(), *job["ceilings"].values()]:
        assert 0 < mine["p20_ms"] <= mine["p50_ms"] <= mine["p80_ms"]
        assert mine["gb_per_s"] == pytest.approx(job["bytes"] / mine["p50_ms"] / 1e6)
    for mine in job["ways"].values():
        assert mine["limit"] is None or mine["limit"] in job["ceilings"]
    eager = job["ways"].get("eager") or job["ways"]["boolean mask, as published"]
    assert eager["times_eager"] == 1.0
    if "torch.compile" not in job["ways"]:
        assert job["skipped"]["torch.compile"]


@pytest.mark.parametrize("name", WAYS)
def test_a_quick_run(cli_here, tmp_path, name):
    pytest.importorskip("matplotlib")
    outcome = cli_here("bench", name, "--quick", "--device", "cpu", "--out", tmp_path, "--plots")
    assert outcome.code == 0, outcome.stderr
    assert "p50 ms" in outcome.stdout
    assert "x eager" in outcome.stdout
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document["environment"]["torch"] == torch.__version__
    assert document["jobs"]
    for job in document["jobs"]:
        assert_sane(job)
    assert set(WAYS[name]) <= set(document["jobs"][0]["ways"])
    assert document["jobs"][0]["ceilings"]
    for records in document["records"].values():
        assert records
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_json_and_the_whole_job(cli_here):
    outcome = cli_here("bench", "prune", "--quick", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.stderr
    (records,) = json.loads(outcome.stdout)["prune"]["records"].values()
    assert [record["way"] for record in records] == ["straightforward", "nirvana, torch", "nirvana, auto"]
    assert all(record["total_s"] > 0 and record["peak_bytes"] > 0 for record in records)


def test_one_candidate(cli_here):
    outcome = cli_here("bench", "selection", "--quick", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.stderr
    (records,) = json.loads(outcome.stdout)["selection"]["records"].values()
    assert [record["way"] for record in records] == ["published", "nirvana"]
    assert records[0]["kl"] == pytest.approx(records[1]["kl"], rel=1e-3)
    assert all(record["total_s"] > 0 and record["peak_bytes"] > 0 for record in records)


def test_mixtures(cli_here):
    outcome = cli_here("bench", "mixture", "--quick", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.stderr
    records = json.loads(outcome.stdout)["mixture"]["records"]
    assert {"scikit-learn", "nirvana, torch"} <= {record["way"] for record in records["mixture_bounds"]}
    assert all(record["seconds"] > 0 for record in records["mixture_bounds"])
    exact = [
        pair for pair in records["agreement"] if pair["second"] == mixture.OUR_STARTS and "nirvana" in pair["first"]
    ]
    assert exact
    assert all(pair["agree"] == 1 for pair in exact)


def test_scores_that_change_from_round_to_round_are_a_failure(monkeypatch):
    right, rounds = nirvana.score, itertools.count()

    def changing(*arguments, **options):
        extra = next(rounds)
        return {block: values + extra for block, values in right(*arguments, **options).items()}

    assert scoring.run(QUICK)["failures"] == []
    monkeypatch.setattr(nirvana, "score", changing)
    document = scoring.run(QUICK)
    assert document["failures"] == ["nirvana: other bits in round 1", "nirvana, checkpointed: other bits in round 1"]


def test_a_wrong_mixture_is_refused(cli_here, monkeypatch):
    right = mixture.mixture_bounds
    monkeypatch.setattr(mixture, "mixture_bounds", lambda scores, **_: right(scores, max_components=1))
    outcome = cli_here("bench", "mixture", "--quick", "--device", "cpu")
    assert outcome.code == 1
    assert "WrongResultError: nirvana, torch and scikit-learn, starts of nirvana agree on" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("everything",), "'everything'"),
        (("kl", "--rounds", 1), "--rounds"),
        (("kl", "--threads", 0), "--threads"),
        (("kl", "--plots"), "--out"),
        (("kl", "--device", "tpu"), "'tpu'"),
        (("kl", "--device", "cuda:77"), "'cuda:77'"),
        (("kl", "--out", __file__), "not a folder"),
    ],
)
def test_bad_input_is_one_line(cli_here, arguments, says):
    outcome = cli_here("bench", *arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert says in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_every_benchmark_is_named_in_the_help():
    assert all(name in bench.EPILOG for name in bench.BENCHMARKS)


@pytest.mark.parametrize("operator", ["saliency", "gather", "divergence"])
def test_a_wrong_kernel_is_refused_before_anything_is_timed(cli_here, monkeypatch, operator):
    right = getattr(reference, operator)

    def wrong(*arguments):
        right(*arguments)
        out = arguments[0][0].out if operator == "saliency" else arguments[-1]
        out = out[0] if isinstance(out, list) else out
        out.view(-1)[-1] *= 1.01  # one element in hundreds, by one per cent

    monkeypatch.setattr(reference, operator, wrong)
    monkeypatch.setattr(harness.Clock, "seconds", lambda *_: pytest.fail("timed a wrong kernel"))
    name = {"saliency": "saliency", "gather": "slice", "divergence": "kl"}[operator]
    outcome = cli_here("bench", name, "--quick", "--device", "cpu")
    assert outcome.code == 1
    assert "WrongResultError: nirvana, torch" in outcome.stderr


def job_of(*ways: Way) -> Job:
    numbers = torch.ones(8)
    return Job("job", 64, ways, {}, [(numbers,)], lambda way, result, _: harness.assert_close(way, result, numbers))


def test_a_way_that_is_missing_here_is_reported():
    def absent(numbers):
        raise RuntimeError("no compiler\nfound")

    result = harness.measure(job_of(Way("eager", torch.clone), Way("torch.compile", absent, optional=True)), QUICK)
    assert list(result["ways"]) == ["eager"]
    assert result["skipped"] == {"torch.compile": "RuntimeError: no compiler found"}
    with pytest.raises(RuntimeError, match="no compiler"):
        harness.measure(job_of(Way("eager", torch.clone), Way("nirvana", absent)), QUICK)


@pytest.mark.parametrize("spoil", [lambda x: x * torch.nan, lambda x: x[:4], lambda x: x + 1e-6])
def test_not_a_number_a_wrong_shape_and_a_small_error_are_wrong(spoil):
    with pytest.raises(WrongResultError):
        harness.measure(job_of(Way("eager", lambda x: spoil(x.double()), tolerance=1e-7)), QUICK)


def test_copies_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(harness.environment, "last_level_cache", lambda: 1000)
    assert len(harness.copies(lambda seed: (seed,), 300, Settings("cpu"))) == 14
    assert len(harness.copies(lambda seed: (seed,), 5000, Settings("cpu"))) == 1


def test_float64_in_blocks_is_float64():
    weight, grad = saliency.draw(700, 40, torch.bfloat16, "cpu", 0)
    whole = weight.double() * grad.double()
    torch.testing.assert_close(saliency.exact(weight, grad, 0, 7), whole.abs().sum(1).view(-1, 7).sum(1))
    torch.testing.assert_close(saliency.exact(weight, grad, 1, 4), whole.abs().sum(0).view(-1, 4).sum(1))


def test_a_document_without_jobs_has_no_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.plot(harness.document("prune", QUICK, []), tmp_path) is None


def test_markdown_has_a_row_for_each_record():
    records = [{"way": "a|b", "peak_bytes": 2_000_000, "ratio": 0.5, "missing": None}]
    text = report.markdown(harness.document("kl", QUICK, [], memory=records))
    assert "| a\\|b | 2.0 | 0.5 | - |" in text
