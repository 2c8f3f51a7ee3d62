"""The routes of the server, and running it until it is told to end.

Everything a client can get wrong is a 4xx in OpenAI's form; a 5xx means that the server is at
fault or is ending. Left out on purpose: several models, but for adapters of one.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import signal
import socket
import time
import urllib.parse
from collections.abc import Awaitable, Callable

import jax
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ....configs.errors import UserError
from ..generate import sampling_for
from ..pictures import reads
from .answer import Answer, event
from .guard import Guard, Judge
from .metrics import Metrics
from .mistakes import ApiError
from .openapi import document
from .page import page
from .prepare import prepare
from .protocol import parse
from .worker import Busy, Worker

# Bytes of a body; a text of this size is beyond any model's length that fits into a slot.
_MOST_BYTES = 8 << 20
# Seconds: between comments that keep a silent stream open; for answers when told to end.
_SILENCE, _GRACE = 15, 30

logger = logging.getLogger(__name__)


class Json(Response):
    """JSON in ASCII: a client's broken surrogates come back as they came."""

    media_type = "application/json"

    def render(self, content) -> bytes:
        """As bytes."""
        return json.dumps(content, allow_nan=False).encode()


class Events(StreamingResponse):
    """A stream of events; `closed` is called however it ends, also when the client leaves."""

    def __init__(self, content, closed: Callable[[], None]):
        super().__init__(content, headers={"cache-control": "no-store"},
                         media_type="text/event-stream")  # fmt: skip
        self._closed = closed

    async def __call__(self, scope, receive, send):
        """Send."""
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._closed()


class _App(Starlette):
    """What uvicorn cancels when the server has ended for long enough is over, and no error."""

    async def __call__(self, scope, receive, send):
        with contextlib.suppress(asyncio.CancelledError):
            await super().__call__(scope, receive, send)


