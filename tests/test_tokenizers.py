"""Tokenizers: lossless on any text, and the same after saving and loading without custom code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import TEXT
from transformers import AutoTokenizer

from training.config import InputError
from training.data import encode as pieces
from training.tokenizers import bpe_tokenizer, byte_tokenizer, character_tokenizer, load_tokenizer

pytestmark = pytest.mark.oldest

# Any characters, and often ones that tokenizers treat specially.
texts = st.lists(st.text() | st.sampled_from(["<eos>", "<pad>", "<unk>", "\r\n", "  ", "\n", " .", "é", "🙂"])).map(
    "".join
)


def encode(text, tokenizer):
    return [int(id) for ids in pieces([text], tokenizer) for id in ids]


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(texts)
def test_byte_ids_are_the_bytes_of_the_text(reloaded, text):
    for tokenizer in (byte_tokenizer(), reloaded):
        ids = encode(text, tokenizer)
        assert ids == [*text.encode(), tokenizer.eos_token_id]
        # The tokenizer was not asked for them; it would have given the same.
        assert ids[:-1] == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids[:-1]) == text


@given(texts)
def test_a_character_tokenizer_restores_any_text_of_its_alphabet(text):
    tokenizer = character_tokenizer([text])
    ids = encode(text, tokenizer)
    assert len(ids) == len(text) + 1
    assert tokenizer.decode(ids[:-1]) == text


def test_a_character_tokenizer_is_the_same_after_saving_and_loading(tmp_path):
    text = "zebra <eos>\r\n\té🙂"
    tokenizer = character_tokenizer([text])
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert encode(text, reloaded) == encode(text, tokenizer)
    assert reloaded.decode(encode(text, reloaded)[:-1]) == text


def test_a_character_outside_the_alphabet_becomes_the_unknown_token():
    tokenizer = character_tokenizer(["ab", "c"])
    assert encode("axc", tokenizer) == [0, tokenizer.unk_token_id, 2, tokenizer.eos_token_id]


def test_special_tokens_follow_the_alphabet_and_are_distinct():
    for tokenizer, size in ((byte_tokenizer(), 256), (character_tokenizer("hello"), 4)):
        specials = sorted(tokenizer.all_special_ids)
        assert specials == list(range(size, len(tokenizer)))


@pytest.fixture(scope="module")
def bpe():
    return bpe_tokenizer([TEXT], 300)


@given(texts)
def test_a_bpe_tokenizer_restores_any_text_also_of_bytes_that_it_has_not_seen(bpe, text):
    assert bpe.decode(encode(text, bpe)[:-1]) == text


def test_a_bpe_tokenizer_merges_what_its_text_has_and_is_the_same_each_time_and_after_loading(bpe, tmp_path):
    assert len(bpe) == 300 and len(encode("7 times 8 is 56.\n", bpe)) < 10
    assert bpe_tokenizer(TEXT.splitlines(keepends=True), 300).backend_tokenizer.to_str() == (
        bpe.backend_tokenizer.to_str()
    )
    bpe.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert all(encode(text, reloaded) == encode(text, bpe) for text in (TEXT, "<eos> é🙂"))
    (tmp_path / "own.json").write_text(bpe.backend_tokenizer.to_str())
    resumed = load_tokenizer("bpe", [], trained=tmp_path / "own.json")
    assert resumed.get_vocab() == bpe.get_vocab() and resumed.special_tokens_map == bpe.special_tokens_map
    (tmp_path / "own.json").write_text("{}")
    with pytest.raises(InputError, match=r"own\.json is no tokenizer: "):
        load_tokenizer("bpe", [], trained=tmp_path / "own.json")


def test_a_bpe_tokenizer_reads_no_more_than_the_beginning_of_a_text(monkeypatch):
    monkeypatch.setattr("training.tokenizers.BPE_CHARACTERS", 1000)
    text = (f"{number} bottles\n" for number in range(10**9))
    assert "Ġbottles" in bpe_tokenizer(text, 280).get_vocab()
    assert 50 < int(next(text).split()[0]) < 200  # 1000 characters are 91 lines


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), character_tokenizer(["abc"])])
def test_a_batch_is_padded_on_the_left_ready_to_generate_from(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path)(["a", "abc"], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_any_tokenizer_folder_loads_by_its_path(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), []).get_vocab() == byte_tokenizer().get_vocab()


def test_an_unknown_tokenizer_is_named(monkeypatch):
    with pytest.raises(InputError, match="^data.tokenizer 'absent/absent' cannot be loaded: .*byte, character, bpe"):
        load_tokenizer("absent/absent", [])
    monkeypatch.setattr("training.tokenizers.AutoTokenizer", None)  # nothing is asked of the Hub
    for name in ("bytes", "gpt2", "./absent", "runs/a/tokenizer", "/absent/tokenizer"):
        with pytest.raises(InputError, match=f"^data.tokenizer is '{name}': must be byte, character, bpe, the folder"):
            load_tokenizer(name, [])


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path), [])
