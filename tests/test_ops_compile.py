"""What torch.compile, torch.export, fake and meta tensors make of the operators, for every backend at hand."""

from __future__ import annotations

import importlib

import pytest
import torch
from operators import draw
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import opcheck

from nirvana.ops import (
    STATISTICS,
    SaliencyEntry,
    foreach_group_saliency,
    gather_slice,
    group_saliency,
    kl_divergence,
    linear_kl_divergence,
    mixture_bounds,
    plan_group_saliency,
)

pytest_plugins = ("operators",)
pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.nirvana
ALL = sum(STATISTICS.values())


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pair(device: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    return draw(shape, dtype, device, seed), draw(shape, dtype, device, seed + 1)


def samples(name: str, device: str) -> list[tuple]:
    """Arguments of an operator: sizes, types, strides and leaves that require gradients."""
    weight, grad = pair(device, 6, 10)
    half, _ = pair(device, 6, 10, dtype=torch.bfloat16, seed=2)
    leaf = nn.Parameter(weight.clone())
    bias = draw((6,), torch.float32, device, 4)
    kept = torch.tensor([2, 0], device=device)
    strided = draw((10, 12), torch.float32, device, 5).T[::2]
    if name == "group_saliency":
        return [
            (weight, grad, 0, 2, 1),
            (half, grad, 1, 5, ALL),
            (leaf, leaf.detach(), 1, 1, 9),
            (leaf, None, 0, 3, 48),
            (strided, half, 1, 2, 2),
            (bias, bias, 0, 3, 1),
            (weight[:0], grad[:0], 1, 1, 4),
            (weight.double(), grad, 0, 1, 1),
        ]
    if name == "foreach_group_saliency_":
        zeros = [torch.zeros(size, device=device) for size in (3, 10, 2)]
        many = [torch.zeros(6, 10, device=device), torch.zeros(6, 3, device=device)]
        return [
            (zeros[:2], [0, 1, 0], [weight, half, leaf], [grad, grad, half], [0, 1, 0], [2, 1, 2], 1),
            (many, [1, 0], [bias, leaf], [bias, grad], [0, 1], [2, 1], ALL),
            (zeros[2:], [0], [leaf], [None], [1], [5], 16),
            ([], [], [], [], [], [], 1),
        ]
    if name == "gather_slice":
        return [
            ([weight], kept, 0, 2),
            ([half, leaf, weight > 0], kept, 1, 2),
            ([weight, bias, strided], kept, 0, 1),
            ([weight], kept[:0], 1, 1),
        ]
    if name == "mixture_bounds":
        return [(weight, 5, 0.02), (half, 1, 0.0), (leaf, 2, 0.3), (strided, 8, 0.5), (weight[:0], 3, 0.1)]
    return [(weight, grad), (half, weight), (leaf, nn.Parameter(grad.clone())), (strided, grad), (weight[:0], grad[:0])]


NAMES = [
    "group_saliency",
    "foreach_group_saliency_",
    "gather_slice",
    "kl_divergence",
    "kl_divergence_state",
    "mixture_bounds",
]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(device, name):
    """Schema (nothing else is written or shared), fake form, autograd registration, and tracing with free sizes."""
    for arguments in samples(name, device):
        opcheck(getattr(OPS, name).default, arguments)


def test_every_operator_is_checked():
    registered = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("nirvana::")
    }
    assert registered == set(NAMES)


def test_schemas_say_what_is_written():
    for name in NAMES:
        schema = getattr(OPS, name).default._schema
        assert schema.is_mutable == (name == "foreach_group_saliency_")


@pytest.mark.parametrize("name", ["kl_divergence", "kl_divergence_state"])
def test_operators_of_three_dimensions(device, name):
    if name == "kl_divergence":
        opcheck(OPS.kl_divergence.default, pair(device, 2, 3, 5))
        opcheck(OPS.kl_divergence.default, pair(device, 5))


# torch.compile: the public functions, in one graph.


def score(weight, grad):
    return group_saliency(weight * 2, grad, axis=0, group=2) + 1


