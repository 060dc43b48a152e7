"""Byte, character and BPE tokenizers that AutoTokenizer loads without custom code, and any other one by name."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .config import TOKENIZERS, DataConfig, InputError, check_tokenizer, one_line
from .data import cut

# A BPE tokenizer is trained on the first so many characters of the training text. 1 MB takes about a second; counting
# all different words took 0.2 GB for the first 60 MB of Python source.
BPE_CHARACTERS = 10**8
END_OF_TEXT = "<eos>"
PADDING = "<pad>"
UNKNOWN = "<unk>"
# Prompts must end in a token, not in padding; the models do not use token_type_ids.
SETTINGS = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
# A conversation as plain text, in which a turn ends as a document does: "user: Hello.<eos>assistant: Hi.<eos>". The
# turns of the assistant are marked, with the end token: trainers can compute the loss of these alone.
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
    return finished(backend)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's words, trained on the first BPE_CHARACTERS; any text comes back as it was."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(beginning(texts), trainer)
    return finished(backend)


def beginning(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of the first BPE_CHARACTERS, with a bar."""
    with tqdm(desc="Training the tokenizer", total=BPE_CHARACTERS, unit=" characters", unit_scale=True) as bar:
        for piece in (piece for text in texts for piece in cut([text])):
            if bar.n >= BPE_CHARACTERS:
                break
            yield piece
            bar.update(len(piece))
        bar.total = bar.n


def finished(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers around a byte-level one."""
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


def load_tokenizer(
    name: str, texts: Iterable[str], vocab_size: int = DataConfig.tokenizer_vocab_size, trained: Path | None = None
) -> PreTrainedTokenizerBase:
    """`name`: one of TOKENIZERS, of which "character" and "bpe" are made from `texts`, or a Hub id or folder.

    trained: a file with the "bpe" tokenizer of a run that goes on.
    Raises InputError if there is no such tokenizer, or if it has no token that ends a document.
    """
    check_tokenizer(name)
    if name == "byte":
        return byte_tokenizer()
    if name == "character":
        return character_tokenizer(texts)
    if name == "bpe" and trained is None:
        return bpe_tokenizer(texts, vocab_size)
    if name == "bpe":
        try:
            return finished(Tokenizer.from_str(trained.read_text()))
        except Exception as error:  # tokenizers has no other
            raise InputError(f"{trained} is no tokenizer: {one_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"data.tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]} (known without loading: "
            f"{', '.join(TOKENIZERS)})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"data.tokenizer {name!r} has no end-of-text token, which separates documents")
    return tokenizer
