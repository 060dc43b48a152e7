"""transformers' OpenAI-compatible server serves these models: what its clients receive is what `generate` returns."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
from printable_model import continuation, printable_model, save

from training.tokenizers import byte_tokenizer

TOKENS = 20
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model():
    return printable_model()


class Server:
    """A process that serves the model of a folder, by this package's server or another."""

    def __init__(self, folder, *options, program=(sys.executable, "-m", "modeling_minrnn.serve"), **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [*program, folder, "--host", "127.0.0.1", "--port", str(port)]
        self.log, self.url = Path(folder).parent / f"log-{port}", f"http://127.0.0.1:{port}"
        with self.log.open("w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
            self.process = subprocess.Popen([*command, *options], stdout=output, stderr=output, env=environment)
        while not answers(self.url + "/health"):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def stats(self):
        return json.load(urllib.request.urlopen(self.url + "/stats"))

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=10)


@pytest.fixture(scope="module")
def started(model, tmp_path_factory):
    """The model's folder and the server, which takes 8 requests at a time, lets 40 wait, and reads 20,000 tokens."""
    folder = save(model, tmp_path_factory.mktemp("serve") / "model")
    server = Server(folder, "--slots", "8", "--max-waiting", "40", "--max-prompt-tokens", "20000")
    yield folder, server
    server.end()


@pytest.fixture
def server(started):
    folder, process = started
    return folder, process.url


def answers(url):
    try:
        return urllib.request.urlopen(url).status == 200
    except urllib.error.URLError:
        return False


def test_completions_and_chats_are_those_of_generate_streamed_or_not(server, model):
    folder, url = server
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    settings = {"model": folder, "max_tokens": TOKENS, "temperature": 0}

    expected = continuation(model, "def main", TOKENS)
    assert client.completions.create(prompt="def main", **settings).choices[0].text == expected
    chunks = list(client.completions.create(prompt="def main", stream=True, **settings))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert len(chunks) >= TOKENS

    expected = continuation(model, "user: hi<eos>assistant: ", TOKENS)
    answer = client.chat.completions.create(messages=MESSAGES, **settings)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    assert answer.usage.completion_tokens == TOKENS
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **settings))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert len(chunks) >= TOKENS
    answer = client.responses.create(model=folder, input="hi", max_output_tokens=TOKENS, temperature=0, stream=False)
    assert answer.output_text == expected


def test_transformers_chat_talks_to_the_server(server, model):
    folder, url = server
    command = [Path(sys.executable).parent / "transformers", "chat", folder, url]
    flags = ["do_sample=False", f"max_new_tokens={TOKENS}"]
    lines = "hi\nn\n!exit\n"  # n: no more of this answer
    # Offline the command does not reach a server on loopback either; without this it looks for updates of itself.
    settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    process = subprocess.run(
        [*command, *flags], input=lines, capture_output=True, text=True, env=os.environ | settings
    )
    assert process.returncode == 0, process.stderr
    assert continuation(model, "user: hi<eos>assistant: ", TOKENS) in process.stdout


