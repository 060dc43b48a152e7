"""What a call may say: arguments of other libraries, cached tokens, padding, special tokens. Right, or one line."""

import pytest
import torch
import torch.nn.functional as F
from small_models import VOCAB_SIZE, assert_close, random_ids, small_config, small_model
from transformers import DataCollatorWithFlattening, DynamicCache

from modeling_minrnn import (
    MinRNNForCausalLM,
    MinRNNForMaskedLM,
    MinRNNForQuestionAnswering,
    MinRNNForSequenceClassification,
    MinRNNForTokenClassification,
    MinRNNModel,
    load_state,
    save_state,
    sequence_chunked_backward,
)

CLASSES = [
    MinRNNModel,
    MinRNNForCausalLM,
    MinRNNForMaskedLM,
    MinRNNForQuestionAnswering,
    MinRNNForSequenceClassification,
    MinRNNForTokenClassification,
]


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize(
    "name, meant",
    [
        ("cache_params", "past_key_values"),
        ("state", "past_key_values"),
        ("prev_hiddens", "past_key_values"),
        ("cu_seqlens", "cu_seq_lens_q"),
        ("cu_seq_lens", "cu_seq_lens_q"),
        ("atention_mask", "attention_mask"),
        ("input_embeds", "inputs_embeds"),
        ("postion_ids", "position_ids"),
    ],
)
def test_an_argument_of_another_library_or_misspelt_is_refused_with_the_name_that_is_meant(model_class, name, meant):
    model = small_model(model_class=model_class)
    with pytest.raises(TypeError, match=f"no argument '{name}'; did you mean '{meant}'\\?"):
        model(random_ids(1, 5), **{name: torch.ones(1, 5)})


def test_an_argument_like_no_other_is_refused():
    with pytest.raises(TypeError, match="no argument 'frobnicate'$"):
        small_model()(random_ids(1, 5), frobnicate=torch.ones(1, 5))


def test_what_transformers_passes_to_every_model_changes_nothing():
    model, ids = small_model(), random_ids(2, 6)
    outputs = model(
        ids, labels=ids, token_type_ids=torch.zeros_like(ids), cache_position=torch.arange(6), output_attentions=False,
        output_router_logits=False,
        tokenizer=object(), max_length_q=6, max_length_k=6, is_causal=True, head_mask=None, return_dict=True,
    )  # fmt: skip
    assert torch.equal(outputs.logits, model(ids).logits)
    assert torch.equal(outputs.loss, model(ids, labels=ids).loss)


# Which tokens a cache holds.


@pytest.mark.parametrize("new", [3, 8])
@pytest.mark.parametrize("with_mask", [True, False])
def test_generate_says_that_the_tokens_of_the_cache_are_missing(new, with_mask):
    model, ids = small_model(), random_ids(1, 16)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    mask = {"attention_mask": torch.ones(1, new, dtype=torch.long)} if with_mask else {}
    with pytest.raises(
        ValueError, match=f"holds 8 tokens and input_ids {new}: .* attention_mask of {8 + new} columns"
    ):
        model.generate(ids[:, 8 : 8 + new], past_key_values=cache, max_new_tokens=2, **mask)


def test_generate_goes_on_from_a_cache_given_all_tokens_or_a_mask_of_all():
    model, ids = small_model(), random_ids(1, 14)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    given = {"past_key_values": model(ids[:, :8], use_cache=True).past_key_values}
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, **given), expected)
    given = {
        "past_key_values": model(ids[:, :8], use_cache=True).past_key_values,
        "attention_mask": torch.ones_like(ids),
    }
    generated = model.generate(ids[:, 8:], max_new_tokens=5, do_sample=False, **given)
    assert torch.equal(generated, expected[:, 8:])


# Padding and special tokens.


