"""A guard that may refuse what clients ask and what the model answers.

A guard is a function of a conversation, a list of {"role", "content"} that ends with what is to be
judged: "user" of what is asked, "assistant" of an answer so far. It returns nothing to let it pass,
or why it is refused. Of an answer nothing is sent before it has passed, in a stream piece by piece.
A guard that fails lets nothing pass. Pictures are not shown to guards, so they are refused.
"""

import asyncio
import concurrent.futures
import json
import logging
import pkgutil
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple, cast

from ....configs.errors import UserError
from ..sampling import Sampling
from ..slots import Token
from .mistakes import ApiError
from .protocol import Ask
from .worker import Job, Worker

logger = logging.getLogger(__name__)

Guard = Callable[[list[dict]], str | None]

# Characters of a stream that are judged at a time, with all before them.
_PORTION = 400
# Tokens that a guard's own instructions and its verdict may take beside a conversation.
AROUND = 1024
# Tokens of a verdict: "unsafe" and a line of categories.
_VERDICT = 24
# Seconds that a verdict may take.
_PATIENCE = 120


class ModelGuard:
    """A model such as Llama Guard, asked in its own chat format for "safe" or "unsafe"."""

    def __init__(self, worker: Worker):
        """Ask a worker, which the caller starts and stops."""
        self._worker, self._engine = worker, worker.engine

    def __call__(self, messages: list[dict]) -> str | None:
        """What the model's "unsafe" names, None for "safe".

        Raises:
          Exception: anything else happened.
        """
        found: concurrent.futures.Future = concurrent.futures.Future()
        text = ""

        def deliver(news):
            nonlocal text
            if isinstance(news, BaseException):
                found.set_exception(news)
            else:
                text += news.text
                if news.finish_reason:
                    found.set_result(text)

        job = Job(self._prompt(messages), Sampling(), _VERDICT, deliver)
        self._engine.check(job.prompt_ids, job.sampling, job.max_tokens)
        self._worker.submit([job])
        try:
            said = found.result(_PATIENCE)
        finally:
            self._worker.cancel([job])
        verdict, *names = said.split() or [""]
        if verdict == "safe":
            return None
        if verdict != "unsafe":
            raise UserError(f"--guard: the model says {said[:40]!r}, not safe or unsafe")
        return " ".join(names) or "unsafe"

    def _prompt(self, messages) -> list[int]:
        tokenizer, turns = self._engine.tokenizer, in_turns(messages)
        # Some templates take a text, others parts, and show nothing of the wrong one.
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        for form in (turns, parts):
            try:
                ids = tokenizer.chat(form)
            except UserError:
                continue
            shown = tokenizer.decode(ids, show_special=True)
            if all(turn["content"].strip() in shown for turn in turns):
                return ids
        raise UserError("--guard: the model's chat template does not show the conversation")


def in_turns(messages: list[dict]) -> list[dict]:
    """A conversation as guards' templates take it: user and assistant in turns, the user first.

    What is not the assistant's, system messages and results of tools too, is the user's.
    """
    turns: list[dict] = []
    for message in messages:
        role = "assistant" if message.get("role") == "assistant" else "user"
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text") or "" for part in content)
        if calls := message.get("tool_calls"):
            content += json.dumps(calls)
        if not turns and role == "assistant":
            turns.append({"role": "user", "content": ""})
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns.append({"role": role, "content": content})
    return turns


def function(name: str) -> Guard | None:
    """The guard called `module:function`, None where the name has another form.

    Raises:
      UserError: there is no such function.
    """
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return None
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--guard={name} must name a function that can be imported: {error}"
                        ) from None  # fmt: skip
    if not callable(found):
        raise UserError(f"--guard={name} must be a function of a list of messages")
    return cast(Guard, found)


class Portion(NamedTuple):
    """Tokens of a choice that have passed or are refused, and with them the rest of it."""

    index: int
    tokens: list[Token]
    refused: bool = False


class Judge:
    """A guard at work for one server."""

    def __init__(self, guard: Guard | None, count: Callable[[str], None]):
        """count: told of each refusal and failure, "input", "output" or "failed"."""
        self._guard, self._count = guard, count

    async def check_input(self, ask: Ask, decode: Callable[[Sequence[int]], str]) -> list:
        """The conversations of a request, one for each prompt; ApiError if one does not pass."""
        if self._guard is None:
            return []
        if ask.media:
            raise _refused("this server's guard does not see pictures or sound", "messages")
        prompts = [p if isinstance(p, str) else decode(p) for p in ask.prompts]
        talks = [[{"role": "user", "content": text}] for text in prompts] or [ask.messages]
        for talk in talks:
            if await self._reason(talk) is not None:
                self._count("input")
                param = "messages" if ask.chat else "prompt"
                raise _refused("this server's guard has refused the request", param)
        return talks

    async def passed(
        self, tokens: AsyncIterator, talks: list, ask: Ask
    ) -> AsyncIterator["Portion | None"]:
        """What may be sent of an answer.

        Args:
          tokens: (choice, `Token`) as they are made; None in a silence. It must not give any of a
            choice that has been refused.

        Yields:
          portions that are judged; None in a silence.

        Raises:
          ApiError: the guard has failed.
        """
        texts: dict[int, str] = {}
        held: dict[int, list[Token]] = {}
        async for news in tokens:
            if news is None:
                yield None
                continue
            index, token = news
            if self._guard is None:
                yield Portion(index, [token])
                continue
            held.setdefault(index, []).append(token)
            texts[index] = texts.get(index, "") + token.text
            size = sum(len(token.text) for token in held[index])
            if not token.finish_reason and (size < _PORTION or not ask.stream):
                continue
            said = {"role": "assistant", "content": texts[index]}
            refused = await self._reason([*talks[index // ask.n], said]) is not None
            if refused:
                self._count("output")
            yield Portion(index, held.pop(index), refused)

    async def _reason(self, talk) -> str | None:
        assert self._guard is not None
        try:
            reason = await asyncio.to_thread(self._guard, talk)
        except Exception as error:
            logger.exception("the guard has failed")
            self._count("failed")
            raise ApiError(
                503, "this server's guard has failed, so nothing is let through",
                code="guard_failed", kind="server_error", headers={"Retry-After": "5"},
            ) from error  # fmt: skip
        return None if reason is None else str(reason) or "refused"


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, message, param, "content_filter")
