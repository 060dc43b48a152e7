"""The recurrences: one class a cell, each with its equation, its source and nothing of how it is computed.

B batch, T time, D state width. A state is h (D,) and, for some cells, log-sums L (E,); together S = D + E numbers.

    h[t] = a[t] * h[t-1] + b[t]                  a and b depend on the token and on L[t-1], not on h
    L[t] = log(exp(L[t-1] + f[t]) + exp(k[t]))   f and k depend on the token alone

Or a matrix for each of several heads, S (n, n), of which a token reads y = S^T q, D numbers in all: `Matrix`.

A cell gives log a and b, never a itself: rounded to float32, an a near 1 is wrong by 1e-3 after 262,144 tokens. Either
as `Convex`, where b = (1 - a) * c, or as `Linear`. `scan.py` solves both over T at once. `docs/new-cell.md` shows how
to add one.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING_SEEN = -1e30  # an L of no tokens: finite, as the difference of two infinities is not a number


class Convex(NamedTuple):
    """h = a * h + (1 - a) * candidate, with log_odds = log((1 - a) / a): h stays within its candidates."""

    log_odds: Tensor
    candidate: Tensor

    @property
    def log_decay(self) -> Tensor:
        return -softplus(self.log_odds)

    def turned(self, h: Tensor, back: bool = False) -> Tensor:
        return h


class Linear(NamedTuple):
    """h = exp(log_decay) * turned(h) + inflow, log_decay <= 0.

    turned: times `sign`, +-1, or as complex numbers times exp(i * phase). h and inflow are then [real | imaginary] and
    twice as wide as log_decay and phase, which may be of a wider dtype. Shapes need only broadcast.
    """

    log_decay: Tensor
    inflow: Tensor
    sign: Tensor | None = None
    phase: Tensor | None = None

    def turned(self, h: Tensor, back: bool = False) -> Tensor:
        if self.phase is not None:
            cosine, sine = self.phase.cos().to(h.dtype), self.phase.sin().to(h.dtype)
            return complex_product(torch.cat([cosine, -sine if back else sine], -1), h)
        return h if self.sign is None else self.sign.to(h.dtype) * h


class Matrix(NamedTuple):
    """S = diag(exp(log_decay)) S + key value^T, then y = S^T query, a head; log_decay <= 0.

    With `rate` what is written is what the key does not find, S = S + rate key (value - S^T key)^T, in several steps.

    query, log_decay, key and value: (..., heads, n), log_decay or (..., heads, 1). With `rate` (..., steps, heads, 1)
    key and value are (..., steps, heads, n).
    """

    query: Tensor
    log_decay: Tensor
    key: Tensor
    value: Tensor
    rate: Tensor | None = None


def carry_dtype(device: torch.device) -> torch.dtype:
    """What a state is carried in, and all else that adds up over many tokens."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def complex_product(x: Tensor, y: Tensor) -> Tensor:
    """Of complex numbers [real | imaginary]."""
    (a, b), (c, d) = x.chunk(2, -1), y.chunk(2, -1)
    return torch.cat([a * c - b * d, a * d + b * c], -1)


class LogSum(NamedTuple):
    """L = log(exp(L + log_decay) + exp(score)), log_decay <= 0. Shapes need only broadcast."""

    log_decay: Tensor
    score: Tensor


def g(x: Tensor) -> Tensor:
    """x + 0.5 where x >= 0, sigmoid(x) elsewhere: positive and continuous (arXiv 2410.01201, appendix B)."""
    positive = x.clamp(min=0)  # its derivative at 0 is 1, and so is that of the sum
    return torch.sigmoid(x - positive) + positive


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # torch's own default, 20, is exact in float32 alone


def sigmoid(x: Tensor) -> Tensor:
    """torch.sigmoid with a derivative to all digits where it nears 1: s * (1 - s) would have lost those of 1 - s."""
    small = torch.sigmoid(2 * x.clamp(max=0) - x)  # of -|x|, with a derivative at zero
    return torch.where(x > 0, 1 - small, small)


