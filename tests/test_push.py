"""A trained model is published whole, by train.py or by hand, and loads from the Hub where this package is absent.

Over HTTP against tests/loopback_hub.py, in processes of their own: the library reads where the Hub is when imported.
All on the "torch" backend: kernels of such code, which compile anew, run in test_hub.py.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback_hub import TOKEN, loopback_hub
from omegaconf import OmegaConf
from small_models import small_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import train as scripts
import training.hub
from training.checkpoint import write_manifest
from training.config import HubConfig, InputError
from training.hub import published_files, push_folder
from training.tokenizers import byte_tokenizer

ROOT = Path(__file__).parent.parent
REPOSITORY, BY_HAND = "someone/times", "someone/by-hand"
PROMPT = "3 times"

LOAD = """
import json, sys
sys.modules["modeling_minrnn"] = None  # importing it is an ImportError
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for repository, revision in zip(sys.argv[1::2], sys.argv[2::2]):
    pinned = {"revision": revision, "code_revision": revision, "trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(repository, **pinned)
    tokenizer = AutoTokenizer.from_pretrained(repository, **pinned)
    ids = tokenizer("3 times", return_tensors="pt")
    print(json.dumps({
        "module": type(model).__module__,
        "ids": model.generate(**ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0].tolist(),
        "logits": model(**ids).logits.flatten().tolist(),
    }))
"""


@pytest.fixture
def hub():
    with loopback_hub() as hub:
        yield hub


def run(hub, home, *command):
    """A finished process that takes `hub` for the Hub."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=own | hub.environment(home) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


# By a refused token and then by one that is taken; then a model by hand.
PUBLISH = """
import os, runpy, sys
config, by_hand, name = sys.argv[1:]
sys.argv = ["train.py", config]
for token in ("hf_wrong", os.environ["HF_TOKEN"]):
    os.environ["HF_TOKEN"] = token
    try:
        runpy.run_path("train.py", run_name="__main__")
    except SystemExit as end:
        has_begun = os.path.exists(os.path.join(os.path.dirname(config), "run"))
        print("exit code", end.code, "after it began" if has_begun else "before it began")

from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(by_hand).push_to_hub(name)
AutoTokenizer.from_pretrained(by_hand).push_to_hub(name)
ModelCard.load(by_hand + "/README.md").push_to_hub(name)
"""


def publish(hub, folder, by_hand):
    """train.py for a few steps, with hub.push; its output folder is folder/run. Then what is in `by_hand`."""
    (folder / "corpus.txt").write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(30) for b in range(9)))
    OmegaConf.save(
        {
            "model": {"hidden_size": 12, "num_hidden_layers": 1, "scan_backend": "torch"},
            "data": {"files": [str(folder / "corpus.txt")], "held_out_tokens": 50},
            "train": {
                "steps": 3, "batch_size": 2, "sequence_length": 16, "learning_rate": 0.01, "eval_every_steps": 3,
                "save_every_steps": 3, "output_dir": str(folder / "run"),
            },
            "hub": {"push": True, "repository": REPOSITORY},
        },
        folder / "config.yaml",
    )  # fmt: skip
    arguments = folder / "config.yaml", by_hand, BY_HAND
    return run(hub, folder / "home", sys.executable, "-c", PUBLISH, *arguments)


