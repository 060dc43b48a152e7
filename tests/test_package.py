"""What is built is what is needed: a wheel in an environment of its own runs the README's first snippet."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

from printable_model import continuation, printable_model, save

ROOT = Path(__file__).parent.parent


def run(*command, cwd, status=0):
    """What a command prints, or where it is to fail, what it says last."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    process = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == status, process.stdout + process.stderr
    return process.stderr.splitlines()[-1] if status else process.stdout


def test_the_wheel_runs_the_first_snippet_of_the_readme_where_nothing_else_of_the_project_is(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "minrnn.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "modeling_minrnn", source / "modeling_minrnn", ignore=shutil.ignore_patterns("__pycache__"))

    # The wheel is built from the source distribution, without the network.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", cwd=source)
    (archive,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    files = {f"modeling_minrnn/{path.name}" for path in (ROOT / "modeling_minrnn").iterdir() if path.is_file()}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files | {"minrnn.py"}
    with tarfile.open(archive) as tar:
        assert files | {"LICENSE", "README.md"} <= {name.partition("/")[2] for name in tar.getnames()}

    # An environment of the wheel alone; what it depends on is read from this one, not installed again.
    venv.create(tmp_path / "environment", symlinks=True)
    python = tmp_path / "environment/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (installed,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    model = printable_model()
    save(model, tmp_path / "model_cards" / "python-1m")
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    output = run(python, "-I", "-c", snippet + "\nprint(modeling_minrnn.__file__)", cwd=tmp_path)
    *sampled, text, path = output.splitlines()
    assert sampled[0].startswith("def read_")
    assert text == "import " + continuation(model, "import ", 100)
    command = python.with_name("minrnn")
    options = ("--temperature", "0", "--max-new-tokens", "100")
    assert run(command, "sample", "model_cards/python-1m", "import ", *options, cwd=tmp_path) == text + "\n"
    error = run(command, "train", "demo.yaml", cwd=tmp_path, status=2)
    assert error.startswith("minrnn: error: train is not in the installed package: clone")
    assert path == str(installed / "modeling_minrnn" / "__init__.py")


def test_the_source_distribution_has_all_that_a_checkout_has_but_what_is_made_there(tmp_path):
    made = shutil.ignore_patterns("__pycache__", ".archive", "*.egg-info")
    kinds = (".cff", ".in", ".md", ".py", ".toml", ".txt", ".yml")
    for path in ROOT.iterdir():
        if path.suffix in kinds or path.name in ("LICENSE", "Makefile"):
            shutil.copy(path, tmp_path)
    for folder in ("benchmarks", "configs", "docs", "examples", "model_cards", "modeling_minrnn", "tests", "training"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=made)
    expected = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "examples" / "__pycache__").mkdir()
    (tmp_path / "examples" / "__pycache__" / "policy.cpython-311.pyc").touch()
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path / "dist", cwd=tmp_path)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    of_the_build = {"PKG-INFO", "setup.cfg"}
    assert {name for name in packed if not name.startswith("modeling_minrnn.egg-info/")} - of_the_build == expected
