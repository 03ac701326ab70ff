"""Methods that make no plan: against their formulas, written out in float64, and against models changed by hand."""

from __future__ import annotations

import copy
from functools import partial

import families
import pytest
import torch
from families import VOCABULARY
from test_saliency import in_float64, state_of
from torch import Tensor, nn

from nirvana import NirvanaError, describe
from nirvana.references import REFERENCES, mask_by_scores, slicegpt, sparsegpt, wanda
from nirvana.references.moments import SecondMoments
from nirvana.references.shortgpt import block_influence, without_layers
from nirvana.saliency.activations import InputStatistics
from nirvana.saliency.afr.gradients import walk_pairs
from nirvana.saliency.objectives import OBJECTIVES
from nirvana.selection import Probe

pytestmark = pytest.mark.usefixtures("one_thread")

MASKS = ("wanda", "sparsegpt", "magnitude-unstructured")
TWO_OF_FOUR = ("wanda-2:4", "sparsegpt-2:4")


def tokens(seed: int = 0, examples: int = 5, length: int = 14) -> Tensor:
    return torch.randint(3, VOCABULARY, (examples, length), generator=torch.Generator().manual_seed(seed))


def build(name: str, seed: int = 1):
    return families.build(families.CONFIGS[name], seed)


def even_model(seed: int = 1):
    """All widths are multiples of 4."""
    return families.build(families._decoder(families.LlamaConfig, 32, 4, 2, 40), seed)


def double(model):
    """In float64 throughout, norms too."""
    model = in_float64(model)
    for module in model.modules():
        if hasattr(module, "epsilon"):
            module.variance_epsilon = module.epsilon
    return model


def weights(model, scope: str = "both") -> dict[str, Tensor]:
    """Tensor name -> matrix of attention and MLP, by name."""
    parts = [part.tensor for b in describe(model).blocks for part in b.slices if part.scored and part.width]
    attention = (".self_attn.", "Attention.")
    inside = {name for name in parts if scope == "both" or not any(part in name for part in attention)}
    return {name: p.detach() for name, p in model.named_parameters() if name in inside}


def read(model, names: list[str], batch: Tensor) -> dict[str, Tensor]:
    """Tensor name -> what its layer reads, ``[tokens, channels]``."""
    seen, handles = {}, []
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        keep = partial(lambda name, module, inputs: seen.__setitem__(name, inputs[0].flatten(0, -2)), name)
        handles.append(layer.register_forward_pre_hook(keep))
    run(model, batch)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def run(model, batch: Tensor) -> Tensor:
    if model.config.is_encoder_decoder:
        half = batch.shape[1] // 2
        start = torch.zeros_like(batch[:, :1])
        targets = torch.cat([start, batch[:, half:-1]], dim=1)
        return model(input_ids=batch[:, :half], decoder_input_ids=targets, use_cache=False).logits
    return model(batch, use_cache=False).logits


def layer_by_layer(model, batch: Tensor, change) -> nn.Module:
    """`change` (weight, input) -> new weight of all matrices of a layer, read once the layers before it are changed."""
    model = copy.deepcopy(model)
    layers: dict[str, list[str]] = {}
    for block in describe(model).blocks:
        layer = block.name.split(".layer.")[0].removesuffix(".mlp").removesuffix(".self_attn")
        own = [part.tensor for part in block.slices if part.scored and part.width]
        layers.setdefault(layer, []).extend(own)
    for own in layers.values():
        seen = read(model, own, batch)
        with torch.no_grad():
            for name in own:
                parameter = model.get_parameter(name)
                parameter.copy_(change(parameter.detach(), seen[name]))
    return model


# ---- masks of single weights ----------------------------------------------------------------------------------------


