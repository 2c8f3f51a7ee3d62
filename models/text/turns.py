"""Which tokens of a conversation its assistant said, end of turn included: what fine-tuning learns.

A template may mark them (`{% generation %}`); where it does not, the conversation up to a turn is
compared with the same one and the turn. Both are found in the rendered text, and a token belongs to
a turn if it holds any byte of it: a token that spans the border is learnt, as in `transformers`.
What could be wrong is refused: a template that rewrites earlier turns, leaves out what was said, or
has no way to say that the assistant's turn comes.
"""

import bisect
import os
from collections.abc import Mapping
from typing import NamedTuple

from ...configs.errors import UserError
from . import chat


class Turns(NamedTuple):
    """ids: of the whole conversation. spans: (start, end) in `ids` of each assistant's turn.

    messages: the number of each turn's message; empty where a template marks parts of turns.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    messages: list[int]


def assistant_turns(
    tokenizer,
    messages: list[dict],
    tools: list | None = None,
    variables: Mapping | None = None,
    longest: int | None = None,
) -> Turns:
    """Return a conversation's ids and where in them the assistant speaks.

    Args are those of `chat.render`; the first message is not the assistant's. longest: turns that
    begin behind so many ids are not looked for: each takes the time of the whole text before it.

    Raises:
      UserError: a malformed conversation, or one whose turns cannot be told apart with certainty.
    """
    whole = chat.render(tokenizer, messages, tools, False, variables)
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    offsets = tokenizer.spans(whole.ids, whole.text)
    starts, ends = offsets[:, 0].tolist(), offsets[:, 1].tolist()
    if whole.spans:
        found = list(whole.spans)
        marked = "".join(whole.text[start:end] for start, end in found)
        for i in said:
            _check_shown(i, messages[i], marked)
    else:
        found = []
        for i in said:
            if longest is not None and longest < len(starts) and found:
                if _bytes(whole.text, found[-1][1]) > starts[longest]:
                    break
            found.append(_span(tokenizer, messages, i, tools, variables, whole.text))
        said = said[: len(found)]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            _check_shown(i, message, whole.text)
    _check_offered(tools, whole.text)
    _check_thoughts(len(messages) - 1, messages[-1], whole.text)
    spans = []
    for start, end in found:
        start, end = (_bytes(whole.text, at) for at in (start, end))
        first = bisect.bisect_right(ends, start)
        last = bisect.bisect_left(starts, end)
        spans.append((first, _turn_end(tokenizer, whole.ids, first, last)))
    return Turns(whole.ids, spans, said if len(said) == len(spans) else [])


def _bytes(text: str, at: int) -> int:
    """Where in the bytes of a text the character `at` begins."""
    return len(text[:at].encode(errors="replace"))


def _span(tokenizer, messages, i, tools, variables, text: str) -> tuple[int, int]:
    """Where in the text of the whole conversation the assistant's message `i` is."""
    before = chat.render(tokenizer, messages[:i], tools, True, variables).text
    last = i + 1 == len(messages)
    upto = text if last else chat.render(tokenizer, messages[: i + 1], tools, False, variables).text
    # The usual case first: the other one goes character by character.
    end = len(upto if text.startswith(upto) else os.path.commonprefix([upto, text]))
    if not text.startswith(before) or end <= len(before):
        raise UserError(
            f"messages[{i}]: the chat template writes earlier turns otherwise once this one is "
            "there, so what the assistant said cannot be told apart: mark it in the template with "
            "{% generation %}"
        )
    _check_shown(i, messages[i], text[len(before) : end])
    content = messages[i].get("content")
    if isinstance(content, str) and content.strip():
        header = text[len(before) : text.index(content.strip(), len(before))]
        if any(name in header for name in tokenizer.special) and (
            before == chat.render(tokenizer, messages[:i], tools, False, variables).text
        ):
            raise UserError(
                f"messages[{i}]: the chat template ignores add_generation_prompt, so the "
                "assistant's header cannot be told from what it said: mark that in the template "
                "with {% generation %}"
            )
    return len(before), end


def _turn_end(tokenizer, ids: list[int], first: int, last: int) -> int:
    """The end of a turn: after its last end token, whether the template put that inside or not."""
    inside = [at for at in range(first, last) if ids[at] in tokenizer.stop_ids]
    if inside:
        return inside[-1] + 1
    return last + (last < len(ids) and ids[last] in tokenizer.stop_ids)


def _check_shown(i: int, message: Mapping, text: str) -> None:
    content = message.get("content")
    parts = content if isinstance(content, list | tuple) else [content]
    for part in parts:
        said = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(said, str) and said.strip() not in text:
            raise UserError(
                f"messages[{i}]: the chat template leaves out or changes the text of this "
                f"{message['role']} message"
            )
    for call in message.get("tool_calls") or ():
        name = call.get("function", call).get("name")
        if name not in text:
            raise UserError(
                f"messages[{i}]: the chat template leaves out the call of {name!r}: it has no tools"
            )


def _check_thoughts(i: int, message: Mapping, text: str) -> None:
    """Of the last message alone: templates leave out what was thought before earlier answers."""
    for key in ("reasoning_content", "reasoning", "thinking"):
        thought = message.get(key)
        if isinstance(thought, str) and thought.strip() not in text:
            raise UserError(f"messages[{i}]: the chat template leaves out its {key}")


def _check_offered(tools, text: str) -> None:
    for tool in tools or ():
        name = tool if isinstance(tool, str) else tool.get("function", tool).get("name")
        if name not in text and name != "code_interpreter":  # is offered without its name
            raise UserError(f"the chat template leaves out the tool {name!r}: it has no tools")
