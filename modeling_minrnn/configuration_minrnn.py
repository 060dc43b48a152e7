"""Configuration of the MinRNN models."""

import difflib
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

from .cells import CELLS, Cell

BACKENDS = ("auto", "loop", "torch", "numba", "triton", "triton_batch_invariant", "log")  # of `scan.minrnn_scan`

# The default target modules of PEFT: every Linear of the layers.
LORA_TARGET_MODULES = ["in_proj", "gate_proj", "out_proj", "up_proj", "down_proj"]

# Fields that are options of some cells: the value that None stands for in these cells, for a state of width D, and in
# all others. PEFT divides by num_heads of any model: it is 1 for cells without heads.
CELL_OPTIONS = {
    "candidate": (lambda D: "g", None),
    "num_heads": (lambda D: math.gcd(D, 8), 1),
    "householder_steps": (lambda D: 1, None),
    "memory_order": (lambda D: math.gcd(D, 16), None),
    "memory_window": (lambda D: 256, None),
}


def cells_with(option: str) -> list[str]:
    """The names of the cells that have this option."""
    return [name for name, cell in CELLS.items() if option in cell.__dataclass_fields__]


def refuse_misspelled(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is nearly that of a field, or some words of it, as num_layers."""
    fields = list(MinRNNConfig.__annotations__)
    for name in names:
        # Other unknown names are kept, as in transformers: libraries add their own to a saved config.
        if name in fields or hasattr(PreTrainedConfig, name):
            continue
        if isinstance(getattr(MinRNNConfig, name, None), property):
            raise ValueError(f"{name} is not a field of MinRNNConfig: it follows from the others")
        words = set(name.split("_"))
        nearest = [field for field in fields if len(words) > 1 and words < set(field.split("_"))]
        nearest += difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
        if nearest:
            raise ValueError(f"MinRNNConfig has no field {name!r}; did you mean {nearest[0]!r}?")


@contextmanager
def value_errors() -> Iterator[None]:
    """Turn what `strict` raises while a configuration is built or saved into a ValueError of one line."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"MinRNNConfig: {' '.join(str(error).split())}") from error


@strict
class MinRNNConfig(PreTrainedConfig):
    """Shape and behaviour of a MinRNN model: minGRU, minLSTM (arXiv 2410.01201) or another cell of `cells.py`.

    Each layer is `x + conv(x)`, then `x + rnn(norm(x))`, then `x + mlp(norm(x))`. In a bidirectional one, `conv` and
    `rnn` are sums of what two of them make of the sequence, one reading it from its start and one from its end.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: H, width of the residual stream.
        num_hidden_layers: layers.
        cell_type: a name of `cells.CELLS`: "mingru" (one gate), "minlstm" (forget and input gate), "mingru_signed",
            "aaren", "rwkv4", "lru", "rglru", "hgrn", "hgrn2", "gated_delta" or "lmu"; or a list of them, one for each
            layer.
        candidate: of "mingru" and "minlstm": "g" (None; positive, the paper's) or "linear", a state of either sign.
        num_heads: of "aaren", the means that share D; of "hgrn2" and "gated_delta", the matrices, of D / num_heads
            rows and columns each. None for the largest of 8, 4, 2, 1 that divides D. Of other cells 1.
        householder_steps: of "gated_delta", the keys of a token, each of which replaces what it finds; None for 1.
        memory_order, memory_window: of "lmu", numbers of state a channel (None for the largest of 16, 8, 4, 2, 1 that
            divides D) and the tokens that they stand for (None for 256).
        output_gate: multiply what the recurrence gives by silu(W x), x its input.
        expansion_factor: width of the recurrent state D / H; D must come out as an integer.
        conv_kernel_size: tokens that the causal depthwise convolution sees, itself included; 0 for no convolution.
        intermediate_size: width of the MLP; None for 4 H, 0 for no MLP.
        mlp_bias: biases in the MLP.
        hidden_act: activation of the MLP, a name from `transformers.activations.ACT2FN`.
        rms_norm_eps: added to the mean square in the norms.
        dropout: probability, on the embeddings and on what the RNN and the MLP add to the residual stream.
        learned_initial_state: train the state that every sequence starts from, and that every reset returns to,
            instead of zero.
        bidirectional: read each sequence in both directions, as an encoder does; such a model has no cache and cannot
            generate.
        max_timescale: None, or chrono initialisation (Tallec & Ollivier 2018): a bias on the gates, or parameters of
            the cell, such that the memory of the channels, 1 / -log(a), is at first log-uniform in 1..max_timescale
            tokens. Not for "aaren" and "lmu".
        initializer_range: standard deviation of the initial weights; None for 1 / sqrt(H), by which a projection of a
            normed vector starts at variance 1 whatever the width. Projections into the residual stream start at
            initializer_range / sqrt(2 num_hidden_layers).
        tie_word_embeddings: one matrix for the embedding and the language-model head.
        use_cache: return the recurrent state from forward passes; None for True, or False where bidirectional.
        scan_backend: how the recurrence is computed, see `scan.minrnn_scan`.

    Raises:
        ValueError: for a field that does not exist, has the wrong type or a value out of its range.
    """

    model_type = "minrnn"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.rnn": "minrnn_channels",  # of tensor_parallel.py
        "layers.*.rnn.out_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "masks"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 256
    hidden_size: int = 384
    num_hidden_layers: int = 6
    cell_type: str | list[str] = "mingru"
    candidate: str | None = None
    num_heads: int | None = None
    householder_steps: int | None = None
    memory_order: int | None = None
    memory_window: int | float | None = None
    output_gate: bool = False
    expansion_factor: int | float = 1
    conv_kernel_size: int = 4
    intermediate_size: int | None = None
    mlp_bias: bool = False
    hidden_act: str = "gelu"
    rms_norm_eps: float = 1e-6
    dropout: int | float = 0.0
    learned_initial_state: bool = False
    bidirectional: bool = False
    max_timescale: int | float | None = None
    initializer_range: float | None = None
    tie_word_embeddings: bool = True
    use_cache: bool | None = None
    scan_backend: str = "auto"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        refuse_misspelled(kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.initializer_range is None:
            self.initializer_range = max(self.hidden_size, 1) ** -0.5  # validation refuses a width below 1 later
        for name, (default, elsewhere) in CELL_OPTIONS.items():
            if getattr(self, name) is None and math.isfinite(self.expansion_factor):
                is_option = set(cells_with(name)) & set(self.cell_types)
                setattr(self, name, default(self.state_size) if is_option else elsewhere)
        if self.use_cache is None:
            self.use_cache = not self.bidirectional
        if self.bidirectional:  # not for other models: transformers warns of rules without a module
            rnn = {name: style for name, style in self.base_model_tp_plan.items() if ".rnn" in name}
            reverse = {name.replace(".rnn", ".reverse_rnn"): style for name, style in rnn.items()}
            self.base_model_tp_plan = self.base_model_tp_plan | reverse
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, but a configuration of another architecture is an error, not a warning, and fields given
        beside those of the file are checked like them."""
        saved = config_dict.get("model_type", cls.model_type)
        if saved != cls.model_type:
            raise ValueError(f"this is a checkpoint of model_type {saved!r}, not {cls.model_type!r}")
        refuse_misspelled(kwargs)
        given = {name: kwargs.pop(name) for name in MinRNNConfig.__annotations__ if name in kwargs}
        return super().from_dict(config_dict | given, **kwargs)

    def to_dict(self):
        """As in transformers."""
        # PEFT looks default targets up by the model_type of this dict. It has no registration hook and may be imported
        # late, after the model was made: register here.
        if "peft.utils.constants" in sys.modules:
            table = sys.modules["peft.utils.constants"].TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            table.setdefault(self.model_type, LORA_TARGET_MODULES)
        return super().to_dict()

    @property
    def state_size(self) -> int:
        """D, channels of recurrent state in each layer."""
        return round(self.hidden_size * self.expansion_factor)

    @property
    def cell_types(self) -> list[str]:
        """The cell of each layer, by name."""
        return [self.cell_type] * self.num_hidden_layers if isinstance(self.cell_type, str) else list(self.cell_type)

    @property
    def cells(self) -> list[Cell]:
        """The cell of each layer, with its options."""
        return [
            CELLS[cell](**{name: getattr(self, name) for name in CELL_OPTIONS if cell in cells_with(name)})
            for cell in self.cell_types
        ]

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache that each layer keeps, see `cache_minrnn`."""
        return ["minrnn"] * self.num_hidden_layers

    def validate_token_ids(self):
        """Special tokens outside the vocabulary: ValueError that names the field."""
        self.check_token_ids(self.vocab_size)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise ValueError if a special token is not in a vocabulary of this size."""
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < vocab_size:
                    raise ValueError(f"{name} must be None or in the vocabulary, 0..{vocab_size - 1}, not {token}")

    def validate_layer_type(self):
        """Nothing to check: transformers' own list of layer types is closed, and `layer_types` is derived."""

    def validate_architecture(self):
        """Values out of range: ValueError that names the field."""
        smallest = {
            "vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "conv_kernel_size": 0, "intermediate_size": 0,
            "rms_norm_eps": 0, "initializer_range": 0,
        }  # fmt: skip
        for name, least in smallest.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {least} and finite, not {getattr(self, name)}")
        width = self.hidden_size * self.expansion_factor
        if not (1 <= width < math.inf and abs(width - round(width)) < 1e-6):
            raise ValueError(
                f"expansion_factor must make the state a whole number of channels, at least 1, "
                f"not {self.hidden_size} x {self.expansion_factor} = {width}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.bidirectional and self.use_cache:
            raise ValueError("use_cache must be False where bidirectional is True: there is no state to go on from")
        for name in ("max_timescale", "memory_window"):
            tokens = getattr(self, name)
            if tokens is not None and not 1 <= tokens < math.inf:
                raise ValueError(f"{name} must be None or a number of tokens >= 1, not {tokens}")
        self._validate_name("scan_backend", BACKENDS)
        self._validate_cells()
        if self.hidden_act != type(self).hidden_act:
            from transformers.activations import ACT2FN  # more than doubles the time to import this module

            self._validate_name("hidden_act", ACT2FN)

    def _validate_name(self, name: str, known: Iterable[str]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"{name} must be one of {sorted(known)}, not {getattr(self, name)!r}")

    def _validate_cells(self):
        for name in self.cell_types:
            if name not in CELLS:  # nor is the name of a cell with options
                raise ValueError(f"cell_type must be one of {sorted(CELLS)}, not {name!r}")
        if len(self.cell_types) != self.num_hidden_layers:
            raise ValueError(
                f"cell_type must be one name, or {self.num_hidden_layers} names for as many layers, not "
                f"{len(self.cell_types)}"
            )
        for name, (_, elsewhere) in CELL_OPTIONS.items():
            having = cells_with(name)
            if getattr(self, name) not in (None, elsewhere) and not set(having) & set(self.cell_types):
                raise ValueError(f"{name} is an option of {' and '.join(having)}, not of {self.cell_type}")
        for cell in self.cells:
            cell.blocks(self.state_size)
        if self.max_timescale is not None and not any(cell.remembers_by for cell in self.cells):
            raise ValueError(f"max_timescale sets the memory of gates, which {self.cell_type} does not have")


for _method in ("__init__", "validate"):
    setattr(MinRNNConfig, _method, value_errors()(getattr(MinRNNConfig, _method)))

__all__ = ["MinRNNConfig"]