def score_several(weight, grad):
    return group_saliency(weight, grad, axis=1, group=1, statistics=["squared", "taylor"]).sum(dim=0)


def score_into(weight, grad):
    out = torch.ones(weight.shape[0], device=weight.device)
    group_saliency(weight, grad, axis=0, group=1, out=out)
    group_saliency(weight, grad, axis=0, group=1, statistics="signed", out=out)
    return out * 2


def score_table(weight, grad):
    first, second = (torch.ones(weight.shape[axis], device=weight.device) for axis in (0, 1))
    entries = [SaliencyEntry(weight, grad, 0, 1, first), SaliencyEntry(grad, weight, 1, 1, second)]
    foreach_group_saliency([*entries, SaliencyEntry(weight, weight, 0, 1, first)])
    return first * 2, second


def gather(weight, grad):
    return gather_slice(weight, torch.tensor([1, 0], device=weight.device), axis=0, unit=2) * 3


def gather_listed(weight, grad):
    first, second = gather_slice([weight, grad.bfloat16()], [1, 0, 0], axis=1, unit=1)
    return first, second.float()


def divergence(weight, grad):
    return kl_divergence(weight * 2, grad).exp()


def linear_divergence(weight, grad):
    return linear_kl_divergence(weight[:3], grad, grad[:3], weight, chunk=4)


FUNCTIONS = [score, score_several, score_into, score_table, gather, gather_listed, divergence, linear_divergence]
BY_NAME = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def assert_same(ours, expected) -> None:
    ours, expected = ((x,) if isinstance(x, Tensor) else x for x in (ours, expected))
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert not one.requires_grad
        # The operators' own bits are equal; products around them may be fused.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@BY_NAME
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_in_one_graph(device, function, dynamic):
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, columns, seed in ((6, 10, 0), (6, 10, 7), (8, 12, 20)):
        weight, grad = pair(device, rows, columns, seed=seed)
        weight.requires_grad_()
        assert_same(compiled(weight, grad), function(weight.detach(), grad))


def test_compiled_for_any_size_once(device):
    """With dynamic sizes one graph serves all of them."""
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    compiled = torch.compile(score_several, fullgraph=True, dynamic=True, backend=count)
    for rows, columns in ((6, 10), (7, 9), (20, 3), (33, 64)):
        weight, grad = pair(device, rows, columns)
        assert_same(compiled(weight, grad), score_several(weight, grad))
    assert len(graphs) == 1
    assert "nirvana.group_saliency" in graphs[0].code


@pytest.mark.parametrize("function", [score_table, gather_listed], ids=lambda function: function.__name__)
def test_compile_with_inductor(device, function):
    """The default compiler, with an operator that writes to its arguments and one that gives a list."""
    weight, grad = pair(device, 6, 10)
    compiled = torch.compile(function, fullgraph=True)
    assert_same(compiled(weight, grad), function(weight, grad))


def test_bits_are_those_of_eager(device):
    weight, grad = pair(device, 130, 259, dtype=torch.bfloat16)

    def everything(weight, grad):
        sums = group_saliency(weight, grad, axis=1, group=1, statistics=list(STATISTICS))
        kept = gather_slice(weight, [5, 3], axis=0)
        return sums, kept, kl_divergence(weight, grad)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(weight, grad), everything(weight, grad), strict=True):
        assert torch.equal(ours, expected)


def test_a_compiled_function_uses_the_forced_backend(device, backend, monkeypatch):
    """Also one that was compiled before it was forced: the choice is made in each call."""
    from nirvana.ops import saliency, use_backend
    from nirvana.ops.backends import choose

    asked = []
    monkeypatch.setattr(saliency, "choose", lambda where: asked.append(choose(where)) or asked[-1])
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    weight, grad = pair(device, 6, 10)
    with use_backend("torch"):
        compiled(weight, grad)
    with use_backend(backend):
        compiled(weight, grad)
    assert [module.__name__.rpartition(".")[2] for module in asked[-2:]] == [
        "reference",
        "reference" if backend == "torch" else backend,
    ]


