"""Small models in which every part matters, and the same model written out plainly: what they must compute."""

import oracle
import torch
import torch.nn.functional as F

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM

GATES = {"mingru": 2, "minlstm": 3}  # the parts of `projected`, the candidate included
CELLS = tuple(GATES)
# What the other cells are made of, as in the papers: learned vectors, options and log-sums beside a state of width D.
PARAMETERS = {"rwkv4": ("decay", "bonus"), "lru": ("nu", "theta", "gamma"), "rglru": ("decay",), "hgrn": ("bound",),
              "hgrn2": ("bound",), "gated_delta": ("decay", "step")}  # fmt: skip
OPTIONS = {"aaren": ("num_heads",), "hgrn2": ("num_heads",), "gated_delta": ("num_heads", "householder_steps"),
           "lmu": ("memory_order", "memory_window")}  # fmt: skip
LOG_SUMS = {
    "aaren": lambda config: config.num_heads, "rwkv4": lambda config: config.state_size, "rglru": lambda config: 1,
}  # fmt: skip
MATRICES = ("hgrn2", "gated_delta")  # in place of a state of width D, num_heads of D / num_heads rows and columns
VOCAB_SIZE = 37

# Odd widths, so that no part can pass for another; each option on and off.
SHAPES = (
    {"hidden_size": 14, "num_hidden_layers": 2, "expansion_factor": 1.5, "learned_initial_state": True},
    {"hidden_size": 9, "num_hidden_layers": 3, "expansion_factor": 1, "learned_initial_state": False,
     "conv_kernel_size": 0, "intermediate_size": 0, "max_timescale": 30},
    {"hidden_size": 11, "num_hidden_layers": 2, "expansion_factor": 3, "learned_initial_state": False,
     "conv_kernel_size": 1},
    {"hidden_size": 6, "num_hidden_layers": 2, "expansion_factor": 2.5, "learned_initial_state": True,
     "conv_kernel_size": 3, "max_timescale": 9, "intermediate_size": 5, "hidden_act": "silu",
     "mlp_bias": True, "tie_word_embeddings": False},
)  # fmt: skip

# Relative L2 error that rounding may leave. The worst seen: 2e-15; 5e-7 in states and logits, 1.4e-6 in gradients.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def small_config(cell_type="mingru", **fields) -> MinRNNConfig:
    return MinRNNConfig(**{"vocab_size": VOCAB_SIZE, "cell_type": cell_type} | SHAPES[0] | fields)


def small_model(cell_type="mingru", model_class=MinRNNForCausalLM, dtype=torch.float32, seed=0, **fields):
    """A model in evaluation mode with weights so large that each part changes the output, none of them zero."""
    torch.manual_seed(seed)
    model = model_class(small_config(cell_type, **fields)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif name.endswith("initial_state"):
                parameter.normal_()
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def small_half_precision_model(cell_type, dtype, **fields):
    """A model of one layer with gates and candidates that no order of summation can change: each reads one channel.

    Its memory is so long that a state in half precision would stand still, each step being under half a unit in the
    last place.
    """
    fields = {"num_hidden_layers": 1, "conv_kernel_size": 0, "max_timescale": 3000} | fields
    model = small_model(cell_type, **fields)
    with torch.no_grad():
        for row, weights in enumerate(model.model.layers[0].rnn.in_proj.weight):
            weights.zero_()[row % model.config.hidden_size] = 0.5
    return model.to(dtype)


def random_ids(*shape, seed=0) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Relative L2 error within `tolerance`, by default the rounding of the dtype of `actual`."""
    assert actual.shape == expected.shape
    assert oracle.relative_error(actual, expected) <= (tolerance or TOLERANCES[actual.dtype])


class WrittenOut:
    """A MinRNNForCausalLM written out for one sequence, a token at a time in float64, from its weights alone."""

    def __init__(self, model: MinRNNForCausalLM):
        self.config = model.config
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.weights = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()}
        if self.config.tie_word_embeddings:
            self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"]

    def __call__(self, ids: torch.Tensor):
        """ids (T,), T may be 0 -> logits (T, V), hidden states [(T, H)], [state (S,), window (K - 1, H)] a layer."""
        x = self.weights["model.embed_tokens.weight"][ids]
        hidden_states, cache = [x], []
        for i in range(self.config.num_hidden_layers):
            x, *kept = self.layer(x, f"model.layers.{i}.")
            hidden_states.append(x)
            cache.append(kept)
        hidden_states[-1] = self.norm(x, "model.norm.weight")
        return hidden_states[-1] @ self.weights["lm_head.weight"].T, hidden_states, cache

    def layer(self, x, name):
        x, window = self.add(self.conv, x, x, name, "conv.")
        x, state = self.add(self.recurrence, x, self.norm(x, name + "rnn_norm.weight"), name, "rnn.")
        if self.config.intermediate_size:
            inner = self.linear(self.norm(x, name + "mlp_norm.weight"), name + "mlp.up_proj.")
            x = x + self.linear(getattr(F, self.config.hidden_act)(inner), name + "mlp.down_proj.")
        return x, state, window

    def add(self, function, x, argument, layer, name):
        """x and what a function makes of its argument, forwards and, with the weights for it, backwards."""
        output, kept = function(argument, layer + name)
        if self.config.bidirectional:
            output = output + function(argument.flip(0), f"{layer}reverse_{name}")[0].flip(0)
        return x + output, kept

    def conv(self, x, name):
        K = self.config.conv_kernel_size
        before = torch.cat([x.new_zeros(max(K - 1, 0), x.shape[1]), x])
        taps = [before[k : k + len(x)] * self.weights[name + "weight"][:, k] for k in range(K)]
        return sum(taps, torch.zeros_like(x)), before[len(x) :]

    def recurrence(self, x, name):
        w, config = self.weights, self.config
        cell = config.cell_type if isinstance(config.cell_type, str) else config.cell_type[int(name.split(".")[2])]
        log_sums = LOG_SUMS[cell](config) if cell in LOG_SUMS else 0
        rows = config.state_size // config.num_heads if cell in MATRICES else 1
        nothing = torch.cat([x.new_zeros(config.state_size * rows), x.new_full((log_sums,), -1e30)])
        start = w.get(name + "initial_state", nothing)
        if len(x) == 0:
            return x, start
        given = {option: getattr(config, option) for option in OPTIONS.get(cell, ())}
        if cell in PARAMETERS:
            given["parameters"] = torch.stack([w[name + parameter] for parameter in PARAMETERS[cell]])
        variant = ":linear" if cell in CELLS and config.candidate == "linear" else ""
        outputs, state = oracle.scan(self.linear(x, name + "in_proj.")[None], cell + variant, start[None], **given)
        outputs = outputs[0] * F.silu(self.linear(x, name + "gate_proj.")) if config.output_gate else outputs[0]
        return self.linear(outputs, name + "out_proj."), state[0]

    def linear(self, x, name):
        return x @ self.weights[name + "weight"].T + self.weights.get(name + "bias", 0)

    def norm(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.weights[name]
