"""What the examples run on when they are given no model: a tiny one, untrained, that writes noise."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_minrnn import MinRNNConfig
from training.tokenizers import byte_tokenizer


def load(
    folder: str | None, auto_class: type = AutoModelForCausalLM, **config
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of `folder`, or new ones if it is None; config: fields of the configuration to change."""
    if folder is not None:
        return auto_class.from_pretrained(folder, **config), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2}
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return auto_class.from_config(MinRNNConfig(**sizes, **tokens, **config)), tokenizer
