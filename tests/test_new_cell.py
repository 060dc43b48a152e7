"""A cell that is added as docs/new-cell.md says, by the code on that page, is right everywhere, or refused."""

import re
from pathlib import Path

import oracle
import pytest
import torch
from oracle import normal, random_mask, relative_error
from processes import run_in_processes
from small_models import random_ids, small_model

from modeling_minrnn import MinRNNForCausalLM, cells, minrnn_scan
from modeling_minrnn.scan_numba import CODES

PAGE = Path(__file__).parents[1] / "docs" / "new-cell.md"
BACKENDS = ["loop", "torch", "numba"]
try:
    from modeling_minrnn import scan_triton

    BACKENDS.append("triton")
except ImportError:  # triton is made for Linux
    scan_triton = None


def register():
    """Run the code of the page."""
    exec("\n".join(re.findall(r"```python no-run\n(.*?)```", PAGE.read_text(), re.DOTALL)), {"__name__": "new_cell"})


@pytest.fixture(autouse=True, scope="module")
def known():
    """To this module alone."""
    register()
    yield
    del cells.CELLS["leaky"], cells._known["leaky"], oracle.EQUATIONS["leaky"]


def outcomes(scan, dtype):
    B, T, D = 2, 45, 5
    leaves = [normal(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in
              enumerate([(B, T, 2 * D), (B, D), (D,), (D,)])]  # fmt: skip
    masks = {"reset_mask": random_mask(B, T, seed=5, share=0.1), "padding_mask": random_mask(B, T, seed=6, share=0.2)}
    outputs, final_state = scan(*leaves, **masks)
    upstream = [normal(*x.shape, seed=7).to(x.dtype) for x in (outputs, final_state)]
    return [outputs.detach(), final_state.detach(), *torch.autograd.grad([outputs, final_state], leaves, upstream)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_has_the_values_and_gradients_of_its_equation_on_every_backend(backend):
    def by_package(projected, start, reset_state, rate, **masks):
        more = {"parameters": {"rate": rate}, "reset_state": reset_state, "backend": backend}
        return minrnn_scan(projected, "leaky", start, **more, **masks)

    def by_oracle(projected, start, reset_state, rate, **masks):
        return oracle.scan(projected, "leaky", start, reset_state=reset_state, parameters=rate[None], **masks)

    for actual, expected in zip(outcomes(by_package, torch.float32), outcomes(by_oracle, torch.float64)):
        assert relative_error(actual, expected) <= 3e-6


def test_no_backend_takes_it_for_another_cell():
    fused = set(CODES) | (scan_triton.FUSED if scan_triton else set())
    assert cells.cell_of("leaky").spec not in fused
    with pytest.raises(ValueError, match="""the "log" backend is the listing of minGRU and minLSTM, not of 'leaky'"""):
        minrnn_scan(torch.zeros(1, 2, 4), "leaky", parameters={"rate": torch.zeros(2)}, backend="log")


def test_it_generates_what_the_whole_sequence_says():
    model = small_model("leaky")
    prompt = random_ids(2, 7)
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(model(ids).logits[:, 6:-1].argmax(-1), ids[:, 7:])


def errors_over_two_processes():
    register()
    group = torch.distributed.group.WORLD
    model, ids = small_model("leaky"), random_ids(2, 24)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    items = (labels != -100).sum()
    model(ids, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    own = [x.split([9, 15], 1)[group.rank()].contiguous() for x in (ids, labels)]
    more = {"shift_labels": own[1], "num_items_in_batch": items, "context_parallel_group": group}
    model(own[0], labels=own[0], **more).loss.backward()
    errors = []
    for parameter, gradient in zip(model.parameters(), expected):
        torch.distributed.all_reduce(parameter.grad)
        errors.append(relative_error(parameter.grad, gradient))
    return errors


def test_it_has_its_gradients_over_two_processes():
    for errors in run_in_processes(errors_over_two_processes, 2):
        assert max(errors) <= 1e-5


def test_it_is_trained_by_train_py(run):
    folder = run(**{"model.cell_type": "leaky", "model.max_timescale": None})
    config = MinRNNForCausalLM.from_pretrained(folder).config
    assert config.cell_type == "leaky"
    assert "leaky integrator" in (folder / "README.md").read_text()


def test_its_memory_is_reported():
    model = small_model("leaky", num_hidden_layers=1)
    (report,) = model.diagnose_states(random_ids(2, 50))
    rnn = model.model.layers[0].rnn
    ids = random_ids(2, 50)
    heard = []
    hook = rnn.in_proj.register_forward_hook(lambda module, inputs, output: heard.append(output))
    model(ids)
    hook.remove()
    gate = heard[0].chunk(2, -1)[0]
    log_a = -rnn.rate.exp() * torch.sigmoid(gate)
    torch.testing.assert_close(report.timescales, -1 / log_a.mean((0, 1)), rtol=1e-4, atol=0)


def test_a_limit_on_its_memory_is_refused_as_it_has_none_to_set():
    with pytest.raises(ValueError, match="max_timescale sets the memory of gates, which leaky does not have"):
        small_model("leaky", max_timescale=10)
