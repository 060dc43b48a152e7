"""tests/fixtures holds two models, a state of each and their logits, written by this package at 7f5b1fd, before it was
rebuilt around cells: their configurations know nothing of a candidate, heads, a memory or an output gate."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_minrnn import MinRNNForCausalLM
from modeling_minrnn.state_file import load_state

FIXTURES = Path(__file__).parent / "fixtures"
NEW_FIELDS = {"candidate", "num_heads", "memory_order", "memory_window", "output_gate"}
TOLERANCE = {"rtol": 0, "atol": 5e-6}  # of logits up to 3.4 in float32; the worst seen is 1.3e-6


@pytest.mark.parametrize("backend", ["auto", "torch", "loop"])
@pytest.mark.parametrize("cell_type", ["mingru", "minlstm"])
@torch.no_grad()
def test_a_checkpoint_and_a_state_of_before_the_cells_give_the_same_logits(cell_type, backend):
    folder = FIXTURES / cell_type
    assert not NEW_FIELDS & json.loads((folder / "config.json").read_text()).keys()
    model, report = MinRNNForCausalLM.from_pretrained(folder, scan_backend=backend, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = load_file(folder / "expected.safetensors")
    ids = expected["input_ids"]
    torch.testing.assert_close(model(ids).logits, expected["logits"], **TOLERANCE)

    cache = load_state(folder / "state.safetensors", model)
    read = cache.get_seq_length()
    assert 0 < read < ids.shape[1]
    logits = model(ids[:, read:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected["logits"][:, read:], **TOLERANCE)
