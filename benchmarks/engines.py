"""What decodes on a CPU without torch, as contenders of generate.py: GPT-2 in CTranslate2, in float32 and with int8
weights and activations, where it is installed (`pip install '.[engines]'`); and our own models in onnxruntime."""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
import torch
from harness import THREADS, now, relative_error
from models import VOCABULARY
from transformers import GPT2LMHeadModel, PreTrainedModel

from modeling_minrnn.export import export_onnx

Decode = Callable[
    [torch.Tensor, int, Callable[[float], None]], torch.Tensor
]  # prompt, new tokens, clock -> new tokens


def onnx(model: PreTrainedModel, int8: bool, prompts: torch.Tensor) -> tuple[Decode, float]:
    """What decodes an exported model greedily, and the relative error of its logits after `prompts`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, folder, int8)
        prefill, decode = (
            onnxruntime.InferenceSession(f"{folder}/{name}.onnx", options) for name in ("prefill", "decode")
        )
    names = [value.name for value in decode.get_inputs()]

    def start(ids: np.ndarray) -> list[np.ndarray]:
        return prefill.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})

    def generate(prompt: torch.Tensor, new_tokens: int, tell: Callable[[float], None]) -> torch.Tensor:
        logits, *state = start(prompt.numpy())
        tokens = [logits.argmax(-1)]
        tell(now())
        while len(tokens) < new_tokens:
            logits, *state = decode.run(None, dict(zip(names, [tokens[-1][:, None], *state])))
            tokens.append(logits.argmax(-1))
            tell(now())
        return torch.tensor(np.concatenate(tokens))

    with torch.no_grad():
        wanted = model(prompts, logits_to_keep=1).logits[:, -1]
    return generate, relative_error([torch.tensor(start(prompts.numpy())[0])], [wanted])


def engines(gpt2: GPT2LMHeadModel) -> dict[str, Decode]:
    """By name, what decodes `gpt2` greedily and tells the clock the time of each new token."""
    if importlib.util.find_spec("ctranslate2") is None:
        print("ctranslate2 is not installed: no rows of it", file=sys.stderr)
        return {}
    import ctranslate2
    from ctranslate2.converters.transformers import GPT2Loader

    spec = GPT2Loader().get_model_spec(gpt2)
    spec.register_vocabulary([str(token) for token in range(VOCABULARY)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"  # it wants them, and uses none here
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        generators = {
            kind: ctranslate2.Generator(folder, device="cpu", compute_type=kind, intra_threads=THREADS)
            for kind in ("float32", "int8")
        }
    return {f"ctranslate2 gpt2 {kind}": partial(_ctranslate2, generator) for kind, generator in generators.items()}


def _ctranslate2(generator: Any, prompt: torch.Tensor, new_tokens: int, tell: Callable[[float], None]) -> torch.Tensor:
    [result] = generator.generate_batch(
        [[str(token) for token in prompt[0].tolist()]],
        max_length=new_tokens,
        min_length=new_tokens,  # whatever token 0 means
        sampling_topk=1,
        include_prompt_in_result=False,
        callback=lambda step: tell(now()),  # None: go on
    )
    return torch.tensor(result.sequences_ids[0])
