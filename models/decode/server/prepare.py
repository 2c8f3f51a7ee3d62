"""From what a request asks for to jobs of the engine."""

import os
from collections.abc import Callable

from ....configs.errors import UserError
from ...media.images import image_size
from .. import conversation, tools
from ..generate import sampling_for
from ..slots import Engine
from .mistakes import ApiError
from .protocol import Ask
from .worker import Job

# OpenAI's default for completions, where a chat takes what there is room for.
_MAX_TOKENS = 16
# Of one picture, which takes three bytes each while it is read.
_MOST_PIXELS = 1 << 24


def prepare(ask: Ask, engine: Engine, most_jobs: int,
            deliver_to: Callable) -> tuple[list[Job], int]:  # fmt: skip
    """The jobs of a request, checked, and the tokens of its prompts.

    Args:
      most_jobs: how many a request may have.
      deliver_to: gives `Job.deliver` for the number of a job.

    Raises:
      ApiError: 400 and what is wrong.
    """
    prompts = _prompts(ask, engine)
    if len(prompts) * ask.n > most_jobs:
        raise ApiError(
            400, f"{len(prompts)} prompts times n={ask.n} is more than the "
            f"{most_jobs} texts that this server takes at a time", "n",
        )  # fmt: skip
    seed = int.from_bytes(os.urandom(4)) if ask.seed is None else ask.seed
    constraint = _constraint(ask, engine)
    jobs = []
    for prompt, tiles, clips in prompts:
        most = ask.max_tokens or (engine.max_length - len(prompt) if ask.chat else _MAX_TOKENS)
        if len(prompt) + max(most, 1) > engine.max_length:
            raise ApiError(
                400, f"the prompt has {len(prompt)} tokens: with max_tokens={max(most, 1)} "
                f"that is more than this server's {engine.max_length}",
                "messages" if ask.chat else "prompt", "context_length_exceeded",
            )  # fmt: skip
        try:
            sampling = sampling_for(engine.tokenizer, seed, **ask.sampling)
            engine.check(prompt, sampling, most, tiles=tiles)
        except UserError as error:
            raise ApiError(400, str(error)) from None
        for i in range(ask.n):
            job = Job(
                prompt, sampling, most, deliver_to(len(jobs)), ask.stop, i, ask.top or 0,
                constraint, ask.adapter, tiles, clips,
            )  # fmt: skip
            jobs.append(job)
    return jobs, sum(len(prompt.ids) for prompt in prompts)


def _prompts(ask, engine) -> list[conversation.Prompt]:
    tokenizer = engine.tokenizer
    if not ask.chat:
        return [
            conversation.Prompt(
                [*tokenizer.begin_ids, *tokenizer.encode(p)] if isinstance(p, str) else p
            )
            for p in ask.prompts
        ]
    try:
        ids = tokenizer.chat(ask.messages, list(ask.tools) or None)
        if ask.tools and ids == tokenizer.chat(ask.messages):
            raise ApiError(400, "this model's chat template knows no tools", "tools")
        _check_sizes(ask)
        prompt = conversation.with_media(
            engine.config, tokenizer, ids, ask.media, engine.max_length
        )
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None
    return [prompt]


def _check_sizes(ask) -> None:
    """Refuse pictures of many pixels before they are unpacked: a small file can have very many."""
    for number, data in enumerate(data for kind, data in ask.media if kind == "image"):
        width, height = image_size(data)
        if width * height > _MOST_PIXELS:
            raise UserError(
                f"picture {number} has {width} x {height} pixels, more than {_MOST_PIXELS:,}"
            )


def _constraint(ask, engine):
    """What the text must match: a format, or a call that must be made or is strict, or either."""
    source, field = ask.grammar, "response_format"
    strict = ask.must_call or any(tool.get("strict") for tool in ask.tools)
    try:
        if ask.tools and (strict or source):
            functions = [t for t in ask.tools if ask.only in ("", t["name"])]
            several, answer = ask.several and not ask.only, source or ""
            if answer:
                engine.constraints.compile(answer)  # so that its mistakes are told as its own
            field = "tools"
            source = tools.grammar(
                engine.tokenizer, functions, several, not ask.must_call,
                "" if ask.must_call else answer,
            )  # fmt: skip
        return None if source is None else engine.constraints.compile(source)
    except UserError as error:
        raise ApiError(400, f"{field}: {error}", field) from None
