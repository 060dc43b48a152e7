"""`minrnn COMMAND` does what the program does that it stands for."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from printable_model import continuation, printable_model, save

import minrnn
from training.tokenizers import byte_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        """The status, output and last line of errors of `minrnn ...`, run in `tmp_path`."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["minrnn", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        for _, program, _ in minrnn.COMMANDS.values():  # runpy warns of what is imported already
            monkeypatch.delitem(sys.modules, str(program), raising=False)
        status = 0
        try:
            minrnn.main()
        except SystemExit as end:
            status = end.code or 0
        output, errors = capsys.readouterr()
        return status, output, errors.splitlines()[-1] if errors else ""

    return run


@pytest.fixture(scope="module")
def model():
    return printable_model()


@pytest.fixture
def folder(model, tmp_path):
    return save(model, tmp_path / "model")


def test_sample_prints_what_generate_writes(model, folder, run):
    assert run("sample", folder, "def main", "--temperature", 0, "--max-new-tokens", 40) == (
        0, "def main" + continuation(model, "def main", 40) + "\n", "",
    )  # fmt: skip
    torch.manual_seed(3)
    ids = byte_tokenizer()("def main", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=40, do_sample=True, temperature=0.5, pad_token_id=257)[0]
    status, output, _ = run("sample", folder, "def main", "--temperature", 0.5, "--seed", 3, "--max-new-tokens", 40)
    assert status == 0 and output == byte_tokenizer().decode(expected, skip_special_tokens=True) + "\n"


def test_diagnose_prints_the_report_of_a_text(model, folder, run, tmp_path):
    text = "def read(path):\n" * 20
    (tmp_path / "text.py").write_text(text)
    status, output, _ = run("diagnose", folder, "text.py")
    reports = model.model.diagnose_states(byte_tokenizer()(text, return_tensors="pt").input_ids)
    assert status == 0 and output.splitlines() == [str(report) for report in reports]


@pytest.mark.parametrize("name, program", [("train", "train.py"), ("export", "modeling_minrnn/export.py")])
def test_help_is_that_of_the_program(name, program, run, monkeypatch, capsys):
    status, output, _ = run(name, "--help")
    monkeypatch.setattr(sys, "argv", [f"minrnn {name}", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(program.removesuffix(".py").replace("/", "."), run_name="__main__")
    assert status == 0 and output == capsys.readouterr().out
    assert output.startswith(f"usage: minrnn {name} ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sample", "absent/folder/x", "x"], "minrnn sample: error: .*"),
        (["sample", "model", ""], "minrnn sample: error: the prompt is empty"),
        (["diagnose", "model", "absent.txt"], "minrnn diagnose: error: .*absent.txt"),
        (["train", "absent.yaml"], "error: absent.yaml: no such configuration file"),
        (["export", "model"], "minrnn export: error: the following arguments are required: folder"),
        (["sing"], "minrnn: error: argument COMMAND: invalid choice: 'sing'"),
        ([], "minrnn: error: the following arguments are required: COMMAND"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments, message, folder, run):
    status, output, error = run(*arguments)
    assert status == 2 and not output
    assert re.match(message, error), error


def test_a_missing_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    status, _, error = run("serve", "model")
    assert status == 2 and error == "minrnn: error: serve needs typer: pip install 'modeling-minrnn[serving]'"


def test_the_list_of_commands_needs_neither_torch_nor_transformers():
    code = "import sys; sys.modules.update(torch=None, transformers=None); import minrnn; minrnn.main()"
    output = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert re.findall(r"^(\w+) {2,}", output, re.MULTILINE) == list(minrnn.COMMANDS)
