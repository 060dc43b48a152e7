"""How the processes of a run share a batch: which sequences a process trains on, and which part of their time."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch.distributed import ProcessGroup, init_device_mesh

from .config import InputError, TrainConfig


@dataclass(frozen=True)
class Share:
    """One process's part of each batch. Processes with the same data_rank hold the same sequences, a chunk each."""

    data_rank: int
    data_ranks: int
    context_rank: int
    context_ranks: int
    context_group: ProcessGroup | None  # of the processes with this data_rank, if there are several

    def chunk(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T of the sequence) -> (B, T of this process). Chunks differ by a token where they do not divide."""
        return tokens.tensor_split(self.context_ranks, dim=1)[self.context_rank].contiguous()


def share_batch(accelerator: Accelerator, train: TrainConfig) -> Share:
    """Called by all processes. Raises InputError if they cannot be grouped, or the batch not be split, as set."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        raise InputError("accelerate shards parameters (FSDP) on GPUs only, here with fsdp_version: 2")
    processes, context_ranks = accelerator.num_processes, train.context_parallel_size
    if processes % context_ranks:
        raise InputError(f"train.context_parallel_size is {context_ranks}: must divide {processes}, the processes")
    data_ranks = processes // context_ranks
    shares = data_ranks * train.gradient_accumulation_steps
    if train.batch_size % shares:
        raise InputError(
            f"train.batch_size is {train.batch_size}: must be a multiple of {shares}, {processes} processes "
            "/ train.context_parallel_size * train.gradient_accumulation_steps"
        )
    group = None
    if context_ranks > 1:
        group = init_device_mesh(accelerator.device.type, (data_ranks, context_ranks)).get_group(1)
    data_rank, context_rank = divmod(accelerator.process_index, context_ranks)
    return Share(data_rank, data_ranks, context_rank, context_ranks, group)
