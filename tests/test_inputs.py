"""What a user may give that cannot be used ends in one line, before anything slow begins."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from small_runs import TEXT
from transformers import PreTrainedTokenizerFast

from training.config import InputError, load_config
from training.data import load_documents, streamed_windows, token_stream
from training.tokenizers import byte_tokenizer

ROOT = Path(__file__).parent.parent


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.betas=[2,3]", "train.betas is [2.0, 3.0]: both must be at least 0 and below 1"),
        (f"train.seed={2**40}", f"train.seed is {2**40}: must be at most {2**31 - 1}"),
        ("model.num_hidden_layers=1e20", "model.num_hidden_layers is 1e+20: must be at most 10000"),
        (f"model.num_hidden_layers={10**9}", f"model.num_hidden_layers is {10**9}: must be at most 10000"),
        ("model.num_hidden_layers=.nan", "model.num_hidden_layers is nan: must be at most 10000"),
        ("model.hidden_size=1e400", "model: MinRNNConfig: Validation error for field 'hidden_size'"),
        ("model.widht=3", "unknown key model.widht; the nearest known one is model."),
        ('train.sample_prompts=["a",""]', "train.sample_prompts has an empty text: each must have something"),
        ("train.learning_rate=.inf", "train.learning_rate is inf: must be positive and finite"),
        ("train.weight_decay=.inf", "train.weight_decay is inf: must not be negative, and finite"),
        ("train.output_dir=a\udcff", r"'train.output_dir=a\udcff' is not UTF-8 text"),
        ("data.files=[/a[1]/b.txt]", "while parsing a flow sequence"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_about_it(setting, override, message):
    with pytest.raises(InputError) as error:
        load_config(setting(), [override])
    assert message in one_line(error)


def test_a_lone_path_prompt_or_tracker_is_a_list_of_one(setting):
    config = load_config(setting(), ["data.files=a.txt", "train.sample_prompts=Once", "train.trackers=trackio"])
    assert (config.data.files, config.train.sample_prompts, config.train.trackers) == (
        ["a.txt"],
        ["Once"],
        ["trackio"],
    )


@pytest.mark.parametrize(("name", "size"), [("vocab_size", 10**23), ("hidden_size", 10**12)])
def test_a_model_too_large_to_make_is_one_line(setting, train_main, tmp_path, name, size):
    with pytest.raises(InputError, match="^model: it is too large to make: ") as error:
        train_main(setting(**{f"model.{name}": size}))
    one_line(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message", "absent"),
    [
        ("train.stepz=3", "unknown key train.stepz", {"torch", "transformers"}),
        ("data.files=absent/*", "data.files: absent/* matches no file", {"datasets", "matplotlib", "modeling_minrnn"}),
        ("data.tokenizer=bytes", "data.tokenizer is 'bytes': must be", {"datasets", "matplotlib", "modeling_minrnn"}),
        # MinRNNConfig takes torch and parts of transformers with it.
        ("model.hidden_size=-1", "hidden_size must be at least 1", {"datasets", "matplotlib", "modeling_minrnn"}),
    ],
)
def test_a_wrong_setting_is_told_before_the_imports_that_take_seconds(setting, override, message, absent):
    program = (
        f"import atexit, runpy, sys; atexit.register(lambda: print(*{absent} & {{*sys.modules}})); "
        f"sys.argv = ['train.py', {setting()!r}, {override!r}]; runpy.run_path('train.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "\n")
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr.splitlines()[-1]


def test_what_model_and_tokenizer_do_not_agree_on_is_told_before_tokenising(setting, train_main, monkeypatch):
    monkeypatch.setattr("train.counted_stream", lambda *arguments: pytest.fail("tokenised"))
    with pytest.raises(InputError, match="^model.vocab_size is 257: the tokenizer has 258 tokens$"):
        train_main(setting(**{"model.vocab_size": 257}))


# ---- Data

ROWS = [json.dumps({"text": line}) for line in TEXT.splitlines()[:40]]
BROKEN = {
    "torn": ("\n".join([*ROWS, '{"text": "to']), "JSON parse error: Missing a closing quotation mark in string"),
    "surrogate": ("\n".join([*ROWS, '{"text": "\\ud800"}']), "JSON parse error: The surrogate pair"),
    "numbers": ('{"text": 3}\n{"text": 4}\n', "data.text_column 'text' holds '3': must hold text"),
    "lists": ('{"text": ["a"]}\n', "data.text_column 'text' holds \"['a']\": must hold text"),
    "a number": ("\n".join([*ROWS, '{"text": 4}']), "data.text_column 'text' holds '4': must hold text"),
}


def data_set(setting, tmp_path, text, **changes):
    (tmp_path / "rows.jsonl").write_text(text)
    data = {"files": [], "dataset": str(tmp_path / "rows.jsonl"), "held_out_tokens": 20, "held_out_fraction": 0.3}
    return load_config(setting(data=data | changes), []).data


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_data_set_is_one_line(setting, tmp_path, kind, streaming):
    text, message = BROKEN[kind]
    data = data_set(setting, tmp_path, text, streaming=streaming)
    with pytest.raises(InputError) as error:
        documents, _ = load_documents(data)
        if streaming:
            windows = streamed_windows(documents, byte_tokenizer(), 8, 2, process=0, processes=1, workers=0)
            for _ in range(100):
                next(windows)
        token_stream(documents, byte_tokenizer())
    assert message in one_line(error)


def test_a_file_is_a_data_set_and_a_path_may_have_brackets(setting, tmp_path):
    data = data_set(setting, tmp_path, "\n".join(ROWS))
    training, held_out = load_documents(data)
    assert len(training) + len(held_out) == 40
    (tmp_path / "text [1]").mkdir()
    (tmp_path / "text [1]" / "a[b].txt").write_text(TEXT)
    data = load_config(setting(), [f"data.files={tmp_path}/text [1]/a[b].txt"]).data
    assert "".join(document["text"] for split in load_documents(data) for document in split) == TEXT


# ---- Disk


def test_a_disk_that_is_full_while_the_tokenizer_is_saved_is_one_line(setting, train_main, monkeypatch, tmp_path):
    def save(self, folder, *arguments, **keywords):
        tokenizers.Tokenizer.from_str(self.backend_tokenizer.to_str()).save("/dev/full")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    with pytest.raises(
        InputError, match="the model cannot be written, the one from before is intact: No space"
    ) as error:
        train_main(setting())
    one_line(error)
    assert not (tmp_path / "run" / "model.safetensors").exists()
