"""The model under transformers' own Trainer, and split over processes."""

import copy
import json

import pytest
import torch
from processes import run_script_in_processes
from small_models import CELLS, random_ids, small_config, small_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_minrnn import MinRNNForCausalLM, MinRNNForSequenceClassification, MinRNNForTokenClassification
from training.tokenizers import byte_tokenizer

TEXTS = [f"{a} and {b} make {a + b}." for a in range(8) for b in range(8)]
PACKED = DataCollatorWithFlattening()
RIGHT = byte_tokenizer()
RIGHT.padding_side = "right"  # on the left the first token of a row would be predicted too, from padding
PADDED = DataCollatorForLanguageModeling(RIGHT, mlm=False)


@pytest.fixture(scope="module", params=CELLS)
def folder(request, tmp_path_factory):
    """An untrained model with dropout."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    MinRNNForCausalLM(small_config(request.param, vocab_size=258, dropout=0.1)).save_pretrained(path)
    return path


@pytest.fixture
def trainer(tmp_path):
    def trainer(model, dataset, collator=None, **settings):
        settings = {
            "max_steps": 6,
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "learning_rate": 0.02,
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
        } | settings
        arguments = TrainingArguments(
            str(tmp_path / "trainer"), use_cpu=True, report_to="none", disable_tqdm=True, **settings
        )
        return Trainer(model, arguments, data_collator=collator, train_dataset=dataset, eval_dataset=dataset)

    return trainer


def tokens():
    return [{"input_ids": byte_tokenizer()(text)["input_ids"]} for text in TEXTS]


@pytest.mark.parametrize("collator", [PACKED, PADDED], ids=["packed", "padded"])
def test_trainer_finetunes_a_saved_model(folder, trainer, tmp_path, collator):
    run = trainer(AutoModelForCausalLM.from_pretrained(folder), tokens(), collator, max_steps=40)
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()["eval_loss"]
    assert before == pytest.approx(torch.tensor(258.0).log().item() + 0.5, abs=0.3)  # logits of variance 1
    assert after < 2.6  # the frequencies of single characters give 2.9
    run.save_model(tmp_path / "tuned")
    tuned = trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"), tokens(), collator)
    assert tuned.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-6)


def test_a_resumed_training_ends_as_the_uninterrupted_one(folder, trainer):
    settings = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    run = trainer(AutoModelForCausalLM.from_pretrained(folder), tokens(), PACKED, **settings)
    run.train()
    resumed = trainer(AutoModelForCausalLM.from_pretrained(folder), tokens(), PACKED, **settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert resumed.state.global_step == 6
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, run.model.get_parameter(name)), name
    assert resumed.state.log_history[:-1] == run.state.log_history[:-1]  # the last one is of times


def unevenly_labelled():
    """Rows with different numbers of labels: a mean of means would weigh them differently."""
    ids = random_ids(16, 9)
    labels = ids.masked_fill(torch.arange(9) <= torch.arange(16)[:, None] % 8, -100)
    return [{"input_ids": row, "labels": row_labels} for row, row_labels in zip(ids, labels)]


def assert_same_training(model, expected, start):
    """Equal to a ten-thousandth of the way that each parameter went."""
    for name, parameter in expected.named_parameters():
        moved = (parameter - start.get_parameter(name)).norm()
        assert moved > 0, name
        assert (parameter - model.get_parameter(name)).norm() < 1e-4 * moved, name


WAYS = {
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "checkpointed": {"gradient_checkpointing": True},
    # aot_eager traces forward and backward as every backend does; inductor would go on to compile C++ for minutes.
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # by its older name
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell_type", CELLS)
def test_training_in_other_ways_gives_the_same_weights(cell_type, way, trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments sets it for the whole process
    start = small_model(cell_type)
    settings = {"optim": "sgd", "max_steps": 3}
    runs = [trainer(copy.deepcopy(start), unevenly_labelled(), **settings | way) for way in ({}, WAYS[way])]
    for run in runs:
        run.train()
    assert_same_training(runs[1].model, runs[0].model, start)


def test_documents_grouped_by_length_keep_their_losses(trainer):
    model = small_model(vocab_size=258)
    dataset = [{"input_ids": row["input_ids"][i % 11 :]} for i, row in enumerate(tokens())]
    batches = []

    def collator(rows):
        batches.append([torch.tensor(row["input_ids"]) for row in rows])
        return PADDED(rows)

    settings = {"train_sampling_strategy": "group_by_length", "learning_rate": 0.0, "max_steps": 16}
    run = trainer(model, dataset, collator, **settings)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    for batch, loss in zip(batches, losses, strict=True):
        with torch.no_grad():
            alone = sum(model(ids[None], labels=ids[None], num_items_in_batch=1).loss for ids in batch)
        assert loss == pytest.approx(alone.item() / sum(len(ids) - 1 for ids in batch), rel=1e-5)
    padding = sum(len(batch) * max(map(len, batch)) - sum(map(len, batch)) for batch in batches)
    assert padding < 0.15 * sum(len(row["input_ids"]) for row in dataset)  # in the order of the data 0.23


class Renamed(MinRNNForCausalLM):
    """A class of a user's own."""


def lora(model, folder):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))


