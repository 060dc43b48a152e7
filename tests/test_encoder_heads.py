"""The heads that an encoder carries: what they predict, from which tokens, and the losses they are trained with."""

import pytest
import torch
import torch.nn.functional as F
from small_models import CELLS, WrittenOut, assert_close, random_ids, small_config, small_model
from transformers import Trainer, TrainingArguments

from modeling_minrnn import (
    MinRNNForMaskedLM,
    MinRNNForQuestionAnswering,
    MinRNNForSequenceClassification,
    MinRNNForTokenClassification,
)
from training.tokenizers import byte_tokenizer

both_cells = pytest.mark.parametrize("cell_type", CELLS)
both_directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])

# Padding on the right, on the left, anywhere, nowhere.
MASK = torch.tensor([[1] * 5 + [0] * 4, [0] * 5 + [1] * 4, [0, 1, 1, 0, 1, 1, 1, 1, 0], [1] * 9])
IDS = random_ids(4, 9).clamp(min=1)
LETTERS = "abcdefgh"


def rows():
    """(row, the ids of that row without its padding) of the batch above."""
    return [(row, IDS[row : row + 1, MASK[row].bool()]) for row in range(4)]


# ---- Masked language model


@both_cells
@both_directions
@torch.no_grad()
def test_a_masked_language_model_sees_both_sides_where_bidirectional(cell_type, bidirectional):
    model = small_model(cell_type, MinRNNForMaskedLM, bidirectional=bidirectional)
    oracle = WrittenOut(model)
    logits = model(IDS, attention_mask=MASK).logits
    for row, alone in rows():
        assert_close(logits[row, MASK[row].bool()], oracle(alone[0])[0])
    later = torch.cat([IDS[:, :-1], IDS[:, -1:] % 36 + 1], 1)
    assert (model(later).logits[:, 0] != model(IDS).logits[:, 0]).any() == bidirectional


@pytest.mark.parametrize("tied", [True, False])
def test_a_masked_language_model_ties_its_head_as_a_causal_one_does(tied, tmp_path):
    model = small_model(model_class=MinRNNForMaskedLM, bidirectional=True, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = MinRNNForMaskedLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_loss_of_a_masked_language_model_is_that_of_the_labelled_tokens():
    model = small_model(model_class=MinRNNForMaskedLM, bidirectional=True)
    labels = IDS.where(torch.arange(9) % 3 == 1, -100)
    output = model(IDS, labels=labels)
    kept = labels != -100
    assert_close(output.loss, F.cross_entropy(output.logits[kept], labels[kept]))
    total = F.cross_entropy(output.logits[kept], labels[kept], reduction="sum")
    assert_close(model(IDS, labels=labels, num_items_in_batch=100).loss, total / 100)
    loss, logits = model(IDS, labels=labels, return_dict=False)
    assert torch.equal(logits, output.logits)
    output.loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_trainer_trains_a_masked_language_model_to_use_what_comes_after(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    model = MinRNNForMaskedLM(small_config(bidirectional=True, vocab_size=len(tokenizer), hidden_size=32))
    # The masked letter is told by the last one, which the convolution alone does not reach.
    inputs = tokenizer([f"<mask>---{letter}" for letter in LETTERS]).input_ids
    dataset = [{"input_ids": ids, "labels": [ids[-1], *[-100] * 4]} for ids in inputs] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=400, learning_rate=0.01, per_device_train_batch_size=16, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=dataset).train()
    predicted = model.eval()(torch.tensor(inputs)).logits[:, 0].argmax(-1)
    assert tokenizer.decode(predicted) == LETTERS


# ---- Pooling


@pytest.mark.oldest
@both_cells
@both_directions
@torch.no_grad()
def test_a_sequence_is_classified_without_its_padding(cell_type, bidirectional):
    fields = {"bidirectional": bidirectional, "num_labels": 3, "pad_token_id": 0}
    model = small_model(cell_type, MinRNNForSequenceClassification, **fields)
    logits = model(IDS, attention_mask=MASK).logits
    for row, alone in rows():
        assert_close(logits[row : row + 1], model(alone).logits)
        hidden_states = model.model(alone).last_hidden_state
        pooled = hidden_states.mean(1) if bidirectional else hidden_states[:, -1]
        assert_close(model(alone).logits, pooled @ model.score.weight.T)
    # Without a mask, it is read from the padding tokens; with embeddings, from the mask alone.
    assert_close(model(IDS.masked_fill(MASK == 0, 0)).logits, logits)
    assert_close(model(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=MASK).logits, logits)


@torch.no_grad()
def test_the_class_of_a_sequence_read_from_both_ends_does_not_depend_on_padding_in_bfloat16():
    model = small_model(model_class=MinRNNForSequenceClassification, bidirectional=True, num_labels=3)
    model = model.to(torch.bfloat16)
    logits = model(IDS, attention_mask=MASK).logits
    for row, alone in rows():
        assert_close(logits[row : row + 1], model(alone).logits)


@both_cells
@torch.no_grad()
def test_tokens_are_classified_without_their_padding(cell_type):
    model = small_model(cell_type, MinRNNForTokenClassification, bidirectional=True, num_labels=3)
    logits = model(IDS, attention_mask=MASK).logits
    for row, alone in rows():
        assert_close(logits[row : row + 1, MASK[row].bool()], model(alone).logits)


# ---- Question answering


@pytest.mark.oldest
@both_cells
@both_directions
def test_a_padded_batch_of_questions_gives_the_loss_and_gradients_of_its_sequences(cell_type, bidirectional):
    model = small_model(cell_type, MinRNNForQuestionAnswering, bidirectional=bidirectional)
    starts, ends = torch.tensor([0, 2, 1, 8]), torch.tensor([4, 3, 1, 8])  # without padding
    columns = [MASK[row].nonzero().flatten() for row in range(4)]
    positions = {
        "start_positions": torch.stack([columns[row][starts[row]] for row in range(4)]),
        "end_positions": torch.stack([columns[row][ends[row]] for row in range(4)]),
    }
    output = model(IDS, attention_mask=MASK, **positions)
    losses = []
    for row, alone in rows():
        logits = model.qa_outputs(model.model(alone).last_hidden_state)
        assert_close(output.start_logits[row, columns[row]], logits[0, :, 0])
        assert_close(output.end_logits[row, columns[row]], logits[0, :, 1])
        assert (output.start_logits[row].softmax(-1)[MASK[row] == 0] == 0).all()
        targets = torch.stack([starts[row], ends[row]])
        losses.append(F.cross_entropy(logits[0].T, targets, reduction="sum"))
    assert_close(output.loss, sum(losses) / 8)
    assert_close(model(IDS, attention_mask=MASK, **positions, num_items_in_batch=100).loss, sum(losses) / 200)

    # Not of the bias of the head, which moves all logits alike and has no gradient.
    parameters = [*model.model.parameters(), model.qa_outputs.weight]
    for actual, expected in zip(
        torch.autograd.grad(output.loss, parameters), torch.autograd.grad(sum(losses) / 8, parameters)
    ):
        assert actual.any()
        assert_close(actual, expected)


def test_an_answer_outside_the_sequence_has_no_loss():
    model = small_model(model_class=MinRNNForQuestionAnswering, bidirectional=True)
    outside = torch.tensor([3, 9, 9, 9])  # only the first row has an answer
    output = model(IDS, start_positions=outside, end_positions=outside)
    expected = [F.cross_entropy(logits[:1], outside[:1]) for logits in (output.start_logits, output.end_logits)]
    assert_close(output.loss, sum(expected) / 2)
    assert model(IDS).loss is None and model(IDS, start_positions=outside).loss is None
