"""Conversations to ids, in the formats of Llama 2, 3 and 4 or by the tokenizer's own template.

The built-in formats follow Meta's encoders: llama/generation.py for Llama 2, and
llama_models/llama{3,4}/chat_format.py with prompt_format.md for the tools of Llama 3 and 4. There
every piece of a message is encoded as plain text by itself, so that no message can contain a
control token, and text is not stripped. A `chat_template` beside the tokenizer takes precedence;
its formats differ from Meta's in small ways (Hugging Face's Llama 4 ends tool calls with <|eot|>
where Meta writes <|eom|>), and its hazards are those of `template.py`.
"""

import json
import re
from collections.abc import Iterator, Mapping

from ...configs.errors import UserError
from . import template

ROLES = ("system", "user", "assistant", "tool", "ipython")

# Llama 3.1's own tools, which it calls as code rather than as JSON.
_BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "photogen", "code_interpreter")

# Llama 2 has no control tokens inside a turn, only these words; a message may not hold them.
_LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

_LLAMA3_TOOLS = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n{functions}\n\n"
    "Return function calls in JSON format."
)
_LLAMA4_TOOLS = (
    "Here is a list of functions in JSON format that you can invoke:\n{functions}\n\n"
    "Should you decide to return the function call(s), put them in the format of "
    "[func1(params_name=params_value, params_name2=params_value2...), func2(params)]\n\n"
    "You SHOULD NOT include any other text in the response."
)

# How a template looks into the parts of a content. One that does not would print their list.
_PARTS = re.compile(r"""\.text\b|['"](text|image)['"]""")


class Control(str):
    """The name of a control token, where plain `str` is text."""


def encode_messages(
    tokenizer,
    messages: list[dict],
    tools: list | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping | None = None,
) -> list[int]:
    """Return the ids of a conversation; arguments and errors are those of `render`."""
    return render(tokenizer, messages, tools, add_generation_prompt, variables).ids


def render(
    tokenizer,
    messages: list[dict],
    tools: list | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping | None = None,
) -> template.Rendered:
    """Return a conversation as a model reads it.

    Args:
      tokenizer: its `chat_template`, else its control tokens, decide the format.
      messages: dicts with "role" (one of `ROLES`; "tool" and "ipython" are results of tools) and
        "content": a string, or a list of {"type": "text", "text": ...} and {"type": "image"}. An
        image (Llama 3.2 Vision, Llama 4) becomes one <|image|> token. An assistant may have
        "tool_calls": [{"function": {"name": ..., "arguments": {...} or its JSON}}].
      tools: functions as {"type": "function", "function": {"name", "description", "parameters"}}
        or the inner dict; for Llama 3 also the names of its own tools ("brave_search", ...).
      add_generation_prompt: end with the header of an assistant's message. Llama 2 has none: its
        prompt ends where the user's message does.
      variables: more names for a template to see, for instance {"date_string": "26 Jul 2024"}:
        Llama 3's templates otherwise write today's date.

    Raises:
      UserError: a malformed message, a format that cannot express it, or a failing template.
    """
    messages, tools = _checked_messages(messages), _checked_tools(tools)
    if tokenizer.chat_template:
        return _with_template(tokenizer, messages, tools, add_generation_prompt, variables or {})
    for i, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise _bad(i, f"role {message['role']!r} is not one of {', '.join(ROLES)}")
    special = tokenizer.special
    if "<|header_start|>" in special and "<|eot|>" in special:
        pieces = _llama4(messages, tools, "<|eom|>" if "<|eom|>" in special else "<|eot|>")
        header = ("<|header_start|>", "<|header_end|>")
    elif "<|start_header_id|>" in special and "<|eot_id|>" in special:
        pieces = _llama3(tokenizer, messages, tools)
        header = ("<|start_header_id|>", "<|end_header_id|>")
    elif "<s>" in special and "</s>" in special:
        pieces, header = _llama2(messages, tools, add_generation_prompt), None
    else:
        raise UserError(
            "this tokenizer has no chat format: it lacks a chat_template and the control tokens "
            "of Llama 2, 3 and 4"
        )
    if header:
        pieces = [Control("<|begin_of_text|>"), *pieces]
        pieces += _header(*header, "assistant") if add_generation_prompt else []
    return template.Rendered("".join(pieces), None, lambda: _ids(tokenizer, pieces))


def _ids(tokenizer, pieces: list[str]) -> list[int]:
    ids = []
    for piece in pieces:
        if not isinstance(piece, Control):
            ids += tokenizer.encode(piece)
        elif piece in tokenizer.special:
            ids.append(tokenizer.special[piece])
        else:
            raise UserError(f"this tokenizer lacks {piece}, which the conversation needs")
    return ids


def _header(start: str, end: str, role: str) -> list[str]:
    return [Control(start), "ipython" if role == "tool" else role, Control(end), "\n\n"]


