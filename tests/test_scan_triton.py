"""The GPU kernels by Triton's interpreter, and their choice. tests/test_scan.py holds them to the contract, and
tests/test_machine_code.py looks at what they compile to; what runs on a GPU is checked by benchmarks/gpu.py."""

import sys
import warnings

import numpy as np
import oracle
import pytest
import torch
from cases import CASES, oracle_arguments, outcome, problem
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import normal, random_mask, relative_error

from modeling_minrnn import backends, cells
from modeling_minrnn.scan import minrnn_scan

scan_triton = pytest.importorskip("modeling_minrnn.scan_triton", exc_type=ImportError)
BACKWARD_TILES, FORWARD_TILES, MIN_TILES = scan_triton.BACKWARD_TILES, scan_triton.FORWARD_TILES, scan_triton.MIN_TILES
Plan, plan = scan_triton.Plan, scan_triton.plan
# Of the interpreter of triton 3.6, the oldest supported.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def of_cells(*specs):
    return pytest.mark.parametrize("cell", [CASES[spec] for spec in specs], ids=specs)


every_cell = of_cells("mingru", "minlstm", "mingru_signed")  # tests/test_cells.py has the linear candidate too


@pytest.fixture(autouse=True)
def infinite_exponentials():
    """Of numpy, in which the interpreter computes: it warns of them."""
    with np.errstate(over="ignore"):
        yield


def assert_equal_to_oracle(cell, B, T, D, shift=0.0, initial=0.0, dtype=torch.float32, tolerance=3e-6, **masks):
    """Outputs and every gradient. shift, initial: added to the log-odds of the candidate, and to the initial state."""
    arguments = problem(cell, B, T, D, dtype) | masks
    arguments["initial_state"] += initial
    gates = arguments["projected"].split(D, -1)[:-1]
    if cell.name == "mingru_signed":  # of either sign, and the input's gate opens as far
        sign = random_mask(B, T, D, seed=9, share=0.5) * 2 - 1
        gates[0].copy_(sign * torch.atanh(torch.sigmoid(-gates[0].double() - shift)))
        gates[1].add_(shift)
    elif cell.name == "minlstm":
        gates[0].sub_(shift / 2)
        gates[1].add_(shift / 2)
    else:
        gates[0].add_(shift)
    exact = {name: x.double() if name not in ("parameters", *masks) else x for name, x in arguments.items()}

    def by_triton(parameters, **more):
        return minrnn_scan(cell_type=cell, backend="triton", **more)

    def by_oracle(parameters, **more):
        return oracle.scan(**more, **oracle_arguments(cell))

    actual, expected = outcome(by_triton, **arguments), outcome(by_oracle, **exact)
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= tolerance, name


# Tiles and segments


@every_cell
@pytest.mark.parametrize("T, D", [(130, 32), (34, 33), (65, 5)])
def test_the_tiles_of_a_gpu_equal_the_oracle(cell, T, D):
    """Full tiles and a ragged one, of the large tiles and of the small; a ragged channel."""
    assert_equal_to_oracle(cell, 1, T, D)


@every_cell
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1.5e-3), (torch.bfloat16, 6e-3)])
def test_the_tiles_of_a_gpu_with_masks_in_half_precision_equal_the_oracle(cell, dtype, tolerance):
    masks = dict(reset_mask=random_mask(2, 70, seed=0, share=0.05), padding_mask=random_mask(2, 70, seed=1, share=0.1))
    assert_equal_to_oracle(cell, 2, 70, 5, dtype=dtype, tolerance=tolerance, **masks)


FEW = (2, 4, 16, 1)


@pytest.fixture
def many_segments(monkeypatch):
    """Segments of 24 and 12 tokens, in tiles of 8 and 4."""
    monkeypatch.setattr(scan_triton, "FORWARD_TILES", [FEW] * 2)
    monkeypatch.setattr(scan_triton, "BACKWARD_TILES", [(2, 2, 16, 1)] * 2)
    monkeypatch.setattr(scan_triton, "MIN_TILES", 2)
    monkeypatch.setattr(scan_triton, "processors", lambda device: 100)


