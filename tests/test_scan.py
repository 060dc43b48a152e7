"""minrnn_scan: every backend against the float64 oracle, and what the contract promises. B batch, T time, D width."""

import functools

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import normal, random_mask, relative_error
from small_models import CELLS, GATES
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from modeling_minrnn.backends import NAMESPACE
from modeling_minrnn.scan import minrnn_scan

try:
    from modeling_minrnn import scan_triton
except ImportError:  # triton is made for Linux
    scan_triton = None

FUSED = ["torch", "numba"]  # the backends with a backward of their own
if scan_triton:
    FUSED.append("triton")  # by its slow interpreter
EXACT = ["loop", *FUSED]  # all but the paper's listing
OPERATORS = getattr(torch.ops, NAMESPACE)

# Of the interpreter of triton 3.6, the oldest supported.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

every_cell = pytest.mark.parametrize("cell_type", CELLS)
every_fused_backend = pytest.mark.parametrize("backend", FUSED)
every_exact_backend = pytest.mark.parametrize("backend", EXACT)


@pytest.fixture(autouse=True, scope="module")
def nan_in_uninitialised_memory():
    """What an implementation forgets to write becomes visible."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def small_tiles_of_triton():
    """Short sequences then take several tiles, and several segments. tests/test_scan_triton.py has the large ones."""
    # The interpreter computes in numpy, which warns where exp(-x) is infinite.
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore"):
        if scan_triton:
            patch.setattr(scan_triton, "FORWARD_TILES", [(2, 4, 32, 1)] * 2)
            patch.setattr(scan_triton, "BACKWARD_TILES", [(4, 2, 32, 1)] * 2)
        yield


def examples(backend):
    """For hypothesis, of small problems."""
    return settings(max_examples={"triton": 5, "loop": 15}.get(backend, 30))


def problem(cell_type, B, T, D, dtype=torch.float32, seed=0):
    """Arguments of `outcome`, with ordinary gates."""
    state_dtype = torch.promote_types(dtype, torch.float32)
    return {
        "cell_type": cell_type,
        "projected": normal(B, T, GATES[cell_type] * D, seed=seed, dtype=dtype),
        "initial_state": normal(B, D, seed=seed + 1, dtype=state_dtype),
        "reset_state": normal(D, seed=seed + 2, dtype=state_dtype),
        "d_states": normal(B, T, D, seed=seed + 3, dtype=dtype),
        "d_final_state": normal(B, D, seed=seed + 4, dtype=state_dtype),
    }


def outcome(scan, projected, initial_state=None, reset_state=None, d_states=None, d_final_state=None, **more):
    """States, final state, and the gradient of each tensor given, for the upstream gradients given, by name."""
    inputs = {"projected": projected, "initial_state": initial_state, "reset_state": reset_state}
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if tensor is not None}
    outputs = dict(zip(("states", "final_state"), scan(**inputs, **more)))
    upstream = {"states": d_states, "final_state": d_final_state}
    upstream = {name: d_y.to(outputs[name].dtype) for name, d_y in upstream.items() if d_y is not None}
    gradients = torch.autograd.grad(
        [outputs[name] for name in upstream], list(inputs.values()), list(upstream.values()), materialize_grads=True
    )
    return {name: y.detach() for name, y in outputs.items()} | {f"d_{name}": x for name, x in zip(inputs, gradients)}


def expected_outcome(projected, initial_state=None, reset_state=None, **more):
    """`outcome` of the oracle, with inputs in float64, so that no gradient is rounded on its way out."""
    projected, initial_state, reset_state = (
        x if x is None else x.double() for x in (projected, initial_state, reset_state)
    )
    return outcome(oracle.scan, projected, initial_state, reset_state, **more)


def assert_close(actual, expected, tolerance=3e-6, rounding=0.0):
    """Outcomes with relative errors of at most `tolerance`, to which `rounding` comes in the dtype of `projected`."""
    assert actual.keys() == expected.keys()
    for name in actual:
        limit = tolerance + (rounding if name in ("states", "d_projected") else 0)
        error = relative_error(actual[name], expected[name])
        assert error <= limit, f"{name}: relative error {error:.1e}, not {limit:.1e}"  # a NaN fails


# Against the oracle


@every_cell
def test_the_gradient_of_the_oracle_is_its_finite_difference(cell_type):
    arguments = problem(cell_type, 2, 7, 3, torch.float64)
    inputs = [arguments[name].requires_grad_() for name in ("projected", "initial_state", "reset_state")]
    resets, padding = (random_mask(2, 7, seed=seed, share=0.4) for seed in (0, 1))
    assert gradcheck(lambda p, h, r: oracle.scan(p, cell_type, h, resets, padding, r), inputs)


def test_the_gates_of_the_oracle_are_those_of_the_paper():
    k, j, x = normal(3, 1, 8, 5, seed=0, dtype=torch.float64)
    keep, add, candidate = oracle.gates_and_candidate(torch.cat([k, x], -1), "mingru")
    torch.testing.assert_close((keep, add), (1 - k.sigmoid(), k.sigmoid()))
    torch.testing.assert_close(candidate, torch.where(x >= 0, x + 0.5, x.sigmoid()))
    keep, add, candidate = oracle.gates_and_candidate(torch.cat([k, j, x], -1), "minlstm")
    f, i = k.sigmoid(), j.sigmoid()
    torch.testing.assert_close((keep, add), (f / (f + i), i / (f + i)))
    torch.testing.assert_close(candidate, torch.where(x >= 0, x + 0.5, x.sigmoid()))


# What rounding adds to states and to the gradient of `projected`; the backward also reads rounded states. Worst
# measured: float16 5.6e-4, bfloat16 2.5e-3. All else, a final state in half precision included, stays at 1.1e-7 and
# below, in float64 at 3e-16.
ROUNDING = {torch.float64: 0, torch.float32: 0, torch.float16: 1.5e-3, torch.bfloat16: 6e-3}
SHAPES = [
    (1, 1, 1), (3, 1, 33), (2, 2, 5), (3, 63, 33), (2, 63, 1), (2, 1000, 5), (3, 2049, 1), (1, 2049, 33),
    (1, 70, 1024), (2, 5, 20000),  # wide: "torch" works in blocks of few tokens, or of one
]  # fmt: skip


def combinations():
    for cell_type in CELLS:
        for shape in SHAPES:
            for dtype in ROUNDING:
                for backend in EXACT:
                    if backend in ("numba", "triton") and dtype == torch.float64:
                        continue  # refused, see below
                    if backend in ("loop", "triton") and shape[1] > 100 or backend == "triton" and shape[2] > 100:
                        continue  # takes seconds
                    marks = [pytest.mark.oldest] if shape in [(3, 1, 33), (3, 63, 33)] else []
                    name = f"{cell_type}-{shape}-{str(dtype).removeprefix('torch.')}-{backend}"
                    yield pytest.param(cell_type, shape, dtype, backend, marks=marks, id=name)


@functools.lru_cache(1)
def problem_and_expected_outcome(cell_type, shape, dtype):
    arguments = problem(cell_type, *shape, dtype)
    return arguments, expected_outcome(**arguments)


@pytest.mark.parametrize("cell_type, shape, dtype, backend", list(combinations()))
def test_states_and_gradients_equal_the_oracle(cell_type, shape, dtype, backend):
    arguments, expected = problem_and_expected_outcome(cell_type, shape, dtype)
    actual = outcome(functools.partial(minrnn_scan, backend=backend), **arguments)
    assert actual["states"].dtype == actual["d_projected"].dtype == dtype
    assert actual["final_state"].dtype == torch.promote_types(dtype, torch.float32)
    assert_close(actual, expected, 1e-13 if dtype == torch.float64 else 3e-6, ROUNDING[dtype])


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_listing_of_the_paper_equals_the_oracle_where_it_applies(cell_type, dtype):
    """Short sequences, ordinary gates and a positive initial state; worst measured: 1e-5 in float32."""
    arguments = problem(cell_type, 3, 63, 5, dtype) | {"reset_state": None}
    arguments["initial_state"] = arguments["initial_state"].abs()
    actual = outcome(functools.partial(minrnn_scan, backend="log"), **arguments)
    assert_close(actual, expected_outcome(**arguments), 3e-5 if dtype == torch.float32 else 1e-13)


@every_exact_backend
@every_cell
@torch.no_grad()
def test_one_token_without_a_gradient_equals_the_oracle(cell_type, backend):
    arguments = problem(cell_type, 3, 1, 33)
    masks = {
        "reset_mask": torch.tensor([[True], [False], [True]]),
        "padding_mask": torch.tensor([[True], [True], [False]]),
    }
    inputs = {name: arguments[name] for name in ("projected", "cell_type", "initial_state", "reset_state")} | masks
    for actual, expected in zip(minrnn_scan(**inputs, backend=backend), oracle.scan(**inputs)):
        assert relative_error(actual, expected) <= 3e-6


LAYOUTS = {
    "contiguous": lambda x: x,
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "time last": lambda x: x.mT.contiguous().mT,
    "some columns of a wider tensor": lambda x: torch.cat([x, x, x], -1).chunk(3, -1)[1],
    "every second column": lambda x: torch.stack([x, x], -1)[..., 0],
    "one token for all time": lambda x: x[:, :1].expand_as(x),
    "one row for the whole batch": lambda x: x[:1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1].expand_as(x),
}
STATE_LAYOUTS = {
    "none": lambda h: None,
    "contiguous": lambda h: h,
    "transposed": lambda h: h.mT.contiguous().mT,
    "one row for the whole batch": lambda h: h[:1].expand_as(h),
}


@st.composite
def problems(draw, cell_type, longest=40):
    """A problem of any small size with any masks, memory layouts and choice of what is given."""
    B, T, D = draw(st.integers(1, 3)), draw(st.integers(1, longest)), draw(st.sampled_from([1, 2, 5, 17]))
    seed = draw(st.integers(0, 1000))
    arguments = problem(cell_type, B, T, D, seed=seed)
    for name in ("projected", "d_states"):
        arguments[name] = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](arguments[name])
    arguments["initial_state"] = STATE_LAYOUTS[draw(st.sampled_from(sorted(STATE_LAYOUTS)))](
        arguments["initial_state"]
    )
    if draw(st.booleans()):
        arguments["reset_state"] = None
    left_out = draw(st.sampled_from([None, "d_states", "d_final_state"]))
    if left_out:
        arguments[left_out] = None
    for name in ("reset_mask", "padding_mask"):
        share = draw(st.sampled_from([None, 0.0, 0.2, 0.7, 1.0]))
        arguments[name] = None if share is None else random_mask(B, T, seed=seed + len(name), share=share)
    return arguments


@every_exact_backend
@every_cell
def test_any_masks_strides_and_upstream_gradients_equal_the_oracle(cell_type, backend):
    @examples(backend)
    @given(problems(cell_type))
    def check(arguments):
        actual = outcome(functools.partial(minrnn_scan, backend=backend), **arguments)
        assert_close(actual, expected_outcome(**arguments))

    check()


# Precision


LONG = {"torch": 2**17, "numba": 2**17, "triton": 300}  # tokens
CHANNELS = 2  # of each kind of gates


def gates_by_regime(cell_type, B, T):
    """{name: logits of the gates (gates - 1, B, T, CHANNELS)}"""
    n = GATES[cell_type] - 1
    noise = normal(n, B, T, CHANNELS, seed=10)
    sign = random_mask(n, B, T, CHANNELS, seed=11, share=0.5) * 2.0 - 1
    # The log-odds of taking in the candidate go up with the only gate of minGRU, and with the second one of minLSTM.
    up = torch.tensor([1.0] if n == 1 else [-1.0, 1.0])[:, None, None, None]
    regimes = {
        "ordinary": noise,
        "forgetting": noise + 6 * up,
        "remembering": noise - 12 * up,  # for about 1e5 tokens
        "mixed": 20 * sign,
        "saturated": 100 * sign,
    }
    if cell_type == "minlstm":
        regimes["far below zero"] = noise - 1e4
    return regimes


@functools.lru_cache(1)
def long_problem_and_expected_outcome(cell_type, T):
    """A problem with CHANNELS channels of each regime, one with upstream gradients that cancel and one with a sum."""
    gates = torch.cat(list(gates_by_regime(cell_type, 1, T).values()), -1)
    D = gates.shape[-1]
    arguments = problem(cell_type, 1, T, D) | {"reset_state": None}
    arguments["projected"] = torch.cat([*gates, arguments["projected"][..., -D:]], -1)
    arguments["d_states"][..., ::CHANNELS] += 1
    return arguments, expected_outcome(**arguments)


@every_fused_backend
@every_cell
def test_errors_do_not_grow_with_the_sequence(cell_type, backend):
    """Worst measured: 6e-8 for "torch", 7e-7 for "numba" (the gradient of forget logits at 12)."""
    arguments, expected = long_problem_and_expected_outcome(cell_type, LONG[backend])
    actual = outcome(functools.partial(minrnn_scan, backend=backend), **arguments)
    for i, regime in enumerate(gates_by_regime(cell_type, 1, 1)):
        channels = slice(CHANNELS * i, CHANNELS * (i + 1))
        for name in actual:
            parts = GATES[cell_type] if name == "d_projected" else 1  # each by itself
            for part, (x, y) in enumerate(zip(actual[name].chunk(parts, -1), expected[name].chunk(parts, -1))):
                error = relative_error(x[..., channels], y[..., channels])
                assert error <= 3e-6, f"{regime} gates, {name} {part}: {error:.1e}"


@every_cell
def test_the_float32_loop_is_exact_while_memory_is_short(cell_type):
    """It steps in float32, where each step of a memory of n tokens adds a rounding error that n tokens keep."""
    arguments = problem(cell_type, 1, 500, 5)
    actual = outcome(functools.partial(minrnn_scan, backend="loop"), **arguments)
    assert_close(actual, expected_outcome(**arguments))


@pytest.mark.parametrize("backend", [*EXACT, "log"])
def test_minlstm_logits_far_below_zero_count_by_their_difference(backend):
    arguments = problem("minlstm", 2, 20, 4) | {"reset_state": None}
    arguments["initial_state"] = arguments["initial_state"].abs()
    arguments["projected"][..., :8] -= 1e4
    actual = outcome(functools.partial(minrnn_scan, backend=backend), **arguments)
    assert_close(actual, expected_outcome(**arguments), 3e-5 if backend == "log" else 3e-6)


@every_exact_backend
@every_cell
@pytest.mark.parametrize("T", [1, 5])
@torch.no_grad()
def test_a_gate_that_is_almost_shut_lets_in_its_share_to_all_digits(cell_type, backend, T):
    """1 - sigmoid(20) is zero in float32, sigmoid(-20) is not; visible where the state starts from zero."""
    projected = problem(cell_type, 2, T, 4)["projected"]
    projected[..., -8:-4] -= 20
    for actual, expected in zip(minrnn_scan(projected, cell_type, backend=backend), oracle.scan(projected, cell_type)):
        assert relative_error(actual, expected) <= 3e-6


@every_exact_backend
@every_cell
def test_the_slope_of_a_candidate_at_zero_is_one(cell_type, backend):
    arguments = problem(cell_type, 1, 3, 4)
    arguments["projected"] = torch.zeros_like(arguments["projected"])
    actual = outcome(functools.partial(minrnn_scan, backend=backend), **arguments)
    assert_close(actual, expected_outcome(**arguments))


@every_fused_backend
@every_cell
def test_the_gradient_of_a_state_that_all_tokens_return_to_is_exact(cell_type, backend):
    T = LONG[backend]
    arguments = problem(cell_type, 1, T, 1)
    arguments["d_states"] = torch.ones(1, T, 1)
    arguments["reset_mask"] = torch.ones(1, T, dtype=torch.bool)
    actual = outcome(functools.partial(minrnn_scan, backend=backend), **arguments)
    keep, _, _ = oracle.gates_and_candidate(arguments["projected"].double(), cell_type)
    expected = (keep * arguments["d_states"]).sum((0, 1)) + keep[0, -1] * arguments["d_final_state"][0]
    assert relative_error(actual["d_reset_state"], expected) <= 3e-6


# NaN and infinity


@every_exact_backend
@every_cell
def test_nan_goes_out_in_its_channel_from_its_time_on_and_nowhere_else(cell_type, backend):
    T, D, t, d = 60, 5, 37, 3
    clean = problem(cell_type, 2, T, D)
    scan = functools.partial(minrnn_scan, backend=backend)
    expected = outcome(scan, **clean)
    for part in range(GATES[cell_type]):
        projected = clean["projected"].clone()
        projected[1, t, part * D + d] = torch.nan
        actual = outcome(scan, **clean | {"projected": projected})
        is_nan = torch.zeros(2, T, D, dtype=torch.bool)
        is_nan[1, t:, d] = True
        assert torch.equal(actual["states"].isnan(), is_nan)
        assert torch.equal(actual["final_state"].isnan(), is_nan[:, -1])
        for name in ("d_projected", "d_initial_state"):  # earlier tokens of that channel may become NaN, others not
            others = torch.arange(D) != d
            kept = [x.unflatten(-1, (-1, D))[..., others] for x in (actual[name], expected[name])]
            torch.testing.assert_close(*kept)
            torch.testing.assert_close(actual[name][0], expected[name][0])


@pytest.mark.parametrize("backend", ["loop", "numba"])  # "torch" multiplies the past by zero: see the docstring
@every_cell
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_a_reset_ends_what_was_not_finite(cell_type, backend, value):
    projected = problem(cell_type, 1, 40, 2)["projected"]
    resets = torch.zeros(1, 40, dtype=torch.bool)
    resets[0, 20] = True
    projected[0, 10, -1] = value
    states, _ = minrnn_scan(projected, cell_type, reset_mask=resets, backend=backend)
    alone, _ = minrnn_scan(projected[:, 20:], cell_type, backend=backend)
    torch.testing.assert_close(states[:, 20:], alone)


@every_fused_backend
@every_cell
def test_what_a_padding_token_holds_reaches_no_state_and_no_gradient(cell_type, backend):
    arguments = problem(cell_type, 2, 30, 3) | {"padding_mask": random_mask(2, 30, seed=0, share=0.3)}
    scan = functools.partial(minrnn_scan, backend=backend)
    expected = outcome(scan, **arguments)
    arguments["projected"][arguments["padding_mask"]] = torch.nan
    actual = outcome(scan, **arguments)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


# Sequences: splits, documents, padding


def in_pieces(cuts, projected, initial_state=None, reset_mask=None, padding_mask=None, **more):
    """minrnn_scan of the pieces between the cuts, each from the final state of the one before."""
    states = []
    for start, stop in zip([0, *cuts], [*cuts, projected.shape[1]]):
        piece = slice(start, stop)
        masks = {name: None if m is None else m[:, piece] for name, m in
                 (("reset_mask", reset_mask), ("padding_mask", padding_mask))}  # fmt: skip
        piece_states, initial_state = minrnn_scan(
            projected=projected[:, piece], initial_state=initial_state, **masks, **more
        )
        states.append(piece_states)
    return torch.cat(states, 1), initial_state


@every_exact_backend
@every_cell
def test_splitting_a_sequence_anywhere_changes_nothing(cell_type, backend):
    @examples(backend)
    @given(problems(cell_type, 20 if backend == "triton" else 40), st.data())
    def check(arguments, data):
        T = arguments["projected"].shape[1]
        cuts = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=3))) if T > 1 else []
        one_shot = outcome(functools.partial(minrnn_scan, backend=backend), **arguments)
        pieces = outcome(functools.partial(in_pieces, cuts, backend=backend), **arguments)
        assert_close(pieces, one_shot, 1e-6)

    check()


@pytest.mark.oldest
@every_exact_backend
@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_state_handed_on_is_exact_in_half_precision(cell_type, backend, dtype):
    projected = problem(cell_type, 2, 60, 5, dtype)["projected"]
    one_shot = minrnn_scan(projected, cell_type, backend=backend)
    pieces = in_pieces(range(1, 60), projected, cell_type=cell_type, backend=backend)
    assert one_shot[1].dtype == torch.float32
    assert relative_error(pieces[1], one_shot[1]) <= 3e-6
    # A neighbour here and there. Triton's interpreter truncates to bfloat16, a GPU rounds.
    truncated = backend == "triton" and dtype == torch.bfloat16
    assert relative_error(pieces[0], one_shot[0]) <= (ROUNDING[dtype] if truncated else ROUNDING[dtype] / 10)


@every_exact_backend
@every_cell
def test_documents_in_one_row_equal_documents_by_themselves(cell_type, backend):
    lengths = [1, 13, 2, 1, 7]
    arguments = problem(cell_type, 2, sum(lengths), 5)
    arguments["reset_mask"] = torch.zeros(2, sum(lengths), dtype=torch.bool)
    arguments["reset_mask"][:, torch.tensor(lengths).cumsum(0)[:-1]] = True

    def by_themselves(projected, initial_state, reset_state, reset_mask, **more):
        states = []
        for document in projected.split(lengths, 1):
            document_states, final_state = minrnn_scan(projected=document, initial_state=initial_state, **more)
            states.append(document_states)
            initial_state = reset_state.expand_as(initial_state)
        return torch.cat(states, 1), final_state

    packed = outcome(functools.partial(minrnn_scan, backend=backend), **arguments)
    assert_close(packed, outcome(functools.partial(by_themselves, backend=backend), **arguments), 1e-6)


@every_exact_backend
@every_cell
def test_padding_anywhere_equals_the_sequence_without_it(cell_type, backend):
    @examples(backend)
    @given(st.lists(st.booleans(), min_size=1, max_size=40).filter(lambda row: not all(row)), st.integers(0, 100))
    def check(padding, seed):
        padding = torch.tensor([padding])
        arguments = problem(cell_type, 1, padding.shape[1], 3, seed=seed)
        padded = outcome(functools.partial(minrnn_scan, backend=backend, padding_mask=padding), **arguments)
        # Upstream gradients of a state that is shown again and again add up at the token that it comes from.
        shown_by = (~padding[0]).long().cumsum(0)
        upstream = torch.zeros(1 + shown_by[-1], 3).index_add(0, shown_by, arguments["d_states"][0])
        real = ~padding[0]
        compact = outcome(
            functools.partial(minrnn_scan, backend=backend),
            **arguments | {"projected": arguments["projected"][:, real], "d_states": upstream[None, 1:]},
        )
        states = torch.cat([arguments["initial_state"][:, None], compact["states"]], 1)
        d_projected = torch.zeros_like(padded["d_projected"])
        d_projected[:, real] = compact["d_projected"]
        compact |= {"states": states[:, shown_by], "d_projected": d_projected}
        compact["d_initial_state"] += upstream[:1]
        assert_close(padded, compact, 1e-6)

    check()


@every_exact_backend
@every_cell
def test_a_reset_on_a_padding_token_resets(cell_type, backend):
    arguments = problem(cell_type, 1, 10, 3)
    inputs = {name: arguments[name] for name in ("cell_type", "projected", "initial_state", "reset_state")}
    padding, resets = torch.zeros(2, 1, 10, dtype=torch.bool)
    padding[:, 4:6] = True
    resets[:, 4] = True
    states, _ = minrnn_scan(**inputs, reset_mask=resets, padding_mask=padding, backend=backend)
    after, _ = minrnn_scan(arguments["projected"][:, 6:], cell_type, arguments["reset_state"][None], backend=backend)
    torch.testing.assert_close(states[:, 4:6], arguments["reset_state"].expand(1, 2, 3))
    torch.testing.assert_close(states[:, 6:], after)


@pytest.mark.parametrize("backend", EXACT)
@every_cell
def test_states_stay_among_the_initial_state_and_the_candidates(cell_type, backend):
    @examples(backend)
    @given(st.integers(1, 60), st.integers(0, 1000), st.sampled_from([0.1, 1.0, 20.0, 1e4]))
    @torch.no_grad()
    def check(T, seed, scale):
        projected, initial_state = normal(1, T, GATES[cell_type] * 3, seed=seed) * scale, normal(1, 3, seed=seed + 1)
        states, _ = minrnn_scan(projected, cell_type, initial_state, backend=backend)
        _, _, candidate = oracle.gates_and_candidate(projected.double(), cell_type)
        seen = torch.cat([initial_state.double()[:, None], candidate], 1)
        slack = 1e-6 * seen.abs().cummax(1).values[:, 1:]
        assert (states >= seen.cummin(1).values[:, 1:] - slack).all()
        assert (states <= seen.cummax(1).values[:, 1:] + slack).all()

    check()


# Derivatives


@every_cell
def test_gradients_of_the_torch_backend_are_finite_differences(cell_type):
    arguments = problem(cell_type, 2, 9, 3, torch.float64)
    inputs = [arguments[name].requires_grad_() for name in ("projected", "initial_state", "reset_state")]
    masks = {"reset_mask": random_mask(2, 9, seed=0, share=0.3), "padding_mask": random_mask(2, 9, seed=1, share=0.3)}
    assert gradcheck(lambda p, h, r: minrnn_scan(p, cell_type, h, reset_state=r, **masks, backend="torch"), inputs)


@every_cell
def test_the_loop_has_second_derivatives(cell_type):
    arguments = problem(cell_type, 1, 4, 2, torch.float64)
    inputs = [arguments[name].requires_grad_() for name in ("projected", "initial_state", "reset_state")]
    resets = torch.tensor([[False, False, True, False]])
    assert gradgradcheck(
        lambda p, h, r: minrnn_scan(p, cell_type, h, reset_mask=resets, reset_state=r, backend="loop"), inputs
    )


@every_fused_backend
@every_cell
def test_a_second_derivative_is_refused_and_the_loop_recommended(cell_type, backend):
    projected = problem(cell_type, 1, 4, 2)["projected"].requires_grad_()
    states, _ = minrnn_scan(projected, cell_type, backend=backend)
    (gradient,) = torch.autograd.grad(states.sum(), projected, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated once; .* backend="loop"'):
        gradient.sum().backward()


@every_fused_backend
@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_inputs_and_the_states_are_saved_for_the_backward(cell_type, backend, dtype):
    B, T, D = 3, 50, 7
    wide = normal(B, T, 2 * GATES[cell_type] * D, seed=0, dtype=dtype)
    projected = wide.chunk(2, -1)[1].detach().requires_grad_()
    initial_state = normal(B, D, seed=1).requires_grad_()
    reset_mask = random_mask(B, T, seed=2, share=0.1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        states, _ = minrnn_scan(projected, cell_type, initial_state, reset_mask=reset_mask, backend=backend)
    addresses = {x.data_ptr(): x.nbytes for x in saved}
    assert {x.data_ptr() for x in (projected, states)} <= addresses.keys()  # themselves, not copies
    of_one_state = 4 * D  # what resets return to
    assert sum(addresses.values()) == sum(
        (projected.nbytes, states.nbytes, initial_state.nbytes, reset_mask.nbytes, of_one_state)
    )
    per_element = {("mingru", 4): 12, ("mingru", 2): 6, ("minlstm", 4): 16, ("minlstm", 2): 8}
    assert projected.nbytes + states.nbytes == per_element[cell_type, dtype.itemsize] * B * T * D


@every_fused_backend
@every_cell
def test_results_repeat_bit_by_bit(cell_type, backend):
    arguments = problem(cell_type, 2, 20, 33) | {"reset_mask": random_mask(2, 20, seed=0, share=0.1)}
    first, second = (outcome(functools.partial(minrnn_scan, backend=backend), **arguments) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_given_is_left_as_it_was(cell_type, dtype):
    arguments = problem(cell_type, 1, 9, 5, dtype)  # one sequence: it lies in memory as the scan wants it
    before = {name: x.clone() for name, x in arguments.items() if name != "cell_type"}
    outcome(functools.partial(minrnn_scan, backend="torch"), **arguments)
    for name in before:
        assert torch.equal(arguments[name], before[name]), name


# torch.library, torch.compile, torch.export


# The operators are the same whatever computes them: of the slow interpreter one layout is enough.
@pytest.mark.parametrize(
    "backend, layout",
    [(backend, layout) for backend in ("torch", "numba") for layout in sorted(STATE_LAYOUTS.keys() - {"none"})]
    + [("triton", "transposed")] * ("triton" in FUSED),
)
@every_cell
def test_the_operators_pass_opcheck(cell_type, backend, layout):
    B, T, D = 3, 6, 5
    arguments = problem(cell_type, B, T, D)
    projected = arguments["projected"].requires_grad_()
    initial_state = STATE_LAYOUTS[layout](arguments["initial_state"]).detach().requires_grad_()
    reset_state = arguments["reset_state"].requires_grad_()
    masks = random_mask(B, T, seed=0, share=0.3), None
    no_parameters = projected.new_empty(0)
    inputs = (projected, no_parameters, initial_state, reset_state, *masks, cell_type, backend)
    torch.library.opcheck(OPERATORS.scan.default, inputs)
    states, log_sums, _ = OPERATORS.scan(*inputs)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in (*inputs, states, log_sums)]
    d_final_state = STATE_LAYOUTS[layout](arguments["d_final_state"])
    upstream = arguments["d_states"], torch.zeros_like(log_sums), d_final_state
    torch.library.opcheck(OPERATORS.scan_backward.default, (*inputs, *upstream))


@every_fused_backend
@every_cell
def test_a_compiled_scan_is_one_graph_with_one_operator_and_equals_eager(cell_type, backend):
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    torch.compiler.reset()
    scan = functools.partial(minrnn_scan, backend=backend)
    compiled = torch.compile(scan, fullgraph=True, dynamic=True, backend=compiler)
    for B, T, D in ((2, 9, 5), (3, 13, 7), (4, 5, 8)):
        masks = {
            "reset_mask": random_mask(B, T, seed=0, share=0.2),
            "padding_mask": random_mask(B, T, seed=1, share=0.2),
        }
        arguments = problem(cell_type, B, T, D) | masks
        actual, expected = outcome(compiled, **arguments), outcome(scan, **arguments)
        for name in actual:
            assert torch.equal(actual[name], expected[name])
    assert len(graphs) == 1  # for all sizes
    assert [node.target for node in graphs[0].graph.nodes].count(OPERATORS.scan.default) == 1


class Scan(torch.nn.Module):
    def __init__(self, cell_type, backend):
        super().__init__()
        self.cell_type, self.backend = cell_type, backend

    def forward(self, projected, initial_state, reset_mask):
        return minrnn_scan(projected, self.cell_type, initial_state, reset_mask=reset_mask, backend=self.backend)


def named_operators(graph):
    """The namespaces of all operators in a graph."""
    return {node.target.namespace for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


@every_fused_backend
@every_cell
def test_an_exported_scan_takes_any_batch_and_time(cell_type, backend):
    scan = Scan(cell_type, backend)
    B, T = torch.export.Dim("B"), torch.export.Dim("T")
    sizes = {"projected": {0: B, 1: T}, "initial_state": {0: B}, "reset_mask": {0: B, 1: T}}

    def inputs(B, T):
        arguments = problem(cell_type, B, T, 5)
        return arguments["projected"], arguments["initial_state"], random_mask(B, T, seed=0, share=0.2)

    exported = torch.export.export(scan, inputs(3, 11), dynamic_shapes=sizes)
    assert NAMESPACE in named_operators(exported.graph)
    for B, T in ((2, 2), (5, 13)):
        for actual, expected in zip(exported.module()(*inputs(B, T)), scan(*inputs(B, T))):
            assert torch.equal(actual, expected)


@every_exact_backend
@every_cell
@torch.no_grad()
def test_one_token_without_a_gradient_is_plain_pointwise_torch(cell_type, backend):
    """So that a compiler can fuse it."""
    arguments = problem(cell_type, 2, 1, 5)
    inputs = arguments["projected"], arguments["initial_state"], random_mask(2, 1, seed=0, share=0.5)
    assert named_operators(make_fx(Scan(cell_type, backend))(*inputs).graph) == {"aten"}
    two_tokens = [torch.cat([x, x], 1) if x.dim() == 3 or x.dtype == torch.bool else x for x in inputs]
    fused = {NAMESPACE} if backend in FUSED else {"aten"}
    assert fused <= named_operators(make_fx(Scan(cell_type, backend))(*two_tokens).graph)


# Bad input


@pytest.mark.oldest
@pytest.mark.parametrize(
    "change, message",
    [
        ({"cell_type": "gru"}, r"cell_type must be one of \[.*'mingru', .*'minlstm', .*\], not 'gru'"),
        ({"backend": "cuda"}, r"backend must be one of \[.*'torch'.*\], not 'cuda'"),
        ({"projected": torch.zeros(2, 3, 5)}, r"projected must be \(B, T, 2 D\) .*not 5 wide"),
        ({"projected": torch.zeros(2, 3, 4), "cell_type": "minlstm"}, r"projected must be \(B, T, 3 D\) .*not 4 wide"),
        ({"projected": torch.zeros(3, 4)}, r"not \(3, 4\)"),
        ({"projected": torch.zeros(2, 3, 0)}, r"projected .*not 0 wide"),
        ({"projected": torch.zeros(2, 0, 4)}, r"T must be at least 1"),
        ({"projected": torch.zeros(2, 3, 4, dtype=torch.int64)}, r"floating-point .*torch.int64"),
        ({"projected": torch.zeros(2, 3, 4, dtype=torch.complex64)}, r"floating-point .*torch.complex64"),
        ({"initial_state": torch.zeros(2)}, r"initial_state must be \(2, 2\) .*not \(2,\)"),
        ({"initial_state": torch.zeros(1, 2)}, r"initial_state .*not \(1, 2\)"),
        ({"reset_state": torch.zeros(2, 2)}, r"reset_state must be \(2,\) .*not \(2, 2\)"),
        ({"reset_mask": torch.zeros(2, 3)}, r"reset_mask must be bool .*not torch.float32 \(2, 3\)"),
        ({"reset_mask": torch.zeros(2, 4, dtype=torch.bool)}, r"reset_mask .*= \(2, 3\), not torch.bool \(2, 4\)"),
        ({"padding_mask": torch.ones(2, 3, dtype=torch.int64)}, r"padding_mask must be bool .*torch.int64"),
        ({"padding_mask": torch.ones(3, dtype=torch.bool)}, r"padding_mask .*not torch.bool \(3,\)"),
        ({"backend": "log", "padding_mask": torch.ones(2, 3, dtype=torch.bool)}, r'"log" .*no padding_mask'),
        ({"backend": "log", "reset_mask": torch.ones(2, 3, dtype=torch.bool)}, r'"log" .*no reset_mask'),
        ({"backend": "numba", "projected": torch.zeros(2, 3, 4, dtype=torch.float64)}, r"not in torch.float64"),
    ],
)
def test_a_bad_argument_is_an_error_of_one_line_that_names_it(change, message):
    with pytest.raises(ValueError, match=message) as error:
        minrnn_scan(**{"projected": torch.zeros(2, 3, 4), "cell_type": "mingru"} | change)
    assert "\n" not in str(error.value)


@every_exact_backend
@every_cell
def test_an_empty_batch_has_an_empty_result(cell_type, backend):
    arguments = problem(cell_type, 0, 5, 3)
    actual = outcome(functools.partial(minrnn_scan, backend=backend), **arguments)
    assert actual["states"].shape == (0, 5, 3)
    assert actual["final_state"].shape == actual["d_initial_state"].shape == (0, 3)
    assert actual["d_projected"].shape == arguments["projected"].shape
    assert torch.equal(actual["d_reset_state"], torch.zeros(3))
