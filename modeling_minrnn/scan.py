"""The scan of a cell over a sequence: the contract, one step, and the step in a loop.

B batch, T time, D width of h, S numbers of state (`cells.py` has the recurrences). `minrnn_scan` and `linear_scan` are
the ways in. From here `operators.py` leads to the kernels, and `context_parallel.py` to a sequence over several
processes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import COMPILED, resolve_backend
from .cells import PRIMITIVES, Cell, advance, advance_log_sum, advance_matrix, cell_of
from .configuration_minrnn import BACKENDS
from .context_parallel import context_parallel_scan
from .dense_recurrence import dense_step
from .masks import NO_MASKS, Masks
from .operators import scan
from .scan_blocks import ScanInputs, ScanOutputs


def minrnn_scan(
    projected: Tensor,
    cell_type: str | Cell,
    initial_state: Tensor | None = None,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    reset_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """Solve the recurrence of a cell over a sequence, for minGRU h[t] = a[t] * h[t-1] + (1 - a[t]) * c[t].

        projected = torch.randn(8, 1024, 2 * 512)
        states, final_state = minrnn_scan(projected, "mingru")

    Args:
        projected: (B, T, width), as the cell says: [gate | x] for "mingru", (B, T, 2 D); float16, bfloat16, float32 or
            float64, T >= 1, any strides.
        cell_type: a name of `cells.CELLS`, or a cell with options such as `Aaren(heads=4)`.
        initial_state: (B, S), the state before the first token, as returned in `final_state`. None is `Cell.start`:
            zero, and where the cell has log-sums that nothing has been seen.
        parameters: the vectors of the cell, by `Cell.parameter_names`.
        reset_mask: (B, T) bool. True: the state before this token is `reset_state`, whatever came earlier (save that
            all but "loop" and "numba", which multiply the past by zero, let a NaN or an infinity pass).
        padding_mask: (B, T) bool. True: this token changes nothing; its output is the state as it stands, and of a
            matrix state zero.
        reset_state: (S,), what a reset returns to. None as for `initial_state`.
        backend: "auto" ("numba" for CPU tensors and "triton" for those of a GPU where it is installed, else "torch"),
            "torch" (any device), "numba" (CPU, not float64), "triton" (CUDA, ROCm or XPU, not float64),
            "triton_batch_invariant" (the same bits for a row whatever else is in the batch; slower where B * D is
            large enough to fill the device), "loop" (one step at a time) or "log" (the paper's listing, for minGRU and
            minLSTM: no masks, inexact on long sequences; for comparison).
        group: the processes that the sequence is spread over, in the order of their ranks; None for this one alone.
            Each passes its chunk, of any length, and the masks of this chunk; initial_state and final_state are those
            of the whole sequence. The loss is the sum of those of the ranks, to which final_state counts on the last
            alone; the gradients of what all ranks share are to be summed over the group. Not for "loop" and "log".

    Returns:
        outputs (B, T, D), h or what the cell reads out, in the dtype of `projected`; final_state (B, S), the state
        after the last token, in float32 (float64 for float64). Gates are computed in float32 or better and the state
        is carried in float64 ("triton": in two float32), so that errors do not grow with T; "loop", and with it a
        single step, carries it in float32. Differentiable in projected, parameters, initial_state and reset_state, by
        backward() once ("loop" and "log" as often as wanted), and by torch.func and in forward mode.

    Raises:
        ValueError: unknown cell type or backend, shapes or dtypes that do not fit, T == 0.
        ImportError: a backend that is not installed.
    """
    cell = cell_type if isinstance(cell_type, Cell) else cell_of(cell_type)
    masks = Masks(padding_mask, reset_mask)
    stacked = stack_parameters(cell, parameters or {}, projected)
    scanned = scan_states(projected, cell, initial_state, stacked, masks, reset_state, backend, group)
    return scanned.outputs, scanned.final_state


def linear_scan(
    log_decay: Tensor,
    inflow: Tensor,
    initial_state: Tensor | None = None,
    *,
    sign: Tensor | None = None,
    reset_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Solve h[t] = sign[t] * exp(log_decay[t]) * h[t-1] + inflow[t] over a sequence, real or complex.

        log_decay = torch.nn.functional.logsigmoid(torch.randn(8, 1024, 512))
        states, final_state = linear_scan(log_decay, torch.randn(8, 1024, 512))

    Args:
        log_decay: (B, T, D), real and <= 0, or complex with a real part <= 0: the imaginary part turns h. The decay
            itself would not do: rounded to float32, one near 1 is wrong by 1e-3 after 262,144 tokens.
        inflow: (B, T, D), complex where log_decay is.
        initial_state: (B, D); None is zero.
        sign: (B, T, D), +-1, for a real log_decay.
        reset_mask, padding_mask, reset_state (D,), backend: as in `minrnn_scan`; not "log".

    Returns:
        states (B, T, D) and final_state (B, D) as `minrnn_scan`; complex where inflow is. Differentiable as there, in
        log_decay, inflow, initial_state and reset_state.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown backend, T == 0.
    """
    if log_decay.shape != inflow.shape or log_decay.is_complex() != inflow.is_complex():
        raise ValueError(
            "log_decay and inflow must be (B, T, D), both real or both complex, not "
            f"{tuple(log_decay.shape)} {log_decay.dtype} and {tuple(inflow.shape)} {inflow.dtype}"
        )
    if sign is not None and (log_decay.is_complex() or sign.shape != inflow.shape):
        raise ValueError(
            "sign must have the shape of a real log_decay; a complex one has its turn in its imaginary part"
        )
    columns = [log_decay, inflow] if sign is None else [log_decay, sign.to(log_decay.dtype), inflow]
    states = [initial_state, reset_state]
    if is_complex := log_decay.is_complex():
        columns = [log_decay.real, log_decay.imag, inflow.real, inflow.imag]
        states = [None if x is None else torch.cat([x.real, x.imag], -1) for x in states]
    projected = torch.cat(columns, -1)
    cell = PRIMITIVES["linear:turned=phase" if is_complex else "linear" if sign is None else "linear:turned=sign"]
    masks = Masks(padding_mask, reset_mask)
    outputs, _, final_state = scan_states(
        projected, cell, states[0], projected.new_empty(0), masks, states[1], backend
    )
    if is_complex:
        return torch.complex(*outputs.chunk(2, -1)), torch.complex(*final_state.chunk(2, -1))
    return outputs, final_state


