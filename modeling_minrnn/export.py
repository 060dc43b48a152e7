"""A model as programs that run without this package:  python -m modeling_minrnn.export MODEL FOLDER

writes ONNX files, and beside them the tokenizer and the configuration (needs the extra `onnx`). Two of a language
model, with the generation configuration:

    prefill.onnx: input_ids (B, T), attention_mask (B, T) -> logits (B, V), new_state_0, new_state_1, ...
    decode.onnx:  input_ids (B, 1), state_0, state_1, ... -> logits (B, V), new_state_0, new_state_1, ...

B batch, T time, V vocabulary, D state width, H hidden size, K convolution kernel size. The logits are those after the
last token: shorter prompts are padded on the left. The state, two tensors a layer, is the recurrent state (B, D) and
the convolution window (B, K - 1, H), whatever T was. `examples/onnx_stream.py` shows the loop around them. One of any
other model, whose outputs have the names and shapes that they have in torch:

    model.onnx: input_ids (B, T), attention_mask (B, T), or (B, C, T) of multiple choice -> logits, ...

With --int8 the weights of the layers' projections are eight-bit integers, and the activations are rounded to as many
on the way.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.export import Dim, ExportedProgram
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from . import modeling_minrnn
from .backends import NAMESPACE
from .causal_conv import causal_conv
from .cells import cell_of
from .dense_recurrence import dense_step
from .modeling_minrnn import MinRNNForCausalLM, MinRNNForMultipleChoice, MinRNNPreTrainedModel
from .scan import step_loop
from .scan_blocks import ScanInputs


class FlatOutputs(nn.Module):
    """A model without a cache, whose outputs are a tuple."""

    def __init__(self, model: MinRNNPreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, ...]:
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).to_tuple()


class FlatState(FlatOutputs):
    """A language model that takes and returns its cache as a flat sequence of tensors; none for a new sequence."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, *state: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache(config=self.model.config)
        for layer, keys, values in zip(cache.layers, state[::2], state[1::2]):
            layer.update(keys, values)
        logits = self.model(input_ids, attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1], *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


@torch.no_grad()
def export_programs(model: MinRNNPreTrainedModel) -> dict[str, ExportedProgram]:
    """The model by torch.export, for any B and any T >= 2 of a prompt: `FlatState` of a language model, as "prefill"
    and "decode", or `FlatOutputs`, as "model".

    They still call this package's operators, and are as fast as the model.
    Raises ValueError for a model of another library, custom code from the Hub included.
    """
    if not isinstance(model, MinRNNPreTrainedModel):
        raise ValueError(f"only a model of this package can be exported, not {type(model)}")
    model.eval()
    batch, time = Dim("batch"), Dim("time", min=2)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    prompt: tuple[Tensor, ...] = (tokens, torch.ones_like(tokens))
    shape = {0: batch, 1: time}
    if isinstance(model, MinRNNForMultipleChoice):
        prompt = tuple(tensor[:, None].repeat(1, 4, 1) for tensor in prompt)
        shape = {0: batch, 1: Dim("choices", min=2), 2: time}
    if not isinstance(model, MinRNNForCausalLM):
        return {"model": torch.export.export(FlatOutputs(model), prompt, dynamic_shapes=(shape, shape))}
    flat, rows = FlatState(model), {0: batch}
    _, *state = flat(*prompt)
    return {
        "prefill": torch.export.export(flat, prompt, dynamic_shapes=(shape, shape)),
        "decode": torch.export.export(
            flat, (tokens[:, :1], None, *state), dynamic_shapes=(rows, None, (rows,) * len(state))
        ),
    }