def test_transformers_serve_runs_the_code_beside_the_weights(tmp_path):
    model = printable_model()
    model.config.scan_backend = "torch"  # the kernels of numba would be compiled anew for the code in the folder
    folder = save(model, tmp_path / "model")
    program = [Path(sys.executable).parent / "transformers", "serve"]
    flags = ["--trust-remote-code", "--continuous-batching"]
    server = Server(folder, *flags, program=program, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    settings = {"model": folder, "prompt": "def main", "max_tokens": TOKENS, "temperature": 0}
    assert client.completions.create(**settings).choices[0].text == continuation(model, "def main", TOKENS)
    assert "CB: True" in server.log.read_text()
    server.end()


# ---- Many clients

PROMPTS = [
    "def main",
    "def train" * 12,
    "class Model" * 12,
    "user: hello",
    "return x" * 12,
    "lambda x: x",
    "yield from" * 12,
]


async def read(stream):
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


async def one_client(client, folder, expected, i):
    """Four requests, one after the other; returns how many texts were compared."""
    prompt, compared = PROMPTS[i % len(PROMPTS)], 0
    for turn in range(4):
        settings = {"model": folder, "prompt": prompt, "temperature": 0}
        match (i + turn) % 6:
            case 0:  # a stream to its end
                stream = await client.completions.create(max_tokens=60, stream=True, **settings)
                assert await read(stream) == expected[prompt][60]
                compared += 1
            case 1:
                answer = await client.completions.create(max_tokens=30, **settings)
                assert answer.choices[0].text == expected[prompt][30]
                compared += 1
            case 2:  # a stream that nobody reads on
                stream = await client.completions.create(max_tokens=100_000, stream=True, **settings)
                async for chunk in stream:
                    assert expected[prompt][60].startswith(chunk.choices[0].text)
                    break
                await stream.close()
            case 3:  # an answer that nobody waits for
                with pytest.raises(openai.APITimeoutError):
                    await client.with_options(timeout=0.3).completions.create(max_tokens=100_000, **settings)
            case 4:  # a task that is cancelled
                task = asyncio.ensure_future(client.completions.create(max_tokens=100_000, **settings))
                await asyncio.sleep(0.1 * (i % 4))
                task.cancel()
            case 5:
                with pytest.raises(openai.BadRequestError):
                    await client.completions.create(max_tokens=0, **settings)
    return compared


def test_32_clients_at_once_get_what_generate_gives_and_what_they_abandon_ends(model, started):
    folder, process = started
    expected = {prompt: {n: continuation(model, prompt, n) for n in (30, 60)} for prompt in PROMPTS}
    before = process.stats()

    async def all_clients():
        async with openai.AsyncOpenAI(base_url=process.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one_client(client, folder, expected, i) for i in range(32)))

    assert sum(asyncio.run(all_clients())) == 43
    deadline = time.monotonic() + 10
    while process.stats()["active"] or process.stats()["waiting"]:
        assert time.monotonic() < deadline, process.stats()
        time.sleep(0.05)
    assert process.stats()["written_tokens"] - before["written_tokens"] < 100_000


