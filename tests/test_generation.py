"""Generation carries a state where it could read everything again: each way to do it gives the same tokens."""

import copy

import pytest
import torch
from small_models import CELLS, random_ids, small_model
from transformers import CompileConfig, StaticCache, set_seed

from training.tokenizers import byte_tokenizer, character_tokenizer

both_cells = pytest.mark.parametrize("cell_type", CELLS)
both_backends = pytest.mark.parametrize("backend", ["torch", "numba"])


def every_pair_with(*numbers):
    """Each of three numbers with each backend and each dtype, and these with each other; not all in every combination,
    as none of them reads another's setting."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    dtypes = ((float32, bfloat16), (bfloat16, float32), (float32, bfloat16))
    return pytest.mark.parametrize(
        "number, backend, dtype",
        [(n, b, d) for n, pair in zip(numbers, dtypes) for b, d in zip(("torch", "numba"), pair)],
    )


NEW_TOKENS = 24
END = 34  # with the models below, rows of a batch end after different lengths


def talking_model(cell_type, seed=None, **fields):
    """Weights so large, and so chosen, that greedy search does not soon repeat itself."""
    seed = {"mingru": 4, "minlstm": 9}[cell_type] if seed is None else seed
    model = small_model(cell_type, seed=seed, tie_word_embeddings=False, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "conv" not in name:
                parameter *= 3
    return model


def generate(model, ids, **kwargs):
    """Generated tokens, the same random ones each time."""
    kwargs = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "eos_token_id": END, "do_sample": False} | kwargs
    set_seed(0)
    return model.generate(ids, **kwargs)


def left_padded_batch():
    """ids and mask of three prompts of different lengths."""
    mask = torch.arange(9) >= torch.tensor([[4], [0], [7]])
    return random_ids(3, 9).masked_fill(~mask, 0), mask.long()


def assert_same_tokens(actual, expected, prompt_length):
    assert torch.equal(actual, expected)
    assert len(expected[:, prompt_length:].unique()) > 2  # no repetition of one token, which would show nothing


SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 20}
MODES = {
    "greedy": {},
    "sampling": SAMPLING,
    "several samples": SAMPLING | {"num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3, "early_stopping": True},
    "beam sampling": SAMPLING | {"num_beams": 3},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.oldest
@both_cells
@both_backends
@pytest.mark.parametrize("mode", MODES)
def test_generation_from_the_state_gives_the_tokens_of_reading_all_again(cell_type, backend, mode):
    model = talking_model(cell_type, scan_backend=backend)
    ids, mask = left_padded_batch()
    expected = generate(model, ids, attention_mask=mask, use_cache=False, **MODES[mode])
    assert_same_tokens(generate(model, ids, attention_mask=mask, **MODES[mode]), expected, 9)
    # The prompt in chunks, and in tensors that stay where they are.
    variants = ({"prefill_chunk_size": 4}, {"cache_implementation": "static"})
    for variant in (*variants, variants[0] | variants[1]):
        assert_same_tokens(generate(model, ids, attention_mask=mask, **MODES[mode], **variant), expected, 9)


@pytest.mark.oldest
@both_cells
@both_backends
def test_a_left_padded_batch_generates_what_its_rows_do_alone(cell_type, backend):
    model = talking_model(cell_type, scan_backend=backend)
    ids, mask = left_padded_batch()
    together = generate(model, ids, attention_mask=mask)
    lengths = set()
    for row in range(3):
        alone = generate(model, ids[row : row + 1, mask[row].bool()])[0, mask[row].sum() :]
        assert torch.equal(together[row, 9 : 9 + len(alone)], alone)
        assert (together[row, 9 + len(alone) :] == 0).all()
        lengths.add(len(alone))
    assert len(lengths) > 1


@both_cells
@both_backends
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
def test_a_static_cache_can_be_reset_and_used_again(cell_type, backend, mode):
    model = talking_model(cell_type, scan_backend=backend)
    rows = MODES[mode].get("num_beams", 1) * 3
    cache = StaticCache(config=model.config, max_cache_len=64)
    for seed in (0, 1):
        ids = random_ids(3, 9, seed=seed)
        expected = generate(model, ids, use_cache=False, **MODES[mode])
        assert_same_tokens(generate(model, ids, past_key_values=cache, **MODES[mode]), expected, 9)
        assert cache.batch_size == rows
        cache.reset()


@pytest.mark.oldest
@both_cells
@pytest.mark.parametrize("backend, rows", [("torch", 1), ("numba", 3)])  # a compiler sees the same operator in both
def test_compiled_generation_gives_the_same_tokens_and_compiles_once(cell_type, backend, rows):
    torch.compiler.reset()
    model = talking_model(cell_type, scan_backend=backend)
    ids, mask = left_padded_batch()
    ids, mask = ids[:rows], mask[:rows]
    expected = generate(model, ids, attention_mask=mask, use_cache=False)
    settings = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="aot_eager")
    settings._compile_all_devices = True  # by itself, `generate` compiles on accelerators alone
    with torch._dynamo.config.patch(error_on_recompile=True):
        tokens = generate(model, ids, attention_mask=mask, cache_implementation="static", compile_config=settings)
    assert hasattr(model, "_compiled_call")
    assert_same_tokens(tokens, expected, 9)


@both_cells
@both_backends
@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_generation_goes_on_from_a_returned_cache(cell_type, backend, mode):
    model = talking_model(cell_type, scan_backend=backend)
    ids, mask = left_padded_batch()
    settings = MODES[mode] | {"eos_token_id": None}
    first = generate(model, ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    # The last token was not read yet, and the user adds to it.
    following = torch.cat([first.sequences, random_ids(3, 4, seed=1)], 1)
    mask = torch.cat([mask, torch.ones(3, NEW_TOKENS + 4, dtype=torch.long)], 1)
    expected = generate(model, following, attention_mask=mask, use_cache=False, **settings)
    cache = first.past_key_values
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    tokens = generate(model, following, attention_mask=mask, past_key_values=cache, **settings)
    assert_same_tokens(tokens, expected, following.shape[1])


@both_cells
def test_generation_starts_from_embeddings(cell_type):
    model = talking_model(cell_type)
    ids, mask = left_padded_batch()
    embeddings = model.get_input_embeddings()(ids)
    expected = generate(model, ids, attention_mask=mask)[:, 9:]
    assert torch.equal(generate(model, None, inputs_embeds=embeddings, attention_mask=mask), expected)


# ---- Drafts, part of which are taken back


def assert_greedy(model, tokens, prompt_length, expected):
    """What greedy search gives; in bfloat16, tokens that differ by the rounding of a logit are as good."""
    if model.dtype == torch.float32:
        return assert_same_tokens(tokens, expected, prompt_length)
    assert tokens.shape == expected.shape
    with torch.no_grad():
        logits = model(tokens).logits[0, prompt_length - 1 : -1]
    chosen = logits.gather(-1, tokens[0, prompt_length:, None])[:, 0]
    assert ((logits.amax(-1) - chosen) <= 0.05 * logits.abs().amax(-1)).all()


@both_cells
@every_pair_with(1, 8, 300)
def test_prompt_lookup_gives_the_tokens_of_greedy_search(cell_type, number, backend, dtype):
    model = talking_model(cell_type, scan_backend=backend).to(dtype)
    prompt = random_ids(1, 4).repeat(1, 75)[:, -number:]  # repeats itself: there is something to look up
    settings = {"max_new_tokens": 40, "eos_token_id": None}
    expected = generate(model, prompt, use_cache=False, **settings)
    tokens = generate(model, prompt, prompt_lookup_num_tokens=5, max_matching_ngram_size=1, **settings)
    assert_greedy(model, tokens, number, expected)


@pytest.mark.oldest
@both_cells
@every_pair_with(1, 5, 20)
def test_an_assistant_changes_no_token(cell_type, number, backend, dtype):
    model = talking_model(cell_type, scan_backend=backend).to(dtype)
    prompt = random_ids(1, 8)
    settings = {"eos_token_id": None}
    expected = generate(model, prompt, use_cache=False, **settings)
    for noise in (0, 0.05, 1):  # of the model's own drafts all are accepted, then some, then few
        assistant = with_noise(model, noise)
        assistant.generation_config.num_assistant_tokens = number
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        tokens = generate(model, prompt, assistant_model=assistant, **settings)
        assert_greedy(model, tokens, 8, expected)


@both_cells
@pytest.mark.parametrize("drafted", [3, 20])
def test_an_assistant_with_another_tokenizer_changes_no_token(cell_type, drafted):
    characters, bytes_ = character_tokenizer(["abcdefghijklmnopqrstuvwxyzäöü ,."]), byte_tokenizer()
    prompt = bytes_("hello world äö", return_tensors="pt").input_ids
    model = talking_model(cell_type, vocab_size=len(bytes_))
    settings = {"max_new_tokens": 30, "eos_token_id": None}
    expected = generate(model, prompt, use_cache=False, **settings)
    assistant = talking_model(cell_type, seed=1, vocab_size=len(characters))
    assistant.generation_config.num_assistant_tokens = drafted
    tokenizers = {"tokenizer": bytes_, "assistant_tokenizer": characters}
    assert_same_tokens(generate(model, prompt, assistant_model=assistant, **tokenizers, **settings), expected, 14)


@both_cells
def test_drafts_of_the_first_layer_change_no_token(cell_type):
    model, prompt = talking_model(cell_type), random_ids(1, 8)
    expected = generate(model, prompt, use_cache=False, eos_token_id=None)
    tokens = generate(model, prompt, assistant_early_exit=1, eos_token_id=None)
    assert_same_tokens(tokens, expected, 8)
    assert_same_tokens(generate(model, prompt, eos_token_id=None), expected, 8)


def with_noise(model, size):
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model
