"""What a request says of the form of its answer: `response_format`, `structured_outputs`, `tools`.

https://platform.openai.com/docs/guides/structured-outputs and /function-calling; a regular
expression and choices as vLLM's clients ask for them. What is asked for is held to always: `strict`
decides only whether calls that the model is free to make are.
"""

import re

from ....configs.errors import UserError
from .. import grammar as grammars
from .mistakes import ApiError, of

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST = 128  # tools, as OpenAI has it
_MOST_CHOICES = 4096


def grammar(body: dict) -> str | None:
    """The grammar that a body asks for, None for any text.

    Raises:
      ApiError: 400; a schema or pattern that makes no sense is found when it is compiled.
    """
    try:
        found = [x for x in (_response_format(body), _structured(body)) if x is not None]
    except UserError as error:
        raise ApiError(400, str(error)) from None
    if len(found) > 1:
        raise ApiError(
            400, "response_format and structured_outputs: give one of them", "structured_outputs"
        )
    return found[0] if found else None


def _response_format(body):
    name = "response_format"
    asked = of(body, name, dict, {"type": "text"})
    kind = asked.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return grammars.json_schema({"type": "object"})
    if kind != "json_schema":
        raise ApiError(400, f"{name}.type must be text, json_object or json_schema", name)
    inner = of(asked, "json_schema", dict, {})
    if not isinstance(inner.get("schema"), dict):
        raise ApiError(400, f"{name}.json_schema.schema must be an object", name)
    return grammars.json_schema(inner["schema"])


def _structured(body):
    name = "structured_outputs"
    asked = of(body, name, dict, None)
    if asked is None:
        return None
    given = {key: value for key, value in asked.items() if value is not None}
    if len(given) != 1 or not given.keys() <= {"json", "regex", "choice"}:
        raise ApiError(400, f"{name} must have one of json, regex and choice", name)
    [(kind, value)] = given.items()
    if kind == "json" and isinstance(value, dict):
        return grammars.json_schema(value)
    if kind == "regex" and isinstance(value, str):
        return grammars.regex(value)
    texts = isinstance(value, list) and 0 < len(value) <= _MOST_CHOICES
    if kind == "choice" and texts and all(isinstance(x, str) and x for x in value):
        return grammars.choices(value)
    raise ApiError(
        400, f"{name}.json must be an object, regex a text, choice a list of texts", name
    )


def tools(body: dict) -> tuple[tuple[dict, ...], bool, str]:
    """The functions that may be called, whether one must be, and the name of the one that must.

    There are none where `tool_choice` is none.

    Raises:
      ApiError: 400.
    """
    functions = tuple(_function(i, tool) for i, tool in enumerate(of(body, "tools", list, [])))
    names = [function["name"] for function in functions]
    if len(names) > _MOST:
        raise ApiError(400, f"tools has {len(names)}: at most {_MOST}", "tools")
    if len(set(names)) < len(names):
        raise ApiError(400, "tools has two functions of one name", "tools")
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict) and choice.get("type", "function") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in names:
            raise ApiError(400, "tool_choice names a function that tools lacks", "tool_choice")
        return functions, True, name
    if choice not in ("none", "auto", "required"):
        raise ApiError(
            400, "tool_choice must be none, auto, required or name a function", "tool_choice"
        )
    if choice == "required" and not names:
        raise ApiError(400, "tool_choice=required needs tools", "tool_choice")
    return () if choice == "none" else functions, choice == "required", ""


def _function(i, tool) -> dict:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise ApiError(
            400, f"tools[{i}] must be {{'type': 'function', 'function': {{...}}}}", "tools"
        )
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ApiError(
            400, f"tools[{i}]: the name must be 1 to 64 of letters, digits, _ and -", "tools"
        )
    given = {key: value for key, value in function.items() if value is not None}
    for key, kind in (("description", str), ("parameters", dict), ("strict", bool)):
        if not isinstance(given.get(key, kind()), kind):
            raise ApiError(400, f"tools[{i}]: {key} is of a wrong type", "tools")
    return given
