"""What the tensor-parallel and FSDP mixins start their processes with: gloo on CPU, one process a rank."""

import os
import sys
import tempfile
import unittest.mock
from multiprocessing import forkserver

import torch.distributed
import torch.multiprocessing

# The ranks are forked from a process that has imported these once and runs no threads.
forkserver.set_forkserver_preload(
    ["modeling_minrnn", "transformers_tests.test_fsdp_mixin", "transformers_tests.test_tensor_parallel_mixin"]
)


def _get_distributed_backend():
    return "gloo"


def _get_distributed_device_type():
    return "cpu"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    torch.set_num_threads(1)


def _start_rank_processes(function, args, nprocs):
    """Run function(rank, *args) in `nprocs` processes; raises what one of them raised."""
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # it would not find the modules
        forkserver.ensure_running()
    torch.multiprocessing.start_processes(function, args, nprocs, start_method="forkserver")


def run_distributed(world_size):
    """Decorator: run function(rank, *args) in `world_size` processes of one group."""

    def decorate(function):
        def run(*args):
            with tempfile.TemporaryDirectory() as folder:
                _start_rank_processes(_join_group, (world_size, f"file://{folder}/store", function, args), world_size)

        return run

    return decorate


def _join_group(rank, world_size, store, function, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    _set_rank_device(rank)
    from transformers_tests import test_tensor_parallel_mixin

    # The mixin knows the rows that a rank has of two parts, by the name of the style; ours has two or three.
    mixins_rows = test_tensor_parallel_mixin._reference_grad_shard

    def own_rows(name, grad, local_grad, rank, world_size, *plans):
        if not name.endswith("in_proj.weight"):
            return mixins_rows(name, grad, local_grad, rank, world_size, *plans)
        state_size = grad.shape[1] * 3 // 2  # expansion_factor
        return torch.cat([part.chunk(world_size)[rank] for part in grad.split(state_size)])

    test_tensor_parallel_mixin._reference_grad_shard = own_rows
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        torch.distributed.destroy_process_group()
