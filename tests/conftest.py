"""Every test runs offline, on one thread, with caches of its own and the same examples each time."""

import os
import tempfile
from collections import Counter

# Before the first import of a Hugging Face library: they read these once.
CACHE = tempfile.TemporaryDirectory(prefix="minrnn-tests-")
os.environ |= {"HF_HOME": CACHE.name, "HF_HUB_OFFLINE": "1"}
# Before the first import of triton: its interpreter runs the GPU kernels on CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("tests")


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
