"""The model under transformers' own Trainer, and split over processes."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from small_models import CELLS, random_ids, small_config, small_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from modeling_minrnn import MinRNNForCausalLM, MinRNNForSequenceClassification
from training.tokenizers import byte_tokenizer

TEXTS = [f"{a} and {b} make {a + b}." for a in range(8) for b in range(8)]
PACKED = DataCollatorWithFlattening()
PADDED = DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False)


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
    assert before == pytest.approx(torch.tensor(258.0).log().item(), abs=0.2)
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


def test_accumulated_gradients_are_those_of_the_whole_batch(trainer):
    # Rows with different numbers of labels: a mean of means would weigh them differently.
    ids = random_ids(16, 9)
    labels = ids.masked_fill(torch.arange(9) <= torch.arange(16)[:, None] % 8, -100)
    dataset = [{"input_ids": row, "labels": row_labels} for row, row_labels in zip(ids, labels)]
    settings = {"optim": "sgd", "max_steps": 3}
    runs = [
        trainer(small_model(), dataset, per_device_train_batch_size=4, **settings),
        trainer(small_model(), dataset, per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings),
    ]
    start = copy.deepcopy(runs[0].model)
    for run in runs:
        run.train()
    for name, parameter in runs[0].model.named_parameters():
        moved = (parameter - start.get_parameter(name)).norm()
        assert moved > 0, name
        assert (parameter - runs[1].model.get_parameter(name)).norm() < 1e-4 * moved, name


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


# ---- Tensor parallelism

SPLIT = """
import sys, torch
import modeling_minrnn
from transformers import AutoModelForCausalLM

ids, *folders = sys.argv[1:]
torch.set_num_threads(1)
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    weights = dict(model.named_parameters())
    sizes = {name: weights[name].to_local().numel() for name in weights if hasattr(weights[name], "to_local")}
    with torch.no_grad():
        logits = model(torch.load(ids), use_cache=True).logits
    if torch.distributed.get_rank() == 0:
        torch.save((logits, sizes), folder + "/output.pt")
torch.distributed.destroy_process_group()
"""


def test_models_split_over_two_processes_give_the_same_logits(tmp_path, pytestconfig):
    ids = random_ids(2, 9)
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "split.py").write_text(SPLIT)
    models = {tmp_path / cell_type: small_model(cell_type, max_timescale=20) for cell_type in CELLS}
    for folder, model in models.items():
        model.save_pretrained(folder)
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + [tmp_path / "split.py", tmp_path / "ids.pt", *models],
        env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for folder, model in models.items():
        logits, sizes = torch.load(folder / "output.pt")
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        split = ("rnn.in_proj.weight", "rnn.in_proj.bias", "mlp.up_proj.weight", "mlp.down_proj.weight")
        in_layers = {f"model.layers.{i}.{name}" for i in range(2) for name in split}
        assert sizes.keys() == {"model.embed_tokens.weight"} | in_layers
        for name, size in sizes.items():
            weight = model.get_parameter(name)
            assert abs(size - weight.numel() / 2) <= weight.shape[-1] / 2, name
