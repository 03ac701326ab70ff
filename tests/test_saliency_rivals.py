"""Criteria of other papers against their formulas, written out unit by unit in float64."""

from __future__ import annotations

import importlib.util
import json
import re

import families
import pytest
import torch
import torch.nn.functional as F
from test_saliency import draw_tokens, in_float64, scored_parameters, state_of, units_of, used_model
from test_saliency_masks import RIGHT, assert_near, model_and_tokens

from nirvana import NirvanaError, Saliency, describe, score
from nirvana.architectures.inputs import model_inputs
from nirvana.saliency import criteria, needs_calibration
from nirvana.saliency.activations import InputStatistics
from nirvana.saliency.criteria import CRITERIA

pytestmark = pytest.mark.usefixtures("one_thread")

#: Query heads per key/value head 3, 1 with biases, 8, 3 with q/k norms; T5 plain and gated.
MODELS = ("llama", "llama-biases", "llama-head-dim", "qwen3", "t5", "t5-gated")
MASKS = {"whole": None, "right": RIGHT, "left": RIGHT.flip(1)}
MEASURED = ("wanda-sp", "flap", "cfsp", "lorap")
DIFFERENTIATED = ("llm-pruner", "llm-pruner-vector", "taylor2")


# ---- the oracle -----------------------------------------------------------------------------------------------------


def readings(model, tokens, mask=None) -> dict[str, torch.Tensor]:
    """Linear layer -> what it reads at all real tokens, float64 ``[tokens, channels]``."""
    inputs, read = model_inputs(model, tokens, mask), {}

    def keep(name):
        def hook(module, arguments):
            real = inputs.valid
            if name.startswith("encoder.") or re.search(r"EncDecAttention\.[kv]$", name):
                real = inputs.arguments["attention_mask"].bool()
            read[name] = arguments[0][real].detach()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name))
    model(**inputs.arguments)
    return read


def members(model, block):
    """Unit -> (matrix, its rows or columns, its layer's name, axis); biases left out."""
    parameters = dict(model.named_parameters())
    for unit in units_of(model)[block]:
        yield [
            (parameters[key].detach(), where, key.removesuffix(".weight"), axis)
            for key, axis, where in unit
            if key.endswith(".weight")
        ]


def root_mean_square(x):
    return ((x * x).sum(0) / len(x)).sqrt()


def wanda_sp(model, read, block):
    for unit in members(model, block):
        weight, where, layer, _ = unit[-1]
        sizes = root_mean_square(read[layer][:, where])
        yield sum(weight[:, where][:, c].abs().mean() * sizes[c] for c in range(len(sizes)))


def flap(model, read, block):
    units = list(members(model, block))
    weight, _, layer, _ = units[0][-1]
    x = read[layer]
    metric = torch.stack([x[:, c].var() * (weight[:, c] ** 2).sum() for c in range(weight.shape[1])])
    if len(units[0]) == 4:  # q, k, v and o
        metric = metric**2
    z = (metric - metric.mean()) / metric.std()
    for unit in units:
        yield z[unit[-1][1]].mean()


def lorap(model, read, block):
    scores = []
    for unit in members(model, block):
        total = 0
        for weight, where, layer, axis in unit:
            sizes = root_mean_square(read[layer] if axis == 0 else read[layer][:, where])
            own = weight[where] if axis == 0 else weight[:, where]
            total = total + (own * sizes).square().sum().sqrt()
        scores.append(total)
    return scores


def cfsp(model, read, block):
    units = list(members(model, block))
    sizes = root_mean_square(read[units[0][-1][2]])
    for unit in units:
        total = 0
        for weight, where, _, axis in unit:
            table = weight.T.abs() if axis == 0 else weight.abs() * sizes  # [hidden, channels]
            for i in range(len(table)):
                total = total + table[i, where].sum() / table[i].sum() / len(table)
        yield total * sizes[unit[-1][1]].square().sum().sqrt()


FORMULAS = {"wanda-sp": wanda_sp, "flap": flap, "lorap": lorap, "cfsp": cfsp}


def measured(criterion, model, tokens, mask=None) -> dict[str, torch.Tensor]:
    model = in_float64(model)
    read = readings(model, tokens, mask)
    scores = {block: torch.stack(list(FORMULAS[criterion](model, read, block))) for block in units_of(model)}
    if criterion == "flap":
        lowest = min(values.min() for values in scores.values())
        scores = {block: values - lowest for block, values in scores.items()}
    return scores


