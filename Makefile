# make train   install into .venv, train configs/demo.yaml (minutes on two CPU cores), complete a prompt
# make test    lint, types and all tests but those below, on two cores, and the slowest of them by name; of one file:
#              make test ARGS=tests/test_hub.py
# make conformance   transformers' own tests of a model, those of FSDP among them, which take minutes
# make soak   100 kills, 2000 damaged files and 10,000 steps: the long forms of tests, half an hour on one core
# make docs   the documentation as a site, site/index.html; a link that leads nowhere is an error
# Settings of the run go into ARGS:  make train ARGS="train.overwrite=true train.steps=500"

PYTHON ?= python3
BIN := .venv/bin
# or what is not compiled when it is installed would be at each start
unexport PYTHONDONTWRITEBYTECODE

train: .venv/trainable
	$(BIN)/python train.py configs/demo.yaml $(ARGS)
	$(BIN)/minrnn sample runs/demo 'def read_' --max-new-tokens 300 --temperature 0.7

# Two workers on two cores: threads of their own would only get in each other's way. Each begins with half of the files,
# so that what the tests of a file share is made once.
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not is_fsdp_test and not soak" --durations=25 $(ARGS)

conformance: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/conformance $(ARGS)

soak: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak --durations=0 -o faulthandler_timeout=0 $(ARGS)

docs: .venv/documented
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What training needs. torch comes first and alone: where the index or a local folder offers a CPU build, this takes it.
# With it comes setuptools, which builds this project: nothing needs to be installed once more for that. A fifth of the
# files is ever imported, and compiled then, which is kept: for pip to compile all of them takes half of its time.
.venv/trainable: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --no-compile --constraint constraints.txt --no-build-isolation --editable '.[cpu,train]'
	touch $@

# What the tests need beside it. All is compiled here, since a file may give warnings when it is, which pytest takes for
# errors. A few files are templates that cannot be.
.venv/installed: .venv/trainable
	$(BIN)/pip install --constraint constraints.txt --editable '.[cpu,gpu,train,onnx,serving,ecosystem,trackers,dev]'
	$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true
	touch $@

.venv/documented: .venv/trainable
	$(BIN)/pip install --constraint constraints.txt --editable '.[docs]'
	touch $@

.PHONY: train test conformance soak docs