def masked_row_by_row(weight: Tensor, x: Tensor, rate: float) -> Tensor:
    """Wanda, one row at a time."""
    weight, taken = weight.clone(), 0
    for number, row in enumerate(weight, start=1):
        score = row.abs() * x.square().mean(0).sqrt()
        count = round(rate * len(row) * number) - taken
        taken += count
        for j in sorted(range(len(row)), key=score.tolist().__getitem__)[:count]:
            row[j] = 0
    return weight


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5-gated"])
def test_wanda_masks_each_layer_by_what_the_masked_layers_before_it_hand_on(name):
    model, batch = double(build(name)), tokens()
    ours = weights(REFERENCES["wanda"].prune(model, batch, 0.4).model)
    truth = layer_by_layer(model, batch, partial(masked_row_by_row, rate=0.4))
    for key, weight in weights(truth).items():
        assert torch.equal(ours[key], weight), key
    dense = read(model, list(ours), batch)
    assert any(not torch.equal(masked_row_by_row(w, dense[k], 0.4), ours[k]) for k, w in weights(model).items())


@pytest.mark.parametrize("name", ["qwen2", "t5"])
def test_sparsegpt_fits_each_layer_to_what_the_masked_layers_before_it_hand_on(name):
    model, batch = double(build(name)), tokens()
    ours = weights(REFERENCES["sparsegpt"].prune(model, batch, 0.4).model)
    truth = layer_by_layer(model, batch, lambda w, x: sparsegpt.obs_columns(w, x.T @ x, 0.4)[0].T)
    dense = layer_by_layer(model, batch, lambda w, x: w)
    seen, moved = read(dense, list(ours), batch), False
    for key, weight in weights(truth).items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-7, atol=1e-9)
        x = seen[key]
        moved |= not torch.allclose(sparsegpt.obs_columns(weights(model)[key], x.T @ x, 0.4)[0].T, weight, rtol=1e-3)
    assert moved


@pytest.mark.parametrize("name", ["llama", "llama-biases", "t5"])
@pytest.mark.parametrize("scope", ["both", "mlp"])
@pytest.mark.parametrize("method", MASKS)
def test_as_many_weights_go_as_asked(name, scope, method):
    model = build(name)
    architecture, before = describe(model), weights(model, scope)
    sparsity = 0.2 if scope == "mlp" else 0.37
    result = REFERENCES[method].prune(model, tokens(), sparsity, scope=scope)
    after = weights(result.model, scope)
    rate = sparsity * architecture.prunable_parameters / sum(w.numel() for w in before.values())
    zeros = {key: weight == 0 for key, weight in after.items()}
    for key, gone in zeros.items():
        assert int(gone.sum()) == round(rate * gone.numel()), key
        counts = gone.sum(1)
        if method == "wanda":
            assert counts.max() - counts.min() <= 1
        elif method.startswith("magnitude"):
            assert before[key].abs()[gone].max() <= before[key].abs()[~gone].min()
        if method != "sparsegpt":
            assert torch.equal(after[key][~gone], before[key][~gone])
    removed = sum(int(gone.sum()) for gone in zeros.values())
    assert result.parameters_after == architecture.parameters - removed
    assert result.prunable_after == architecture.prunable_parameters - removed
    assert result.note == "mask only: no smaller, no faster"
    names = dict(model.named_parameters())
    for key, parameter in result.model.named_parameters():
        assert key in before or torch.equal(parameter, names[key]), key


