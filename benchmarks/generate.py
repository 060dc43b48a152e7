"""How fast does `generate` decode on one CPU thread, does the prompt's length matter, and what state does it carry?

Timed, by one thread in seconds of CPU, of which other processes take nothing: a token of greedy `model.generate` at
batch 1 after prompts of 16, 1024 and 8192 tokens, from the first new token to the last; prefill (prompt to first
token) is reported apart. Contenders:
    minrnn       MinRNNForCausalLM, 6 layers, width 384, vocabulary 256, otherwise default
    bfloat16     the same in bfloat16, weights and all that layers hand on
    int8         the same, loaded with the weights of its projections in eight bits (torchao's Int8WeightOnlyConfig)
    int8 later   with those of the first layer, whose rounding counts most, in float32
    bare         minrnn and its cache in a loop of forward and argmax, without generate; after the shortest prompt
    small, bare  4 layers of width 128 in generate and in that loop, after the shortest prompt
    loop         the least that generate can take: small, with a forward that does nothing but return the same logits
    loop, reading  minrnn with one that adds up all weights, by torch's sum, and returns the same logits
    llama, gpt2  from transformers, sdpa attention, equal parameter counts (within 3 %)
    onnx, onnx int8  minrnn as modeling_minrnn.export writes it, the second with int8=True, in onnxruntime
    ctranslate2  that gpt2 in CTranslate2, in float32 and int8, where it is installed (engines.py)
    llama.cpp    that llama in llama.cpp, in float32 and eight bits (Q8_0), likewise
and minrnn and those with shorter weights at batches of 8 and 64, after the shortest prompt.
Before timing, the tokens of generate are compared with those of the bare loop and with those of use_cache=False, those
of the engines and ONNX in float32 with those of the model.

logit_error: relative L2 error of the logits after 64 prompts, where weights have fewer bits.
over_reading: the time a token over that of adding up all weights as often in the same rounds, by torch's sum.
state_bytes: memory of the cache's tensors at the end, for the one sequence.

Where there is a GPU: 12 layers, width 768, vocabulary 50304 in bf16 with cache_implementation="static", which
transformers compiles in mode reduce-overhead (CUDA graphs). over_weights is the time a token over that of reading the
weights once at the bandwidth of a copy (benchmarks/gpu.py), the least that a step at batch 1 can take; recompiles
counts what was compiled again after the first generation.

Targets: minrnn <= 1.3x the time a token of bare and of reading, and after 8192 tokens <= 1.05x its time after 16; int8
<= 1.5 ms, int8 later with a logit error <= 1.5 %; 1000 tokens/s in batches of 8, 2200 of 64; small <= 0.3 ms.

    python benchmarks/generate.py [--only mingru] [--rounds 7] [--longest 1024] [--contenders minrnn llama]
"""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from engines import engines, onnx
from harness import Bound, Report, interleave, now, parser, relative_error
from models import VOCABULARY, minrnn, transformers_of_equal_size
from torchao.quantization import Int8WeightOnlyConfig
from transformers import Cache, PreTrainedModel, TorchAoConfig
from transformers.generation import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM

PROMPTS = [16, 1024, 8192]
BATCHES = {8: 1000, 64: 2200}  # and the tokens/s to reach
SHORTEST = PROMPTS[0]
NEW_TOKENS = 64
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


class Clock(BaseStreamer):
    """Notes when generate hands over the prompt and each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.tell(now())

    def tell(self, seconds: float) -> None:
        self.times.append(seconds)

    def end(self) -> None:
        pass

    @property
    def prefill_seconds(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def seconds_per_token(self) -> float:
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def generate(model: PreTrainedModel, prompt: torch.Tensor, clock: Clock) -> torch.Tensor:
    """New tokens, greedy."""
    return model.generate(prompt, **GREEDY, streamer=clock)[0, prompt.shape[1] :]


def by_engine(decode: Callable, prompt: torch.Tensor, clock: Clock) -> torch.Tensor:
    clock.put(prompt)
    return decode(prompt, NEW_TOKENS, clock.tell)


def seconds_per_step(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Of a batch, which a streamer does not take."""
    started = now()
    model.generate(prompt, **GREEDY)
    all_tokens = now() - started
    started = now()
    model.generate(prompt, max_new_tokens=1, do_sample=False)
    return (all_tokens - (now() - started)) / (NEW_TOKENS - 1)


