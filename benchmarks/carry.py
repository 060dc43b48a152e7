"""What a machine with a GPU and without a network needs beside this repository: wheels, and the line that runs gpu.py.

    python benchmarks/carry.py [--folder .wheels] [--seconds 480]

Downloads the packages into the folder, checks that Python 3.12 on 64-bit Linux takes each of them, once, and prints
the line to run there, in the folder of the repository. There torch 2.11, triton 3.6 and transformers 5.17 or later are
installed, and what those need. Packages are installed without their dependencies.
"""

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

PEERS = ["fla-core", "mingru-scans", "mambapy", "accelerated-scan", "minGRU-pytorch", "einops"]
TRAINING = ["datasets", "dill", "multiprocess", "omegaconf"]  # of train.py, beside what torch's own images bring
PYTHON = (3, 12)
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64"]
INSTALLED = "/tmp/minrnn-site"


def download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", ".".join(map(str, PYTHON)), "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *PEERS, *TRAINING], check=True)


def problems(wheels: list[Path]) -> list[str]:
    """What would stop the installation there."""
    usable = {*cpython_tags(PYTHON, platforms=PLATFORMS), *compatible_tags(PYTHON, platforms=PLATFORMS)}
    parsed = {wheel.name: parse_wheel_filename(wheel.name) for wheel in wheels}
    found = [
        f"{name} is not for Python 3.12 on 64-bit Linux" for name, (*_, tags) in parsed.items() if not tags & usable
    ]
    counts = Counter(name for name, *_ in parsed.values())
    return found + [f"{name} is there {count} times" for name, count in counts.items() if count > 1]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--folder", type=Path, default=Path(".wheels"), help="for the wheels (default %(default)s)")
    flags.add_argument("--seconds", type=int, default=480, help="that gpu.py may take there (default %(default)s)")
    options = flags.parse_args()
    download(options.folder)
    wheels = sorted(options.folder.glob("*.whl"))
    if found := problems(wheels):
        raise SystemExit("\n".join(found))
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.1f} MB, in {options.folder}. Beside the repository, there:\n")
    print(
        f"python3 -m pip install -q --no-index --no-deps --upgrade --target {INSTALLED} {options.folder}/*.whl && "
        f"MINRNN_COMMIT={commit} PYTHONPATH={INSTALLED}:$PWD PYTHONUNBUFFERED=1 "
        f"python3 benchmarks/gpu.py --seconds {options.seconds} --output ${{OUT:-.}}/gpu.jsonl"
    )


if __name__ == "__main__":
    main()
