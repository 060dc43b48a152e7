"""train.py end to end on small text: what it leaves behind, how it goes on after a stop, what it refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from cases import WithoutFloat64
from safetensors.torch import load_file
from small_models import assert_close
from small_runs import TEXT, losses
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    get_scheduler,
    pipeline,
)

import train
from modeling_minrnn import NO_LOGITS, MinRNNConfig, MinRNNForCausalLM
from training import precision
from training.checkpoint import list_checkpoints
from training.config import InputError, TrainConfig, load_config
from training.data import RandomWindows, TokenStream, is_held_out, load_documents, token_stream
from training.optimizers import make_optimizer, parameter_groups
from training.report import plot_loss_curve, read_metrics
from training.tokenizers import byte_tokenizer

ROOT = Path(__file__).parent.parent


MUON = {"train.optimizer": "muon", "train.muon_learning_rate": 0.03}


def weights(folder):
    """The parameters of the newest checkpoint."""
    return load_file(max(folder.glob("checkpoints/*")) / "model.safetensors")


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---- What a run does


def test_training_on_the_standard_library_lowers_its_held_out_loss(run, tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    for name in ("abc", "base64", "bisect", "calendar", "cmd", "copy", "csv", "dis", "enum", "glob", "heapq", "shlex"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", library)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    folder = run(
        **{
            "data": {"files": [], "dataset": "python-stdlib", "held_out_fraction": 0.3, "held_out_tokens": 2000},
            "train.steps": 60,
            "train.batch_size": 8,
            "train.sequence_length": 64,
            "train.eval_every_steps": 20,
        }
    )
    held_out = losses(folder, "held_out_loss")
    assert losses(folder)[0] == pytest.approx(math.log(258) + 0.5, abs=0.3)  # untrained: logits of variance 1
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < 3.5  # the frequencies of single bytes alone give about 3.3


@pytest.mark.oldest
def test_the_output_folder_loads_in_transformers_and_has_the_loss_that_was_reported(run, tmp_path):
    folder = run(**{"data.held_out_tokens": None})
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    keep = int(0.9 * len(TEXT))
    tokens = tokenizer(TEXT[keep:], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item()
    assert loss == pytest.approx(min(losses(folder, "held_out_loss")), rel=1e-5)

    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    generator = pipeline("text-generation", str(folder))
    text = generator("3 times", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("3 times") and len(text) > len("3 times")


@pytest.mark.oldest
def test_the_trainer_of_transformers_finetunes_the_output_folder_and_resumes(run, tmp_path):
    folder = run()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset = [tokenizer(line) for line in TEXT.splitlines()[:32]]

    def trainer():
        arguments = TrainingArguments(
            str(tmp_path / "tuned"), max_steps=4, save_steps=2, per_device_train_batch_size=4, use_cpu=True,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        model = AutoModelForCausalLM.from_pretrained(folder)
        return Trainer(model, arguments, collator, dataset, dataset, processing_class=tokenizer)

    uninterrupted, resumed = trainer(), trainer()
    before = uninterrupted.evaluate()["eval_loss"]
    uninterrupted.train()
    assert uninterrupted.evaluate()["eval_loss"] < before
    resumed.train(resume_from_checkpoint=str(tmp_path / "tuned" / "checkpoint-2"))
    assert_equal_weights(resumed.model.state_dict(), uninterrupted.model.state_dict())


def test_the_output_folder_has_the_losses_and_their_curve(run, monkeypatch):
    monkeypatch.setattr(train, "plot_loss_curve", plot_loss_curve)
    folder = run()
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "held_out_loss" in row] == [4, 8]
    for row in rows:
        if "held_out_loss" in row:
            assert row["bits_per_byte"] == pytest.approx(row["held_out_loss"] / math.log(2))
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_model_folder_keeps_the_best_evaluation_not_the_last(run):
    too_high = {"train.learning_rate": 3.0, "train.min_learning_rate_ratio": 1.0, "train.warmup_steps": 0}
    folder = run(**too_high, **{"train.eval_every_steps": 1, "train.steps": 6})
    held_out = losses(folder, "held_out_loss")
    assert min(held_out) < held_out[-1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    _, documents = load_documents(load_config(str(folder / "run.yaml"), []).data)
    stream = token_stream(documents, byte_tokenizer(), 200)
    assert train.evaluate(model, stream)[0] == pytest.approx(min(held_out), rel=1e-6)
    in_windows = train.evaluate(model, stream, window=16)[0]
    assert losses(folder, "held_out_window_loss") == [pytest.approx(in_windows, rel=1e-6)]


def test_training_stops_early_without_a_new_best(run):
    folder = run(
        **{
            "train.learning_rate": 3.0,
            "train.warmup_steps": 0,
            "train.steps": 30,
            "train.eval_every_steps": 1,
            "train.early_stopping_patience": 3,
        }
    )
    held_out = losses(folder, "held_out_loss")
    assert len(held_out) < 30
    assert held_out.index(min(held_out)) == len(held_out) - 4


def test_samples_are_printed_and_do_not_change_training(run, tmp_path, capsys):
    dropout = {"model.dropout": 0.1}  # training draws random numbers of its own
    plain = run(**dropout)
    capsys.readouterr()
    prompts = {"train.sample_prompts": ["3 times", "5 times"], "train.sample_tokens": 3}
    sampled = run(**dropout, **prompts, **{"train.output_dir": str(tmp_path / "sampled")})
    output = capsys.readouterr()
    assert (output.out + output.err).count("\n3 times") + (output.out + output.err).count("\r3 times") == 2
    assert_equal_weights(weights(plain), weights(sampled))


def test_tokens_and_parameters_are_printed_before_training(run, capsys):
    folder = run()
    first = capsys.readouterr().out.splitlines()[0]
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert first.startswith(f"{parameters:,} parameters")
    assert "64 tokens a step, 512 in 8 steps; 200 held-out tokens" in first


def test_accumulated_micro_batches_equal_one_batch(run, tmp_path):
    whole = run()
    parts = run(**{"train.gradient_accumulation_steps": 4, "train.output_dir": str(tmp_path / "parts")})
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_bf16_follows_fp32_within_its_precision(run, tmp_path):
    full = run()
    half = run(**{"train.bf16": "force", "train.output_dir": str(tmp_path / "half")})
    assert losses(half) == pytest.approx(losses(full), rel=0.01)
    assert losses(half) != losses(full)
    assert all(weight.dtype == torch.float32 for weight in weights(half).values())


def test_a_cpu_that_would_emulate_bf16_trains_in_float32_and_says_so_once(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "emulates_bf16", lambda: True)
    full = run()
    capsys.readouterr()
    folder = run(**{"train.bf16": True, "train.output_dir": str(tmp_path / "half")})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "bf16" in line]
    assert line.startswith("train.bf16=true: this CPU has neither AVX-512 BF16 nor AMX, ")
    assert losses(folder) == losses(full)
    assert load_config(str(folder / "run.yaml"), []).train.bf16 is False
    assert json.loads((folder / "starts.jsonl").read_text().splitlines()[0])["notes"] == [line]
    assert f"\n# {line}\n" in (folder / "README.md").read_text()
    forced = run(**{"train.bf16": "force", "train.output_dir": str(tmp_path / "forced"), **MUON})
    assert losses(forced) != losses(full)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "BF16" in line]
    assert line.startswith("train.optimizer=muon: this CPU has neither AVX-512 BF16 nor AMX, ")


@pytest.mark.parametrize(
    "gain, arithmetic, is_taken",
    [(2.0, torch.float32, True), (1.4, torch.float32, False), (2.0, torch.bfloat16, False)],
)
def test_faster_products_are_taken_where_a_trial_finds_them_exact(monkeypatch, gain, arithmetic, is_taken):
    clock, matmul = [0.0], torch.matmul

    def product(*factors):
        is_medium = torch.get_float32_matmul_precision() == "medium"
        clock[0] += 1 / gain if is_medium else 1
        return matmul(*(factor.to(arithmetic) for factor in factors)).float() if is_medium else matmul(*factors)

    monkeypatch.setattr(torch, "matmul", product)
    monkeypatch.setattr(precision.time, "process_time", lambda: clock[0])
    assert bool(precision.faster_products()) == is_taken
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_with_faster_products_says_so_and_leaves_the_setting_as_it_was(run, monkeypatch, capsys):
    seen = []

    def seeing(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return make_optimizer(*arguments)

    line = "products by another library"
    monkeypatch.setattr(train, "faster_products", lambda: line)
    monkeypatch.setattr(train, "WORTH_A_TRIAL", 1)
    monkeypatch.setattr(train, "make_optimizer", seeing)
    folder = run(**{"train.steps": 3})
    assert seen == ["medium"] and torch.get_float32_matmul_precision() == "highest"
    assert capsys.readouterr().out.count(line) == 1
    assert json.loads((folder / "starts.jsonl").read_text().splitlines()[0])["notes"] == [line]


def test_streaming_trains_and_resumes_on_a_local_data_set(run, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = [json.dumps({"text": line}) for line in TEXT.splitlines()]
    (corpus / "train.jsonl").write_text("\n".join(rows))
    data = {"data": {"files": [], "dataset": str(corpus), "streaming": True, "held_out_tokens": 100}}
    whole = run(**data)
    shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000008")
    resume = {"train.output_dir": str(tmp_path / "stopped"), "train.resume": True}
    resumed = run(**data, **resume)
    assert losses(resumed) == losses(whole)
    assert_equal_weights(weights(resumed), weights(whole))
    trained_on = next(row for row in rows if not is_held_out(json.loads(row)["text"], 0.1))
    (corpus / "train.jsonl").write_text("\n".join(row for row in rows if row != trained_on))
    with pytest.raises(InputError, match="name another text .* with other first training tokens$"):
        run(**data, **resume)


# ---- Evaluation


def tiny_model(**arguments):
    set_seed(0)
    return MinRNNForCausalLM(MinRNNConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, **arguments))


@pytest.mark.oldest
@pytest.mark.parametrize("cell_type", ["mingru", "minlstm"])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 99, 100, 1000])
def test_evaluation_in_chunks_equals_one_forward_pass_over_everything(cell_type, chunk_tokens):
    model = tiny_model(cell_type=cell_type).eval()
    torch.nn.init.normal_(model.lm_head.weight)  # predictions far from uniform
    tokens = torch.randint(50, (100,))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits.double(), tokens[1:]).item()
    stream = TokenStream([tokens[:33].numpy(), tokens[33:].numpy()])
    loss, accuracy = train.evaluate(model, stream, chunk_tokens)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert accuracy == pytest.approx((logits.argmax(-1) == tokens[1:]).double().mean().item())
    assert expected > 4.5  # not the loss of a uniform prediction, 3.9


@pytest.mark.parametrize("chunk_tokens", [1, 30, 1000])
def test_evaluation_in_windows_begins_each_with_nothing_read_and_scores_every_token_once(chunk_tokens):
    model, tokens = tiny_model().eval(), torch.randint(50, (95,))  # 13 windows of 7, and 3 targets
    torch.nn.init.normal_(model.lm_head.weight)
    total = 0.0
    with torch.no_grad():
        for start in range(0, 94, 7):
            window = tokens[start : start + 8]
            logits = model(window[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    stream = TokenStream([tokens[:33].numpy(), tokens[33:].numpy()])
    assert train.evaluate(model, stream, chunk_tokens, window=7)[0] == pytest.approx(total / 94, rel=1e-6)
    assert train.evaluate(model, stream)[0] != pytest.approx(total / 94, rel=1e-3)


@pytest.mark.parametrize("carry_state", [False, True])
def test_a_device_without_float64_trains_and_evaluates(setting, train_main, tmp_path, carry_state):
    """The operators of the package are tested apart: a mode does not see into them."""
    settings = {"train.carry_state": carry_state, "train.sample_prompts": ["3 times"], "train.sample_tokens": 2}
    with WithoutFloat64():
        assert train_main(setting(**settings, **{"train.steps": 2, "train.eval_every_steps": 1})) == 0
    assert len(losses(tmp_path / "run", "held_out_loss")) == 2


# ---- Optimizer


def test_weight_decay_spares_all_but_the_matrices_of_linear_layers():
    model = tiny_model(tie_word_embeddings=False, learned_initial_state=True, max_timescale=100)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    kinds = {names[p].removesuffix(".weight").split(".")[-1] for p in decayed["params"]}
    assert kinds == {"out_proj", "up_proj", "down_proj", "lm_head"}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_an_output_tied_to_the_embedding_is_not_decayed():
    model = tiny_model(tie_word_embeddings=True)
    decayed, _ = parameter_groups(model, 0.3)
    assert all(parameter is not model.lm_head.weight for parameter in decayed["params"])


def test_muon_steps_the_hidden_matrices_and_adamw_the_rest(setting, train_main, tmp_path):
    """train.py against torch's two optimizers by hand, on its batches; each with its own rate, on one schedule."""
    config = setting(**MUON, **{"train.weight_decay": 0.2, "train.grad_clip_norm": 0.5})
    settings = load_config(config, [])
    assert train_main(config) == 0

    tokenizer, _ = byte_tokenizer(), set_seed(0)
    model = train.build_model(settings.model, tokenizer).train()
    named = dict(model.named_parameters())
    matrices = [name for name in named if name.split(".")[-2] in ("in_proj", "out_proj", "up_proj", "down_proj")]
    assert len(matrices) == 8
    apart = lambda names, decay: [{"params": [named[name]], "weight_decay": decay(name)} for name in names]  # noqa: E731
    optimizers = [
        (torch.optim.Muon(apart(matrices, lambda name: 0.0 if "in_proj" in name else 0.2)), 0.03),
        (torch.optim.AdamW(apart(named.keys() - matrices, lambda name: 0.0), betas=(0.9, 0.95), fused=True), 0.01),
    ]
    schedules = [
        get_scheduler("cosine_with_min_lr", optimizer, 2, 8, {"min_lr_rate": 0.1}) for optimizer, _ in optimizers
    ]
    documents, _ = load_documents(settings.data)
    batches = RandomWindows(token_stream(documents, tokenizer), 16, 4, 0, slice(None))
    for step in range(8):
        inputs, targets = next(batches)
        arguments = {"shift_labels": targets, "num_items_in_batch": targets.numel(), "logits_to_keep": NO_LOGITS}
        model(inputs, labels=targets, use_cache=False, **arguments).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for (optimizer, rate), scheduler in zip(optimizers, schedules):
            for group in optimizer.param_groups:
                group["lr"] = rate * scheduler.lr_lambdas[0](step)
            optimizer.step()
            optimizer.zero_grad()
    trained = weights(tmp_path / "run")
    for name, parameter in named.items():
        if name in trained:
            assert_close(trained[name], parameter, 1e-6)  # other bits become others in bfloat16


