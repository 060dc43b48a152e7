"""Tensor parallelism: each rank computes its share of the channels of state, from the gates to the output projection.

D state width, H hidden size. in_proj [gate | candidate] is split within each of its parts, so that a rank has all
gates of its channels; the recurrence is per channel; out_proj is split by its inputs, and its outputs (B, T, H) are
summed over the ranks, once a layer. No state is ever gathered.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard
from transformers import PreTrainedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, PackedColwiseParallel, TensorParallelLayer


def prepare(config: PreTrainedConfig, fsdp_size: int, tp_size: int) -> None:
    """Register the style "minrnn_channels" of `MinRNNConfig.base_model_tp_plan` before transformers splits a model.

    Raises ValueError for sizes that cannot be split.
    """
    ALL_PARALLEL_STYLES.register("minrnn_channels", ChannelParallel())
    if config.state_size % tp_size:
        raise ValueError(
            f"hidden_size x expansion_factor is {config.state_size}: must be a multiple of {tp_size}, the processes "
            "of tensor parallelism, which share the channels of state"
        )
    for cell in config.cells:
        learned_log_sums = config.learned_initial_state and cell.log_sums(config.state_size)
        if tp_size > 1 and (not cell.splits_by_channel or learned_log_sums):
            raise ValueError(
                f"{cell.name!r} cannot be split by channels, as tensor parallelism does: its heads, its matrix, its "
                "complex halves or its learned log-sums belong to several; use data or context parallelism"
            )
    # fully_shard pads the rows of a tied matrix separately for each of its two uses: only one would be trained.
    if config.tie_word_embeddings and fsdp_size > 1 and config.vocab_size % (fsdp_size * tp_size):
        raise ValueError(
            f"vocab_size is {config.vocab_size}: must be a multiple of {fsdp_size * tp_size}, the processes that "
            "share the embeddings, or tie_word_embeddings=False"
        )


class ChannelParallel(TensorParallelLayer):
    """Splits a `MinRNNRecurrence` by channels: in_proj, gate_proj, the cell's parameters, initial_state."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        _distribute(module, param, mesh, Shard(0))

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        module.state_size //= mesh.size()
        for projection, split_factor in ((module.in_proj, len(module.cell.blocks(0))), (module.gate_proj, 1)):
            if projection is not None:
                style = GatesColwiseParallel(split_factor=split_factor)
                for name, _ in list(projection.named_parameters()):
                    style.shard_param(projection, name, mesh)
                style.install_forward(projection, mesh)
        return module


class GatesColwiseParallel(PackedColwiseParallel):
    """Splits in_proj: a rank has the rows of its channels in each of the `split_factor` parts of weight and bias."""

    @property
    def own_rows(self) -> Placement:
        return _StridedShard(dim=0, split_factor=self.split_factor)

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        # fully_shard splits rows as well, and expects those of a rank to be one block. If it is used too, each rank
        # keeps all rows that fully_shard leaves it, and computes with its own.
        alone = torch.distributed.get_world_size() == mesh.size()
        _distribute(module, param, mesh, self.own_rows if alone else Replicate())

    @contextlib.contextmanager
    def context_around_forward(self, module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
        # Quantised weights hold this rank's rows already.
        whole = {name: p for name, p in module.named_parameters(recurse=False) if isinstance(p, DTensor)}
        own: dict[str, Any] = {
            name: p.redistribute(placements=[self.own_rows]).to_local() for name, p in whole.items()
        }
        module._parameters.update(own)
        try:
            yield
        finally:
            module._parameters.update(whole)


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    parameter = module.get_parameter(name)
    shard = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)  # every rank has the whole parameter
    module.register_parameter(name, nn.Parameter(shard, requires_grad=parameter.requires_grad))
