"""How many clients does the server answer at once, and how fast?

Real HTTP on loopback: 1, 4, 16 and 64 clients ask for streamed completions of 100 tokens after distinct prompts of
200, each client at least three, one after the other. Contenders, each a server process of its own, settings alike:
    minrnn         python -m modeling_minrnn.serve
    llama          transformers serve --continuous-batching, a Llama of equal size (within 3 %)
    llama.cpp      that Llama in llama.cpp's server, 64 slots, two threads, where it is installed (engines.py)
Sizes: "demo" has 4 layers of width 128, "10M" 6 of width 384. Weights are random and the head writes letters only, so
that each token is a piece of the stream. The clients run in the process that measures, on the same cores; they note
when bytes come and read them afterwards.

tokens_per_s: of all clients, by the clock. cpu_ms_per_token: of all threads of the server, which other work on the
machine changes least, and of the clients. first_ms, between_ms: time to the first token, and between two of a stream.
peak_mb: resident memory of the server. The row of the model alone has the CPU time of a prompt and of a step for so
many, and best_over_one, the times one client's tokens that two cores with nothing else to do would reach with these.
A row with `history` is the second turn of a chat after that many tokens, with `long_prompt` or `long_chat` a stream
beside such a prompt, with `requests` so many, a third of them abandoned, and how the server's memory grew over the
second half.

Targets, on two cores: 16 clients >= 6 times the tokens of one, 64 >= 10 times; between tokens p99 <= 4 x p50; a second
turn after 20,000 tokens starts within 100 ms; a stream beside a prompt of a million tokens takes <= 2 times as long.

    python benchmarks/serve.py [--only 10M] [--rounds 3]
"""

import asyncio
import importlib.util
import json
import math
import os
import random
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, quantiles

import torch
from engines import write_gguf
from harness import HERE, Bound, Report, interleave, now, parser
from models import of_size
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM
from training.tokenizers import byte_tokenizer

PROMPT, NEW_TOKENS, HISTORY, LONG = 200, 100, 20_000, 1_000_000
CLIENTS, SLOTS = (1, 4, 16, 64), 64
REQUESTS, FEWEST = 3, 8  # of each client, and of all: with one each, all would be read at first and written at last
STEPS = 20  # of the model alone, for a sample
SIZES = {"demo": (128, 4), "10M": (384, 6)}  # width, layers
VOCABULARY = 258


def models(width: int, layers: int) -> dict[str, PreTrainedModel]:
    shape = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = MinRNNForCausalLM(MinRNNConfig(**shape))

    def llama(mlp_width: int, positions: int) -> LlamaForCausalLM:
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        heads = {"num_attention_heads": width // 64, "max_position_embeddings": positions}
        return LlamaForCausalLM(LlamaConfig(intermediate_size=mlp_width, **shape, **heads, **tokens))

    found = {"minrnn": model, "llama": of_size(model.num_parameters(), llama, 2 * HISTORY)}
    letters = torch.zeros(VOCABULARY, 1)
    letters[ord("a") : ord("z") + 1] = 1
    with torch.no_grad():
        for candidate in found.values():
            candidate.lm_head.weight *= letters
    if importlib.util.find_spec("xllamacpp"):
        found["llama.cpp"] = found["llama"]
    return found


@dataclass
class Answer:
    """When a request was sent and when each piece of its stream came."""

    times: list[float]
    text: str

    def first(self) -> float:
        return self.times[1] - self.times[0]

    def between(self) -> list[float]:
        return [b - a for a, b in zip(self.times[1:], self.times[2:])]


class Client(asyncio.Protocol):
    """Sends a request and keeps what comes, until the server closes the connection or after so many pieces."""

    def __init__(self, request: bytes, abandon_after: float):
        self.request, self.abandon_after, self.pieces = request, abandon_after, 0
        self.received: list[tuple[float, bytes]] = []
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport) -> None:
        self.transport, self.start = transport, time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.received.append((time.perf_counter(), data))
        self.pieces += data.count(b"data: ")
        if self.pieces > self.abandon_after:
            self.transport.abort()

    def connection_lost(self, error) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def answer(self) -> Answer:
        found, rest = Answer([self.start], ""), b""
        for moment, data in self.received:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"HTTP") and b"200" not in line:
                    raise RuntimeError(b"".join(data for _, data in self.received).decode())
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                [choice] = event["choices"]
                piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
                if piece:  # not the role alone, nor the reason to stop
                    found.text += piece
                    found.times.append(moment)
        return found


