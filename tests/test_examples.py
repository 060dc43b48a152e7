"""Every example runs as its first line says, on a tiny model, and does what it says."""

import io
import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from printable_model import continuation, printable_model, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_model import load
from training.tokenizers import byte_tokenizer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that an example is about


@pytest.fixture
def finetune_chat():  # needs trl, which not every environment has
    from examples import finetune_chat

    return finetune_chat


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(module, *arguments, text=""):
        """What `python -m module ...` prints, run in `tmp_path` with `text` as its input."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        capsys.readouterr()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def model():
    return printable_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("examples") / "model")


def test_chat_answers_from_its_state_what_a_model_answers_that_reads_the_whole_transcript(model, folder, run):
    output = run("examples.chat", "--model", folder, "--max-new-tokens", 20, text="hello\nand then?\n")
    first, first_size, second, second_size = output.splitlines()
    transcript = "user: hello<eos>assistant: "
    assert first == continuation(model, transcript, 20)
    transcript += f"{first}<eos>user: and then?<eos>assistant: "
    assert second == continuation(model, transcript, 20)
    assert second != continuation(model, "user: and then?<eos>assistant: ", 20)  # the first turn matters
    assert second_size.startswith(f"[{len(byte_tokenizer()(transcript).input_ids) + 20} tokens ")
    kept = 4 * 2 * (21 + 3 * 14)  # bytes of float32, layers, channels of the state and of three tokens
    assert first_size.endswith(f" tokens in a state of {kept / 1000:.1f} kB]")
    assert second_size.split(" in ")[1] == first_size.split(" in ")[1]


def test_lora_learns_and_leaves_a_model_that_needs_no_peft(folder, run, tmp_path):
    output = run("examples.finetune_lora", "--model", folder, "--output", "tuned", "--steps", 20)
    before, after = map(float, re.search(r"loss before (\S+), after (\S+) nats", output).groups())
    tuned, tokenizer = (auto.from_pretrained(tmp_path / "tuned") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert not (tmp_path / "tuned" / "adapter_config.json").exists()
    # The loss that it says, on the lines that it evaluates: bytes and the end token, each but the first predicted.
    lines = [f"{a} plus {b} is {a + b}.\n<eos>" for a in range(40) for b in range(40)][1::50]
    batch = tokenizer(lines, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    with torch.no_grad():
        assert tuned(**batch, labels=labels).loss.item() == pytest.approx(after, rel=0.02)  # a mean of batches' means
    assert after < before - 0.5


def test_finetune_chat_trains_a_model_that_chats_from_its_folder(finetune_chat, run, monkeypatch, tmp_path):
    monkeypatch.setattr(finetune_chat, "TRAINING", 200)
    monkeypatch.setattr(finetune_chat, "HELD_OUT", 4)
    monkeypatch.setattr(sys, "argv", ["finetune_chat", "--output", str(tmp_path / "chat"), "--steps", "6"])
    finetune_chat.main()
    model, tokenizer = (auto.from_pretrained(tmp_path / "chat") for auto in (AutoModelForCausalLM, AutoTokenizer))
    start, _ = load(None)
    rng, losses = random.Random(1), []
    batch = [finetune_chat.make_dialogue(rng) for _ in range(4)]
    inputs = [tokenizer.apply_chat_template(each, return_tensors="pt")["input_ids"] for each in batch]
    for each in (start, model):
        with torch.no_grad():
            losses.append(sum(each(ids, labels=ids).loss.item() for ids in inputs) / 4)
    assert losses[1] < losses[0] - 0.3
    output = run("examples.chat", "--model", tmp_path / "chat", "--max-new-tokens", 5, text="Hello, I am Ada.\n")
    assert " tokens in a state of " in output


def test_dialogues_are_answered_rightly_and_right_is_letter_by_letter(finetune_chat, model):
    rng = random.Random(0)
    for _ in range(30):
        *greeting, question, answer, other, last = (each["content"] for each in finetune_chat.make_dialogue(rng))
        name = re.fullmatch(r"Hello, I am (\w+)\.", greeting[0])[1]
        assert greeting[1] == f"Hello, {name}!" and question != other
        for asked, told in ((question, answer), (other, last)):
            a, b, word = re.fullmatch(
                r"(?:What is (\d) plus (\d)\?|Say (\w+) twice\.|What is my name\?)", asked
            ).groups()
            right = (
                f"{a} plus {b} is {int(a) + int(b)}." if a else f"{word} {word}" if word else f"Your name is {name}."
            )
            assert told == right
    said = continuation(model, "user: hello<eos>assistant: ", 40)
    dialogues = [finetune_chat.turn("hello", said), finetune_chat.turn("hello", said[:-1] + "?")]
    assert finetune_chat.share_right(model, byte_tokenizer(), dialogues) == 0.5


def test_dpo_learns_preferences_that_hold_for_pairs_it_has_not_seen(run, tmp_path):
    output = run("examples.dpo", "--output", "dpo", "--steps", 12)
    accuracy, loss = re.search(r"held-out pairs learned: (\d+)%, loss (\S+) ", output).groups()
    assert int(accuracy) > 95 and float(loss) < 0.5
    start, tokenizer = load(None)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")
    margins = []
    for each in (start, tuned):
        sums = []
        for answer in ("7.", "Well, 3 plus 4, let me see, is 7."):
            question = "user: What is 3 plus 4?<eos>assistant: "
            ids = torch.tensor(tokenizer(f"{question}{answer}<eos>").input_ids)[None]
            with torch.no_grad():
                likely = each(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            sums.append(likely[len(tokenizer(question).input_ids) - 1 :].sum().item())
        margins.append(sums[0] - sums[1])
    assert margins[1] > margins[0] + 5


def test_grpo_learns_what_is_rewarded(run, tmp_path):
    output = run("examples.grpo", "--output", "grpo", "--steps", 12)
    first, last = map(float, re.search(r"first step (\S+), of the last (\S+)", output).groups())
    assert last > first + 0.3
    tuned, tokenizer = (auto.from_pretrained(tmp_path / "grpo") for auto in (AutoModelForCausalLM, AutoTokenizer))
    with torch.no_grad():
        likely = tuned(tokenizer("Number 7: ", return_tensors="pt").input_ids).logits[0, -1].softmax(-1)
    assert likely[ord("0") : ord("9") + 1].sum() > 0.3  # of bytes drawn evenly 0.04


def test_classify_learns_to_tell_questions_from_statements(run):
    output = run("examples.classify")
    assert float(re.search(r"accuracy on 100 held-out texts: (\S+)", output)[1]) > 0.95
    assert re.findall(r"'label': '(\w+)'", output) == ["question", "statement"]


def test_onnx_streams_the_text_of_generate_without_importing_torch(model, folder, run, tmp_path):
    run("modeling_minrnn.export", folder, "onnx")
    stream = (
        "import sys, runpy; sys.modules.update(torch=None, transformers=None); "  # importing these is an ImportError
        "runpy.run_module('examples.onnx_stream', run_name='__main__')"
    )

    def streamed(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", stream, "onnx", "def main", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    output = streamed("--max-new-tokens", 40)
    assert output == "def main" + continuation(model, "def main", 40) + "\n"
    sampled = [streamed("--temperature", 1, "--seed", seed) for seed in (1, 2)]
    assert sampled[0] != sampled[1]
