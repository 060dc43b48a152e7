"""Tokenizers: lossless on any text, and the same after saving and loading without custom code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from training.config import InputError
from training.data import encode
from training.tokenizers import byte_tokenizer, character_tokenizer, load_tokenizer

pytestmark = pytest.mark.oldest

# Any characters, and often ones that tokenizers treat specially.
texts = st.lists(st.text() | st.sampled_from(["<eos>", "<pad>", "<unk>", "\r\n", "  ", "\n", " .", "é", "🙂"])).map(
    "".join
)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(texts)
def test_byte_ids_are_the_bytes_of_the_text(reloaded, text):
    for tokenizer in (byte_tokenizer(), reloaded):
        ids = encode([text], tokenizer)[0]
        assert ids == [*text.encode(), tokenizer.eos_token_id]
        assert tokenizer.decode(ids[:-1]) == text


@given(texts)
def test_a_character_tokenizer_restores_any_text_of_its_alphabet(text):
    tokenizer = character_tokenizer([text])
    ids = encode([text], tokenizer)[0]
    assert len(ids) == len(text) + 1
    assert tokenizer.decode(ids[:-1]) == text


def test_a_character_tokenizer_is_the_same_after_saving_and_loading(tmp_path):
    text = "zebra <eos>\r\n\té🙂"
    tokenizer = character_tokenizer([text])
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert encode([text], reloaded) == encode([text], tokenizer)
    assert reloaded.decode(encode([text], reloaded)[0][:-1]) == text


def test_a_character_outside_the_alphabet_becomes_the_unknown_token():
    tokenizer = character_tokenizer(["ab", "c"])
    assert encode(["axc"], tokenizer) == [[0, tokenizer.unk_token_id, 2, tokenizer.eos_token_id]]


def test_special_tokens_follow_the_alphabet_and_are_distinct():
    for tokenizer, size in ((byte_tokenizer(), 256), (character_tokenizer("hello"), 4)):
        specials = sorted(tokenizer.all_special_ids)
        assert specials == list(range(size, len(tokenizer)))


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), character_tokenizer(["abc"])])
def test_a_batch_is_padded_on_the_left_ready_to_generate_from(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path)(["a", "abc"], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_any_tokenizer_folder_loads_by_its_path(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), []).get_vocab() == byte_tokenizer().get_vocab()


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(InputError, match="^data.tokenizer 'absent/absent' cannot be loaded: "):
        load_tokenizer("absent/absent", [])


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path), [])