def _llama2(messages: list[dict], tools: list, add_generation_prompt: bool) -> list[str]:
    """`<s>[INST] <<SYS>> system <</SYS>> user [/INST] answer </s>`, a turn at a time."""
    if tools or any(m["role"] in ("tool", "ipython") or m["tool_calls"] for m in messages):
        raise UserError("Llama 2's chat format has no tools")
    turns = []
    for i, message in enumerate(messages):
        text = "".join(_text_only(i, message, "Llama 2")).strip()
        tag = next((tag for tag in _LLAMA2_TAGS if tag in text), None)
        if tag:
            raise _bad(i, f"the text holds {tag}, which steers Llama 2's format: take it out")
        turns.append((message["role"], text))
    if turns[0][0] == "system":
        if len(turns) == 1:
            raise _bad(0, "a system prompt needs a user's message after it")
        # Meta strips turns only after putting the system prompt, itself unstripped, in front.
        system = "".join(_text_only(0, messages[0], "Llama 2"))
        user = "".join(_text_only(1, messages[1], "Llama 2"))
        turns[:2] = [(turns[1][0], f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}".strip())]
    offset = len(messages) - len(turns)
    for i, (role, _) in enumerate(turns):
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            raise _bad(i + offset, f"role {role!r} where Llama 2's format needs {wanted!r}")
    if add_generation_prompt and len(turns) % 2 == 0:
        raise _bad(len(messages) - 1, "Llama 2 can answer only a user's message")
    pieces: list[str] = []
    for i in range(0, len(turns), 2):
        pieces.append(Control("<s>"))
        if i + 1 < len(turns):
            pieces += [f"[INST] {turns[i][1]} [/INST] {turns[i + 1][1]} ", Control("</s>")]
        else:
            pieces.append(f"[INST] {turns[i][1]} [/INST]")
    return pieces


def _llama3(tokenizer, messages: list[dict], tools: list) -> list[str]:
    """Llama 3.x: own tools are named in the system message, functions in a user's message.

    A tokenizer with <|image|> is that of 3.2 Vision, whose users give images.
    """
    own = [tool for tool in tools if isinstance(tool, str)]
    functions = [{"type": "function", "function": t} for t in tools if not isinstance(t, str)]
    pieces: list[str] = []

    def message(role: str, content: list[str], end: str = "<|eot_id|>"):
        pieces.extend(_header("<|start_header_id|>", "<|end_header_id|>", role))
        pieces.extend([*content, Control(end)])

    rest = list(enumerate(messages))
    if own:
        # The code interpreter is on wherever the environment is, and not listed.
        listed = ", ".join(name for name in own if name != "code_interpreter")
        environment = "Environment: ipython\n" + (f"Tools: {listed}\n" if listed else "")
        if messages[0]["role"] == "system":
            text = "".join(_text_only(0, rest.pop(0)[1], "Llama 3"))
            environment += f"\n{text}"
        message("system", [environment])
    elif messages[0]["role"] == "system":
        message("system", _text_only(0, rest.pop(0)[1], "Llama 3"))
    if functions:
        listed = "\n".join(_json(function, indent=4) for function in functions)
        message("user", [_LLAMA3_TOOLS.replace("{functions}", listed)])
    for i, m in rest:
        if m["role"] == "user" and "<|image|>" in tokenizer.special:
            content = [Control("<|image|>") if part is None else part for part in m["content"]]
        else:
            content = _text_only(i, m, "Llama 3")
        end = "<|eot_id|>"
        if len(m["tool_calls"]) > 1:
            raise _bad(i, "Llama 3 makes one tool call at a time")
        for name, arguments in m["tool_calls"]:
            own_call = _own_call(name, arguments)
            if own_call is not None:
                # The program continues here, not the user: end of message.
                content, end = [*content, Control("<|python_tag|>"), own_call], "<|eom_id|>"
            else:
                call = {"type": "function", "name": name, "parameters": arguments}
                content = [*content, _json(call)]
        message(m["role"], content, end)
    return pieces


def _own_call(name: str, arguments: dict) -> str | None:
    """A call of one of Llama 3.1's own tools as it writes it, or None if it is not one."""
    if name == "code_interpreter" and list(arguments) == ["code"]:
        return str(arguments["code"])
    if name in _BUILTIN_TOOLS and list(arguments) == ["query"]:
        return f'{name}.call(query="{arguments["query"]}")'
    return None


def _llama4(messages: list[dict], tools: list, end_of_message: str) -> list[str]:
    """Llama 4: functions in the system message, calls as a Python list, images as <|image|>."""
    if any(isinstance(tool, str) for tool in tools):
        raise UserError("Llama 4 has no tools of its own: describe each one as a function")
    if tools:
        text = _LLAMA4_TOOLS.replace("{functions}", _json(tools, indent=4))
        if messages[0]["role"] == "system":
            first = {**messages[0], "content": [*messages[0]["content"], "\n\n" + text]}
            messages = [first, *messages[1:]]
        else:
            messages = [{"role": "system", "content": [text], "tool_calls": []}, *messages]
    pieces: list[str] = []
    for message in messages:
        content = [Control("<|image|>") if part is None else part for part in message["content"]]
        end = "<|eot|>"
        if message["tool_calls"]:
            calls = (
                f"{name}({', '.join(f'{k}={_python(v)}' for k, v in arguments.items())})"
                for name, arguments in message["tool_calls"]
            )
            content, end = [*content, f"[{', '.join(calls)}]"], end_of_message
        elif message["role"] in ("tool", "ipython"):
            end = end_of_message
        pieces += _header("<|header_start|>", "<|header_end|>", message["role"])
        pieces += [*content, Control(end)]
    return pieces


def _python(value) -> str:
    """A JSON value as a Python literal, strings in double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_python(k)}: {_python(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_python, value)) + "]"
    return _json(value) if isinstance(value, str) else repr(value)


def _json(value, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"a tool or tool call is not JSON: {error}") from None


def _with_template(
    tokenizer, messages, tools, add_generation_prompt, variables
) -> template.Rendered:
    source = tokenizer.chat_template
    if isinstance(source, dict):
        wanted = "tool_use" if tools and "tool_use" in source else "default"
        if wanted not in source:
            raise UserError(f"chat_template has no {wanted!r} among {', '.join(source)}")
        source = source[wanted]
    context = {
        # As transformers does: templates ask whether a key is there, and would print its None.
        "messages": [
            {key: value for key, value in _given(i, message, source).items() if value is not None}
            for i, message in enumerate(messages)
        ],
        "tools": [t for t in tools if not isinstance(t, str)] or None,
        "documents": None,
        "add_generation_prompt": bool(add_generation_prompt),
        **variables,
    }
    own = [tool for tool in tools if isinstance(tool, str)]
    if context["tools"]:
        context["tools"] = [{"type": "function", "function": t} for t in context["tools"]]
    if own:
        context["builtin_tools"] = own
    return template.encode(tokenizer, source, context)


def _given(i: int, message: dict, source: str) -> dict:
    """A message as it was given; parts of text as one text where a template asks for no part's."""
    given = message["given"]
    if not isinstance(given.get("content"), list | tuple) or _PARTS.search(source):
        return given
    return {**given, "content": "".join(_text_only(i, message, "this tokenizer"))}


def _checked_messages(messages) -> list[dict]:
    """Messages as {"role", "content": [text or None for an image], "tool_calls", "given"}."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("messages must be a list of at least one {'role': ..., 'content': ...}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise _bad(i, f"is a {type(message).__name__}, not a dict")
        role = message.get("role")
        if not isinstance(role, str):
            raise _bad(i, "has no 'role'")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list | tuple):
            raise _bad(i, "tool_calls must be a list")
        if calls and role != "assistant":
            raise _bad(i, f"only an assistant calls tools, not role {role!r}")
        content = message.get("content")
        if content is None and not calls:
            raise _bad(i, "has no 'content'")
        parsed = [_checked_call(i, call) for call in calls]
        given = dict(message)
        if calls:
            # Templates write the arguments as JSON themselves: a string would be quoted twice.
            given["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": arguments}}
                | ({"id": call["id"]} if "id" in call else {})
                for call, (name, arguments) in zip(calls, parsed, strict=True)
            ]
        checked.append(
            {
                "role": role,
                "content": list(_parts(i, role, content)),
                "tool_calls": parsed,
                "given": given,
            }
        )
    return checked


def _parts(i: int, role: str, content) -> Iterator[str | None]:
    """The parts of a content: text, or None for an image."""
    if content is None:
        return
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping) and role in ("tool", "ipython"):
        yield _json(content)
    elif isinstance(content, list | tuple):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                yield part["text"]
            elif kind in ("image", "image_url"):
                yield None
            else:
                raise _bad(
                    i, "each part must be {'type': 'text', 'text': ...} or {'type': 'image'}"
                )
    else:
        raise _bad(i, f"content is a {type(content).__name__}, not text or a list of parts")


def _text_only(i: int, message: dict, family: str) -> list[str]:
    if None in message["content"]:
        raise _bad(i, f"{family}'s chat format has no images")
    return message["content"]


def _checked_call(i: int, call) -> tuple[str, dict]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    function = function if isinstance(function, Mapping) else {}
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _bad(i, "a tool call has no function name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise _bad(i, f"the arguments of {name!r} are not JSON") from None
    if not isinstance(arguments, Mapping | None):
        raise _bad(i, f"the arguments of {name!r} must be a JSON object")
    return name, dict(arguments or {})


def _checked_tools(tools) -> list:
    if not isinstance(tools, list | tuple | None):
        raise UserError("tools must be a list of functions")
    checked = []
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        if isinstance(function, str) and function in _BUILTIN_TOOLS:
            checked.append(function)
        elif isinstance(function, Mapping) and isinstance(function.get("name"), str):
            checked.append(dict(function))
        else:
            raise UserError(
                f"tool {tool!r:.60} must be {{'name', 'description', 'parameters'}} or one of "
                f"{', '.join(_BUILTIN_TOOLS)}".replace("\n", " ")
            )
    return checked


def _bad(i: int, problem: str) -> UserError:
    return UserError(f"messages[{i}]: {problem}".replace("\n", " "))