class Server:
    """A server process on a free port."""

    def __init__(self, name: str, folder: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        listen, environment = ["--host", "127.0.0.1", "--port", str(self.port)], {"HF_HUB_OFFLINE": "1"}
        if name == "llama.cpp":
            program = ["benchmarks/llama_server.py", f"{folder}/gguf", str(self.port), str(SLOTS), "512"]
            environment["OMP_NUM_THREADS"] = "2"
        elif name == "llama":
            program = ["-m", "transformers.cli.transformers", "serve", folder, "--continuous-batching", *listen]
        else:
            program = ["-m", "modeling_minrnn.serve", folder, *listen]
        self.model, self.takes_ids = folder, name == "llama.cpp"  # as of its tokens it does not know the bytes
        self.log = Path(folder, "log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program], cwd=HERE.parent, stdout=log, stderr=log, env=os.environ | environment
            )

    def memory(self, field: str) -> float:
        """MB of VmRSS or VmHWM."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stats(self) -> dict:
        return json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats"))

    async def complete(
        self, prompt: str, max_tokens: int = NEW_TOKENS, abandon_after: float = math.inf, is_chat: bool = False
    ) -> Client:
        if is_chat:
            text: dict = {"messages": [{"role": "user", "content": prompt}]}
        else:
            text = {"prompt": list(prompt.encode()) if self.takes_ids else prompt}
        settings = {"model": self.model, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body = json.dumps(settings | text).encode()
        head = f"POST /v1/{'chat/' * is_chat}completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        make = partial(Client, head.encode() + body, abandon_after)
        _, client = await asyncio.get_running_loop().create_connection(make, "127.0.0.1", self.port)
        await client.closed
        return client

    def ask(self, *args, **kwargs) -> Answer:
        return asyncio.run(self.complete(*args, **kwargs)).answer()


@contextmanager
def serving(name: str, model: PreTrainedModel):
    with tempfile.TemporaryDirectory() as folder:
        if name == "llama.cpp":
            write_gguf(model, f"{folder}/gguf", "F32")
        else:
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        server = Server(name, folder)
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health")
                    break
                except OSError:
                    if server.process.poll() is not None:
                        raise RuntimeError(server.log.read_text()) from None
                    time.sleep(0.2)
            server.ask("warm up")
            yield server
        finally:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(10)
            except subprocess.TimeoutExpired:  # transformers' thread outlives its server
                server.process.kill()
                server.process.wait()


def prompts(count: int, length: int = PROMPT, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(string.ascii_lowercase + " ", k=length)) for _ in range(count)]


async def load(server: Server, clients: int, requests: int, seed: int) -> tuple[float, list[Client]]:
    """Seconds, and all requests, of which each client makes so many."""
    texts = iter(prompts(clients * requests, seed=seed))

    async def client() -> list[Client]:
        return [await server.complete(next(texts)) for _ in range(requests)]

    start = time.perf_counter()
    found = await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, [each for several in found for each in several]


def percentiles(values: list[float]) -> tuple[float, float]:
    cuts = quantiles(values, n=100, method="inclusive")
    return 1e3 * median(values), 1e3 * cuts[98]


def measure(report: Report, size: str) -> None:
    found = models(*SIZES[size])
    if report.wants(f"{size} bounds"):
        bounds(report, size, found["minrnn"])
    for name, model in found.items():
        if not report.wants(f"{size} {name}"):
            continue
        with serving(name, model) as server:
            one = None
            for clients in CLIENTS:
                one = under_load(report, size, name, model, server, clients, one)
            if report.options.second_turn and name != "llama.cpp":
                second_turn(report, size, name, server)
            if report.options.long_prompt and name == "minrnn":
                for is_chat in (False, True):
                    beside_a_long_prompt(report, size, name, server, is_chat)
            if report.options.abandoned and name == "minrnn":
                abandoned(report, size, server)


def under_load(report: Report, size: str, name: str, model, server: Server, clients: int, one: float | None) -> float:
    """The tokens a second of one client, with which those of so many are compared."""
    rates, runs, cpu, own_cpu = [], [], server.cpu_seconds(), 0.0
    for turn in range(report.options.rounds):
        start = time.process_time()
        seconds, found = asyncio.run(load(server, clients, max(REQUESTS, FEWEST // clients), 1000 * turn + clients))
        own_cpu += time.process_time() - start
        answers = [each.answer() for each in found]
        assert all(len(answer.times) == NEW_TOKENS + 1 for answer in answers)
        rates.append(len(answers) * NEW_TOKENS / seconds)
        runs += answers
    rate, cpu, tokens = median(rates), server.cpu_seconds() - cpu, len(runs) * NEW_TOKENS
    first = percentiles([answer.first() for answer in runs])
    between = percentiles([gap for answer in runs for gap in answer.between()])
    goal = {16: 6, 64: 10}.get(clients) if name == "minrnn" else None
    report.add(
        size=size,
        contender=name,
        parameters=model.num_parameters(),
        clients=clients,
        tokens_per_s=rate,
        over_one=Bound(rate / (one or rate), at_least=goal),
        cpu_ms_per_token=1e3 * cpu / tokens,
        client_cpu_ms_per_token=1e3 * own_cpu / tokens,
        first_ms_p50=first[0],
        first_ms_p99=first[1],
        between_ms_p50=between[0],
        between_ms_p99=between[1],
        # Tokens that come together are 0 apart, which most are where other work keeps the machine busy.
        between_p99_over_p50=Bound(between[1] / max(between[0], 0.01), at_most=4 if name == "minrnn" else None),
        peak_mb=server.memory("VmHWM"),
    )
    return one or rate


def second_turn(report: Report, size: str, name: str, server: Server) -> None:
    seconds = []
    for turn in range(report.options.rounds):
        [history] = prompts(1, HISTORY, seed=turn)
        first = server.ask(history, 20)
        second = server.ask(history + first.text + " and then", 20)
        seconds.append((first.first(), second.first()))
    goal = 100 if name == "minrnn" else None
    report.add(
        size=size,
        contender=name,
        history=HISTORY,
        first_turn_first_ms=1e3 * median(a for a, _ in seconds),
        second_turn_first_ms=Bound(1e3 * median(b for _, b in seconds), at_most=goal),
        peak_mb=server.memory("VmHWM"),
    )


def bounds(report: Report, size: str, model: PreTrainedModel) -> None:
    """CPU time of the model alone, for a prompt and for a token of so many, and what two cores could make of it."""
    model = model.eval()

    def read(rows: int) -> float:
        ids, start = torch.randint(97, 122, (rows, PROMPT)), now()
        model(ids, use_cache=True, logits_to_keep=1)
        return (now() - start) / rows

    def write(rows: int) -> float:
        ids, start = torch.full((rows, 1), 97), now()
        for _ in range(STEPS):
            model(ids, past_key_values=caches[rows], use_cache=True)
        return (now() - start) / STEPS

    with torch.no_grad():
        caches = {rows: model(torch.full((rows, 5), 97), use_cache=True).past_key_values for rows in CLIENTS}
        contenders = {("read", rows): partial(read, rows) for rows in (1, 2)}
        contenders |= {("write", rows): partial(write, rows) for rows in CLIENTS}
        samples = interleave(contenders, 5 * report.options.rounds)
    prompt, token = samples.seconds(("read", 2)), {rows: samples.seconds(("write", rows)) for rows in CLIENTS}
    one = samples.seconds(("read", 1)) + NEW_TOKENS * token[1]  # on one core: first the prompt, then the tokens
    report.add(
        size=size,
        contender="the model alone",
        prompt_ms=1e3 * samples.seconds(("read", 1)),
        prompt_of_two_ms=1e3 * prompt,
        **{f"step_of_{rows}_ms": 1e3 * seconds for rows, seconds in token.items()},
        **{f"best_over_one_{rows}": 2 * one / (prompt + NEW_TOKENS * token[rows] / rows) for rows in CLIENTS[1:]},
    )


def beside_a_long_prompt(report: Report, size: str, name: str, server: Server, is_chat: bool) -> None:
    """How fast a stream goes on while another request's prompt, or message, of LONG tokens is read."""
    [long, short] = prompts(1, LONG)[0], prompts(1)[0]

    async def both() -> list[Client]:
        alone = await server.complete(short, 1000)
        stream = asyncio.ensure_future(server.complete(short + "and", 1000))
        await asyncio.sleep(0.3)
        reading = asyncio.ensure_future(server.complete(long, 1, is_chat=is_chat))
        beside = await stream
        if reading.done():
            raise RuntimeError("the long prompt was read before the stream ended; not reported")
        return [alone, beside, await reading]

    before = server.memory("VmHWM")
    alone, beside, read = (client.answer() for client in asyncio.run(both()))
    rates = [mean(answer.between()) for answer in (alone, beside)]
    report.add(
        size=size,
        contender=name,
        **{"long_chat" if is_chat else "long_prompt": LONG},
        long_prompt_seconds=read.first(),
        between_ms_mean_alone=1e3 * rates[0],
        between_ms_mean_beside=1e3 * rates[1],
        beside_over_alone=Bound(rates[1] / rates[0], at_most=2),
        longest_gap_ms=1e3 * max(beside.between()),
        grown_mb=server.memory("VmHWM") - before,
    )


def abandoned(report: Report, size: str, server: Server, count: int = 2000, clients: int = 16) -> None:
    """Requests of which each third is left after some tokens; the same prompt must always give the same text."""
    texts, expected, growth, lost, mixed = prompts(50, 40), {}, [], 0, 0

    async def client(numbers) -> None:
        nonlocal lost, mixed
        for i in numbers:
            text = texts[i % len(texts)]
            if i % 3 == 0:
                await server.complete(text, 1000, abandon_after=i % 7 + 1)
                continue
            answer = (await server.complete(text, 20)).answer()
            lost += len(answer.times) != 21
            mixed += expected.setdefault(text, answer.text) != answer.text
            if i == count // 2:
                growth.append(server.memory("VmRSS"))

    async def everyone() -> None:
        await asyncio.gather(*(client(range(i, count, clients)) for i in range(clients)))

    asyncio.run(everyone())
    time.sleep(1)
    report.add(
        size=size,
        contender="minrnn",
        clients=clients,
        requests=count,
        lost=Bound(lost, at_most=0),
        mixed_up=Bound(mixed, at_most=0),
        still_active=Bound(server.stats()["active"], at_most=0),
        grown_mb=server.memory("VmRSS") - growth[0],
    )


def main() -> None:
    flags = parser("serve", __doc__, rounds=3)
    flags.add_argument("--second-turn", action="store_true", help="also a second turn after a long history")
    flags.add_argument("--long-prompt", action="store_true", help="also a stream beside a prompt of a million tokens")
    flags.add_argument("--abandoned", action="store_true", help="also 2000 requests, a third of them abandoned")
    report = Report(flags.parse_args())
    for size in SIZES:
        measure(report, size)
    report.print_table()


if __name__ == "__main__":
    main()
