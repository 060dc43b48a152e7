"""torch.func, forward mode and second derivatives: those of the step in a loop, or one line that says what to do."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
import torch.distributed as dist
from cases import CASES, problem
from oracle import normal, random_mask
from small_models import random_ids, small_model
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap

from modeling_minrnn import MinRNNForCausalLM, minrnn_scan, sequence_chunked_backward
from modeling_minrnn.causal_conv import causal_conv
from modeling_minrnn.context_parallel import conv_windows
from modeling_minrnn.masks import conv_taps

PACKAGE = Path(inspect.getfile(MinRNNForCausalLM)).parent
B, T = 2, 6
MASKS = {"reset_mask": random_mask(B, T, seed=7, share=0.3), "padding_mask": random_mask(B, T, seed=8, share=0.3)}
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5}  # the worst seen: 1e-15, 4e-7

# torch itself, where it loads the rules of forward mode
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
every_cell = pytest.mark.parametrize("cell", CASES.values(), ids=CASES)
every_precision = pytest.mark.parametrize(
    "backend, dtype", [("torch", torch.float64), ("torch", torch.float32), ("numba", torch.float32)]
)


def given(cell, dtype, B=B):
    """projected, initial_state, reset_state and the vectors of the cell."""
    arguments = problem(cell, B, T, 3, dtype)
    return *(arguments[name] for name in ("projected", "initial_state", "reset_state")), *arguments[
        "parameters"
    ].values()


def scan(cell, backend, masks=MASKS):
    """A function of what `given` gives."""

    def function(projected, initial_state, reset_state, *parameters):
        named = dict(zip(cell.parameter_names, parameters))
        states = {"initial_state": initial_state, "reset_state": reset_state, "parameters": named}
        return minrnn_scan(projected, cell, **states, **masks, backend=backend)

    return function


def like(tensors, seed=20):
    return tuple(normal(*x.shape, seed=seed + i, dtype=x.dtype) for i, x in enumerate(tensors))


def doubles(tensors):
    return tuple(x.double() for x in tensors)


def assert_same(actual, expected, dtype):
    """Nothing of it is zero throughout, which would prove little."""
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        assert y.any()
        torch.testing.assert_close(x.double(), y, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * y.abs().max())


def squares(function):
    """One number of all outputs, none of whose derivatives is constant."""
    return lambda *inputs: sum(y.square().sum() for y in function(*inputs))


@every_precision
@pytest.mark.parametrize("masks", [MASKS, {}], ids=["masked", "plain"])
@every_cell
def test_forward_mode_is_that_of_the_loop(cell, masks, backend, dtype):
    inputs = given(cell, dtype)
    along = like(inputs)
    _, expected = jvp(scan(cell, "loop", masks), doubles(inputs), doubles(along))
    _, actual = jvp(scan(cell, backend, masks), inputs, along)
    assert_same(actual, expected, dtype)
    with forward_mode.dual_level():
        outputs = scan(cell, backend, masks)(*map(forward_mode.make_dual, inputs, along))
        assert_same([forward_mode.unpack_dual(y).tangent for y in outputs], expected, dtype)


def test_half_precision_has_a_direction_in_half_precision():
    inputs = given(CASES["mingru"], torch.bfloat16)
    along = like(inputs)
    (states, final_state), (d_states, d_final) = jvp(scan(CASES["mingru"], "auto"), inputs, along)
    _, expected = jvp(scan(CASES["mingru"], "loop"), doubles(inputs), doubles(along))
    assert d_states.dtype == states.dtype == torch.bfloat16 and d_final.dtype == torch.float32
    for x, y in zip((d_states, d_final), expected):
        assert (x - y).norm() < 0.02 * y.norm()  # the worst seen: 0.004


@every_precision
@every_cell
def test_gradients_by_torch_func_are_those_of_the_loop(cell, backend, dtype):
    inputs = given(cell, dtype)
    every = tuple(range(len(inputs)))
    expected = grad(squares(scan(cell, "loop")), every)(*doubles(inputs))
    assert_same(grad(squares(scan(cell, backend)), every)(*inputs), expected, dtype)


@pytest.mark.parametrize("shared", [True, False])
@every_cell
def test_gradients_of_each_sequence_by_vmap_are_those_of_the_loop(cell, shared):
    """With vectors that all sequences share, and with some for each."""
    projected, start, *vectors = given(cell, torch.float64, B=3 * B)
    if not shared:
        vectors = [torch.stack([x, 2 * x, -x]) for x in vectors]
    inputs = projected.unflatten(0, (3, B)), start.unflatten(0, (3, B)), *vectors
    in_dims = 0, 0, *[None if shared else 0] * len(vectors)

    def gradients(backend):
        return vmap(grad(squares(scan(cell, backend)), tuple(range(len(inputs)))), in_dims)(*inputs)

    assert_same(gradients("torch"), gradients("loop"), torch.float64)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
@pytest.mark.parametrize("name", ["mingru", "rwkv4"])
def test_jacobians_are_those_of_the_loop(name, jacobian):
    inputs = given(CASES[name], torch.float64)
    actual, expected = (jacobian(scan(CASES[name], backend))(*inputs) for backend in ("torch", "loop"))
    assert_same(actual, expected, torch.float64)


@every_cell
def test_derivatives_of_a_direction_are_those_of_the_loop(cell):
    """Once more forwards, and backwards: by torch.func, and by backward() through forward mode."""
    inputs = given(cell, torch.float64)
    along, other = like(inputs), like(inputs, 30)

    def direction(backend):
        return lambda *x: jvp(squares(scan(cell, backend)), x, along)[1]

    def through_duals(backend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with forward_mode.dual_level():
            output = squares(scan(cell, backend))(*map(forward_mode.make_dual, leaves, along))
            slope = forward_mode.unpack_dual(output).tangent
        return torch.autograd.grad(slope, leaves)

    for derivative in (
        lambda backend: jvp(direction(backend), inputs, other)[1:],
        lambda backend: grad(direction(backend), tuple(range(len(inputs))))(*inputs),
        through_duals,
    ):
        assert_same(derivative("torch"), derivative("loop"), torch.float64)


def second_derivatives(function, x):
    """Each way to differentiate what backward() has computed, as (name, call)."""
    leaf = x.clone().requires_grad_()

    def twice(*calls):
        gradient = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad(gradient[0].sum(), leaf)[0]

    def forward_over_backward():
        with forward_mode.dual_level():
            output = function(forward_mode.make_dual(leaf, torch.ones_like(leaf)))
            (gradient,) = torch.autograd.grad(output, leaf, create_graph=True)
            return forward_mode.unpack_dual(gradient).tangent

    return {
        "backward twice": twice,
        "forward over backward": forward_over_backward,
        "hessian": lambda: hessian(function)(x),
        "grad of grad": lambda: grad(lambda x: grad(function)(x).sum())(x),
        "gradgradcheck": lambda: torch.autograd.gradgradcheck(function, leaf),
    }


@pytest.mark.parametrize("name", second_derivatives(torch.sum, torch.zeros(1)))
@every_cell
def test_second_derivatives_are_those_of_the_loop_or_it_is_recommended(cell, name):
    projected, _, _, *vectors = given(cell, torch.float64)
    projected, named = projected[:1, :3], dict(zip(cell.parameter_names, vectors))

    def function(backend):
        return lambda x: minrnn_scan(x, cell, parameters=named, backend=backend)[0].square().sum()

    result = second_derivatives(function("loop"), projected)[name]()
    assert result is True or result.any()
    if name in ("backward twice", "gradgradcheck"):
        with pytest.raises(RuntimeError, match='^minrnn_scan .* once; .* backend="loop" .* scan_backend="loop"\\)$'):
            second_derivatives(function("torch"), projected)[name]()
    else:
        actual = second_derivatives(function("torch"), projected)[name]()
        assert_same([actual.detach()], [result.detach()], torch.float64)


def conv(backend):
    def function(*inputs):
        return (causal_conv(*inputs, conv_taps(3, *MASKS.values()), backend).square(),)

    return function


def test_the_convolution_is_differentiated_by_all_of_torch_func():
    inputs = normal(B, T, 5, seed=0), normal(5, 3, seed=1), normal(B, 2, 5, seed=2)
    along = like(inputs)
    in_dims = 0, None, None
    for derivative in (
        lambda backend, inputs, along: jvp(conv(backend), inputs, along)[1],
        lambda backend, inputs, along: grad(squares(conv(backend)), (0, 1, 2))(*inputs),
        lambda backend, inputs, along: hessian(squares(conv(backend)), (0, 1))(*inputs)[0],
        lambda backend, inputs, along: vmap(conv(backend), in_dims)(torch.stack([inputs[0], along[0]]), *inputs[1:]),
    ):
        expected = derivative("torch", doubles(inputs), doubles(along))
        assert_same(derivative("numba", inputs, along), expected, torch.float32)


def test_a_second_derivative_of_the_convolution_is_refused_in_one_line():
    others = normal(5, 3, seed=1), normal(B, 2, 5, seed=2)
    calls = second_derivatives(lambda x: squares(conv("numba"))(x, *others), normal(B, T, 5, seed=0))
    with pytest.raises(RuntimeError, match='causal_conv .* once; .* backend="loop" .* scan_backend="loop"\\)$'):
        calls["backward twice"]()


def test_a_model_is_differentiated_by_torch_func_as_with_the_loop():
    """Along a direction of all weights; and the gradients of each sequence, where some are padded."""
    ids, mask = random_ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = 0

    def derivatives(backend):
        model = small_model(["mingru", "aaren"], hidden_size=8, num_heads=2, scan_backend=backend)
        weights = {name: x.detach() for name, x in model.named_parameters()}
        along = dict(zip(weights, like(weights.values())))

        def loss(weights, ids, mask):
            return functional_call(model, weights, (ids,), {"attention_mask": mask, "labels": ids}).loss

        def of_one(weights, ids, mask):
            return loss(weights, ids[None], mask[None])

        _, slope = jvp(lambda weights: loss(weights, ids, mask), (weights,), (along,))
        return slope, *vmap(grad(of_one), (None, 0, 0))(weights, ids, mask).values()

    for actual, expected in zip(derivatives("auto"), derivatives("loop"), strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_a_compiler_takes_torch_func():
    function = squares(lambda x: minrnn_scan(x, "mingru", backend="torch"))
    x, along = normal(B, T, 4, seed=0), normal(B, T, 4, seed=1)
    for derivative in (lambda x: jvp(function, (x,), (along,))[1], vmap(grad(lambda x: function(x[None])))):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(derivative, backend="aot_eager", fullgraph=True)(x), derivative(x))
    torch._dynamo.reset()


def test_functionalize_takes_the_scan():
    x = normal(B, T, 4, seed=0)
    expected = minrnn_scan(x, "mingru", backend="torch")
    for actual, wanted in zip(functionalize(lambda x: minrnn_scan(x, "mingru", backend="torch"))(x), expected):
        torch.testing.assert_close(actual, wanted)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_over_several_processes_all_but_backward_is_refused_in_one_line(group):
    x, window = normal(1, 4, 4, seed=0, dtype=torch.float64), normal(1, 2, 4, seed=1, dtype=torch.float64)
    functions = (
        lambda x: minrnn_scan(x, "mingru", group=group)[0].square().sum(),
        lambda x: sum(y.square().sum() for y in conv_windows(x, window, None, group)),
    )
    for function in functions:
        calls = second_derivatives(function, x) | {
            "jvp": lambda f=function: jvp(f, (x,), (x,)),
            "vmap": lambda f=function: vmap(f)(x[None]),
        }
        for call in calls.values():
            with pytest.raises(RuntimeError, match='several processes .* backend="loop"$'):
                call()


def test_chunked_gradients_are_not_a_function_of_torch_func():
    model, ids = small_model(), random_ids(1, 6)
    with pytest.raises(RuntimeError, match="^for torch.func and forward mode differentiate the loss of the model"):
        grad(lambda x: x * sequence_chunked_backward(model, ids, ids, 3))(torch.tensor(1.0))


def test_every_custom_operator_and_autograd_function_is_one_of_those_above():
    """But for rms_norm, which leaves torch.func to torch (test_norm.py), and what scan_backward works by."""
    source = "".join(path.read_text() for path in PACKAGE.glob("*.py"))
    assert set(re.findall(r'custom_op\(f"{NAMESPACE}::(\w+)"', source)) == {
        "scan", "scan_backward", "causal_conv", "causal_conv_backward", "rms_norm", "rms_norm_backward",
    }  # fmt: skip
    assert source.count("custom_op(") == 6
    assert set(re.findall(r"class (\w+)\(torch.autograd.Function\)", source)) == {"AllGather", "_Known"}
    assert source.count("autograd.Function") == 2
