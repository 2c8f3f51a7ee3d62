"""Calls of functions in an answer: whether they are valid, of the right functions, with the right
arguments.

`models/decode/tools.py` reads the forms in which Llamas write calls. Arguments are held to the part
of JSON schema that describes parameters: type, enum, required, properties, items. A property that
the schema does not name makes a call invalid.
"""

import json
from collections.abc import Sequence
from typing import Any

from ...configs.errors import UserError
from ...models.decode.tools import Call, Calls

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    "array": (list,), "object": (dict,), "null": (type(None),),
}  # fmt: skip


def functions(tools: Any) -> list[dict]:
    """The functions of a record: {"name", "parameters"}, or those inside {"function": ...}.

    Raises:
      UserError: one has no name, or parameters that are no object.
    """
    tools = tools if isinstance(tools, list) else [tools]
    found = [t.get("function", t) if isinstance(t, dict) else t for t in tools]
    for function in found:
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not named or not isinstance(function.get("parameters", {}), dict):
            raise UserError(f"{str(function)[:80]} is no function: it needs a name and parameters")
    return found


def wanted(target: str) -> list[tuple[str, dict]]:
    """The calls that a target names: JSON of {"name", "arguments"}, one or a list; [] for none.

    Raises:
      UserError: it is something else.
    """
    try:
        told = json.loads(target)
    except ValueError as error:
        raise UserError(f"target={target[:80]!r} must be calls in JSON: {error}") from None
    calls = []
    for call in told if isinstance(told, list) else [told]:
        arguments = call.get("arguments", {}) if isinstance(call, dict) else None
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            raise UserError(
                f'target={target[:80]!r} must be {{"name": ..., "arguments": {{...}}}}, or a list'
            )
        calls.append((call["name"], arguments))
    return calls


def scores(answer: str, tools: Sequence[dict], target: str) -> dict[str, float]:
    """Scores of an answer.

    Args:
      answer: text, with the control tokens around calls.
      tools: `functions` of the record.
      target: see `wanted`; calls may come in any order.

    Returns:
      valid: there are calls, all of them to functions that were offered and with arguments that
      their schemas allow. function: the right functions, each as often as wanted. arguments: and
      with the right arguments. Where no call is wanted all three say that there is none.
    """
    schemas = {f["name"]: f.get("parameters", {}) for f in tools}
    parts = Calls(list(schemas)).add(answer, final=True)
    made = [(c.name, json.loads(c.arguments)) for c in parts if isinstance(c, Call)]
    right = wanted(target)
    if not right:
        return dict.fromkeys(("valid", "function", "arguments"), float(not made))
    valid = bool(made) and all(_allows(schemas[name], given, True) for name, given in made)
    names = sorted(name for name, _ in made) == sorted(name for name, _ in right)
    same = sorted(map(_plain, made)) == sorted(map(_plain, right))
    return {"valid": float(valid), "function": float(names), "arguments": float(same)}


def _plain(call: tuple[str, dict]) -> str:
    """A call as text that equal calls share: 1 and 1.0 are one number, blanks at ends are none."""
    return json.dumps([call[0], _folded(call[1])], sort_keys=True)


def _folded(value):
    if isinstance(value, dict):
        return {key: _folded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_folded(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value


def _allows(schema, value, is_object: bool = False) -> bool:
    """Whether a schema allows a value; `is_object` where it need not say so."""
    if not isinstance(schema, dict):
        return True
    kinds = schema.get("type", "object" if is_object else ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    allowed = tuple(t for kind in kinds for t in _TYPES.get(kind, (object,)))
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as JSON schema has it
    if allowed and not isinstance(value, allowed):
        return False
    if isinstance(value, bool) and allowed and bool not in allowed and object not in allowed:
        return False  # a number to Python
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, list):
        return all(_allows(schema.get("items"), item) for item in value)
    if not isinstance(value, dict):
        return True
    properties = schema.get("properties", {})
    named = properties or is_object
    return all(key in value for key in schema.get("required", ())) and all(
        _allows(properties[key], item) if key in properties else not named
        for key, item in value.items()
    )
