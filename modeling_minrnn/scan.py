"""The minimal recurrences of "Were RNNs All We Needed?" (arXiv 2410.01201): one contract, several implementations.

B batch, T time, D state width. Both cells are h[t] = a[t] * h[t-1] + (1 - a[t]) * c[t] with a[t] in (0, 1) that
depends on the input alone: a linear recurrence, which a scan solves over all T at once. `minrnn_scan` is the only way
in. In this file, from top to bottom: the contract, one step, the step in a loop (the oracle), the paper's log-space
listing (for comparison), and the portable "torch" implementation with its own backward. "numba" is in `scan_numba.py`,
"triton" in `scan_triton.py`; a sequence over several processes is put together in `context_parallel.py`.
"""

import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = {"mingru": 2, "minlstm": 3}  # columns of `projected` for each column of state
BACKENDS = ("auto", "loop", "torch", "numba", "triton", "triton_batch_invariant", "log")


def minrnn_scan(
    projected: Tensor,
    cell_type: str,
    initial_state: Tensor | None = None,
    *,
    reset_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    backend: str = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """Solve h[t] = a[t] * h[t-1] + (1 - a[t]) * c[t] over a sequence.

    "mingru":  projected = [gate | candidate],            a = sigmoid(-gate)
    "minlstm": projected = [forget | input | candidate],  a = f / (f + i), f = sigmoid(forget), i = sigmoid(input)
    c = g(candidate), g(x) = x + 0.5 where x >= 0 and sigmoid(x) elsewhere (arXiv 2410.01201, appendix B).

    Args:
        projected: (B, T, 2 D) for "mingru", (B, T, 3 D) for "minlstm"; float16, bfloat16, float32 or float64, T >= 1,
            any strides.
        cell_type: "mingru" or "minlstm".
        initial_state: (B, D), h before the first token: a state, as returned in `final_state`, never passed through g.
            None is zero.
        reset_mask: (B, T) bool. True: the state before this token is `reset_state`, whatever came earlier (save that
            "torch" and "triton", which multiply the past by zero, let a NaN or an infinity pass).
        padding_mask: (B, T) bool. True: this token changes nothing; its output is the state as it stands.
        reset_state: (D,), what a reset returns to. None is zero.
        backend: "auto" ("numba" for CPU tensors and "triton" for those of a GPU where it is installed, else "torch"),
            "torch" (any device), "numba" (CPU, not float64), "triton" (CUDA, ROCm or XPU, not float64),
            "triton_batch_invariant" (the same bits for a row whatever else is in the batch; slower where B * D is
            large enough to fill the device), "loop" (one step at a time) or "log" (the paper's listing: no masks,
            inexact on long sequences; for comparison).
        group: the processes that the sequence is spread over, in the order of their ranks; None for this one alone.
            Each passes its chunk, of any length, and the masks of this chunk; initial_state and final_state are those
            of the whole sequence. The loss is the sum of those of the ranks, to which final_state counts on the last
            alone; the gradients of what all ranks share are to be summed over the group. Not for "loop" and "log".

    Returns:
        states (B, T, D) in the dtype of `projected`; final_state (B, D), the state after the last token, in float32
        (float64 for float64). Gates are computed in float32 or better and the state is carried in float64 ("triton":
        in two float32), so that errors do not grow with T; "loop", and with it a single step, carries it in float32.
        Differentiable in projected, initial_state and reset_state, once ("loop" and "log" as often as wanted).

    Raises:
        ValueError: unknown cell type or backend, shapes or dtypes that do not fit, T == 0.
        ImportError: a backend that is not installed.
    """
    D = _check(projected, cell_type, initial_state, reset_mask, padding_mask, reset_state, backend)
    if backend in KERNELS:  # refused here, even where a single step would not need it
        resolve_backend(backend, projected.device.type, projected.dtype)
    dtype = state_dtype(projected.dtype)
    if initial_state is None:
        initial_state = projected.new_zeros((projected.shape[0], D), dtype=dtype)
    initial_state = initial_state.to(dtype)
    if reset_state is None:
        reset_state = projected.new_zeros((D,), dtype=dtype)
    reset_state = reset_state.to(dtype)

    if backend == "log":
        if reset_mask is not None or padding_mask is not None or group is not None:
            raise ValueError('the "log" backend takes no reset_mask, no padding_mask and no group; use "torch"')
        return _log_space(projected, cell_type, initial_state)
    if group is not None:
        if backend == "loop":
            raise ValueError('the "loop" backend reads a sequence in one process; use "torch" with a group')
        from .context_parallel import ContextParallelScan

        return ContextParallelScan.apply(
            projected, cell_type, initial_state, reset_state, reset_mask, padding_mask, backend, group
        )
    needs_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (projected, initial_state, reset_state)
    )
    # One token without a gradient: a handful of pointwise operations, which a compiler fuses with their surroundings.
    if backend == "loop" or (projected.shape[1] == 1 and not needs_gradient):
        return _loop(projected, cell_type, initial_state, reset_state, reset_mask, padding_mask)
    return _scan(projected, cell_type, initial_state, reset_state, reset_mask, padding_mask, backend)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a state keeps between calls: float32, or float64 where the model itself is in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(projected, cell_type, initial_state, reset_mask, padding_mask, reset_state, backend) -> int:
    """Raise ValueError for arguments that do not fit together; return D."""
    if cell_type not in GATES:
        raise ValueError(f"cell_type must be one of {sorted(GATES)}, not {cell_type!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, not {backend!r}")
    gates = GATES[cell_type]
    if projected.dim() != 3 or projected.shape[2] % gates or projected.shape[2] == 0:
        raise ValueError(f"projected must be (B, T, {gates} D) for {cell_type!r}, not {tuple(projected.shape)}")
    if not projected.is_floating_point():
        raise ValueError(f"projected must be a floating-point tensor, not {projected.dtype}")
    B, T, D = projected.shape[0], projected.shape[1], projected.shape[2] // gates
    if T == 0:
        raise ValueError("projected has no tokens: T must be at least 1")
    if initial_state is not None and initial_state.shape != (B, D):
        raise ValueError(f"initial_state must be (B, D) = {(B, D)}, not {tuple(initial_state.shape)}")
    if reset_state is not None and reset_state.shape != (D,):
        raise ValueError(f"reset_state must be (D,) = {(D,)}, not {tuple(reset_state.shape)}")
    for name, mask in (("reset_mask", reset_mask), ("padding_mask", padding_mask)):
        if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
            raise ValueError(f"{name} must be bool (B, T) = {(B, T)}, not {mask.dtype} {tuple(mask.shape)}")
    return D


