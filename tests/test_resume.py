"""What a resumed run may have otherwise than before, and that no run is resumed, replaced or published by mistake."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import OmegaConf
from small_runs import TEXT, losses
from test_checkpoint import outcome, stop_at
from test_train import MUON, assert_equal_weights, weights
from torch.nn import Parameter
from torch.optim import SGD
from transformers import AutoTokenizer, get_scheduler

import train
from modeling_minrnn import MinRNNConfig
from training.checkpoint import changed_settings, damage, list_checkpoints, write_manifest
from training.config import CHANGEABLE, InputError, RunConfig, load_config
from training.data import TokenStream, is_held_out, token_digests
from training.report import read_metrics, read_rows
from training.tokenizers import bpe_tokenizer, character_tokenizer

RESUME = {"train.resume": True}


# ---- Settings

# Another valid value of each setting, where that of its type will not do.
OTHERS = {
    "data.dataset": None,  # beside files
    "data.dataset_config": "other",
    "data.held_out_files": ["other.txt"],
    "data.held_out_split": "other",
    "data.held_out_tokens": 100,
    "data.mixture": None,
    "data.held_out_lengths": [40, 99],
    "data.streaming": None,
    "data.task": None,
    "data.task_lengths": [1, 39],
    "data.workers": None,
    "train.betas": [0.8, 0.9],
    "train.schedule": "wsd",
    "train.optimizer": "adamw",
    "train.decay_steps": 1,
    "train.on_nonfinite": "skip",
    "train.chunk_length": 4,
    "train.early_stopping_patience": 3,
    "train.context_parallel_size": None,
    "train.resume": None,
    "train.overwrite": None,
    "train.sample_prompts": ["a"],
    "train.trackers": ["trackio"],
    "hub.push": None,
    "hub.repository": "someone/other",
    "model.scan_backend": "torch",
}


def test_every_setting_may_change_or_is_refused_by_name(setting, tmp_path):
    """One by one: what the table has is reported as changed, and nothing else passes."""
    config = setting(**MUON)
    (tmp_path / "step-00000008").mkdir()
    shutil.copy(config, tmp_path / "step-00000008" / "run.yaml")
    before = OmegaConf.load(config)
    names = [f"{section}.{field.name}" for section, kind in RunConfig.__annotations__.items() if section != "model"
             for field in dataclasses.fields(kind)]  # fmt: skip
    model = ["hidden_size", "num_hidden_layers", "dropout", "scan_backend", "cell_type", "rms_norm_eps"]
    tried = set()
    for name in [*names, *(f"model.{field}" for field in model)]:
        section, key = name.split(".")
        old = (
            OmegaConf.select(OmegaConf.structured(RunConfig), name)
            if section != "model"
            else getattr(MinRNNConfig, key)
        )
        old = OmegaConf.select(before, name, default=old) if name not in OTHERS else None
        kinds = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 0.5 + 0.1, str: lambda v: v + "-a"}
        value = OTHERS[name] if name in OTHERS else "minlstm" if key == "cell_type" else kinds.get(
            type(old), lambda v: ["other.txt"])(old)  # fmt: skip
        if value is None:
            continue
        changes = {name: value} | ({"train.schedule": "wsd", "train.decay_steps": 1} if value in ("wsd", 1) else {})
        if value == "adamw":
            changes["train.muon_learning_rate"] = None
        now = load_config(setting(**MUON | changes), [])
        tried.add(name)
        if key in CHANGEABLE[section]:
            assert name in changed_settings(tmp_path / "step-00000008", now)
        else:
            with pytest.raises(InputError, match=f"^train.resume: {name} is .*, but .*step-00000008/run.yaml has "):
                changed_settings(tmp_path / "step-00000008", now)
    listed = {f"{section}.{key}" for section, keys in CHANGEABLE.items() for key in keys}
    assert listed - tried == {"train.context_parallel_size", "data.dataset", "data.mixture", "hub.push"}
    assert listed <= {*names, "model.dropout", "model.scan_backend"}


def test_what_changes_on_resume_holds_from_the_first_step_on_and_is_recorded(run, setting, train_main):
    folder = run()
    changed = ["train.steps=16", "train.learning_rate=0.0001", "train.weight_decay=0.5", "train.betas=[0.5,0.6]",
               "train.min_learning_rate_ratio=0.5"]  # fmt: skip
    config = setting()
    assert train_main(config, ["train.resume=true", *changed]) == 0
    scheduler = get_scheduler("cosine_with_min_lr", SGD([Parameter()], lr=1.0), 2, 16, {"min_lr_rate": 0.5})
    expected = [1e-4 * scheduler.lr_lambdas[0](step) for step in range(8, 16)]
    assert losses(folder, "learning_rate")[8:] == pytest.approx(expected, rel=1e-12)
    groups = json.loads((list_checkpoints(folder)[-1] / "state.json").read_text())["param_groups"]
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.5, [0.5, 0.6]), (0.0, [0.5, 0.6])]
    starts = [row for row in read_rows(folder / "starts.jsonl") if "command" in row]
    names = [override.split("=")[0] for override in changed]
    assert [(start["step"], sorted(start["changed"])) for start in starts] == [(0, []), (8, sorted(names))]
    card = (folder / "README.md").read_text()
    assert card.index("\npython train.py config.yaml\n") < card.index("\n# from step 9 on, changed: train.betas=")
    assert card.index("# from step 9 on") < card.index(
        "\npython train.py config.yaml train.resume=true train.steps=16"
    )
    assert f"after {16 * 64:,} tokens" in card

    # Nothing is left to train: another rate would hold for no step, and is recorded nowhere.
    assert train_main(config, ["train.resume=true", *changed, "train.learning_rate=3"]) == 0
    assert OmegaConf.load(folder / "run.yaml").train.learning_rate == 1e-4
    assert read_rows(folder / "starts.jsonl")[-3]["changed"] == {}
    with pytest.raises(InputError, match="^train.steps is 8: the run in .* is at step 16$"):
        train_main(config, ["train.resume=true"])


def test_the_tokens_of_the_card_are_those_of_the_batches_that_were_read(run, setting, train_main):
    folder = run()
    assert train_main(setting(**RESUME), ["train.batch_size=2", "train.steps=12"]) == 0
    assert f"after {8 * 64 + 4 * 32:,} tokens" in (folder / "README.md").read_text()


# ---- Data


def test_another_text_under_the_same_path_is_refused_and_the_same_text_elsewhere_goes_on(
    run, setting, train_main, tmp_path
):
    settings = {"data.tokenizer": "character"}
    folder = run(**settings)
    expected = outcome(folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "text.txt").write_text(TEXT)
    config = setting(**settings, **RESUME)
    for other in (TEXT.replace("0", "A"), TEXT.replace("0", "/"), "?" + TEXT[1:]):  # "/" comes where 0 came
        (tmp_path / "corpus.txt").write_text(other)
        with pytest.raises(InputError, match="data.files, data.dataset or data.tokenizer name another text or tok"):
            train_main(config)
    assert train_main(config, [f"data.files={tmp_path}/elsewhere/text.txt"]) == 0
    assert outcome(folder) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_with_a_bpe_tokenizer_and_a_mixture_a_run_killed_anywhere_ends_as_the_uninterrupted_one(
    run, tmp_path, monkeypatch, streaming
):
    """The tokenizer is trained once, and on nothing that is held out."""
    lines = [f"{i} times {i}" for i in range(90)]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    sources = [
        {"files": [str(tmp_path / "corpus.txt")], "weight": 1},
        {"dataset": str(tmp_path / "lines.jsonl"), "weight": 9},
    ]
    data = {
        "files": [],
        "mixture": sources,
        "streaming": streaming,
        "tokenizer": "bpe",
        "tokenizer_vocab_size": 290,
        "held_out_tokens": 60,
    }
    settings = {"data": data, "train.save_every_steps": 1, "train.eval_every_steps": 8}
    trained_on = set()

    def trained(texts, vocab_size):
        texts = [*texts]
        trained_on.update(texts)
        return bpe_tokenizer(texts, vocab_size)

    monkeypatch.setattr("training.tokenizers.bpe_tokenizer", trained)
    monkeypatch.setattr("training.checkpoint.KEPT_CHECKPOINTS", 9)
    folder = run(**settings)
    expected = outcome(folder)
    assert trained_on == {TEXT[: int(0.9 * len(TEXT))], *(line for line in lines if not is_held_out(line, 0.1))}
    monkeypatch.setattr("training.tokenizers.bpe_tokenizer", None)
    for step in (0, 5):
        stop_at(folder, step)
        run(**settings, **RESUME)
        assert outcome(folder) == expected
    assert AutoTokenizer.from_pretrained(folder).vocab_size == 290


def test_a_vocabulary_is_part_of_what_a_text_is_known_by():
    stream = TokenStream([])
    first, second = (token_digests(character_tokenizer([text]), {"training tokens": stream}) for text in ("ab", "ac"))
    assert first["training tokens"] == second["training tokens"] and first["vocabulary"] != second["vocabulary"]


# ---- A carried state


@pytest.mark.parametrize(
    "change",
    [{"sequence_length": 8}, {"batch_size": 2}, {"gradient_accumulation_steps": 2}, {"carry_state": False}],
    ids=lambda change: next(iter(change)),
)
def test_with_a_carried_state_the_shape_of_a_step_stays(setting, tmp_path, change):
    """Without one it may change: see the test of all settings."""
    (tmp_path / "step-00000008").mkdir()
    shutil.copy(setting(**{"train.carry_state": True}), tmp_path / "step-00000008" / "run.yaml")
    ((key, value),) = change.items()
    now = load_config(setting(**{"train.carry_state": True, f"train.{key}": value}), [])
    with pytest.raises(InputError, match=f"^train.resume: train.{key} is {value}, but "):
        changed_settings(tmp_path / "step-00000008", now)


def test_a_carried_state_is_saved_where_there_are_no_hard_links(run, monkeypatch):
    def link(*arguments, **keywords):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    folder = run(**{"train.carry_state": True})
    assert (list_checkpoints(folder)[-1] / "process_0.cache_0").is_file()


# ---- Two runs

HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone_however_it_went(run, setting, train_main):
    folder = run()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder / "run.lock"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    for how in ("train.resume=true", "train.resume=auto", "train.overwrite=true"):
        with pytest.raises(InputError, match="^train.output_dir: another run is writing to .*run: choose another"):
            train_main(setting(), [how])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert train_main(setting(), ["train.resume=true"]) == 0


def test_a_run_holds_its_folder_from_before_its_first_check_to_its_end(setting, train_main, tmp_path, monkeypatch):
    held = []

    def note(name):
        original = getattr(train, name)

        def call(*arguments, **keywords):
            lock = FileLock(tmp_path / "run" / "run.lock", timeout=0)
            with pytest.raises(TimeoutError):
                lock.acquire()
            held.append(name)
            return original(*arguments, **keywords)

        monkeypatch.setattr(train, name, call)

    for name in ("check_output_dir", "load_data", "save_checkpoint", "write_end"):
        note(name)
    assert train_main(setting()) == 0
    assert held[:2] == ["check_output_dir", "load_data"] and held[-1] == "write_end"
    FileLock(tmp_path / "run" / "run.lock", timeout=0).acquire()


# ---- What the user keeps beside a run


def test_a_run_touches_only_what_has_the_names_that_it_gives(run, setting, train_main):
    folder = run()
    own = [folder / name for name in ("checkpoints/step-00000004-good", "checkpoints/mine.partial", "notes")]
    for path in own:
        shutil.copytree(folder / "checkpoints" / "step-00000008", path)
    (folder / "metrics-old.jsonl").write_text('{"step": 99}\n')
    before = {path: path.read_bytes() for top in own for path in top.iterdir()}
    assert train_main(setting(**RESUME), ["train.steps=16"]) == 0
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000012", "step-00000016"]
    assert read_metrics(folder)[-1]["step"] == 16
    assert train_main(setting(), ["train.overwrite=true"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (folder / "metrics-old.jsonl").read_text() == '{"step": 99}\n'
    assert [row["step"] for row in read_metrics(folder) if "loss" in row] == list(range(1, 9))


def test_what_the_user_edits_stays_and_costs_neither_the_best_model_nor_its_score(run, setting, train_main, capsys):
    folder = run(**{"train.steps": 4})
    (best,) = losses(folder, "held_out_loss")
    weights_of_best = (folder / "model.safetensors").read_bytes()
    generation = json.loads((folder / "generation_config.json").read_text()) | {"max_new_tokens": 50}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "README.md").write_text("# Mine\n")
    assert train_main(setting(**RESUME), ["train.steps=5", "train.learning_rate=9"]) == 0
    output = capsys.readouterr().out
    assert "generation_config.json was edited: it stays" in output and "README.md was edited: it stays" in output
    assert "damaged" not in output
    assert losses(folder, "held_out_loss")[-1] > best
    assert (folder / "model.safetensors").read_bytes() == weights_of_best
    assert "step 4, after" in (folder / "README.new.md").read_text()

    stop_at(folder, 4)
    assert train_main(setting(**RESUME)) == 0  # a better model takes the place of the best
    assert (folder / "model.safetensors").read_bytes() != weights_of_best
    assert json.loads((folder / "generation_config.json").read_text()) == generation
    assert (folder / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    "name, edit",
    [
        ("generation_config.json", None),
        ("generation_config.json", '{"max_new_tokens": 50'),
        ("config.json", "{"),
        ("tokenizer.json", None),
        ("cells.py", ""),
    ],
)
def test_a_missing_or_unreadable_file_costs_neither_the_best_model_nor_its_score(
    run, setting, train_main, capsys, name, edit
):
    folder = run(**{"train.steps": 4})
    (best,) = losses(folder, "held_out_loss")
    written = {path.name: path.read_bytes() for path in (folder / name, folder / "model.safetensors")}
    (folder / name).unlink() if edit is None else (folder / name).write_text(edit)
    assert train_main(setting(**RESUME), ["train.steps=5", "train.learning_rate=9"]) == 0
    output = capsys.readouterr().out
    assert f"{name} was missing or damaged: it is written again" in output and "warning" not in output
    assert losses(folder, "held_out_loss")[-1] > best
    assert {name: (folder / name).read_bytes() for name in written} == written
    assert damage(folder) is None
    assert (edit is None) or (folder / f"{name}.damaged").read_text() == edit


# ---- Re-signed checkpoints


BROKEN = [
    ("run.yaml", "train:", "train: ["),
    ("run.yaml", "steps: 8", "steps: eight"),
    ("state.json", '"step": 8', '"step": "8"'),
    ("state.json", '"best_step": 8', '"best_step": -1'),
    ("state.json", '"processes": [1, 1]', '"processes": 7'),
    ("state.json", '"best_loss": ', '"best_loss": 1e999, "x": '),
    ("process_0.json", '"position": 8', '"position": -1e400'),
    ("process_0.json", '"position": 8', '"position": null'),
    ("process_0.json", "[3, [", "[3, [-1, "),
]


def test_a_checkpoint_with_broken_contents_is_one_line_though_its_manifest_fits(run, setting, train_main):
    checkpoint = list_checkpoints(run())[-1]
    config = setting(**RESUME, **{"train.steps": 9})
    for name, old, new in BROKEN:
        text = (checkpoint / name).read_text()
        assert old in text
        (checkpoint / name).write_text(text.replace(old, new, 1))
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint)
        with pytest.raises(InputError, match=str(checkpoint)) as error:
            train_main(config)
        assert "\n" not in str(error.value)
        (checkpoint / name).write_text(text)


def test_a_run_goes_on_in_a_folder_that_was_moved(run, setting, train_main, tmp_path):
    folder = run()
    expected = weights(folder)
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert train_main(setting(**RESUME, **{"train.output_dir": str(moved)})) == 0
    assert_equal_weights(weights(moved), expected)
    assert Path(moved / "model.safetensors").is_file()
