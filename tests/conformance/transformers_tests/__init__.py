"""The tests folder of transformers' source distribution as a package, with stand-ins for modules that it leaves out.

The archive named in archive.txt is fetched once, by pip, which checks its hash.
"""

import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

from filelock import FileLock

REQUIREMENT = Path(__file__).parents[1] / "archive.txt"
CACHE = Path(__file__).parents[1] / ".archive"
NAME = REQUIREMENT.read_text().splitlines()[-1].split()[0].replace("==", "-")


def fetch() -> Path:
    """The tests folder of the archive. Raises OSError if it is not here yet and pip cannot get it."""
    tests = CACHE / NAME / "tests"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "lock"):  # the workers of pytest-xdist all come here
        if not tests.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                options = ["--no-deps", "--no-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
                command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, "-r", REQUIREMENT]
                pip = subprocess.run(command, capture_output=True, text=True)
                if pip.returncode:
                    raise OSError(f"pip could not fetch {NAME}: {pip.stderr.strip().splitlines()[-1]}")
                with tarfile.open(Path(folder, f"{NAME}.tar.gz")) as archive:
                    archive.extractall(folder, filter="data")
                Path(folder, NAME).rename(CACHE / NAME)
    return tests


__path__.append(str(fetch()))

# What test_modeling_common.py imports from tests that are not in the archive.
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
for name, mixin in ABSENT.items():
    module = sys.modules[f"{__name__}.{name}"] = types.ModuleType(name)
    setattr(module, mixin, type(mixin, (), {}))