@every_cell
@pytest.mark.parametrize(
    "shift, masked",
    [(-12.0, True), (0.0, True), (12.0, False)],
    ids=["remembering-masked", "ordinary-masked", "forgetting"],
)
def test_segments_equal_the_oracle(cell, shift, masked, many_segments):
    """Also where the product of a segment underflows, so that only a part of it is read."""
    T = 53
    assert plan(2, T, 3, FEW, 100).segments == 3
    masks = {}
    if masked:
        masks = dict(
            reset_mask=random_mask(2, T, seed=0, share=0.1), padding_mask=random_mask(2, T, seed=1, share=0.2)
        )
    assert_equal_to_oracle(cell, 2, T, 3, shift=shift, **masks)


@of_cells("mingru", "mingru_signed")
def test_a_state_survives_gates_that_let_nothing_in(cell, monkeypatch):
    """|a| = 1 - 3e-9, which float32 cannot tell from 1, and what a tile of 8 tokens changes is below the last digit of
    the state; yet 1024 tokens forget 2e-6 of it. The worst error is 6e-7, of a gradient."""
    monkeypatch.setattr(scan_triton, "FORWARD_TILES", [(4, 2, 16, 1)] * 2)
    monkeypatch.setattr(scan_triton, "BACKWARD_TILES", [(4, 2, 16, 1)] * 2)
    monkeypatch.setattr(scan_triton, "MIN_TILES", 1000)  # one segment
    assert_equal_to_oracle(cell, 1, 1024, 2, shift=-20.0, initial=12.0, tolerance=1e-6)


@of_cells("minlstm", "mingru_signed")
def test_rows_do_not_depend_on_their_batch_where_that_is_asked_for(cell, many_segments, monkeypatch):
    """Bit by bit, where the plan for the batch is another one, and where masks mean other tiles."""
    T, D = 53, 3
    monkeypatch.setattr(scan_triton, "processors", lambda device: 1)
    monkeypatch.setattr(scan_triton, "FORWARD_TILES", [FEW, (4, 2, 16, 1)])
    assert plan(1, T, D, FEW, 1) != plan(3, T, D, FEW, 1)
    projected = problem(cell, 3, T, D)["projected"]
    padding = torch.zeros(3, T, dtype=torch.bool)
    padding[0, 20:] = True
    results = []
    for rows, mask in ((slice(0, 3), None), (slice(0, 3), padding), (slice(1, 2), None)):
        x = projected[rows].clone().requires_grad_()
        states, final_state = minrnn_scan(x, cell, padding_mask=mask, backend="triton_batch_invariant")
        states.sum().backward()
        row = 1 if len(x) == 3 else 0
        results.append([tensor[row] for tensor in (states.detach(), final_state.detach(), x.grad)])
    for in_a_batch, beside_padding, alone in zip(*results):
        assert torch.equal(in_a_batch, alone)
        assert torch.equal(beside_padding, alone)


@torch.no_grad()
def test_offsets_beyond_32_bits():
    """A batch whose second row begins 2 ** 31 elements after the first; no byte between them is touched."""
    row = normal(2, 5, 9, seed=0).to(torch.bfloat16)
    memory = torch.empty(2**31 + row.numel(), dtype=torch.bfloat16)
    apart = memory.as_strided(row.shape, (2**31, *row.stride()[1:])).copy_(row)
    for actual, expected in zip(*(minrnn_scan(x, "minlstm", backend="triton") for x in (apart, row))):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("cell_type", ["mingru", "hgrn"])
def test_an_empty_batch_is_empty(cell_type):
    """By a kernel of its own, and by `solve`."""
    cell = cells.cell_of(cell_type)
    parameters = {name: torch.zeros(3) for name in cell.parameter_names}
    x = torch.zeros(0, 7, 6, requires_grad=True)
    states, final_state = minrnn_scan(x, cell, parameters=parameters, backend="triton")
    states.sum().backward()
    assert (states.shape, final_state.shape, x.grad.shape) == ((0, 7, 3), (0, 3), (0, 7, 6))


def test_every_kernel_is_given_exactly_what_it_takes(many_segments, monkeypatch):
    """A compiled kernel refuses other names; the interpreter ignores them."""
    seen = {}

    class Recorder:
        def __init__(self, name):
            self.name, self.takes = name, set(getattr(scan_triton, name).arg_names)

        def __getitem__(self, grid):
            return lambda **given: seen.setdefault(self.name, []).append((set(given), self.takes))

    for name in ("reduce_kernel", "forward_kernel", "backward_kernel"):
        monkeypatch.setattr(scan_triton, name, Recorder(name))
    states, _ = minrnn_scan(torch.zeros(2, 53, 6, requires_grad=True), "mingru", backend="triton")
    states.sum().backward()
    assert {name: len(calls) for name, calls in seen.items()} == dict(
        reduce_kernel=2, forward_kernel=1, backward_kernel=1
    )
    for calls in seen.values():
        for given_names, takes in calls:
            assert given_names == takes | set(scan_triton.compile_options(1, nvidia=False))