def test_a_refusal_in_a_compiled_function_is_the_eager_one(device):
    weight, grad = pair(device, 6, 10)
    compiled = torch.compile(lambda w, g: group_saliency(w, g, axis=0, group=4), backend="aot_eager")
    with pytest.raises(ValueError, match="units of 4 do not divide axis 0 of length 6"):
        compiled(weight, grad)
    # Indices have values at run time alone; the operator looks at them then.
    compiled = torch.compile(lambda w, kept: gather_slice(w, kept, axis=0), fullgraph=True, backend="aot_eager")
    assert compiled(weight, torch.tensor([5, 0], device=device)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"kept units must lie in 0\.\.5, got 0\.\.6"):
        compiled(weight, torch.tensor([6, 0], device=device))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_plan_is_not_compiled(device, fullgraph):
    """It reads memory that no graph knows of."""
    weight, grad = pair(device, 6, 10)
    out = torch.zeros(6, device=device)
    plan = plan_group_saliency([SaliencyEntry(weight, grad, 0, 1, out)])

    def planned(weight):
        plan()
        return weight + 1

    with pytest.raises(Exception, match="a plan of group_saliency cannot be compiled or exported: call it outside"):
        torch.compile(planned, backend="aot_eager", fullgraph=fullgraph)(weight)
    assert not out.any()
    with FakeTensorMode(), pytest.raises(RuntimeError, match="cannot be compiled or exported"):
        plan_group_saliency([SaliencyEntry(*(torch.empty(6, 10) for _ in range(2)), 0, 1, torch.empty(6))])


@pytest.mark.parametrize("fake", ["grad", "out"])
def test_no_kernel_gets_a_tensor_without_memory(device, fake):
    """One of a call is enough to kill the process, were the others taken for the whole of it."""
    entry = SaliencyEntry(*pair(device, 6, 10), 0, 1, torch.zeros(6, device=device))
    entry = entry._replace(**{fake: FakeTensorMode().from_tensor(getattr(entry, fake))})
    with pytest.raises(AssertionError, match="Please convert all Tensors to FakeTensors"):
        group_saliency(*entry[:2], axis=0, group=1, out=entry.out)
    with pytest.raises(AssertionError, match="Please convert all Tensors to FakeTensors"):
        foreach_group_saliency([entry])
    with pytest.raises(RuntimeError, match="cannot be compiled or exported"):
        plan_group_saliency([entry])


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(60.0).view(6, 10) / 60)

    def forward(self, grad):
        out = torch.zeros(6, device=grad.device)
        foreach_group_saliency([SaliencyEntry(self.weight, grad, 0, 1, out)])
        scores = group_saliency(self.weight, grad, axis=1, group=2, statistics=("taylor", "signed"))
        (kept,) = gather_slice([self.weight], [2, 0], axis=1, unit=2)
        return out, scores, kept, kl_divergence(self.weight, grad), *mixture_bounds(grad)


