"""Parameters and optimizer state of which each process holds a part, as DTensors (FSDP2, tensor parallelism).

Each process writes its part as safetensors by torch.distributed.checkpoint, and any number of processes reads them.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import Optimizer

from modeling_minrnn import MinRNNForCausalLM

from .config import one_line

SHARDS = "shard-*.safetensors"  # as torch.distributed.checkpoint names them


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process may hold a part. Called by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_model(model: MinRNNForCausalLM) -> MinRNNForCausalLM:
    """The model itself or, on the first of the processes that share its parameters, a copy with all of them.

    Called by all processes; the others get a model on the meta device.
    """
    if not is_sharded(model):
        return model
    with torch.device("meta"):  # draws no random numbers
        copy = MinRNNForCausalLM(model.config)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if weights:  # on the first process
        copy.load_state_dict(weights, assign=True)
        copy.tie_weights()
        copy.to(model.device)
    return copy


def save_shards(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Called by all processes. Raises OSError."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    for index, kept in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{key}": tensor for key, tensor in kept.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save({name: in_blocks(tensor) for name, tensor in tensors.items()}, storage_writer=writer)
    except dcp.api.CheckpointException as error:
        raise OSError(first_failure(error)) from error


def load_shards(folder: Path, model: nn.Module, optimizer: Optimizer) -> dict[int, dict[str, torch.Tensor]]:
    """Called by all processes: fills the parameters and returns the state of the optimizer by index of the parameter.

    Reads unsharded checkpoints too. Raises ValueError for a checkpoint of another model.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    # Of tied parameters one name is saved.
    tensors = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in saved}
    if {id(tensor) for tensor in tensors.values()} != {id(parameter) for parameter in model.parameters()}:
        raise ValueError("it lacks parameters of this model")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, size in ((name, entry.size) for name, entry in saved.items() if name.split(".")[0].isdigit()):
        index, key = name.split(".")
        parameter = parameters[int(index)]
        tensors[name] = torch.zeros_like(parameter) if size == parameter.shape else torch.zeros(size)
        state.setdefault(int(index), {})[key] = tensors[name]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process may read as well
        blocks = {name: in_blocks(tensor.detach()) for name, tensor in tensors.items()}
        try:
            dcp.load(blocks, storage_reader=reader)
        except dcp.api.CheckpointException as error:
            raise ValueError(first_failure(error)) from error
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor) and tensor.placements != blocks[name].placements:
                tensor.copy_(blocks[name].redistribute(placements=tensor.placements))
    return state


def in_blocks(tensor: torch.Tensor) -> torch.Tensor:
    """torch.distributed.checkpoint expects contiguous shards: redistribute interleaved ones."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(
        placements=[Shard(p.dim) if isinstance(p, _StridedShard) else p for p in tensor.placements]
    )


def first_failure(error: dcp.api.CheckpointException) -> str:
    return one_line(next(iter(error.failures.values()))[0])