WRAPPED = {
    "itself": lambda model, folder: model,
    "adapter": lora,
    "code of the folder": lambda model, folder: get_class_from_dynamic_module(
        "modeling_minrnn.MinRNNForCausalLM", folder
    ).from_pretrained(folder),
    "subclass": lambda model, folder: Renamed.from_pretrained(folder),
    # As fully_shard makes one.
    "sharded": lambda model, folder: type("FSDPRenamed", (Renamed,), {}).from_pretrained(folder),
}


@pytest.mark.oldest
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", WRAPPED)
def test_label_smoothing_is_that_of_the_next_token(way, trainer, tmp_path):
    model = small_model(scan_backend="torch")
    model.save_pretrained(tmp_path / "model")
    ids = random_ids(4, 11)
    labels = ids.clone()
    labels[2, :6] = -100
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]
    run = trainer(WRAPPED[way](model, tmp_path / "model"), data, label_smoothing_factor=0.1)
    log_probabilities = model(ids).logits[:, :-1].log_softmax(-1)
    told = -log_probabilities.gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    losses = (0.9 * told - 0.1 * log_probabilities.mean(-1))[labels[:, 1:] != -100]
    assert run.evaluate()["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)


def test_a_head_of_any_name_has_the_loss_of_its_task():
    tagger = type("Tagger", (MinRNNForTokenClassification,), {})
    model = small_model(model_class=tagger, num_labels=3)
    ids = random_ids(2, 7)
    outputs = model(ids, labels=ids % 3)
    expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), (ids % 3).flatten())
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_trainer_predicts_without_returning_states(trainer):
    model = small_model(model_class=MinRNNForSequenceClassification, num_labels=3)
    dataset = [{"input_ids": random_ids(9, seed=i), "labels": i % 3} for i in range(10)]
    run = trainer(model, dataset)
    run.train()
    prediction = run.predict(dataset)
    with torch.no_grad():
        expected = model(torch.stack([row["input_ids"] for row in dataset])).logits
    assert prediction.predictions.shape == (10, 3)
    torch.testing.assert_close(torch.tensor(prediction.predictions), expected, rtol=1e-5, atol=1e-5)


# ---- Two processes


DATA_PARALLEL = """
import gc, sys, torch
import modeling_minrnn
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

folder = sys.argv[1]
[arguments] = HfArgumentParser(TrainingArguments).parse_json_file(folder + "/arguments.json")
assert arguments.world_size == 2
rows = torch.load(folder + "/rows.pt")
run = Trainer(AutoModelForCausalLM.from_pretrained(folder + "/start"), arguments, train_dataset=rows)
run.train()
run.save_model(folder + "/trained")
run.accelerator.free_memory()
del run
gc.collect()  # DistributedDataParallel must not be the last owner of the process group, see train.py
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_as_one_does_with_the_batch_of_both(trainer, tmp_path):
    start, rows = small_model(), unevenly_labelled()
    run = trainer(copy.deepcopy(start), rows, optim="sgd", max_steps=3, train_sampling_strategy="sequential")
    arguments = run.args.to_dict() | {"per_device_train_batch_size": run.args.per_device_train_batch_size // 2}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    torch.save(rows, tmp_path / "rows.pt")
    start.save_pretrained(tmp_path / "start")
    run_script_in_processes(DATA_PARALLEL, 2, tmp_path)
    run.train()
    assert_same_training(AutoModelForCausalLM.from_pretrained(tmp_path / "trained"), run.model, start)


SPLIT = """
import sys, torch
import modeling_minrnn
from transformers import AutoModelForCausalLM

ids, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    weights = dict(model.named_parameters())
    sizes = {name: weights[name].to_local().numel() for name in weights if hasattr(weights[name], "to_local")}
    sizes = {name: size for name, size in sizes.items() if size < weights[name].numel()}  # others are on both
    with torch.no_grad():
        logits = model(torch.load(ids)).logits
    if torch.distributed.get_rank() == 0:
        torch.save((logits, sizes), folder + "/output.pt")
torch.distributed.destroy_process_group()
"""


def test_models_split_over_two_processes_give_the_same_logits(tmp_path):
    ids = random_ids(2, 9)
    torch.save(ids, tmp_path / "ids.pt")
    models = {
        tmp_path / f"{cell_type}-{bidirectional}": small_model(
            cell_type, max_timescale=20, mlp_bias=True, bidirectional=bidirectional, expansion_factor=2
        )
        for cell_type in CELLS
        for bidirectional in (False, True)
    }
    for folder, model in models.items():
        model.save_pretrained(folder)
    said = run_script_in_processes(SPLIT, 2, tmp_path / "ids.pt", *models)
    assert "rules were not applied" not in said  # of tensor parallelism
    for folder, model in models.items():
        logits, sizes = torch.load(folder / "output.pt")
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        split = ["rnn.initial_state", "rnn.in_proj.weight", "rnn.in_proj.bias", "rnn.out_proj.weight"]
        split += ["reverse_" + name for name in split if model.config.bidirectional]
        split += ["mlp.up_proj.weight", "mlp.up_proj.bias", "mlp.down_proj.weight"]
        in_layers = {f"model.layers.{i}.{name}" for i in range(2) for name in split}
        assert sizes.keys() == {"model.embed_tokens.weight"} | in_layers
        for name, size in sizes.items():
            weight = model.get_parameter(name)
            assert abs(size - weight.numel() / 2) <= weight.shape[-1] / 2, name
