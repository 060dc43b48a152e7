"""What do eight-bit weights cost in accuracy, and what do they give in memory and speed, on one CPU thread?

Timed at batch 1: a forward pass over 512 tokens ("prefill"), and one step from the state after them ("decode").
Contenders, all of one model of 6 layers, width 384, vocabulary 256, untrained:
    float32       as it is
    int8 weights  torchao's Int8WeightOnlyConfig: the layers' projections, one scale a row; products in float32
    int8 later    the same for all layers but the first, whose rounding counts most
    int8 by 64    the same with a scale for each 64 numbers of a row
    int8 dynamic  torchao's Int8DynamicActivationInt8WeightConfig: activations rounded token by token as well
Both load as a user loads them, through from_pretrained. Nothing is compiled: torchao means its int8 for torch.compile,
and this is what a user has without it.

logit_error: relative L2 error of the logits against float32, over the 512 tokens; not timed above 0.1.
weight_bytes: what save_pretrained writes.

    python benchmarks/quantise.py [--only mingru] [--rounds 15]
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from harness import Report, interleave, measure_cells, relative_error, timed, verify
from models import VOCABULARY, minrnn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, PerGroup
from transformers import PreTrainedModel, TorchAoConfig

from modeling_minrnn import MinRNNForCausalLM

TOKENS = 512
SCHEMES = {
    "int8 weights": TorchAoConfig(Int8WeightOnlyConfig()),
    "int8 later": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head", "model.layers.0"]),
    "int8 by 64": TorchAoConfig(Int8WeightOnlyConfig(granularity=PerGroup(64))),
    "int8 dynamic": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
}


def saved_bytes(model: PreTrainedModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@torch.no_grad()
def measure(report: Report, cell_type: str) -> None:
    models: dict[str, PreTrainedModel] = {"float32": minrnn(cell_type).eval()}
    with tempfile.TemporaryDirectory() as folder:
        models["float32"].save_pretrained(folder)
        for name, scheme in SCHEMES.items():
            models[name] = MinRNNForCausalLM.from_pretrained(folder, quantization_config=scheme).eval()

    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    outputs = {name: model(ids, use_cache=True) for name, model in models.items()}
    errors = {
        name: verify(name, relative_error([output.logits], [outputs["float32"].logits]), 0.1)
        for name, output in outputs.items()
    }
    runs = {}
    for name, model in models.items():
        runs["prefill", name] = timed(partial(model, ids, use_cache=False))
        # The state moves on from step to step; a step takes as long wherever it starts.
        past = outputs[name].past_key_values
        runs["decode", name] = timed(partial(model, ids[:, :1], past_key_values=past, use_cache=True))
    samples = interleave(runs, report.options.rounds)
    for timed_part, name in runs:
        report.add(
            cell=cell_type,
            timed=timed_part,
            contender=name,
            ms=1e3 * samples.seconds((timed_part, name)),
            speedup_over_float32=samples.ratio((timed_part, "float32"), (timed_part, name)),
            logit_error=errors[name],
            weight_bytes=saved_bytes(models[name]),
        )


if __name__ == "__main__":
    measure_cells("quantise", __doc__, 15, measure)