# The plan

H200 = 132  # multiprocessors
TILE = FORWARD_TILES[0]


@pytest.mark.parametrize(
    "B, T, D, expected",
    [
        (8, 2048, 1024, Plan(*TILE, segments=4, length=512)),
        (1, 65536, 1024, Plan(*TILE, segments=32, length=2048)),
        (64, 512, 512, Plan(*TILE, segments=1, length=512)),
        (16, 4096, 2048, Plan(*TILE, segments=1, length=4096)),
        (1024, 4096, 2048, Plan(*TILE, segments=1, length=4096)),
        (1, 1, 1, Plan(2, 16, 1, 2, segments=1, length=32)),
        (1, 1_048_576, 768, Plan(*TILE, segments=44, length=23872)),
    ],
)
def test_the_plan_for_an_h200(B, T, D, expected):
    assert plan(B, T, D, TILE, H200) == expected


@given(
    B=st.integers(1, 100),
    T=st.integers(1, 100_000),
    D=st.integers(1, 5000),
    tile=st.sampled_from(FORWARD_TILES + BACKWARD_TILES),
    processors=st.integers(1, 200),
)
@example(B=1, T=1, D=1, tile=TILE, processors=1)
def test_every_plan_covers_every_token_and_channel_once(B, T, D, tile, processors):
    layout = plan(B, T, D, tile, processors)
    tokens = [min(layout.length, T - segment * layout.length) for segment in range(layout.segments)]
    assert min(tokens) > 0 and sum(tokens) == T
    assert layout.length % (layout.W * layout.U) == 0  # only the last segment has a ragged tile
    assert layout.segments == 1 or layout.length >= MIN_TILES * layout.W * layout.U
    assert layout.BD & (layout.BD - 1) == layout.W & (layout.W - 1) == 0  # Triton's blocks are powers of two
    assert layout.W <= tile[0] and layout.BD <= tile[2]


# The choice of the backend


def test_auto_takes_triton_on_every_gpu_and_leaves_float64_and_other_devices_to_torch():
    for device in ("cuda", "xpu"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert backends.resolve_backend("auto", device, dtype) == "triton"
        assert backends.resolve_backend("auto", device, torch.float64) == "torch"
    assert backends.resolve_backend("auto", "mps", torch.float32) == "torch"


@pytest.fixture
def without_triton(monkeypatch, forgotten_backends):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "modeling_minrnn.scan_triton")


@pytest.mark.oldest
def test_auto_on_a_gpu_without_triton_is_torch_with_one_warning(without_triton):
    with pytest.warns(UserWarning, match='pip install triton; "auto" falls back to "torch"') as caught:
        for _ in range(3):
            assert backends.resolve_backend("auto", "cuda", torch.bfloat16) == "torch"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.resolve_backend("auto", "mps", torch.float32)


@pytest.mark.oldest
@pytest.mark.parametrize("T", [1, 5])
def test_asking_for_an_absent_triton_says_what_to_install(without_triton, T):
    with pytest.raises(ImportError, match='"triton" .* pip install triton'):
        minrnn_scan(torch.zeros(1, T, 4), "mingru", backend="triton")


@pytest.mark.oldest
@pytest.mark.parametrize("backend", ["triton", "triton_batch_invariant"])
def test_triton_refuses_cpu_tensors_and_float64(backend, monkeypatch, forgotten_backends):
    with pytest.raises(ValueError, match=f"'{backend}' backend .* not in torch.float64 .*; use \"torch\""):
        minrnn_scan(torch.zeros(1, 5, 4, dtype=torch.float64), "mingru", backend=backend)
    monkeypatch.setattr(scan_triton, "INTERPRETED", False)
    backends.kernels.cache_clear()
    with pytest.raises(ValueError, match="on cuda or xpu, not in torch.float32 on 'cpu'"):
        minrnn_scan(torch.zeros(1, 5, 4), "mingru", backend=backend)