def gradients(model, tokens, mask=None) -> dict[str, torch.Tensor]:
    inputs = model_inputs(model, tokens, mask)
    logits = model(**inputs.arguments).logits
    value = F.cross_entropy(logits.flatten(0, 1), inputs.targets.flatten(), ignore_index=-100)
    parameters = {key: p for key, p in scored_parameters(model).items() if key.endswith(".weight")}
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


def differentiated(criterion, model, tokens, mask=None) -> dict[str, torch.Tensor]:
    model = in_float64(model)
    if criterion == "taylor2":
        rows = range(len(tokens))
        each = [gradients(model, tokens[n : n + 1], None if mask is None else mask[n : n + 1]) for n in rows]
        squares = {key: sum(g[key] ** 2 for g in each) / len(each) for key in each[0]}
    else:
        first = gradients(model, tokens, mask)

    def of_unit(unit):
        total = 0
        for weight, where, layer, axis in unit:
            key = f"{layer}.weight"
            if criterion == "taylor2":
                table = weight * squares[key] * weight
            elif criterion == "llm-pruner":
                table = (weight * first[key]).abs()
            else:
                table = (weight * first[key]).sum(1 - axis, keepdim=True).abs()
            total = total + (table[where] if axis == 0 else table[:, where]).sum()
        return total

    return {block: torch.stack([of_unit(unit) for unit in members(model, block)]) for block in units_of(model)}


# ---- the formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", MEASURED)
@pytest.mark.parametrize("name", MODELS)
def test_scores_from_activations_are_those_of_the_formula(name, criterion):
    model, tokens = model_and_tokens(name)
    assert_near(score(model, tokens, criterion=criterion), measured(criterion, model, tokens))


@pytest.mark.parametrize("criterion", DIFFERENTIATED)
@pytest.mark.parametrize("name", MODELS)
def test_scores_from_gradients_are_those_of_the_formula(name, criterion):
    model, tokens = model_and_tokens(name)
    assert_near(score(model, tokens, criterion=criterion), differentiated(criterion, model, tokens))


@pytest.mark.parametrize("name", ["llama", "llama-head-dim", "qwen3", "t5-gated"])
def test_llm_pruner_as_published_folds_channels(name):
    """Channels of the longer members onto those of the shortest by reshape(-1, shortest).sum(0), heads summed last."""
    model, tokens = model_and_tokens(name)
    doubled = in_float64(model)
    first, weights = gradients(doubled, tokens), dict(doubled.named_parameters())
    ours, plain = (score(model, tokens, criterion=c) for c in ("llm-pruner-faithful", "llm-pruner"))
    truth = {}
    for block in describe(model).blocks:
        channels = [
            (weights[part.tensor] * first[part.tensor]).abs().sum(1 - part.axis)
            for part in block.slices
            if part.width and part.scored
        ]
        shortest = min(map(len, channels))
        folded = sum(member.reshape(-1, shortest).sum(0) for member in channels)
        truth[block.name] = folded.view(block.size, -1).sum(1)
    assert_near(ours, truth)
    shared = any(part.heads > 1 for block in describe(model).blocks for part in block.slices)
    assert any(not torch.equal(ours[block], plain[block]) for block in ours) == shared


@pytest.mark.parametrize("name", MODELS)
def test_l2_magnitude_is_the_sum_of_squares(name):
    model, _ = model_and_tokens(name)
    ours = score(model, criterion="magnitude-l2")
    for block in ours:
        for found, unit in zip(ours[block], members(model, block), strict=True):
            parts = [(w[where] if axis == 0 else w[:, where]).double() for w, where, _, axis in unit]
            assert float(found) == pytest.approx(float(sum(part.square().sum() for part in parts)), rel=1e-6)


@pytest.mark.parametrize("criterion", [*MEASURED, *DIFFERENTIATED])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_padding_counts_for_nothing(name, side, criterion):
    model, tokens = model_and_tokens(name)
    truth = (measured if criterion in MEASURED else differentiated)(criterion, model, tokens, MASKS[side])
    for filler in (0, 55):
        padded = tokens.masked_fill(MASKS[side] == 0, filler)
        assert_near(score(model, padded, criterion=criterion, attention_mask=MASKS[side]), truth)


