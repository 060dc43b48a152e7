"""The heads that an encoder carries: what they predict, from which tokens, and the losses they are trained with."""

import pytest
import torch
import torch.nn.functional as F
from small_models import CELLS, WrittenOut, assert_close, random_ids, small_config, small_model
from transformers import DataCollatorForMultipleChoice, DataCollatorForTokenClassification, Trainer, TrainingArguments

from modeling_minrnn import (
    MinRNNForMaskedLM,
    MinRNNForMultipleChoice,
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


def arguments(folder, **fields):
    return TrainingArguments(
        str(folder),
        learning_rate=0.01,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **fields,
    )


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
    settings = arguments(tmp_path, max_steps=400, per_device_train_batch_size=16)
    Trainer(model, settings, train_dataset=dataset).train()
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


# ---- Multiple choice

CHOICES = {"input_ids": IDS.view(2, 2, 9), "attention_mask": MASK.view(2, 2, 9)}


@both_directions
def test_each_choice_is_scored_as_if_it_were_read_alone_and_the_loss_is_over_the_choices(bidirectional):
    model = small_model(model_class=MinRNNForMultipleChoice, bidirectional=bidirectional, pad_token_id=0)
    labels = torch.tensor([1, 0])
    output = model(**CHOICES, labels=labels)
    scores = []
    for _, alone in rows():
        hidden_states = model.model(alone).last_hidden_state[0]
        scores.append((hidden_states.mean(0) if bidirectional else hidden_states[-1]) @ model.score.weight[0])
    scores = torch.stack(scores).view(2, 2)
    assert_close(output.logits, scores)
    assert_close(output.loss, -(scores[0].log_softmax(0)[1] + scores[1].log_softmax(0)[0]) / 2)
    assert_close(model(**CHOICES, labels=labels, num_items_in_batch=8).loss, output.loss / 4)
    parameters = [*model.parameters()]
    for actual, expected in zip(
        torch.autograd.grad(output.loss, parameters), torch.autograd.grad(F.cross_entropy(scores, labels), parameters)
    ):
        assert actual.any()
        assert_close(actual, expected)
    # Without a mask, it is read from the padding tokens; with embeddings, from the mask alone.
    padded = CHOICES["input_ids"].masked_fill(CHOICES["attention_mask"] == 0, 0)
    assert_close(model(padded).logits, output.logits)
    embeddings = model.get_input_embeddings()(CHOICES["input_ids"])
    assert_close(model(inputs_embeds=embeddings, attention_mask=CHOICES["attention_mask"]).logits, output.logits)


def test_choices_of_one_dimension_too_few_are_refused():
    model = small_model(model_class=MinRNNForMultipleChoice)
    with pytest.raises(ValueError, match=r"must be \(B, C, T\) or .* not \(4, 9\)"):
        model(IDS)
    with pytest.raises(ValueError, match="must be .* not None"):
        model()


def test_trainer_trains_to_choose_and_accumulates_choices_as_one_batch(tmp_path):
    tokenizer = byte_tokenizer()
    dataset = []
    for i, letter in enumerate(LETTERS):
        right = i % 3
        texts = [f"{letter}-{letter if choice == right else '?' * (choice + 1)}" for choice in range(3)]
        dataset.append({**tokenizer(texts), "label": right})
    results = []
    for accumulated in (1, 4):
        torch.manual_seed(0)
        model = MinRNNForMultipleChoice(small_config(vocab_size=len(tokenizer), pad_token_id=257, hidden_size=32))
        settings = arguments(
            tmp_path, max_steps=30, per_device_train_batch_size=8 // accumulated,
            gradient_accumulation_steps=accumulated, logging_steps=1, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(model, settings, DataCollatorForMultipleChoice(tokenizer), train_dataset=dataset)
        trainer.train()
        results.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][-1] < 0.1 * results[0][0]


# ---- Numbers for tokens


@both_directions
@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_loss_of_numbers_for_tokens_is_the_squared_error_without_padding_and_what_is_not_labelled(
    bidirectional, num_labels
):
    fields = {"bidirectional": bidirectional, "num_labels": num_labels, "problem_type": "regression"}
    model = small_model(model_class=MinRNNForTokenClassification, **fields)
    labels = torch.randn(4, 9, num_labels, generator=torch.Generator().manual_seed(0))
    labels[MASK == 0] = float("nan")
    labels[3, 4] = -100
    output = model(IDS, attention_mask=MASK, labels=labels)
    squares = []
    for row, alone in rows():
        predicted = model.score(model.model(alone).last_hidden_state)[0]
        wanted = labels[row, MASK[row].bool()]
        squares += [(a - b) ** 2 for a, b in zip(predicted.flatten(), wanted.flatten()) if b != -100]
    assert len(squares) == num_labels * (int(MASK.sum()) - 1)
    expected = torch.stack(squares).mean()
    assert_close(output.loss, expected)
    assert_close(
        model(IDS, attention_mask=MASK, labels=labels, num_items_in_batch=7).loss, torch.stack(squares).sum() / 7
    )
    for actual, wanted in zip(
        torch.autograd.grad(output.loss, [*model.parameters()]), torch.autograd.grad(expected, [*model.parameters()])
    ):
        assert actual.any()
        assert_close(actual, wanted)
    if num_labels == 1:
        assert torch.equal(model(IDS, attention_mask=MASK, labels=labels[..., 0]).loss, output.loss)


def test_labels_of_a_regression_that_were_rounded_or_have_another_shape_are_refused():
    model = small_model(model_class=MinRNNForTokenClassification, num_labels=2, problem_type="regression")
    collate = DataCollatorForTokenClassification(byte_tokenizer())
    batch = collate([{"input_ids": [1, 2], "labels": [0.25, 0.75]}])
    with pytest.raises(ValueError, match="floating-point numbers, not torch.int64"):
        model(**batch)
    for shape in ((4, 9), (4, 9, 1), (4, 9, 3), (9, 4, 2)):
        with pytest.raises(ValueError, match=r"labels must be \(4, 9, 2\), not \("):
            model(IDS, labels=torch.zeros(shape))


def test_trainer_trains_numbers_for_tokens(tmp_path):
    torch.manual_seed(0)
    fields = {"num_labels": 1, "problem_type": "regression", "hidden_size": 32}
    model = MinRNNForTokenClassification(small_config(**fields))
    ids = random_ids(16, 9)
    # How far up the vocabulary the token before is: within reach of the recurrence and the convolution.
    labels = F.pad(ids[:, :-1], (1, 0)) / 37
    dataset = [{"input_ids": row, "labels": numbers} for row, numbers in zip(ids, labels)]
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=100, per_device_train_batch_size=16, logging_steps=1),
        train_dataset=dataset,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.1 * labels.var()
