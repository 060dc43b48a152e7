"""One sequence over several processes computes what one process does: outputs, states, losses and gradients.

Each test asks for a part of what the processes measured in a single launch; there are few tests, as two workers that
share them out would each measure everything.
"""

import copy
import itertools

import oracle
import pytest
import torch
import torch.distributed as dist
from processes import run_in_processes
from small_models import CELLS, GATES, SHAPES, random_ids, small_model
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache

from modeling_minrnn import minrnn_scan

PROCESSES = 4
B, D = 2, 5
CHUNKS = {2: (13, 4), 4: (7, 1, 16, 2)}  # shorter than a convolution window, too
TOLERANCE = 1e-5  # relative L2, in float32; the worst seen is 2e-7 in outputs and 3e-6 in gradients
MASKS = ("plain", "reset", "padding", "both")


def chunk(x, group):
    """This rank's part of a tensor."""
    return x.split(CHUNKS[group.size()], 1)[group.rank()].contiguous()


def gathered(x, group):
    """The chunks of all ranks, put together."""
    chunks = [None] * group.size()
    dist.all_gather_object(chunks, x.detach(), group)
    return torch.cat(chunks, 1)


def summed(x, group):
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def masks(name, T):
    """reset_mask and padding_mask, (B, T) or None: whole chunks of padding, documents that begin with a chunk."""
    reset_mask = oracle.random_mask(B, T, seed=1, share=0.1)
    reset_mask[0, CHUNKS[4][0]] = reset_mask[1, CHUNKS[2][0]] = True
    padding_mask = oracle.random_mask(B, T, seed=2, share=0.3)
    padding_mask[1, 8:24] = True
    padding_mask[0, -2:] = True
    return reset_mask if name in ("reset", "both") else None, padding_mask if name in ("padding", "both") else None


def scan_errors(group, cell_type, backend, mask):
    """Errors of the states, the final state and all gradients, of a loss over every state and the final one."""
    T = sum(CHUNKS[group.size()])
    projected = oracle.normal(B, T, GATES[cell_type] * D, seed=3) * 3
    projected[..., 0] -= 40 if cell_type == "mingru" else 0  # a channel that remembers everything
    leaves = [projected, oracle.normal(B, D, seed=4), oracle.normal(D, seed=5)]
    d_states, d_final = oracle.normal(B, T, D, seed=6), oracle.normal(B, D, seed=7)
    reset_mask, padding_mask = masks(mask, T)

    exact = [leaf.double().requires_grad_() for leaf in leaves]
    expected, expected_final = oracle.scan(exact[0], cell_type, exact[1], reset_mask, padding_mask, exact[2])
    ((expected * d_states).sum() + (expected_final * d_final).sum()).backward()

    own = [chunk(leaves[0], group).clone(), *leaves[1:]]
    own = [leaf.requires_grad_() for leaf in own]
    states, final_state = minrnn_scan(
        own[0],
        cell_type,
        own[1],
        reset_mask=None if reset_mask is None else chunk(reset_mask, group),
        padding_mask=None if padding_mask is None else chunk(padding_mask, group),
        reset_state=own[2],
        backend=backend,
        group=group,
    )
    ((states * chunk(d_states, group)).sum() + (final_state * d_final).sum()).backward()
    pairs = [(gathered(states, group), expected), (final_state, expected_final)]
    pairs += [(gathered(own[0].grad, group), exact[0].grad), (summed(own[1].grad, group), exact[1].grad)]
    if reset_mask is not None:
        pairs.append((summed(own[2].grad, group), exact[2].grad))
    return [oracle.relative_error(actual, wanted) for actual, wanted in pairs]


def model_inputs(group, mask):
    T = sum(CHUNKS[group.size()])
    ids = random_ids(B, T + 1)
    reset_mask, padding_mask = masks(mask, T)
    ignored = ids[:, 1:] % 5 == 0 if padding_mask is None else padding_mask
    targets = ids[:, 1:].masked_fill(ignored, -100)
    whole = {"input_ids": ids[:, :-1], "labels": targets, "shift_labels": targets}
    if reset_mask is not None:
        whole["reset_mask"] = reset_mask
    if padding_mask is not None:
        whole["attention_mask"] = ~padding_mask
    own = {name: chunk(tensor, group) for name, tensor in whole.items()}
    items = {"num_items_in_batch": (targets != -100).sum()}
    return whole | items, own | items


def model_errors(group, cell_type, shape, mask):
    model = small_model(cell_type, **shape)
    whole, own = model_inputs(group, mask)
    reference = copy.deepcopy(model)
    expected = reference(**whole)
    expected.loss.backward()
    output = model(**own, context_parallel_group=group)
    output.loss.backward()
    real = whole.get("attention_mask", torch.ones(1)) != 0
    logits = gathered(output.logits, group)
    pairs = [
        (summed(output.loss, group), expected.loss),
        (logits * real[..., None], expected.logits * real[..., None]),
    ]
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        pairs.append((summed(parameter.grad, group), other.grad))
    return [oracle.relative_error(actual, wanted) for actual, wanted in pairs]


