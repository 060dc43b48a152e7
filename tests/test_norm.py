"""RMSNorm by its CPU kernel against torch's in float64, and where torch's stays in its place.

N rows of H numbers.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import normal, relative_error
from torch import nn

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM, norm
from modeling_minrnn.backends import NAMESPACE
from modeling_minrnn.norm import SMALLEST, MinRNNRMSNorm

LAYOUTS = {
    "contiguous": lambda x: x,
    "rows last": lambda x: x.T.contiguous().T,
    "some columns of a wider tensor": lambda x: torch.cat([x, x, x], -1).chunk(3, -1)[1],
    "one row for all": lambda x: x[:1].expand_as(x),
}


def module(H, dtype=torch.float32, backend="auto"):
    made = MinRNNRMSNorm(H, 1e-6, backend)
    made.weight = nn.Parameter(normal(H, seed=9))
    return made.to(dtype)


def is_fused(y):
    return "rms_norm" in type(y.grad_fn).__name__


@pytest.fixture
def for_any_size(monkeypatch):
    monkeypatch.setattr(norm, "SMALLEST", 1)


@pytest.mark.parametrize("threads", [1, 3])
def test_output_and_gradients_equal_torch_in_float64(for_any_size, monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layouts = st.sampled_from(sorted(LAYOUTS))

    @settings(max_examples=60)
    @given(st.sampled_from([1, 2, 63, 64, 65, 200]), st.sampled_from([1, 7, 16, 33, 128]), layouts, layouts,
           st.sampled_from([1e-12, 1.0, 1e12]), st.integers(0, 1000))  # fmt: skip
    def check(N, H, x_layout, d_y_layout, size, seed):
        x = LAYOUTS[x_layout](size * normal(N, H, seed=seed)).detach().requires_grad_()
        d_y = LAYOUTS[d_y_layout](normal(N, H, seed=seed + 1))
        fused = module(H)
        y = fused(x)
        assert is_fused(y)
        exact, exact_x = module(H, torch.float64), x.detach().double().requires_grad_()
        expected = exact(exact_x)
        assert relative_error(y, expected) <= 1e-6
        actual = torch.autograd.grad(y, (x, fused.weight), d_y)
        # The gradient of x is a difference: beside it, its terms' rounding.
        terms = (d_y * fused.weight / x.detach().square().mean(-1, keepdim=True).add(1e-6).sqrt()).norm()
        d_x, d_weight = torch.autograd.grad(expected, (exact_x, exact.weight), d_y.double())
        assert (actual[0] - d_x).norm() <= 1e-6 * terms
        assert relative_error(actual[1], d_weight) <= 2e-6

    check()


def test_the_operators_pass_opcheck():
    x, weight = normal(5, 7, seed=0).requires_grad_(), normal(7, seed=1).requires_grad_()
    torch.library.opcheck(norm._norm._opoverload, (x, weight, 1e-6))
    torch.library.opcheck(norm._norm_backward._opoverload, (x.detach(), weight.detach(), torch.ones(5), x.detach()))


def test_it_stays_one_operator_in_a_compiled_model(for_any_size):
    torch.compiler.reset()
    compiled = torch.compile(module(32), fullgraph=True, backend="eager", dynamic=True)
    for N in (4, 5):
        x = normal(N, 32, seed=0).requires_grad_()
        y = compiled(x)
        assert is_fused(y)
        torch.testing.assert_close(y, module(32)(x), rtol=0, atol=0)


def test_nan_and_infinity_come_out_as_they_do_of_torch(for_any_size):
    x = torch.ones(3, 40)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    x.requires_grad_()
    y, expected = module(40)(x), module(40, backend="torch")(x)
    torch.testing.assert_close(y, expected, equal_nan=True)
    gradients = [torch.autograd.grad(each.sum(), x)[0] for each in (y, expected)]
    assert torch.equal(gradients[0].isfinite().all(-1), gradients[1].isfinite().all(-1))


@pytest.mark.filterwarnings("ignore:.*jit.trace.*:DeprecationWarning")
def test_other_tensors_and_settings_are_left_to_torch(for_any_size):
    x = normal(4, 32, seed=0).requires_grad_()
    assert is_fused(module(32)(x)) and is_fused(module(32, backend="numba")(x))
    assert not is_fused(module(32, backend="torch")(x)) and not is_fused(module(32, backend="loop")(x))
    assert not is_fused(module(32, torch.float64)(x.double())) and not is_fused(
        module(32, torch.bfloat16)(x.bfloat16())
    )
    without_weight = nn.RMSNorm.__new__(MinRNNRMSNorm)
    nn.RMSNorm.__init__(without_weight, 32, elementwise_affine=False)
    without_weight.backend = "auto"
    assert not is_fused(without_weight(x))
    with pytest.raises(RuntimeError, match="normalized_shape|shape"):
        module(31)(x)
    fused = module(32)
    by_row = torch.func.vmap(torch.func.grad(lambda row: fused(row).sum()))(x.detach())
    torch.testing.assert_close(by_row, torch.autograd.grad(fused(x).sum(), x)[0])
    traced = torch.jit.trace(module(32), x.detach())
    exported = torch.export.export(module(32), (x.detach(),))
    assert f"{NAMESPACE}::" not in str(traced.inlined_graph) and f"{NAMESPACE}." not in str(exported.graph)
    assert "rms_norm" in str(traced.inlined_graph) and "rms_norm" in str(exported.graph)


def test_a_model_takes_the_kernel_for_large_inputs_alone_and_trains_as_with_torch():
    config = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1}
    fused = MinRNNForCausalLM(MinRNNConfig(**config))
    plain = MinRNNForCausalLM(MinRNNConfig(**config, scan_backend="torch"))
    plain.load_state_dict(fused.state_dict())
    tokens = torch.randint(64, (2, SMALLEST // 64 // 2))
    losses = [model(tokens, labels=tokens).loss for model in (fused, plain)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss, model in zip(losses, (fused, plain))]
    for actual, expected in zip(*gradients):
        assert relative_error(actual, expected) <= 1e-5
    assert is_fused(fused.model(tokens).last_hidden_state)
    assert not is_fused(fused.model(tokens[:, 1:]).last_hidden_state)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.model(tokens).last_hidden_state.dtype == plain.model(tokens).last_hidden_state.dtype


def test_second_derivatives_are_refused_in_one_line(for_any_size):
    x = normal(4, 32, seed=0).requires_grad_()
    (d_x,) = torch.autograd.grad(module(32)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='scan_backend="loop"'):
        d_x.sum().backward()