@pytest.mark.parametrize("method", TWO_OF_FOUR)
def test_exactly_two_of_four_neighbours_along_the_inputs_go(method):
    model = even_model()
    result = REFERENCES[method].prune(model, tokens(), 0.5)
    for key, weight in weights(result.model).items():
        assert ((weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all(), key
    assert result.prunable_after * 2 == describe(model).prunable_parameters
    half = sum(w.numel() for w in weights(model, "mlp").values()) / describe(model).prunable_parameters / 2
    mlp = REFERENCES[method].prune(model, tokens(), round(half, 4), scope="mlp")
    assert mlp.prunable_after == round((1 - half) * describe(model).prunable_parameters)
    assert all((w != 0).all() for k, w in weights(mlp.model).items() if ".self_attn." in k)


def test_wanda_two_of_four_takes_the_lowest_scores():
    model, batch = double(even_model()), tokens()

    def mask(weight: Tensor, x: Tensor) -> Tensor:
        weight = weight.clone()
        for row in weight:
            score = (row.abs() * x.square().mean(0).sqrt()).tolist()
            for start in range(0, len(row), 4):
                for j in sorted(range(start, start + 4), key=score.__getitem__)[:2]:
                    row[j] = 0
        return weight

    ours = weights(wanda.prune(model, batch, 0.5, two_of_four=True).model)
    for key, weight in weights(layer_by_layer(model, batch, mask)).items():
        assert torch.equal(ours[key], weight), key


# ---- SparseGPT's update ---------------------------------------------------------------------------------------------


def problem(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix, and inputs that are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) @ (mix @ mix + 0.3 * mix)
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x


def damped(x: Tensor) -> Tensor:
    h = x.T @ x
    return h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def test_one_removed_weight_moves_the_others_to_the_optimum():
    """w - w_q / [H^-1]_qq H^-1[:, q], the optimal brain surgeon: of the first column nothing is left behind."""
    weight, x = problem(1, 9)
    weight[0, 0] = 1e-3  # the one that goes
    inverse = torch.linalg.inv(damped(x))
    columns, gone = sparsegpt.obs_columns(weight, x.T @ x, 1 / 9)
    assert gone[:, 0].tolist() == [True] + [False] * 8
    expected = weight[0] - weight[0, 0] / inverse[0, 0] * inverse[:, 0]
    torch.testing.assert_close(columns[:, 0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rate", [0.45, None])
def test_each_removed_weight_is_made_up_for_by_those_right_of_it(rate):
    """Against an inverse of its own for every column; more than one block of 128."""
    weight, x = problem(5, 148)
    h, truth = damped(x), weight.clone()
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(148)]
    gone = torch.zeros(5, 148, dtype=torch.bool)
    for j in range(148):
        if j % 128 == 0 and rate is not None:
            ahead = range(j, min(j + 128, 148))
            score = torch.stack([truth[:, k] ** 2 / inverses[k][0, 0] for k in ahead], dim=1)
            count = round(rate * 5 * (ahead.stop)) - round(rate * 5 * j)
            gone[:, j : ahead.stop] = score <= score.flatten().sort().values[count - 1]
        elif j % 4 == 0 and rate is None:
            score = torch.stack([truth[:, k] ** 2 / inverses[k][0, 0] for k in range(j, j + 4)], dim=1)
            gone[:, j : j + 4] = score <= score.sort(dim=1).values[:, 1:2]
        for row in gone[:, j].nonzero()[:, 0]:
            truth[row, j:] -= truth[row, j] / inverses[j][0, 0] * inverses[j][:, 0]
    columns, found = sparsegpt.obs_columns(weight, x.T @ x, rate)
    assert torch.equal(found.T, gone)
    torch.testing.assert_close(columns.T, truth * ~gone, rtol=1e-9, atol=1e-10)
    assert (columns.T[gone] == 0).all()


@pytest.mark.parametrize("rate", [0.2, 0.5, None])
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(rate):
    lost = {"sparsegpt": 0.0, "wanda": 0.0, "magnitude": 0.0}
    for seed in range(5):
        weight, x = problem(40, 60, seed)
        x = x * torch.linspace(0.1, 3, 60, dtype=torch.float64)
        for method, statistics, refit in (
            ("sparsegpt", SecondMoments(60, x.device), sparsegpt._refit),
            ("wanda", InputStatistics(60, x.device), wanda._mask),
            ("magnitude", InputStatistics(60, x.device), wanda._mask),
        ):
            linear = nn.Linear(60, 40, bias=False, dtype=torch.float64)
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
            statistics.add(torch.ones_like(x) if method == "magnitude" else x)
            gone = refit(linear, statistics, rate)
            assert int(gone.sum()) == (480 if rate == 0.2 else 1200)
            lost[method] += float((x @ (linear.weight - weight).T).square().sum())
    assert lost["sparsegpt"] < 0.7 * lost["wanda"] < 0.7 * lost["magnitude"]


def test_second_moments_are_sums_over_all_tokens():
    x = torch.randn(9000, 5, generator=torch.Generator().manual_seed(0))
    moments = SecondMoments(5, x.device)
    for part in (x[:3], x[3:3], x[3:8999], x[8999:]):
        moments.add(part)
    torch.testing.assert_close(moments.sum, x.double().T @ x.double(), rtol=1e-5, atol=1e-3)
    exact = SecondMoments(5, x.device)
    exact.add(x.double())
    torch.testing.assert_close(exact.sum, x.double().T @ x.double(), rtol=1e-13, atol=0)


def test_weights_of_inputs_that_never_move_go_first():
    weight, x = problem(3, 8)
    x[:, 2] = 0
    columns, gone = sparsegpt.obs_columns(weight, x.T @ x, 1 / 8)
    assert gone.any(1).tolist() == [j == 2 for j in range(8)]
    assert torch.equal(columns, weight.T * ~gone)
    columns, gone = sparsegpt.obs_columns(weight, torch.zeros(8, 8, dtype=torch.float64), 0.5)
    assert torch.equal(columns, torch.zeros(8, 3, dtype=torch.float64))
    assert int(gone.sum()) == 12


# ---- masks by given scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["both", "mlp"])
def test_the_highest_scores_of_all_matrices_stay(scope):
    model = build("llama-biases")
    generator = torch.Generator().manual_seed(0)
    # Many ties, also of 0 with -0; both signs; sizes far apart.
    scores = {k: (torch.randn(w.shape, generator=generator) * 4).round() / 4 for k, w in weights(model).items()}
    scores["model.layers.1.mlp.up_proj.weight"] *= 1e-30
    scores["model.layers.2.mlp.up_proj.weight"] *= -1e30
    inside = weights(model, scope)
    names = [part.tensor for block in describe(model).blocks for part in block.slices if part.tensor in inside]
    ranked = torch.cat([scores[name].flatten() for name in names])
    for sparsity in (0.01, 0.2, 0.41):
        count = round(sparsity * describe(model).prunable_parameters)
        expected = torch.ones(len(ranked))
        expected[ranked.argsort(stable=True)[:count]] = 0
        expected = dict(zip(names, expected.split([scores[name].numel() for name in names]), strict=True))
        result = mask_by_scores(model, scores, sparsity, scope=scope)
        after = weights(result.model)
        for name, weight in weights(model).items():
            mask = expected.get(name, torch.ones(weight.numel())).view_as(weight)
            assert torch.equal(after[name], weight * mask), name
        assert result.prunable_after == describe(model).prunable_parameters - count


def test_unstructured_afr_keeps_what_weighs_most_in_features_and_loss():
    """Its terms are `tests/test_saliency_afr.py`'s matter; here: absolute, standardised a matrix, ranked globally."""
    model, batch = build("llama"), tokens()
    found: dict[str, Tensor] = {}

    def keep(block, part, weight, features, loss):
        terms = [(weight * gradient).abs().double() for gradient in (features, loss)]
        found[part.tensor] = sum((term - term.mean()) / term.std(correction=0) for term in terms)

    walk_pairs(model, describe(model), OBJECTIVES["nll"], batch, None, None, keep)
    ranked = torch.cat([scores.flatten() for scores in found.values()]).sort().values
    threshold = ranked[round(0.3 * len(ranked))]
    after = weights(REFERENCES["afr-unstructured"].prune(model, batch, 0.3).model)
    for name, weight in weights(model).items():
        assert torch.equal(after[name], weight.where(found[name] >= threshold, 0)), name


def test_scores_that_do_not_fit_are_refused():
    model = build("llama")
    scores = {name: torch.rand(weight.shape) for name, weight in weights(model).items()}
    name = "model.layers.1.mlp.down_proj.weight"
    for wrong, says in (
        ({k: v for k, v in scores.items() if k != name}, f"scores of {name} are missing"),
        ({**scores, name: torch.rand(3, 2)}, rf"scores of {name} are of shape \[3, 2\]"),
        ({**scores, name: torch.full_like(scores[name], float("nan"))}, f"scores of {name} hold NaN"),
    ):
        with pytest.raises(NirvanaError, match=says):
            mask_by_scores(model, wrong, 0.3)


# ---- ShortGPT -------------------------------------------------------------------------------------------------------


def fade(model, index: int):
    """Make a layer change next to nothing."""
    with torch.no_grad():
        for name, parameter in model.model.layers[index].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(1e-2)
    return model


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("name", ["llama-biases", "mistral", "qwen2", "qwen3-tied"])
def test_the_layer_that_changes_least_is_dropped(name, index):
    model = fade(build(name), index)
    result = REFERENCES["shortgpt"].prune(model, tokens(), 0.3)
    small, arguments = result.model, families.inputs(model, 3)
    kept = [i for i in range(3) if i != index]
    for new, old in enumerate(kept):
        assert torch.equal(
            small.model.layers[new].self_attn.q_proj.weight, model.model.layers[old].self_attn.q_proj.weight
        )
    truth = copy.deepcopy(model)
    truth.model.layers[index].forward = lambda hidden, **keywords: hidden
    assert torch.equal(families.logits(small, arguments), families.logits(truth, arguments))
    assert describe(small).prunable_parameters == result.prunable_after
    assert describe(small).parameters == result.parameters_after
    assert result.note == "1 of 3 layers dropped, 33.3% of the prunable parameters"
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]


def test_a_model_with_fewer_layers_generates_with_a_cache():
    model = build("qwen2")
    small = without_layers(model, [0])
    assert small.config.layer_types == model.config.layer_types[1:]
    prompt = tokens(length=12)[:1]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = small.generate(prompt, **options, use_cache=True)
    assert torch.equal(cached, small.generate(prompt, **options, use_cache=False))


def test_block_influence_is_read_at_the_layers_themselves():
    model, batch = double(build("llama")), tokens(examples=40)  # more than one pass
    pairs, handles = {}, []
    for index, layer in enumerate(model.model.layers):
        keep = partial(lambda index, module, x, y: pairs.__setitem__(index, (x[0], y)), index)
        handles.append(layer.register_forward_hook(keep))
    run(model, batch)
    for handle in handles:
        handle.remove()
    found = block_influence(model, batch)
    for index in range(3):
        x, y = (each.flatten(0, 1) for each in pairs[index])
        cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(x, y, strict=True)]
        assert found[index] == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-10)


