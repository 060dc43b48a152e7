"""Every test runs offline, on one thread, with caches of its own and the same examples each time."""

import os
import tempfile

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
