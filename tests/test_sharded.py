"""FSDP2, tensor parallelism and both, by transformers' own means: the losses of one process, saved and resumed."""

import pytest
import torch
import torch.distributed as dist
from processes import run_in_processes
from small_models import CELLS, random_ids, small_model
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from training.optimizers import MuonAndAdamW, hidden_matrices
from training.sharded import load_shards, save_shards

STEPS = 6
T = 9
# 18 channels, with an initial state of their own and biases on the gates: all that is split.
FIELDS = {
    "vocab_size": 40,
    "hidden_size": 12,
    "expansion_factor": 1.5,
    "learned_initial_state": True,
    "max_timescale": 20,
}
WAYS = {"fsdp": {"fsdp_size": 2}, "tensor": {"tp_size": 2}, "both": {"fsdp_size": 2, "tp_size": 2}}
CASES = [(way, cell_type, tied) for way in WAYS for cell_type, tied in zip(CELLS, (True, False))]
TOLERANCE = 1e-5  # relative, of the loss; the worst seen is 2e-7


def optimizer_of(model):
    # One by one: no fused operation takes DTensors and tensors together.
    return torch.optim.AdamW(model.parameters(), lr=0.02, foreach=False)


def losses(model, optimizer, steps, rows=slice(None), group=None):
    """Train on these rows of each batch; the losses are means over the processes of the group."""
    result = []
    for step in steps:
        ids = random_ids(4, T, seed=step)[rows]
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        if group is not None:
            dist.all_reduce(loss, group=group)
            loss /= group.size()
        result.append(loss.item())
    return result


def load(folder, sizes):
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).train()


def refusals(folder):
    """What is said of models that two processes cannot share."""
    messages = []
    for sizes in ({"tp_size": 2}, {"fsdp_size": 2}):
        try:
            load(folder, sizes)
        except ValueError as error:
            messages.append(str(error))
    return messages


def own_rows(model):
    """The rows of the batch that this process trains on, and the processes that share the batch."""
    mesh = model._device_mesh["fsdp"]
    size = 4 // mesh.size()
    return slice(mesh.get_local_rank() * size, (mesh.get_local_rank() + 1) * size), mesh.get_group()


