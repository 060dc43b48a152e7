"""What decodes on a CPU without torch, as contenders of generate.py: GPT-2 in CTranslate2, in float32 and with int8
weights and activations, and Llama in llama.cpp, in float32 and with its eight-bit weights, where they are installed
(`pip install '.[engines]'`); and our own models in onnxruntime."""

import importlib.util
import json
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
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

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


def engines(gpt2: GPT2LMHeadModel, llama: LlamaForCausalLM) -> dict[str, Decode]:
    """By name, what decodes these models greedily and tells the clock the time of each new token."""
    found: dict[str, Decode] = {}
    for names, model, build in ((["ctranslate2"], gpt2, _ctranslate2), (["xllamacpp", "gguf"], llama, _llama_cpp)):
        if all(importlib.util.find_spec(name) for name in names):
            found |= build(model)
        else:
            print(f"{' and '.join(names)} are not installed: no rows of them", file=sys.stderr)
    return found


def _ctranslate2(gpt2: GPT2LMHeadModel) -> dict[str, Decode]:
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
    return {f"ctranslate2 gpt2 {kind}": partial(_by_ctranslate2, generator) for kind, generator in generators.items()}


def _by_ctranslate2(
    generator: Any, prompt: torch.Tensor, new_tokens: int, tell: Callable[[float], None]
) -> torch.Tensor:
    [result] = generator.generate_batch(
        [[str(token) for token in prompt[0].tolist()]],
        max_length=new_tokens,
        min_length=new_tokens,  # whatever token 0 means
        sampling_topk=1,
        include_prompt_in_result=False,
        callback=lambda step: tell(now()),  # None: go on
    )
    return torch.tensor(result.sequences_ids[0])


CHARACTERS = 0x4E00  # of the tokens as text, in which llama.cpp gives them back one by one


def write_gguf(llama: LlamaForCausalLM, path: str, kind: str) -> None:
    """The model as a file of llama.cpp, its matrices in a GGMLQuantizationType."""
    import gguf

    config, kind, file = llama.config, gguf.GGMLQuantizationType[kind], gguf.GGUFWriter(path, "llama")
    padding = -config.intermediate_size % 32  # to whole blocks of numbers with one scale, by zeros
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size + padding)
    file.add_head_count(config.num_attention_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("llama")
    file.add_token_list([chr(CHARACTERS + token) for token in range(config.vocab_size)])
    file.add_token_scores([0.0] * config.vocab_size)
    file.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in llama.named_parameters():
        name = names.get_name(name, (".weight",))
        values = parameter.detach().numpy()
        if "attn_q" in name or "attn_k" in name:  # it rotates neighbours, transformers the two halves of a head
            values = (
                values.reshape(config.num_attention_heads, 2, -1, config.hidden_size)
                .swapaxes(1, 2)
                .reshape(values.shape)
            )
        if "ffn_gate" in name or "ffn_up" in name:
            values = np.pad(values, ((0, padding), (0, 0)))
        if "ffn_down" in name:
            values = np.pad(values, ((0, 0), (0, padding)))
        of_it = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        file.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), of_it), raw_dtype=of_it)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _llama_cpp(llama: LlamaForCausalLM) -> dict[str, Decode]:
    import xllamacpp

    found = {}
    for kind in ("F32", "Q8_0"):
        with tempfile.TemporaryDirectory() as folder:
            parameters = xllamacpp.CommonParams()
            parameters.model.path = f"{folder}/model.gguf"
            write_gguf(llama, parameters.model.path, kind)
            parameters.n_ctx, parameters.n_parallel, parameters.verbosity = llama.config.max_position_embeddings, 1, -1
            parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = THREADS
            found[f"llama.cpp llama {kind}"] = partial(_by_llama_cpp, xllamacpp.Server(parameters))
    return found


def _by_llama_cpp(server: Any, prompt: torch.Tensor, new_tokens: int, tell: Callable[[float], None]) -> torch.Tensor:
    text = []

    def listen(answer: Any) -> None:
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        new = answer["choices"][0]["text"]
        if new:
            tell(now())
            text.append(new)

    # Of no token it knows that it ends a text; the second, which it takes for that, is never drawn.
    request = {"n_predict": new_tokens, "temperature": 0.0, "stream": True, "ignore_eos": True, "cache_prompt": False}
    server.handle_completions({"prompt": prompt[0].tolist(), **request}, listen)
    return torch.tensor([ord(character) - CHARACTERS for character in "".join(text)])