class Server:
    """The routes over one worker."""

    def __init__(self, worker: Worker, name: str, api_key: str = "", guard: Guard | None = None,
                 local: bool = False):  # fmt: skip
        """Prepare.

        Args:
          worker: started by the caller.
          name: of the model, as clients call it; its adapters have their own.
          api_key: that requests to /v1 must have; empty for none.
          guard: may refuse what is asked and what is answered, see `guard`; called in threads.
          local: it is reached from this machine alone.
        """
        self.worker, self.engine, self.name = worker, worker.engine, name
        self.metrics, self._key, self._since = Metrics(), _digest(api_key), int(time.time())
        self._open, self._local = not api_key, local
        self._judge = Judge(guard, lambda what: self.metrics.add("puna_guard_total", what=what))
        routes = [
            Route(path, handler, methods=["GET"])
            for path, handler in (
                ("/", self._page), ("/health", self._health), ("/metrics", self._metrics),
                ("/openapi.json", self._openapi),
            )
        ] + [
            Route(path, self._admitted(path, handler), methods=[method])
            for method, path, handler in (
                ("GET", "/v1/models", self._models),
                ("GET", "/v1/models/{name:path}", self._model),
                ("POST", "/v1/completions", self._completions),
                ("POST", "/v1/chat/completions", self._chat),
            )
        ]  # fmt: skip
        self.app = _App(routes=routes, exception_handlers={HTTPException: _http_error})

    def _admitted(self, path: str, handler: Callable[[Request], Awaitable[Response]]):
        """The handler behind the API key, its mistakes in OpenAI's form, all counted."""

        async def guarded(request: Request) -> Response:
            try:
                self._admit(request)
                response = await handler(request)
            except ApiError as error:
                response = Json(error.body, error.status, headers=error.headers)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                logger.exception("%s failed", request.url.path)
                error = ApiError(500, "the server failed", kind="server_error")
                response = Json(error.body, error.status)
            self.metrics.add("puna_requests_total", path=path, status=response.status_code)
            return response

        return guarded

    def _admit(self, request: Request) -> None:
        origin = request.headers.get("origin")
        # Another site's page in the browser of who runs this server.
        if origin and not _is_own(origin, request.headers.get("host")):
            raise ApiError(403, "requests of other sites' pages are refused", code="origin")
        if origin and self._open and self._local and not _is_here(origin):
            raise ApiError(
                403, "a page under another name than localhost needs an API key", code="origin"
            )
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        given = key if kind.lower() == "bearer" else ""
        if not (self._open or hmac.compare_digest(_digest(given.strip()), self._key)):
            raise ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    # Answers

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, chat: bool) -> Response:
        begun = time.monotonic()
        ask = parse(await _body(request), chat, self.name, self.engine.adapters)
        talks = await self._judge.check_input(ask, self.engine.tokenizer.decode)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def deliver_to(index):
            return lambda news: loop.call_soon_threadsafe(queue.put_nowait, (index, news))

        jobs, prompt_tokens = await run_in_threadpool(
            prepare, ask, self.engine, self.worker.most_jobs, deliver_to
        )
        try:
            self.worker.submit(jobs)
        except Busy:
            raise ApiError(
                429, "the server is busy: try again soon", code="queue_full",
                kind="rate_limit_error", headers={"Retry-After": "1"},
            ) from None  # fmt: skip
        except RuntimeError:
            raise _ending() from None
        self.metrics.add("puna_prompt_tokens_total", prompt_tokens)
        answer = Answer(ask, self.engine.tokenizer, prompt_tokens, len(jobs))
        left, refused = len(jobs), set()

        def closed():
            self.worker.cancel(jobs)
            made = sum(choice.made for choice in answer.choices)
            self.metrics.add("puna_generated_tokens_total", made)
            if left:
                self.metrics.add("puna_cancelled_total")
            self.metrics.observe("puna_request_seconds", time.monotonic() - begun)

        async def tokens():
            """(index, Token) of all choices until each has finished; None in a long silence."""
            nonlocal left
            first = True
            while left:
                try:
                    index, news = await asyncio.wait_for(queue.get(), _SILENCE)
                except TimeoutError:
                    yield None
                    continue
                if index in refused:
                    continue
                if isinstance(news, UserError):
                    raise ApiError(400, str(news))
                if isinstance(news, BaseException):
                    raise _ending()
                if first:
                    self.metrics.observe("puna_first_token_seconds", time.monotonic() - begun)
                    first = False
                left -= news.finish_reason is not None
                yield index, news

        async def passed():
            """(index, tokens) that the guard lets pass, no tokens where it ends a choice."""
            nonlocal left
            async for news in self._judge.passed(tokens(), talks, ask):
                if news is None or not news.refused:
                    yield news and (news.index, news.tokens)
                    continue
                refused.add(news.index)
                left -= news.tokens[-1].finish_reason is None
                self.worker.cancel([jobs[news.index]])
                answer.choices[news.index].withhold(len(news.tokens))
                yield news.index, []

        async def events():
            try:
                for chunk in answer.begin():
                    yield event(chunk)
                async for news in passed():
                    for chunk in answer.add(*news) if news else ():
                        yield event(chunk)
                    if not news:
                        yield ": wait\n\n"
                for chunk in answer.end():
                    yield event(chunk)
                yield "data: [DONE]\n\n"
            except ApiError as error:
                yield event(error.body)

        async def collect():
            async for news in passed():
                if news:
                    index, found = news
                    for token in found:
                        answer.choices[index].add(token)

        if ask.stream:
            return Events(events(), closed)
        try:
            await _while_there(request, collect())
        finally:
            closed()
        return Json(answer.whole())

    # What there is to know

    async def _models(self, request: Request) -> Response:
        names = (self.name, *self.engine.adapters)
        return Json({"object": "list", "data": [self._described(name) for name in names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in (self.name, *self.engine.adapters):
            raise ApiError(404, f"the model {name!r:.200} is not here", "model", "model_not_found")
        return Json(self._described(name))

    def _described(self, name: str) -> dict:
        found = {
            "id": name, "object": "model", "created": self._since, "owned_by": "puna",
            "max_model_len": self.engine.max_length,
        }  # fmt: skip
        return found if name == self.name else {**found, "parent": self.name}

    async def _health(self, request: Request) -> Response:
        if self.worker.is_alive():
            return Json({"status": "ok"})
        return Json({"status": "the engine has stopped"}, 503)

    async def _metrics(self, request: Request) -> Response:
        running, waiting = self.worker.counts
        text = self.metrics.text(
            puna_slots=self.engine.num_slots,
            puna_running=running,
            puna_waiting=waiting,
            puna_prompt_tokens_reused_total=self.engine.reused,
            puna_proposed_tokens_total=self.engine.proposed,
            puna_accepted_tokens_total=self.engine.accepted,
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        names = (self.name, *self.engine.adapters)
        engine, size = self.engine, self.engine.tokenizer.vocab_size
        sound = engine.config.audio.num_layers > 0
        return Json(document(names, engine.max_length, size, reads(engine.config), sound))

    async def _page(self, request: Request) -> Response:
        policy = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        html = page(pictures=reads(self.engine.config))
        return HTMLResponse(html, headers={"content-security-policy": policy})


def listen(host: str, port: int) -> socket.socket:
    """Open the address that the server will answer at.

    Raises:
      UserError: it is taken, or not one of this machine.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port={port} must lie in 0..65535; 0 = one that is free")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"cannot listen at --host={host} --port={port}: {error.strerror}") from None


def serve(engine, listener: socket.socket, mesh, name: str, api_key: str = "",
          max_waiting: int = 64, guard: Guard | None = None) -> None:  # fmt: skip
    """Answer until SIGTERM or Ctrl-C, then finish what has been begun.

    Args:
      engine: an `Engine`; warmed up here.
      listener: see `listen`.
      mesh: that of the engine.
      name, api_key, guard: see `Server`. max_waiting: see `Worker`.

    Raises:
      UserError: an impossible setting; or what has ended the engine.
    """
    if name in engine.adapters:
        raise UserError(f"--adapter={name}=... must have another name than the model: --name")
    if max_waiting < 0:
        raise UserError(f"--max_waiting={max_waiting} must be 0 or more")
    sampling_for(engine.tokenizer, 0)  # refuses a generation_config.json that makes no sense
    worker = Worker(engine, max_waiting, mesh, on_failure=lambda: _end(server))
    host, port = listener.getsockname()[:2]
    local = ipaddress.ip_address(host).is_loopback
    config = uvicorn.Config(
        Server(worker, name, api_key, guard, local).app, log_level="warning", access_log=False,
        lifespan="off", timeout_graceful_shutdown=_GRACE,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with jax.set_mesh(mesh):
        engine.warm_up()
    worker.start()
    print(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    # uvicorn stops in order on these and then raises them again; ignored, the status is 0.
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        worker.stop()
        worker.join(_GRACE)
    if worker.error is not None:
        raise worker.error


def _end(server) -> None:
    server.should_exit = True


def _is_own(origin: str, host: str | None) -> bool:
    try:
        return urllib.parse.urlsplit(origin).netloc == host
    except ValueError:  # no URL at all
        return False


def _is_here(origin: str) -> bool:
    """Whether a page's own name is surely that of this machine, or of a proxy with TLS before it.

    Another site can let its name lead to 127.0.0.1, and its pages then count as ours.
    """
    url = urllib.parse.urlsplit(origin)
    if url.scheme == "https" or (url.hostname or "").split(".")[-1] == "localhost":
        return True
    try:
        return bool(ipaddress.ip_address(url.hostname or ""))
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    """Of equal length, so that a comparison takes equally long for any key."""
    return hashlib.sha256(key.encode(errors="replace")).digest()


def _ending() -> ApiError:
    return ApiError(503, "the server is ending", kind="server_error", headers={"Retry-After": "5"})


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > _MOST_BYTES:
            raise ApiError(
                413, f"the body is larger than {_MOST_BYTES:,} bytes", code="body_too_large"
            )
    return bytes(data)


async def _while_there(request: Request, work) -> None:
    """Await `work`, or cancel it and raise ClientDisconnect once the client leaves."""

    async def left():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Unknown paths and methods."""
    found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return Json(found.body, error.status_code, headers=error.headers)