def test_a_client_has_its_own_sampling_settings(model, server):
    folder, url = server
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    tokenizer = byte_tokenizer()
    ids = tokenizer("def main", return_tensors="pt").input_ids
    for seed, temperature, top_p in ((1, 1.0, 1.0), (2, 0.7, 0.8), (1, 0, 1.0)):
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
        tokens = model.generate(ids, max_new_tokens=TOKENS, pad_token_id=257, top_k=0, **sampling)[0, ids.shape[1] :]
        settings = {"max_tokens": TOKENS, "seed": seed, "temperature": temperature, "top_p": top_p}
        answer = client.completions.create(model=folder, prompt="def main", **settings)
        assert answer.choices[0].text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_choices_of_one_prompt_and_what_the_model_gave_their_tokens(started, model):
    folder, process = started
    client = openai.OpenAI(base_url=process.url + "/v1", api_key="none")
    tokenizer, before = byte_tokenizer(), process.stats()["read_tokens"]

    def logits_of(prompt, text):
        ids = tokenizer(prompt + text, return_tensors="pt").input_ids
        with torch.no_grad():
            return model(ids).logits[0, -len(text) - 1 : -1].log_softmax(-1)

    settings = {"max_tokens": TOKENS, "seed": 4, "temperature": 0.3, "top_p": 0.5}
    answer = client.completions.create(model=folder, prompt="def main", n=3, logprobs=2, **settings)
    assert process.stats()["read_tokens"] - before == len("def main")
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (3 * TOKENS, 3 * TOKENS + 8)
    for i, choice in enumerate(answer.choices):
        single = client.completions.create(model=folder, prompt="def main", **settings | {"seed": 4 + i})
        assert (choice.index, choice.text) == (i, single.choices[0].text) and len(choice.text) == TOKENS
        found, expected = choice.logprobs, logits_of("def main", choice.text)
        assert "".join(found.tokens) == choice.text and found.text_offset == list(range(TOKENS))
        for token, logprob, top, row in zip(found.tokens, found.token_logprobs, found.top_logprobs, expected):
            assert abs(logprob - row[ord(token)]) < 1e-4
            assert [ord(each) for each in top] == row.topk(2).indices.tolist()
    assert len({choice.text for choice in answer.choices}) == 3

    settings = {"model": folder, "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=1, frequency_penalty=2, **settings)
    [choice] = answer.choices
    plain, text = continuation(model, "user: hi<eos>assistant: ", TOKENS), choice.message.content
    assert text != plain and len(set(text)) > len(set(plain))
    assert "".join(entry.token for entry in choice.logprobs.content) == text
    for entry, row in zip(choice.logprobs.content, logits_of("user: hi<eos>assistant: ", text)):
        assert abs(entry.logprob - row[ord(entry.token)]) < 1e-4
        assert abs(entry.top_logprobs[0].logprob - row.max()) < 1e-4


def test_a_text_ends_before_the_first_of_its_stops_and_with_it_the_request(started, model):
    folder, process = started
    client = openai.OpenAI(base_url=process.url + "/v1", api_key="none")
    text = continuation(model, "def main", TOKENS)
    chat = continuation(model, "user: hi<eos>assistant: ", TOKENS)

    def completion(**settings):
        answer = client.completions.create(model=folder, prompt="def main", temperature=0, **settings)
        pieces = [piece.choices[0] for piece in answer] if "stream" in settings else [answer.choices[0]]
        return "".join(piece.text for piece in pieces), pieces[-1].finish_reason

    for stops in (text[9:12], [text[9:12], text[4:6], "!"], [text[4], "!" + text], text[0]):
        expected = text[
            : min(text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in text)
        ]
        before = process.stats()["written_tokens"]
        for stream in ({}, {"stream": True}):
            assert completion(stop=stops, max_tokens=5000, **stream) == (expected, "stop"), stops
        assert process.stats()["written_tokens"] - before < 1000
    content = chat.partition(chat[5:7])[0]
    answer = client.chat.completions.create(
        model=folder, messages=MESSAGES, temperature=0, max_tokens=TOKENS, stop=chat[5:7]
    )
    assert answer.choices[0].message.content == content
    for stream in ({}, {"stream": True}):  # what was held back comes with the end
        assert completion(stop=[text[-3:] + "!", "!"], max_tokens=TOKENS, **stream) == (text, "length")
    while process.stats()["active"]:
        time.sleep(0.01)


def test_a_next_turn_of_a_chat_reads_only_what_is_new(started):
    folder, process = started
    client = openai.OpenAI(base_url=process.url + "/v1", api_key="none")
    messages = [{"role": "user", "content": "once upon a time " * 100}]
    settings = {"model": folder, "max_tokens": TOKENS, "temperature": 0}
    answer = client.chat.completions.create(messages=messages, **settings)
    before = process.stats()
    messages += [
        {"role": "assistant", "content": answer.choices[0].message.content},
        {"role": "user", "content": "go"},
    ]
    second = client.chat.completions.create(messages=messages, **settings)
    after = process.stats()
    read = after["read_tokens"] - before["read_tokens"]
    assert after["prefix_hits"] == before["prefix_hits"] + 1
    assert read == second.usage.prompt_tokens - answer.usage.prompt_tokens - TOKENS + 1 < 40


# ---- What is refused


def refused(url, path, body):
    """Status, headers and OpenAI's error object."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    error = json.load(caught.value)["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return caught.value.code, caught.value.headers, error["message"]


def test_wrong_requests_are_refused_with_a_status_and_a_reason(server):
    folder, url = server
    chat, completions = "/v1/chat/completions", "/v1/completions"
    for status, path, body, reason in (
        (400, completions, b"{", "must be a JSON object"),
        (400, completions, b"[]", "must be a JSON object"),
        (400, completions, {"prompt": ""}, "the prompt is empty"),
        (400, completions, {"prompt": ["a", "b"]}, "prompt must be a string"),
        (400, completions, {"prompt": "a", "max_tokens": 0}, "max_tokens must be a whole number, at least 1, not 0"),
        (400, completions, {"prompt": "a", "max_tokens": "many"}, "max_tokens must be a whole number"),
        (400, completions, {"prompt": "a", "max_tokens": 1.5}, "max_tokens must be a whole number"),
        (400, completions, {"prompt": "a", "temperature": -1}, "temperature must be 0 or a number"),
        (400, completions, {"prompt": "a", "temperature": 1e-40}, "temperature must be 0 or a number"),
        (400, completions, {"prompt": "a", "top_p": 2}, "top_p must be 0 or a number"),
        (400, completions, {"prompt": "a", "seed": "x"}, "seed must be a whole number"),
        (
            400,
            completions,
            {"prompt": "a", "stop": ["b", ""]},
            "stop must be a text or a list of texts, not ['b', '']",
        ),
        (400, chat, {"messages": MESSAGES, "stop": 3}, "stop must be a text"),
        (400, completions, {"prompt": "a", "n": 9}, "n must be at most 8, not 9"),
        (400, completions, {"prompt": "a", "n": 2, "stream": True}, "n and logprobs are not obeyed with stream"),
        (400, chat, {"messages": MESSAGES, "logprobs": True, "stop": "a"}, "n and logprobs are not obeyed with stop"),
        (400, chat, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs with it in 0..20, not False, 2"),
        (400, completions, {"prompt": "a", "logprobs": 6}, "logprobs must be a whole number in 0..5, not 6"),
        (400, completions, {"prompt": "a", "presence_penalty": 3}, "presence_penalty must be 0 or a number in -2..2"),
        (400, "/v1/responses", {"input": "a", "top_logprobs": 2}, "top_logprobs is not obeyed in responses"),
        (400, completions, {"prompt": "a", "echo": True}, "echo is not obeyed"),
        (400, completions, {"prompt": "a", "warmth": 2}, "Unexpected fields"),
        (400, chat, {}, "messages are missing"),
        (400, chat, {"messages": []}, "messages must be a list"),
        (400, chat, {"messages": [{"content": "a"}]}, "messages must be a list"),
        (404, chat, {"model": "another", "messages": MESSAGES}, "not 'another'"),
        (404, "/load_model", {"model": "another"}, "not 'another'"),
        (404, "/nowhere", {}, "Not Found"),
        (413, completions, {"prompt": "a" * 20_001}, "the prompt has 20001 tokens, and at most 20000 are read"),
    ):
        found = refused(url, path, body)
        assert found[0] == status and reason in found[2], (path, str(body)[:100], found)
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.putrequest("POST", completions)
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    usage = client.completions.create(model=folder, prompt="a", max_tokens=3, n=1, temperature=0).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (1, 3)


def test_requests_beyond_those_that_may_wait_are_told_to_try_again(started):
    folder, process = started

    async def ask(client):
        try:
            await client.completions.create(model=folder, prompt="def ", max_tokens=100_000, timeout=3)
        except openai.RateLimitError as error:
            return error.response.headers["retry-after"], error.code
        except openai.APITimeoutError:
            return None

    async def all_clients():
        async with openai.AsyncOpenAI(base_url=process.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client) for _ in range(60)))

    answers = asyncio.run(all_clients())
    assert answers.count(("1", "rate_limit_exceeded")) == 12 and answers.count(None) == 48


def test_sigterm_ends_the_server_soon_and_every_request_with_a_reason(started):
    """The last test of this file: it ends the server of the others, whose slots are fewer than the requests."""
    folder, process = started

    async def ask(client, stream):
        try:
            answer = await client.completions.create(model=folder, prompt="def ", max_tokens=10**7, stream=stream)
            async for _ in answer:
                pass
        except openai.APIError as error:
            return f"{error} {error.body}"

    async def all_clients():
        async with openai.AsyncOpenAI(base_url=process.url + "/v1", api_key="none", max_retries=0) as client:
            tasks = [asyncio.ensure_future(ask(client, stream)) for stream in (True, False) * 6]
            await asyncio.sleep(1)
            process.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    started_at = time.monotonic()
    for reason in asyncio.run(all_clients()):
        assert "before this request completed" in reason
    assert process.process.wait(timeout=10) is not None and time.monotonic() - started_at < 11
