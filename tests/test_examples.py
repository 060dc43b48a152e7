"""Every example runs as its first line says, on a tiny model, and does what it says."""

import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from printable_model import continuation, printable_model, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.tokenizers import byte_tokenizer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that an example is about


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