def cache_errors(group, cell_type, mask):
    """Read on from a cache, then from the one that comes out of it, in one process."""
    model = small_model(cell_type)
    whole, own = model_inputs(group, mask)
    outputs = []
    with torch.no_grad():
        for inputs, arguments in ((whole, {}), (own, {"context_parallel_group": group})):
            cache = model(random_ids(B, 3, seed=1), use_cache=True).past_key_values
            inputs = {name: inputs[name] for name in ("input_ids", "reset_mask", "attention_mask") if name in inputs}
            logits = model(**inputs, past_key_values=cache, **arguments).logits
            after = model(random_ids(B, 2, seed=2), past_key_values=cache).logits
            outputs.append((logits, after, cache.get_seq_length()))
    real = (whole.get("attention_mask", torch.ones(1)) != 0)[..., None]
    (expected, expected_after, expected_length), (logits, after, length) = outputs
    return [
        oracle.relative_error(gathered(logits, group) * real, expected * real),
        oracle.relative_error(after, expected_after),
        abs(length - expected_length),
    ]


def data_parallel_errors(mesh):
    """Two halves of a batch, each over two processes, against one process with the whole batch."""
    context, data = mesh["context"].get_group(), mesh["data"].get_group()
    T = sum(CHUNKS[2])
    ids = random_ids(2 * B, T + 1)
    targets = ids[:, 1:].contiguous()
    model = small_model("minlstm")
    reference = copy.deepcopy(model)
    loss = reference(ids[:, :-1], labels=targets, shift_labels=targets).loss
    loss.backward()
    half = slice(data.rank() * B, (data.rank() + 1) * B)
    inputs, targets = chunk(ids[half, :-1], context), chunk(targets[half], context)
    items = 2 * B * T / PROCESSES  # DDP means over the processes
    parallel = DistributedDataParallel(model)
    output = parallel(
        inputs, labels=targets, shift_labels=targets, num_items_in_batch=items, context_parallel_group=context
    )
    output.loss.backward()
    pairs = [(summed(output.loss, None) / PROCESSES, loss)]
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        pairs.append((parameter.grad, other.grad))
    return [oracle.relative_error(actual, wanted) for actual, wanted in pairs]


def refusals(group):
    """The messages of what cannot be done."""
    model, ids = small_model(), random_ids(B, 4)
    recording = DynamicCache(config=model.config)
    recording.activate_past_recording()
    calls = {
        "labels": lambda: model(ids, labels=ids, context_parallel_group=group),
        "seq_idx": lambda: model(ids, seq_idx=ids, context_parallel_group=group),
        "recording": lambda: model(ids, past_key_values=recording, context_parallel_group=group),
        "bidirectional": lambda: small_model(bidirectional=True)(ids, context_parallel_group=group),
        "loop": lambda: minrnn_scan(torch.ones(1, 2, 4), "mingru", backend="loop", group=group),
        "log": lambda: minrnn_scan(torch.ones(1, 2, 4), "mingru", backend="log", group=group),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


SCANS = list(itertools.product(CHUNKS, CELLS, ("torch", "numba"), MASKS))
MODELS = [
    *itertools.product(CHUNKS, CELLS, (0,), MASKS),
    *itertools.product(CHUNKS, ("mingru",), (1, 2, 3), ("both",)),
]
CACHES = list(itertools.product(CHUNKS, CELLS, ("plain", "both")))


def measure():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    groups = {2: mesh["context"].get_group(), 4: dist.group.WORLD}
    checkpointed = []
    for cell_type in CELLS:
        model = small_model(cell_type).train()
        whole, own = model_inputs(groups[4], "both")
        gradients = []
        for _ in range(2):
            model(**own, context_parallel_group=groups[4]).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
            model.zero_grad()
            model.gradient_checkpointing_enable()
        checkpointed += [torch.equal(a, b) for a, b in zip(*gradients, strict=True)]
    return {
        "scan": [scan_errors(groups[size], *case) for size, *case in SCANS],
        "model": [model_errors(groups[n], cell, SHAPES[shape], mask) for n, cell, shape, mask in MODELS],
        "cache": [cache_errors(groups[size], *case) for size, *case in CACHES],
        "data parallel": data_parallel_errors(mesh),
        "checkpointed": checkpointed,
        "refusals": refusals(groups[4]),
    }


@pytest.fixture(scope="module")
def measured():
    return run_in_processes(measure, PROCESSES)


def assert_small(measured, kind, cases):
    """The errors of every case in every process."""
    for case, name in enumerate(cases):
        assert max(max(rank[kind][case]) for rank in measured) < TOLERANCE, name


def test_a_scan_over_several_processes_has_the_states_and_gradients_of_the_float64_loop(measured):
    assert_small(measured, "scan", SCANS)


def test_a_model_over_several_processes_has_the_loss_and_gradients_of_one(measured):
    assert_small(measured, "model", MODELS)


def test_several_processes_read_on_from_a_state_and_one_reads_on_from_theirs(measured):
    assert_small(measured, "cache", CACHES)


def test_halves_of_a_batch_each_over_two_processes_have_the_loss_and_gradients_of_one(measured):
    assert max(max(rank["data parallel"]) for rank in measured) < TOLERANCE


def test_gradient_checkpointing_over_several_processes_changes_no_gradient(measured):
    for rank in measured:
        assert rank["checkpointed"] and all(rank["checkpointed"])


def test_what_cannot_be_spread_is_refused(measured):
    messages = {
        "labels": "pass shift_labels: the next chunk is on another rank",
        "seq_idx": "beside a state to go on from pass reset_mask or position_ids",
        "recording": "cannot record the states to go back to",
        "bidirectional": "a bidirectional model reads a sequence in one process",
        "loop": 'the "loop" backend reads a sequence in one process',
        "log": "no padding_mask and no group",
    }
    for rank in measured:
        for name, message in messages.items():
            assert message in rank["refusals"][name]