def _plain_scan(projected, parameters, initial_state, reset_state, reset_mask, padding_mask, spec, backend):
    """The scan as torch's higher-order operator, which ONNX has too, over `step_loop` for one token."""
    assert reset_mask is None, "exported programs read one document a row"
    cell = cell_of(spec)
    if cell.system is not None:  # number by number, as a decomposition may create no constant tensors
        A, B = (torch.stack([torch.full((), y) for y in x.ravel().tolist()]).view(x.shape) for x in cell.system)

    def step(state: Tensor, token: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        projected, padding = (x[:, None] for x in token)
        if cell.system is not None:
            new = torch.where(padding, state, dense_step(A, B, projected[:, 0].masked_fill(padding, 0), state))
            return new, (new.clone(), new[:, :0].clone())
        inputs = ScanInputs(projected, parameters, state, reset_state, None, padding, cell, "loop")
        outputs, rest, state = step_loop(inputs)
        # The carry and the outputs may not share memory.
        return state, (outputs[:, 0].clone(), rest[:, 0, : 0 if cell.has_matrices else None].clone())

    if padding_mask is None:
        padding_mask = torch.zeros_like(projected[..., 0], dtype=torch.bool)
    tokens = (projected.transpose(0, 1), padding_mask.transpose(0, 1))
    final_state, (outputs, rest) = scan(step, initial_state.contiguous(), tokens)
    return outputs.transpose(0, 1), rest.transpose(0, 1), final_state


def _plain_conv(x, weight, window, taps):
    return causal_conv(x, weight, window, taps, backend="torch")


def _plain_argsort(x, *, stable, dim, descending=False):
    return torch.topk(x, x.shape[dim], dim, descending).indices  # ONNX defines that equal values keep their order


# For the models whose output is not `logits` alone.
OUTPUT_NAMES = {"MinRNNModel": ["last_hidden_state"], "MinRNNForQuestionAnswering": ["start_logits", "end_logits"]}
# Replacements of the operators that ONNX does not have.
DECOMPOSITIONS = {
    getattr(torch.ops, NAMESPACE).scan.default: _plain_scan,
    getattr(torch.ops, NAMESPACE).causal_conv.default: _plain_conv,
    torch.ops.aten.argsort.stable: _plain_argsort,
}


@torch.no_grad()  # otherwise the scan is traced with its derivative
def export_onnx(model: MinRNNPreTrainedModel, folder: str | Path, int8: bool = False) -> None:
    """Write prefill.onnx and decode.onnx, or model.onnx, into `folder`; each holds all the weights.

    int8: quantised by onnxruntime's quantize_dynamic, with a scale for each row of a weight.

    Raises FileExistsError if the folder exists and is not empty, ValueError as `export_programs`.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose another folder")
    programs = export_programs(model)
    folder.mkdir(parents=True, exist_ok=True)
    state = range(2 * model.config.num_hidden_layers)
    masked = ["input_ids", "attention_mask"]
    inputs = {"prefill": masked, "decode": ["input_ids", *(f"state_{i}" for i in state)], "model": masked}
    of_state = ["logits", *(f"new_state_{i}" for i in state)]
    for name, program in programs.items():
        exported = torch.onnx.export(
            program.run_decompositions(DECOMPOSITIONS),
            input_names=inputs[name],
            output_names=OUTPUT_NAMES.get(type(model).__name__, ["logits"]) if name == "model" else of_state,
            dynamo=True,
            verbose=False,
        )
        assert exported is not None  # it would be, were it to write the file
        exported.save(folder / f"{name}.onnx")
        if int8:
            from onnxruntime.quantization import quantize_dynamic

            file = folder / f"{name}.onnx"
            quantize_dynamic(file, file, op_types_to_quantize=["MatMul"], per_channel=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a MinRNN model to ONNX.")
    parser.add_argument("model", help="a model folder or a repository id")
    parser.add_argument("folder", help="a new folder for what is written")
    parser.add_argument("--int8", action="store_true", help="eight-bit weights: a quarter of the size, 2 %% off")
    options = parser.parse_args()
    try:
        config = AutoConfig.from_pretrained(options.model)
        # For a model of another library `export_programs` raises and names what was loaded.
        model_class = getattr(modeling_minrnn, (config.architectures or [""])[0], AutoModelForCausalLM)
        model = model_class.from_pretrained(options.model, dtype=torch.float32)
        export_onnx(model, options.folder, options.int8)
        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.folder)
        model.config.to_json_file(Path(options.folder, "config.json"))  # the names of the labels, and the end token
        if model.can_generate():
            model.generation_config.save_pretrained(options.folder)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
