"""Recurrent layers that replace nn.GRU and nn.LSTM, for inputs of any kind.

B batch, T time, C features, D hidden size, S numbers of state (`cells.py`: D, and more for some cells). A layer is a
linear map of its input, and the scan of a cell over it.
"""

import math
import warnings
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .cells import Cell, Convex, Linear, cell_of, softplus
from .masks import Masks
from .scan import scan_states, stack_parameters, state_dtype


class NarrowLinear(nn.Linear):
    """nn.Linear for few features: on a CPU the gradient of its weight takes a sixth of the time.

    autograd computes that gradient in the layout of the weight, as grad.T @ x, which MKL does slowly if x has few
    columns. With a copy of the weight in the other layout it computes x.T @ grad.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        return F.linear(input, self.weight.t().contiguous().t(), self.bias)


class CellProjection(nn.Module):
    """`in_proj`, whose output a cell reads, and the learned vectors of the cell."""

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        state_size: int,
        bias: bool,
        device=None,
        dtype=None,
        linear: type[nn.Linear] = nn.Linear,
    ):
        super().__init__()
        self.cell, self.state_size = cell, state_size
        self.in_proj = linear(input_size, sum(cell.blocks(state_size)), bias, device=device, dtype=dtype)
        for name in cell.parameter_names:
            vector = torch.empty(cell.parameter_channels(state_size), device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(vector))

    def initialize(self, copy: Callable, layer: int, num_layers: int, max_timescale: float | None) -> None:
        """copy(parameter, value) for each parameter that the cell has an initial value for."""
        device = self.in_proj.weight.device
        values = self.cell.initial_parameters(self.state_size, layer, num_layers, max_timescale, device)
        for name, value in values.items():
            parameter = self.in_proj.bias if name == "bias" else getattr(self, name)
            copy(parameter, value.to(parameter.dtype))

    def parameters_of_cell(self, like: Tensor) -> Tensor:
        """The learned vectors, as `scan_states` takes them for a `projected` like this."""
        parameters = {name: local(getattr(self, name)) for name in self.cell.parameter_names}
        return stack_parameters(self.cell, parameters, like)


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds under tensor parallelism."""
    return getattr(parameter, "to_local", lambda: parameter)()


