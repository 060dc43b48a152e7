"""A small model whose text can be compared as text: each byte that it writes is a letter."""

import torch
from small_models import small_model

from training.tokenizers import byte_tokenizer


def printable_model():
    """Its greedy text does not soon repeat itself, and depends on what was read hundreds of tokens before."""
    fields = {"vocab_size": 258, "tie_word_embeddings": False, "eos_token_id": 256, "max_timescale": 300}
    model = small_model("minlstm", **fields, seed=15)
    with torch.no_grad():
        model.lm_head.weight[: ord("a")] = 0
        model.lm_head.weight[ord("z") + 1 :] = 0
    return model


def save(model, folder):
    """The folder, as text, with a byte tokenizer."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def continuation(model, text, max_new_tokens):
    """Greedy text by `generate`."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=257)[0, ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert len(set(text)) > 5 and text.isalpha()
    return text
