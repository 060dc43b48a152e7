"""Requests that share a batch each get the tokens that `generate` gives them alone."""

import dataclasses
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import CASES
from small_models import VOCAB_SIZE, small_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

# What is missing before transformers 5.23
continuous_batching = pytest.importorskip("modeling_minrnn.continuous_batching", exc_type=ImportError)
prefix_store = pytest.importorskip("modeling_minrnn.prefix_store", exc_type=ImportError)
Config = continuous_batching.MinRNNBatchingConfig
NEW_TOKENS = 12
ROOT = Path(__file__).parent.parent


def prompts_of(*lengths, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def alone(model, prompt, max_new_tokens=NEW_TOKENS, **settings):
    """New tokens by `generate`."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)} | settings
    return model.generate(ids, max_new_tokens=max_new_tokens, **settings)[0, len(prompt) :].tolist()


def finished(manager, count):
    """The outputs of so many requests, by their ids, as they end."""
    outputs = {}
    deadline = time.monotonic() + 60
    while len(outputs) < count:
        assert time.monotonic() < deadline and (manager.is_running() or not manager.output_router.output_queue.empty())
        output = manager.get_result(timeout=0.1)
        if output is not None and output.is_finished():
            outputs[output.request_id] = output
    return outputs


@pytest.fixture
def managers():
    """Starts managers of models, and stops them."""
    started = []

    def start(model, config=None, **generation):
        config = config or Config()
        manager = model.init_continuous_batching(GenerationConfig(**{"do_sample": False} | generation), config)
        manager.start()
        started.append(manager)
        return manager

    yield start
    for manager in started:
        manager.stop(hard_stop=True)


# ---- Tokens


@pytest.mark.parametrize("cell", CASES.values(), ids=lambda cell: cell.spec)
def test_a_batch_of_requests_gets_the_tokens_of_each_alone_for_every_cell(cell):
    options = {"hidden_size": 14, "expansion_factor": 3} | dataclasses.asdict(cell)
    model = small_model(cell.name, **options)
    prompts = prompts_of(1, 2, 5, 30, 300, 3, 700, 40, 1, 17)
    outputs = model.generate_batch(prompts, max_new_tokens=NEW_TOKENS)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert (output.prompt_ids, output.error) == (prompt, None)
        assert output.generated_tokens == alone(model, prompt)


def test_requests_that_come_and_go_do_not_change_one_another(managers):
    model = small_model()
    manager = managers(model, Config(max_requests_per_batch=3), eos_token_id=5)
    generator, wanted = random.Random(1), {}
    for i, prompt in enumerate(prompts_of(*[generator.choice([1, 3, 20, 400]) for _ in range(40)])):
        name = manager.add_request(prompt, request_id=f"{i}", max_new_tokens=generator.choice([1, 2, 9, 30]))
        if i % 4 == 3:
            manager.cancel_request(name)
        wanted[name] = prompt, i % 4 == 3
        if i % 10 == 9:
            time.sleep(0.05)
    lengths = set()
    for name, output in finished(manager, 40).items():
        prompt, is_cancelled = wanted[name]
        count = len(output.generated_tokens)
        lengths.add(count)
        if output.error is not None:
            assert is_cancelled and output.error == "the request was cancelled"
        if count:
            assert output.generated_tokens == alone(model, prompt, 30, eos_token_id=5)[:count]
            assert output.error or count in (1, 2, 9, 30) or output.generated_tokens[-1] == 5
    assert len(lengths) > 4
    counters = manager.batch_processor.counters()
    assert counters["active"] == counters["waiting"] == 0


def test_a_request_with_a_seed_draws_as_generate_after_that_seed(managers):
    model = small_model()
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    manager = managers(model, Config(per_request_processors=True, seed=3), **settings)
    own = [{"seed": 11}, {"seed": 12, "temperature": 1.3}, {"seed": 13, "top_k": 2}, {"do_sample": False}, {}]
    prompts = prompts_of(4, 9, 30, 5, 7)
    for i, (prompt, arguments) in enumerate(zip(prompts, own)):
        manager.add_request(prompt, request_id=f"{i}", max_new_tokens=NEW_TOKENS, **arguments)
    outputs = finished(manager, len(own))
    for i, (prompt, arguments) in enumerate(zip(prompts[:4], own)):
        torch.manual_seed(arguments.get("seed", 0))
        arguments = {name: value for name, value in arguments.items() if name != "seed"}
        assert outputs[f"{i}"].generated_tokens == alone(model, prompt, **settings | arguments)


def test_log_probabilities_are_those_of_the_model():
    model, prompts = small_model("minlstm"), prompts_of(4, 300, 9)
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS)
    for output in model.generate_batch(prompts, config, Config(return_logprobs=True)).values():
        ids = torch.tensor([output.prompt_ids + output.generated_tokens])
        with torch.no_grad():
            logprobs = model(ids).logits[0, -NEW_TOKENS - 1 : -1].log_softmax(-1).max(-1).values
        torch.testing.assert_close(torch.tensor(output.logprobs), logprobs, rtol=0, atol=1e-5)


class Penalties(LogitsProcessor):
    """As OpenAI defines them, after a prompt of so many tokens."""

    def __init__(self, prompt_length, presence_penalty=0.0, frequency_penalty=0.0):
        self.start, self.presence, self.frequency = prompt_length, presence_penalty, frequency_penalty

    def __call__(self, ids, scores):
        counts = torch.stack([(ids[:, self.start :] == token).sum(1) for token in range(scores.shape[1])], 1)
        return scores - self.frequency * counts - self.presence * (counts > 0)


def test_penalties_are_of_each_request_and_log_probabilities_of_the_model(managers):
    model, [prompt] = small_model(), prompts_of(30)
    manager = managers(model, Config(per_request_processors=True), do_sample=True, temperature=0.5)
    own = [
        {"presence_penalty": 0.3},
        {"frequency_penalty": 0.2},
        {"presence_penalty": -0.1, "frequency_penalty": 0.1},
        {},
    ]
    for i, penalties in enumerate(own):
        for do_sample in (False, True):
            settings = {"do_sample": do_sample, "seed": 1, "top_logprobs": 2 * i}
            manager.add_request(prompt, f"{i}{do_sample}", max_new_tokens=30, **settings, **penalties)
    outputs, texts = finished(manager, 8), set()
    for i, penalties in enumerate(own):
        for do_sample in (False, True):
            torch.manual_seed(1)
            processors = LogitsProcessorList([Penalties(len(prompt), **penalties)])
            sampling = {"do_sample": do_sample} | ({"temperature": 0.5} if do_sample else {})
            output = outputs[f"{i}{do_sample}"]
            assert output.generated_tokens == alone(model, prompt, 30, logits_processor=processors, **sampling)
            texts.add(tuple(output.generated_tokens))
            with torch.no_grad():
                logits = model(torch.tensor([prompt + output.generated_tokens])).logits[0, len(prompt) - 1 : -1]
            for token, found, expected in zip(output.generated_tokens, output.logprobs, logits.log_softmax(-1)):
                assert [each for each, _ in found] == [token, *expected.topk(2 * i).indices.tolist()]
                ids, logprobs = zip(*found)
                torch.testing.assert_close(torch.tensor(logprobs), expected[list(ids)], rtol=0, atol=1e-5)
    assert len(texts) == 8


def test_several_sequences_of_a_request_read_its_prompt_once(managers):
    model, [prompt] = small_model(), prompts_of(300)
    manager = managers(model, Config(prefix_bytes=0))
    settings = {"num_return_sequences": 3, "do_sample": True, "seed": 7}
    manager.add_request(prompt, request_id="a", max_new_tokens=NEW_TOKENS, **settings)
    outputs = finished(manager, 3)
    for i, name in enumerate(("a", "a__child#0", "a__child#1")):
        torch.manual_seed(7 + i)
        assert outputs[name].generated_tokens == alone(model, prompt, do_sample=True, top_k=0)
    assert manager.batch_processor.counters()["read_tokens"] == len(prompt)
    with manager.pause():
        manager.add_request(prompt, request_id="b", **settings)
        manager.cancel_request("b")
    assert {output.error for output in finished(manager, 3).values()} == {"the request was cancelled"}


def test_several_sequences_of_a_prompt_are_as_many_requests():
    model, [prompt] = small_model(), prompts_of(20)
    config = GenerationConfig(do_sample=True, max_new_tokens=NEW_TOKENS, num_return_sequences=3)
    outputs = model.generate_batch([prompt], config)
    assert all(output.prompt_ids == prompt for output in outputs.values())
    assert len({tuple(output.generated_tokens) for output in outputs.values()}) == len(outputs) == 3


# ---- Long prompts


def test_a_long_prompt_is_read_in_chunks_while_others_write(managers):
    model = small_model()
    chunks, orders, results = [], [], {}
    model.model.embed_tokens.register_forward_hook(lambda module, ids, output: chunks.append(output.shape[1]))
    manager = managers(model, Config(prefix_bytes=0))
    [long, short] = prompts_of(50_000, 4)
    manager.add_request(long, request_id="long", max_new_tokens=1)
    manager.add_request(short, request_id="short", max_new_tokens=NEW_TOKENS, streaming=True)
    while len(orders) <= NEW_TOKENS:
        output = manager.get_result(timeout=5)
        orders.append(output.request_id)
        results[output.request_id] = output.generated_tokens
    assert orders == ["short"] * NEW_TOKENS + ["long"]
    assert max(chunks) <= continuous_batching.CHUNK_TOKENS
    assert results == {"short": alone(model, short), "long": alone(small_model(), long, 1)}


def test_prompts_that_wait_are_read_in_one_pass(managers):
    model, shapes = small_model("minlstm", max_timescale=300), []
    model.model.embed_tokens.register_forward_hook(lambda module, ids, output: shapes.append(output.shape[:2]))
    manager, prompts = managers(model), prompts_of(*[20, 18, 22, 300] * 4)
    with manager.pause():
        names = manager.add_requests(prompts, max_new_tokens=NEW_TOKENS)
    outputs, together = finished(manager, len(names)), max(rows for rows, length in shapes if length > 1)
    assert [outputs[name].generated_tokens for name in names] == [alone(model, prompt) for prompt in prompts]
    assert 1 < together and max(rows * length for rows, length in shapes) <= continuous_batching.CHUNK_TOKENS


# ---- Prefixes


def logprobs_of(manager, prompt):
    manager.add_request(prompt, request_id="one", max_new_tokens=4)
    output = finished(manager, 1)["one"]
    return output.generated_tokens, torch.tensor(output.logprobs)


def assert_same_answer(answer, expected):
    assert answer[0] == expected[0]
    torch.testing.assert_close(answer[1], expected[1], rtol=0, atol=1e-5)


def test_a_next_turn_reads_only_what_is_new(managers):
    model = small_model("minlstm", max_timescale=300)
    manager = managers(model, Config(return_logprobs=True))
    fresh = managers(model, Config(return_logprobs=True, prefix_bytes=0))
    [prompt, more] = prompts_of(1000, 6)
    for _ in range(3):
        before = manager.batch_processor.counters() if manager.batch_processor else {"read_tokens": 0}
        answer = logprobs_of(manager, prompt)
        assert_same_answer(answer, logprobs_of(fresh, prompt))
        read = manager.batch_processor.counters()["read_tokens"] - before["read_tokens"]
        assert read == (1000 if len(prompt) == 1000 else 1 + len(more))  # the last token of a turn is read in the next
        prompt = prompt + answer[0] + more
    # Another text with the same beginning goes on from the last border within it.
    assert_same_answer(logprobs_of(manager, prompt[:800] + more), logprobs_of(fresh, prompt[:800] + more))
    counters = manager.batch_processor.counters()
    assert (counters["prefix_hits"], counters["prefix_misses"]) == (3, 1)
    assert counters["prefix_reused_tokens"] == 1003 + 1013 + 768
    assert fresh.batch_processor.counters()["prefix_hits"] == fresh.batch_processor.counters()["prefix_states"] == 0


def test_each_request_of_a_batch_goes_on_from_its_own_state(managers):
    model = small_model("minlstm", max_timescale=300)
    manager, turns = managers(model), prompts_of(3, 7, 20, 5, 9, 30)
    for hits in (0, len(turns)):
        for i, prompt in enumerate(turns):
            manager.add_request(prompt, request_id=f"{i}", max_new_tokens=5 + i % 3)
        outputs = finished(manager, len(turns))
        for i, prompt in enumerate(turns):
            assert outputs[f"{i}"].generated_tokens == alone(model, prompt, 5 + i % 3)
        assert manager.batch_processor.counters()["prefix_hits"] == hits
        turns = [prompt + outputs[f"{i}"].generated_tokens + [1, 2] for i, prompt in enumerate(turns)]


def test_kept_states_stay_within_their_bytes_and_the_least_used_go_first():
    model = small_model()
    one = sum(x.nbytes for x in cache_of(model, [1]).layers[0].__dict__.values() if isinstance(x, torch.Tensor))
    store = prefix_store.PrefixStore(model, 3 * len(model.model.layers) * one)
    texts = prompts_of(10, 20, 30, 40)
    for text in texts[:3]:
        put(store, model, text)
    assert store.find(texts[0] + [1])[1].length == 10  # used
    put(store, model, texts[3])
    assert [store.find(text + [1])[1].length for text in texts] == [10, 0, 30, 40]
    assert store.find(texts[3])[1].length == 0  # a token must be left to read
    assert (store.evicted, store.counters()["states"], store.nbytes) == (1, 3, store.max_bytes)


KEEP_70_STATES = """
import torch
from transformers import DynamicCache
from modeling_minrnn import NO_LOGITS, MinRNNConfig, MinRNNForCausalLM
from modeling_minrnn.prefix_store import Digest, PrefixStore

def resident():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

model = MinRNNForCausalLM(MinRNNConfig(vocab_size=32, hidden_size=384, num_hidden_layers=2)).eval()
store, cache, digest = PrefixStore(model, 2**28), DynamicCache(config=model.config), Digest()
ids = torch.zeros(1, 512, dtype=torch.long)
with torch.no_grad():
    for n in range(70):
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=NO_LOGITS)
        digest.update(ids[0].tolist())
        store.put(digest, cache)
        before = resident() if n == 9 else before if n else 0
