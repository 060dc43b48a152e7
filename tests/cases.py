"""Every cell in a small size: what tests of all cells run over, and random problems for each."""

import dataclasses

import torch
from oracle import normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_minrnn.cells import (
    HGRN,
    HGRN2,
    LMU,
    LRU,
    RGLRU,
    RWKV4,
    Aaren,
    Cell,
    GatedDelta,
    MinGRU,
    MinLSTM,
    SignedMinGRU,
)

CASES = {
    cell.spec: cell
    for cell in (
        MinGRU(), MinLSTM(), MinGRU("linear"), MinLSTM("linear"), SignedMinGRU(), Aaren(num_heads=2), RWKV4(), LRU(),
        RGLRU(), HGRN(), HGRN2(num_heads=2), GatedDelta(2, householder_steps=2),
        LMU(memory_order=3, memory_window=9),
    )
}  # fmt: skip
WIDTHS = {"aaren": 2, "lru": 2, "hgrn2": 2, "gated_delta": 4, "lmu": 3}  # D is a multiple of


def width(cell: Cell, channels: int) -> int:
    return channels * WIDTHS.get(cell.name, 1)


def oracle_arguments(cell: Cell) -> dict:
    """How the oracle names a cell."""
    options = dataclasses.asdict(cell)
    candidate = options.pop("candidate", "g")
    return {"cell_type": cell.name + (":linear" if candidate == "linear" else "")} | options


def random_parameters(cell: Cell, D: int, seed: int) -> dict[str, torch.Tensor]:
    """Of a memory of some ten tokens."""
    shape = len(cell.parameter_names), cell.parameter_channels(D)
    return dict(zip(cell.parameter_names, normal(*shape, seed=seed) * 0.5 - 2))


def problem(cell: Cell, B: int, T: int, channels: int, dtype=torch.float32, seed=0) -> dict:
    """Arguments of `outcome`, with ordinary gates. A state holds what came before, with log-sums of some tokens."""
    D = width(cell, channels)
    S = cell.state_numbers(D)
    state_dtype = torch.promote_types(dtype, torch.float32)
    return {
        "projected": normal(B, T, sum(cell.blocks(D)), seed=seed, dtype=dtype),
        "initial_state": normal(B, S, seed=seed + 1, dtype=state_dtype),
        "reset_state": normal(S, seed=seed + 2, dtype=state_dtype),
        "parameters": {name: x.to(state_dtype) for name, x in random_parameters(cell, D, seed + 5).items()},
        "d_outputs": normal(B, T, D, seed=seed + 3, dtype=dtype),
        "d_final_state": normal(B, S, seed=seed + 4, dtype=state_dtype),
    }


def outcome(scan, projected, initial_state, reset_state, parameters, d_outputs, d_final_state, **more) -> dict:
    """Outputs, final state, and the gradient of each tensor given, by name.

    scan: a function of projected, initial_state, reset_state and parameters, a dict.
    """
    given = {"projected": projected, "initial_state": initial_state, "reset_state": reset_state} | parameters
    given = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    states = {name: given.get(name) for name in ("projected", "initial_state", "reset_state")}
    outputs, final_state = scan(**states, parameters={name: given[name] for name in parameters}, **more)
    gradients = torch.autograd.grad(
        [outputs, final_state],
        list(given.values()),
        [d_outputs.to(outputs.dtype), d_final_state.to(final_state.dtype)],
        materialize_grads=True,
    )  # fmt: skip
    return {"outputs": outputs.detach(), "final_state": final_state.detach()} | {
        f"d_{name}": x for name, x in zip(given, gradients)
    }


class WithoutFloat64(TorchDispatchMode):
    """Plays a device that has no float64, as Apple's GPUs: to make a tensor of it there is an error."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        if function is torch.ops.aten.lift_fresh.default:
            return result  # an array of numpy, on the CPU
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"Cannot convert a Tensor to float64 on this device: {function}")
        return result
