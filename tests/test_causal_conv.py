"""The causal convolution, fused and portable, against a loop over tokens in float64; and the windows it hands over.

B batch, T time, H channels, K kernel size.
"""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import normal, random_mask, relative_error

from modeling_minrnn.backends import NAMESPACE
from modeling_minrnn.causal_conv import causal_conv, windows_after
from modeling_minrnn.masks import conv_taps

OPERATORS = getattr(torch.ops, NAMESPACE)

every_backend = pytest.mark.parametrize("backend", ["torch", "numba"])


def mask(B, T, share, seed):
    return None if share is None else random_mask(B, T, seed=seed, share=share)


def problem(B, T, H, K, dtype=torch.float32, seed=0):
    """(x, weight, window), d_y"""
    inputs = (
        normal(B, T, H, seed=seed, dtype=dtype),
        normal(H, K, seed=seed + 1),
        normal(B, K - 1, H, seed=seed + 2, dtype=dtype),
    )
    return inputs, normal(B, T, H, seed=seed + 3, dtype=dtype)


def gradients(y, inputs, d_y):
    return torch.autograd.grad(y, inputs, d_y.to(y.dtype), materialize_grads=True)


LAYOUTS = {
    "contiguous": lambda x: x,
    "time last": lambda x: x.mT.contiguous().mT,
    "some columns of a wider tensor": lambda x: torch.cat([x, x, x], -1).chunk(3, -1)[1],
    "one token for all time": lambda x: x[:, :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1].expand_as(x),
}


@pytest.mark.oldest
@every_backend
@pytest.mark.parametrize("K", [1, 2, 4])
def test_output_windows_and_gradients_equal_the_loop(K, backend):
    shares = st.sampled_from([None, 0.0, 0.2, 0.7, 1.0])
    layouts = st.sampled_from(sorted(LAYOUTS))

    @given(st.integers(1, 3), st.integers(1, 12), st.sampled_from([1, 5, 17]), shares, shares, layouts, layouts,
           st.integers(0, 1000))  # fmt: skip
    def check(B, T, H, resets, padding, x_layout, d_y_layout, seed):
        (x, *others), d_y = problem(B, T, H, K, seed=seed)
        reset_mask, padding_mask = mask(B, T, resets, seed), mask(B, T, padding, seed + 1)
        real = torch.ones(B, T, dtype=torch.bool) if padding_mask is None else ~padding_mask
        # The output of a padding token is of no use to anybody.
        d_y = LAYOUTS[d_y_layout](d_y) if padding_mask is None else d_y * real[..., None]
        inputs = [tensor.detach().requires_grad_() for tensor in (LAYOUTS[x_layout](x), *others)]
        y = causal_conv(*inputs, conv_taps(K, reset_mask, padding_mask), backend)
        doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
        expected, windows = oracle.conv(*doubles, reset_mask, padding_mask)
        assert relative_error(y[real], expected[real]) <= 1e-6
        for actual, exact in zip(gradients(y, inputs, d_y), gradients(expected, doubles, d_y)):
            assert relative_error(actual, exact) <= 1e-6
        x, _, window = inputs
        for first in range(T):
            left = windows_after(x, window, conv_taps(K, reset_mask, padding_mask), first)
            assert len(left) == T - first
            for t, actual in enumerate(left, first):
                assert torch.equal(actual.double(), windows[:, t])

    check()


# Worst measured: float16 4.6e-4, bfloat16 5.4e-3.
@every_backend
@pytest.mark.parametrize("T", [1, 50, 1000])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("padded", [False, True])
def test_half_precision_adds_rounding_and_nothing_else(backend, T, dtype, tolerance, padded):
    inputs, d_y = problem(2, T, 33, 4, dtype)
    padding_mask = mask(2, T, 0.2, 0) if padded else None
    if padded:
        d_y = d_y * ~padding_mask[..., None]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    y = causal_conv(*inputs, conv_taps(4, None, padding_mask), backend)
    assert y.dtype == dtype
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected, _ = oracle.conv(*doubles, None, padding_mask)
    real = slice(None) if padding_mask is None else ~padding_mask
    assert relative_error(y[real], expected[real]) <= tolerance
    for tensor, actual, exact in zip(inputs, gradients(y, inputs, d_y), gradients(expected, doubles, d_y)):
        assert actual.dtype == tensor.dtype
        assert relative_error(actual, exact) <= tolerance


