"""Every cell on every backend against the float64 oracle, and against what others made of the same papers.

minGRU and minLSTM themselves are in test_scan.py, where more is asked of them.
"""

import functools

import numpy as np
import oracle
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from cases import CASES as ALL_CASES
from cases import WithoutFloat64, oracle_arguments, outcome, problem, width
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import normal, random_mask, relative_error
from torch.autograd import gradcheck, gradgradcheck

from modeling_minrnn import (
    cells,
    linear_scan,
    matrix_numba,
    matrix_recurrence,
    minrnn_scan,
    operators,
    scan_blocks,
    scan_numba,
)
from modeling_minrnn.cells import LMU, LRU, RGLRU, RWKV4, Aaren, GatedDelta
from modeling_minrnn.scan import stack_parameters, step_loop

try:
    from modeling_minrnn import scan_triton
except ImportError:  # triton is made for Linux
    scan_triton = None

FUSED = ["torch", "numba", *(["triton"] if scan_triton else [])]  # triton by its slow interpreter
EXACT = ["loop", *FUSED]
CASES = {spec: cell for spec, cell in ALL_CASES.items() if spec not in ("mingru", "minlstm")}
every_cell = pytest.mark.parametrize("cell", CASES.values(), ids=CASES)
every_exact_backend = pytest.mark.parametrize("backend", EXACT)
every_fused_backend = pytest.mark.parametrize("backend", FUSED)

# Of the interpreter of triton 3.6, the oldest supported.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def nan_in_uninitialised_memory():
    """What an implementation forgets to write becomes visible."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def small_tiles_of_triton():
    """Short sequences then take several tiles, and several segments."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore"):
        if scan_triton:
            patch.setattr(scan_triton, "FORWARD_TILES", [(2, 4, 32, 1)] * 2)
            patch.setattr(scan_triton, "BACKWARD_TILES", [(4, 2, 32, 1)] * 2)
        yield


def by_oracle(cell, arguments):
    """`outcome` of the oracle, with inputs in float64, so that no gradient is rounded on its way out."""

    def scan(parameters, **more):
        stacked = torch.stack(list(parameters.values())) if parameters else None
        return oracle.scan(**more, parameters=stacked, **oracle_arguments(cell))

    exact = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
             for name, x in arguments.items()}  # fmt: skip
    exact["parameters"] = {name: x.double() for name, x in arguments["parameters"].items()}
    return outcome(scan, **exact)


def by_package(cell, backend, arguments):
    return outcome(functools.partial(minrnn_scan, cell_type=cell, backend=backend), **arguments)


def assert_close(actual, expected, tolerance=3e-6, rounding=0.0):
    """Relative errors of at most `tolerance`, to which `rounding` comes in all but the final state."""
    assert actual.keys() == expected.keys()
    for name in actual:
        limit = tolerance + (rounding if name != "final_state" else 0)
        error = relative_error(actual[name], expected[name])
        assert error <= limit, f"{name}: relative error {error:.1e}, not {limit:.1e}"  # a NaN fails


# Against the oracle