def test_the_number_of_layers_is_the_nearest_and_one_stays():
    model = build("llama")
    for sparsity, count in ((0.1, 0), (0.2, 1), (0.49, 1), (0.6, 2), (0.99, 2)):
        result = REFERENCES["shortgpt"].prune(model, tokens(), sparsity)
        assert len(result.model.model.layers) == 3 - count
        assert result.note.startswith(f"{count} of 3 layers dropped, {count / 3:.1%} ")


# ---- SliceGPT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.DECODERS)
def test_rotating_the_stream_changes_nothing(name):
    model = build(name)
    arguments, hidden = families.inputs(model, 3), model.config.hidden_size
    for dense, tolerance in ((model, 1e-4), (double(model), 1e-9)):
        whole = slicegpt.sliced(dense, tokens(), hidden)
        expected = families.logits(dense, arguments)
        torch.testing.assert_close(families.logits(whole, arguments), expected, rtol=0, atol=tolerance)
        assert not torch.allclose(whole.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-tied"])
def test_a_stream_with_few_directions_is_sliced_to_them_without_loss(name):
    model = double(build(name))
    hidden, rank = model.config.hidden_size, 8
    basis = torch.linalg.qr(torch.randn(hidden, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[
        0
    ]
    onto = basis @ basis.T
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding @ onto)
        for layer in model.model.layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight.copy_(onto @ output.weight)
                if output.bias is not None:
                    output.bias.copy_(onto @ output.bias)
    arguments = families.inputs(model, 3)
    expected = families.logits(model, arguments)
    small = slicegpt.sliced(model, tokens(examples=12), rank)
    torch.testing.assert_close(families.logits(small, arguments), expected, rtol=0, atol=1e-9)
    less = families.logits(slicegpt.sliced(model, tokens(examples=12), rank - 2), arguments)
    assert (less - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", families.DECODERS)
def test_the_width_is_that_with_the_nearest_number_of_parameters(name):
    model = build(name)
    architecture, hidden = describe(model), model.config.hidden_size
    for sparsity in (0.1, 0.5):
        result = REFERENCES["slicegpt"].prune(model, tokens(), sparsity)
        target = architecture.parameters - sparsity * architecture.prunable_parameters
        counts = {}
        for width in range(8, hidden + 1, 8):
            small = slicegpt.sliced(model, tokens(examples=1, length=3), width)
            counts[width] = sum(p.numel() for p in small.parameters())
        width = min(counts, key=lambda width: abs(counts[width] - target))
        assert result.note == f"in memory only: {width} of {hidden} residual channels"
        assert result.parameters_after == counts[width]
        outside = 0 if name.endswith("tied") else VOCABULARY * (width - hidden)
        kept = architecture.parameters - architecture.prunable_parameters + outside
        # Norms and biases of layers, which are no matrices, are in neither count of matrices.
        vectors = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 1)
        left = sum(p.numel() for p in result.model.model.layers.parameters() if p.dim() == 1)
        assert result.parameters_after == result.prunable_after + kept - vectors + left


def test_a_narrower_stream_works_with_probe_and_cache():
    model = build("qwen3-tied")
    probe = Probe(model, tokens(1))
    kl = [probe.divergence(slicegpt.sliced(model, tokens(), width)).kl for width in (32, 24, 8)]
    assert kl[0] < 1e-8 < 1e-3 < kl[1] < kl[2]
    small = slicegpt.sliced(model, tokens(), 24)
    prompt = tokens(2, length=12)[:1]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(small.generate(prompt, **options), small.generate(prompt, **options, use_cache=False))


# ---- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_is_untouched_and_the_result_is_its_own(method, dtype):
    model = even_model().to(dtype)
    model.train()
    before = state_of(model)
    result = REFERENCES[method].prune(model, tokens(), 0.5, seed=3)
    assert not result.model.training
    assert all(p.dtype == dtype for p in result.model.parameters())
    again = REFERENCES[method].prune(model, tokens(), 0.5, seed=4)
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, result.model.get_parameter(name)), name
    assert torch.isfinite(run(result.model, tokens())).all()
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.fill_(7)
    after = state_of(model)
    for key in before:
        assert after[key] == before[key], key


@pytest.mark.parametrize(
    ("method", "name", "options", "says"),
    [
        ("wanda", "llama", {"sparsity": 1.0}, r"--sparsity 1\.0 must be above 0 and below 1"),
        ("wanda", "llama", {"scope": "attention"}, "--scope 'attention' is not possible .* prunes both or mlp"),
        (
            "sparsegpt",
            "t5-deep-decoder",
            {"scope": "mlp"},
            r"0\.5 is impossible .* 25\.7% .*; use --scope both",
        ),
        ("magnitude-unstructured", "t5-deep-decoder", {"scope": "mlp"}, "is impossible with --scope mlp"),
        ("wanda-2:4", "llama", {}, "mlp.down_proj.weight has 37 inputs, which is no multiple of 4"),
        ("wanda-2:4", "llama", {"sparsity": 0.4}, r"--sparsity 0\.4: 2:4 with --scope both removes 0\.5000"),
        ("sparsegpt-2:4", "llama", {"scope": "mlp"}, r"--sparsity 0\.5: 2:4 with --scope mlp removes 0\.2322"),
        ("shortgpt", "llama", {"scope": "mlp"}, "--scope 'mlp' is not possible .* prunes both$"),
        ("shortgpt", "t5", {}, "shortgpt drops layers of stock decoders only; this is a t5"),
        ("slicegpt", "llama", {"scope": "mlp"}, "--scope 'mlp' is not possible"),
        ("slicegpt", "t5", {}, "slicegpt is for llama, mistral, qwen2, qwen3 only; this is a t5"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(method, name, options, says):
    with pytest.raises(NirvanaError, match=says) as error:
        REFERENCES[method].prune(build(name), tokens(), **{"sparsity": 0.5, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", [m for m in REFERENCES if m not in (*TWO_OF_FOUR, "magnitude-unstructured")])
def test_a_weight_that_is_not_finite_is_named(method):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(NirvanaError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        REFERENCES[method].prune(model, tokens(), 0.4)
    with pytest.raises(NirvanaError, match="outside the model's vocabulary"):
        REFERENCES[method].prune(build("llama"), tokens() + VOCABULARY, 0.4)