# The gates, and the recurrence one step at a time.


def _gates(projected: Tensor, cell_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """(a, 1 - a, c). Either share is computed by itself: 1 - sigmoid(k) would lose the digits of a small one."""
    *gates, x = projected.chunk(GATES[cell_type], -1)
    if cell_type == "mingru":
        a, z = torch.sigmoid(-gates[0]), torch.sigmoid(gates[0])
    else:
        # Far below zero f / (f + i) depends on the difference of the two logits alone; moved up together, they do not
        # underflow to 0 / 0.
        shift = (torch.maximum(*gates) + 30).clamp(max=0)
        f, i = (torch.sigmoid(gate - shift) for gate in gates)
        total = f + i
        a, z = f / total, i / total
    positive = x.clamp(min=0)  # its derivative at 0 is 1, and so is that of the sum
    return a, z, torch.sigmoid(x - positive) + positive


def log_odds(gates: Sequence[Tensor]) -> Tensor:
    """log((1 - a) / a), of the gate of "mingru" or the forget and input gates of "minlstm"; log a = -softplus(it)."""
    return gates[0] if len(gates) == 1 else F.softplus(-gates[0]) - F.softplus(-gates[1])


def _loop(projected, cell_type, initial_state, reset_state, reset_mask, padding_mask) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, one token at a time; differentiated by autograd."""
    a, z, c = _gates(projected.to(initial_state.dtype), cell_type)
    state, states = initial_state, []
    for t, (a_t, z_t, c_t) in enumerate(zip(a.unbind(1), z.unbind(1), c.unbind(1))):
        if reset_mask is not None:
            state = torch.where(reset_mask[:, t, None], reset_state, state)
        # From the nearer end by the smaller share: in float32 a * h + z * c would drift where a rounds to 1.
        new = torch.where(a_t > z_t, torch.lerp(state, c_t, z_t), torch.lerp(c_t, state, a_t))
        state = new if padding_mask is None else torch.where(padding_mask[:, t, None], state, new)
        states.append(state)
    return torch.stack(states, 1).to(projected.dtype), state


def _log_space(projected, cell_type, initial_state) -> tuple[Tensor, Tensor]:
    """The paper's parallel_scan_log (appendix B): log a summed up, and logcumsumexp of log b less that sum."""
    *gates, x = projected.to(initial_state.dtype).chunk(GATES[cell_type], -1)
    odds = log_odds(gates)
    log_a = (-F.softplus(odds)).cumsum(1)
    log_b = -F.softplus(-odds) + torch.where(x >= 0, (F.relu(x) + 0.5).log(), -F.softplus(-x))
    start = initial_state.log()[:, None]  # -inf for a state of zero; not a number for a negative one
    states = (log_a + torch.cat([start, log_b - log_a], 1).logcumsumexp(1)[:, 1:]).exp()
    return states.to(projected.dtype), states[:, -1]


# "torch": blocks of time that stay in cache; in a block the gates are pointwise and the recurrence is a short loop.

BLOCK_ELEMENTS = {"cpu": 65536}  # of state in a block: with 1 MiB of L2 a core the fastest of 2^13 to 2^17
BLOCK_ELEMENTS_ACCELERATOR = 1 << 22  # enough for a launch to be worth its latency


def _blocks(T: int, rows: int, device: torch.device) -> list[tuple[int, int]]:
    """Consecutive (start, stop) of time that cover T, each about BLOCK_ELEMENTS of the `rows` = B * D channels."""
    length = max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS_ACCELERATOR) // max(1, rows))
    return [(start, min(start + length, T)) for start in range(0, T, length)]


