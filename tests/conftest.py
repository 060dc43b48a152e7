"""Every test runs offline, on one thread, with caches of its own and the same examples each time."""

import gc
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

# Before the first import of a Hugging Face library: they read these once.
CACHE = tempfile.TemporaryDirectory(prefix="minrnn-tests-")
os.environ |= {"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1"}
# Before the first import of triton: its interpreter runs the GPU kernels on CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

try:
    import triton_interpreter  # noqa: F401
except ImportError:  # triton is made for Linux
    pass

os.fsync = lambda descriptor: None  # no test can see what a power cut would lose; waiting for the disk takes minutes
torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("tests")


def pytest_collection_finish():
    """Imports leave so much that each collection of garbage, one in each run of train.py, would take half a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture
def setting(tmp_path):
    """Writes a configuration file for a run of seconds, changed by "section.key" arguments, and returns its path."""
    from small_runs import write_config

    return lambda **changes: write_config(tmp_path, **changes)


@pytest.fixture
def streaming(tmp_path):
    """Settings of a streamed data set so short that a run reads it more than once."""
    from small_runs import TEXT

    (tmp_path / "corpus").mkdir()
    rows = [json.dumps({"text": line}) for line in TEXT.splitlines()[:20]]
    (tmp_path / "corpus" / "train.jsonl").write_text("\n".join(rows))
    return {"data": {"files": [], "dataset": str(tmp_path / "corpus"), "streaming": True, "held_out_tokens": 20}}


@pytest.fixture
def forgotten_backends():
    """Which backends there are is asked anew, in this test and after it."""
    from modeling_minrnn import backends

    cached = backends.kernels, backends._is_installed
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def train_main(monkeypatch):
    """train.main in this process, with an accelerator of its own: accelerate keeps its settings until told not to.

    It draws no curve of the loss, which takes as long as the steps; two tests look at one.
    """
    from accelerate.state import AcceleratorState, GradientState

    import train

    monkeypatch.setattr(train, "plot_loss_curve", lambda folder: None)

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def main(path, overrides=()):
        forget()  # what a Trainer of another test left
        try:
            return train.main(path, list(overrides))
        finally:
            forget()

    return main


@pytest.fixture
def run(setting, train_main):
    """Trains in this process and returns the output folder."""
    from omegaconf import OmegaConf

    def run(**changes):
        path = setting(**changes)
        assert train_main(path) == 0
        return Path(OmegaConf.load(path).train.output_dir)

    return run


def pytest_terminal_summary(terminalreporter):
    """Every skip with its reason, once for tests of the same name in several classes."""
    skips = Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        names = report.nodeid.split("::")  # only the path where a whole module is skipped
        skips[names[0], names[-1], report.longrepr[2].removeprefix("Skipped: ")] += 1
    if skips:
        width = max(len(name) for _, name, _ in skips)
        terminalreporter.section("skipped, and why")
        for (_, name, reason), count in sorted(skips.items()):
            terminalreporter.line(f"{count:3}  {name:{width}}  {reason}")
