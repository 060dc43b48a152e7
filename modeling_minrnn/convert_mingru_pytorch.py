"""Language models and bare layers of the package minGRU-pytorch (PyPI, version 0.2.1), with the same outputs."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cells import cell_of
from .configuration_minrnn import MinRNNConfig
from .layer import MinRNN
from .modeling_minrnn import MinRNNForCausalLM

PROJECTIONS = {"mingru": "to_hidden_and_gate", "minlstm": "to_hidden_and_f_i_gate"}
CONVOLUTION = re.compile(r"layers\.\d+\.0\.net\.")


def convert_mingru_pytorch(state_dict: dict[str, Tensor]) -> MinRNNForCausalLM:
    """The model, in evaluation mode, with the weights of a `minGRU_pytorch.minLM.minLM`, and so with its logits.

        model = convert_mingru_pytorch(torch.load("model.pt"))
        model.save_pretrained(folder)

    Convertible is `minLM` with either cell (`use_lstm`) and any `depth`, `expansion` and `ff_mult`. Its layer is the
    one of MinRNN without a convolution, with biases in the MLP and the epsilon of the dtype in the norms. It projects
    to the candidate first and then to the gates, and has no projection of the output where the state is as wide as the
    residual stream; the identity stands for it.

    Not convertible are `enable_conv=True`, whose convolution has biases and mixes the channels, the models with
    attention (`hybrid`, `hybridLM`), and `prev_hiddens`. `dropout` is in no state dict; the model has none.

    The tensors of state_dict are copied; their dtype becomes that of the model.
    Raises ValueError for a state dict with a convolution, or with names that are not those of a `minLM`.
    """
    for name in filter(CONVOLUTION.match, state_dict):
        raise ValueError(
            f"{name}: a model with enable_conv=True cannot be converted, its convolution mixes the channels"
        )
    rest = dict(state_dict)

    def take(name: str) -> Tensor:
        if name not in rest:
            raise ValueError(f"this is not the state dict of a minLM of minGRU-pytorch 0.2.1: it has no {name}")
        return rest.pop(name)

    embedding = take("token_emb.weight")
    vocab_size, H = embedding.shape
    cell_type = "minlstm" if f"layers.0.2.{PROJECTIONS['minlstm']}.weight" in rest else "mingru"
    num_layers = len({name.split(".")[1] for name in rest if name.startswith("layers.")})
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": take("norm.weight"),
        "lm_head.weight": take("to_logits.weight"),
    }
    for i in range(num_layers):
        weights |= _layer(take, i, cell_type, len(weights["model.norm.weight"]), rest)
    D = weights["model.layers.0.rnn.out_proj.weight"].shape[1] if num_layers else 0
    if rest or not num_layers:
        what = next(iter(rest), "no layers")
        raise ValueError(f"this is not the state dict of a minLM of minGRU-pytorch 0.2.1: {what}")
    config = MinRNNConfig(
        vocab_size=vocab_size,
        hidden_size=H,
        num_hidden_layers=num_layers,
        cell_type=cell_type,
        expansion_factor=D / H,
        conv_kernel_size=0,
        intermediate_size=len(weights["model.layers.0.mlp.up_proj.weight"]),
        mlp_bias=True,
        rms_norm_eps=torch.finfo(embedding.dtype).eps,
        tie_word_embeddings=False,
    )
    model = MinRNNForCausalLM(config).to(embedding.dtype).eval()
    model.load_state_dict(weights)
    return model


def _layer(take: Callable[[str], Tensor], i: int, cell_type: str, H: int, rest: dict) -> dict[str, Tensor]:
    """The weights of layer i, by our names."""
    theirs, ours = f"layers.{i}.", f"model.layers.{i}."
    candidate, *gates = take(f"{theirs}2.{PROJECTIONS[cell_type]}.weight").chunk(len(cell_of(cell_type).blocks(0)))
    has_output = f"{theirs}2.to_out.weight" in rest or len(candidate) != H
    return {
        ours + "rnn_norm.weight": take(theirs + "1.weight"),
        ours + "rnn.in_proj.weight": torch.cat([*gates, candidate]),
        ours + "rnn.out_proj.weight": take(theirs + "2.to_out.weight") if has_output else torch.eye(H),
        ours + "mlp_norm.weight": take(theirs + "3.weight"),
        ours + "mlp.up_proj.weight": take(theirs + "4.0.weight"),
        ours + "mlp.up_proj.bias": take(theirs + "4.0.bias"),
        ours + "mlp.down_proj.weight": take(theirs + "4.2.weight"),
        ours + "mlp.down_proj.bias": take(theirs + "4.2.bias"),
    }


def convert_layer(state_dict: dict[str, Tensor], **kwargs) -> MinRNN:
    """The layer with the weights, and so the outputs, of a bare minGRU or minLSTM.

        layer = convert_layer(minGRU(dim=64).state_dict(), batch_first=True)

    Args:
        state_dict: of `minGRU` or `minLSTM` of minGRU-pytorch, without a projection of the output; or of a module with
            the linear maps of the paper's listings, linear_z and linear_h, or linear_f, linear_i and linear_h.
        kwargs: of `MinRNN`, as batch_first.

    Raises ValueError for other names.
    """
    listings = {"mingru": ("linear_z", "linear_h"), "minlstm": ("linear_f", "linear_i", "linear_h")}
    for cell_type, name in PROJECTIONS.items():
        if set(state_dict) == {f"{name}.weight"}:
            candidate, *gates = state_dict[f"{name}.weight"].chunk(len(cell_of(cell_type).blocks(0)))
            return _filled(cell_type, {"weight": torch.cat([*gates, candidate])}, kwargs)
    for cell_type, names in listings.items():
        for kinds in (("weight", "bias"), ("weight",)):
            if set(state_dict) == {f"{name}.{kind}" for name in names for kind in kinds}:
                tensors = {kind: torch.cat([state_dict[f"{name}.{kind}"] for name in names]) for kind in kinds}
                return _filled(cell_type, tensors, kwargs)
    raise ValueError(
        f"{sorted(state_dict)} are not the weights of one layer: expected one of {list(PROJECTIONS.values())}, or "
        f"{' or '.join(map(str, listings.values()))}; a projection of the output (to_out) is no part of it"
    )


def _filled(cell_type: str, tensors: dict[str, Tensor], kwargs: dict[str, Any]) -> MinRNN:
    width, input_size = tensors["weight"].shape
    layer = MinRNN(
        input_size,
        width // len(cell_of(cell_type).blocks(0)),
        bias="bias" in tensors,
        dtype=tensors["weight"].dtype,
        cell_type=cell_type,
        **kwargs,
    )
    layer.load_state_dict({f"projections.0.in_proj.{kind}": tensor for kind, tensor in tensors.items()})
    return layer


__all__ = ["convert_layer", "convert_mingru_pytorch"]
