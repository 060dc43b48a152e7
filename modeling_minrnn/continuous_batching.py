"""Continuous batching: many requests through one model, each admitted and answered while others are.

transformers' ContinuousBatchingManager keeps the queues, the thread of the generation loop and the results. Its
batches read a paged cache of keys and values; here a request is one row of the recurrent states, so there are no
pages. Threads share the model: the generation loop takes a token for all requests that write, and readers take chunks
of prompts in turn, so that neither waits for the other. Needs transformers 5.23.
"""

import copy
import queue
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cache_utils import DynamicCache

try:
    from transformers.generation.continuous_batching import continuous_api
    from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
        ContinuousBatchingLogitsProcessorList,
    )
    from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
    from transformers.generation.continuous_batching.scheduler import FIFOScheduler
except ImportError as error:
    raise ImportError("continuous batching needs transformers 5.23") from error

from .prefix_store import Digest, PrefixStore, cache_of, next_border

CHUNK_TOKENS = 512  # of prompts at a time: more is hardly faster, and others wait for their turn meanwhile
READERS = 2  # where many prompts wait, a step for more rows is worth more than the next step for few
# Of a request, beside those of the logits processors.
OWN_ARGUMENTS = {
    "do_sample": bool, "seed": int, "num_return_sequences": int, "top_logprobs": int,
    "presence_penalty": float, "frequency_penalty": float,
}  # fmt: skip


class NoPages:
    """Stands for the allocator of a paged cache, of which the configuration asks this and nothing is built."""

    supports_block_table = False


ATTN_TYPE_TO_ALLOCATOR["minrnn"] = NoPages


@dataclass
class MinRNNBatchingConfig(ContinuousBatchingConfig):
    """transformers' settings, of which `max_requests_per_batch`, `max_queue_size`, `per_request_processors`,
    `return_logprobs` and `seed` apply, and what is kept of prompts that were read.

    Args:
        prefix_bytes: of states that are kept for prompts that begin the same, see `prefix_store`; 0 for none.
        prefix_folder: None, or where they are kept across restarts.
    """

    prefix_bytes: int = 256 * 2**20
    prefix_folder: str | None = None


@dataclass(eq=False)
class Row:
    """A request, and what has been read of it."""

    state: RequestState
    generator: torch.Generator | None  # of a request with a seed
    copies: list["Row"] = field(default_factory=list)  # which begin from the same prompt, read once
    digest: Digest = field(default_factory=Digest)  # of the tokens read
    cache: DynamicCache | None = None  # while its prompt is read
    logits: Tensor | None = None  # (1, V) after the prompt
    error: Exception | None = None  # that a reader met
    has_new_token: bool = True  # which logits processors ask

    def chunk(self) -> list[int]:
        """What of the prompt is read next."""
        start = self.digest.length
        return self.state.initial_tokens[start : min(start + CHUNK_TOKENS, next_border(start))]

    def is_read(self) -> bool:
        return self.error is not None or self.digest.length == len(self.state.initial_tokens)

    def is_sampled(self, default: bool) -> bool:
        return self.state.logit_processor_kwargs.get("do_sample", default)


