"""Statistics of recurrent states: how long they remember, how saturated the gates are, how large the states get.

B batch, T time, D state width, N real tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .cells import Cell
from .scan import scan_states

SATURATED = 0.99  # a gate above this, or below 1 - this, has hardly any gradient
SMALLEST_LOG = -104.0  # of float32; the first token may keep nothing of the state before it, log a = -inf


class StateReport:
    """One recurrence h[t] = a[t] * h[t-1] + b[t] over the N tokens that it was shown.

    Attributes:
        name: of the module, such as "layers.0.rnn".
        timescales: (D,) in tokens, > 0: -1 / (mean over t of log |a[t]|). Of what a channel held, 1/e is left after so
            many tokens. One for each complex number of "lru"; the window of "lmu".
        remembering, forgetting: share, 0..1, of the gates with |a| > 0.99, and with |a| < 0.01.
        mean_norm: mean over t of sqrt(mean over channels of h[t]^2).
        largest_state: the largest |h[t]| of all channels. Where b = (1 - a) * c no state is larger than the largest
            candidate c[t] and the state at the start: it is a mean of these.
    """

    def __init__(self, name: str):
        self.name, self.tokens, self.largest_state = name, 0, 0.0
        self._log_a = torch.zeros(())
        self.remembering = self.forgetting = self.mean_norm = 0.0

    def listen(self, rnn: Any, arguments: tuple, output: tuple[Tensor, ...]) -> None:
        """Add what a `MinRNNRecurrence` has just computed: its forward hook."""
        hidden_states, masks, carried, *_ = *arguments, None
        start = rnn.start(hidden_states).expand(len(hidden_states), -1)
        start = start if carried is None else carried.state_or(start)
        projected, states = rnn.in_proj(hidden_states), output[1]
        parameters = rnn.parameters_of_cell(projected)
        if rnn.cell.has_matrices:  # of which a forward pass returns the latest states alone
            scanned = scan_states(projected, rnn.cell, start, parameters, masks, backend="loop")
            states = scanned.all_states()
        self.add(rnn.cell, projected, parameters, start, states, masks.padding)

    def add(
        self, cell: Cell, projected: Tensor, parameters: Tensor, start: Tensor, states: Tensor, padding: Tensor | None
    ) -> None:
        """What a cell made of projected (B, T, width): states (B, T, S), after `start` (B, S); padding (B, T) does not
        count."""
        D = cell.state_width(projected.shape[-1])
        size = states.shape[-1] - cell.log_sums(D)  # of h, or of matrices
        log_sums = torch.cat([start[:, None], states.to(start.dtype)[:, :-1]], 1)[..., size:]
        log_decay = cell.log_decay(projected.to(start.dtype), parameters, log_sums)
        log_decay = log_decay.expand(*states.shape[:2], -1).clamp(min=SMALLEST_LOG)
        real = torch.ones_like(states[..., 0], dtype=torch.bool) if padding is None else ~padding
        log_decay, states = log_decay[real].float(), states[real][:, :size].float()
        if not len(states):
            return
        self.tokens += len(states)
        self.largest_state = max(self.largest_state, states.abs().max().item())
        self._log_a = self._log_a + log_decay.sum(0)
        weight = len(states) / self.tokens  # of these tokens in the means over all
        remembering, forgetting = log_decay > math.log(SATURATED), log_decay < math.log(1 - SATURATED)
        self.remembering += weight * (remembering.float().mean().item() - self.remembering)
        self.forgetting += weight * (forgetting.float().mean().item() - self.forgetting)
        self.mean_norm += weight * (states.square().mean(-1).sqrt().mean().item() - self.mean_norm)

    @property
    def timescales(self) -> Tensor:
        return -self.tokens / self._log_a

    def __repr__(self) -> str:
        low, middle, high = self.timescales.quantile(self.timescales.new_tensor([0.1, 0.5, 0.9])).tolist()
        return (
            f"{self.name}: remembers {low:.3g} to {high:.3g} tokens (10 % to 90 % of channels; median {middle:.3g}), "
            f"gates above {SATURATED} {self.remembering:.1%}, below {1 - SATURATED:.2g} {self.forgetting:.1%}, "
            f"norm {self.mean_norm:.3g}, largest state {self.largest_state:.3g}"
        )
