"""What the server understands, as an OpenAPI document."""

from .protocol import FIELDS, NUMBERS

_TYPES = {
    "model": {"type": "string"},
    "messages": {"type": "array", "items": {"type": "object"}},
    "prompt": {"oneOf": [{"type": "string"}, {"type": "array", "items": {}}]},
    "stop": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "stream": {"type": "boolean"},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": "boolean"}},
    },
    "top_logprobs": {"type": "integer"},
    "max_completion_tokens": {"type": "integer", "minimum": 1},
}


def document() -> dict:
    """The document, version 3.1."""
    paths = {
        f"/v1/{name}": {"post": _post(chat)}
        for name, chat in (("completions", False), ("chat/completions", True))
    }
    paths |= {
        path: {"get": {"responses": {"200": {"description": "OK"}}}}
        for path in ("/v1/models", "/v1/models/{model}", "/health", "/metrics")
    }
    paths["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "puna serve", "version": "1"},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _post(chat: bool) -> dict:
    fields = {name: _TYPES.get(name, {}) for name in sorted(FIELDS[chat])}
    fields["logprobs"] = {"type": "boolean" if chat else "integer"}
    for name, (kind, least, most, doc) in NUMBERS.items():
        fields[name] = {
            "type": "integer" if kind is int else "number",
            "minimum": least, "maximum": most, "description": doc,
        }  # fmt: skip
    schema = {
        "type": "object", "properties": fields, "required": ["messages" if chat else "prompt"],
    }  # fmt: skip
    statuses = {
        "200": "the answer, or its events where stream is true", "400": "a bad request",
        "401": "no or a wrong API key", "404": "another model", "413": "too large a body",
        "429": "busy: Retry-After says when", "503": "the server is ending",
    }  # fmt: skip
    return {
        "security": [{"key": []}, {}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {status: {"description": text} for status, text in statuses.items()},
    }