@torch.no_grad()
def bare_loop(model: PreTrainedModel, prompt: torch.Tensor, clock: Clock) -> torch.Tensor:
    """New tokens, greedy, with nothing but the model and its cache."""
    clock.put(prompt)
    new_tokens, token, cache = [], prompt, None
    for _ in range(NEW_TOKENS):
        output = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        clock.put(token)
        new_tokens.append(token)
    return torch.cat(new_tokens, dim=1)[0]


def state_bytes(model: PreTrainedModel, prompt: torch.Tensor) -> int:
    cache: Cache = model.generate(prompt, **GREEDY, return_dict_in_generate=True).past_key_values
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]  # what a view keeps alive counts in full
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def verify_tokens(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    tokens = generate(model, prompt, Clock())
    if not torch.equal(tokens, bare_loop(model, prompt, Clock())):
        raise RuntimeError(f"generate and the bare loop differ after {prompt.shape[1]} tokens; not timed")
    without_cache = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False)[0, prompt.shape[1] :]
    if not torch.equal(tokens[:8], without_cache):
        raise RuntimeError(f"the cache changes the tokens after {prompt.shape[1]} tokens; not timed")


def in_eight_bits(model: PreTrainedModel, but: list[str] | None = None) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=but)
        return MinRNNForCausalLM.from_pretrained(folder, quantization_config=config)


def small_model(cell_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4}
    return MinRNNForCausalLM(MinRNNConfig(cell_type=cell_type, **size))


def without_a_model(model: PreTrainedModel, work: Callable[[], object] = lambda: None) -> PreTrainedModel:
    """What generate calls, of which nothing is left to do but other work: the same logits each time."""
    model, logits = copy.deepcopy(model), torch.randn(1, 1, VOCABULARY)

    def forward(past_key_values=None, **others) -> CausalLMOutputWithPast:
        work()
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    model.forward = forward
    return model


def measure(report: Report, cell_type: str) -> None:
    model, lengths = minrnn(cell_type), [length for length in PROMPTS if length <= report.options.longest]
    others = transformers_of_equal_size(model, positions=lengths[-1] + NEW_TOKENS)
    only = report.options.contenders
    makers = {
        "bfloat16": lambda: copy.deepcopy(model).bfloat16(),
        "int8": partial(in_eight_bits, model),
        "int8 later": partial(in_eight_bits, model, ["lm_head", "model.layers.0"]),
    }
    shorter = {name: make() for name, make in makers.items() if name in (only or [name])}
    models = {"minrnn": model, **shorter, "small": small_model(cell_type), **others}
    generator = torch.Generator().manual_seed(0)
    prompts = {length: torch.randint(VOCABULARY, (1, length), generator=generator) for length in lengths}
    for candidate in models.values():
        candidate.eval()
    for prompt in prompts.values():
        verify_tokens(model, prompt)

    runs: dict[tuple[str, int], Callable[[torch.Tensor, Clock], torch.Tensor]] = {
        (name, length): partial(generate, candidate)
        for length in lengths
        for name, candidate in models.items()
        if name != "small" or length == SHORTEST
    }
    runs["bare", SHORTEST] = partial(bare_loop, model)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    runs["loop", SHORTEST] = partial(generate, without_a_model(models["small"]))
    runs["loop, reading", SHORTEST] = partial(generate, without_a_model(model, weights.sum))
    runs["small, bare", SHORTEST] = partial(bare_loop, models["small"])
    many = torch.randint(VOCABULARY, (64, SHORTEST), generator=generator)
    with torch.no_grad():
        exact = model(many).logits[:, -1]
        errors = {name: relative_error([each(many).logits[:, -1]], [exact]) for name, each in shorter.items()}
    with_engines = not only or any(name.startswith(("ctranslate2", "llama.cpp")) for name in only)
    decoders = engines(others["gpt2"], others["llama"]) if with_engines else {}
    for name in ("onnx", "onnx int8"):
        if name in (only or [name]):
            decoders[name], errors[name] = onnx(model, "int8" in name, many)
    originals = {"ctranslate2 gpt2 float32": others["gpt2"], "llama.cpp llama F32": others["llama"], "onnx": model}
    for name, decode in decoders.items():
        tokens = by_engine(decode, prompts[SHORTEST], Clock())[:8]
        if name in originals and not torch.equal(tokens, generate(originals[name], prompts[SHORTEST], Clock())[:8]):
            raise RuntimeError(f"{name} gives other tokens than the model that it was made of; not timed")
        runs |= {
            (name, length): partial(by_engine, decode)
            for length in lengths
            if length == SHORTEST or name not in errors
        }
    runs = {run: tokens for run, tokens in runs.items() if run[0] in (only or [run[0]])}
    prefills: dict[tuple[str, int], list[float]] = {run: [] for run in runs}

    def sample(run: tuple[str, int]) -> float:
        clock = Clock()
        runs[run](prompts[run[1]], clock)
        prefills[run].append(clock.prefill_seconds)
        return clock.seconds_per_token

    batches = {
        (name, B): partial(seconds_per_step, models[name], prompts[SHORTEST].expand(B, -1).contiguous())
        for B in BATCHES
        for name in ("minrnn", *shorter)
        if name in (only or [name])
    }

    def read() -> float:
        started = now()
        for _ in range(NEW_TOKENS):
            weights.sum()
        return (now() - started) / NEW_TOKENS

    samples = interleave(
        {run: partial(sample, run) for run in runs}
        | {("batch", *batch): seconds for batch, seconds in batches.items()}
        | {"read": read},
        report.options.rounds,
    )
    for run in runs:
        row = row_of(run, samples, median(prefills[run]), models, prompts)
        if run[0] in errors:
            row["logit_error"] = Bound(errors[run[0]], at_most=0.015 if run[0] == "int8 later" else None)
        report.add(cell=cell_type, **row)
    for (name, B), step in ((batch, samples.seconds(("batch", *batch))) for batch in batches):
        report.add(
            cell=cell_type, prompt=SHORTEST, contender=name, batch=B, ms_per_step=1e3 * step,
            tokens_per_s=Bound(B / step, at_least=BATCHES[B] if name == "minrnn" else None),
        )  # fmt: skip


