"""What benchmarks/scaling.py counts and predicts."""

import pytest
import scaling
import torch
import torch.distributed as dist
from processes import run_in_processes
from small_models import small_model
from torch.nn.parallel import DistributedDataParallel

B, RANKS = 3, 2


def sent_bytes():
    """By length of the sequence, in one of the processes."""
    result = {}
    for length in (8, 64):
        model = small_model(hidden_size=14, expansion_factor=1.5, conv_kernel_size=4)
        parallel = DistributedDataParallel(model)
        windows = torch.ones(B, length + 1, dtype=torch.long)
        with scaling.counted_bytes(model, parallel) as sent:
            scaling.loss_of(parallel, windows, dist.get_rank(), RANKS, dist.group.WORLD).backward()
        result[length] = dict(sent)
    return result


def test_states_are_sent_as_2_b_d_numbers_a_layer_and_back_for_each_rank_whatever_the_length():
    layers, H, D, K = 2, 14, 21, 4
    parameters = small_model().num_parameters()
    for rank in run_in_processes(sent_bytes, RANKS):
        assert rank[8] == rank[64]
        assert rank[8]["scan"] == layers * 4 * 2 * B * D
        assert rank[8]["scan_back"] == layers * RANKS * 4 * 2 * B * D
        window = 4 * B * (K - 1) * (H + K - 1)
        assert rank[8]["conv"] == layers * window
        assert rank[8]["conv_back"] == layers * RANKS * window
        assert rank[8]["gradient"] == 4 * parameters


def test_efficiency_is_the_share_of_a_step_that_is_not_spent_sending(monkeypatch):
    monkeypatch.setattr(scaling, "LATENCY_S", 0.0)
    monkeypatch.setattr(scaling, "LAYERS", 2)
    sent = {"gradient": 800.0, "scan": 20.0, "scan_back": 10.0, "conv": 2.0}
    # 8 devices: 2 * 7/8 * 800 / 100 = 14 s of gradients, 7 * 32 / 100 = 2.24 s of states and windows, and
    # 2 * 7/8 * 8 * 2 / 100 = 0.28 s of what goes back to the windows.
    efficiency = scaling.efficiencies(6.0, 7.0, sent, devices=8, link=100.0)
    assert efficiency == {"data": pytest.approx(6 / 20), "context": pytest.approx(6 / (7 + 14 + 2.24 + 0.28))}
    monkeypatch.setattr(scaling, "LATENCY_S", 1.0)
    sent = dict.fromkeys(sent, 0.0)
    # log2(8) = 3: twice for the gradients, and three and two times for each of two layers.
    efficiency = scaling.efficiencies(6.0, 7.0, sent, devices=8, link=100.0)
    assert efficiency == {"data": pytest.approx(6 / 12), "context": pytest.approx(6 / (7 + 6 + 30))}