def _linear_scan_(a: Tensor, b: Tensor, carry: Tensor, reverse: bool = False) -> Tensor:
    """Solve h[i] = a[i] * h[i-1] + b[i] in place of b (n, B, D), h[-1] = carry (B, D); return the last h. Spends a.

    reverse: from the last row to the first. A long block is cut into chunks of `length` rows that are solved side by
    side from zero, with their products of a; then each is corrected by the state that it should have started from:
    2 * length + n / length calls instead of n.
    """
    n = len(b)
    length = math.isqrt(n // 2)
    whole = n - n % length if length >= 4 else 0  # rows in chunks; the others are walked one by one
    if whole:
        part = slice(n - whole, n) if reverse else slice(0, whole)
        a_chunks, b_chunks = (x[part].unflatten(0, (-1, length)) for x in (a, b))
        a_rows, b_rows = a_chunks.unbind(1), b_chunks.unbind(1)
        if reverse:
            a_rows, b_rows = a_rows[::-1], b_rows[::-1]
        for i in range(1, length):
            b_rows[i].addcmul_(a_rows[i], b_rows[i - 1])
            a_rows[i].mul_(a_rows[i - 1])
        starts = torch.empty_like(b_rows[0])
        order = range(len(starts))
        for chunk in reversed(order) if reverse else order:
            starts[chunk] = carry
            carry = torch.addcmul(b_rows[-1][chunk], a_rows[-1][chunk], carry)
        b_chunks.addcmul_(a_chunks, starts[:, None])
        rest = slice(0, n - whole) if reverse else slice(whole, n)
        a, b = a[rest], b[rest]
    a_rows, b_rows = a.unbind(0), b.unbind(0)
    for a_row, b_row in zip(a_rows[::-1], b_rows[::-1]) if reverse else zip(a_rows, b_rows):
        carry = b_row.addcmul_(a_row, carry)
    return carry


def _carry_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _time_major(x: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """(stop - start, B, D) of x (B, T, D), a copy that may be written to."""
    return x[:, start:stop].transpose(0, 1).to(dtype, memory_format=torch.contiguous_format, copy=True)


def _share_of_past(a: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """a in the dtype of the carry: 1 - z where z is the smaller, as float32 rounds an a near 1 and powers drift."""
    from_half = z.clamp(max=0.5).to(dtype).sub_(0.5)  # 0 where a is the smaller
    return from_half.neg_().add_(a.clamp(max=0.5))


def torch_forward(projected, cell_type, initial_state, reset_state, reset_mask, padding_mask):
    """(states, final_state) of `minrnn_scan`, for initial_state (B, D) and reset_state (D,)."""
    B, T, _ = projected.shape
    D = initial_state.shape[-1]
    dtype = _carry_dtype(projected.device)
    states = projected.new_empty(B, T, D)
    carry = initial_state.to(dtype)
    for start, stop in _blocks(T, B * D, projected.device):
        share, z, c = _gates(_time_major(projected, start, stop, initial_state.dtype), cell_type)
        a = _share_of_past(share, z, dtype)
        b = z.mul_(c).to(dtype)
        if padding_mask is not None:
            padding = _time_major(padding_mask, start, stop, torch.bool)[..., None]
            a.masked_fill_(padding, 1)
            b.masked_fill_(padding, 0)
        if reset_mask is not None:
            reset = _time_major(reset_mask, start, stop, torch.bool)[..., None]
            b.addcmul_(a * reset, reset_state.to(dtype))
            a.masked_fill_(reset, 0)
        carry = _linear_scan_(a, b, carry)
        states[:, start:stop] = b.transpose(0, 1)
    return states, carry.to(initial_state.dtype, copy=True)


def torch_backward(
    projected, cell_type, initial_state, reset_state, reset_mask, padding_mask, states, d_states, d_final_state
):
    """Gradients of projected, initial_state and reset_state.

    With d[t] = dL/dh[t] in total and e[t] = a[t] * d[t] the part that flows on to h[t-1]:
    e[t] = a[t] * (d_states[t] + e[t+1]), a linear scan from the right.
    """
    B, T, _ = projected.shape
    D = initial_state.shape[-1]
    dtype = _carry_dtype(projected.device)
    d_projected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    d_reset_state = torch.zeros_like(reset_state, dtype=dtype)
    carry = d_final_state.to(dtype)
    for start, stop in reversed(_blocks(T, B * D, projected.device)):
        block = _time_major(projected, start, stop, initial_state.dtype)
        if padding_mask is not None:
            padding = _time_major(padding_mask, start, stop, torch.bool)[..., None]
            block.masked_fill_(padding, 0)  # whatever is there, its gradient is zero
        a, z, c = _gates(block, cell_type)
        flow = _share_of_past(a, z, dtype)
        if padding_mask is not None:
            flow.masked_fill_(padding, 1)
            z.masked_fill_(padding, 0)
        to_reset_state = None
        if reset_mask is not None:
            reset = _time_major(reset_mask, start, stop, torch.bool)[..., None]
            to_reset_state = flow * reset
            flow.masked_fill_(reset, 0)

        upstream = _time_major(d_states, start, stop, dtype)
        e = torch.empty(len(flow) + 1, B, D, dtype=dtype, device=flow.device)  # the last from the block on the right
        torch.mul(flow, upstream, out=e[:-1])
        e[-1] = carry
        carry = _linear_scan_(flow, e[:-1], carry, reverse=True)
        d_state = upstream.add_(e[1:])

        before = initial_state.to(states.dtype) if start == 0 else states[:, start - 1]
        change = c.clone()  # to the candidate from the state before
        change[0].sub_(before)
        change[1:].sub_(states[:, start : stop - 1].transpose(0, 1))
        if to_reset_state is not None:
            d_reset_state += (to_reset_state * d_state).sum((0, 1))
            change = torch.where(reset, c - reset_state, change)

        d_c = z.mul_(d_state.to(z.dtype))
        d_log_odds = a.mul_(change).mul_(d_c)  # of sigmoid(log_odds) = 1 - a
        *gates, x = block.chunk(GATES[cell_type], -1)
        *d_gates, d_x = d_projected[:, start:stop].transpose(0, 1).chunk(GATES[cell_type], -1)
        if cell_type == "mingru":
            d_gates[0].copy_(d_log_odds)
        else:  # log_odds = log i - log f
            d_gates[1].copy_(gates[1].neg_().sigmoid_().mul_(d_log_odds))
            d_gates[0].copy_(gates[0].neg_().sigmoid_().mul_(d_log_odds.neg_()))
        # g' is 1 where x >= 0, and s * (1 - s) below, s = sigmoid(x) = c. Of min(c, 1/2) that is 1/4 where x >= 0.
        slope = c.clamp_(max=0.5)
        slope.addcmul_(slope, slope, value=-1).add_(torch.ge(x, 0, out=torch.empty_like(slope)), alpha=0.75)
        d_x.copy_(d_c.mul_(slope))
    return d_projected, carry.to(initial_state.dtype), d_reset_state.to(reset_state.dtype)


# One pair of custom operators around every implementation with a backward of its own.


# Backends of compiled kernels, which need a package. On a device "auto" takes the first that is made for it.
KERNELS = {"numba": ("cpu",), "triton": ("cuda", "xpu"), "triton_batch_invariant": ("cuda", "xpu")}


@torch.compiler.assume_constant_result  # for a compiler the answer does not change
def resolve_backend(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs: what "auto" stands for, or the one that was asked for.

    Raises ImportError where the one asked for is not installed, ValueError where it does not take such tensors.
    """
    if backend == "auto":
        fits = [name for name, devices in KERNELS.items() if device_type in devices and dtype != torch.float64]
        return fits[0] if fits and _is_installed(fits[0]) else "torch"
    if backend in KERNELS:
        _, _, devices = _kernels(backend)
        if device_type not in devices or dtype == torch.float64:
            raise ValueError(
                f"the {backend!r} backend computes in float32 on {' or '.join(devices)}, not in {dtype} on "
                f'{device_type!r}; use "torch"'
            )
    return backend


@functools.cache
def _is_installed(backend: str) -> bool:
    try:
        _kernels(backend)
    except ImportError as error:
        if backend != "numba":  # nobody has a GPU in order to run the portable implementation
            warnings.warn(f'{error}; "auto" falls back to "torch", which is slower', stacklevel=2)
        return False
    return True


def _kernels(backend: str) -> tuple[Callable, Callable, tuple[str, ...]]:
    """(forward, backward, device types) of a backend of KERNELS."""
    if backend == "numba":
        from .scan_numba import backward, forward

        return forward, backward, KERNELS[backend]
    from .scan_triton import INTERPRETED
    from .scan_triton import backward as triton_backward
    from .scan_triton import forward as triton_forward

    devices = ("cpu",) if INTERPRETED else KERNELS[backend]
    fixed = {"batch_invariant": backend == "triton_batch_invariant"}
    return functools.partial(triton_forward, **fixed), functools.partial(triton_backward, **fixed), devices


def _implementation(backend: str, tensor: Tensor) -> tuple[Callable, Callable]:
    """(forward, backward) for a backend name."""
    backend = resolve_backend(backend, tensor.device.type, tensor.dtype)
    return _kernels(backend)[:2] if backend in KERNELS else (torch_forward, torch_backward)


# Custom code from the Hub is a package of its own: its operators must not take the names of the installed ones.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])


@torch.library.custom_op(f"{NAMESPACE}::scan", mutates_args=())
def _scan(
    projected: Tensor,
    cell_type: str,
    initial_state: Tensor,
    reset_state: Tensor,
    reset_mask: Tensor | None,
    padding_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    forward, _ = _implementation(backend, projected)
    return forward(projected, cell_type, initial_state, reset_state, reset_mask, padding_mask)


@torch.library.custom_op(f"{NAMESPACE}::scan_backward", mutates_args=())
def _scan_backward(
    projected: Tensor,
    cell_type: str,
    initial_state: Tensor,
    reset_state: Tensor,
    reset_mask: Tensor | None,
    padding_mask: Tensor | None,
    backend: str,
    states: Tensor,
    d_states: Tensor,
    d_final_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    _, backward = _implementation(backend, projected)
    return backward(
        projected, cell_type, initial_state, reset_state, reset_mask, padding_mask, states, d_states, d_final_state
    )


@_scan.register_fake
def _(projected, cell_type, initial_state, reset_state, reset_mask, padding_mask, backend):
    B, T, _ = projected.shape
    return projected.new_empty(B, T, initial_state.shape[-1]), initial_state.new_empty(initial_state.shape)


@_scan_backward.register_fake
def _(projected, cell_type, initial_state, reset_state, *_):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (projected, initial_state, reset_state))


def _save_for_backward(ctx, inputs, output):
    projected, ctx.cell_type, initial_state, reset_state, reset_mask, padding_mask, ctx.backend = inputs
    states, final_state = output
    ctx.save_for_backward(projected, initial_state, reset_state, reset_mask, padding_mask, states)


def _differentiate(ctx, d_states, d_final_state):
    projected, initial_state, reset_state, reset_mask, padding_mask, states = ctx.saved_tensors
    d_states = torch.zeros_like(states) if d_states is None else d_states
    d_final_state = torch.zeros_like(initial_state) if d_final_state is None else d_final_state
    d_projected, d_initial_state, d_reset_state = _scan_backward(
        projected, ctx.cell_type, initial_state, reset_state, reset_mask, padding_mask, ctx.backend,
        states, d_states, d_final_state,
    )  # fmt: skip
    return d_projected, None, d_initial_state, d_reset_state, None, None, None


def _refuse_double_backward(ctx, *_):
    raise RuntimeError('minrnn_scan can be differentiated once; for second derivatives use backend="loop"')


_scan.register_autograd(_differentiate, setup_context=_save_for_backward)
_scan_backward.register_autograd(_refuse_double_backward)