def advance(terms: Convex | Linear, h: Tensor) -> Tensor:
    """The h (B, D) after one token."""
    if isinstance(terms, Convex):
        # From the nearer end by the smaller share: in float32 a * h + z * c would drift where a rounds to 1.
        a, z = torch.sigmoid(-terms.log_odds), torch.sigmoid(terms.log_odds)
        return torch.where(a > z, torch.lerp(h, terms.candidate, z), torch.lerp(terms.candidate, h, a))
    log_decay, h = terms.log_decay, terms.turned(h)
    if terms.phase is not None:
        log_decay = torch.cat([log_decay, log_decay], -1)
    decayed = torch.where(log_decay > -0.5, h + torch.expm1(log_decay) * h, torch.exp(log_decay) * h)
    return decayed + terms.inflow


def advance_log_sum(terms: LogSum, L: Tensor) -> Tensor:
    """The L after one token."""
    return terms.score + softplus(L + terms.log_decay - terms.score)  # logaddexp has no second derivative at -1e30


def advance_matrix(terms: Matrix, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state (B, S) after one token, and what it reads (B, D)."""
    query, log_decay, key, value, rate = terms
    matrix = state.view(*query.shape, query.shape[-1])
    if rate is None:
        matrix = advance(Linear(log_decay[..., None], key[..., None] * value[..., None, :]), matrix)
    else:
        matrix = advance(Linear(log_decay[..., None], torch.zeros_like(matrix)), matrix)
        for k, v, step_rate in zip(key[..., None].unbind(1), value.unbind(1), rate.unbind(1)):
            matrix = matrix + k * (step_rate * (v - (k * matrix).sum(-2)))[..., None, :]
    return matrix.flatten(1), (query[..., None] * matrix).sum(-2).flatten(1)


def log_uniform_timescales(channels: int, max_timescale: float, device: torch.device) -> Tensor:
    """(channels,) memories 1 / -log(a) of 1..max_timescale tokens (Tallec & Ollivier 2018, arXiv 1804.11188)."""
    return torch.exp(torch.rand(channels, device=device) * math.log(max_timescale))


@dataclass(frozen=True)
class Cell:
    """One recurrence. A subclass is a cell once it is in `CELLS`; its dataclass fields are its options.

    Attributes:
        name: as in `MinRNNConfig.cell_type`.
        spec: the name and the options that are not the default, as an operator takes them: "aaren:num_heads=4".
        label: as people write it.
        source: where the equation is from.
        num_blocks: of width D, that `projected` is made of.
        unit: D is a multiple of it.
        parameter_names: learned vectors, of `parameter_channels` numbers each.
        splits_by_channel: whether tensor parallelism can give each process some channels of every block.
        remembers_by: what `max_timescale` sets at the start: "bias" of the projection, "parameters" or None, where a
            cell has no memory to set.
    """

    name: ClassVar[str]
    spec: ClassVar[str]  # of each instance
    label: ClassVar[str]
    source: ClassVar[str]
    num_blocks: ClassVar[int]
    unit: ClassVar[int] = 1
    parameter_names: ClassVar[tuple[str, ...]] = ()
    remembers_by: ClassVar[str | None] = None
    splits_by_channel: ClassVar[bool] = True

    def __post_init__(self):
        changed = []
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{option.name} must be at least 1, not {value}")
            if value != option.default:
                changed.append(f"{option.name}={value}")
        object.__setattr__(self, "spec", ":".join([self.name, *changed]))

    def blocks(self, D: int) -> tuple[int, ...]:
        """Widths of what `projected` is made of, for a state of width D. Raises ValueError where D does not fit."""
        if D % self.unit:
            raise ValueError(f"the state width must be a multiple of {self.unit} for {self.spec!r}, not {D}")
        return self.widths(D)

    def widths(self, D: int) -> tuple[int, ...]:
        """`blocks`, where they are not `num_blocks` of width D."""
        return (D,) * self.num_blocks

    def log_sums(self, D: int) -> int:
        """E, how many log-sums there are beside the D numbers of h."""
        return 0

    def state_numbers(self, D: int) -> int:
        """S."""
        return D + self.log_sums(D)

    def start(self, D: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(S,), the state before the first token: zero, and nothing seen."""
        start = torch.zeros(self.state_numbers(D), dtype=dtype, device=device)
        if self.log_sums(D):
            start[D:] = NOTHING_SEEN
        return start

    def state_width(self, projected_width: int) -> int:
        """D, from the width of `projected`. Raises ValueError for a width that none has."""
        fixed = sum(self.widths(0))
        per_unit = sum(self.widths(self.unit)) - fixed
        units = (projected_width - fixed) // per_unit
        if units < 1 or (projected_width - fixed) % per_unit:
            needed = f"{per_unit / self.unit:g} D + {fixed}" if fixed else f"{per_unit / self.unit:g} D"
            multiple = f", D a multiple of {self.unit}," if self.unit > 1 else ""
            raise ValueError(
                f"projected must be (B, T, {needed}){multiple} for {self.spec!r}, not {projected_width} wide"
            )
        return units * self.unit

    def parameter_channels(self, D: int) -> int:
        return D

    def initial_parameters(
        self, D: int, layer: int, num_layers: int, max_timescale: float | None, device: torch.device
    ) -> dict[str, Tensor]:
        """Initial values of `parameter_names`, and under "bias" that of the projection, which it has where
        `max_timescale` is given to a cell that remembers by it."""
        if max_timescale is None or self.remembers_by != "bias":
            return {}
        return {"bias": self.bias_of(self.remembering_gates(log_uniform_timescales(D, max_timescale, device)), D)}

    def remembering_gates(self, timescales: Tensor) -> Tensor:
        """The first blocks of `projected`, with which a = exp(-1 / timescale)."""
        raise NotImplementedError

    def bias_of(self, gates: Tensor, D: int) -> Tensor:
        """The bias of the projection that gives these gates to an input of zero."""
        return F.pad(gates, (0, sum(self.widths(D)) - len(gates)))

    def gates(self, projected: Tensor, parameters: Tensor, log_sums: Tensor) -> Any:
        """What one token, or each of several, does to h: `Convex` or `Linear`; to matrices: `Matrix`.

        Args:
            projected: (..., width).
            parameters: (len(parameter_names), parameter_channels).
            log_sums: (..., E), L before the token.
        """
        raise NotImplementedError

    def log_sum_gates(self, projected: Tensor, parameters: Tensor) -> LogSum:
        """What one token, or each of several, does to L."""
        raise NotImplementedError

    system: ClassVar[Any] = None  # (A, B) in place of `gates`, where h = A h + B u and A is not diagonal
    reads_out: ClassVar[bool] = False  # whether the outputs are not simply h
    has_matrices: ClassVar[bool] = False  # in place of h: `matrix_recurrence.py` computes it

    def states_of(self, outputs: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """h (..., D) and L (..., E): `rest` is what the outputs of a scan do not hold of the states."""
        D = outputs.shape[-1]
        return (rest[..., :D], rest[..., D:]) if self.reads_out else (outputs, rest)

    def read_out(self, projected: Tensor, parameters: Tensor, before: Tensor) -> Tensor:
        """The outputs (..., D), where they are not h; before: (..., S), the states before the tokens."""
        raise NotImplementedError

    def log_decay(self, projected: Tensor, parameters: Tensor, log_sums: Tensor) -> Tensor:
        """log |a| of the tokens, from which a memory follows."""
        return self.gates(projected, parameters, log_sums).log_decay

    # (projected, terms, d_log_odds, d_candidate) -> gradients of the blocks of `projected`, for a Convex cell without
    # parameters and log-sums. None leaves it to autograd, which takes longer.
    gates_backward: ClassVar[Any] = None


@dataclass(frozen=True)
class _MinRNN(Cell):
    """What minGRU and minLSTM share. candidate: "g", positive as in the paper, or "linear", of either sign."""

    candidate: str = "g"
    remembers_by = "bias"

    def __post_init__(self):
        if self.candidate not in ("g", "linear"):
            raise ValueError(f"candidate must be 'g' or 'linear', not {self.candidate!r}")
        super().__post_init__()

    def _candidate(self, x: Tensor) -> Tensor:
        return g(x) if self.candidate == "g" else x

    def _through_candidate(self, x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """The gradient of x from d, that of its candidate c."""
        if self.candidate == "linear":
            return d
        # c is sigmoid(x) where x < 0, of slope c * (1 - c). Elsewhere 1, as 1/4 and 3/4.
        is_linear = torch.ge(x, 0, out=torch.empty_like(d))
        return torch.ops.aten.sigmoid_backward(d, c.clamp(max=0.5)).addcmul_(is_linear, d, value=0.75)


@dataclass(frozen=True)
class MinGRU(_MinRNN):
    """a = sigmoid(-gate), c = g(x), projected = [gate | x]."""

    name, label, source = "mingru", "minGRU", "arXiv 2410.01201"
    num_blocks = 2

    def gates(self, projected, parameters, log_sums):
        gate, x = projected.chunk(2, -1)
        return Convex(gate, self._candidate(x))

    def gates_backward(self, projected, terms, d_log_odds, d_candidate):
        return d_log_odds, self._through_candidate(projected.chunk(2, -1)[1], terms.candidate, d_candidate)

    def remembering_gates(self, timescales):
        return torch.log(torch.expm1(1 / timescales))


@dataclass(frozen=True)
class MinLSTM(_MinRNN):
    """a = f / (f + i), f = sigmoid(forget), i = sigmoid(input), c = g(x), projected = [forget | input | x]."""

    name, label, source = "minlstm", "minLSTM", "arXiv 2410.01201"
    num_blocks = 3

    def gates(self, projected, parameters, log_sums):
        forget, input_, x = projected.chunk(3, -1)
        # log i - log f, log sigmoid(x) being min(x, 0) + log sigmoid(|x|). The large parts are subtracted first: far
        # below zero only their difference counts. x - 2 min(x, 0) is |x| with the derivative that fits that of min.
        forget_low, input_low = forget.clamp(max=0), input_.clamp(max=0)
        i, f = (torch.sigmoid(torch.sub(y, low, alpha=2)) for y, low in ((input_, input_low), (forget, forget_low)))
        small = torch.log(i / f)
        return Convex((input_low - forget_low) + small, self._candidate(x))

    def gates_backward(self, projected, terms, d_log_odds, d_candidate):
        forget, input_, x = projected.chunk(3, -1)
        d_forget, d_input = torch.sigmoid(-forget).mul_(d_log_odds).neg_(), torch.sigmoid(-input_).mul_(d_log_odds)
        return d_forget, d_input, self._through_candidate(x, terms.candidate, d_candidate)

    def remembering_gates(self, timescales):
        odds = torch.log(torch.expm1(1 / timescales))
        return torch.cat([-odds, odds])  # i = 1 - f, and so a = f / (f + i) = f


@dataclass(frozen=True)
class SignedMinGRU(Cell):
    """a = tanh(decay), b = sigmoid(gate) * x, projected = [decay | gate | x].

    A negative a flips the state, as counting modulo two needs. |h| <= max |x| / (1 - max |a|).
    """

    name, label, source = "mingru_signed", "signed minGRU", "arXiv 2411.12537"
    num_blocks = 3
    remembers_by = "bias"

    def gates(self, projected, parameters, log_sums):
        decay, gate, x = projected.chunk(3, -1)
        sign = torch.where(decay < 0, -1.0, 1.0).to(decay.dtype)
        size = decay * sign
        size = size + (size < 1e-20) * 1e-20  # log a and its derivative stay finite, and their product right
        double = 2 * size
        # log tanh: of log(1 - exp(-y)) either form is exact on its side of log 2.
        near = torch.log(-torch.expm1(-double.clamp(max=1)))
        far = torch.log1p(-torch.exp(-double.clamp(min=0.5)))
        log_decay = torch.where(double < math.log(2), near, far) - torch.log1p(torch.exp(-double))
        return Linear(log_decay, sigmoid(gate) * x, sign)

    def remembering_gates(self, timescales):
        return torch.atanh(torch.exp(-1 / timescales))


@dataclass(frozen=True)
class _Heads(Cell):
    """num_heads groups of D / num_heads channels."""

    num_heads: int = 1
    splits_by_channel = False

    @property
    def unit(self):
        return self.num_heads


@dataclass(frozen=True)
class Aaren(_Heads):
    """Attention of one constant query a head over the whole past: h is the mean of v, weighted by exp(score).

    L[t] = log(exp(L[t-1]) + exp(score)), a = exp(L[t-1] - L[t]), c = v, projected = [score a head | v].
    """

    name, label, source = "aaren", "Aaren", "arXiv 2405.13956"

    def widths(self, D):
        return self.num_heads, D

    def log_sums(self, D):
        return self.num_heads

    def gates(self, projected, parameters, log_sums):
        score, v = projected.tensor_split([self.num_heads], -1)
        return Convex((score - log_sums).repeat_interleave(v.shape[-1] // self.num_heads, -1), v)

    def log_sum_gates(self, projected, parameters):
        score = projected[..., : self.num_heads]
        return LogSum(score.new_zeros(()), score)


@dataclass(frozen=True)
class RWKV4(Cell):
    """The WKV of RWKV-4: h is the mean of v, weighted by exp(k) and exp(-w) for each token since.

    L[t] = log(exp(L[t-1] - w) + exp(k)), a = exp(L[t-1] - w - L[t]), c = v, projected = [k | v | r], w = exp(decay).
    y = sigmoid(r) * ((1 - p) * h[t-1] + p * v), p = sigmoid(k + bonus - L[t-1]).
    """

    name, label, source = "rwkv4", "RWKV-4", "arXiv 2305.13048"
    num_blocks = 3
    parameter_names = ("decay", "bonus")
    remembers_by = "parameters"
    reads_out = True

    def log_sums(self, D):
        return D

    def gates(self, projected, parameters, log_sums):
        k, v, _ = projected.chunk(3, -1)
        return Convex(k - (log_sums - parameters[0].exp()), v)

    def log_sum_gates(self, projected, parameters):
        return LogSum(-parameters[0].exp(), projected.chunk(3, -1)[0])

    def read_out(self, projected, parameters, before):
        k, v, r = projected.chunk(3, -1)
        h, log_sums = before.chunk(2, -1)
        p = torch.sigmoid(k + parameters[1] - log_sums)
        return torch.sigmoid(r) * (h + p * (v - h))

    def initial_parameters(self, D, layer, num_layers, max_timescale, device):
        i = torch.arange(D, device=device)
        if max_timescale is None:  # as published: from exp(-5) to exp(3), later for the deeper layers
            decay = -5 + 8 * (i / max(D - 1, 1)) ** (0.7 + 1.3 * layer / max(num_layers - 1, 1))
        else:
            decay = -torch.log(log_uniform_timescales(D, max_timescale, device))
        return {"decay": decay, "bonus": math.log(0.3) + 0.5 * ((i + 1) % 3 - 1)}

    @staticmethod
    def state_of(numerator: Tensor, denominator: Tensor, maximum: Tensor) -> Tensor:
        """The state (B, 2 D) of transformers' RWKV state (num, den, max), each (B, D)."""
        return torch.cat([numerator / denominator, maximum + torch.log(denominator)], -1)


@dataclass(frozen=True)
class LRU(Cell):
    """The linear recurrent unit: complex and independent of the input, a = exp(-exp(nu) + i exp(theta)).

    b = exp(gamma) * x, projected = [x real | x imaginary], h = [real | imaginary], N = D / 2 complex numbers.
    """

    name, label, source = "lru", "LRU", "arXiv 2303.06349"
    splits_by_channel = False
    parameter_names = ("nu", "theta", "gamma")
    remembers_by = "parameters"
    unit = 2
    RING = (0.4, 0.999)  # of |a| at the start

    def widths(self, D):
        return D // 2, D // 2

    def parameter_channels(self, D):
        return D // 2

    def gates(self, projected, parameters, log_sums):
        nu, theta, gamma = parameters.unbind(0)
        scale = gamma.exp()
        # A phase adds up over the memory: in float32 one of 1e5 tokens would be off by 1e-3.
        phase = theta.to(carry_dtype(theta.device)).exp()
        return Linear(-nu.exp(), torch.cat([scale, scale]) * projected, phase=phase)

    def initial_parameters(self, D, layer, num_layers, max_timescale, device):
        N = D // 2
        if max_timescale is None:  # |a|^2 uniform over the ring
            least, most = (radius**2 for radius in self.RING)
            rate = -0.5 * torch.log(least + (most - least) * torch.rand(N, device=device))
        else:
            rate = 1 / log_uniform_timescales(N, max_timescale, device)
        theta = torch.log(math.pi * torch.rand(N, device=device).clamp(min=1e-3))
        return {"nu": rate.log(), "theta": theta, "gamma": 0.5 * torch.log(-torch.expm1(-2 * rate))}


@dataclass(frozen=True)
class RGLRU(Cell):
    """The real-gated LRU of Griffin: log a = -8 softplus(decay) sigmoid(r), b = sqrt(1 - a^2) * sigmoid(i) * x.

    projected = [r | i | x]. The first token of a document is not scaled by the root; L, the logarithm of the number
    of tokens so far, tells which that is.
    """

    name, label, source = "rglru", "RG-LRU", "arXiv 2402.19427"
    num_blocks = 3
    parameter_names = ("decay",)
    remembers_by = "parameters"

    def log_sums(self, D):
        return 1

    def gates(self, projected, parameters, log_sums):
        r, i, x = projected.chunk(3, -1)
        log_decay = -8 * softplus(parameters[0]) * sigmoid(r)
        # Of a root of zero the derivative is infinite, and so not a number times that of a saturated gate.
        root = torch.sqrt((-torch.expm1(2 * log_decay)).clamp(min=torch.finfo(r.dtype).tiny))
        root = torch.where(log_sums < NOTHING_SEEN / 2, torch.ones_like(root), root)
        return Linear(log_decay, root * sigmoid(i) * x)

    def log_sum_gates(self, projected, parameters):
        return LogSum(projected.new_zeros(()), projected.new_zeros(()))

    def initial_parameters(self, D, layer, num_layers, max_timescale, device):
        if max_timescale is None:  # a, of r = 1, to the power 1/8: its square uniform from 0.9^2 to 0.999^2
            rate = -0.5 * torch.log(0.81 + (0.999**2 - 0.81) * torch.rand(D, device=device))
        else:
            rate = 1 / (4 * log_uniform_timescales(D, max_timescale, device))  # of r = 0, where sigmoid(r) is 1/2
        return {"decay": torch.log(torch.expm1(rate))}


@dataclass(frozen=True)
class HGRN(Cell):
    """a = l + (1 - l) * sigmoid(forget), c = silu(x), projected = [forget | x], l = sigmoid(bound) learned.

    The lower bound l starts at i / layers in layer i: deeper layers keep what lower ones may forget.
    """

    name, label, source = "hgrn", "HGRN", "arXiv 2311.04823"
    num_blocks = 2
    parameter_names = ("bound",)
    remembers_by = "bias"

    def gates(self, projected, parameters, log_sums):
        forget, x = projected.chunk(2, -1)
        log_kept, log_given = self._log_shares(forget, parameters)
        return Convex(log_given - log_kept, x * sigmoid(x))

    @staticmethod
    def _log_shares(forget: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """log a and log(1 - a); neither exact where it nears 0."""
        bound, rest = F.logsigmoid(parameters[0]), F.logsigmoid(-parameters[0])  # log l, log(1 - l)
        return torch.logaddexp(bound, rest + F.logsigmoid(forget)), rest + F.logsigmoid(-forget)

    def initial_parameters(self, D, layer, num_layers, max_timescale, device):
        bound = max(layer / num_layers, 1e-3)
        initial = {"bound": torch.full((D,), math.log(bound / (1 - bound)), device=device)}
        if max_timescale is not None:
            a = torch.exp(-1 / log_uniform_timescales(D, max_timescale, device))
            share = ((a - bound) / (1 - bound)).clamp(1e-3)  # of sigmoid(forget); a shorter memory than l has none
            initial["bias"] = self.bias_of(torch.logit(share), D)
        return initial


@dataclass(frozen=True)
class _Matrices(_Heads):
    """A state of num_heads matrices, of n = D / num_heads rows and columns each."""

    has_matrices = True

    def state_numbers(self, D):
        return D * D // self.num_heads

    def log_decay(self, projected, parameters, log_sums):
        return super().log_decay(projected, parameters, log_sums).flatten(-2)


@dataclass(frozen=True)
class HGRN2(_Matrices, HGRN):
    """HGRN with a matrix for its state, S = diag(a) S + (1 - a) v^T a head: what the gate lets in is the key to it.

    a as of HGRN, y = S^T silu(q), projected = [forget | v | q]. Each row of S is a mean of v: a head has n = D / heads
    of them, and q says how they are mixed.
    """

    name, label, source = "hgrn2", "HGRN2", "arXiv 2404.07904"
    num_blocks = 3

    def gates(self, projected, parameters, log_sums):
        forget, v, q = projected.chunk(3, -1)
        log_kept, log_given = self._log_shares(forget, parameters)
        terms = F.silu(q), -softplus(log_given - log_kept), log_given.exp(), v
        return Matrix(*(x.unflatten(-1, (self.num_heads, -1)) for x in terms))


@dataclass(frozen=True)
class GatedDelta(_Matrices):
    """The gated delta rule, which replaces what a key finds: S = a S, S = S + rate k (v - S^T k)^T, y = S^T q, a head.

    log a = -exp(decay) softplus(gate + step), rate = 2 sigmoid(r), k and q of length 1 after silu. What S has along k
    is multiplied by a (1 - rate), between -1 and 1. With `householder_steps` such keys a token S is not only reflected
    but turned (arXiv 2502.10297). projected = [gate a head | r a step and head | k a step | v a step | q].
    """

    householder_steps: int = 1
    name, label, source = "gated_delta", "gated DeltaNet", "arXiv 2412.06464"
    parameter_names = ("decay", "step")
    remembers_by = "parameters"

    def widths(self, D):
        steps = self.householder_steps
        return self.num_heads, steps * self.num_heads, steps * D, steps * D, D

    def parameter_channels(self, D):
        return self.num_heads

    def gates(self, projected, parameters, log_sums):
        gate, rate, k, v, q = projected.split(self.blocks(self.state_width(projected.shape[-1])), -1)
        decay, step = parameters.unbind(0)
        log_decay = -decay.exp() * softplus(gate + step)
        rate, k, v = (x.unflatten(-1, (self.householder_steps, self.num_heads, -1)) for x in (rate, k, v))
        q = q.unflatten(-1, (self.num_heads, -1))
        return Matrix(self._unit(q), log_decay[..., None], self._unit(k), v, 2 * sigmoid(rate))

    @staticmethod
    def _unit(x: Tensor) -> Tensor:
        x = F.silu(x)
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def initial_parameters(self, D, layer, num_layers, max_timescale, device):
        heads = self.num_heads
        if max_timescale is None:  # as of Mamba-2, whose gates these are
            steps = 0.1 * torch.exp(math.log(0.01) * torch.rand(heads, device=device))
            decay = torch.log(1 + 15 * torch.rand(heads, device=device))
        else:
            steps = 1 / log_uniform_timescales(heads, max_timescale, device)
            decay = torch.zeros(heads, device=device)
        return {"decay": decay, "step": torch.log(torch.expm1(steps))}


@dataclass(frozen=True)
class LMU(Cell):
    """The Legendre memory: the last `memory_window` tokens of each channel of u, as `memory_order` polynomials.

    h[t] = A h[t-1] + B u[t], projected = u, D / order channels, and h the `order` numbers of each in turn. A and B are
    fixed: the zero-order hold of window * m' = A_0 m + B_0 u. A is not diagonal, and cannot be made so: the condition
    of its eigenvectors passes 1e8 at order 16.
    """

    memory_order: int = 1
    memory_window: float = 256
    name, label, source = "lmu", "LMU", "arXiv 2102.11417"
    splits_by_channel = False

    @property
    def unit(self):
        return self.memory_order

    def widths(self, D):
        return (D // self.memory_order,)

    def log_decay(self, projected, parameters, log_sums):
        return projected.new_full((1,), -1 / self.memory_window)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "system", self._system(self.memory_order, self.memory_window))

    @staticmethod
    @functools.cache
    def _system(order: int, window: float) -> tuple[np.ndarray, np.ndarray]:
        """A (order, order) and B (order,), float64."""
        row, column = np.arange(order)[:, None], np.arange(order)
        signs = np.where(row < column, -1.0, (-1.0) ** (row - column + 1))
        generator = np.zeros((order + 1, order + 1))
        generator[:-1, :-1], generator[:-1, -1:] = signs, (-1.0) ** row
        generator[:-1] *= (2 * row + 1) / window
        exponential = torch.linalg.matrix_exp(torch.from_numpy(generator)).numpy()  # [[A, B], [0, 1]]
        return exponential[:-1, :-1], exponential[:-1, -1]


CELLS: dict[str, type[Cell]] = {
    cell.name: cell for cell in (MinGRU, MinLSTM, SignedMinGRU, Aaren, RWKV4, LRU, RGLRU, HGRN, HGRN2, GatedDelta, LMU)
}


@dataclass(frozen=True)
class _Given(Cell):
    """What `scan.linear_scan` is given: log_decay, then "sign" or "phase" where `turned` says so, then inflow."""

    turned: str = ""
    name, label, source = "linear", "linear", "scan.linear_scan"

    def state_width(self, projected_width):
        return projected_width // (3 if self.turned == "sign" else 2)

    def gates(self, projected, parameters, log_sums):
        if self.turned == "phase":
            log_decay, phase, inflow = projected.tensor_split([projected.shape[-1] // 4, projected.shape[-1] // 2], -1)
            return Linear(log_decay, inflow, phase=phase)
        log_decay, *sign, inflow = projected.chunk(3 if self.turned else 2, -1)
        return Linear(log_decay, inflow, *sign)


PRIMITIVES = {cell.spec: cell for cell in (_Given(), _Given("sign"), _Given("phase"))}

_known: dict[str, Cell] = PRIMITIVES | {name: cell() for name, cell in CELLS.items()}  # by spec


def cell_of(spec: str) -> Cell:
    """The cell that a name, or `Cell.spec`, stands for. Raises ValueError for an unknown one."""
    if spec not in _known:
        name, *options = spec.split(":")
        if name not in CELLS:
            raise ValueError(f"cell_type must be one of {sorted(CELLS)}, not {name!r}")
        types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(CELLS[name])}
        _known[spec] = CELLS[name](**{key: types[key](value) for key, value in (x.split("=") for x in options)})
    return _known[spec]
