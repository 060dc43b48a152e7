"""The recurrent state as a file: read a text once, continue from it in another process.

B batch, D state width, H hidden size, K convolution kernel size. The file is in the safetensors format: for each layer
the recurrent state (B, D) and the convolution window (B, K - 1, H), in the dtypes they have; neither grows with what
was read. If the rows began with other positions than 0, these are there too, (B, 1). The metadata are the number of
tokens read, a hash of the model and a checksum of everything.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .modeling_minrnn import MinRNNPreTrainedModel

FORMAT = "modeling_minrnn.state.1"

# What a state depends on, besides the weights.
CONFIG_FIELDS = (
    "cell_type", "conv_kernel_size", "expansion_factor", "hidden_act", "hidden_size", "intermediate_size",
    "learned_initial_state", "num_hidden_layers", "rms_norm_eps", "vocab_size",
)  # fmt: skip


def save_state(
    cache: Cache,
    path: str | os.PathLike,
    model: MinRNNPreTrainedModel,
    *,
    overwrite: bool = False,
    known_hash: str | None = None,
) -> int:
    """Write the state after the tokens seen so far, for `load_state`; return the size in bytes.

    Args:
        cache: `past_key_values`, as returned by the model; dynamic or static, of any batch size. Earlier states, which
            it keeps for `crop`, are not written.
        path: the file, written completely or not at all.
        model: the model that filled the cache. The file holds a hash of it, over the embedding, the layers and the
            final norm, which takes about a second for a GB of weights; models with other heads may use the state.
        overwrite: replace a file that exists.
        known_hash: `model_hash(model)`, for a caller that writes many states of one model.

    Raises:
        ValueError: a cache that has seen nothing, or of another model.
        FileExistsError: the file exists and `overwrite` is not set.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    layers = model.base_model.layers
    if len(cache.layers) != len(layers) or not all(getattr(layer, "is_initialized", False) for layer in cache.layers):
        raise ValueError(f"the cache must be one that this model of {len(layers)} layers has filled")
    tensors: dict[str, Tensor] = {}
    for i, (layer, kept) in enumerate(zip(layers, cache.layers)):
        like = layer.rnn.in_proj.weight
        start = layer.rnn.start(like).expand(kept.batch_size, -1)
        state = kept.read().state_or(start)
        window = kept.read().window_or(like.new_zeros(kept.batch_size, layer.window_size, like.shape[1]))
        tensors |= {f"layers.{i}.state": state.contiguous(), f"layers.{i}.window": window.contiguous()}
    if cache.layers[0].first_positions is not None:
        tensors["first_positions"] = cache.layers[0].first_positions
    metadata = {
        "format": FORMAT,
        "model": known_hash or model_hash(model),
        "num_tokens": str(int(cache.get_seq_length())),
    }
    metadata["checksum"] = _hash(metadata, tensors)
    data = save(tensors, metadata)
    _write(data, path, overwrite)
    return len(data)


def load_state(
    path: str | os.PathLike, model: MinRNNPreTrainedModel, *, known_hash: str | None = None
) -> DynamicCache:
    """The cache that `save_state` wrote, on the devices of the model, to continue from with the same model:

        cache = load_state(path, model)
        mask = torch.ones(B, cache.get_seq_length() + new_ids.shape[1])  # tells generate that all of new_ids is new
        model.generate(new_ids, past_key_values=cache, attention_mask=mask)

    The checksum detects damage, not forgery. known_hash: as in `save_state`.

    Raises:
        ValueError: the file is not such a state, or damaged, or of a model with another configuration or with other
            weights, be it only in their dtype.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no state of a conversation, or damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no state of a conversation: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    if metadata.pop("checksum", None) != _hash(metadata, tensors):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    if metadata["model"] != (known_hash or model_hash(model)):
        raise ValueError(f"{path} is the state of another model: the configuration or the weights differ")
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(model.base_model.layers):
        device = layer.rnn.in_proj.weight.device
        state, window = (tensors[f"layers.{i}.{name}"].to(device) for name in ("state", "window"))
        cache.update(state, window, i, num_tokens=int(metadata["num_tokens"]))
    if "first_positions" in tensors:
        cache.layers[0].first_positions = tensors["first_positions"].to(cache.layers[0].device)
    return cache


def model_hash(model: MinRNNPreTrainedModel) -> str:
    """SHA-256 of everything a state depends on: the configuration and all weights but those of the head."""
    fields = {name: getattr(model.config, name) for name in CONFIG_FIELDS}
    specs = [cell.spec for cell in model.config.cells]
    if specs != model.config.cell_types:  # cells with options: without any, the hash is that of older files
        fields["cells"] = specs
    return _hash(fields, model.base_model.state_dict())


def _hash(fields: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of fields and of the names, dtypes, shapes and bytes of tensors, in alphabetical order."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(data: bytes, path: Path, overwrite: bool) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder, path.name)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # Unlike os.replace, os.link fails if the file has come to exist in the meantime.
        os.replace(part, path) if overwrite else os.link(part, path)


__all__ = ["load_state", "save_state"]
