"""How fast does one recurrent layer train on one CPU thread, against nn.GRU and nn.LSTM?

Timed: forward and backward (gradients of the input and of every weight) of one layer, batch first, fp32: MinGRU
against nn.GRU, MinLSTM against nn.LSTM. B "packed" rows have lengths of 1 to T, evenly spread, as a PackedSequence.
Outputs and gradients are first compared with the same layer on the loop; nn.GRU and nn.LSTM are other functions and
stay unverified.

speedup_of_linear_alone: what the speedup would be if the scan took no time.

Targets, minGRU over nn.GRU and minLSTM over nn.LSTM:
torch >= 2.5x the speed at (10, 100, 64, 1000) and >= 1.5x everywhere; numba >= 5x and >= 2x.

    python benchmarks/layer.py [--only 10,100,64,1000] [--rounds 11] [--matmul-precision medium]

--matmul-precision medium: after torch.set_float32_matmul_precision("medium") nn.Linear is computed by oneDNN, as
nn.LSTM always is. On a CPU with AMX that is in bfloat16, which the check of the errors refuses to time.
"""

import copy

import torch
from harness import Bound, Report, interleave, parser, relative_error, timed, verify
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from modeling_minrnn import MinGRU, MinLSTM, MinRNN

# input size, hidden size, B, T
CASES = [(10, 100, 64, 1000), (128, 128, 64, 128), (128, 128, 64, 512), (128, 128, 8, 4096), (512, 512, 8, 1000)]
PACKED_CASES = [(64, 128, 512, 64), (64, 128, 64, 512)]
FIRST = CASES[0]
SPEEDUPS = {"torch": (1.5, 2.5), "numba": (2, 5)}  # elsewhere, at FIRST
LAYERS = {"mingru": (MinGRU, nn.GRU), "minlstm": (MinLSTM, nn.LSTM)}
TOLERANCE = 1e-5  # fp32 sums over B T rows in the weights' gradients


def forward_backward(layer: nn.Module, x: torch.Tensor, sequence, gradient: torch.Tensor) -> list[torch.Tensor]:
    """The outputs, and the gradients of sum(outputs * gradient) for x, which `sequence` holds, and every weight."""
    outputs, _ = layer(sequence)
    data = outputs.data if isinstance(outputs, PackedSequence) else outputs
    return [data.detach(), *torch.autograd.grad(data, [x, *layer.parameters()], gradient)]


def linear_alone(linear: nn.Linear, x: torch.Tensor, gradient: torch.Tensor) -> None:
    torch.autograd.grad(linear(x), [x, *linear.parameters()], gradient)


def with_backend(layer: MinRNN, backend: str) -> MinRNN:
    twin = copy.deepcopy(layer)
    twin.backend = backend
    return twin


def measure(report: Report, case: tuple[int, int, int, int], cell_type: str, packed: bool) -> None:
    input_size, hidden_size, B, T = case
    torch.manual_seed(0)
    x = torch.randn(B, T, input_size)
    if packed:
        lengths = torch.linspace(1, T, B).round().long()[torch.randperm(B)]
        sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x = sequence.data.requires_grad_()
        sequence = sequence._replace(data=x)
    else:
        sequence = x.requires_grad_()
    module, reference = LAYERS[cell_type]
    loop = module(input_size, hidden_size, batch_first=True, backend="loop")
    baseline = reference(input_size, hidden_size, batch_first=True)
    linear = loop.projections[0].in_proj
    gradient = torch.randn(*x.shape[:-1], hidden_size)
    linear_gradient = torch.randn(*x.shape[:-1], linear.out_features)

    # In fp32 too: g has a kink at 0, and a candidate within rounding of 0 may fall on the other side in float64.
    oracle = forward_backward(loop, x, sequence, gradient)
    contenders = {
        "baseline": timed(lambda: forward_backward(baseline, x, sequence, gradient)),
        "linear": timed(lambda: linear_alone(linear, x, linear_gradient)),
    }
    for backend in SPEEDUPS:
        layer = with_backend(loop, backend)
        error = relative_error(forward_backward(layer, x, sequence, gradient), oracle)
        verify(f"{backend} {cell_type} {case}", error, TOLERANCE)
        contenders[backend] = timed(lambda layer=layer: forward_backward(layer, x, sequence, gradient))
    samples = interleave(contenders, report.options.rounds)
    for backend, speedups in SPEEDUPS.items():
        report.add(
            input_hidden_batch_time=",".join(map(str, case)),
            packed=packed,
            cell=cell_type,
            backend=backend,
            matmul_precision=report.options.matmul_precision,
            ms=1e3 * samples.seconds(backend),
            baseline=reference.__name__,
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
    for case in CASES + PACKED_CASES:
        packed = case in PACKED_CASES
        for cell_type in LAYERS:
            if report.wants(f"{','.join(map(str, case))} {cell_type}" + " packed" * packed):
                measure(report, case, cell_type, packed)
    report.print_table()


if __name__ == "__main__":
    main()
