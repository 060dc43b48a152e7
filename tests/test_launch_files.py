"""The launch files of configs/accelerate: what accelerate makes of each of them, and a run over two machines."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_simple_launcher_cmd_env
from small_runs import losses

from training.config import InputError

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def launch_arguments(*command):
    return launch.launch_command_parser().parse_args([*command, "train.py"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_launch_file_begins_with_its_command_and_every_key_is_one_of_accelerate(path):
    text = path.read_text()
    comment = text[: text.index("\ncompute_environment")]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert f"accelerate launch --config_file {path.relative_to(ROOT)} " in comment
    known = vars(launch_arguments())
    for name, section in yaml.safe_load(text).items():
        if isinstance(section, dict):  # accelerate passes over what it does not know there
            assert section.keys() <= known.keys(), name


def test_the_readme_of_the_launch_files_has_a_line_for_each():
    lines = (ROOT / "configs" / "accelerate" / "README.md").read_text().splitlines()
    named = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert sorted(named) == [path.name for path in FILES]


def test_the_deepspeed_file_asks_for_zero_2_and_leaves_the_rest_to_the_trainer(monkeypatch):
    """What accelerate would start DeepSpeed with, which is not installed."""
    started = []
    monkeypatch.setattr(launch, "deepspeed_launcher", lambda args: started.append(prepare_deepspeed_cmd_env(args)))
    launch.launch_command(launch_arguments("--config_file", "configs/accelerate/deepspeed-zero2.yaml"))
    ((_, environment),) = started
    for name, value in {
        "USE_DEEPSPEED": "true",
        "DEEPSPEED_ZERO_STAGE": "2",
        "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "GRADIENT_ACCUMULATION_STEPS": "auto",
        "GRADIENT_CLIPPING": "auto",
    }.items():
        assert environment[f"ACCELERATE_{name}"] == value, name


def test_train_refuses_deepspeed_in_one_line(setting, train_main, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="^DeepSpeed steps by itself, .*: launch it without$"):
        train_main(setting())
    assert not (tmp_path / "run").exists()


def test_one_process_on_the_cpu_trains_as_without_a_launcher(setting, tmp_path, train_main, monkeypatch, capsys):
    """By what accelerate would start it with."""
    config, started = setting(), []
    assert train_main(config) == 0
    monkeypatch.setattr(launch, "simple_launcher", lambda args: started.append(prepare_simple_launcher_cmd_env(args)))
    launch.launch_command(launch_arguments("--config_file", "configs/accelerate/cpu.yaml"))
    ((command, environment),) = started
    assert command == [sys.executable, "train.py"] and environment["ACCELERATE_USE_CPU"] == "True"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert train_main(config, [f"train.output_dir={tmp_path / 'launched'}"]) == 0
    assert "1 x cpu" in capsys.readouterr().out
    assert losses(tmp_path / "launched") == losses(tmp_path / "run")


def test_two_machines_train_like_one_process(setting, tmp_path, train_main):
    config, two = setting(), tmp_path / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/several-nodes.yaml"]
    launcher += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    machines = [
        subprocess.Popen(
            [sys.executable, *launcher, "--machine_rank", rank, "train.py", config, f"train.output_dir={two}"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [machine.communicate(timeout=400)[0] for machine in machines]
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert "2 x cpu" in outputs[0] and "holds the model of step 8" not in outputs[1]
    assert train_main(config) == 0
    assert losses(two) == pytest.approx(losses(tmp_path / "run"), rel=1e-6)  # as in test_train.py
