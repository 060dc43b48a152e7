"""transformers' own OpenAI-compatible server for a MinRNN model:  python -m modeling_minrnn.serve MODEL [OPTIONS]

MODEL is a folder or a repository id; the options are those of `transformers serve` (--port 8000 ...) and those below.
Many requests are answered at once, see `continuous_batching`. Chat needs a tokenizer with a chat template, completions
do not. Install: `pip install 'modeling-minrnn[serving]'`. To talk to it:

    transformers chat MODEL http://localhost:8000

Errors have OpenAI's form, with a status that says whose they are: 400 a wrong request, 404 another model, 413 a prompt
that is too long, 429 too many requests, 503 the end of the server. GET /stats counts what was done.
"""

import asyncio
import copy
import gc
import inspect
import itertools
import json
import sys
import threading
import time
import uuid
from contextvars import ContextVar
from functools import partial
from typing import Annotated, Any

import transformers
import typer
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serve import Serve
from transformers.cli.serving import chat_completion, completion, response, utils

from . import modeling_minrnn
from .continuous_batching import MinRNNBatchingConfig

DRAIN_SECONDS = 5  # from SIGTERM to the end of requests that are still running
LONG_TEXT = 20_000  # characters, from which on a tokenizer takes longer than a few steps
MAX_BODY_BYTES = 64 * 2**20
SWITCH_SECONDS = 5e-4  # between Python threads: by default one waits 5 ms for another, longer than a step takes
INTEGERS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n")
# A temperature near 0 would make infinities of the logits, for all who share the step.
RANGES = {"temperature": (1e-3, 2), "top_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
# Fields that would change the answer and do not, with the values that ask for no change.
NOT_OBEYED: dict[str, tuple] = {
    "best_of": (1,), "echo": (False,), "logit_bias": ({},), "response_format": ({"type": "text"},),
}  # fmt: skip


def refuse(status: int, message: str, **headers: str) -> None:
    raise HTTPException(status, message, headers=headers or None)


class CheckedHandler(utils.BaseHandler):
    """In front of a handler of transformers: wrong requests are refused, and each has its own sampling settings."""

    def _validate_request(self, body: dict) -> None:
        model = self.model_manager.force_model
        if body.get("model") not in (None, model):
            refuse(404, f"this server has the model {model!r}, not {body['model']!r}")
        super()._validate_request(body)
        for name in INTEGERS:
            value = body.get(name)
            if value is not None and (type(value) is not int or value < 1):
                refuse(400, f"{name} must be a whole number, at least 1, not {value!r}")
        for name, (least, most) in RANGES.items():
            value = body.get(name)
            if value is not None and not (type(value) in (int, float) and (value == 0 or least <= value <= most)):
                refuse(400, f"{name} must be 0 or a number in {least}..{most}, not {value!r}")
        if body.get("seed") is not None and not (type(body["seed"]) is int and 0 <= body["seed"] < 2**63):
            refuse(400, f"seed must be a whole number in 0..2**63 - 1, not {body['seed']!r}")
        messages = body.get("messages", [{"role": "user"}])
        if not (
            isinstance(messages, list) and messages and all(isinstance(x, dict) and "role" in x for x in messages)
        ):
            refuse(400, "messages must be a list of at least one object with a role and a content")
        if isinstance(self, chat_completion.ChatCompletionHandler) and "messages" not in body:
            refuse(400, "messages are missing")
        stops = body.get("stop") or []
        if not (isinstance(stops, str) or (isinstance(stops, list) and all(x and isinstance(x, str) for x in stops))):
            refuse(400, f"stop must be a text or a list of texts, not {stops!r}")
        for name, neutral in NOT_OBEYED.items():
            if body.get(name) is not None and body[name] not in neutral:
                refuse(400, f"{name} is not obeyed with continuous batching: leave it out")
        if self._top_logprobs(body) is not None or (body.get("n") or 1) > 1:
            for name in ("stream", "stop"):
                if body.get(name):
                    refuse(400, f"n and logprobs are not obeyed with {name}: leave one out")

    def _top_logprobs(self, body: dict) -> int | None:
        """How many likeliest tokens are wanted beside each; None for no log-probabilities."""
        raise NotImplementedError

    def _build_generation_config(self, body: dict, *args, **kwargs):
        # Taken out, as transformers would seed the generator that all requests share.
        config = super()._build_generation_config(body | {"seed": None}, *args, **kwargs)
        own = {name: body.get(name) for name in ("seed", "presence_penalty", "frequency_penalty")}
        own |= {"top_logprobs": self._top_logprobs(body), "num_return_sequences": body.get("n")}
        config.own = {name: value for name, value in own.items() if value is not None}
        config.results = None  # of a request that is not streamed, once it has begun
        if body.get("temperature") is not None:
            config.do_sample = body["temperature"] > 0
        return config

    async def handle_request(self, body: dict, request_id: str):
        try:
            return await super().handle_request(body, request_id)
        except LongText as text:  # read in a thread: all streams would wait for it
            self._inputs.set(await asyncio.to_thread(text.read))
            return await super().handle_request(body, request_id)

    _inputs: ContextVar[dict | None] = ContextVar("inputs", default=None)

    def _resolve_model(self, body: dict) -> tuple:
        # The only one. transformers starts a thread at each request, which would unload it if no other came.
        model_id = self.model_manager.process_model_name(self.model_manager.force_model)
        loaded = self.model_manager.loaded_models[model_id]
        return model_id, loaded.model, Tokenizer(loaded.processor, self._inputs.get())


class LongText(Exception):
    """A text that takes longer to tokenise than a few steps."""

    def __init__(self, read):
        self.read = read


class Tokenizer:
    """A tokenizer that leaves a long text to a thread, or gives what was read there."""

    def __init__(self, tokenizer, inputs: dict | None):
        self._tokenizer_itself, self._inputs = tokenizer, inputs

    def __call__(self, text: str, *args, **kwargs) -> dict:
        return self._read(len(text), partial(self._tokenizer_itself, text, *args, **kwargs))

    def apply_chat_template(self, messages: list[dict], *args, **kwargs) -> dict:
        read = partial(self._tokenizer_itself.apply_chat_template, messages, *args, **kwargs)
        return self._read(sum(len(str(message.get("content"))) for message in messages), read)

    def _read(self, length: int, read) -> dict:
        if self._inputs is None and length > LONG_TEXT:
            raise LongText(read)
        return self._inputs or read()

    def __getattr__(self, name: str):
        return getattr(self._tokenizer_itself, name)


class ChoicesHandler(CheckedHandler):
    """Of answers with `choices`: n of them, and log-probabilities of their tokens."""

    async def _non_streaming(self, request_id, model, processor, model_id, inputs, config, *args, **kwargs):
        bodies = []
        for i in range(config.own.get("num_return_sequences", 1)):
            answer = await super()._non_streaming(
                request_id, model, processor, model_id, inputs, config, *args, **kwargs
            )
            if not config.own.keys() & {"num_return_sequences", "top_logprobs"}:
                return answer
            bodies.append(json.loads(answer.body))
            [choice] = bodies[-1]["choices"]
            choice["index"] = i
            if "top_logprobs" in config.own:
                special = set(processor.all_special_ids)  # which the text does not show
                found = [each for each in config.logprobs if each[0][0] not in special]
                choice["logprobs"] = self._logprobs(processor, found)
        tokens = [body["usage"]["completion_tokens"] for body in bodies]
        usage = bodies[0]["usage"] | {"completion_tokens": sum(tokens)}
        usage["total_tokens"] = usage["prompt_tokens"] + sum(tokens)
        return JSONResponse(bodies[0] | {"choices": [body["choices"][0] for body in bodies], "usage": usage})

    def _logprobs(self, tokenizer, found: list[list[tuple[int, float]]]) -> dict:
        raise NotImplementedError


class ChatCompletionHandler(ChoicesHandler, chat_completion.ChatCompletionHandler):
    """/v1/chat/completions"""

    def _top_logprobs(self, body: dict) -> int | None:
        wanted, most = body.get("logprobs") or False, body.get("top_logprobs") or 0
        if type(wanted) is not bool or type(most) is not int or not 0 <= most <= 20 or most > 20 * wanted:
            refuse(400, f"logprobs must be true or false, and top_logprobs with it in 0..20, not {wanted!r}, {most!r}")
        return most if wanted else None

    def _logprobs(self, tokenizer, found) -> dict:
        def entry(token: int, logprob: float) -> dict:
            return {"token": tokenizer.decode([token]), "logprob": logprob, "bytes": None}

        return {"content": [entry(*own) | {"top_logprobs": [entry(*one) for one in top]} for own, *top in found]}


class ResponseHandler(CheckedHandler, response.ResponseHandler):
    """/v1/responses"""

    def _top_logprobs(self, body: dict) -> None:
        if body.get("top_logprobs"):
            refuse(400, "top_logprobs is not obeyed in responses: leave it out")


class CompletionHandler(ChoicesHandler, completion.CompletionHandler):
    """/v1/completions"""

    def _top_logprobs(self, body: dict) -> int | None:
        most = body.get("logprobs")
        if most is None or most is False:
            return None
        if type(most) is not int or not 0 <= most <= 5:
            refuse(400, f"logprobs must be a whole number in 0..5, not {most!r}")
        return most

    def _logprobs(self, tokenizer, found) -> dict:
        texts = [tokenizer.decode([own[0]]) for own, *_ in found]
        return {
            "tokens": texts,
            "token_logprobs": [own[1] for own, *_ in found],
            "top_logprobs": [{tokenizer.decode([token]): logprob for token, logprob in top} for _, *top in found],
            "text_offset": [0, *itertools.accumulate(map(len, texts))][: len(texts)],
        }

    def _build_chunk_sse(self, request_id, model_id, text="", finish_reason=None, usage=None) -> str:
        if finish_reason is not None:
            return super()._build_chunk_sse(request_id, model_id, text, finish_reason, usage)
        # By transformers this is a third of what a token costs the server beside the model.
        choices = [{"index": 0, "text": text}]
        chunk = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model_id}
        return f"data: {json.dumps(chunk | {'choices': choices})}\n\n"


