"""Byte and character tokenizers that AutoTokenizer loads without custom code, and any other tokenizer by name."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .config import InputError

END_OF_TEXT = "<eos>"
PADDING = "<pad>"
UNKNOWN = "<unk>"
# What to generate from ends in a token, not in padding; the models have no use for token_type_ids.
SETTINGS = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
# A conversation as plain text, in which a turn ends as a document does: "user: Hello.<eos>assistant: Hi.<eos>". Marked
# is what the assistant generates, the end of its turn included: trainers can learn from that alone.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every id below 256 is the UTF-8 byte of that value; 256 ends a document and 257 pads."""
    # ByteLevel stands each byte for a printable character; a BPE without merges then leaves single bytes.
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PADDING, chat_template=CHAT_TEMPLATE, **SETTINGS
    )


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One id per character that occurs in `texts`, in code point order; after them end, padding and unknown."""
    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(text)
    vocabulary = [*sorted(alphabet), END_OF_TEXT, PADDING, UNKNOWN]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PADDING, unk_token=UNKNOWN, **SETTINGS
    )


def load_tokenizer(name: str, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """`name`: "byte", "character" (its alphabet is that of `texts`), or a tokenizer's Hub id or folder.

    Raises InputError if there is no such tokenizer, or if it has no token that ends a document.
    """
    if name == "byte":
        return byte_tokenizer()
    if name == "character":
        return character_tokenizer(texts)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"data.tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"data.tokenizer {name!r} has no end-of-text token, which separates documents")
    return tokenizer
