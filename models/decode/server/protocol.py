"""Requests in the form of OpenAI's API: what a body may say, and errors in its form.

https://platform.openai.com/docs/api-reference/chat and /completions. A field that would change the
answer and is not supported is refused, never ignored, and so is an unknown one.
"""

import base64
import dataclasses
import json
import math
from collections.abc import Sequence

from ..slots import TOP
from . import formats
from .mistakes import ApiError, of

# Accepted, and without effect here.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prediction", "prompt_cache_retention", "prompt_cache_options"),
}
# Not supported: only the value that asks for nothing.
ONLY = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "echo": (False,),
    "suffix": ("",), "best_of": (1,), "repetition_penalty": (1,),
}  # fmt: skip
# Numbers: kind, least, most, what it is. Those of chat and completions alike.
NUMBERS = {
    "max_tokens": (int, 1, 2**31 - 1, "most tokens to make"),
    "temperature": (float, 0, 1e6, "0 = always the likeliest token"),
    "top_p": (float, 0, 1, "sample from the likeliest of this mass; above 0"),
    "top_k": (int, 0, 2**31 - 1, "sample from the k likeliest; 0 = all"),
    "min_p": (float, 0, 1, "least probability / the largest"),
    "seed": (int, -(2**63), 2**63 - 1, "the same seed and request give the same text"),
    "n": (int, 1, 128, "texts for each prompt"),
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_COMMON = {
    *NUMBERS, "model", "stop", "stream", "stream_options", "logprobs", "response_format",
    "structured_outputs",
}  # fmt: skip
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
FIELDS = {
    True: {*_COMMON, *_TOOLS, "messages", "max_completion_tokens", "top_logprobs"},
    False: {*_COMMON, "prompt"},
}
MOST_STOPS, LONGEST_STOP = 16, 1000


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a request asks for.

    model: the name that it asks. adapter: the same where it is that of an adapter, else empty.
    prompts: texts or lists of ids; empty for a chat, which has `messages`.
    media: the pictures and clips in the messages, in order: "image" or "audio", and bytes.
    sampling: what is told of temperature, top_p, top_k and min_p.
    top: likeliest tokens to give beside each; None for no log-probabilities at all.
    grammar: of the text, see `grammar`; None for any text. Calls of functions are allowed besides.
    tools: functions that may be called, empty where none shall be.
    must_call: whether one of them must be, and that named `only` where it is not empty.
    several: whether an answer may have more than one call.
    """

    model: str
    adapter: str
    chat: bool
    prompts: list
    messages: list
    media: tuple[tuple[str, bytes], ...]
    max_tokens: int | None
    sampling: dict[str, float]
    seed: int | None
    n: int
    stop: tuple[str, ...]
    top: int | None
    stream: bool
    usage: bool
    grammar: str | None
    tools: tuple[dict, ...]
    must_call: bool
    only: str
    several: bool


def parse(data: bytes, chat: bool, model: str, adapters: Sequence[str] = ()) -> Ask:
    """Read the body of a request.

    Args:
      chat: whether it is one of /v1/chat/completions.
      model: the name of the model that is served, which a request without one asks.
      adapters: names of the model with an adapter.

    Raises:
      ApiError: 400 and what is wrong, or 404 for another model.
    """
    body = _object(data)
    body = {key: value for key, value in body.items() if value is not None}
    for key, value in body.items():
        if key in ONLY:
            if value not in ONLY[key]:
                raise ApiError(400, f"{key} is not supported here", key, "unsupported_parameter")
        elif key not in FIELDS[chat] and key not in IGNORED:
            raise ApiError(400, f"unknown field {key!r:.60}", None, "unknown_parameter")
    wanted = of(body, "model", str, model)
    if wanted not in (model, *adapters):
        there = ", ".join(map(repr, (model, *adapters)))
        raise ApiError(
            404,
            f"the model {wanted!r:.200} is not here; there is {there}",
            "model",
            "model_not_found",
        )
    numbers = {name: _number(body, name) for name in NUMBERS}
    max_tokens = numbers["max_tokens"]
    if chat and "max_completion_tokens" in body:
        max_tokens = _number(body, "max_completion_tokens", "max_tokens")
    if numbers["top_p"] == 0:
        raise ApiError(400, "top_p must be above 0", "top_p")
    options = of(body, "stream_options", dict, {})
    usage = of(options, "include_usage", bool, False)
    stream = of(body, "stream", bool, False)
    tools, must_call, only = formats.tools(body) if chat else ((), False, "")
    source = formats.grammar(body)
    if tools and source and "structured_outputs" in body:
        raise ApiError(400, "tools and structured_outputs cannot be combined", "tools")
    messages, media = _messages(body) if chat else ([], ())
    return Ask(
        model=wanted,
        adapter="" if wanted == model else wanted,
        chat=chat,
        prompts=[] if chat else _prompts(body),
        messages=messages,
        media=media,
        max_tokens=max_tokens,
        sampling={name: numbers[name] for name in _SAMPLING if numbers[name] is not None},
        seed=numbers["seed"],
        n=numbers["n"] or 1,
        stop=_stop(body),
        top=_top(body, chat),
        stream=stream,
        usage=stream and usage,
        grammar=source,
        tools=tools,
        must_call=must_call,
        only=only,
        several=of(body, "parallel_tool_calls", bool, True),
    )


def _object(data: bytes) -> dict:
    def refuse(name):
        raise ValueError(name)

    try:
        body = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body


def _number(body, name, rule=None):
    kind, least, most, _ = NUMBERS[rule or name]
    value = body.get(name)
    if value is None:
        return None
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not whole):
        raise ApiError(400, f"{name} must be {'an integer' if kind is int else 'a number'}", name)
    if not least <= value <= most:  # also for NaN
        raise ApiError(400, f"{name} must lie in {least:,}..{most:,}", name)
    return kind(value)


def _prompts(body) -> list:
    given = body.get("prompt")
    if _are_ids(given) or isinstance(given, str):
        given = [given]
    good = isinstance(given, list) and given
    if not good or not all(isinstance(p, str) or _are_ids(p) for p in given):
        raise ApiError(400, "prompt must be a text, a list of ids, or a list of those", "prompt")
    return given


def _are_ids(value) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _messages(body) -> tuple[list[dict], tuple[tuple[str, bytes], ...]]:
    """The messages, with {"type": "image"} for each picture and clip, and these."""
    messages = of(body, "messages", list, [])
    if not messages:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    checked, media = [], []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ApiError(400, f"messages[{i}] must be an object", "messages")
        content = message.get("content")
        parts = []
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image_url":
                media.append(("image", _picture(part, f"messages[{i}]")))
                part = {"type": "image"}
            elif kind == "input_audio":
                media.append(("audio", _clip(part, f"messages[{i}]")))
                part = {"type": "image"}
            elif kind == "refusal":  # what an assistant said instead of an answer
                part = {"type": "text", "text": part.get("refusal")}
            elif kind != "text":
                raise ApiError(
                    400, f"messages[{i}]: only parts of type text, image_url and input_audio are "
                    "supported", "messages",
                )  # fmt: skip
            parts.append(part)
        # OpenAI's newer name of it.
        role = "system" if message.get("role") == "developer" else message.get("role")
        made = {**message, "role": role} | ({"content": parts} if parts else {})
        if role == "assistant" and content is None and not message.get("tool_calls"):
            made["content"] = message.get("refusal") or ""  # it may have said nothing
        checked.append(made)
    return checked, tuple(media)


def _picture(part: dict, name: str) -> bytes:
    """The bytes of an image_url part, of data: URLs only: nothing is fetched."""
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    head, _, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (head.lower().startswith("data:") and head.lower().endswith(";base64")):
        raise ApiError(400, f"{name}: a picture must be a data: URL in base64", "messages")
    return _decoded(data, f"{name}: the picture")


def _clip(part: dict, name: str) -> bytes:
    """The bytes of an input_audio part."""
    given = part.get("input_audio")
    given = given if isinstance(given, dict) else {}
    data = given.get("data")
    if not isinstance(data, str):
        raise ApiError(
            400, f"{name}: input_audio must have data, a WAV file in base64, and format", "messages"
        )
    if given.get("format") != "wav":
        raise ApiError(
            400, f"{name}: input_audio.format={given.get('format')!r:.40} must be 'wav'", "messages"
        )
    return _decoded(data, f"{name}: the clip")


def _decoded(data: str, what: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise ApiError(400, f"{what} is not base64", "messages") from None


def _stop(body) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
        raise ApiError(400, "stop must be a text or a list of texts", "stop")
    if len(stop) > MOST_STOPS or not all(0 < len(s) <= LONGEST_STOP for s in stop):
        raise ApiError(
            400,
            f"stop takes at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters",
            "stop",
        )
    return tuple(stop)


def _top(body, chat) -> int | None:
    if not chat:
        return _integer_to_top(body, "logprobs")
    on = of(body, "logprobs", bool, False)
    top = _integer_to_top(body, "top_logprobs")
    if top is not None and not on:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    return (top or 0) if on else None


def _integer_to_top(body, name) -> int | None:
    value = body.get(name)
    if value is not None and (type(value) is not int or not 0 <= value <= TOP):
        raise ApiError(400, f"{name} must be an integer in 0..{TOP}", name)
    return value


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999."""
    return max(logprob, -9999.0) if math.isfinite(logprob) else -9999.0
