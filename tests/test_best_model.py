"""The best model of a run: as atomic as a checkpoint, and damage of it is seen."""

import os
import shutil

import pytest
import torch
from small_runs import losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.checkpoint import MANIFEST_FILE, damage, install_best_model, save_best_model


def model_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_is_cut_off_anywhere_leaves_one_model_or_the_other(run, tmp_path, monkeypatch, failing):
    """At each call in turn, with what the next start does after it."""
    model = AutoModelForCausalLM.from_pretrained(run())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    old, new, folder = tmp_path / "old", tmp_path / "new", tmp_path / "folder"
    old.mkdir()
    new.mkdir()
    save_best_model(old, model, tokenizer)
    torch.nn.init.normal_(model.lm_head.weight)
    model.config.rms_norm_eps = 1e-5  # so that more than one file differs
    save_best_model(new, model, tokenizer)
    assert sum(model_files(old)[name] != data for name, data in model_files(new).items()) == 3  # and the manifest
    original, seen = getattr(os, failing), []
    for allowed in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)
        calls = iter(range(10**6))

        def cut_off(*arguments, calls=calls, allowed=allowed):
            if next(calls) == allowed:
                raise OSError(5, "Input/output error")
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, failing, cut_off)
            try:
                save_best_model(folder, model, tokenizer)
                done = True
            except OSError:
                done = False
        for name, data in model_files(folder).items():
            if "model.ready" not in name.parts:
                assert data in (model_files(old)[name], model_files(new)[name])
        install_best_model(folder)
        assert damage(folder) is None
        assert model_files(folder) in (model_files(old), model_files(new))
        seen.append(model_files(folder) == model_files(new))
        if done:
            break
    assert seen == sorted(seen) and not seen[0] and seen[-1] and len(seen) > 5


def test_a_model_that_a_kill_kept_from_its_place_is_put_there_by_the_next_start(run, train_main, setting):
    folder = run()
    (folder / "model.ready").mkdir()
    for name in ("model.safetensors", "config.json", MANIFEST_FILE):
        os.replace(folder / name, folder / "model.ready" / name)
    assert train_main(setting(**{"train.resume": True})) == 0  # all steps are done, and no model is written
    assert damage(folder) is None and not (folder / "model.ready").exists()


def test_a_damaged_best_model_is_named_and_the_next_evaluation_writes_another(run, setting, train_main, capsys):
    worse = {"train.learning_rate": 3.0, "train.warmup_steps": 0, "train.eval_every_steps": 1}
    folder = run(**worse, **{"train.steps": 4})
    held_out = losses(folder, "held_out_loss")
    assert held_out[-1] > min(held_out)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    capsys.readouterr()
    assert train_main(setting(**worse, **{"train.resume": True, "train.steps": 5})) == 0
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert "model.safetensors: its SHA-256 is not that of manifest.json: the best model is damaged" in warning
    assert damage(folder) is None
