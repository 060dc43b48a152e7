"""Settings: the shipped files are valid, and every fault is one line that names the key and the file."""

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file

from modeling_minrnn import MinRNNConfig
from training.command_line import parse_command_line
from training.config import DataConfig, InputError, MixedConfig, RunConfig, load_config

CONFIGS = Path(__file__).parent.parent / "configs"
MINIMAL = """
data: {dataset: python-stdlib}
train: {steps: 9, batch_size: 2, sequence_length: 8, learning_rate: 0.01, eval_every_steps: 3, save_every_steps: 4,
        output_dir: out}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return str(path)


@pytest.mark.parametrize(
    "path", sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("paper/*.yaml")]), ids=lambda path: path.stem
)
def test_every_shipped_run_is_valid(path):
    # The path that a user gives for files is not part of a shipped file.
    files = ["data.files=[input.txt]"] if path.stem.startswith("shakespeare") else []
    config = load_config(str(path), files)
    MinRNNConfig(**config.model)
    assert config.train.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_launch_file_is_one_of_accelerate(path):
    load_config_from_file(str(path))


def test_a_value_on_the_command_line_wins_over_the_file_and_the_file_over_the_default(minimal):
    config = load_config(minimal, ["train.steps=10", "train.betas=[0.8,0.99]", "model.hidden_size=32"])
    assert (config.train.steps, config.train.batch_size, config.train.seed) == (10, 2, 0)
    assert config.train.betas == (0.8, 0.99)
    assert config.model == {"hidden_size": 32}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", "unknown key train.lerning_rate; the nearest known one is train.learning_rate"),
        ("data.tokeniser=byte", "unknown key data.tokeniser; the nearest known one is data.tokenizer"),
        ("trian.steps=1", "unknown section trian; the nearest known one is train"),
        ("train.steps=many", "train.steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("train.steps=1.5", "train.steps: Value '1.5' of type 'float' could not be converted to Integer"),
        ("train.bf16=maybe", "train.bf16: Invalid value 'maybe', expected one of [False, True, 'force']"),
        ("train.schedule=linear", "train.schedule: Invalid value 'linear', expected one of ['cosine', 'wsd']"),
        ("train.betas=[0.9]", "train.betas: TupleConfig length 1 does not match type hint length 2"),
        ("train=3", "section train is not a mapping of keys to values"),
        ("train.steps", "'train.steps' is not of the form section.key=value"),
    ],
)
def test_a_wrong_override_is_one_line_about_its_key(minimal, override, message):
    with pytest.raises(InputError) as error:
        load_config(minimal, [override])
    assert str(error.value) == f"command line: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {stepz: 3}", "unknown key train.stepz; the nearest known one is train.steps"),
        ("data: {dataset: python-stdlib}", "train.steps is missing"),
        ("- train", "not a mapping of the sections model, data, train and hub"),
        ("train: [", "while parsing a flow node did not find expected node content"),
        (
            MINIMAL.replace("python-stdlib", "python-stdlib, workers: 1"),
            "data.workers is 1: must be 0, or",
        ),
        (MINIMAL.replace("python-stdlib", "python-stdlib, workers: -1"), "data.workers is -1: must be 0, or"),
        (MINIMAL.replace("steps: 9", "steps: 0"), "train.steps is 0: must be at least 1"),
        (MINIMAL.replace("length: 8", "length: 0"), "train.sequence_length is 0: must be at least 1"),
        (MINIMAL.replace("dataset: python-stdlib", ""), "data: set one of data.dataset"),
        (MINIMAL.replace("python-stdlib", "python-stdlib, files: [a]"), "data: set one of data.dataset"),
        (MINIMAL.replace("python-stdlib", "python-stdlib, held_out_fraction: 1"), "data.held_out_fraction is 1.0"),
        (MINIMAL.replace("python-stdlib", "python-stdlib, tokenizer_vocab_size: 9"), "data.tokenizer_vocab_size is 9"),
        (
            MINIMAL.replace("dataset: python-stdlib", "mixture: [{weight: 1}]"),
            "data.mixture has {'weight': 1}: a source is",
        ),
        (
            MINIMAL.replace("dataset: python-stdlib", "mixture: {a: 1}"),
            "data.mixture has {'a': 1}: a source is {dataset",
        ),
        (
            MINIMAL.replace("dataset: python-stdlib", "mixture: [{files: a, dataset: b}]"),
            "data.mixture[0]: set one of",
        ),
        (
            MINIMAL.replace("dataset: python-stdlib", "mixture: [{files: a}, {dataset: b, weight: 0}]"),
            "data.mixture[1].weight is 0.0: must be positive",
        ),
        (
            MINIMAL.replace("dataset: python-stdlib", "mixture: [{files: a, datset: a}]"),
            "data.mixture: Key 'datset' not in 'MixedConfig'. Did you mean one of: 'dataset'",
        ),
        (MINIMAL.replace("steps: 9", "steps: 9, warmup_steps: 10"), "train.warmup_steps + train.decay_steps is 10"),
        (MINIMAL.replace("steps: 9", "steps: 9, schedule: wsd"), "train.decay_steps is 0: must be positive"),
        (MINIMAL + "hub: {push: true}", "hub.push needs hub.repository, e.g. user/name"),
        (MINIMAL + "hub: {repository: a/b/c}", "hub.repository: Repo id must be in the form"),
        (MINIMAL.replace("0.01", ".nan"), "train.learning_rate is nan: must be positive"),
    ],
)
def test_a_wrong_file_is_one_line_that_starts_with_its_path(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(str(path), [])
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_one_source_of_text_that_is_set_later_replaces_another_with_what_belongs_to_it(tmp_path, minimal):
    hub = tmp_path / "hub.yaml"
    hub.write_text(
        "data: {dataset: a/b, dataset_config: c, split: d, text_column: e, streaming: true, held_out_tokens: 9}"
    )
    data = load_config(minimal, [str(hub)]).data
    assert (data.dataset, data.dataset_config, data.split, data.text_column) == ("a/b", "c", "d", "e")
    data = load_config(minimal, ["data.dataset=elsewhere", str(hub), "data.split=f"]).data
    assert (data.dataset, data.dataset_config, data.split) == ("elsewhere", "c", "f")
    for override, expected in (
        ("data.files=a.txt", {"files": ["a.txt"]}),
        ("data.task=parity", {"task": "parity", "streaming": False}),
        ("data.mixture=[{dataset: a/b},{files: [x, y], weight: 2}]", {"mixture": [
            MixedConfig(dataset="a/b"), MixedConfig(files=["x", "y"], weight=2.0)]}),
    ):  # fmt: skip
        more = [] if "streaming" not in expected else ["data.streaming=false"]
        data = load_config(minimal, [str(hub), override, *more, "data.text_column=g"]).data
        assert data == DataConfig(**{"streaming": True, "held_out_tokens": 9, "text_column": "g"} | expected)
    data = load_config(minimal, ["data.files=a.txt", "data.held_out_files=b.txt", "data.dataset=null"]).data
    assert (data.files, data.held_out_files) == (["a.txt"], ["b.txt"])


def test_a_later_file_wins_over_the_first_and_the_command_line_over_both(tmp_path, minimal):
    (tmp_path / "later.yaml").write_text("train: {steps: 7, batch_size: 3}")
    config = load_config(minimal, ["train.batch_size=5", str(tmp_path / "later.yaml")])
    assert (config.train.steps, config.train.batch_size, config.train.sequence_length) == (7, 5, 8)
    (tmp_path / "later.yaml").write_text("train: {stepz: 7}")
    with pytest.raises(InputError, match=r"^.*later\.yaml: unknown key train.stepz; "):
        load_config(minimal, [str(tmp_path / "later.yaml")])


@pytest.fixture
def shown(monkeypatch, capsys):
    """What `train.py ARGUMENTS` prints before it ends."""

    def shown(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as end:
            parse_command_line()
        assert not end.value.code
        return capsys.readouterr().out

    return shown


def test_help_lists_every_key_with_its_default_and_meaning(shown):
    listed = dict(re.findall(r"^    (\w+\.\w+)  \((.*)\)\n        \S", shown("--help"), re.MULTILINE))
    keys = {f"{section.name}.{key.name}" for section in fields(RunConfig)[1:] for key in fields(section.type)}
    of_tokenizer = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert {*listed} == keys | {f"model.{key}" for key in MinRNNConfig.__annotations__ if key in vars(MinRNNConfig)
                                and key not in of_tokenizer and "plan" not in key}  # fmt: skip
    expected = {"train.steps": "required", "train.betas": "[0.9, 0.95]", "model.conv_kernel_size": "4",
                "data.held_out_tokens": "null", "data.files": "[]", "hub.private": "true"}  # fmt: skip
    assert {key: listed[key] for key in expected} == expected


def test_what_print_config_shows_is_a_file_of_the_same_run_with_nothing_left_to_defaults(minimal, tmp_path, shown):
    overrides = ["model.hidden_size=32", "data.mixture=[{dataset: a/b, weight: 3}, {files: c.txt}]"]
    (tmp_path / "shown.yaml").write_text(shown(minimal, "--print-config", *overrides))
    printed, run = load_config(str(tmp_path / "shown.yaml"), []), load_config(minimal, overrides)
    assert (printed.data, printed.train, printed.hub) == (run.data, run.train, run.hub)
    assert printed.model["cell_type"] == "mingru"
    assert MinRNNConfig(**printed.model).to_dict() == MinRNNConfig(**run.model).to_dict()


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"^configs/absent\.yaml: no such configuration file$"):
        load_config("configs/absent.yaml", [])
