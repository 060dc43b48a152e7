"""How fast does one recurrent layer train on one CPU thread, against nn.GRU and nn.LSTM?

Timed: forward and backward (gradients of the input and of every weight) of one layer of equal input and hidden size,
batch first, fp32. A minRNN layer here is the linear map from the input to gates and candidate, then the scan: what
nn.GRU computes, without output projection, convolution or MLP. Its outputs and gradients are first compared with the
same layer on the loop; nn.GRU and nn.LSTM are other functions and stay unverified.

speedup_of_linear_alone: what the speedup would be if the scan took no time.

Targets, minGRU over nn.GRU and minLSTM over nn.LSTM:
torch >= 2.5x the speed at (10, 100, 64, 1000) and >= 1.5x everywhere; numba >= 4.5x and >= 2x.

    python benchmarks/layer.py [--only 10,100,64,1000] [--rounds 11] [--matmul-precision medium]

--matmul-precision medium: after torch.set_float32_matmul_precision("medium") nn.Linear is computed by oneDNN, as
nn.LSTM always is. On a CPU with AMX that is in bfloat16, which the check of the errors refuses to time.
"""

import copy

import torch
from harness import Bound, Report, interleave, parser, relative_error, timed, verify
from torch import nn

from modeling_minrnn.cells import cell_of
from modeling_minrnn.scan import minrnn_scan

CASES = [(10, 100, 64, 1000), (128, 128, 64, 128), (128, 128, 64, 512), (128, 128, 8, 4096), (512, 512, 8, 1000)]
FIRST = CASES[0]
SPEEDUPS = {"torch": (1.5, 2.5), "numba": (2, 4.5)}  # elsewhere, at FIRST
BASELINES = {"mingru": nn.GRU, "minlstm": nn.LSTM}
TOLERANCE = 1e-5  # fp32 sums over B T rows in the weights' gradients


class MinRNNLayer(nn.Module):
    def __init__(self, input_size: int, hidden_size: int, cell_type: str, backend: str):
        super().__init__()
        self.projection = nn.Linear(input_size, sum(cell_of(cell_type).blocks(hidden_size)))
        self.cell_type = cell_type
        self.backend = backend

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return minrnn_scan(self.projection(x), self.cell_type, backend=self.backend)


def forward_backward(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """The outputs, and the gradients of sum(outputs * gradient) for the input and every weight."""
    outputs, _ = layer(x)
    return [outputs.detach(), *torch.autograd.grad(outputs, [x, *layer.parameters()], gradient)]


def linear_alone(linear: nn.Linear, x: torch.Tensor, gradient: torch.Tensor) -> None:
    torch.autograd.grad(linear(x), [x, *linear.parameters()], gradient)


def with_backend(layer: MinRNNLayer, backend: str) -> MinRNNLayer:
    twin = copy.deepcopy(layer)
    twin.backend = backend
    return twin


def measure(report: Report, case: tuple[int, int, int, int], cell_type: str) -> None:
    input_size, hidden_size, B, T = case
    torch.manual_seed(0)
    x = torch.randn(B, T, input_size, requires_grad=True)
    gradient = torch.randn(B, T, hidden_size)
    linear_gradient = torch.randn(B, T, sum(cell_of(cell_type).blocks(hidden_size)))
    loop = MinRNNLayer(input_size, hidden_size, cell_type, "loop")
    baseline = BASELINES[cell_type](input_size, hidden_size, batch_first=True)

    # In fp32 too: g has a kink at 0, and a candidate within rounding of 0 may fall on the other side in float64.
    oracle = forward_backward(loop, x, gradient)
    contenders = {
        "baseline": timed(lambda: forward_backward(baseline, x, gradient)),
        "linear": timed(lambda: linear_alone(loop.projection, x, linear_gradient)),
    }
    for backend in SPEEDUPS:
        layer = with_backend(loop, backend)
        error = relative_error(forward_backward(layer, x, gradient), oracle)
        verify(f"{backend} {cell_type} {case}", error, TOLERANCE)
        contenders[backend] = timed(lambda layer=layer: forward_backward(layer, x, gradient))
    samples = interleave(contenders, report.options.rounds)
    for backend, speedups in SPEEDUPS.items():
        report.add(
            input_hidden_batch_time=",".join(map(str, case)),
            cell=cell_type,
            backend=backend,
            matmul_precision=report.options.matmul_precision,
            ms=1e3 * samples.seconds(backend),
            baseline=BASELINES[cell_type].__name__,
            baseline_ms=1e3 * samples.seconds("baseline"),
            speedup=Bound(samples.ratio("baseline", backend), at_least=speedups[case == FIRST]),
            speedup_of_linear_alone=samples.ratio("baseline", "linear"),
        )


def main() -> None:
    flags = parser("layer", __doc__, rounds=11)
    flags.add_argument("--matmul-precision", choices=["highest", "medium"], default="highest")
    options = flags.parse_args()
    torch.set_float32_matmul_precision(options.matmul_precision)
    report = Report(options)
    for case in CASES:
        for cell_type in BASELINES:
            if report.wants(f"{','.join(map(str, case))} {cell_type}"):
                measure(report, case, cell_type)
    report.print_table()


if __name__ == "__main__":
    main()
