"""How fast does `generate` decode on one CPU thread, does the prompt's length matter, and what state does it carry?

Timed: seconds a token of greedy `model.generate` at batch 1 after prompts of 16, 1024 and 8192 tokens, from the first
new token to the last; prefill (prompt to first token) is reported apart. Contenders:
    minrnn       MinRNNForCausalLM, 6 layers, width 384, vocabulary 256, otherwise default
    bare         the same model and cache in a loop of forward and argmax, without generate
    llama, gpt2  from transformers, sdpa attention, equal parameter counts (within 3 %)
Before timing, the tokens of generate are compared with those of the bare loop and with those of use_cache=False.

state_bytes: memory of the cache's tensors at the end, for the one sequence.

Where there is a GPU: 12 layers, width 768, vocabulary 50304 in bf16 with cache_implementation="static", which
transformers compiles in mode reduce-overhead (CUDA graphs). over_weights is the time a token over that of reading the
weights once at the bandwidth of a copy (benchmarks/gpu.py), the least that a step at batch 1 can take; recompiles
counts what was compiled again after the first generation.

Targets: minrnn <= 1.3x the time a token of bare; minrnn after 8192 tokens <= 1.05x its time a token after 16.

    python benchmarks/generate.py [--only mingru] [--rounds 7]
"""

import time
from functools import partial
from statistics import median

import torch
from harness import Bound, Report, interleave, parser
from models import VOCABULARY, minrnn, transformers_of_equal_size
from transformers import Cache, PreTrainedModel
from transformers.generation import BaseStreamer

PROMPTS = [16, 1024, 8192]
SHORTEST, LONGEST = PROMPTS[0], PROMPTS[-1]
NEW_TOKENS = 64
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


class Clock(BaseStreamer):
    """Notes when generate hands over the prompt and each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

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


def measure(report: Report, cell_type: str) -> None:
    model = minrnn(cell_type)
    models = {"minrnn": model, **transformers_of_equal_size(model, positions=LONGEST + NEW_TOKENS)}
    generator = torch.Generator().manual_seed(0)
    prompts = {length: torch.randint(VOCABULARY, (1, length), generator=generator) for length in PROMPTS}
    for candidate in models.values():
        candidate.eval()
    for prompt in prompts.values():
        verify_tokens(model, prompt)

    runs = {(name, length): (generate, models[name]) for length in PROMPTS for name in models}
    runs["bare", SHORTEST] = (bare_loop, model)
    prefills: dict[tuple[str, int], list[float]] = {run: [] for run in runs}

    def sample(run: tuple[str, int]) -> float:
        decode, candidate = runs[run]
        clock = Clock()
        decode(candidate, prompts[run[1]], clock)
        prefills[run].append(clock.prefill_seconds)
        return clock.seconds_per_token

    samples = interleave({run: partial(sample, run) for run in runs}, report.options.rounds)
    for run, (_, candidate) in runs.items():
        name, length = run
        row = {
            "cell": cell_type,
            "prompt": length,
            "contender": name,
            "parameters": candidate.num_parameters(),
            "ms_per_token": 1e3 * samples.seconds(run),
            "tokens_per_s": 1 / samples.seconds(run),
            "prefill_ms": 1e3 * median(prefills[run]),
            "state_bytes": state_bytes(candidate, prompts[length]),
        }
        if name != "bare":
            limit = 1.05 if name == "minrnn" and length == LONGEST else None
            row[f"over_prompt_{SHORTEST}"] = Bound(samples.ratio(run, (name, SHORTEST)), at_most=limit)
        if run == ("minrnn", SHORTEST):
            row["over_bare"] = Bound(samples.ratio(run, ("bare", SHORTEST)), at_most=1.3)
        report.add(**row)


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
    report = Report(parser("generate", __doc__, rounds=7).parse_args())
    for cell_type in ("mingru", "minlstm"):
        if report.wants(cell_type):
            measure(report, cell_type)
            if torch.cuda.is_available():
                measure_on_gpu(report, cell_type)
    report.print_table()


if __name__ == "__main__":
    main()
