"""Language models and bare layers of the package minGRU-pytorch (PyPI, version 0.2.1), with the same outputs."""

import re

import torch
from torch import Tensor

from .cells import cell_of
from .configuration_minrnn import MinRNNConfig
from .layer import MinRNN
from .modeling_minrnn import MinRNNForCausalLM

PROJECTIONS = {"mingru": "to_hidden_and_gate", "minlstm": "to_hidden_and_f_i_gate"}
# The linear maps of a bare layer: in that package, and in the listings of the paper.
LAYERS: dict[tuple[str, ...], str] = {(name,): cell_type for cell_type, name in PROJECTIONS.items()}
LAYERS |= {("linear_z", "linear_h"): "mingru", ("linear_f", "linear_i", "linear_h"): "minlstm"}
CONVOLUTION = re.compile(r"layers\.\d+\.0\.net\.")
# Their names of tensors that are alike, and ours: of the model, and of a layer.
MODEL_NAMES = {
    "token_emb.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "to_logits.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "1.weight": "rnn_norm.weight",
    "3.weight": "mlp_norm.weight",
    "4.0.weight": "mlp.up_proj.weight",
    "4.0.bias": "mlp.up_proj.bias",
    "4.2.weight": "mlp.down_proj.weight",
    "4.2.bias": "mlp.down_proj.bias",
}


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

    weights = {ours: take(theirs) for theirs, ours in MODEL_NAMES.items()}
    embedding = weights["model.embed_tokens.weight"]
    vocab_size, H = embedding.shape
    cell_type = "minlstm" if f"layers.0.2.{PROJECTIONS['minlstm']}.weight" in rest else "mingru"
    num_layers, D = len({name.split(".")[1] for name in rest if name.startswith("layers.")}), 0
    for i in range(num_layers):
        theirs, ours = f"layers.{i}.", f"model.layers.{i}."
        weights |= {ours + name: take(theirs + their_name) for their_name, name in LAYER_NAMES.items()}
        projection = take(f"{theirs}2.{PROJECTIONS[cell_type]}.weight")
        D = len(projection) // len(cell_of(cell_type).blocks(0))
        has_output = D != H or f"{theirs}2.to_out.weight" in rest
        weights[ours + "rnn.in_proj.weight"] = _gates_first(projection, D)
        weights[ours + "rnn.out_proj.weight"] = take(f"{theirs}2.to_out.weight") if has_output else torch.eye(H)
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


def _gates_first(projection: Tensor, D: int) -> Tensor:
    """[candidate | gates], each of D rows, as [gates | candidate]."""
    return torch.cat([projection[D:], projection[:D]])


def convert_layer(state_dict: dict[str, Tensor], **kwargs) -> MinRNN:
    """The layer with the weights, and so the outputs, of a bare minGRU or minLSTM.

        layer = convert_layer(minGRU(dim=64).state_dict(), batch_first=True)

    Args:
        state_dict: of `minGRU` or `minLSTM` of minGRU-pytorch, without a projection of the output; or of a module with
            the linear maps of the paper's listings, linear_z and linear_h, or linear_f, linear_i and linear_h.
        kwargs: of `MinRNN`, as batch_first.

    Raises ValueError for other names.
    """
    kinds = ("weight", "bias") if any(name.endswith(".bias") for name in state_dict) else ("weight",)
    wanted = {names: {f"{name}.{kind}" for name in names for kind in kinds} for names in LAYERS}
    names = next((names for names in LAYERS if wanted[names] == set(state_dict)), None)
    if names is None:
        raise ValueError(
            f"{sorted(state_dict)} are not the weights of one layer: expected one of {[*LAYERS]}; a projection of the "
            "output (to_out) is no part of it"
        )
    cell_type = LAYERS[names]
    tensors = {kind: torch.cat([state_dict[f"{name}.{kind}"] for name in names]) for kind in kinds}
    width, input_size = tensors["weight"].shape
    D = width // len(cell_of(cell_type).blocks(0))
    if len(names) == 1:
        tensors = {kind: _gates_first(tensor, D) for kind, tensor in tensors.items()}
    dtype = tensors["weight"].dtype
    layer = MinRNN(input_size, D, bias="bias" in tensors, dtype=dtype, cell_type=cell_type, **kwargs)
    layer.load_state_dict({f"projections.0.in_proj.{kind}": tensor for kind, tensor in tensors.items()})
    return layer


__all__ = ["convert_layer", "convert_mingru_pytorch"]
