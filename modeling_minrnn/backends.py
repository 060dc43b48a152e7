"""Which implementation computes: where each backend runs, and what "auto" stands for."""

import functools
import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_mode

# Backends of compiled kernels, which need a package. On a device "auto" takes the first that is made for it.
COMPILED = {"numba": ("cpu",), "triton": ("cuda", "xpu"), "triton_batch_invariant": ("cuda", "xpu")}

# Custom code from the Hub is a package of its own: its operators must not take the names of the installed ones.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])


def is_transformed() -> bool:
    """Whether torch.func or forward mode is at work: of these the derivative of a custom operator knows nothing."""
    return torch._C._are_functorch_transforms_active() or forward_mode._current_level >= 0


def register_derivative(operator, backward, differentiate: Callable, setup_context: Callable, name: str) -> None:
    """Of a custom operator, whose derivative `differentiate` computes by the operator `backward`, which has none."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f'{name} can be differentiated once; for second derivatives use backend="loop" (in the configuration of a '
            'model scan_backend="loop")'
        )

    operator.register_autograd(differentiate, setup_context=setup_context)
    backward.register_autograd(refuse)


class Kernels(NamedTuple):
    """What a backend brings.

    Attributes:
        solve: the recurrence alone, for every cell; the contract is that of `scan_torch.solve`.
        block_elements: of state that `solve` is given at a time; None for whole sequences.
        fuses: whether `forward` and `backward` compute the cell of some `scan_blocks.ScanInputs` in one pass, gates
            included.
        devices: device types.
    """

    solve: Callable
    block_elements: int | None
    fuses: Callable = lambda inputs: False
    forward: Callable = NotImplemented
    backward: Callable = NotImplemented
    devices: tuple[str, ...] = ()


@functools.cache
def kernels(backend: str, device_type: str) -> Kernels:
    """The kernels of "torch" or of a backend of COMPILED. Raises ImportError where they are not installed."""
    if backend == "numba":
        from .scan_numba import NUMBA_KERNELS

        return NUMBA_KERNELS
    if backend != "torch":
        from .scan_triton import triton_kernels

        return triton_kernels(batch_invariant=backend == "triton_batch_invariant")
    from .scan_torch import BLOCK_ELEMENTS, BLOCK_ELEMENTS_ACCELERATOR, solve

    return Kernels(solve, BLOCK_ELEMENTS if device_type == "cpu" else BLOCK_ELEMENTS_ACCELERATOR)


@torch.compiler.assume_constant_result  # for a compiler the answer does not change
def resolve_backend(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs: what "auto" stands for, or the one that was asked for.

    Raises ImportError where the one asked for is not installed, ValueError where it does not take such tensors.
    """
    # While torch.export traces, max, min and pow are its own: numba could neither be loaded nor compile.
    later = ["numba"] if torch.compiler.is_exporting() and find_spec("numba") else []
    if backend == "auto":
        fits = [name for name, devices in COMPILED.items() if device_type in devices and dtype != torch.float64]
        return fits[0] if fits and (fits[0] in later or _is_installed(fits[0])) else "torch"
    if backend in COMPILED:
        devices = COMPILED[backend] if backend in later else kernels(backend, device_type).devices
        if device_type not in devices or dtype == torch.float64:
            raise ValueError(
                f"the {backend!r} backend computes in float32 on {' or '.join(devices)}, not in {dtype} on "
                f'{device_type!r}; use "torch"'
            )
    return backend


@functools.cache
def _is_installed(backend: str) -> bool:
    try:
        kernels(backend, COMPILED[backend][0])
    except ImportError as error:
        if backend != "numba":  # nobody has a GPU in order to run the portable implementation
            warnings.warn(f'{error}; "auto" falls back to "torch", which is slower', stacklevel=2)
        return False
    return True