@pytest.mark.parametrize("with_mask", [True, False])
def test_generate_refuses_padding_on_the_right_and_goes_on_from_each_row_with_padding_on_the_left(with_mask):
    model = small_model(pad_token_id=0, eos_token_id=1)
    rows = [random_ids(9)[2:] % 30 + 2, random_ids(4, seed=1) % 30 + 2]
    alone = [model.generate(row[None], max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, -6:] for row in rows]
    for left in (True, False):
        ids = torch.stack([F.pad(row, (7 - len(row), 0) if left else (0, 7 - len(row))) for row in rows])
        mask = {"attention_mask": (ids != 0).long()} if with_mask else {}
        if left:
            generated = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, **mask)
            assert torch.equal(generated[:, 7:], torch.stack(alone))
        else:
            with pytest.raises(ValueError, match='row 1 of the prompts ends in padding: .* padding_side="left"'):
                model.generate(ids, max_new_tokens=6, do_sample=False, **mask)


def test_generate_ignores_token_type_ids():
    model, ids = small_model(), random_ids(2, 6)
    generated = model.generate(ids, token_type_ids=torch.zeros_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("field", ["pad_token_id", "eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [-1, VOCAB_SIZE])
def test_a_special_token_outside_the_vocabulary_is_refused_by_name(field, value, tmp_path):
    message = f"{field} must be None or in the vocabulary, 0..{VOCAB_SIZE - 1}, not {value}"
    with pytest.raises(ValueError, match=message):
        small_config(**{field: value})
    config, model = small_config(), small_model()
    setattr(config, field, value)
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=message):
        MinRNNForCausalLM(config)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)


def test_a_list_of_eos_tokens_is_checked_one_by_one():
    with pytest.raises(ValueError, match=f"eos_token_id must be .* not {VOCAB_SIZE}"):
        small_config(eos_token_id=[1, VOCAB_SIZE])


def test_a_vocabulary_is_not_cut_below_its_special_tokens():
    model = small_model(pad_token_id=VOCAB_SIZE - 1)
    with pytest.raises(ValueError, match="pad_token_id must be None or in the vocabulary, 0..9"):
        model.resize_token_embeddings(10)
    assert model.get_input_embeddings().num_embeddings == VOCAB_SIZE
    # The usual order: the tokenizer has grown, its padding is named, the model follows.
    model.config.pad_token_id = VOCAB_SIZE
    model.resize_token_embeddings(VOCAB_SIZE + 3)
    assert model.config.vocab_size == VOCAB_SIZE + 3


@pytest.mark.parametrize("tie", [True, False])
def test_padding_with_the_token_that_ends_documents_leaves_its_embedding_to_be_trained(tie, tmp_path):
    torch.manual_seed(0)
    model = MinRNNForCausalLM(small_config(pad_token_id=3, eos_token_id=3, tie_word_embeddings=tie))
    model.save_pretrained(tmp_path)
    for each in (model, MinRNNForCausalLM.from_pretrained(tmp_path)):
        assert each.model.embed_tokens.weight[3].abs().max() > 0
        ids = torch.tensor([[5, 3, 7, 8]])
        each.model(ids).last_hidden_state.sum().backward()
        assert each.model.embed_tokens.weight.grad[3].abs().max() > 0


# Where documents begin.

DOCUMENTS = [5, 1, 8, 2]
EVERY_OPTION = [
    {"return_position_ids": positions, "position_ids_start": start, "return_flash_attn_kwargs": flash,
     "return_seq_idx": seq_idx}
    for positions in (True, False)
    for start in ((0, 1, 2) if positions else (0,))
    for flash in (True, False)
    for seq_idx in (True, False)
    if positions or flash or seq_idx
]  # fmt: skip


def collated(documents, **options):
    collator = DataCollatorWithFlattening(**options)
    batch = collator([{"input_ids": document.tolist()} for document in documents], return_tensors="pt")
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("options", EVERY_OPTION, ids=lambda options: "-".join(str(int(x)) for x in options.values()))
def test_documents_packed_by_transformers_are_read_alone_whatever_marks_them(options):
    model = small_model()
    documents = random_ids(sum(DOCUMENTS)).split(DOCUMENTS)
    packed = model(**collated(documents, **options)).logits[0]
    assert_close(packed, torch.cat([model(document[None]).logits[0] for document in documents]))


def read_in_parts(model, batch, sizes, marks, cache):
    """The logits of a row that is read in parts of these sizes, one after the other."""
    parts = zip(batch["input_ids"].split(sizes, 1), *(batch[name].split(sizes, 1) for name in marks))
    return torch.cat(
        [model(ids, past_key_values=cache, use_cache=True, **dict(zip(marks, rest))).logits for ids, *rest in parts], 1
    )


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("marks", [["position_ids"], ["position_ids", "seq_idx"]], ids="-".join)
def test_a_packed_row_read_in_parts_is_its_documents_alone(marks, start):
    model = small_model()
    documents = random_ids(sum(DOCUMENTS)).split(DOCUMENTS)
    batch = collated(documents, return_position_ids=True, return_seq_idx=True, position_ids_start=start)
    alone = torch.cat([model(document[None]).logits for document in documents], 1)
    T = sum(DOCUMENTS)
    for sizes in ([1] * T, [5, 1, 8, 2], [6, 10], *([cut, T - cut] for cut in range(1, T))):
        assert_close(read_in_parts(model, batch, sizes, marks, DynamicCache(config=model.config)), alone)


@pytest.mark.parametrize("cut", [3, 5, 6])
def test_a_state_file_and_a_chunked_backward_know_what_positions_a_row_began_with(cut, tmp_path):
    model = small_model()
    documents = random_ids(sum(DOCUMENTS)).split(DOCUMENTS)
    batch = collated(documents, return_position_ids=True, position_ids_start=1)
    ids, positions = batch["input_ids"], batch["position_ids"]
    alone = torch.cat([model(document[None]).logits for document in documents], 1)[:, cut:]
    cache = DynamicCache(config=model.config)
    sequence_chunked_backward(
        model, ids[:, :cut], ids[:, :cut], 2, past_key_values=cache, position_ids=positions[:, :cut]
    )
    save_state(cache, tmp_path / "state", model)
    for each in (cache, load_state(tmp_path / "state", model)):
        assert_close(model(ids[:, cut:], past_key_values=each, position_ids=positions[:, cut:]).logits, alone)


def test_rows_of_which_one_is_padding_at_first_are_read_on_from_where_each_began():
    model = small_model()
    first, second = random_ids(7).split([3, 4])
    ids = torch.stack([torch.cat([first, second]), torch.cat([second.new_zeros(4), first])])
    mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
    positions = torch.tensor([[1, 2, 3, 1, 2, 3, 4], [1, 1, 1, 1, 1, 2, 3]])
    cache = DynamicCache(config=model.config)
    parts = [
        model(ids[:, part], mask[:, part], positions[:, part], past_key_values=cache).logits
        for part in (slice(3), slice(3, 5), slice(5, 7))
    ]
    logits = torch.cat(parts, 1)
    assert_close(logits[0], torch.cat([model(first[None]).logits[0], model(second[None]).logits[0]]))
    assert_close(logits[1, 4:], model(first[None]).logits[0])


@pytest.mark.parametrize("marks", ["seq_idx", "cu_seq_lens_q", "positions from 1"])
def test_what_cannot_tell_whether_a_document_begins_with_the_part_is_refused_beside_a_state(marks):
    model, ids = small_model(), random_ids(1, 10)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    given = {
        "seq_idx": {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]])},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 2, 6])},
        "positions from 1": {"position_ids": torch.tensor([[5, 6, 1, 2, 3, 4]])},
    }[marks]
    with pytest.raises(ValueError, match="beside a state to go on from pass reset_mask"):
        model(ids[:, 4:], past_key_values=cache, **given)
    model(ids[:, 4:], past_key_values=DynamicCache(config=model.config), **given)  # nothing to go on from


def test_positions_with_gaps_and_padding_are_those_of_one_document():
    model, ids = small_model(), random_ids(1, 8)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1]])
    expected = model(ids[:, mask[0].bool()]).logits
    for positions in ([1, 0, 1, 1, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7], [9, 2, 4, 0, 1, 40, 50, 51]):
        given = {"attention_mask": mask, "position_ids": torch.tensor([positions])}
        assert_close(model(ids, **given).logits[:, mask[0].bool()], expected)