class RowBatchProcessor(continuous_api.ContinuousBatchProcessor):
    """Admits requests to rows, reads their prompts, and takes a token for every row at each step of the loop."""

    use_async_batching = False

    def __init__(self, manager: "RowBatchingManager"):
        config = manager.continuous_batching_config
        self.model, self.cb_config, self.manager = manager.model, config, manager
        self.logit_processor, self.greedy_processor = manager.logit_processor, manager.greedy_processor
        self.do_sample = bool(manager.generation_config.do_sample)
        self.input_queue, self.cancel_queue = manager.input_queue, manager.cancel_queue
        self.output_router, self.distributed_helper = manager.output_router, manager.distributed_helper
        self.background_thread_status = manager.background_thread_status
        self.inputs_and_outputs = SimpleNamespace(compute_stream=None)
        if config.seed is not None:
            torch.manual_seed(config.seed)
        self.slots = config.max_requests_per_batch
        self.prefixes = PrefixStore(
            self.model,
            getattr(config, "prefix_bytes", MinRNNBatchingConfig.prefix_bytes) if config.allow_block_sharing else 0,
            getattr(config, "prefix_folder", None),
        )
        self.scheduler = FIFOScheduler(self, safety_margin=0.0, max_requests_per_batch=self.slots)
        self.read_tokens = self.written_tokens = self.steps = 0
        self._chunk_locks = [threading.Lock() for _ in range(READERS)]  # each held by a reader for a chunk
        self._count_lock = threading.Lock()
        self._readers: list[threading.Thread] = []
        self.reset()

    def reset(self) -> None:
        self.scheduler.reset()
        self.rows: list[Row] = []  # that write, in the order of the rows of `cache`
        self.cache = DynamicCache(config=self.model.config)
        self.new_rows: list[Row] = []  # of which the prompt has been read
        self._unread: queue.SimpleQueue[Row | None] = queue.SimpleQueue()  # None wakes a reader
        self._read: queue.SimpleQueue[Row] = queue.SimpleQueue()

    def free_blocks(self, request_id: str) -> None:
        """Nothing: rows of requests that the scheduler has let go of are dropped before the next step."""

    def counters(self) -> dict[str, int]:
        """What was done so far, for monitoring."""
        scheduler = self.scheduler
        return {
            "active": len(scheduler.active_requests),
            "waiting": len(scheduler.waiting_requests) + self.input_queue.qsize(),
            "steps": self.steps,
            "read_tokens": self.read_tokens,
            "written_tokens": self.written_tokens,
            **{f"prefix_{name}": value for name, value in self.prefixes.counters().items()},
        }

    # ---- In the thread of the generation loop

    def prepare_next_batch(self) -> bool:
        """Whether there is a token to take."""
        paused = self.background_thread_status.is_pause_requested()
        with ExitStack() as locks:
            for lock in self._chunk_locks if paused else ():
                locks.enter_context(lock)
            hard_stopping = self._update_tp_group_state()
            if paused:  # the weights may have changed
                self.prefixes.clear()
        if hard_stopping:
            return False
        for state in self.scheduler.clear_cancelled_requests():
            self._fail(state, RuntimeError("the request was cancelled"))
        self._admit()
        self._drop_rows()
        self._collect_rows()
        return bool(self.rows or self.new_rows)

    def _admit(self) -> None:
        scheduler = self.scheduler
        while scheduler.waiting_requests_order and len(scheduler.active_requests) < self.slots:
            state = scheduler.waiting_requests.pop(scheduler.waiting_requests_order.popleft(), None)
            reason = state and self._reason_to_refuse(state)
            if reason:
                self._fail(state, ValueError(reason))
            elif state:
                row, *copies = [self._start(each, number) for number, each in enumerate(_sequences(state))]
                row.copies = copies
                self._unread.put(row)
        if scheduler.active_requests and not self._readers:
            self._readers = [
                threading.Thread(target=self._read_prompts, args=(lock,), daemon=True) for lock in self._chunk_locks
            ]
            for reader in self._readers:
                reader.start()

    def _start(self, state: RequestState, number: int) -> Row:
        """A row for one of the sequences of a request. With a seed, this and the number is that of its draws."""
        self.scheduler.active_requests[state.request_id] = state
        state.status = RequestStatus.PREFILLING
        state.remaining_prefill_tokens = []  # `position_offset` tells what is left: no copies of a long list
        seed, generator = state.logit_processor_kwargs.get("seed"), None
        if seed is not None:
            generator = torch.Generator(self.model.device).manual_seed(seed + number)
        return Row(state, generator)

    def _fail(self, state: RequestState, error: Exception) -> None:
        for each in _sequences(state) if state.status == RequestStatus.PENDING else [state]:
            self.output_router.fail_and_deliver(each, error)

    def _reason_to_refuse(self, state: RequestState) -> str | None:
        tokens, vocab_size = state.initial_tokens, self.model.config.vocab_size
        if not tokens:
            return "the prompt is empty: it must hold at least one token"
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < vocab_size:
                return f"token id {token} is not in the vocabulary: ids must be in 0..{vocab_size - 1}"
        if state.max_new_tokens is not None and state.max_new_tokens < 1:
            return f"max_new_tokens must be at least 1, not {state.max_new_tokens}"
        sequences, top_logprobs = _num_sequences(state), state.logit_processor_kwargs.get("top_logprobs", 0)
        if not 1 <= sequences <= self.slots:
            return f"num_return_sequences must be in 1..{self.slots}, not {sequences}"
        if not 0 <= top_logprobs <= vocab_size:
            return f"top_logprobs must be in 0..{vocab_size}, not {top_logprobs}"
        if state.request_id in self.scheduler.active_requests:
            return f"another request with the id {state.request_id} is running"
        return None

    def _is_active(self, row: Row) -> bool:
        return self.scheduler.active_requests.get(row.state.request_id) is row.state

    def _drop_rows(self) -> None:
        """Rows of requests that are finished or cancelled."""
        kept = [i for i, row in enumerate(self.rows) if self._is_active(row)]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[i] for i in kept]
            self.cache.batch_select_indices(torch.tensor(kept, device=self.model.device, dtype=torch.long))

    def _collect_rows(self) -> None:
        """From the readers."""
        while not self._read.empty():
            read = self._read.get()
            for row in filter(self._is_active, [read, *read.copies]):
                if read.error is None:
                    row.cache, row.logits, row.digest = read.cache, read.logits, read.digest.copy()
                    row.state.position_offset = row.digest.length
                    self.new_rows.append(row)
                else:
                    self._fail(row.state, read.error)
                    self.scheduler.finish_request(row.state.request_id)

    @torch.no_grad()
    def _generation_step(self, model: nn.Module) -> None:
        logits = []
        if self.rows:
            ids = torch.tensor([row.state.tokens_to_process for row in self.rows], device=self.model.device)
            logits.append(model(ids, past_key_values=self.cache, use_cache=True).logits[:, -1])
            for row in self.rows:
                row.state.position_offset += 1
        self._join(logits)
        self.tokens, self.logprobs = self._choose(torch.cat(logits).float())
        self.steps += 1

    def _join(self, logits: list[Tensor]) -> None:
        """Prompts that have been read become rows."""
        new, self.new_rows = self.new_rows, []
        if not new:
            return
        logits += [row.logits for row in new if row.logits is not None]
        caches = [row.cache for row in new if row.cache is not None]
        if not self.rows:
            self.cache = caches.pop(0)
        append_rows(self.cache, caches)
        for row in new:
            row.cache = row.logits = None
            row.copies = []
            row.state.status = RequestStatus.DECODING
        self.rows += new

    def _choose(self, logits: Tensor) -> tuple[list[int], list]:
        """A token for each row of (B, V), and its log-probability where they are asked for; for `top_logprobs` pairs
        of this token and of the likeliest ones with what the model gives them, before penalties and sampling."""
        own = [row.state.logit_processor_kwargs for row in self.rows]
        wanted = {i: each["top_logprobs"] for i, each in enumerate(own) if "top_logprobs" in each}
        unchanged = logits[list(wanted)].log_softmax(-1) if wanted else logits
        for i, each in enumerate(own):
            presence, frequency = each.get("presence_penalty", 0.0), each.get("frequency_penalty", 0.0)
            if presence or frequency:  # of what was written, not of the prompt, as OpenAI defines them
                written = torch.tensor(self.rows[i].state.generated_tokens, dtype=torch.long, device=logits.device)
                tokens, counts = written.unique(return_counts=True)
                logits[i, tokens] -= presence + frequency * counts
        sampled = [i for i, row in enumerate(self.rows) if row.is_sampled(self.do_sample)]
        greedy = sorted(set(range(len(self.rows))) - set(sampled))
        scores = logits
        for processors, rows in ((self.logit_processor, sampled), (self.greedy_processor, greedy)):
            if processors.do_processing and rows:
                scores = scores.clone() if scores is logits else scores
                scores[rows] = self._process(processors, rows, logits[rows])
        chosen = scores.argmax(-1)
        if sampled or self.cb_config.return_logprobs:
            probabilities = scores.softmax(-1)
            unseeded = [i for i in sampled if self.rows[i].generator is None]
            if unseeded:
                chosen[unseeded] = torch.multinomial(probabilities[unseeded], 1)[:, 0]
            for i in set(sampled) - set(unseeded):  # as `generate` draws after torch.manual_seed
                chosen[i] = torch.multinomial(probabilities[i : i + 1], 1, generator=self.rows[i].generator)[0, 0]
        logprobs: list = [None] * len(self.rows)
        if self.cb_config.return_logprobs:
            logprobs = probabilities.gather(1, chosen[:, None])[:, 0].log().tolist()
        for row_logprobs, (i, k) in zip(unchanged, wanted.items()):
            ids = [int(chosen[i]), *row_logprobs.topk(k).indices.tolist()]
            logprobs[i] = list(zip(ids, row_logprobs[ids].tolist()))
        return chosen.tolist(), logprobs

    def _process(self, processors: ContinuousBatchingLogitsProcessorList, rows: list[int], scores: Tensor) -> Tensor:
        requests = [self.rows[i] for i in rows]
        last = torch.tensor([row.state.initial_tokens[-1:] for row in requests], device=scores.device)
        neutral = {"temperature": 1.0, "top_k": scores.shape[1], "top_p": 1.0}
        for processor in processors.logits_processor:
            if not isinstance(processor, ContinuousBatchingLogitsProcessor):
                scores = processor(last, scores)
                continue
            [name] = processor.supported_kwargs
            if any(row.state.logit_processor_kwargs.get(name) != neutral[name] for row in requests):  # else no sorting
                scores = processor(scores, processor.prepare_tensor_args(requests).to(scores.device))
        return scores

    def update_batch(self) -> None:
        outputs = []
        for i, (row, token, logprob) in enumerate(zip(self.rows, self.tokens, self.logprobs)):
            state = row.state
            if state.update_and_check_completion(token, logprob):
                row.digest.update(state.generated_tokens[:-1])  # the last one has not been read
                self.prefixes.put(row.digest, self.cache, i)
                self.scheduler.finish_request(state.request_id)
            if state.streaming or state.status == RequestStatus.FINISHED:
                outputs.append(state.to_generation_output())
        self.written_tokens += len(self.rows)
        self.output_router.deliver_batch(outputs)

    def fail_all_requests(self, error: Exception) -> None:
        readers, self._readers = self._readers, []  # which ends them
        for _ in readers:
            self._unread.put(None)
        for reader in readers:
            reader.join()
        waiting = list(self.scheduler.waiting_requests.values())
        for state in [*self.scheduler.active_requests.values(), *waiting]:
            self._fail(state, error)
        self.reset()
        self.prefixes.flush()

    def warmup(self, model: nn.Module) -> None:
        """Nothing is captured in advance."""

    # ---- In the threads of the readers

    @torch.no_grad()
    def _read_prompts(self, lock: threading.Lock) -> None:
        while True:
            row = self._unread.get()
            if threading.current_thread() not in self._readers:
                return
            if row is None:
                continue
            rows = [row]
            try:
                with lock:
                    rows = self._alike(row)
                    if rows:
                        self._read_chunks(rows)
            except Exception as error:  # of these requests alone
                for row in rows:
                    row.error = error
            for row in rows:
                (self._read if row.is_read() else self._unread).put(row)  # behind the others: prompts take turns
            if any(row.is_read() for row in rows):
                self.manager._wake_up_loop.set()

    def _alike(self, first: Row) -> list[Row]:
        """The row and others that wait with about as much to read next: little padding, within CHUNK_TOKENS."""
        waiting: list[Row | None] = [first]
        with suppress(queue.Empty):
            while True:
                waiting.append(self._unread.get_nowait())
        rows: list[Row] = []
        least = most = 0
        for row in waiting:
            if row is None or (len(rows) + 1) * most > CHUNK_TOKENS:
                self._unread.put(row)
            elif any(map(self._is_active, [row, *row.copies])):
                if row.cache is None:
                    row.cache, row.digest = self.prefixes.find(row.state.initial_tokens)
                length = len(row.chunk())
                shortest, longest = min(least or length, length), max(most, length)
                fits = 4 * shortest >= 3 * longest and (len(rows) + 1) * longest <= CHUNK_TOKENS
                # The state at the start is the model's, not one of the cache.
                if not rows or (fits and bool(row.digest.length) == bool(rows[0].digest.length)):
                    rows.append(row)
                    least, most = shortest, longest
                else:
                    self._unread.put(row)
        return rows

    def _read_chunks(self, rows: list[Row]) -> None:
        """A chunk of each prompt in one pass; the shorter ones end in padding."""
        chunks = [row.chunk() for row in rows]
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=self.model.device)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(chunk) for chunk in chunks], batch_first=True).to(lengths.device)
        cache, *others = [row.cache for row in rows if row.cache is not None]
        if rows[0].digest.length:
            append_rows(cache, others)
        for row, chunk in zip(rows, chunks):
            row.digest.update(chunk)
            row.state.position_offset = row.digest.length
        ends = [len(chunk) - 1 for row, chunk in zip(rows, chunks) if row.is_read()]
        logits = self.model(
            ids,
            attention_mask=torch.arange(ids.shape[1], device=lengths.device) < lengths[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(ends, dtype=torch.long, device=lengths.device),
        ).logits
        with self._count_lock:
            self.read_tokens += sum(map(len, chunks))
        for i, row in enumerate(rows):
            if len(rows) > 1:
                row.cache = cache_of(
                    self.model, [(x.keys[i : i + 1], x.values[i : i + 1]) for x in cache.layers], row.digest.length
                )
            if row.is_read():
                row.logits = logits[i : i + 1, ends.index(len(chunks[i]) - 1)]
            if next_border(row.digest.length - 1) == row.digest.length:
                self.prefixes.put(row.digest, row.cache)


def _num_sequences(state: RequestState) -> int:
    return state.logit_processor_kwargs.get("num_return_sequences", state.num_children + 1)


def _sequences(state: RequestState) -> list[RequestState]:
    """The request and, for the other sequences of num_return_sequences, requests like it."""
    copies = [state.create_equivalent_initial_request() for _ in range(_num_sequences(state) - 1)]
    for i, copied in enumerate(copies):
        copied.request_id = f"{state.request_id}__child#{i}"
    return [state, *copies]


def append_rows(cache: DynamicCache, others: list[DynamicCache]) -> None:
    for layer, *more in zip(cache.layers, *(other.layers for other in others)):
        layer.append_rows(more)


class RowBatchingManager(continuous_api.ContinuousBatchingManager):
    """transformers' manager, with rows of states for requests.

    A request may bring OWN_ARGUMENTS in `add_request`, and with `per_request_processors` temperature, top_k and top_p
    where the generation configuration has them. Its tokens are those that `generate` gives it alone, up to ties
    of logits within rounding: a product over more rows adds in another order.

    Raises ValueError for a configuration whose tokens would not be those of `generate`.
    """

    def __init__(self, model, generation_config: GenerationConfig, continuous_batching_config, workload_hints=None):
        greedy_config = copy.deepcopy(generation_config)
        greedy_config.do_sample = False
        for name, default in (("num_beams", 1), ("repetition_penalty", 1.0), ("stop_strings", None)):
            value = getattr(generation_config, name, None)
            if value is not None and value != default:
                raise ValueError(f"continuous batching does not know {name}={value!r}: use generate")
        for processor in model._get_logits_processor(generation_config):
            if processor.supports_continuous_batching is False:
                raise ValueError(f"continuous batching does not know {type(processor).__name__}: use generate")
        if model.config.bidirectional:
            raise ValueError("a bidirectional model cannot generate: its outputs depend on the tokens after them")
        super().__init__(model, generation_config, continuous_batching_config, workload_hints)
        if self.distributed_helper.tp_size > 1:
            raise ValueError("continuous batching runs in one process, without tensor parallelism")
        self.logit_processor.supported_keys |= OWN_ARGUMENTS
        self.greedy_processor = ContinuousBatchingLogitsProcessorList(model._get_logits_processor(greedy_config))

    def switch_to_cb_friendly_attn(self, model, auto_switch_to_flash: bool = True) -> None:
        """Nothing: there is no attention."""

    def _create_batch_processor(self) -> RowBatchProcessor:
        if self.batch_processor is None:
            return RowBatchProcessor(self)
        self.batch_processor.reset()
        return self.batch_processor