def scan_states(
    projected: Tensor,
    cell: Cell,
    initial_state: Tensor | None,
    parameters: Tensor,
    masks: Masks = NO_MASKS,
    reset_state: Tensor | None = None,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
    latest_states: int = 0,
) -> ScanOutputs:
    """`minrnn_scan` with all that it knows.

    parameters: of `stack_parameters`. latest_states: how many at the end `ScanOutputs.all_states` has to hold.
    """
    D = _check(projected, cell, initial_state, masks, reset_state, backend)
    if backend in COMPILED:  # refused here, even where a single step would not need it
        resolve_backend(backend, projected.device.type, projected.dtype)
    dtype = state_dtype(projected.dtype)
    start = cell.start(D, dtype, projected.device)
    initial_state = start.expand(projected.shape[0], -1) if initial_state is None else initial_state.to(dtype)
    reset_state = start if reset_state is None else reset_state.to(dtype)
    inputs = ScanInputs(projected, parameters, initial_state, reset_state, masks.reset, masks.padding, cell, backend)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs[:4])
    if backend == "log":
        return ScanOutputs(*_log_space(inputs, group))
    if group is not None:
        return ScanOutputs(*context_parallel_scan(inputs, group))
    # One token without a gradient: a handful of pointwise operations, which a compiler fuses with their surroundings.
    if backend == "loop" or (projected.shape[1] == 1 and not needs_gradient):
        return ScanOutputs(*step_loop(inputs))
    if latest_states and cell.has_matrices:
        return _step_at_the_end(inputs, latest_states)
    return ScanOutputs(*scan(inputs))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a state keeps between calls: float32, or float64 where the model itself is in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stack_parameters(cell: Cell, parameters: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """(P, channels), the vectors of a cell as a scan of `like` (B, T, width) takes them; (0,) where it has none."""
    if set(parameters) != set(cell.parameter_names):
        raise ValueError(f"the parameters of {cell.name!r} are {list(cell.parameter_names)}, not {list(parameters)}")
    if not parameters:
        return like.new_empty(0)
    shape = (cell.parameter_channels(cell.state_width(like.shape[-1])),)
    for name, parameter in parameters.items():
        if parameter.shape != shape:
            raise ValueError(f"{name!r} must be {shape} for {cell.name!r}, not {tuple(parameter.shape)}")
    return torch.stack([parameters[name] for name in cell.parameter_names]).to(state_dtype(like.dtype))


def _check(projected, cell, initial_state, masks, reset_state, backend) -> int:
    """Raise ValueError for arguments that do not fit together; return D."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, not {backend!r}")
    if projected.dim() != 3:
        raise ValueError(f"projected must be (B, T, width), not {tuple(projected.shape)}")
    if not projected.is_floating_point():
        raise ValueError(f"projected must be a floating-point tensor, not {projected.dtype}")
    B, T, width = projected.shape
    D = cell.state_width(width)
    S = cell.state_numbers(D)
    if T == 0:
        raise ValueError("projected has no tokens: T must be at least 1")
    for name, state, shape in (("initial_state", initial_state, (B, S)), ("reset_state", reset_state, (S,))):
        if state is not None and state.shape != shape:
            raise ValueError(f"{name} must be {shape} for {cell.name!r}, not {tuple(state.shape)}")
    for name, mask in (("reset_mask", masks.reset), ("padding_mask", masks.padding)):
        if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
            raise ValueError(f"{name} must be bool (B, T) = {(B, T)}, not {mask.dtype} {tuple(mask.shape)}")
    return D


# One step, and the step in a loop.


def step_loop(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`operators.scan` as it is written, one token at a time; differentiated by autograd."""
    cell, D, parameters = inputs.cell, inputs.D, inputs.parameters
    state, states, outputs = inputs.initial_state, [], []
    for t, token in enumerate(inputs.tokens().unbind(1)):
        if inputs.reset_mask is not None:
            state = torch.where(inputs.reset_mask[:, t, None], inputs.reset_state, state)
        new, output = _step(cell, D, token, parameters, state)
        if inputs.padding_mask is not None:
            padding = inputs.padding_mask[:, t, None]
            new = torch.where(padding, state, new)
            output = torch.where(padding, 0 if cell.has_matrices else state[:, :D], output)
        state = new
        states.append(state)
        outputs.append(output)
    rest = torch.stack(states, 1)[..., 0 if cell.reads_out or cell.has_matrices else D :]
    return torch.stack(outputs, 1).to(inputs.projected.dtype), rest, state


def _step_at_the_end(inputs: ScanInputs, count: int) -> ScanOutputs:
    """By `step_loop` in the latest `count` tokens, and before them as in any scan."""
    T = inputs.projected.shape[1]
    if count >= T:
        return ScanOutputs(*step_loop(inputs))

    def part(tokens: slice) -> ScanInputs:
        reset, padding = (None if mask is None else mask[:, tokens] for mask in inputs[4:6])
        return inputs._replace(projected=inputs.projected[:, tokens], reset_mask=reset, padding_mask=padding)

    outputs, _, state = scan(part(slice(T - count)))
    stepped, rest, state = step_loop(part(slice(T - count, T))._replace(initial_state=state))
    return ScanOutputs(torch.cat([outputs, stepped], 1), rest, state)


def _step(cell: Cell, D: int, token: Tensor, parameters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state (B, S) after a token (B, width), and the output (B, D)."""
    if cell.system is not None:
        A, B = (torch.from_numpy(x).to(token) for x in cell.system)
        h = dense_step(A, B, token, state)
        return h, h
    if cell.has_matrices:
        return advance_matrix(cell.gates(token, parameters, token[:, :0]), state)
    h, L = state.tensor_split([D], -1)
    h = new = advance(cell.gates(token, parameters, L), h)
    if L.shape[-1]:
        new = torch.cat([h, advance_log_sum(cell.log_sum_gates(token, parameters), L)], -1)
    return new, cell.read_out(token, parameters, state) if cell.reads_out else h


def _log_space(inputs: ScanInputs, group) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's parallel_scan_log (appendix B): log a summed up, and logcumsumexp of log b less that sum."""
    if inputs.reset_mask is not None or inputs.padding_mask is not None or group is not None:
        raise ValueError('the "log" backend takes no reset_mask, no padding_mask and no group; use "torch"')
    if inputs.cell.spec not in ("mingru", "minlstm"):
        raise ValueError(
            f'the "log" backend is the listing of minGRU and minLSTM, not of {inputs.cell.name!r}; use "torch"'
        )
    projected = inputs.tokens()
    odds, x = inputs.cell.gates(projected, inputs.parameters, projected)[0], projected[..., -inputs.D :]
    log_a = (-F.softplus(odds)).cumsum(1)
    log_b = -F.softplus(-odds) + torch.where(x >= 0, (F.relu(x) + 0.5).log(), -F.softplus(-x))
    start = inputs.initial_state.log()[:, None]  # -inf for a state of zero; not a number for a negative one
    states = (log_a + torch.cat([start, log_b - log_a], 1).logcumsumexp(1)[:, 1:]).exp()
    return states.to(inputs.projected.dtype), states[..., :0], states[:, -1]