class MinRNN(nn.Module):
    """Recurrent layers of any cell, a replacement of nn.GRU.

        rnn = MinRNN(10, 64, num_layers=2, batch_first=True, cell_type="hgrn")
        output, h_n = rnn(torch.randn(8, 100, 10))
        output, h_n = rnn(torch.randn(8, 50, 10), h_n)  # as the last third of one call over 150 steps

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as of nn.GRU.
            The bias is that of the gates and the candidate, and there is no recurrent weight.
        cell_type: a name of `cells.CELLS`, or a cell with options, as `cells.Aaren(num_heads=4)`.
        max_timescale: as of `MinRNNConfig`: memories of 1 to so many steps at the start.
        backend: of `scan.minrnn_scan`.

    Raises:
        ValueError: a size below 1, a dropout outside [0, 1), an unknown cell, a hidden_size that it cannot have, a
            max_timescale below 1 or for gates without a memory to set.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        cell_type: str | Cell = "mingru",
        max_timescale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.cell = cell_type if isinstance(cell_type, Cell) else cell_of(cell_type)
        self.max_timescale, self.backend = max_timescale, backend
        self._check_arguments()
        directions = 1 + bidirectional
        widths = [input_size] * directions + [directions * hidden_size] * (directions * (num_layers - 1))
        self.projections = nn.ModuleList(  # in the order of h_n: for each layer forwards, then backwards
            CellProjection(
                self.cell, width, hidden_size, bias, device, dtype, NarrowLinear if width <= 16 else nn.Linear
            )
            for width in widths
        )
        self.reset_parameters()

    def _check_arguments(self) -> None:
        for name in ("input_size", "hidden_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.dropout and self.num_layers == 1:
            warnings.warn("dropout is applied between layers, and num_layers is 1", stacklevel=3)
        if self.max_timescale is not None:
            if not 1 <= self.max_timescale < math.inf:
                raise ValueError(f"max_timescale must be None or a number of steps >= 1, not {self.max_timescale}")
            by = self.cell.remembers_by
            if by is None or (by == "bias" and not self.bias):
                raise ValueError(f"max_timescale sets the memory of gates, by a {by or 'cell'} that is not there")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values as of nn.Linear, and those of the cell."""
        for i, projection in enumerate(self._projections()):
            projection.in_proj.reset_parameters()
            projection.initialize(Tensor.copy_, i // (1 + self.bidirectional), self.num_layers, self.max_timescale)

    def flatten_parameters(self) -> None:
        """Nothing: for code that calls it on nn.GRU, whose weights it lays out for cuDNN."""

    def _projections(self) -> list[CellProjection]:
        return cast(list[CellProjection], list(self.projections))

    @property
    def state_size(self) -> int:
        """S."""
        return self.cell.state_numbers(self.hidden_size)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        reset_mask: Tensor | None = None,
        time_deltas: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """
        Args:
            input: (T, B, C), (B, T, C) with batch_first, (T, C) for one sequence, or a PackedSequence.
            hx: (num_layers * directions, B, S), or without B, the states to start from; None for those of the cell.
            reset_mask: (B, T), or (T,), bool, whatever batch_first is. True: this step begins anew, as a new document
                or a new episode of an environment does, from what None would start from.
            time_deltas: (B, T), or (T,), >= 0, the time since the step before: a becomes a to this power, so that a
                memory lasts a time, not a number of steps, and a phase turns with time. For mingru, minlstm, hgrn and
                lru, in one direction.

        Returns:
            output, like the input with directions * D features, and h_n like hx, in float32 (float64 for float64).
            They are those of each sequence alone, however it is padded, packed, split or stepped through.

        Raises:
            ValueError: shapes that do not fit, a pair of states, time_deltas below 0 or for another cell.
        """
        if hx is not None and not isinstance(hx, Tensor):
            raise ValueError("hx must be one tensor of states: there is no second one as of nn.LSTM")
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, reset_mask, time_deltas)
        one = input.dim() == 2
        if one:
            hx, reset_mask, time_deltas = (
                None if given is None else given.unsqueeze(dim)
                for given, dim in ((hx, 1), (reset_mask, 0), (time_deltas, 0))
            )
        x = input[None] if one else input if self.batch_first else input.transpose(0, 1)
        self._check_inputs(x.shape, hx, time_deltas)
        output, h_n = self._read(x, hx, Masks(None, reset_mask), time_deltas)
        if one:
            return output[0], h_n[:, 0]
        return output if self.batch_first else output.transpose(0, 1), h_n

    def _forward_packed(self, sequence: PackedSequence, hx, reset_mask, time_deltas) -> tuple[PackedSequence, Tensor]:
        """The linear maps are applied to what is packed, and the scans to rows (B, T) with padding at their ends."""
        data, sizes = sequence.data, sequence.batch_sizes.to(sequence.data.device)
        rank = torch.arange(int(sizes[0]), device=data.device)
        if sequence.unsorted_indices is not None:
            rank = sequence.unsorted_indices
        # Step t of the row of rank r is packed behind all earlier steps, as the r-th. By index: the backward pass of
        # torch's pad_packed_sequence takes time that grows with the square of T.
        is_real = rank[:, None] < sizes
        source = (sizes.cumsum(0) - sizes + rank[:, None]).where(is_real, 0)
        target = torch.empty(len(data), dtype=torch.long, device=data.device)
        target[source[is_real]] = is_real.flatten().nonzero()[:, 0]

        def rows(data: Tensor) -> Tensor:
            return data.index_select(0, source.flatten()).unflatten(0, source.shape)

        def flat(rows: Tensor) -> Tensor:
            return rows.flatten(0, 1).index_select(0, target)

        self._check_inputs((*source.shape, data.shape[-1]), hx, time_deltas)
        output, h_n = self._read(data, hx, Masks(~is_real, reset_mask), time_deltas, rows, flat)
        return sequence._replace(data=output), h_n

    def step(
        self,
        x: Tensor,
        h: Tensor | None = None,
        *,
        reset_mask: Tensor | None = None,
        time_deltas: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step, of `forward` over a sequence of one:

            output, h = rnn.step(frame, h)

        Args:
            x: (B, C), or (C,). h: (num_layers, B, S), or without B. reset_mask, time_deltas: (B,), or a single one.

        Returns:
            output (B, D), and h after the step.

        Raises:
            ValueError: as `forward`, and for a bidirectional layer, which has no steps.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer reads whole sequences: it has no step")
        if x.dim() not in (1, 2):
            raise ValueError(f"a step must be (B, {self.input_size}) or ({self.input_size},), not {tuple(x.shape)}")
        time = 0 if x.dim() == 1 or not self.batch_first else 1
        marks = [None if given is None else given.unsqueeze(-1) for given in (reset_mask, time_deltas)]
        output, h = self.forward(x.unsqueeze(time), h, reset_mask=marks[0], time_deltas=marks[1])
        return cast(Tensor, output).squeeze(time), h

    def _check_inputs(self, shape: tuple[int, ...], hx: Tensor | None, time_deltas: Tensor | None) -> None:
        if len(shape) != 3 or shape[-1] != self.input_size or shape[1] == 0:
            raise ValueError(f"input must have T >= 1 steps of {self.input_size} features, not {tuple(shape)}")
        B, T, _ = shape
        states = (self.num_layers * (1 + self.bidirectional), B, self.state_size)
        if hx is not None and hx.shape != states:
            raise ValueError(f"hx must be {states}, not {tuple(hx.shape)}")
        if time_deltas is None:
            return
        if time_deltas.shape != (B, T):
            raise ValueError(f"time_deltas must be (B, T) = {(B, T)}, not {tuple(time_deltas.shape)}")
        if self.bidirectional:
            raise ValueError("time_deltas are times since the step before: not for a bidirectional layer")
        if not torch.compiler.is_compiling() and time_deltas.device.type == "cpu" and not (time_deltas >= 0).all():
            raise ValueError(f"time_deltas must be at least 0, not {time_deltas.min()}")

    def _read(
        self,
        x: Tensor,
        hx: Tensor | None,
        masks: Masks,
        time_deltas: Tensor | None,
        rows: Callable[[Tensor], Tensor] = lambda x: x,
        flat: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> tuple[Tensor, Tensor]:
        """All layers. rows, flat: from the layout that the linear maps read to (B, T, features), and back."""
        outputs: list[Tensor] = []
        final_states = []
        for i, projection in enumerate(self._projections()):
            projected, cell, state = rows(projection.in_proj(x)), self.cell, None if hx is None else hx[i]
            dtype, parameters = projected.dtype, projection.parameters_of_cell(projected)
            if time_deltas is not None:
                cell, projected, parameters = _over_time(cell, projected, parameters, time_deltas)
            if backwards := self.bidirectional and i % 2 == 1:
                projected = projected.flip(1)
            seen = masks.reversed(0) if backwards else masks
            scanned = scan_states(projected, cell, state, parameters, seen, backend=self.backend)
            output = scanned.outputs.to(dtype)
            outputs.append(flat(output.flip(1) if backwards else output))
            final_states.append(scanned.final_state)
            if len(outputs) == 1 + self.bidirectional:  # the layer is complete
                x, outputs = torch.cat(outputs, -1) if self.bidirectional else outputs[0], []
                if i + 1 < len(self.projections):
                    x = F.dropout(x, self.dropout, self.training)
        return x, torch.stack(final_states)

    def extra_repr(self) -> str:
        shape = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, cell_type={self.cell.spec!r}"
        return shape + ", bidirectional=True" * self.bidirectional


class MinGRU(MinRNN):
    """`MinRNN` of the minGRU (arXiv 2410.01201), h = (1 - z) * h + z * g(x): a replacement of nn.GRU."""


class MinLSTM(MinRNN):
    """`MinRNN` of the minLSTM (arXiv 2410.01201), a replacement of nn.LSTM with one state: (output, h_n)."""

    def __init__(self, *args, cell_type: str | Cell = "minlstm", **kwargs):
        super().__init__(*args, cell_type=cell_type, **kwargs)


def _over_time(cell: Cell, projected: Tensor, parameters: Tensor, time_deltas: Tensor) -> tuple[Cell, Tensor, Tensor]:
    """A cell and its inputs, whose scan is that of `cell` with a^d for a.

    For a Convex cell, h = a^d h + (1 - a^d) c is the scan of a minGRU with log((1 - a^d) / a^d) for the gate and the
    candidate c. For LRU, whose b does not depend on a, it is the linear scan of the decay, the phase and the inflow.
    """
    projected = projected.to(state_dtype(projected.dtype))
    without_log_sums = cell.system is None and not cell.log_sums(2)
    terms = cell.gates(projected, parameters, projected[..., :0]) if without_log_sums else None
    d = time_deltas.to(projected.dtype)[..., None]
    columns: tuple[Tensor, ...]
    if isinstance(terms, Convex):
        rate = softplus(terms.log_odds) * d  # -log a^d
        rate = rate.clamp(min=1e-30)  # so that its logarithm and the derivative are finite if no time has passed
        log_odds = rate + torch.log(-torch.expm1(-rate))
        columns, scanned = (log_odds, terms.candidate), "mingru:candidate=linear"
    elif isinstance(terms, Linear) and terms.phase is not None:
        # Round the sums of the phases to float32, not the phases: the errors of equal steps would add up.
        exact = torch.remainder(terms.phase * time_deltas.to(terms.phase.dtype)[..., None], 2 * math.pi)
        rounded = F.pad((exact.cumsum(1) * 2**21).round(), (0, 0, 1, 0)).diff(dim=1) / 2**21
        phase = exact + (rounded - exact).detach()
        columns, scanned = (terms.log_decay * d, phase.to(d.dtype), terms.inflow), "linear:turned=phase"
    else:
        raise ValueError(f"time_deltas are for mingru, minlstm, hgrn and lru, not for {cell.name!r}")
    return cell_of(scanned), torch.cat(columns, -1), projected.new_empty(0)


__all__ = ["MinGRU", "MinLSTM", "MinRNN"]
