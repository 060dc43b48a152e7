"""MinGRU, MinLSTM and MinRNN in the place of nn.GRU: against the float64 oracle, sequence by sequence, and nn.GRU's
own shapes."""

import oracle
import pytest
import torch
from cases import CASES, oracle_arguments, width
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime import InferenceSession
from oracle import relative_error
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from modeling_minrnn import MinGRU, MinLSTM, MinRNN
from modeling_minrnn.cells import CELLS, HGRN, Aaren
from modeling_minrnn.cells import MinGRU as MinGRUCell
from modeling_minrnn.cells import MinLSTM as MinLSTMCell
from modeling_minrnn.export import DECOMPOSITIONS

TOLERANCE = 3e-6
C = 5
every_cell = pytest.mark.parametrize("cell", CASES.values(), ids=CASES)
every_convex_cell = pytest.mark.parametrize(
    "cell", [MinGRUCell(), MinLSTMCell("linear"), HGRN()], ids=lambda c: c.spec
)


def layer(cell, channels=4, **options) -> MinRNN:
    torch.manual_seed(0)
    rnn = MinRNN(C, width(cell, channels), cell_type=cell, **options)
    with torch.no_grad():
        for parameter in rnn.parameters():  # none at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return rnn


def alone(rnn, x, hx=None):
    """Of one sequence (T, C), from states (L, S), in float64: output and final states."""
    finals, D = [], rnn.hidden_size
    directions = 1 + rnn.bidirectional
    for i, projection in enumerate(rnn.projections):
        linear = projection.in_proj
        if i % directions == 0:
            read, outputs = x, []
        turned = read.flip(0) if i % directions else read
        projected = turned @ linear.weight.double().T + (0 if linear.bias is None else linear.bias.double())
        parameters = [getattr(projection, name).double() for name in rnn.cell.parameter_names]
        start = rnn.cell.start(D, torch.float64, x.device)[None] if hx is None else hx[i, None]
        output, final = oracle.scan(
            projected[None],
            initial_state=start,
            parameters=torch.stack(parameters) if parameters else None,
            **oracle_arguments(rnn.cell),
        )
        outputs.append(output[0].flip(0) if i % directions else output[0])
        finals.append(final[0])
        x = torch.cat(outputs, -1)
    return x, torch.stack(finals)


def documents_alone(rnn, x, hx, starts):
    """As `alone`, of a sequence whose documents begin at `starts`, of which the first is 0."""
    outputs, finals = [], []
    parts = x.split([stop - start for start, stop in zip(starts, [*starts[1:], len(x)])])
    directions = 1 + rnn.bidirectional
    fresh = rnn.cell.start(rnn.hidden_size, torch.float64, x.device).expand(len(rnn.projections), -1)
    given = fresh if hx is None else hx
    for n, part in enumerate(parts):
        is_outermost = [n == (len(parts) - 1 if i % directions else 0) for i in range(len(rnn.projections))]
        state = torch.where(torch.tensor(is_outermost)[:, None], given, fresh)
        output, final = alone(rnn, part, state)
        outputs.append(output)
        finals.append(final)
    final = [finals[0 if i % directions else -1][i] for i in range(len(rnn.projections))]
    return torch.cat(outputs), torch.stack(final)