@pytest.mark.parametrize("strict", [False, True])
def test_export(device, strict):
    module, grad = Everything().to(device), draw((6, 10), torch.float32, device, 8)
    exported = torch.export.export(module, (grad,), strict=strict)
    # What runs without gradients is a module of its own in the graph.
    graphs = [module.graph for module in exported.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    called = {str(node.target) for graph in graphs for node in graph.nodes if str(node.target).startswith("nirvana.")}
    assert called == {f"nirvana.{name}.default" for name in NAMES if name != "kl_divergence_state"}
    other = draw((6, 10), torch.float32, device, 9)
    for ours, expected in zip(exported.module()(other), module(other), strict=True):
        assert torch.equal(ours, expected)


# Tensors without numbers.


Form = tuple[tuple[int, ...], torch.dtype, str]


def forms(*results: Tensor) -> list[Form]:
    return [(tuple(result.shape), result.dtype, result.device.type) for result in results]


def forms_of_functions(weight: Tensor, grad: Tensor) -> list[Form]:
    """Every public function on 6 x 10 matrices: shapes, types and devices of the results."""
    out = torch.zeros(3, device=weight.device)
    out_many = torch.zeros(2, 10, device=weight.device)
    foreach_group_saliency([SaliencyEntry(weight, grad, 0, 2, out)])
    return forms(
        group_saliency(weight, grad, axis=0, group=2),
        group_saliency(weight, grad, axis=1, group=5, statistics=list(STATISTICS)),
        group_saliency(weight, None, axis=0, group=1, statistics="magnitude"),
        group_saliency(weight, grad, axis=0, group=2, out=out),
        group_saliency(weight, grad, axis=1, group=1, statistics=["ntk", "taylor"], out=out_many),
        kl_divergence(weight, grad),
        linear_kl_divergence(weight, weight[:4], grad, grad[:4], chunk=3),
        *mixture_bounds(grad),
    )


def forms_of_operators(weight: Tensor, grad: Tensor) -> list[Form]:
    out, kept = torch.zeros(1, 3, device=weight.device), torch.tensor([1, 0], device=weight.device)
    OPS.foreach_group_saliency_([out], [0], [weight], [grad], [0], [2], 1)
    return forms(
        OPS.group_saliency(weight, grad, 1, 5, ALL),
        OPS.group_saliency(weight, None, 0, 1, 16),
        *OPS.gather_slice([weight, weight], kept, 0, 3),
        OPS.kl_divergence(weight, grad),
        OPS.kl_divergence_state(weight, grad),
        *OPS.mixture_bounds(grad, 5, 0.02),
    )


@pytest.fixture
def no_kernels(backend, monkeypatch):
    """A kernel that gets a tensor without memory would read at address 0: fail before that."""
    if backend != "torch":
        module = importlib.import_module(f"nirvana.ops.backends.{backend}")
        for name in ("saliency", "plan_saliency", "gather", "divergence", "divergence_state", "mixture"):
            monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


#: Indexing of a fake GPU tensor by Python wants a real GPU; the operators do without.
FAKES = [(forms_of_functions, "cpu"), (forms_of_operators, "cpu"), (forms_of_operators, "cuda")]
FAKES += [(forms_of_functions, "cuda")] if torch.cuda.is_available() else []


@pytest.mark.parametrize(("forms_of", "where"), FAKES, ids=lambda value: getattr(value, "__name__", value))
def test_fake_tensors(device, request, forms_of, where):
    """Also of a GPU that this machine has not. Nothing is computed, whatever backend is forced."""
    expected = forms_of(*pair(device, 6, 10))
    request.getfixturevalue("no_kernels")
    with FakeTensorMode():
        weight, grad = torch.empty(6, 10, device=where), torch.empty(6, 10, device=where, dtype=torch.bfloat16)
        assert isinstance(weight, FakeTensor)
        ours = forms_of(weight, grad)
    assert ours == [(shape, dtype, where) for shape, dtype, _ in expected]


@pytest.mark.parametrize("forms_of", [forms_of_functions, forms_of_operators])
def test_meta_tensors(forms_of):
    expected = forms_of(*pair("cpu", 6, 10))
    ours = forms_of(torch.empty(6, 10, device="meta"), torch.empty(6, 10, device="meta", dtype=torch.float16))
    assert ours == [(shape, dtype, "meta") for shape, dtype, _ in expected]


@pytest.mark.parametrize("form", ["list", "tensor"])
def test_gather_slice_of_meta_tensors(form):
    """Indices are real, weights need not be: the shape of a pruned model is known without its numbers."""
    kept = [1, 0] if form == "list" else torch.tensor([1, 0])
    ours = gather_slice(torch.empty(6, 10, device="meta"), kept, axis=1, unit=2)
    assert ours.device.type == "meta"
    assert ours.shape == (6, 4)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("form", ["list", "tensor"])
def test_gather_slice_of_fake_tensors(form):
    with FakeTensorMode():
        kept = [1, 0] if form == "list" else torch.tensor([1, 0])
        ours = gather_slice(torch.empty(6, 10), kept, axis=1, unit=2)
    assert isinstance(ours, FakeTensor)
    assert ours.shape == (6, 4)