class UntilStop:
    """Hands pieces of a text on to a queue, up to the first of some texts. What may begin one waits for more."""

    def __init__(self, pieces: asyncio.Queue, stops: str | list[str] | None):
        self._pieces, self._held, self.has_stopped = pieces, "", False
        self._stops = [stops] if isinstance(stops, str) else stops or []

    def put_nowait(self, piece) -> None:
        """A text, or what ends the stream: an error or None."""
        if self.has_stopped:
            return
        if not self._stops:
            self._pieces.put_nowait(piece)
        elif isinstance(piece, str):
            text = self._held + piece
            found = [start for stop in self._stops if (start := text.find(stop)) >= 0]
            self.has_stopped = bool(found)
            sent = min(found, default=len(text) - max(map(partial(_begun, text), self._stops), default=0))
            self._held = text[sent:]
            if sent:
                self._pieces.put_nowait(text[:sent])
            if self.has_stopped:
                self._pieces.put_nowait(None)
        else:
            if self._held:
                self._pieces.put_nowait(self._held)
            self._pieces.put_nowait(piece)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of stop."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class RowGenerateManager(utils.CBGenerateManager):
    """transformers' manager of requests to a model, with limits, settings of each request, and none left behind."""

    def __init__(self, model, config: MinRNNBatchingConfig, max_waiting: int, max_prompt_tokens: int):
        super().__init__(config)
        self.max_waiting, self.max_prompt_tokens = max_waiting, max_prompt_tokens
        self.slots, self.vocab_size = config.max_requests_per_batch, model.config.vocab_size
        self._numbers, self._running = itertools.count(), set[str]()
        shared = copy.deepcopy(model.generation_config)
        # Of each there must be a processor; their values come with the requests.
        shared.do_sample, shared.temperature, shared.top_k, shared.top_p = True, 0.5, 1, 0.5
        self.init_cb(model, shared)

    def counters(self) -> dict[str, int]:
        processor = self._cb.batch_processor
        return {} if processor is None else processor.counters()

    def _submit(self, inputs: dict, config, callbacks: list, streaming: bool) -> list[str]:
        """The numbers under which the n answers run; the names that clients give may come twice."""
        tokens = inputs["input_ids"]
        if not tokens:
            refuse(400, "the prompt is empty: it must hold at least one token")
        if len(tokens) > self.max_prompt_tokens:
            refuse(413, f"the prompt has {len(tokens)} tokens, and at most {self.max_prompt_tokens} are read")
        reason = self._cb.background_thread_status.can_accept_new_requests()
        if reason:
            refuse(503, reason)
        if len(callbacks) > self.slots:
            refuse(400, f"n must be at most {self.slots}, not {len(callbacks)}")
        if len(self._running) + len(callbacks) > self.slots + self.max_waiting:
            refuse(429, f"{self.max_waiting} requests are waiting: try again later", **{"Retry-After": "1"})
        sampling: dict[str, Any] = {"do_sample": bool(config.do_sample)}
        if config.do_sample:
            sampling["temperature"] = float(config.temperature or 1.0)
            sampling["top_p"] = float(1.0 if config.top_p is None else config.top_p)
            sampling["top_k"] = min(config.top_k or self.vocab_size, self.vocab_size)
        sampling |= {name: float(x) if "penalty" in name else x for name, x in config.own.items()}
        name = f"serve-{next(self._numbers)}"
        names = [name, *(f"{name}__child#{i}" for i in range(len(callbacks) - 1))]  # as transformers names them
        self._running.update(names)

        def deliver(callback, output) -> None:
            if output.is_finished():  # or failed, or cancelled
                self._running.discard(output.request_id)
            callback(output)

        for each, callback in zip(names, callbacks):
            self._cb.register_result_handler(each, partial(deliver, callback))  # before the first token can come
        self._cb.add_request(
            tokens,
            request_id=name,
            streaming=streaming,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=config.eos_token_id,
            **sampling,
        )
        return names

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        if gen_config.stop_strings and utils.get_response_template(processor, model) is not None:
            refuse(400, "stop is not obeyed where the tokenizer has a response template: leave it out")
        queue: asyncio.Queue = asyncio.Queue()
        texts = UntilStop(queue, gen_config.stop_strings)
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer

        def take(output) -> None:
            if texts.has_stopped:
                return
            try:
                streamer.put(output)
                if texts.has_stopped:
                    streamer.cancel()
                if output.error is not None:
                    texts.put_nowait(utils._StreamError(json.dumps(output.error)[1:-1]))  # goes into quotes
                if output.is_finished():
                    streamer.end()
            except Exception as error:
                texts.put_nowait(utils._StreamError(json.dumps(str(error))[1:-1]))

        [name] = self._submit(inputs, gen_config, [take], streaming=True)
        streamer = utils.CBStreamer(
            self._cb, name, tokenizer, asyncio.get_running_loop(), texts, response_parser=response_parser
        )
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        if gen_config.stop_strings:
            return await self._generate_until_stop(model, processor, inputs, gen_config, request_id)
        if gen_config.results is None:  # the first of n calls starts them all
            futures = [asyncio.Future() for _ in range(gen_config.own.get("num_return_sequences", 1))]
            callbacks = [
                lambda output, future=future: future.done() or future.set_result(output) for future in futures
            ]
            gen_config.names = self._submit(inputs, gen_config, callbacks, streaming=False)
            gen_config.results = iter(futures)
        try:
            output = await next(gen_config.results)
        except asyncio.CancelledError:  # the client has gone
            for name in gen_config.names:
                self._cb.cancel_request(name)
            raise
        if output.error is not None:
            refuse(503, output.error)
        gen_config.logprobs = output.logprobs
        tokens = output.generated_tokens
        return processor.decode(tokens, skip_special_tokens=True), len(inputs["input_ids"]), tokens

    async def _generate_until_stop(self, model, processor, inputs, gen_config, request_id):
        texts, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        text = ""
        try:
            while (piece := await texts.get()) is not None:
                if isinstance(piece, utils._StreamError):
                    refuse(503, piece.msg)
                text += piece
        except asyncio.CancelledError:  # the client has gone
            streamer.cancel()
            raise
        return text, len(inputs["input_ids"]), range(streamer.total_tokens)

    def stop(self) -> None:
        self._cb.stop(timeout=2, hard_stop=True)