class Collectives(TorchDispatchMode):
    """Counts the collectives by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if "c10d" in name and "_tensor" not in name.replace("into_tensor", ""):  # not waiting and wrapping
            name = name.split("::")[1].split(".")[0]
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **kwargs or {})


def train_sharded(folder, sizes):
    """The losses, what is sharded, and what a forward pass sends; what it saves on the way."""
    model = load(folder / "start", sizes)
    kinds, widths = {}, []
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        kinds[name] = isinstance(parameter, DTensor), local.numel(), parameter.numel()
    hooks = [
        layer.rnn.out_proj.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[-1]))
        for layer in model.model.layers
    ]
    sent = Collectives()
    if "fsdp_size" not in sizes:  # which gathers the weights, and keeps them until a backward pass
        with sent:
            model(random_ids(1, T), use_cache=False)
    for hook in hooks:
        hook.remove()
    optimizer = optimizer_of(model)
    first = losses(model, optimizer, range(STEPS // 2), *own_rows(model))
    save_shards(folder / "shards", model, optimizer)
    model.save_pretrained(folder / "consolidated")
    second = losses(model, optimizer, range(STEPS // 2, STEPS), *own_rows(model))
    return {
        "losses": first + second,
        "kinds": kinds,
        "sent": sent.counts,
        "widths": widths,
    }


def resume(model, folder, *share):
    """The losses from where `train_sharded` saved."""
    optimizer = optimizer_of(model)
    state = load_shards(folder / "shards", model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return losses(model, optimizer, range(STEPS // 2, STEPS), *share)


def resume_sharded(folder, sizes):
    model = load(folder / "start", sizes)
    return resume(model, folder, *own_rows(model))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def trained(request, tmp_path_factory):
    way, cell_type, tied = request.param
    folder = tmp_path_factory.mktemp("sharded")
    model = small_model(cell_type, tie_word_embeddings=tied, **FIELDS).train()
    model.save_pretrained(folder / "start")
    expected = losses(model, optimizer_of(model), range(STEPS))
    count = 4 if way == "both" else 2
    return way, folder, expected, run_in_processes(train_sharded, count, folder, WAYS[way])


def test_a_sharded_model_has_the_losses_of_one_process(trained):
    _, _, expected, ranks = trained
    assert expected[-1] < expected[0]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected, rel=TOLERANCE)


def test_each_process_holds_its_share(trained):
    way, _, _, ranks = trained
    for name in ranks[0]["kinds"]:
        are_dtensors, local, whole = zip(*(rank["kinds"][name] for rank in ranks))
        split = ("rnn.", "up_proj", "down_proj", "embed_tokens") if way == "tensor" else ("",)
        if any(part in name for part in split):
            assert all(are_dtensors), name
            assert max(local) < 0.55 * whole[0], name  # a row more, where they do not divide


def test_tensor_parallelism_gathers_no_state_inside_a_layer(trained):
    way, _, _, ranks = trained
    if way == "tensor":
        for rank in ranks:
            assert rank["widths"] == [9, 9]  # of 18 channels
            # One sum for the embedding, two a layer, and one gathering of the logits.
            assert rank["sent"] == {"all_reduce": 5, "all_gather_into_tensor": 1}


def test_what_they_save_is_gone_on_with_by_others(trained):
    way, folder, expected, _ = trained
    assert all(path.suffix == ".safetensors" for path in (folder / "shards").iterdir())  # no pickle
    if way == "both":
        runs = [resume(AutoModelForCausalLM.from_pretrained(folder / "start").train(), folder)]
    else:
        count, sizes = (4, WAYS["both"]) if way == "tensor" else (2, WAYS["tensor"])
        runs = run_in_processes(resume_sharded, count, folder, sizes)
    for run in runs:
        assert run == pytest.approx(expected[STEPS // 2 :], rel=TOLERANCE)


def test_what_they_save_as_one_model_loads_in_one_process(trained):
    _, folder, expected, _ = trained
    model = AutoModelForCausalLM.from_pretrained(folder / "consolidated")
    ids = random_ids(4, T, seed=STEPS // 2)
    assert model(ids, labels=ids).loss.item() == pytest.approx(expected[STEPS // 2], rel=TOLERANCE)


def losses_with_muon(folder, sizes=None):
    model = load(folder, sizes) if sizes else AutoModelForCausalLM.from_pretrained(folder).train()
    hidden = hidden_matrices(model)
    matrices, others = ([p for p in model.parameters() if (p in hidden) == wanted] for wanted in (True, False))
    optimizer = MuonAndAdamW(torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.02, foreach=False))
    return losses(model, optimizer, range(STEPS))


def test_muon_takes_a_matrix_that_is_split_by_channel_as_a_whole(tmp_path):
    small_model(**FIELDS).save_pretrained(tmp_path)
    expected = losses_with_muon(tmp_path)
    for rank in run_in_processes(losses_with_muon, 2, tmp_path, WAYS["tensor"]):
        assert rank == pytest.approx(expected, rel=1e-3)  # it computes in bfloat16; the worst seen is 2e-4


def test_sizes_that_do_not_divide_are_refused_in_one_line(tmp_path):
    small_model().save_pretrained(tmp_path)  # 21 channels, 37 tokens
    for rank in run_in_processes(refusals, 2, tmp_path):
        channels, tokens = rank
        assert channels.startswith("hidden_size x expansion_factor is 21: must be a multiple of 2, the processes of ")
        assert tokens.startswith("vocab_size is 37: must be a multiple of 2, ") and "\n" not in tokens
