"""Selection and the search of gamma: against the steps done by hand on sliced models, and what they cost."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from families import ALL, CONFIGS, VOCABULARY, build
from torch import Tensor

import nirvana
from nirvana import NirvanaError, Saliency
from nirvana.calibration import CalibrationBatch
from nirvana.progress import Progress
from nirvana.selection import Probe, search_gamma, select
from nirvana.widths import WidthRule

pytestmark = pytest.mark.usefixtures("one_thread")

RULE = WidthRule(0.4, gamma=1.5, align=1)


def draw(seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (3, 14), generator=torch.Generator().manual_seed(seed))


def batches(count: int, seed: int = 100) -> list[CalibrationBatch]:
    return [CalibrationBatch(draw(seed + index), {"source": f"corpus {index}"}) for index in range(count)]


@contextlib.contextmanager
def forwards(model):
    """Counts the forward passes of the model."""
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    yield passes
    handle.remove()


def without_times(selection):
    records = [dict(record) for record in selection.to_dict()["candidates"]]
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


@pytest.mark.parametrize("name", ALL)
def test_each_candidate_is_score_plan_and_slice(name):
    model = build(CONFIGS[name], 1)
    probe, given = Probe(model, draw(2)), batches(3)
    before = copy.deepcopy(model.state_dict())
    chosen = select(model, given, probe, RULE, objective="nll", seed=7)
    plans, scores = [], []
    for one, batch in zip(chosen.candidates, given, strict=True):
        scores.append(nirvana.score(model, batch.tokens, objective="nll"))
        plans.append(nirvana.allocate(scores[-1], model, sparsity=0.4, gamma=1.5, align=1))
        sliced = probe.divergence(nirvana.apply(model, plans[-1]))
        assert (one.kl, one.perplexity) == pytest.approx((sliced.kl, sliced.perplexity), rel=1e-5)
    kls = [one.kl for one in chosen.candidates]
    assert len(set(kls)) == 3
    assert chosen.best == kls.index(min(kls))
    assert chosen.plan.blocks == plans[chosen.best].blocks
    assert all(chosen.saliency[block].equal(scores[chosen.best][block]) for block in chosen.saliency)
    assert chosen.dense_perplexity == pytest.approx(probe.divergence().perplexity, rel=1e-9)
    settings = chosen.plan.settings
    assert settings["calibration"] == f"corpus {chosen.best}"
    assert settings["selection"] == {"candidate": chosen.best, "of": 3, "kl": min(kls)}
    assert (settings["seed"], settings["objective"]) == (7, "nll")
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_a_candidate_costs_one_scoring_pass_and_one_probe_pass():
    model = build(CONFIGS["llama"], 3)
    with forwards(model) as passes:
        probe = Probe(model, draw(4))
        assert len(passes) == 1
        select(model, batches(4), probe, RULE)
    assert len(passes) == 1 + 4 * 2


class StopAfter(Progress):
    """Ctrl-C during the candidate after `candidates`."""

    def __init__(self, candidates: int, steps: int):
        self.left = candidates * steps + 3

    @contextlib.contextmanager
    def stage(self, name, total, unit=""):
        def advance(count):
            self.left -= count
            if self.left < 0:
                raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize("finished", [0, 2, 3])
def test_an_interrupted_selection_goes_on(tmp_path, finished):
    model = build(CONFIGS["llama"], 5)
    probe, given, state = Probe(model, draw(6)), batches(5), tmp_path / "state"
    whole = select(model, given, probe, RULE)
    steps = 1 + sum(part.scored for block in nirvana.describe(model).blocks for part in block.slices)
    with pytest.raises(KeyboardInterrupt):
        select(model, given, probe, RULE, state=state, progress=StopAfter(finished, steps))
    assert state.exists() == (finished > 0)
    again = build(CONFIGS["llama"], 5)  # another process
    with forwards(again) as passes:
        resumed = select(again, given, Probe(again, draw(6)), RULE, state=state)
    assert len(passes) == 1 + 2 * (5 - finished)
    assert resumed.resumed == finished
    assert without_times(resumed) == without_times(whole)
    assert resumed.plan.to_json() == whole.plan.to_json()
    assert resumed.saliency.settings == whole.saliency.settings
    assert all(resumed.saliency[block].equal(whole.saliency[block]) for block in whole.saliency)
    # All done: nothing is left to compute, and what comes out is the same again.
    with forwards(again) as passes:
        last = select(again, given, Probe(again, draw(6)), RULE, state=state, micro_batch=1)
    assert len(passes) == 1
    assert last.plan.to_json() == whole.plan.to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_state_of_another_selection_is_refused(tmp_path):
    model = build(CONFIGS["llama"], 8)
    probe, given, state = Probe(model, draw(9)), batches(2), tmp_path / "state"
    select(model, given, probe, RULE, state=state)
    saved = state.read_bytes()
    other_probe = Probe(model, draw(10))
    for arguments, more, message in (
        ((given, probe, WidthRule(0.3, gamma=1.5, align=1)), {}, "--sparsity 0.4 instead of 0.3"),
        ((given, probe, RULE), {"objective": "nll"}, "--objective of the criterion instead of nll"),
        ((given, probe, RULE), {"seed": 1}, "--seed 0 instead of 1"),
        ((batches(2, seed=200), probe, RULE), {}, "other candidate batches"),
        ((batches(3), probe, RULE), {}, "other candidate batches"),
        ((given, other_probe, RULE), {}, "another probe"),
    ):
        with pytest.raises(NirvanaError, match=f"state is the state of a selection with {message}; remove it"):
            select(model, *arguments, **more, state=state)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
    with pytest.raises(NirvanaError, match="another model"):
        select(model, given, Probe(model, draw(9)), RULE, state=state)
    assert state.read_bytes() == saved


def test_what_is_no_state_is_refused(tmp_path):
    model = build(CONFIGS["llama"], 11)
    probe, state = Probe(model, draw(12)), tmp_path / "state"
    Saliency({"block": torch.ones(3)}).save(state)
    with pytest.raises(NirvanaError, match="is no state of a selection"):
        select(model, batches(1), probe, RULE, state=state)
    state.write_bytes(b"something else")
    with pytest.raises(NirvanaError, match="is not a saliency file"):
        select(model, batches(1), probe, RULE, state=state)
    assert state.read_bytes() == b"something else"


def test_refusals_of_select():
    model = build(CONFIGS["llama"], 13)
    probe = Probe(model, draw(14))
    with pytest.raises(NirvanaError, match="--candidates 0 must be at least 1"):
        select(model, [], probe, RULE)
    with pytest.raises(NirvanaError, match="--criterion magnitude needs no calibration batch"):
        select(model, batches(1), probe, RULE, criterion="magnitude")
    with pytest.raises(NirvanaError, match="another model"):
        select(build(CONFIGS["llama"], 13), batches(1), probe, RULE)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "t5"])
def test_gamma_has_the_smallest_kl_of_its_curve(name):
    model = build(CONFIGS[name], 15)
    probe = Probe(model, draw(16))
    saliency = nirvana.score(model, draw(17))
    with forwards(model) as passes:
        found = search_gamma(model, saliency, probe, RULE)
    probed = [point for point in found.curve if point["probed"]]
    assert len(passes) == len(probed) <= 9
    assert [point["gamma"] for point in found.curve] == sorted({point["gamma"] for point in found.curve})
    by_plan = {}
    for point in found.curve:
        plan = nirvana.allocate(saliency, model, sparsity=0.4, gamma=point["gamma"], align=1)
        sliced = probe.divergence(nirvana.apply(model, plan))
        assert (point["kl"], point["perplexity"]) == pytest.approx((sliced.kl, sliced.perplexity), rel=1e-5)
        blocks = nirvana.describe(model).blocks
        for kind, attention in (("removed_attention", True), ("removed_mlp", False)):
            mine = [block for block in blocks if block.is_attention == attention]
            whole = sum(block.size * block.parameters_per_unit for block in mine)
            kept = sum(len(plan.kept[block.name]) * block.parameters_per_unit for block in mine)
            assert point[kind] == pytest.approx(1 - kept / whole, abs=1e-12)
        by_plan.setdefault(plan.blocks, []).append(point["probed"])
    assert all(flags.count(True) == 1 for flags in by_plan.values())  # a plan is probed once, whatever its gammas
    best = min(point["kl"] for point in found.curve)
    chosen = next(point for point in found.curve if point["gamma"] == found.gamma)
    start = next(point for point in found.curve if point["gamma"] == RULE.gamma)
    assert chosen["kl"] == best <= start["kl"]
    assert found.plan.settings["gamma"] == found.gamma
    assert found.plan.blocks == nirvana.allocate(saliency, model, sparsity=0.4, gamma=found.gamma, align=1).blocks
    assert search_gamma(model, saliency, probe, RULE).to_dict() == found.to_dict()


@pytest.mark.parametrize("probes", [1, 2, 3])
def test_probes_of_gamma_are_bounded(probes):
    model = build(CONFIGS["llama"], 18)
    saliency = nirvana.score(model, criterion="magnitude")
    probe = Probe(model, draw(19))
    with forwards(model) as passes:
        found = search_gamma(model, saliency, probe, RULE, probes=probes)
    assert len(passes) == probes
    assert [point["gamma"] for point in found.curve if point["probed"]].count(RULE.gamma) == 1
    if probes == 1:
        assert found.gamma == RULE.gamma


def test_refusals_of_search_gamma():
    model = build(CONFIGS["llama"], 20)
    saliency = nirvana.score(model, criterion="magnitude")
    probe = Probe(model, draw(21))
    with pytest.raises(NirvanaError, match="0 probes: at least 1 is needed"):
        search_gamma(model, saliency, probe, RULE, probes=0)
    with pytest.raises(NirvanaError, match="--gamma auto means nothing with --scope mlp"):
        search_gamma(model, saliency, probe, WidthRule(0.3, scope="mlp"))
    with pytest.raises(NirvanaError, match="another model"):
        search_gamma(build(CONFIGS["llama"], 20), saliency, probe, RULE)
    with pytest.raises(NirvanaError, match="--gamma 0 must be a positive number"):
        search_gamma(model, saliency, probe, WidthRule(0.3, gamma=0))
    with pytest.raises(NirvanaError, match="--gamma auto needs the model's weights"):
        nirvana.allocate(saliency, model, sparsity=0.3, gamma="auto")
