"""What the states of a model do while it reads: how long they remember, how open their gates are, how large they get.

B batch, T time, D state width, N real tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import GATES, log_odds

SATURATED = 0.99  # a gate beyond this, or below 1 - this, has hardly a gradient


class StateReport:
    """One recurrence h[t] = a[t] * h[t-1] + (1 - a[t]) * c[t] over the N tokens that it was shown.

    Attributes:
        name: of the module, such as "layers.0.rnn".
        timescales: (D,) in tokens, > 0: -1 / (mean over t of log a[t]). Of what a channel held, 1/e is left after so
            many tokens.
        remembering, forgetting: share, 0..1, of the N * D gates with a > 0.99, and with a < 0.01.
        mean_norm: mean over t of sqrt(mean over channels of h[t]^2).
        largest_state: the largest |h[t]| of all channels. No state is larger than the largest candidate c[t] and the
            state at the start: it is a mean of these.
    """

    def __init__(self, name: str):
        self.name, self.tokens, self.largest_state = name, 0, 0.0
        self._log_a = torch.zeros(())
        self._remembering = self._forgetting = self._norm = 0.0

    def add(self, projected: Tensor, states: Tensor, cell_type: str, padding_mask: Tensor | None) -> None:
        """projected (B, T, 2 D or 3 D) and states (B, T, D) of `scan.minrnn_scan`; what is padding does not count."""
        if padding_mask is not None:
            projected, states = projected[~padding_mask], states[~padding_mask]
        projected, states = projected.flatten(0, -2).float(), states.flatten(0, -2).float()
        if not len(states):
            return
        odds = log_odds(projected.split(states.shape[-1], -1)[: GATES[cell_type] - 1])
        threshold = math.log(SATURATED / (1 - SATURATED))
        self.tokens += len(states)
        self.largest_state = max(self.largest_state, states.abs().max().item())
        self._log_a = self._log_a - F.softplus(odds).sum(0)
        self._remembering += (odds < -threshold).float().mean(-1).sum().item()
        self._forgetting += (odds > threshold).float().mean(-1).sum().item()
        self._norm += states.square().mean(-1).sqrt().sum().item()

    @property
    def timescales(self) -> Tensor:
        return -self.tokens / self._log_a

    @property
    def remembering(self) -> float:
        return self._remembering / self.tokens

    @property
    def forgetting(self) -> float:
        return self._forgetting / self.tokens

    @property
    def mean_norm(self) -> float:
        return self._norm / self.tokens

    def __repr__(self) -> str:
        low, middle, high = self.timescales.quantile(self.timescales.new_tensor([0.1, 0.5, 0.9])).tolist()
        return (
            f"{self.name}: remembers {low:.3g} to {high:.3g} tokens (10 % to 90 % of channels; median {middle:.3g}), "
            f"gates above {SATURATED} {self.remembering:.1%}, below {1 - SATURATED:.2g} {self.forgetting:.1%}, "
            f"norm {self.mean_norm:.3g}, largest state {self.largest_state:.3g}"
        )
