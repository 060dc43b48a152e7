"""The model under TRL: supervised fine-tuning of packed documents, and preference optimisation."""

import copy
import math

import pytest
import torch
from small_models import CELLS, assert_close, small_model

from training.tokenizers import byte_tokenizer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

# TRL 1.16 knows gradient checkpointing by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning")

TEXTS = [f"{a} and {b} make {a + b}" + "." * (a * b) for a in range(4) for b in range(5)]
# As many tokens in a row as no document has, so that none is cut.
LAYOUTS = {
    "padded": {"max_length": 64},
    "padding_free": {"max_length": None, "padding_free": True},
    "packed": {"max_length": 64, "packing": True},
}


def byte_model(cell_type="mingru", **fields):
    return small_model(cell_type, vocab_size=258, **fields)


@pytest.fixture
def settings(tmp_path):
    """What the trainers share: one batch of all there is, and plain gradient descent, which keeps rounding small."""
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": len(TEXTS),
        "per_device_eval_batch_size": len(TEXTS),
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }


def documents():
    """Token ids of each text, ended as SFTTrainer ends them."""
    tokenizer = byte_tokenizer()
    return [torch.tensor(tokenizer(text + tokenizer.eos_token)["input_ids"]) for text in TEXTS]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell_type", CELLS)
def test_sft_computes_the_loss_and_the_step_of_documents_read_one_at_a_time(cell_type, layout, settings):
    model = byte_model(cell_type)
    alone = copy.deepcopy(model)
    data = datasets.Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**settings | LAYOUTS[layout]),
        train_dataset=data,
        eval_dataset=data,
        processing_class=byte_tokenizer(),
    )
    rows = next(iter(trainer.get_train_dataloader()))["input_ids"]
    assert len(rows) == (len(TEXTS) if layout == "padded" else 1)

    loss = sum(alone(ids[None], labels=ids[None], num_items_in_batch=1).loss for ids in documents())
    loss = loss / sum(len(ids) - 1 for ids in documents())
    loss.backward()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-6)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    # A step is as small as 1e-3 of a weight, which is rounded to 6e-8. The worst seen: 3.5e-5.
    for name, parameter in alone.named_parameters():
        assert_close(parameter - trainer.model.get_parameter(name), 0.1 * parameter.grad, 1e-4)


@pytest.mark.parametrize("cell_type", CELLS)
def test_dpo_scores_and_learns_preferences(cell_type, settings, tmp_path):
    start = byte_model(cell_type)
    start.save_pretrained(tmp_path / "start")
    sums = [(a, b) for a in (1, 2) for b in (3, 4)]
    pairs = [{"prompt": f"{a} and {b} make ", "chosen": f"{a + b}.", "rejected": "ten " * a} for a, b in sums]
    trainer = trl.DPOTrainer(
        str(tmp_path / "start"),
        args=trl.DPOConfig(**settings | {"max_steps": 20}),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)  # the model is its own reference
    for side in ("chosen", "rejected"):
        scores = [completion_log_probability(start, pair["prompt"], pair[side]) for pair in pairs]
        assert first[f"logps/{side}"] == pytest.approx(sum(scores) / len(pairs), rel=1e-6)
    assert last["loss"] < 0.5 * first["loss"]
    assert last["rewards/accuracies"] == 1


def completion_log_probability(model, prompt, completion):
    tokenizer = byte_tokenizer()
    ids = torch.tensor(tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"])
    with torch.no_grad():
        log_probabilities = model(ids[None]).logits[0, :-1].log_softmax(-1)
    chosen = log_probabilities.gather(1, ids[1:, None])[:, 0]
    return chosen[len(tokenizer(prompt)["input_ids"]) - 1 :].sum().item()


# Without positions and with padding nothing marks the documents of a packed row, for any model.
MARKS = [
    (rows, padding_free, position_ids)
    for rows in ("one document each", "packed")
    for padding_free in (False, True)
    for position_ids in (False, True)
    if rows != "packed" or padding_free or position_ids
]


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("rows, padding_free, position_ids", MARKS)
def test_whatever_trl_marks_documents_with_they_are_read_alone(rows, multiple, padding_free, position_ids):
    model = byte_model()
    parts = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 8, 2)]
    groups = [parts[:2], parts[2:]] if rows == "packed" else [[part] for part in parts]
    examples = [{"input_ids": torch.cat(group).tolist()} for group in groups]
    if rows == "packed":
        examples = [example | {"seq_lengths": [len(x) for x in group]} for example, group in zip(examples, groups)]
    collator = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(
        257, padding_free=padding_free, return_position_ids=position_ids, pad_to_multiple_of=multiple
    )
    batch = collator(examples)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    real = batch.get("attention_mask", batch["input_ids"] != 257).bool()
    alone = torch.cat([model(part[None]).logits[0] for part in parts])
    assert_close(logits[real], alone)


DIALOGUES = [
    [
        ("system", "Be kind."),
        ("user", "Grüß dich, 世界"),
        ("assistant", "Schön, 日本!"),
        ("user", "?"),
        ("assistant", ""),
    ],
    [("user", "assistant: is what you are"), ("assistant", "user: is what you are")],
]


def marked(dialogue):
    """The ids of a dialogue and True where the assistant writes, put together piece by piece."""
    ids, learned, tokenizer = [], [], byte_tokenizer()
    for role, content in dialogue:
        for text, of_assistant in ((f"{role}: ", False), (f"{content}<eos>", role == "assistant")):
            piece = tokenizer(text).input_ids
            ids += piece
            learned += [of_assistant] * len(piece)
    return torch.tensor(ids), torch.tensor(learned)


@pytest.mark.parametrize("packing", [False, True])
def test_assistant_only_loss_is_that_of_each_token_of_the_assistants_turns_and_their_ends(packing, settings):
    model, tokenizer = byte_model(), byte_tokenizer()
    messages = [[{"role": role, "content": content} for role, content in dialogue] for dialogue in DIALOGUES]
    total, count = 0, 0
    for dialogue, each in zip(DIALOGUES, messages):
        ids, learned = marked(dialogue)
        told = tokenizer.apply_chat_template(each, return_dict=True, return_assistant_tokens_mask=True)
        assert told["input_ids"] == ids.tolist() and [bool(x) for x in told["assistant_masks"]] == learned.tolist()
        log_probabilities = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total, count = total - log_probabilities[learned[1:]].sum(), count + int(learned[1:].sum())
    settings |= {"assistant_only_loss": True, "max_length": 256, "packing": packing}
    data = datasets.Dataset.from_list([{"messages": each} for each in messages])
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**settings), train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx((total / count).item(), rel=1e-6)
