"""What the server understands and answers, as an OpenAPI document."""

from collections.abc import Sequence

from ..slots import TOP
from .protocol import FIELDS, IGNORED, LONGEST_STOP, MOST_STOPS, NUMBERS, ONLY

_TEXT, _FLAG, _OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}


def _nullable(schema: dict) -> dict:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: dict, **rules) -> dict:
    return {"type": "array", "items": items, **rules}


def _fields(required, **properties) -> dict:
    return {"type": "object", "required": required, "properties": properties}


_PICTURE = _fields(
    ["type", "image_url"], type={"const": "image_url"},
    image_url=_fields(["url"], url={"type": "string", "pattern": "^data:.*;base64,"}),
)  # fmt: skip
_CLIP = _fields(
    ["type", "input_audio"], type={"const": "input_audio"},
    input_audio=_fields(["data", "format"], data={**_TEXT, "contentEncoding": "base64"},
                        format={"const": "wav"}),
)  # fmt: skip
_FUNCTION = _fields(
    ["name"], name={"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}, description=_TEXT,
    parameters=_OBJECT, strict=_FLAG,
)  # fmt: skip
_CALL = _fields(
    ["id", "type", "function"], id=_TEXT, type={"const": "function"},
    function=_fields(
        ["name", "arguments"], name={**_TEXT, "minLength": 1}, arguments=_TEXT
    ),
)  # fmt: skip
_STOP = {**_TEXT, "minLength": 1, "maxLength": LONGEST_STOP}
_TYPES = {
    "stop": {"anyOf": [_STOP, _list(_STOP, maxItems=MOST_STOPS)]},
    "stream": _FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}},
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": TOP},
    "response_format": {
        "anyOf": [
            _fields(["type"], type={"enum": ["text", "json_object"]}),
            _fields(
                ["type", "json_schema"], type={"const": "json_schema"},
                json_schema=_fields(["name", "schema"], name=_TEXT, schema=_OBJECT, strict=_FLAG),
            ),
        ],
    },
    "structured_outputs": {
        "type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False,
        "properties": {
            "regex": _TEXT, "json": _OBJECT,
            "choice": _list({**_TEXT, "minLength": 1}, minItems=1),
        },
    },
    "tools": _list(_fields(["type", "function"], type={"const": "function"}, function=_FUNCTION),
                   maxItems=128),
    "tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required"]},
            _fields(["type", "function"], type={"const": "function"},
                    function=_fields(["name"], name=_TEXT)),
        ],
    },
    "parallel_tool_calls": _FLAG,
}  # fmt: skip
_STATUSES = {
    "400": "a bad request", "401": "no or a wrong API key", "403": "a page of another site",
    "404": "another model", "413": "too large a body", "429": "busy: Retry-After says when",
    "503": "the server is ending, or its guard has failed",
}  # fmt: skip
_ERROR = _fields(
    ["error"], error=_fields(
        ["message", "type", "param", "code"], message=_TEXT, type=_TEXT, param=_nullable(_TEXT),
        code=_nullable(_TEXT),
    ),
)  # fmt: skip
_MODEL = _fields(
    ["id", "object", "created", "owned_by"], id=_TEXT, object={"const": "model"},
    created={"type": "integer"}, owned_by=_TEXT, max_model_len={"type": "integer"}, parent=_TEXT,
)  # fmt: skip


