"""What a mask costs, in operations that start a kernel on a GPU, counted on the CPU."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from modeling_minrnn import NO_LOGITS, MinRNNConfig, MinRNNForCausalLM

# Beside views: what allocates, renames, or only reads a number.
NO_KERNEL = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "alias",
}
NO_KERNEL |= {"lift_fresh", "_local_scalar_dense"}
LAYERS = 3


class Kernels(TorchDispatchMode):
    """Counts them by name; an operator of this package counts as one."""

    def __init__(self):
        super().__init__()
        self.started = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        name = function._schema.name.partition("::")[2]
        if not is_view and name not in NO_KERNEL:
            self.started[name] += 1
        return function(*args, **kwargs or {})


def kernels(function):
    with Kernels() as counter:
        function()
    return counter.started.total()


class OnGPU(torch.Tensor):
    """A mask that says so."""

    device = torch.device("cuda")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MinRNNConfig(vocab_size=32, hidden_size=8, num_hidden_layers=LAYERS, scan_backend="torch")
    return MinRNNForCausalLM(config)


TOKENS = torch.arange(24).view(2, 12)
ONES = torch.ones_like(TOKENS)


@pytest.mark.oldest
@pytest.mark.parametrize("mask", [ONES, ONES.as_subclass(OnGPU)], ids=["cpu", "gpu"])
def test_a_mask_of_ones_costs_a_training_step_the_question_alone(model, mask):
    def step(**masks):
        model(TOKENS, labels=TOKENS, use_cache=False, logits_to_keep=NO_LOGITS, **masks).loss.backward()

    step()
    assert kernels(lambda: step(attention_mask=mask)) - kernels(step) == 2  # == 0, any


@pytest.mark.oldest
@torch.no_grad()
def test_a_mask_of_ones_costs_a_generated_token_the_question_alone(model):
    def generated(tokens):
        options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return kernels(lambda: model.generate(TOKENS, attention_mask=ONES, **options))

    def forward(**masks):
        cache = model(TOKENS, use_cache=True).past_key_values
        return kernels(lambda: model(TOKENS[:, :1], past_key_values=cache, **masks))

    generated(2)
    assert forward(attention_mask=ONES.as_subclass(OnGPU)) == forward() + 2
    # 13 are generate's own: the greatest logit, whether all rows have ended, one more column of tokens and mask.
    assert generated(8) - generated(4) <= 4 * (forward() + 2 + 13)


def test_documents_cost_a_layer_a_dozen_kernels(model):
    """67 where each tap was read by itself."""
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[0, 5] = True

    def step(**masks):
        model(TOKENS, labels=TOKENS, use_cache=False, logits_to_keep=NO_LOGITS, **masks).loss.backward()

    step()
    assert kernels(lambda: step(reset_mask=starts)) - kernels(step) <= 12 * LAYERS + 20  # what the masks say, once


def test_a_compiled_step_of_a_static_cache_is_given_no_mask_of_ones(model):
    cache = StaticCache(config=model.config, max_cache_len=16)
    mask = ONES.clone()
    mask[0, :2] = 0
    prepare = model.prepare_inputs_for_generation
    inputs = prepare(TOKENS, past_key_values=cache, attention_mask=mask, is_first_iteration=True)
    assert torch.equal(inputs["attention_mask"], mask)
    inputs = prepare(TOKENS, next_sequence_length=1, past_key_values=cache, attention_mask=mask)
    assert inputs.get("attention_mask") is None