def gradients(outputs, h_n, tensors):
    """Of a sum with random weights, alike for equal shapes."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in outputs)
    loss = loss + (h_n.double() * torch.randn(h_n.shape, generator=generator, dtype=torch.float64)).sum()
    return torch.autograd.grad(loss, tensors)


@every_cell
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    layout=st.sampled_from(["packed", "sorted", "rows"]),
    with_state=st.booleans(),
    with_resets=st.booleans(),
    data=st.data(),
)
def test_outputs_states_and_gradients_are_those_of_each_sequence_alone(
    cell, lengths, num_layers, bidirectional, batch_first, bias, layout, with_state, with_resets, data
):
    if layout == "rows":
        lengths = [lengths[0]] * len(lengths)
    if layout == "sorted":
        lengths = sorted(lengths, reverse=True)
    rnn = layer(cell, num_layers=num_layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
    B, T = len(lengths), max(lengths)
    sequences = [torch.randn(length, C, requires_grad=True) for length in lengths]
    hx = torch.randn(len(rnn.projections), B, rnn.state_size).requires_grad_() if with_state else None
    reset_mask = torch.zeros(B, T, dtype=torch.bool)
    starts = [[0]] * B
    if with_resets:
        starts = [[0, *sorted(data.draw(st.sets(st.integers(1, T - 1))))] if T > 1 else [0] for _ in lengths]
        starts = [[start for start in row if start < length] for row, length in zip(starts, lengths)]
        for mask, row in zip(reset_mask, starts):
            mask[row[1:]] = True
    given_mask = reset_mask if with_resets else None

    if layout == "rows":
        x = torch.stack(sequences, 0 if batch_first else 1)
        output, h_n = rnn(x, hx, reset_mask=given_mask)
        outputs = list(output.unbind(0 if batch_first else 1))
    else:
        output, h_n = rnn(pack_sequence(sequences, enforce_sorted=layout == "sorted"), hx, reset_mask=given_mask)
        outputs = unpack_sequence(output)
    expected = [
        documents_alone(rnn, x.double(), None if hx is None else hx[:, b].double(), row)
        for b, (x, row) in enumerate(zip(sequences, starts))
    ]
    expected_outputs, finals = zip(*expected)
    expected_h_n = torch.stack(finals, 1)
    assert relative_error(torch.cat(outputs), torch.cat(expected_outputs)) < TOLERANCE
    assert relative_error(h_n, expected_h_n) < TOLERANCE
    tensors = [*sequences, *([] if hx is None else [hx]), *rnn.parameters()]
    for found, right in zip(gradients(outputs, h_n, tensors), gradients(expected_outputs, expected_h_n, tensors)):
        assert (found - right).norm() <= 10 * TOLERANCE * (1 + right.norm())  # a sum over all tokens


@every_cell
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_a_sequence_in_parts_and_step_by_step_is_the_whole(cell, batch_first):
    rnn = layer(cell, num_layers=2, batch_first=batch_first)
    x, reset_mask = torch.randn(3, 11, C), torch.rand(3, 11) < 0.2
    deltas = 2 * torch.rand(3, 11) if cell.name in ("mingru", "minlstm", "hgrn", "lru") else None
    time = 1 if batch_first else 0

    def given(part):
        return {"reset_mask": reset_mask[:, part], "time_deltas": None if deltas is None else deltas[:, part]}

    def laid_out(x):
        return x if batch_first else x.transpose(0, 1)

    whole, h_n = rnn(laid_out(x), **given(slice(None)))
    h, outputs = None, []
    for part in (slice(0, 4), slice(4, 5), slice(5, 11)):
        output, h = rnn(laid_out(x[:, part]), h, **given(part))
        outputs.append(output)
    assert relative_error(torch.cat(outputs, time), whole) < TOLERANCE
    assert relative_error(h, h_n) < TOLERANCE
    h, outputs = None, []
    for t in range(11):
        output, h = rnn.step(x[:, t], h, **given(t))
        outputs.append(output)
    assert relative_error(torch.stack(outputs, time), whole) < TOLERANCE
    assert relative_error(h, h_n) < TOLERANCE
    one, h_of_one = rnn(x[1], reset_mask=reset_mask[1], time_deltas=None if deltas is None else deltas[1])
    assert relative_error(one, laid_out(whole)[1] if batch_first else whole[:, 1]) < TOLERANCE
    assert relative_error(h_of_one, h_n[:, 1]) < TOLERANCE
    stepped, _ = rnn.step(x[1, 0], time_deltas=None if deltas is None else deltas[1, 0])
    assert relative_error(stepped, one[0]) < TOLERANCE


@every_convex_cell
def test_a_step_after_n_units_of_time_is_n_steps_of_the_same_input(cell):
    """What a unit of time does is not changed by how it is counted; after no time nothing has changed."""
    rnn = layer(cell, batch_first=True).double()
    x = torch.randn(1, 7, C, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([1, 3, 0, 1, 20, 2, 0])
    output, h_n = rnn(x, time_deltas=counts[None].double())
    repeated, expected_h_n = rnn(x.repeat_interleave(counts, 1))
    expected = torch.cat([repeated[:, :1], repeated], 1)[:, counts.cumsum(0)]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_n, expected_h_n)
    tensors = [x, *rnn.parameters()]
    pairs = zip(gradients([output], h_n, tensors), gradients([expected], expected_h_n, tensors))
    for found, right in pairs:
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("is_even", [False, True])
def test_over_time_an_lru_turns_and_fades_by_the_time_that_passed_since_each_input(is_even):
    """However many steps: the roundings of the phases do not add up. Worst error 2e-7; else 2e-5."""
    torch.manual_seed(0)
    rnn = MinRNN(C, 16, batch_first=True, cell_type="lru", max_timescale=100_000)
    projection, x = rnn.projections[0], torch.randn(1, 3000, C)
    deltas = torch.full((1, 3000), 1.37) if is_even else 3 * torch.rand(1, 3000)
    nu, theta, gamma = (getattr(projection, name).double() for name in ("nu", "theta", "gamma"))
    linear = projection.in_proj
    inflow = torch.complex(*(x[0].double() @ linear.weight.double().T + linear.bias.double()).chunk(2, -1))
    times = deltas[0].double().cumsum(0)
    since = (times[1::100, None] - times)[..., None]  # at some of the times, (30, 3000, 1)
    fades = torch.exp(-since.clamp(min=0) * nu.exp()) * (since >= 0)
    expected = torch.einsum("tsn,sn->tn", torch.polar(fades, since * theta.exp()), gamma.exp() * inflow)
    output, _ = rnn(x, time_deltas=deltas)
    output = output[0, 1::100]
    expected = torch.cat([expected.real, expected.imag], -1)
    assert relative_error(output, expected) < TOLERANCE
    tensors = [*rnn.parameters()]
    pairs = zip(gradients([output], output[:0], tensors), gradients([expected], expected[:0], tensors))
    for found, right in pairs:
        assert relative_error(found, right) < 10 * TOLERANCE, relative_error(found, right)


@every_convex_cell
def test_time_deltas_of_any_size_leave_values_and_gradients_finite_and_right_to_float32(cell):
    rnn = layer(cell, batch_first=True)
    with torch.no_grad():
        rnn.projections[0].in_proj.weight[: len(rnn.projections[0].in_proj.weight) - 4].mul_(60)  # gates saturate
    x = torch.randn(2, 40, C)
    deltas = torch.tensor([0, 1e-6, 0.3, 1, 7, 1e4]).repeat(14)[:80].view(2, 40)
    expected, _ = rnn.double()(x.double(), time_deltas=deltas.double())
    output, h_n = rnn.float()(x, time_deltas=deltas)
    assert relative_error(output, expected) < TOLERANCE
    for gradient in gradients([output], h_n, list(rnn.parameters())):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("ours, theirs", [(MinGRU, nn.GRU), (MinLSTM, nn.LSTM)])
def test_arguments_and_shapes_are_those_of_torch(ours, theirs, batch_first, num_layers, bidirectional):
    arguments = C, 8, num_layers, True, batch_first, 0.0, bidirectional  # by position
    rnn, reference = (module(*arguments, device="cpu", dtype=torch.float64) for module in (ours, theirs))
    packed = pack_sequence([torch.randn(n, C, dtype=torch.float64) for n in (2, 7, 4)], enforce_sorted=False)
    for x in (torch.randn(3, 6, C, dtype=torch.float64), torch.randn(6, C, dtype=torch.float64), packed):
        output, h_n = rnn(x)
        expected, states = reference(x)
        expected_h_n = states[0] if theirs is nn.LSTM else states
        if isinstance(x, PackedSequence):
            for found, right in zip(output[1:], expected[1:]):
                assert torch.equal(found, right)
            output, expected = output.data, expected.data
        assert output.shape == expected.shape and h_n.shape == expected_h_n.shape
        assert output.dtype == h_n.dtype == torch.float64
        again, _ = rnn(x, h_n)
        assert (again.data - output).abs().max() > 0
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(rnn, name) == getattr(reference, name)
    rnn.flatten_parameters()


def test_the_names_of_the_parameters_stay():
    rnn = MinRNN(C, 4, num_layers=2, bidirectional=True, cell_type="rwkv4")
    vectors = ("decay", "bonus", "in_proj.weight", "in_proj.bias")
    assert sorted(rnn.state_dict()) == sorted(f"projections.{i}.{name}" for i in range(4) for name in vectors)
    assert rnn.projections[3].in_proj.in_features == 8
    assert "in_proj.bias" not in MinGRU(C, 4, bias=False).projections[0].state_dict()


def test_dropout_is_between_layers_and_in_training_alone():
    rnn = MinGRU(C, 64, num_layers=2, batch_first=True, dropout=0.5)
    x, seen = torch.randn(2, 9, C), []
    rnn.projections[1].in_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        rnn(x)
        output, _ = rnn.eval()(x)
    dropped, kept = seen
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(dropped[dropped != 0], 2 * kept[dropped != 0])
    assert (output != 0).all()
    with pytest.warns(UserWarning, match="dropout is applied between layers, and num_layers is 1"):
        MinGRU(C, 4, dropout=0.5)


@pytest.mark.parametrize("cell_type", ["mingru", "minlstm", "hgrn", "rwkv4", "rglru", "lru", "mingru_signed"])
def test_memories_at_the_start_reach_as_far_as_asked(cell_type):
    torch.manual_seed(0)
    rnn = MinRNN(C, 512, cell_type=cell_type, max_timescale=1000)
    projection = rnn.projections[0]
    projected = projection.in_proj(torch.zeros(1, C))
    if rnn.cell.remembers_by == "parameters":
        projected = torch.zeros_like(projected)
    log_sums = rnn.cell.start(512, torch.float32, projected.device)[512:]
    if cell_type == "rwkv4":
        rate = projection.decay.exp()
    else:
        rate = -rnn.cell.log_decay(projected, projection.parameters_of_cell(projected), log_sums)
    timescales = 1 / rate
    assert timescales.max() < 1001 and 500 < timescales.max() and 15 < timescales.median() < 60


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch.export, of itself
@pytest.mark.parametrize("cell", [MinGRUCell(), Aaren(2)], ids=lambda c: c.spec)
def test_compiled_exported_and_in_onnx_it_computes_the_same(cell, tmp_path):
    rnn = layer(cell, bidirectional=True, batch_first=True).eval()
    x = torch.randn(2, 9, C)
    with torch.no_grad():
        expected = rnn(x)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")(x)
    dynamic = {"input": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", min=2)}}
    with torch.no_grad():
        program = torch.export.export(rnn, (x,), dynamic_shapes=dynamic)
        onnx = torch.onnx.export(program.run_decompositions(DECOMPOSITIONS), dynamo=True, verbose=False)
    onnx.save(tmp_path / "layer.onnx")
    session = InferenceSession(tmp_path / "layer.onnx")
    longer = torch.randn(3, 17, C)
    with torch.no_grad():
        expected_longer = rnn(longer)
    for found, right in (
        (compiled, expected),
        (program.module()(longer), expected_longer),
        (session.run(None, {session.get_inputs()[0].name: longer.numpy()}), expected_longer),
    ):
        for tensor, expected_tensor in zip(found, right, strict=True):
            assert relative_error(torch.as_tensor(tensor), expected_tensor) < TOLERANCE


@every_cell
def test_under_autocast_it_computes_in_bfloat16_and_carries_the_state_in_float32(cell):
    rnn = layer(cell, batch_first=True)
    x = torch.randn(2, 9, C)
    expected, _ = rnn(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = rnn(x)
    assert output.dtype == torch.bfloat16 and h_n.dtype == torch.float32
    assert relative_error(output, expected) < 0.03
    output.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())


GRU = MinGRU(C, 4)
X = torch.randn(6, 3, C)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MinGRU(0, 4), "input_size must be at least 1, not 0"),
        (lambda: MinGRU(C, 4, 0), "num_layers must be at least 1, not 0"),
        (lambda: MinGRU(C, 4, 2, dropout=1.0), r"dropout must be in \[0, 1\), not 1.0"),
        (lambda: MinRNN(C, 4, cell_type="gru"), "cell_type must be one of .*, not 'gru'"),
        (lambda: MinRNN(C, 5, cell_type="lru"), "the state width must be a multiple of 2 for 'lru', not 5"),
        (lambda: MinGRU(C, 4, max_timescale=0.5), "max_timescale must be None or a number of steps >= 1, not 0.5"),
        (lambda: MinGRU(C, 4, bias=False, max_timescale=9), "max_timescale .* by a bias that is not there"),
        (lambda: MinRNN(C, 4, cell_type="lmu", max_timescale=9), "max_timescale .* by a cell that is not there"),
        (lambda: GRU(torch.randn(6, 3, 4)), r"T >= 1 steps of 5 features, not \(3, 6, 4\)"),
        (lambda: GRU(torch.randn(0, 3, C)), r"T >= 1 steps of 5 features, not \(3, 0, 5\)"),
        (lambda: GRU(X, (torch.zeros(1, 3, 4),) * 2), "hx must be one tensor of states"),
        (lambda: GRU(X, torch.zeros(1, 2, 4)), r"hx must be \(1, 3, 4\), not \(1, 2, 4\)"),
        (
            lambda: GRU(X, reset_mask=torch.zeros(6, 3, dtype=torch.bool)),
            r"reset_mask must be bool \(B, T\) = \(3, 6\)",
        ),
        (lambda: GRU(X, time_deltas=torch.ones(6, 3)), r"time_deltas must be \(B, T\) = \(3, 6\), not \(6, 3\)"),
        (lambda: GRU(X, time_deltas=-torch.ones(3, 6)), "time_deltas must be at least 0, not -1.0"),
        *(
            (
                lambda name=name: MinRNN(C, 4, cell_type=name)(X, time_deltas=torch.ones(3, 6)),
                f"time_deltas are for mingru, minlstm, hgrn and lru, not for '{name}'",
            )
            for name in sorted(CELLS.keys() - {"mingru", "minlstm", "hgrn", "lru"})
        ),
        (
            lambda: MinGRU(C, 4, bidirectional=True)(X, time_deltas=torch.ones(3, 6)),
            "not for a bidirectional layer",
        ),
        (lambda: MinGRU(C, 4, bidirectional=True).step(X[0]), "a bidirectional layer reads whole sequences"),
        (lambda: GRU.step(X), r"a step must be \(B, 5\) or \(5,\), not \(6, 3, 5\)"),
    ],
)
def test_what_does_not_fit_is_an_error_of_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