@every_backend
@pytest.mark.parametrize("K", [1, 2, 4])
def test_splitting_a_sequence_anywhere_changes_nothing(K, backend):
    @settings(max_examples=25)
    @given(st.integers(2, 14), st.sampled_from([None, 0.3]), st.sampled_from([None, 0.3, 0.9]), st.data())
    @torch.no_grad()
    def check(T, resets, padding, data):
        (x, weight, window), _ = problem(2, T, 5, K)
        masks = mask(2, T, resets, 0), mask(2, T, padding, 1)
        real = torch.ones(2, T, dtype=torch.bool) if masks[1] is None else ~masks[1]
        y = causal_conv(x, weight, window, conv_taps(K, *masks), backend)
        cuts = sorted(data.draw(st.sets(st.integers(1, T - 1))))
        pieces = []
        for start, stop in zip([0, *cuts], [*cuts, T]):
            taps = conv_taps(K, *(None if mask is None else mask[:, start:stop] for mask in masks))
            pieces.append(causal_conv(x[:, start:stop], weight, window, taps, backend))
            (window,) = windows_after(x[:, start:stop], window, taps, stop - start - 1)
        torch.testing.assert_close(torch.cat(pieces, 1)[real], y[real])

    check()


def test_taps_are_none_where_nothing_is_masked():
    assert conv_taps(4, None, None) is None


def test_there_are_no_taps_where_there_is_no_convolution():
    padding = torch.tensor([[True, False, False]])
    assert conv_taps(0, None, padding) is None and conv_taps(0, ~padding, padding) is None


@pytest.mark.parametrize("padding_share", [None, 0.2])
def test_a_window_does_not_keep_the_sequence_alive(padding_share):
    (x, _, window), _ = problem(2, 100, 5, 4)
    taps = conv_taps(4, None, mask(2, 100, padding_share, 0))
    (last,) = windows_after(x, window, taps, 99)
    assert last.untyped_storage().nbytes() == last.nbytes


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_operators_pass_opcheck(masked):
    taps = conv_taps(3, mask(2, 7, 0.2, 0), mask(2, 7, 0.2, 1)) if masked else None
    for layout in ("contiguous", "time last"):
        inputs, d_y = problem(2, 7, 5, 3)
        inputs = [tensor.mT.contiguous().mT if layout == "time last" else tensor for tensor in inputs]
        torch.library.opcheck(OPERATORS.causal_conv_backward.default, (*inputs, taps, d_y))
        torch.library.opcheck(OPERATORS.causal_conv.default, (*(x.requires_grad_() for x in inputs), taps))


@every_backend
@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_convolution_is_one_graph_and_equals_eager(masked, backend):
    def conv(x, weight, window, reset_mask, padding_mask):
        return causal_conv(x, weight, window, conv_taps(weight.shape[1], reset_mask, padding_mask), backend)

    torch.compiler.reset()
    compiled = torch.compile(conv, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T, H in ((2, 9, 5), (3, 63, 33)):
        inputs, d_y = problem(B, T, H, 4)
        inputs = [tensor.requires_grad_() for tensor in inputs]
        masks = (mask(B, T, 0.2, 0), mask(B, T, 0.2, 1)) if masked else (None, None)
        actual, expected = compiled(*inputs, *masks), conv(*inputs, *masks)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradients(actual, inputs, d_y), gradients(expected, inputs, d_y))


def test_only_the_inputs_are_saved_for_the_backward():
    inputs, _ = problem(2, 50, 5, 4)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    taps = conv_taps(4, mask(2, 50, 0.2, 0), None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        causal_conv(*inputs, taps, "numba")
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in (*inputs, taps)}


def test_a_second_derivative_is_refused_and_torch_recommended():
    (x, *others), _ = problem(1, 5, 3, 4)
    y = causal_conv(x.requires_grad_(), *others, None, "numba")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated once; .* backend="loop"'):
        gradient.sum().backward()


@pytest.mark.parametrize("B, H", [(1, 70), (3, 20)])
def test_the_number_of_threads_changes_no_bit(B, H):
    def results():
        inputs, d_y = problem(B, 40, H, 4)
        inputs = [tensor.requires_grad_() for tensor in inputs]
        y = causal_conv(*inputs, conv_taps(4, mask(B, 40, 0.1, 0), None), "numba")
        return y, *gradients(y, inputs, d_y)

    one = results()
    torch.set_num_threads(2)
    try:
        two = results()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(one, two))


@pytest.mark.parametrize("conv_backend", ["torch", "numba"])
@pytest.mark.parametrize(
    "x, weight, window",
    [((2, 7, 6), (5, 4), (2, 3, 5)), ((2, 7, 5), (5, 4), (2, 2, 5)), ((2, 7, 5), (5, 4), (1, 3, 5))],
    ids=["channels", "window", "batch"],
)
def test_shapes_that_do_not_fit_are_an_error(x, weight, window, conv_backend):
    # First on a device without memory: on the CPU, a kernel that went on would write where it must not.
    for device, backend in (("meta", "torch"), ("cpu", conv_backend)):
        with pytest.raises(ValueError, match="must be"):
            causal_conv(*(torch.zeros(shape, device=device) for shape in (x, weight, window)), None, backend)
