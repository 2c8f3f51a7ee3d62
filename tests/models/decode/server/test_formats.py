"""Formats of answers and calls of functions over HTTP, with a tiny model that is never trained."""

import asyncio
import json

import pytest

from puna.configs.schema import ModelConfig
from puna.models import transformer
from puna.models.decode.slots import Engine
from puna.models.text.tokenizer import Tokenizer, train_bpe

httpx = pytest.importorskip("httpx", reason="a client")
app = pytest.importorskip("puna.models.decode.server.app", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra grammar")
from puna.models.decode.server.worker import Worker  # noqa: E402

LLAMA4 = train_bpe(["the llama walks over the puna"] * 9, 280)
TEMPLATE = (
    "{% if tools %}{{ tools|tojson }} Write <tool_call>.{% endif %}{% for m in messages %}"
    "{{ m.role }}: {{ m.content or m.tool_calls|tojson }}\n{% endfor %}assistant:"
)
CHATML = Tokenizer(LLAMA4._kind, chat_template=TEMPLATE)
LLAMA3 = Tokenizer(LLAMA4._kind, chat_template=TEMPLATE.replace("<tool_call>", "JSON"))
MUTE = Tokenizer(LLAMA4._kind, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
CONFIG = ModelConfig(
    vocab_size=288, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_dim=24, max_positions=4096, compute_dtype="float32",
)  # fmt: skip
CHAT = [{"role": "user", "content": "a llama"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["llama", "alpaca"]}, "age": {"type": "integer", "maximum": 30,
                                                                  "minimum": 0}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}  # fmt: skip


def tool(name, **more):
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


TOOLS = [tool("feed", description="Give hay"), tool("shear")]


@pytest.fixture(scope="module")
def worker(drawn):
    params = drawn(CONFIG, 0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puna.models.decode.slots.PIECES", (128,))
        with Worker(Engine(transformer.Transformer(CONFIG), params, LLAMA4, 4, 4096)) as worker:
            yield worker


def post(worker, tokenizer=LLAMA4, path="chat/completions", **body):
    server = app.Server(worker, "tiny")
    server.engine = Engine.__new__(Engine)
    server.engine.__dict__.update(worker.engine.__dict__, tokenizer=tokenizer)

    async def request():
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post(f"/v1/{path}", json=body, timeout=120)

    return asyncio.run(request())


def choices(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def streamed(response):
    """The message and finish_reason that a client joins from a stream of one choice."""
    message, reason = {"content": "", "tool_calls": []}, None
    for line in response.text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        [choice] = json.loads(line[6:])["choices"]
        message["content"] += choice["delta"].get("content") or ""
        for piece in choice["delta"].get("tool_calls", ()):
            if piece["index"] == len(message["tool_calls"]):
                assert piece["id"] and piece["type"] == "function" and piece["function"]["name"]
                message["tool_calls"].append(piece)
            else:
                assert set(piece) == {"index", "function"}
                call = message["tool_calls"][piece["index"]]
                call["function"]["arguments"] += piece["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return message, reason


def check(arguments):
    import jsonschema

    jsonschema.validate(json.loads(arguments), SCHEMA)


@pytest.mark.parametrize("temperature", [0, 2])
def test_answers_are_of_the_format_asked_for(worker, temperature):
    asked = {"max_tokens": 200, "temperature": temperature, "seed": 1, "n": 3}
    form = {"type": "json_schema", "json_schema": {"name": "llama", "schema": SCHEMA}}
    for choice in choices(post(worker, messages=CHAT, response_format=form, **asked)):
        check(choice["message"]["content"])
        assert choice["finish_reason"] == "stop"
    wanted = {"regex": "[0-9]{4}"}, {"choice": ["yes", "no"]}, {"json": SCHEMA}
    for structured in wanted:
        body = {"prompt": "a llama", "structured_outputs": structured, **asked}
        texts = [c["text"] for c in choices(post(worker, path="completions", **body))]
        if "json" in structured:
            assert texts and all(check(text) is None for text in texts)
        elif "regex" in structured:
            assert all(text.isdecimal() and len(text) == 4 for text in texts)
        else:
            assert set(texts) <= {"yes", "no"}


def test_an_object_of_json_may_be_cut_by_max_tokens(worker):
    form = {"type": "json_object"}
    [choice] = choices(post(worker, messages=CHAT, response_format=form, max_tokens=1))
    assert choice["message"]["content"] == "{" and choice["finish_reason"] == "length"


@pytest.mark.parametrize("tokenizer", [LLAMA4, CHATML])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be_made_is_made(worker, tokenizer, stream):
    asked = {
        "messages": CHAT, "tools": TOOLS, "tool_choice": "required", "max_tokens": 300,
        "parallel_tool_calls": False, "temperature": 2, "seed": 3, "stream": stream,
        "logprobs": True,
    }  # fmt: skip
    response = post(worker, tokenizer, **asked)
    if stream:
        message, reason = streamed(response)
        assert message["content"] == ""
    else:
        [choice] = choices(response)
        message, reason = choice["message"], choice["finish_reason"]
        assert message["content"] is None and choice["logprobs"]["content"]
    [call] = message["tool_calls"]
    assert reason == "tool_calls" and call["function"]["name"] in ("feed", "shear")
    check(call["function"]["arguments"])
    # What the function gave goes back.
    call = {key: call[key] for key in ("id", "type", "function")}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "fed"}
    after = post(worker, tokenizer, messages=[*CHAT, said, result], tools=TOOLS, max_tokens=3)
    assert "tool_calls" not in choices(after)[0]["message"]


def test_the_function_that_is_named_is_called(worker):
    named = {"type": "function", "function": {"name": "shear"}}
    [choice] = choices(post(worker, messages=CHAT, tools=TOOLS, tool_choice=named, max_tokens=300))
    [call] = choice["message"]["tool_calls"]
    assert (call["function"]["name"], choice["finish_reason"]) == ("shear", "stop")


def test_several_calls_of_what_a_model_writes():
    """The protocol alone: tokens as a model would make them."""
    from puna.models.decode.server.answer import Answer
    from puna.models.decode.server.protocol import parse
    from puna.models.decode.slots import Token

    text = 'Well.\n<tool_call>{"name": "feed", "arguments": {"age": 1}}</tool_call>' * 2
    body = {"messages": CHAT, "tools": TOOLS, "stream": True}
    for several in (True, False):
        data = json.dumps({**body, "parallel_tool_calls": several}).encode()
        answer = Answer(parse(data, True, "m"), LLAMA4, 1, 1)
        chunks = []
        for at in range(0, len(text), 3):
            last = at + 3 >= len(text)
            piece = text[at : at + 3]
            chunks += answer.add(0, [Token(0, 0.0, [], piece, at, "stop" if last else None)])
        lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        message, reason = streamed(httpx.Response(200, text=lines))
        assert message["content"] == "Well.\nWell.\n" and reason == "tool_calls"
        assert [c["function"]["arguments"] for c in message["tool_calls"]] == (
            ['{"age": 1}'] * (2 if several else 1)
        )
        assert len({c["id"] for c in message["tool_calls"]}) == len(message["tool_calls"])


def test_a_strict_function_may_be_called_or_not(worker):
    tools = [tool("feed", strict=True)]
    [choice] = choices(
        post(worker, messages=CHAT, tools=tools, max_tokens=40, temperature=1, seed=1)
    )
    assert choice["message"]["content"] or choice["message"]["tool_calls"]


@pytest.mark.parametrize("tokenizer", [LLAMA4, CHATML, LLAMA3])
def test_an_answer_is_of_the_format_asked_for_or_calls(worker, tokenizer):
    form = {"type": "json_schema", "json_schema": {"name": "llama", "schema": SCHEMA}}
    asked = {
        "messages": CHAT, "tools": TOOLS, "response_format": form, "max_tokens": 300,
        "parallel_tool_calls": False,
    }  # fmt: skip
    both = choices(post(worker, tokenizer, **asked, temperature=1000, seed=2, n=8))
    for choice in both:
        assert choice["finish_reason"] in ("stop", "tool_calls")
        if choice["finish_reason"] == "stop":
            check(choice["message"]["content"])
    assert {choice["finish_reason"] for choice in both} == {"stop", "tool_calls"}
    [must] = choices(post(worker, tokenizer, **asked, tool_choice="required"))
    assert must["message"]["tool_calls"]


def test_no_tools_where_none_are_wanted(worker):
    body = {"messages": CHAT, "max_tokens": 5}
    plain = choices(post(worker, **body))
    assert choices(post(worker, **body, tools=TOOLS, tool_choice="none")) == plain


FORM = "response_format"


def schema(value):
    return {FORM: {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}}


@pytest.mark.parametrize(
    "body, message",
    [
        ({FORM: "json"}, "response_format must be an object"),
        ({FORM: {"type": "xml"}}, "type must be text, json_object or json_schema"),
        ({FORM: {"type": "json_schema"}}, "schema must be an object"),
        (schema({"type": "nonsense"}), "response_format: .*Invalid type: nonsense"),
        (schema({"type": "string", "format": "regex"}), "nknown format: regex"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"$ref": "#/nowhere"}), "does not exist"),
        (schema({"not": {}}), "response_format: "),
        (schema({"enum": ["x" * 300_000]}), "characters: at most"),
        ({"structured_outputs": {"regex": "("}}, "unclosed group"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "must have one of"),
        ({"structured_outputs": {"lark": "a"}}, "must have one of"),
        ({"structured_outputs": {"choice": []}}, "must be an object, regex a text"),
        ({"structured_outputs": {"regex": "a"}, FORM: {"type": "json_object"}}, "one of them"),
        ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "cannot be combined"),
        ({"tools": TOOLS, **schema({"$ref": "#/nowhere"})}, "response_format: .*does not exist"),
        ({"tools": {}}, "tools must be a list"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "two functions of one name"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "at most 128"),
        ({"tools": [tool("a b")]}, r"tools\[0\]: the name must be"),
        ({"tools": [tool("a", strict=1)]}, "strict is of a wrong type"),
        ({"tools": [tool("a-b")], "tool_choice": "required"}, "tools: 'a-b' is no name"),
        ({"tools": [tool("a", strict=True, parameters={"type": 3})]}, "tools: "),
        ({"tool_choice": "required"}, "tool_choice=required needs tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice must be none, auto, required"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "x"}}}, "that tools lacks"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "must be none, auto, requ"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls must be true"),
    ],
)
def test_a_format_that_makes_no_sense_is_a_400(worker, body, message):
    import re

    for stream in (False, True):
        response = post(worker, messages=CHAT, stream=stream, **body)
        error = response.json()["error"]
        assert response.status_code == 400 and re.search(message, error["message"]), error
    assert worker.counts == (0, 0) and worker.is_alive()


def test_a_template_that_shows_no_tools_is_told_so(worker):
    response = post(worker, MUTE, messages=CHAT, tools=TOOLS)
    assert response.status_code == 400
    assert "chat template knows no tools" in response.json()["error"]["message"]