@pytest.mark.parametrize("criterion", [*MEASURED, *DIFFERENTIATED])
@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_micro_batches_give_the_scores_of_one_batch(name, criterion):
    model, tokens = model_and_tokens(name)
    whole = score(model, tokens, criterion=criterion, attention_mask=RIGHT, micro_batch=4)
    for size in (1, 3, None):
        ours = score(model, tokens, criterion=criterion, attention_mask=RIGHT, micro_batch=size)
        for block, scores in whole.items():
            torch.testing.assert_close(ours[block], scores, rtol=1e-5, atol=2e-6 * float(scores.max()))
            if criterion == "taylor2":
                assert torch.equal(ours[block], scores), "one example at a time, whatever is asked for"


# ---- what published code gets wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [*MEASURED, *DIFFERENTIATED, "magnitude-l2"])
@pytest.mark.parametrize("name", ["llama", "llama-head-dim"])
def test_a_group_is_scored_by_the_heads_that_go_with_it(name, criterion):
    """All that group 1 owns is zero: it scores 0 (lowest of all in flap), and only it does."""
    model, tokens = model_and_tokens(name)
    block = "model.layers.1.self_attn"
    with torch.no_grad():
        for key, axis, where in units_of(model)[block][1]:
            weight = dict(model.named_parameters())[key]
            (weight[where] if axis == 0 else weight[:, where]).zero_()
    scores = score(model, tokens, criterion=criterion)[block]
    assert int(scores.argmin()) == 1
    assert (scores > scores[1]).sum() == len(scores) - 1
    assert criterion == "flap" or scores[1] == 0


def test_weights_count_in_cfsp():
    """The published normalisation would give each neuron the root of S alone."""
    model, tokens = model_and_tokens("llama")
    block = "model.layers.0.mlp"
    before = score(model, tokens, criterion="cfsp")[block]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5] *= 3
    after = score(model, tokens, criterion="cfsp")[block]
    assert after[5] > 1.3 * before[5]
    assert (after[:5] < before[:5]).all()


@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_cfsp_faithful_is_what_the_published_code_computes(name):
    """Every table divided by its sums over hidden channels, then the mean over those: S alone is left."""
    model, tokens = model_and_tokens(name)
    ours = score(model, tokens, criterion="cfsp-faithful")
    double = in_float64(model)
    read = readings(double, tokens)
    for i, layer in enumerate(double.model.layers):
        mlp, block = layer.mlp, f"model.layers.{i}.mlp"
        sizes = root_mean_square(read[f"{block}.down_proj"])
        tables = [mlp.down_proj.weight.abs() * sizes, mlp.up_proj.weight.T.abs(), mlp.gate_proj.weight.T.abs()]
        published = (sum(table / table.sum(0) for table in tables) * sizes).mean(0)
        torch.testing.assert_close(ours[block].double(), published.detach(), rtol=1e-5, atol=0)
        groups = read[f"model.layers.{i}.self_attn.o_proj"].square().mean(0)
        expected = (
            groups.view(len(ours[f"model.layers.{i}.self_attn"]), -1).sum(1).sqrt() * 4 / model.config.hidden_size
        )
        torch.testing.assert_close(ours[f"model.layers.{i}.self_attn"].double(), expected, rtol=1e-5, atol=0)
    again = score(model, tokens, criterion="cfsp")
    assert ours.settings["layer_importance"] == again.settings["layer_importance"]
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(torch.linspace(0.2, 5, model.config.intermediate_size))
    after = score(model, tokens, criterion="cfsp-faithful")
    assert torch.equal(after["model.layers.2.mlp"], ours["model.layers.2.mlp"])
    assert not torch.equal(score(model, tokens, criterion="cfsp")["model.layers.2.mlp"], again["model.layers.2.mlp"])


def test_examples_do_not_cancel_in_taylor2():
    model, tokens = model_and_tokens("llama")
    ours = score(model, tokens, criterion="taylor2")
    together = gradients(in_float64(model), tokens)
    block = "model.layers.0.mlp"
    for found, unit in zip(ours[block], members(model, block), strict=True):
        cancelled = 0.0
        for weight, where, layer, axis in unit:
            table = (weight * together[f"{layer}.weight"]) ** 2
            cancelled += float((table[where] if axis == 0 else table[:, where]).sum())
        assert found > 1.2 * cancelled