def load(hub, folder, *repositories_and_revisions):
    """What LOAD prints of each, in a process that finds nothing of this project but what is on the Hub."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    process = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, *repositories_and_revisions],
        cwd=folder,
        env=own | hub.environment(folder / "new home"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_loads(loaded, model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")
    assert loaded["module"].startswith("transformers_modules.")
    assert loaded["ids"] == model.generate(**ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0].tolist()
    torch.testing.assert_close(torch.tensor(loaded["logits"]), model(**ids).logits.flatten())


def test_a_model_is_published_by_train_and_by_hand_and_a_fresh_process_loads_it_by_its_name_and_revision(
    hub, tmp_path
):
    """A token that is refused ends train.py in one line before it begins."""
    own_model = small_model("minlstm", vocab_size=258, tie_word_embeddings=False, seed=4, scan_backend="torch")
    own_model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n\n# Times\n")
    process = publish(hub, tmp_path, tmp_path / "model")
    assert process.returncode == 0, process.stderr
    first, *_, published_as, last = process.stdout.splitlines()
    assert (first, last) == ("exit code 2 before it began", "exit code 0 after it began")
    reason = "the token was refused; log in with `hf auth login`, or set HF_TOKEN"
    assert process.stderr.count(f"error: hub.repository {REPOSITORY}: {reason}\n") == 1
    assert "Traceback" not in process.stderr
    assert hub.repositories[REPOSITORY]["private"]
    assert published_as == f"published as {hub.url}/{REPOSITORY}"
    steps = [
        "GET whoami",
        "GET repository",
        "POST create",
        "POST preupload",
        "POST lfs_batch",
        "PUT lfs_upload",
        "POST commit",
    ]
    assert list(dict.fromkeys(step for step in hub.requests if step in steps)) == steps

    folder = tmp_path / "run"
    published = hub.files(REPOSITORY)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {*published} == {*manifest, "manifest.json", "README.md", "loss_curve.png"}
    assert {"model.safetensors", "tokenizer.json", "modeling_minrnn.py"} < {*manifest}
    assert all(contents(folder)[name] == content for name, content in published.items())
    assert not any(str(tmp_path).encode() in content for content in published.values())

    assert hub.files(BY_HAND)["README.md"].decode() == (tmp_path / "model" / "README.md").read_text()
    assert not hub.repositories[BY_HAND]["private"] and "POST validate_card" in hub.requests

    # A later commit that spoils the model does not reach who pinned the one before.
    revisions = []
    for name in (REPOSITORY, BY_HAND):
        commits = hub.repositories[name]["commits"]
        revisions += [name, commits[-1][0]]
        spoilt = {"config.json": b"{}", "modeling_minrnn.py": b"raise SystemExit"}
        commits.append(("f" * 40, hub.files(name) | spoilt))
    of_train, of_hand = load(hub, tmp_path, *revisions)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert_loads(of_train, model, tokenizer)
    assert_loads(of_hand, own_model, byte_tokenizer())


class Client:
    """In place of HfApi."""

    def __init__(self, role="write", existing=()):
        self.role, self.existing = role, existing

    def whoami(self):
        return {"name": "someone", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": self.role}}}

    def repo_exists(self, name):
        return name in self.existing


@pytest.mark.parametrize(
    ("repository", "client", "token", "message"),
    [
        ("someone/times", Client(), None, "there is no token; log in with `hf auth login`, or set HF_TOKEN"),
        ("else/times", Client(), TOKEN, "the token writes to someone or lab, not to else"),
        ("someone/times", Client(role="read"), TOKEN, "the token may read only"),
        ("times", Client(existing=["someone/times"]), TOKEN, "a repository of this name exists"),
        ("lab/times", Client(existing=["someone/times"]), TOKEN, None),
    ],
)
def test_what_a_push_would_be_refused_for_is_told_before_training(
    setting, train_main, tmp_path, monkeypatch, repository, client, token, message
):
    monkeypatch.setattr(training.hub, "HfApi", lambda: client)
    monkeypatch.setattr(training.hub, "get_token", lambda: token)
    monkeypatch.setattr(scripts, "load_data", lambda *arguments: pytest.fail("training began"))
    config = setting(**{"hub.push": True, "hub.repository": repository})
    if message:
        with pytest.raises(InputError, match=f"^hub.repository {repository}: {message}$"):
            train_main(config)
    else:
        with pytest.raises(pytest.fail.Exception, match="training began"):
            train_main(config)
    assert not (tmp_path / "run").exists()


def test_only_what_the_writer_of_the_model_lists_is_published(folder, monkeypatch):
    """Not what lies there too, nor what a link leads to."""
    (folder / ".env").write_text("TOKEN=secret")
    (folder / "README.md").symlink_to(folder / ".env")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {*published_files(folder)} == {*manifest, "manifest.json"}
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / ".env")
    monkeypatch.setattr(training.hub, "HfApi", lambda: pytest.fail("uploaded"))
    with pytest.raises(InputError, match="config.json: no such file, but manifest.json lists it: nothing was upload"):
        push_folder(folder, HubConfig(repository=REPOSITORY))


def failed(reason, folder, repository):
    include = " ".join(f"--include {name}" for name in published_files(folder))
    return (
        f"hub.repository {repository}: {reason}. The run is complete in {folder}; to upload it: "
        f"hf upload {repository} {folder} . {include} --private"
    )


PUSH_FOLDER = """
import sys
from pathlib import Path
import huggingface_hub.utils._http
from training.config import HubConfig, InputError
from training.hub import push_folder
huggingface_hub.utils._http.time.sleep = lambda seconds: None  # between six attempts, 23 seconds in all
for repository in sys.argv[2:]:
    try:
        push_folder(Path(sys.argv[1]), HubConfig(repository=repository))
    except InputError as error:
        print(error)
"""


@pytest.fixture
def folder(tmp_path):
    """What a run leaves, in small."""
    folder = tmp_path / "run"
    small_model().save_pretrained(folder)
    write_manifest(folder)
    (folder / "starts.jsonl").write_text("private")
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000003" / "optimizer.bin").write_bytes(b"large")
    return folder


def test_an_upload_that_fails_changes_nothing_and_can_be_made_good(hub, folder):
    """To a name that exists, and over a connection that drops in mid-upload."""
    before = contents(folder)
    hub.repositories["someone/thesis"] = {"private": False, "commits": [("0" * 40, {"thesis.txt": b"irreplaceable"})]}
    hub.drop_uploads = True
    names = ["someone/thesis", REPOSITORY]
    process = run(hub, folder.parent / "home", sys.executable, "-c", PUSH_FOLDER, folder, *names)
    exists, dropped = process.stdout.splitlines()
    assert exists == failed("a repository of this name exists", folder, "someone/thesis")
    assert hub.files("someone/thesis") == {"thesis.txt": b"irreplaceable"}
    reason = "Error while uploading 'model.safetensors' to the Hub: Server disconnected without sending a response"
    assert dropped == failed(reason, folder, REPOSITORY)
    assert contents(folder) == before
    assert hub.files(REPOSITORY) == {}

    hub.drop_uploads = False
    _, *arguments = shlex.split(dropped.partition("to upload it: ")[2])
    process = run(hub, folder.parent / "home", Path(sys.executable).parent / "hf", *arguments)
    assert process.returncode == 0, process.stderr
    assert hub.files(REPOSITORY) == {name: before[name] for name in published_files(folder)}
    assert hub.repositories[REPOSITORY]["private"]