class Connections:
    """Around the application: a number for each request, a limit on its body, and its end when the client goes.

    A plain ASGI application: those that Starlette makes of functions pass each piece of a stream through two queues.
    """

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        names = dict(scope["headers"])
        name = names.get(utils.X_REQUEST_ID.encode(), uuid.uuid4().hex.encode())
        scope.setdefault("state", {})["request_id"] = name.decode("latin-1")
        messages: asyncio.Queue = asyncio.Queue()

        async def send_with_name(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (utils.X_REQUEST_ID.encode(), name)]
            await send(message)

        async def listen() -> None:
            size = 0
            while True:
                message = await receive()
                size += len(message.get("body", b""))
                if size > MAX_BODY_BYTES:
                    message = {"type": "http.disconnect"}
                messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    answer.cancel()
                    return

        if int(names.get(b"content-length", b"0")) > MAX_BODY_BYTES:
            too_long = error_response(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
            return await too_long(scope, receive, send_with_name)
        answer = asyncio.ensure_future(self.app(scope, messages.get, send_with_name))
        listener = asyncio.ensure_future(listen())
        try:
            await answer
        except asyncio.CancelledError:
            if not listener.done():  # the server itself ends
                answer.cancel()
                raise
        finally:
            listener.cancel()


def error_response(status: int, message: str, headers=None) -> JSONResponse:
    """As OpenAI's servers form it."""
    kinds = {404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = {404: "model_not_found", 429: "rate_limit_exceeded"}.get(status)
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers=headers)


def form_errors(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException):
        status = 400 if error.status_code == 422 else error.status_code
        return error_response(status, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def no_json(request: Request, error: RequestValidationError):
        return error_response(400, f"the body must be a JSON object: {error.errors()[0]['msg']}")

    # What tokenizers, chat templates and transformers raise for the fields of a request.
    @app.exception_handler(ValueError)
    @app.exception_handler(TypeError)
    @app.exception_handler(KeyError)
    @app.exception_handler(TemplateError)
    async def wrong(request: Request, error: Exception):
        return error_response(400, f"{type(error).__name__}: {error}")

    @app.exception_handler(utils.CBWorkerDeadError)
    async def dead(request: Request, error: Exception):
        return error_response(503, str(error))


class RowServer(Serve):
    """transformers' server with one model, many requests at a time, limits and a bounded end."""

    def __init__(self, force_model: str, limits: dict, config: MinRNNBatchingConfig, **options):
        self.limits, self.config, self.pinned = limits, config, force_model
        super().__init__(force_model, non_blocking=True, **options)  # which calls start_server

    def start_server(self) -> None:
        app, state = self.server.config.app, self._generation_state
        if state._continuous_batching:
            model_id = self._model_manager.process_model_name(self.pinned)
            model, _ = self._model_manager.load_model_and_processor(model_id)
            state._cb_manager = RowGenerateManager(model, self.config, **self.limits)
            state._cb_model_id = model_id
        form_errors(app)
        app.user_middleware = [x for x in app.user_middleware if x.kwargs.get("dispatch") is None]  # see Connections
        app.router.routes = [x for x in app.router.routes if getattr(x, "path", "") not in ("/load_model", "/reset")]
        app.post("/load_model")(self.load_model)
        app.get("/stats")(lambda: state._cb_manager.counters() if state._cb_manager else {})
        app.add_middleware(Connections)
        self.server.config.timeout_graceful_shutdown = DRAIN_SECONDS + 2
        handle_exit = self.server.handle_exit

        def exit_soon(signal, frame) -> None:
            timer = threading.Timer(DRAIN_SECONDS, state.shutdown)
            timer.daemon = True
            timer.start()
            handle_exit(signal, frame)

        self.server.handle_exit = exit_soon
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.freeze()  # a full collection would look through all that was loaded, 0.4 s in which every stream waits
        try:
            self.server.run()
        finally:
            state.shutdown()

    async def load_model(self, body: dict) -> StreamingResponse:
        if body.get("model") != self.pinned:
            refuse(404, f"this server has the model {self.pinned!r}, not {body.get('model')!r}")
        model_id = self._model_manager.process_model_name(self.pinned)
        return StreamingResponse(self._model_manager.load_model_streaming(model_id), media_type="text/event-stream")


def serve(
    slots: Annotated[int, typer.Option(help="Requests that are read and answered at the same time.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait for a slot; more get status 429.")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longer prompts get status 413.")] = 2**21,
    prefix_mib: Annotated[int, typer.Option(help="MiB of states kept for prompts that begin the same.")] = 256,
    prefix_folder: Annotated[str | None, typer.Option(help="Where these states are kept across restarts.")] = None,
    **options,
) -> None:
    # The server looks an architecture up on the transformers module itself, whatever is registered with Auto classes.
    for name in modeling_minrnn.__all__:
        setattr(transformers, name, getattr(modeling_minrnn, name))
    if options["continuous_batching"]:
        for module, handler in (
            (chat_completion, ChatCompletionHandler), (completion, CompletionHandler), (response, ResponseHandler),
        ):  # fmt: skip
            setattr(module, handler.__name__, handler)
    config = MinRNNBatchingConfig(
        max_requests_per_batch=slots,
        per_request_processors=True,
        prefix_bytes=prefix_mib * 2**20,
        prefix_folder=prefix_folder,
    )
    RowServer(limits={"max_waiting": max_waiting, "max_prompt_tokens": max_prompt_tokens}, config=config, **options)


def signature() -> inspect.Signature:
    """That of `transformers serve` and of `serve`, by which typer makes the command line."""
    parameters = dict(inspect.signature(Serve).parameters)
    hint = typer.Argument(help="A folder or a repository id.")
    parameters["force_model"] = parameters["force_model"].replace(
        default=inspect.Parameter.empty, annotation=Annotated[str, hint]
    )
    parameters["continuous_batching"] = parameters["continuous_batching"].replace(
        default=True, annotation=Annotated[bool, typer.Option(help="Answer many requests at the same time.")]
    )
    of_pages = [name for name in parameters if name.startswith("cb_")]
    own = inspect.signature(serve).parameters
    kept = [x for name, x in parameters.items() if name not in (*of_pages, "non_blocking", "model_timeout")]
    return inspect.Signature([*kept, *(x for name, x in own.items() if name != "options")])


def main() -> None:
    vars(serve)["__signature__"] = signature()
    app = typer.Typer()
    app.command()(serve)
    app()


if __name__ == "__main__":
    main()