def test_the_order_of_examples_does_not_matter_to_flap():
    model, tokens = model_and_tokens("llama")
    ours = score(model, tokens, criterion="flap", micro_batch=1)
    turned = score(model, tokens.flip(0), criterion="flap", micro_batch=1)
    for block, scores in ours.items():
        torch.testing.assert_close(turned[block], scores, rtol=1e-5, atol=2e-6 * float(scores.max()))


def test_lorap_protects_the_lowest_hundredth_of_an_mlp():
    config = families._decoder(families.LlamaConfig, 32, 4, 2, 250)
    model = families.build(config, seed=3)
    tokens = torch.randint(families.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(4))
    ours, truth = score(model, tokens, criterion="lorap"), measured("lorap", model, tokens)
    scores, raw = ours["model.layers.0.mlp"], truth["model.layers.0.mlp"]
    lowest = raw.argsort()[:2]
    assert (scores[lowest] == scores.max()).all()
    rest = torch.ones(250, dtype=torch.bool).index_fill(0, lowest, False)
    torch.testing.assert_close(scores[rest].double(), raw[rest], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        ours["model.layers.0.self_attn"].double(), truth["model.layers.0.self_attn"], rtol=1e-5, atol=0
    )


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_a_mean_far_from_zero_costs_no_digits():
    x = 1e6 + torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics = InputStatistics(5, torch.device("cpu"))
    for part in (x[:7], x[7:7], x[7:200], x[200:]):
        statistics.add(part)
    assert statistics.tokens == 300
    torch.testing.assert_close(statistics.variance, x.var(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(statistics.mean_square, x.square().mean(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_layer_importance_is_the_angle_between_a_layers_input_and_output(name):
    model, tokens = model_and_tokens(name)
    found = score(model, tokens, criterion="cfsp", attention_mask=RIGHT).settings["layer_importance"]
    double = in_float64(model)
    inputs = model_inputs(double, tokens, RIGHT)
    output = double(**inputs.arguments, output_hidden_states=True)
    stacks = {"model.layers": (getattr(output, "hidden_states", None), inputs.valid)}
    if name == "t5":
        encoder = inputs.arguments["attention_mask"].bool()
        stacks = {"encoder.block": (output.encoder_hidden_states, encoder)}
        stacks["decoder.block"] = (output.decoder_hidden_states, inputs.valid)
    compared = 0
    for stack, (states, real) in stacks.items():
        # The last state lies behind the final norm.
        for i in range(len(states) - 2):
            x, y = states[i][real], states[i + 1][real]
            angles = [torch.acos(a @ b / a.norm() / b.norm()) / torch.pi for a, b in zip(x, y, strict=True)]
            assert found[f"{stack}.{i}"] == pytest.approx(float((sum(angles) / len(angles)).detach()), rel=1e-5)
            compared += 1
        assert 0 < found[f"{stack}.{len(states) - 2}"] < 1
    assert compared == (2 if name == "llama" else 3)


# ---- behaviour ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [*MEASURED, *DIFFERENTIATED, "magnitude-l2"])
def test_scores_are_at_least_zero_in_half_precision_too(criterion):
    model, tokens = model_and_tokens("llama")
    scores = score(model.to(torch.bfloat16), tokens, criterion=criterion)
    assert all(values.dtype == torch.float32 and (values >= 0).all() for values in scores.values())
    assert needs_calibration(criterion) is (criterion != "magnitude-l2")


@pytest.mark.parametrize("criterion", ["cfsp", "taylor2"])
@pytest.mark.parametrize("name", ["llama-tied", "t5"])
def test_the_model_is_left_as_found(name, criterion):
    model = used_model(name)
    before = state_of(model)
    score(model, draw_tokens(), criterion=criterion, micro_batch=2)
    after = state_of(model)
    for key in before:
        assert after[key] == before[key], key


@pytest.mark.parametrize("criterion", ["cfsp", "flap", "taylor2", "llm-pruner"])
def test_progress_is_called_once_for_each_tensor(criterion):
    model, tokens = model_and_tokens("llama-biases")
    for size in (None, 1, 3):
        calls = []
        score(model, tokens, criterion=criterion, micro_batch=size, progress=lambda: calls.append(0))  # noqa: B023
        assert len(calls) == 3 * (4 + 3 + 3 + 2)


def test_a_sum_takes_criteria_with_and_without_an_objective():
    model, tokens = model_and_tokens("llama")
    scores = score(model, tokens, criterion="flap+nirvana", objective="nll")
    assert scores.settings["criterion"] == "flap+nirvana"
    with pytest.raises(NirvanaError, match="'flap' differentiates nothing; leave --objective out"):
        score(model, tokens, criterion="flap", objective="nll")


def test_a_weight_that_is_not_finite_is_named():
    model, tokens = model_and_tokens("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    for criterion in ("flap", "taylor2"):
        with pytest.raises(NirvanaError, match=r"parameter model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
            score(model, tokens, criterion=criterion)


def test_nothing_but_padding_is_refused():
    model, tokens = model_and_tokens("llama")
    with pytest.raises(NirvanaError, match="nothing but padding"):
        score(model, tokens, criterion="flap", attention_mask=torch.zeros(4, 12))


# ---- the registry ---------------------------------------------------------------------------------------------------


def test_a_new_criterion_is_one_file_and_one_line(tmp_path, monkeypatch, cli_here, llama_folder):
    """The example of the registry's own documentation: written to a file, registered by its line, and run."""
    (code,), (line,) = (
        re.findall(pattern, criteria.__doc__, re.DOTALL | re.MULTILINE)
        for pattern in (r"::\n\n(    from .*?\n)\n(?=\S)", r'^    ("peak": .*?),$')
    )
    path = tmp_path / "peak.py"
    path.write_text("\n".join(row[4:] for row in code.splitlines()) + "\n")
    spec = importlib.util.spec_from_file_location("peak", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(criteria, "CRITERIA", CRITERIA)
    for name, criterion in eval(f"{{{line}}}", {"peak": module}).items():
        monkeypatch.setitem(CRITERIA, name, criterion)
    model, tokens = model_and_tokens("llama-biases")
    ours = score(model, criterion="peak")
    parameters = dict(model.named_parameters())
    for block, units in units_of(model).items():
        for found, unit in zip(ours[block], units, strict=True):
            every = [parameters[key][where] if axis == 0 else parameters[key][:, where] for key, axis, where in unit]
            assert float(found) == max(float(part.detach().abs().max()) for part in every)
    assert score(model, tokens, criterion="nirvana+peak").settings["criterion"] == "nirvana+peak"
    out = tmp_path / "s.safetensors"
    outcome = cli_here("score", llama_folder, "--criterion", "peak", "--out", out)
    assert outcome.code == 0, outcome.stderr
    assert Saliency.load(out).settings == {"criterion": "peak"}


def test_help_lists_all_criteria(cli_here):
    text = " ".join(cli_here("score", "--help").stdout.split())
    assert [name for name in (*CRITERIA, "random") if name not in text] == []


@pytest.mark.parametrize("criterion", [*MEASURED, *DIFFERENTIATED])
def test_from_the_command_line(criterion, cli_here, llama_folder, tokens_file, tmp_path):
    path, plan = tmp_path / "s.safetensors", tmp_path / "plan.json"
    asked = ("--calibration", tokens_file, "--criterion", criterion, "--out", path, "--json")
    outcome = cli_here("score", llama_folder, *asked)
    assert outcome.code == 0, outcome.stderr
    settings = json.loads(outcome.stdout)["settings"]
    assert settings.get("objective") == ("nll" if criterion in DIFFERENTIATED else None)
    assert ("layer_importance" in settings) is (criterion == "cfsp")
    for allocation in ("global", "uniform"):
        how = ("--sparsity", 0.3, "--allocation", allocation, "--saliency", path, "--out", plan, "--overwrite")
        outcome = cli_here("plan", llama_folder, *how)
        assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--criterion", "wanda"), "--criterion 'wanda' is unknown; known are nirvana, "),
        (("--criterion", "flap+flap"), "is unknown; known are"),
        (("--criterion", "lorap", "--objective", "nll"), "--objective nll: criterion 'lorap' differentiates nothing"),
        (("--criterion", "flap", "--micro-batch", 0), "--micro-batch 0 must be at least 1"),
        (("--criterion", "taylor2", "--objective", "loss"), "--objective 'loss' is unknown"),
    ],
)
def test_refused_from_the_command_line(more, says, cli_here, llama_folder, tokens_file, tmp_path):
    out = tmp_path / "s.safetensors"
    outcome = cli_here("score", llama_folder, "--calibration", tokens_file, *more, "--out", out)
    assert outcome.code == 2
    assert says in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert not out.exists()