def row_of(run: tuple[str, int], samples, prefill_seconds: float, models: dict, prompts: dict) -> dict[str, object]:
    name, length = run
    candidate = models.get({"bare": "minrnn", "small, bare": "small"}.get(name, name))
    seconds, limits = samples.seconds(run), {"int8": 1.5, "int8 later": 1.5, "small": 0.3}
    row = {
        "prompt": length,
        "contender": name,
        "ms_per_token": Bound(1e3 * seconds, at_most=limits.get(name) if length == SHORTEST else None),
        "tokens_per_s": 1 / seconds,
        "prefill_ms": 1e3 * prefill_seconds,
        "prefill_tokens_per_s": length / prefill_seconds,
    }
    if candidate is not None:
        row |= {"parameters": candidate.num_parameters(), "state_bytes": state_bytes(candidate, prompts[length])}
    if (name, SHORTEST) in samples and length != SHORTEST:
        limit = 1.05 if name == "minrnn" and length == PROMPTS[-1] else None
        row[f"over_prompt_{SHORTEST}"] = Bound(samples.ratio(run, (name, SHORTEST)), at_most=limit)
    if run == ("minrnn", SHORTEST):
        if ("bare", SHORTEST) in samples:
            row["over_bare"] = Bound(samples.ratio(run, ("bare", SHORTEST)), at_most=1.3)
        row["over_reading"] = Bound(samples.ratio(run, "read"), at_most=1.3)
    return row


def measure_on_gpu(report: Report, cell_type: str) -> None:
    from gpu import copy_bandwidth, gpu_name, language_model

    model = language_model(cell_type, 50304, 768, 12).eval()
    prompt = torch.randint(256, (1, 128), device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def sample() -> float:
        clock = Clock()
        model.generate(prompt, **GREEDY, cache_implementation="static", streamer=clock)
        return clock.seconds_per_token

    sample()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seconds = interleave({"step": sample}, report.options.rounds).seconds("step")
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    report.add(
        cell=cell_type,
        prompt=prompt.shape[1],
        contender="minrnn, static cache, GPU",
        gpu=gpu_name(),
        parameters=model.num_parameters(),
        ms_per_token=1e3 * seconds,
        tokens_per_s=1 / seconds,
        over_weights=seconds * copy_bandwidth() / weight_bytes,
        recompiles=Bound(torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled, at_most=0),
    )


def main() -> None:
    flags = parser("generate", __doc__, rounds=7)
    flags.add_argument("--longest", type=int, default=PROMPTS[-1], help="no prompts above so many tokens")
    flags.add_argument("--contenders", nargs="+", default=[], help="only these")
    report = Report(flags.parse_args())
    for cell_type in ("mingru", "minlstm"):
        if report.wants(cell_type):
            measure(report, cell_type)
            if torch.cuda.is_available():
                measure_on_gpu(report, cell_type)
    report.print_table()


if __name__ == "__main__":
    main()