def test_an_output_of_its_own_is_not_for_muon():
    model = tiny_model(tie_word_embeddings=False)
    settings = TrainConfig(optimizer="muon", learning_rate=0.01, muon_learning_rate=0.02)
    groups = make_optimizer(model, settings).param_groups
    assert [(group["weight_decay"], group["initial_lr"]) for group in groups] == [
        (0.1, 0.02), (0.0, 0.02), (0.1, 0.01), (0.0, 0.01),
    ]  # fmt: skip
    assert [parameter is model.lm_head.weight for parameter in groups[2]["params"]] == [True]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.optimizer": "muon"}, "train.muon_learning_rate is None: must be set, e.g. to 0.02, with "),
        (
            {"train.muon_learning_rate": 0.02},
            "train.muon_learning_rate is 0.02: must be set, .*, and null with adamw$",
        ),
        ({"train.optimizer": "muon", "train.muon_learning_rate": 0.0}, "is 0.0: must be positive and finite$"),
        ({"train.optimizer": "sgd"}, "train.optimizer: .*sgd"),
    ],
)
def test_rates_and_optimizer_that_do_not_fit_are_one_line(setting, train_main, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        train_main(setting(**changes))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("wsd", {10: 1.0, 50: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_the_learning_rate_warms_up_and_comes_down_to_its_minimum(schedule, expected):
    settings = TrainConfig(
        steps=100, warmup_steps=10, schedule=schedule, decay_steps=20 if schedule == "wsd" else 0
    )  # fmt: skip
    rates = [train.schedule(settings, step) for step in range(101)]
    assert {step: rates[step] for step in expected} == pytest.approx(expected)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    name, arguments = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        "wsd": ("warmup_stable_decay", {"num_decay_steps": 20, "min_lr_ratio": 0.1}),
    }[schedule]
    of_transformers = get_scheduler(name, optimizer, 10, 100, arguments).lr_lambdas[0]
    assert rates == pytest.approx([of_transformers(step) for step in range(101)], rel=1e-12)


# ---- Stopping and going on


@pytest.mark.oldest
@pytest.mark.parametrize("optimizer", [{}, MUON], ids=["adamw", "muon"])
def test_a_resumed_run_equals_one_that_was_never_stopped(run, tmp_path, optimizer):
    dropout = {"model.dropout": 0.1, "train.sample_prompts": ["3 times"], "train.sample_tokens": 5, **optimizer}
    whole = run(**dropout)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000008")
    resumed = run(**dropout, **{"train.output_dir": str(stopped), "train.resume": True})
    assert_equal_weights(weights(resumed), weights(whole))
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "held_out_loss") == losses(whole, "held_out_loss")


def test_a_finished_run_goes_on_when_given_more_steps(run):
    run()
    folder = run(**{"train.resume": True, "train.steps": 12})
    assert [row["step"] for row in read_metrics(folder) if "loss" in row] == list(range(1, 13))


def test_the_two_newest_checkpoints_are_kept(run):
    folder = run(**{"train.save_every_steps": 1})
    assert [path.name for path in sorted(folder.glob("checkpoints/*"))] == ["step-00000007", "step-00000008"]


def launch(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_ctrl_c_and_preemption_save_and_say_how_to_go_on(setting, tmp_path, train_main, number, code):
    config = setting(**{"train.steps": 100_000, "train.eval_every_steps": 100_000})
    process = launch("train.py", config)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not losses(tmp_path / "run"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "the same command with train.resume=true continues it" in output.splitlines()[-1]
    # transformers imports torchao where it is installed, which warns at each start unless it is told not to.
    assert not [word for word in ("Traceback", "torchao", "_pytree.py") if word in output]
    step = max((tmp_path / "run" / "checkpoints").iterdir())
    assert int(step.name.removeprefix("step-")) == read_metrics(tmp_path / "run")[-1]["step"]
    assert train_main(config, ["train.resume=true", f"train.steps={int(step.name[5:]) + 1}"]) == 0


def run_two_processes(*command):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-2-processes.yaml"]
    two = launch(*launcher, "--main_process_port", "0", *command, PYTHONPATH=str(ROOT))
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    return output


CHECKED_END = """
import gc, sys, torch, train

def checked(group=None):
    assert torch.nn.parallel.DistributedDataParallel not in map(type, gc.get_objects())
    print("no owner left")
    destroy(group)

destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, checked
sys.exit(train.main(sys.argv[1], sys.argv[2:]))
"""


def test_two_processes_train_like_one_and_their_group_outlives_the_data_parallel_model(setting, tmp_path, train_main):
    """The other way round, the end of a run waits for ever now and then: see train.py."""
    (tmp_path / "script.py").write_text(CHECKED_END)
    config = setting()
    output = run_two_processes(tmp_path / "script.py", config, f"train.output_dir={tmp_path / 'two'}")
    assert "2 x cpu" in output and output.count("no owner left") == 2
    assert train_main(config) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=1e-6)
    assert losses(tmp_path / "two", "held_out_loss") == pytest.approx(
        losses(tmp_path / "run", "held_out_loss"), rel=1e-5
    )


# ---- Bad input


def test_an_error_of_the_user_is_one_line_on_stderr_and_exit_code_2(setting):
    process = subprocess.run(
        [sys.executable, "train.py", setting(), "train.stepz=3"], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 2
    message = "error: command line: unknown key train.stepz; the nearest known one is train.steps\n"
    assert (process.stdout, process.stderr) == ("", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.hidden_size": 0}, "hidden_size"),
        ({"model.widht": 8}, "unknown key model.widht; the nearest known one is model."),
        ({"model.cell_type": "gru"}, ": model: .*cell_type must be one of"),
        ({"model.vocab_size": 257}, "^model.vocab_size is 257: the tokenizer has 258 tokens$"),
        ({"train.sequence_length": 10**6}, "^train.sequence_length is 1000000, but the training split has .* tokens"),
        (
            {"train.batch_size": 6, "train.gradient_accumulation_steps": 4},
            "^train.batch_size is 6: must be a multiple of 4",
        ),
        ({"train.resume": True}, "run holds no checkpoint$"),
        ({"train.trackers": ["tensorboards"]}, "^train.trackers: tensorboards unknown or not installed"),
        ({"data.tokenizer": "absent/absent"}, "^data.tokenizer 'absent/absent' cannot be loaded"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(setting, tmp_path, changes, message, train_main):
    path = setting(**changes)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        train_main(path)
    assert sorted(tmp_path.rglob("*")) == before


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_replaced_only_when_asked_to(run, setting, train_main):
    folder = run()
    before = snapshot(folder)
    path = setting(**{"train.steps": 4})
    with pytest.raises(InputError, match=r"holds a run: continue it with train.resume=true or replace it with"):
        train_main(path)
    assert snapshot(folder) == before
    assert train_main(path, ["train.overwrite=true"]) == 0
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000000", "step-00000004"]
    assert len(losses(folder)) == 4


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_replaced(setting, tmp_path, overwrite, train_main):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train_main(setting(**{"train.overwrite": overwrite}))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "irreplaceable"


def test_a_run_is_not_resumed_with_another_model_or_other_data(run, setting, train_main):
    folder = run()
    before = snapshot(folder)
    for changes, message in (
        ({"model.hidden_size": 24}, "model.hidden_size is 24, but .*/step-00000008/run.yaml has 16"),
        ({"data.tokenizer": "character"}, "name another text or tokenizer than before, with other training tokens"),
    ):
        with pytest.raises(InputError, match=message):
            train_main(setting(**changes, **{"train.resume": True}))
    assert snapshot(folder) == before


def test_a_checkpoint_of_another_architecture_is_refused(run, setting, tmp_path, train_main):
    folder = run()
    other = run(**{"model.hidden_size": 24, "train.output_dir": str(tmp_path / "other")})
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(other / "checkpoints", folder / "checkpoints")
    before = snapshot(folder)
    with pytest.raises(InputError, match=r"model.hidden_size is 16, but .*step-00000008/run.yaml has 24") as error:
        train_main(setting(**{"train.resume": True}))
    assert "\n" not in str(error.value)
    assert snapshot(folder) == before