SHAPES = [(1, 1, 1), (2, 2, 5), (1, 63, 5), (3, 63, 33), (2, 1000, 5), (1, 2049, 3), (2, 5, 9000)]
# What rounding adds in half precision: to outputs, and to gradients, as the backward reads rounded states.
ROUNDING = {torch.float64: 0, torch.float32: 0, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@functools.lru_cache(1)
def problem_and_expected_outcome(cell, shape, dtype):
    arguments = problem(cell, *shape, dtype)
    return arguments, by_oracle(cell, arguments)


def combinations():
    for name, cell in CASES.items():
        for shape in SHAPES:
            for dtype in ROUNDING:
                for backend in EXACT:
                    if shape == (1, 63, 5) and (backend, dtype.itemsize) != ("triton", 2):
                        continue
                    if dtype == torch.float64 and backend in ("numba", "triton"):
                        continue  # refused
                    if backend in ("loop", "triton") and (shape[1] > 100 or shape[2] > 100):
                        continue  # takes seconds
                    if cell.has_matrices and shape[2] > 100:
                        continue  # gigabytes
                    # Rounding is that of loads and stores, of which one tile of triton's interpreter has all.
                    rounded = (1, 63, 5) if backend == "triton" else (3, 63, 33)
                    if dtype not in (torch.float32, torch.float64) and shape != rounded:
                        continue
                    marks = [pytest.mark.oldest] if shape == (2, 2, 5) and dtype == torch.float32 else []
                    id = f"{name}-{shape}-{str(dtype).removeprefix('torch.')}-{backend}"
                    yield pytest.param(cell, shape, dtype, backend, marks=marks, id=id)


@pytest.mark.parametrize("cell, shape, dtype, backend", list(combinations()))
def test_outputs_and_gradients_equal_the_oracle(cell, shape, dtype, backend):
    arguments, expected = problem_and_expected_outcome(cell, shape, dtype)
    actual = by_package(cell, backend, arguments)
    assert actual["outputs"].dtype == actual["d_projected"].dtype == dtype
    assert actual["final_state"].dtype == torch.promote_types(dtype, torch.float32)
    assert_close(actual, expected, 1e-12 if dtype == torch.float64 else 3e-6, ROUNDING[dtype])


@every_cell
def test_the_gradient_of_the_oracle_is_its_finite_difference(cell):
    arguments = problem(cell, 2, 5, 1, torch.float64)
    names = list(arguments["parameters"])
    masks = [random_mask(2, 5, seed=seed, share=0.4) for seed in (0, 1)]

    def scan(projected, initial_state, reset_state, *parameters):
        stacked = torch.stack(parameters) if parameters else None
        return oracle.scan(
            projected, initial_state=initial_state, reset_mask=masks[0], padding_mask=masks[1],
            reset_state=reset_state, parameters=stacked, **oracle_arguments(cell),
        )  # fmt: skip

    inputs = [arguments[name] for name in ("projected", "initial_state", "reset_state")]
    inputs += [arguments["parameters"][name] for name in names]
    assert gradcheck(scan, [x.clone().requires_grad_() for x in inputs])


@st.composite
def masked_problems(draw, cell):
    B, T, channels = draw(st.integers(1, 3)), draw(st.integers(1, 30)), draw(st.sampled_from([1, 2, 5]))
    seed = draw(st.integers(0, 1000))
    arguments = problem(cell, B, T, channels, seed=seed)
    for name in ("initial_state", "reset_state"):
        if draw(st.booleans()):
            arguments[name] = None
    if draw(st.booleans()):
        arguments["projected"] = arguments["projected"].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("reset_mask", "padding_mask"):
        share = draw(st.sampled_from([None, 0.0, 0.2, 0.7, 1.0]))
        arguments[name] = None if share is None else random_mask(B, T, seed=seed + len(name), share=share)
    return arguments


def examples(backend):
    return settings(max_examples=4 if backend == "triton" else 15)


@every_exact_backend
@every_cell
def test_any_masks_equal_the_oracle(cell, backend):
    @examples(backend)
    @given(masked_problems(cell))
    def check(arguments):
        assert_close(by_package(cell, backend, arguments), by_oracle(cell, arguments))

    with pytest.MonkeyPatch.context() as patch:  # several chunks and blocks of them
        patch.setattr(matrix_recurrence, "CHUNK", 4)
        patch.setattr(matrix_numba, "CHUNK", 4)
        patch.setattr(matrix_recurrence, "BLOCK_ELEMENTS", 64)
        check()


# Precision


LONG = {"torch": 2**17, "numba": 2**17, "triton": 120}  # tokens
GATES = {  # blocks of `projected` that are gates, and which way each makes a cell remember
    "mingru": {0: -1}, "minlstm": {0: 1, 1: -1}, "mingru_signed": {0: 0.3, 1: -0.3}, "aaren": {0: -1},
    "rwkv4": {0: -1}, "lru": {}, "rglru": {0: -1}, "hgrn": {0: 1}, "hgrn2": {0: 1}, "gated_delta": {0: -1}, "lmu": {},
}  # fmt: skip


def long_channels(cell):
    """For D of 6 to 18."""
    return {"hgrn2": 3, "gated_delta": 1}.get(cell.name, 6)


@functools.lru_cache(1)
def long_problem_and_expected_outcome(cell, T):
    """Channels that forget, that remember for 1e5 tokens, and of both by turns; so do memories of parameters."""
    D = width(cell, long_channels(cell))
    arguments = problem(cell, 1, T, long_channels(cell))
    sign = random_mask(T, 1, seed=11, share=0.5) * 2.0 - 1
    blocks = list(arguments["projected"].split(cell.blocks(D), -1))
    for block, way in GATES[cell.name].items():
        third = -(-blocks[block].shape[-1] // 3)
        blocks[block][..., :third] += 12 * way
        blocks[block][..., third : 2 * third] -= 6 * way
        blocks[block][..., 2 * third :] += 20 * way * sign
    arguments["projected"] = torch.cat(blocks, -1)
    for name in ("nu", "decay"):
        if name in arguments["parameters"]:
            channels = len(arguments["parameters"][name])
            arguments["parameters"][name] = torch.linspace(-12, 1, channels)
    arguments["d_outputs"][..., ::2] += 1
    return arguments, by_oracle(cell, arguments)


@pytest.mark.parametrize(  # of matrices triton computes nothing: it is torch
    "cell, backend",
    [(c, b) for c in CASES.values() if c.name != "lmu" for b in (FUSED[:2] if c.has_matrices else FUSED)],
    ids=str,
)
def test_errors_do_not_grow_with_the_sequence(cell, backend):
    """Outputs and the gradient of each block of `projected` by the kind of its gates, all else as a whole."""
    # The oracle takes a product of matrices a token.
    length = LONG[backend] // 8 if cell.name == "gated_delta" else LONG[backend]
    arguments, expected = long_problem_and_expected_outcome(cell, length)
    actual = by_package(cell, backend, arguments)
    D = width(cell, long_channels(cell))
    blocks = {"outputs": [D], "d_projected": cell.blocks(D)}
    for name in actual:
        for block, pair in enumerate(
            zip(*(x[name].split(list(blocks.get(name, [x[name].shape[-1]])), -1) for x in (actual, expected)))
        ):
            thirds = 3 if name in blocks and pair[0].shape[-1] % 3 == 0 else 1
            for third, (x, y) in enumerate(zip(*(z.chunk(thirds, -1) for z in pair))):
                error = relative_error(x, y)
                if name == "d_step":  # the sum of the gates' gradients, which here leaves a five-hundredth of them
                    summed = expected["d_projected"][..., : len(y)].abs().sum((0, 1))
                    error *= float(y.norm() / summed.norm())
                assert error <= 3e-6, f"{name}, block {block}, third {third}: {error:.1e}"


@pytest.mark.parametrize("backend, limit", [("numba", 3e-6), ("torch", 1e-4)])
def test_reflections_by_the_same_key(backend, limit):
    """What rounding leaves of a key's length adds up, where torch rounds keys to float32. So does what that of silu
    leaves of its direction, in the gradients of `projected`, which are as large as T."""
    cell, T = GatedDelta(num_heads=1, householder_steps=2), 1024
    arguments = problem(cell, 1, T, 16)
    gate, rate, *vectors = arguments["projected"][:, :1].expand(-1, T, -1).split(cell.blocks(width(cell, 16)), -1)
    arguments["projected"] = torch.cat([gate - 30, rate + 8, *vectors], -1)  # remembers; rates of 2
    actual, expected = by_package(cell, backend, arguments), by_oracle(cell, arguments)
    assert relative_error(actual.pop("d_projected"), expected.pop("d_projected")) <= 3 * limit
    assert_close(actual, expected, limit)


# Sequences: splits, documents, padding


@every_exact_backend
@every_cell
def test_splitting_a_sequence_anywhere_changes_nothing(cell, backend):
    arguments = problem(cell, 2, 23, 3)

    def in_pieces(projected, initial_state, **more):
        outputs = []
        for piece in projected.split([1, 9, 2, 11], 1):
            piece_outputs, initial_state = minrnn_scan(piece, cell, initial_state, backend=backend, **more)
            outputs.append(piece_outputs)
        return torch.cat(outputs, 1), initial_state

    assert_close(outcome(in_pieces, **arguments), by_package(cell, backend, arguments), 2e-6)


@every_exact_backend
@every_cell
def test_documents_in_one_row_equal_documents_by_themselves(cell, backend):
    lengths = [1, 13, 2, 7]
    arguments = problem(cell, 2, sum(lengths), 3)
    resets = torch.zeros(2, sum(lengths), dtype=torch.bool)
    resets[:, torch.tensor(lengths).cumsum(0)[:-1]] = True

    def by_themselves(projected, initial_state, reset_state, **more):
        outputs = []
        for document in projected.split(lengths, 1):
            document_outputs, final_state = minrnn_scan(document, cell, initial_state, backend=backend, **more)
            outputs.append(document_outputs)
            initial_state = reset_state.expand_as(initial_state)
        return torch.cat(outputs, 1), final_state

    packed = by_package(cell, backend, arguments | {"reset_mask": resets})
    assert_close(packed, outcome(by_themselves, **arguments), 2e-6)


@every_exact_backend
@every_cell
def test_what_a_padding_token_holds_reaches_no_output_and_no_gradient(cell, backend):
    arguments = problem(cell, 2, 30, 3) | {"padding_mask": random_mask(2, 30, seed=0, share=0.3)}
    expected = by_package(cell, backend, arguments)
    arguments["projected"][arguments["padding_mask"]] = torch.nan
    actual = by_package(cell, backend, arguments)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_state_handed_on_is_exact_in_half_precision(cell, dtype):
    arguments = problem(cell, 2, 40, 5, dtype)
    more = {"parameters": arguments["parameters"]}
    _, one_shot = minrnn_scan(arguments["projected"], cell, **more)
    state = None
    for token in arguments["projected"].split(1, 1):
        _, state = minrnn_scan(token, cell, state, **more)
    assert state.dtype == one_shot.dtype == torch.float32
    assert relative_error(state, one_shot) <= 3e-6


# Derivatives


@every_cell
def test_gradients_of_the_torch_backend_are_finite_differences(cell):
    arguments = problem(cell, 2, 7, 1, torch.float64)
    names = list(arguments["parameters"])
    masks = {"reset_mask": random_mask(2, 7, seed=0, share=0.3), "padding_mask": random_mask(2, 7, seed=1, share=0.3)}

    def scan(projected, initial_state, reset_state, *parameters):
        return minrnn_scan(
            projected, cell, initial_state, reset_state=reset_state, parameters=dict(zip(names, parameters)),
            backend="torch", **masks,
        )  # fmt: skip

    inputs = [arguments[name] for name in ("projected", "initial_state", "reset_state")]
    inputs += arguments["parameters"].values()
    assert gradcheck(scan, [x.clone().requires_grad_() for x in inputs])


@every_cell
def test_the_loop_has_second_derivatives(cell):
    arguments = problem(cell, 1, 3, 1, torch.float64)
    names = list(arguments["parameters"])

    def scan(projected, *parameters):
        return minrnn_scan(projected, cell, parameters=dict(zip(names, parameters)), backend="loop")[0]

    inputs = [arguments["projected"], *arguments["parameters"].values()]
    assert gradgradcheck(scan, [x.clone().requires_grad_() for x in inputs])


@every_fused_backend
@every_cell
def test_gradients_are_finite_where_gates_saturate(cell, backend):
    for scale in (0.0, 100.0, 1e4):
        arguments = problem(cell, 1, 9, 3)
        arguments["projected"] = scale * arguments["projected"].sign()
        for name, x in by_package(cell, backend, arguments).items():
            assert x.isfinite().all(), f"{name} at {scale}"


# Others' results


def test_aaren_is_attention_of_a_constant_query():
    B, T, heads, d = 2, 257, 4, 6
    cell = Aaren(num_heads=heads)
    query, key, value = (normal(*shape, seed=seed, dtype=torch.float64) for seed, shape in
                         enumerate([(heads, 1, d), (B, heads, T, d), (B, heads, T, d)]))  # fmt: skip
    score = (query * key).sum(-1) / d**0.5
    projected = torch.cat([score.transpose(1, 2), value.transpose(1, 2).flatten(2)], -1)
    outputs, _ = minrnn_scan(projected, cell)
    expected = F.scaled_dot_product_attention(query.expand(B, heads, T, d), key, value, is_causal=True)
    assert relative_error(outputs, expected.transpose(1, 2).flatten(2)) <= 1e-12


def test_rwkv4_is_that_of_transformers_with_its_gradients_and_its_state():
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    B, T, D = 2, 50, 8
    k, v, r = (normal(B, T, D, seed=seed) for seed in range(3))
    inputs = [x.requires_grad_() for x in (torch.linspace(-5, 1, D), normal(D, seed=3), k, v, r)]
    decay, bonus, k, v, r = inputs
    expected, theirs = rwkv_linear_attention_cpu(decay, bonus, k, v, return_state=True)
    expected = torch.sigmoid(r) * expected
    parameters = {"decay": decay, "bonus": bonus}
    outputs, state = minrnn_scan(torch.cat([k, v, r], -1), "rwkv4", parameters=parameters)
    gradients, upstream = [], normal(B, T, D, seed=4)
    for y in (outputs, expected):
        gradients.append(torch.autograd.grad(y, inputs, upstream))
    for actual, wanted in zip([outputs, *gradients[0]], [expected, *gradients[1]]):
        assert relative_error(actual, wanted) <= 3e-6
    assert relative_error(RWKV4.state_of(*theirs), state) <= 3e-6
    more = torch.cat([x.detach() for x in (k, v, r)], -1)
    continued, _ = minrnn_scan(more, "rwkv4", RWKV4.state_of(*theirs), parameters=parameters)
    twice, _ = rwkv_linear_attention_cpu(decay, bonus, torch.cat([k, k], 1), torch.cat([v, v], 1))
    assert relative_error(continued, torch.sigmoid(r) * twice[:, T:]) <= 3e-6


def test_the_lru_is_a_convolution():
    B, T, D = 2, 300, 8
    cell = LRU()
    parameters = {name: x.double() for name, x in cell.initial_parameters(D, 0, 1, None, "cpu").items()}
    eigenvalues = torch.exp(torch.complex(-parameters["nu"].exp(), parameters["theta"].exp()))
    x = normal(B, T, D, seed=0, dtype=torch.float64)
    inputs = parameters["gamma"].exp() * torch.complex(*x.chunk(2, -1))
    kernel = eigenvalues ** torch.arange(T)[:, None]
    expected = torch.fft.ifft(torch.fft.fft(kernel, 2 * T, dim=0) * torch.fft.fft(inputs, 2 * T, dim=1), dim=1)[:, :T]
    outputs, _ = minrnn_scan(x, cell, parameters=parameters)
    assert relative_error(outputs, torch.cat([expected.real, expected.imag], -1)) <= 1e-12


def test_the_lru_starts_on_its_ring():
    parameters = LRU().initial_parameters(20000, 0, 1, None, "cpu")
    radius = torch.exp(-parameters["nu"].exp())
    least, most = LRU.RING
    assert least <= radius.min() <= least + 0.01 and most - 0.001 <= radius.max() <= most
    share = (radius.square() - least**2) / (most**2 - least**2)  # uniform in area
    assert abs(share.mean() - 0.5) < 0.02 and abs(share.std() - 12**-0.5) < 0.02
    torch.testing.assert_close(parameters["gamma"].exp().square(), 1 - radius.square(), rtol=1e-3, atol=1e-6)


def test_the_rglru_is_that_of_recurrent_gemma_with_packed_documents():
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaConfig, RecurrentGemmaRglru

    B, T, D, heads = 2, 150, 16, 2
    torch.manual_seed(0)
    theirs = RecurrentGemmaRglru(
        RecurrentGemmaConfig(hidden_size=D, lru_width=D, num_attention_heads=heads, num_hidden_layers=1, vocab_size=8)
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    x = normal(B, T, D, seed=1)
    positions = torch.arange(T).repeat(B, 1)
    positions[1, 100:] -= 100
    split = x.view(B, T, heads, -1)
    gates = [
        (torch.einsum("bthi,hij->bthj", split, weight) + bias).flatten(2)
        for weight, bias in (
            (theirs.recurrent_gate_weight, theirs.recurrent_gate_bias),
            (theirs.input_gate_weight, theirs.input_gate_bias),
        )
    ]
    outputs, _ = minrnn_scan(
        torch.cat([*gates, x], -1), RGLRU(), parameters={"decay": theirs.recurrent_param}, reset_mask=positions == 0
    )
    assert relative_error(outputs, theirs(x, positions)) <= 1e-6


def test_the_gated_delta_rule_is_that_of_qwen3_next():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    B, T, heads, n = 2, 150, 3, 8
    cell = GatedDelta(num_heads=heads)
    gate, r, k, v, q = (normal(B, T, size, seed=i) for i, size in enumerate(cell.blocks(heads * n)))
    decay, step, start = normal(heads, seed=5), normal(heads, seed=6), normal(B, heads * n * n, seed=7)
    outputs, state = minrnn_scan(
        torch.cat([gate, r, k, v, q], -1), cell, start, parameters={"decay": decay, "step": step}
    )
    query, key, value = (x.unflatten(-1, (heads, n)) for x in (n**0.5 * F.silu(q), F.silu(k), v))
    query = F.normalize(query, dim=-1) * n**0.5  # which theirs is divided by
    expected, theirs = torch_chunk_gated_delta_rule(
        query, F.normalize(key, dim=-1), value, g=-decay.exp() * F.softplus(gate + step), beta=2 * torch.sigmoid(r),
        initial_state=start.view(B, heads, n, n), output_final_state=True,
    )  # fmt: skip
    assert relative_error(outputs, expected.flatten(2)) <= 1e-5  # the worst seen: 3e-6; of lengths theirs adds 1e-6
    assert relative_error(state, theirs.flatten(1)) <= 1e-5


@pytest.mark.parametrize("steps", [1, 3])
def test_the_gated_delta_rule_of_one_and_of_three_steps_equals_the_oracle(steps):
    cell = GatedDelta(num_heads=1, householder_steps=steps)
    arguments = problem(cell, 2, 70, 3) | {"reset_mask": random_mask(2, 70, seed=0, share=0.1)}
    expected = by_oracle(cell, arguments)
    for backend in ("numba", "torch"):
        assert_close(by_package(cell, backend, arguments), expected)


def test_matrices_too_large_for_the_kernel_are_multiplied_by_torch():
    n = scan_numba.LARGEST + 1
    parameters = {"bound": torch.zeros(n)}
    found, expected = (minrnn_scan(normal(1, 2, 3 * n, seed=0), "hgrn2", parameters=parameters, backend=backend)
                       for backend in ("numba", "torch"))  # fmt: skip
    assert all(map(torch.equal, found, expected))


def test_the_lmu_is_the_discretised_system_of_scipy():
    order, window, T = 64, 256, 600
    cell = LMU(memory_order=order, memory_window=window)
    A, B = cell.system
    u = normal(1, T, 2, seed=0)
    outputs, state = minrnn_scan(u[:, :400], cell)
    rest, _ = minrnn_scan(u[:, 400:], cell, state)
    i, j = np.arange(order)[:, None], np.arange(order)
    continuous = (2 * i + 1) * np.where(i < j, -1.0, (-1.0) ** (i - j + 1)) / window
    input_ = (2 * i + 1) * (-1.0) ** i / window
    system = scipy.signal.cont2discrete((continuous, input_, np.eye(order), np.zeros((order, 1))), 1)
    np.testing.assert_allclose(A, system[0], atol=1e-12)
    for channel in range(2):
        # dlsim's state at t is the one before its input.
        _, _, x = scipy.signal.dlsim(system, np.append(u[0, :, channel].double().numpy(), 0))
        expected = torch.from_numpy(x[1:])
        part = slice(channel * order, (channel + 1) * order)
        assert relative_error(torch.cat([outputs, rest], 1)[0, :, part], expected) <= 1e-6


def test_parity_is_exact_by_hand_set_weights_at_any_length():
    """mingru_signed: a = -1 at a one, 1 at a zero, nothing comes in."""
    bits = random_mask(16, 20000, seed=0, share=0.5)
    decay = torch.where(bits, -20.0, 20.0)
    projected = torch.stack([decay, torch.full_like(decay, -100), torch.zeros_like(decay)], -1)
    states, _ = minrnn_scan(projected, "mingru_signed", torch.ones(16, 1))
    assert torch.equal(states[..., 0] < 0, bits.cumsum(1) % 2 == 1)


def test_permutations_are_exact_by_hand_set_weights():
    """gated_delta: a key e_i - e_j of rate 2 swaps two rows of S; two swaps a token make any permutation of three."""
    T, low, high = 3000, -1.2784645, 0.4577  # silu of which is -0.27846 and 0.27846
    swaps = [torch.tensor(row) for row in ([high, low, 0.0], [0.0, high, low], [high, 0.0, low])]
    moves = torch.randint(4, (4, T, 2), generator=torch.Generator().manual_seed(0))  # the last of which does nothing
    keys = torch.stack([*swaps, torch.zeros(3)])[moves]
    rate = torch.where(moves < 3, 100.0, -100.0)
    gate, query = torch.full((4, T, 1), -100.0), torch.tensor([9.0, 0.0, 0.0]).expand(4, T, 3)
    projected = torch.cat([gate, rate, keys.flatten(2), torch.zeros(4, T, 6), query], -1)
    parameters = {"decay": torch.zeros(1), "step": torch.zeros(1)}
    start = torch.eye(3).flatten().expand(4, 9)
    outputs, _ = minrnn_scan(projected, GatedDelta(householder_steps=2), start, parameters=parameters)
    swapped = torch.tensor([[1, 0, 2], [0, 2, 1], [2, 1, 0], [0, 1, 2]])
    for row, row_moves in zip(outputs.argmax(-1), moves):
        order = torch.arange(3)
        for t, move in enumerate(row_moves):
            for which in move:
                order = order[swapped[which]]
            assert row[t] == order[0]


def test_majority_is_exact_by_hand_set_weights_at_any_length():
    """aaren: one score for all tokens makes h the share of each symbol so far; a forgetting mean is not one."""
    ids = torch.randint(0, 62, (4, 20000), generator=torch.Generator().manual_seed(0))
    symbols = F.one_hot(ids, 62).float()
    counts = symbols.cumsum(1)
    shares, _ = minrnn_scan(torch.cat([torch.zeros(4, 20000, 1), symbols], -1), Aaren())
    answer = shares.argmax(-1, keepdim=True)
    assert torch.equal(counts.gather(-1, answer)[..., 0], counts.amax(-1))


# linear_scan


def linear_problem(kind, B=2, T=40, D=5, seed=0):
    log_decay, inflow, start, reset = (
        normal(*s, seed=seed + i) for i, s in enumerate([(B, T, D)] * 2 + [(B, D), (D,)])
    )
    log_decay, sign = -log_decay.exp(), None
    if kind == "complex":
        turn = normal(B, T, D, seed=seed + 4) * 3
        log_decay, inflow = torch.complex(log_decay, turn), torch.complex(inflow, turn.cos())
        start, reset = torch.complex(start, start.sin()), torch.complex(reset, reset.cos())
    if kind == "sign":
        sign = random_mask(B, T, D, seed=seed + 5, share=0.5) * 2.0 - 1
    return {"log_decay": log_decay, "inflow": inflow, "initial_state": start, "reset_state": reset}, sign


@every_exact_backend
@pytest.mark.parametrize("kind", ["real", "sign", "complex"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_linear_scan_is_the_recurrence_written_out(kind, backend, masked):
    tensors, sign = linear_problem(kind)
    B, T, D = tensors["inflow"].shape
    reset_mask = random_mask(B, T, seed=6, share=0.2) if masked else None
    padding_mask = random_mask(B, T, seed=7, share=0.3) if masked else None

    def written_out(log_decay, inflow, initial_state, reset_state):
        h, states = initial_state, []
        for t in range(T):
            if masked:
                h = torch.where(reset_mask[:, t, None], reset_state, h)
            new = torch.exp(log_decay[:, t]) * (1 if sign is None else sign[:, t]) * h + inflow[:, t]
            h = torch.where(padding_mask[:, t, None], h, new) if masked else new
            states.append(h)
        return torch.stack(states, 1), h

    results = []
    for scan, dtype in ((written_out, torch.complex128 if kind == "complex" else torch.float64), (linear_scan, None)):
        leaves = {name: x.to(dtype or x.dtype).detach().requires_grad_() for name, x in tensors.items()}
        more = {} if dtype else dict(sign=sign, reset_mask=reset_mask, padding_mask=padding_mask, backend=backend)
        states, final_state = scan(**leaves, **more)
        loss = (states * torch.linspace(0, 1, states.numel()).view(states.shape)).abs().sum() + final_state.abs().sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        results.append([torch.view_as_real(x) if x.is_complex() else x for x in (states, final_state, *gradients)])
    for actual, expected in zip(results[1], results[0]):
        assert relative_error(actual.detach(), expected.detach()) <= 3e-6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"inflow": torch.zeros(1, 2, 4)}, r"log_decay and inflow must be \(B, T, D\)"),
        ({"inflow": torch.zeros(1, 2, 3, dtype=torch.complex64)}, "both real or both complex"),
        ({"sign": torch.ones(1, 2, 4)}, "sign must have the shape"),
        ({"backend": "log"}, r'the "log" backend is the listing of minGRU and minLSTM, not of \'linear\''),
        ({"initial_state": torch.zeros(2, 3)}, r"initial_state must be \(1, 3\)"),
    ],
)
def test_bad_input_of_a_linear_scan_is_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        linear_scan(**{"log_decay": torch.zeros(1, 2, 3), "inflow": torch.zeros(1, 2, 3)} | change)
    assert "\n" not in str(error.value)


@every_cell
def test_a_device_without_float64_is_asked_for_none(cell, monkeypatch):
    """The operators of "torch" behind the mode, which does not see into a custom operator."""
    for module in (cells, scan_blocks):
        monkeypatch.setattr(module, "carry_dtype", lambda device: torch.float32)
    given = problem(cell, 2, 9, 4)
    reset, padding = (random_mask(2, 9, share=0.3, seed=seed) for seed in (1, 2))
    arguments = [given["projected"], stack_parameters(cell, given["parameters"], given["projected"])]
    arguments += [given["initial_state"], given["reset_state"]]
    inputs = scan_blocks.ScanInputs(*arguments, reset, padding, cell, "torch")
    chosen = operators._kernels(inputs)
    with WithoutFloat64():
        outputs, rest, final_state = scan_blocks.forward(inputs, chosen)
        upstream = given["d_outputs"], torch.zeros_like(rest), given["d_final_state"]
        gradients = scan_blocks.backward(inputs, chosen, outputs, rest, *upstream)
    leaves = [x.double().requires_grad_() for x in arguments]
    exact = step_loop(inputs._replace(**dict(zip(inputs._fields, leaves))))
    expected = torch.autograd.grad(
        [exact[0], exact[2]], leaves, [d.double() for d in upstream[::2]], materialize_grads=True
    )
    for x, y in zip([outputs, final_state, *gradients], [exact[0], exact[2], *expected], strict=True):
        assert relative_error(x, y) < 1e-5  # in float32 throughout; the worst seen: 4e-7


# Bad input


@pytest.mark.parametrize(
    "cell, projected, more, message",
    [
        ("gru", 4, {}, "cell_type must be one of .*, not 'gru'"),
        (Aaren(num_heads=3), 5, {}, r"\(B, T, 1 D \+ 3\), D a multiple of 3, for 'aaren:num_heads=3', not 5"),
        (
            GatedDelta(num_heads=2),
            30,
            {"parameters": {"decay": torch.zeros(2), "step": torch.zeros(2)}},
            r"projected must be \(B, T, 3 D \+ 4\), D a multiple of 2, for 'gated_delta:num_heads=2'",
        ),
        ("hgrn2", 8, {"parameters": {"bound": torch.zeros(2)}}, r"must be \(B, T, 3 D\) for 'hgrn2', not 8 wide"),
        ("hgrn2", 6, {"backend": "log", "parameters": {"bound": torch.zeros(2)}}, "not of 'hgrn2'"),
        ("lru", 5, {"parameters": {name: torch.zeros(2) for name in ("nu", "theta", "gamma")}}, "2, for 'lru'"),
        ("rwkv4", 6, {}, r"the parameters of 'rwkv4' are \['decay', 'bonus'\], not \[\]"),
        ("mingru", 4, {"parameters": {"decay": torch.zeros(2)}}, r"the parameters of 'mingru' are \[\], not"),
        ("aaren", 4, {"backend": "log"}, "not of 'aaren'"),
        ("rwkv4", 6, {"parameters": {"decay": torch.zeros(3), "bonus": torch.zeros(3)}}, "'decay' must be"),
    ],
)
def test_a_bad_argument_is_one_line(cell, projected, more, message):
    with pytest.raises(ValueError, match=message) as error:
        minrnn_scan(torch.zeros(1, 2, projected), cell, **more)
    assert "\n" not in str(error.value)