print(resident() - before, store.counters()["states"])
"""


def test_states_kept_within_a_long_prompt_take_little_more_memory_than_their_own():
    """0.8 MB; among the large tensors of the chunks they would hold 123 MB, of which each state leaves a gap."""
    command = [sys.executable, "-c", KEEP_70_STATES]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    grown, states = map(float, output.split())
    assert states == 70 and grown < 30


def cache_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=True).past_key_values


def put(store, model, tokens):
    digest = prefix_store.Digest()
    digest.update(tokens)
    store.put(digest, cache_of(model, tokens))


def test_states_in_a_folder_are_found_after_a_restart_and_damaged_ones_passed_over(managers, tmp_path):
    [prompt, more] = prompts_of(700, 5)
    settings = {"return_logprobs": True, "prefix_folder": str(tmp_path)}
    manager = managers(small_model(), Config(**settings))
    answer = logprobs_of(manager, prompt)
    manager.stop(hard_stop=True)
    files = list(tmp_path.rglob("*.safetensors"))
    assert sorted(int(file.name.split("-")[0]) for file in files) == [256, 512, 703]
    second = prompt + answer[0] + more
    expected = logprobs_of(managers(small_model(), Config(return_logprobs=True)), second)

    restarted = managers(small_model(), Config(**settings))
    assert_same_answer(logprobs_of(restarted, second), expected)
    assert restarted.batch_processor.counters()["prefix_reused_tokens"] == 703
    restarted.stop(hard_stop=True)

    for file in files:
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    damaged = managers(small_model(), Config(**settings))
    assert_same_answer(logprobs_of(damaged, second), expected)
    assert damaged.batch_processor.counters()["prefix_hits"] == 0
    damaged.stop(hard_stop=True)

    another = managers(small_model(seed=1), Config(**settings))
    logprobs_of(another, second)
    assert another.batch_processor.counters()["prefix_hits"] == 0


def test_weights_changed_in_a_pause_are_used_and_states_of_the_old_ones_are_not(managers):
    model, [prompt] = small_model(), prompts_of(600)
    manager = managers(model, Config(return_logprobs=True))
    logprobs_of(manager, prompt)
    with manager.pause(), torch.no_grad():
        model.load_state_dict(small_model(seed=1).state_dict())
    assert logprobs_of(manager, prompt)[0] == alone(small_model(seed=1), prompt, 4)
    assert manager.batch_processor.counters()["prefix_hits"] == 0


# ---- What is refused, and the end


def test_a_wrong_request_fails_with_a_reason_and_the_others_go_on(managers):
    model, [prompt] = small_model(), prompts_of(5)
    manager = managers(model)
    wrong = {
        "empty": ([], {}, "the prompt is empty"),
        "outside": ([1, VOCAB_SIZE], {}, f"token id {VOCAB_SIZE} is not in the vocabulary"),
        "none": (prompt, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        "unknown": (prompt, {"warmth": 1.0}, "Unknown logit_processor_kwargs: {'warmth'}"),
    }
    manager.add_request(prompt, request_id="right", max_new_tokens=NEW_TOKENS)
    for name, (tokens, arguments, _) in wrong.items():
        manager.add_request(tokens, request_id=name, **{"max_new_tokens": 3} | arguments)
    outputs = finished(manager, 5)
    assert outputs["right"].generated_tokens == alone(model, prompt)
    for name, (_, _, reason) in wrong.items():
        assert reason in outputs[name].error


@pytest.mark.parametrize("setting", [{"num_beams": 2}, {"repetition_penalty": 1.2}, {"stop_strings": ["a"]}])
def test_settings_that_would_not_be_obeyed_are_refused(setting):
    with pytest.raises(ValueError, match="continuous batching does not know .*: use generate"):
        small_model().init_continuous_batching(GenerationConfig(**setting))


@pytest.mark.parametrize("hard_stop", [False, True])
def test_a_stop_drains_the_requests_or_fails_each_with_a_reason(hard_stop, managers):
    model = small_model()
    manager = managers(model, Config(max_requests_per_batch=2))
    prompts = prompts_of(*[3000] * 6)
    names = manager.add_requests(prompts, max_new_tokens=NEW_TOKENS)
    while manager.batch_processor is None or not manager.batch_processor.read_tokens:
        time.sleep(0.01)
    manager.stop(hard_stop=hard_stop)
    outputs = finished(manager, 6)
    assert set(outputs) == set(names)
    for name, prompt in zip(names, prompts):
        output = outputs[name]
        if not hard_stop:
            assert output.generated_tokens == alone(model, prompt)
        else:
            assert output.error is None or "Generation loop finished before" in output.error
    assert hard_stop == any(output.error for output in outputs.values())