def document(models: Sequence[str], max_length: int, vocab_size: int, pictures: bool,
             sound: bool) -> dict:  # fmt: skip
    """The document, version 3.1, of a server.

    Args:
      models: their names. max_length: most tokens of a text with its prompt.
      vocab_size: ids are below it. pictures, sound: whether messages may have some.
    """
    ids = _list({"type": "integer", "minimum": 0, "maximum": vocab_size - 1}, minItems=1)
    prompt = {"anyOf": [_TEXT, ids, _list({"anyOf": [_TEXT, ids]}, minItems=1)]}
    messages = {"messages": _messages(pictures, sound)}
    path = {"name": "model", "in": "path", "required": True, "schema": {**_TEXT, "minLength": 1}}
    listed = _fields(["object", "data"], object={"const": "list"}, data=_list(_MODEL))
    health = _fields(["status"], status=_TEXT)
    return {
        "openapi": "3.1.0",
        "info": {"title": "puna serve", "version": "1"},
        "paths": {
            "/v1/completions": {"post": _post(False, {"prompt": prompt}, models, max_length)},
            "/v1/chat/completions": {"post": _post(True, messages, models, max_length)},
            "/v1/models": {"get": _get(listed, "401", "403")},
            "/v1/models/{model}": {
                "parameters": [{**path, "example": models[0]}],
                "get": _get(_MODEL, "401", "403", "404"),
            },
            "/health": {
                "get": {"responses": {
                    "200": _json("OK", health), "503": _json("the engine has stopped", health),
                }},
            },
            "/metrics": {
                "get": {"responses": {"200": {"description": "OK", "content": {"text/plain": {}}}}},
            },
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }  # fmt: skip


def _json(description: str, schema: dict) -> dict:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _errors(*statuses: str) -> dict:
    return {status: _json(_STATUSES[status], _ERROR) for status in statuses}


def _get(schema: dict, *statuses: str) -> dict:
    responses = {"200": _json("OK", schema), **_errors(*statuses)}
    return {"security": [{"key": []}, {}], "responses": responses}


def _messages(pictures: bool, sound: bool) -> dict:
    part = _fields(["type", "text"], type={"const": "text"}, text=_TEXT)
    parts = _list({"anyOf": [part, *[_PICTURE] * pictures, *[_CLIP] * sound]})
    content = {"anyOf": [_TEXT, parts]}
    said = _fields(
        ["role", "content"], role={"enum": ["system", "developer", "user", "assistant"]},
        content=content, name=_TEXT,
    )  # fmt: skip
    called = _fields(
        ["role", "tool_calls"], role={"const": "assistant"}, content=_nullable(content),
        tool_calls=_list(_CALL, minItems=1), name=_TEXT,
    )  # fmt: skip
    given = _fields(
        ["role", "content"], role={"const": "tool"}, content=content, tool_call_id=_TEXT
    )
    return _list({"anyOf": [said, called, given]}, minItems=1)


def _post(chat: bool, needed: dict, models: Sequence[str], max_length: int) -> dict:
    fields = {name: _TYPES.get(name, {}) for name in sorted(FIELDS[chat])}
    fields["logprobs"] = _FLAG if chat else {"type": "integer", "minimum": 0, "maximum": TOP}
    for name, (kind, least, most, doc) in NUMBERS.items():
        fields[name] = {
            "type": "integer" if kind is int else "number",
            "minimum": least, "maximum": most, "description": doc,
        }  # fmt: skip
    fields["top_p"] |= {"exclusiveMinimum": fields["top_p"].pop("minimum")}
    fields["model"] = {"enum": list(models)}
    for name in {"max_tokens", "max_completion_tokens"} & fields.keys():
        fields[name] = {**fields["max_tokens"], "maximum": max_length}
    fields |= {name: {"enum": list(values)} for name, values in ONLY.items()}
    fields = {name: _nullable(schema) for name, schema in fields.items()}
    fields |= {name: {} for name in sorted(IGNORED)} | needed
    # Which fields go together, the schema does not say: these values go with any of the others.
    examples = {"response_format": {"type": "text"}, "structured_outputs": None}
    if chat:
        examples |= {"logprobs": True, "tool_choice": "auto"}
    for name, value in examples.items():
        fields[name] |= {"examples": [value]}
    whole = {**_fields(list(needed), **fields), "additionalProperties": False}
    body = {"application/json": {"schema": whole}}
    answer = _json("the answer, or its events where stream is true", _answer(chat))
    answer["content"]["text/event-stream"] = {}
    return {
        "security": [{"key": []}, {}],
        "requestBody": {"required": True, "content": body},
        "responses": {"200": answer, **_errors(*_STATUSES)},
    }


def _answer(chat: bool) -> dict:
    reason = {"enum": ["stop", "length", "tool_calls", "content_filter"]}
    message = _fields(
        ["role", "content"], role={"const": "assistant"}, content=_nullable(_TEXT),
        tool_calls=_list(_CALL),
    )  # fmt: skip
    said = {"message": message} if chat else {"text": _TEXT}
    choice = _fields(
        ["index", *said, "finish_reason", "logprobs"], index={"type": "integer"},
        finish_reason=reason, logprobs=_nullable(_OBJECT), **said,
    )  # fmt: skip
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    return _fields(
        ["id", "object", "created", "model", "choices", "usage"], id=_TEXT,
        object={"const": "chat.completion" if chat else "text_completion"},
        created={"type": "integer"}, model=_TEXT, choices=_list(choice),
        usage=_fields(list(counts), **{name: {"type": "integer"} for name in counts}),
    )  # fmt: skip
