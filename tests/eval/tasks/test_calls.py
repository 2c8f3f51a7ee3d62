"""Calls of functions in an answer against a table of right and wrong ones."""

import json

import pytest

from puna.configs.errors import UserError
from puna.eval.tasks import calls

TOOLS = [
    {"name": "weather", "parameters": {
        "type": "object", "required": ["town"], "properties": {
            "town": {"type": "string"}, "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "hours": {"type": "array", "items": {"type": "integer"}}}}},
    {"name": "stop"},
]  # fmt: skip
PUNO = '{"name": "weather", "arguments": {"town": "Puno", "days": 2}}'
BOTH = f'[{PUNO}, {{"name": "stop", "arguments": {{}}}}]'
# Target, answer, and what it scores: arguments, function, valid.
TABLE = [
    (PUNO, PUNO, "111"), (PUNO, PUNO.replace("arguments", "parameters"), "111"),
    (PUNO, f"<tool_call>{PUNO}</tool_call>", "111"),
    (PUNO, "[weather(town='Puno', days=2)]", "111"),
    (PUNO, '<function=weather>{"days": 2.0, "town": "Puno "}</function>', "111"),
    (PUNO, "[weather(town='Puno', days=2.5)]", "010"),
    (PUNO, '<|python_tag|>{"name": "weather", "parameters": {"town": "Puno", "days": 2}}', "111"),
    (PUNO, f"I call it now: <tool_call>{PUNO}</tool_call>", "111"), (PUNO, f"I call {PUNO}", "000"),
    (PUNO, "[weather(town='Cusco', days=2)]", "011"), (PUNO, "[weather(town='Puno')]", "011"),
    (PUNO, "[weather(days=2)]", "010"), (PUNO, "[weather(town=3, days=2)]", "010"),
    (PUNO, "[weather(town='Puno', days=True)]", "010"), (PUNO, "[weather(town='x', y=1)]", "010"),
    (PUNO, "[weather(town='x', unit='K')]", "010"), (PUNO, "[weather(town='x', unit='C')]", "011"),
    (PUNO, "[weather(town='x', hours=[1, 2])]", "011"),
    (PUNO, "[weather(town='x', hours=['a'])]", "010"),
    (PUNO, "[stop()]", "001"), (PUNO, "[stop(a=1)]", "000"), (PUNO, "[other(town='Puno')]", "000"),
    (PUNO, "[weather(town='Puno', days=2), stop()]", "001"), (PUNO, "", "000"),
    (PUNO, "The weather is fine.", "000"), (PUNO, '{"name": "weather", "arguments": ', "000"),
    (BOTH, "[stop(), weather(town='Puno', days=2)]", "111"), (BOTH, PUNO, "001"),
    ("[]", "No function helps here.", "111"), ("[]", "[stop()]", "000"), ("[]", "", "111"),
]  # fmt: skip


def test_right_and_wrong_calls():
    tools = calls.functions(TOOLS)
    wrong = []
    for target, answer, score in TABLE:
        found = calls.scores(answer, tools, target)
        got = "".join(str(int(found[name])) for name in ("arguments", "function", "valid"))
        if got != score:
            wrong.append((answer, got, score))
    assert not wrong


@pytest.mark.parametrize("target", ["", "3", "[1]", '{"name": 3}', '{"name": "x", "arguments": 1}'])
def test_targets_that_are_no_calls(target):
    with pytest.raises(UserError, match="must be"):
        calls.wanted(target)


def test_functions_in_both_forms():
    assert calls.functions([{"type": "function", "function": TOOLS[0]}]) == TOOLS[:1]
    for wrong in ([{"parameters": {}}], "weather", [{"name": "x", "parameters": []}]):
        with pytest.raises(UserError, match="is no function"):
            calls.functions(json.loads(json.dumps(wrong)))
