"""`puna chat`: history, commands, stopping, mistakes. A scripted engine: nothing compiles."""

import io
import os
import signal
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna import __main__ as cli
from puna.configs import command_line
from puna.configs.errors import UserError
from puna.configs.schema import ModelConfig
from puna.models.decode import chat as chat_lib
from puna.models.decode.chat import Chat, Speed, Thought
from puna.models.decode.profile import Profile
from puna.models.decode.sampling import Sampling
from puna.models.decode.slots import Engine
from puna.models.decode.toolbox import Tool, calculator
from puna.models.text.tokenizer import Tokenizer, byte_tokenizer, train_bpe

TOKENIZER = train_bpe(["the llama walks"], 280)


class Echo(Engine):
    """Answers each prompt with its number of ids, or the same text, a character a step."""

    def __init__(self, tokenizer=TOKENIZER, max_length=200, on_step=lambda step: None, answer=""):
        self.answer = answer
        self.tokenizer, self.max_length, self.vocab_size = tokenizer, max_length, 280
        self.config = ModelConfig(max_positions=2 * max_length)
        self.requests, self.asked, self.num_slots, self.on_step = {}, [], 1, on_step
        self.adapters, self.answered_by = ("poet", "clerk"), []

    def insert(self, prompt_ids, sampling=None, max_tokens=64, adapter="", tiles=None, clips=()):
        self.asked.append((list(prompt_ids), sampling, max_tokens))
        self.answered_by.append(adapter)
        self.requests[0] = list(self.answer or f"<{len(prompt_ids)}>")
        return 0

    def evict(self, slot):
        self.requests.pop(slot, None)

    def step(self):
        self.on_step(self)
        token = types.SimpleNamespace(text=self.requests[0].pop(0))
        if not self.requests[0]:
            del self.requests[0]
        return [(0, token)]


def talk(monkeypatch, capsys, lines, chat):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat_lib.run(chat)
    return capsys.readouterr().out


def prompt(*messages):
    roles = ["user", "assistant"] * 3
    return TOKENIZER.chat(
        [{"role": r, "content": m} for r, m in zip(roles, messages, strict=False)]
    )


def test_the_history_is_read_again_until_it_is_reset(monkeypatch, capsys):
    engine = Echo()
    out = talk(monkeypatch, capsys, "hi\n\nyou?\n/reset\nhi\n/exit\nlost\n", Chat(engine))
    first = prompt("hi")
    second = prompt("hi", f"<{len(first)}>", "you?")
    assert [ids for ids, *_ in engine.asked] == [first, second, first]
    assert out == f"<{len(first)}>\n<{len(second)}>\n<{len(first)}>\n"


def test_an_adapter_answers_until_another_is_named(monkeypatch, capsys):
    engine = Echo()
    lines = "a\n/adapter poet\nb\nc\n/adapter nobody\nd\n/adapter\ne\n"
    out = talk(monkeypatch, capsys, lines, Chat(engine)).splitlines()
    assert engine.answered_by == ["", "poet", "poet", "poet", ""]
    assert out[1] == "poet answers from here on"
    assert out[4] == "no adapter is called nobody; there is poet, clerk (--adapter=NAME=DIR)"
    # What was said stays said.
    assert engine.asked[1][0][: len(prompt("a")) - 1] == prompt("a")[:-1]


def test_the_system_message_stays(monkeypatch, capsys):
    engine = Echo()
    talk(monkeypatch, capsys, "a\n/reset\nb\n", Chat(engine, system="short"))
    for (ids, *_), text in zip(engine.asked, "ab", strict=True):
        messages = [("system", "short"), ("user", text)]
        assert ids == TOKENIZER.chat([{"role": r, "content": c} for r, c in messages])


def test_each_answer_has_a_seed_and_a_length(monkeypatch, capsys):
    engine = Echo()
    chat = Chat(engine, Sampling(0.7, seed=5), max_tokens=30)
    talk(monkeypatch, capsys, "a\nb\n", chat)
    assert [(s.temperature, s.seed, n) for _, s, n in engine.asked] == [(0.7, 5, 30), (0.7, 6, 30)]
    free = Echo()
    talk(monkeypatch, capsys, "a\n", Chat(free))
    [(ids, _, max_tokens)] = free.asked
    assert len(ids) + max_tokens == free.max_length


def test_ctrl_c_stops_the_answer_alone(monkeypatch, capsys):
    def interrupt(engine):
        if len(engine.asked) == 1 and len(engine.requests[0]) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    engine = Echo(on_step=interrupt)
    chat = Chat(engine)
    out = talk(monkeypatch, capsys, "hi\nmore\n", chat)
    assert out.splitlines()[0] == f"<{len(prompt('hi'))} [stopped]"
    assert out.splitlines()[1].endswith(">")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_conversation_is_said_and_the_chat_goes_on(monkeypatch, capsys):
    engine = Echo(max_length=60)
    out = talk(monkeypatch, capsys, f"{'long ' * 60}\nhi\n/nonsense\n", Chat(engine))
    full, answer, unknown = out.splitlines()
    assert "no room for an answer in max_length=60: /reset" in full
    assert answer == f"<{len(prompt('hi'))}>"
    assert unknown.startswith("/nonsense is not a command: /reset forgets")


def test_an_answer_cannot_steer_the_terminal():
    assert chat_lib._shown("a\x1b[2J\x9bb\r\n\tc\u200d\u00e9") == "a[2Jb\n\tc\u200d\u00e9"


def test_a_model_without_a_chat_format_is_one_line():
    with pytest.raises(UserError, match="has no chat format") as error:
        Chat(Echo(byte_tokenizer()))
    assert "\n" not in str(error.value)


def test_an_impossible_setting_is_said_at_the_start():
    with pytest.raises(UserError, match=r"temperature=-1\.0 must"):
        Chat(Echo(), Sampling(-1.0))


def test_speed_is_told_on_request(monkeypatch, capsys):
    engine = Echo()
    chat = Chat(engine)
    out = talk(monkeypatch, capsys, "/speed\nhi\n/speed\n", chat).splitlines()
    read = len(prompt("hi"))
    assert out[0] == "nothing has been answered yet"
    assert chat.speed
    assert out[2] == str(chat.speed)
    assert (chat.speed.read, chat.speed.made) == (read, len(f"<{read}>"))
    assert 0 <= chat.speed.first <= chat.speed.whole
    assert str(Speed(12, 5, 0.5, 2.5)) == (
        "12 tokens read and the first written in 0.50 s, then 2.0 a second; 5 in 2.50 s"
    )
    assert "a second" not in str(Speed(12, 1, 0.5, 0.5))


def test_thoughts_are_hidden_on_request_and_remembered(monkeypatch, capsys):
    answer = "<think>\nhm <b\n</think>\n\nA < b"
    engine = Echo(answer=answer)
    chat = Chat(engine)
    out = talk(monkeypatch, capsys, "x\n/think\nx\n/think\n", chat)
    assert out == f"{answer}\nwhat is thought is hidden\nA < b\nwhat is thought is shown\n"
    assert [m["content"] for m in chat.messages] == ["x", answer] * 2


PARTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "th", "ink>", "</", "a", " ", "\n"]))


@given(PARTS, st.booleans())
def test_a_thought_is_left_out_however_the_text_is_cut(parts, begun):
    text = "".join(parts)
    expected, inside, blank, rest = "", begun, begun, text
    while True:
        before, found, rest = rest.partition("</think>" if inside else "<think>")
        if not inside:
            before = before.lstrip() if blank else before
            blank = blank and not before
            expected += before
        if not found:
            break
        blank, inside = blank or inside, not inside
    for pieces in (parts, list(text), [text]):
        thought = Thought(begun)
        made = [thought.rest(piece) for piece in pieces]
        assert "".join(made) + thought.rest("", final=True) == expected


def test_what_a_user_tells_is_put_into_the_context(monkeypatch, capsys, tmp_path):
    path = tmp_path / "me.txt"
    engine = Echo(max_length=400)
    chat = Chat(engine, system="short", profile=Profile(str(path)))
    lines = "a\n/profile\n/profile I herd llamas.\n/profile In Peru.\n/profile\nb\n/forget\nc\n"
    out = talk(monkeypatch, capsys, lines, chat).splitlines()
    assert out[1] == f"{path} says nothing: /profile TEXT adds to it"
    assert out[2:4] == ["I herd llamas.", "In Peru."]
    assert out[5] == f"{path} is empty now"
    assert path.read_text() == ""
    about = "short\n\nWhat the user has told about themselves:\nI herd llamas.\nIn Peru."
    for (ids, *_), system in zip(engine.asked, ["short", about, "short"], strict=True):
        start = TOKENIZER.chat([{"role": "system", "content": system}, *chat.messages[:1]])
        assert ids[: len(start) - 5] == start[:-5]
    assert "/forget clears it" in talk(monkeypatch, capsys, "/x\n", chat)
    assert "/forget is not" in talk(monkeypatch, capsys, "/forget\n", Chat(Echo()))


def test_what_is_no_profile_is_one_line(tmp_path, capsys, monkeypatch):
    for data, why in ((b"\xff\xfe", "must be text in UTF-8"), (b"a" * 20_000, "at most 16384")):
        (tmp_path / "p").write_bytes(data)
        with pytest.raises(UserError, match=why):
            Profile(str(tmp_path / "p"))
    with pytest.raises(UserError, match="cannot be read"):
        Profile(str(tmp_path))
    (tmp_path / "p").write_text("ok")
    profile = Profile(str(tmp_path / "p"))
    with pytest.raises(UserError, match="at most 16384 bytes"):
        profile.add("x" * 17_000)
    assert profile.text() == "ok"
    # One that is spoilt while the chat runs costs a message, not the chat.
    chat = Chat(Echo(), profile=profile)
    (tmp_path / "p").write_bytes(b"\xff")
    assert "UTF-8" in talk(monkeypatch, capsys, "hi\n", chat)


class Scripted(Echo):
    """Gives one text after the other, a character a step; a control token comes as its id."""

    def __init__(self, *answers, **settings):
        super().__init__(**{"max_length": 2000, **settings})
        self.answers = list(answers)

    def insert(self, prompt_ids, sampling=None, max_tokens=64, adapter="", tiles=None, clips=()):
        super().insert(prompt_ids, sampling, max_tokens, adapter)
        self.requests[0] = list(self.answers.pop(0))
        return 0

    def step(self):
        self.on_step(self)
        part = self.requests[0].pop(0)
        if not self.requests[0]:
            del self.requests[0]
        control = isinstance(part, int)
        text = "" if control else part
        return [(0, types.SimpleNamespace(text=text, id=part if control else -1))]


def failing(**arguments):
    raise RuntimeError("out of\x1b[2J order \ud800")


TOOLS = {
    **calculator(),
    "fail": Tool("Fails.", {"type": "object", "properties": {}}, failing),
    "long": Tool("Says much.", {"type": "object", "properties": {}}, lambda: "a\n" * 9999),
}
FUNCTIONS = [
    {"name": name, "description": tool.description, "parameters": tool.parameters}
    for name, tool in TOOLS.items()
]


def called(expression, said=""):
    function = {"name": "calculator", "arguments": {"expression": expression}}
    return {"role": "assistant", "content": said, "tool_calls": [{"function": function}]}


def test_calls_are_run_and_their_results_are_read(monkeypatch, capsys):
    start, end = 10_000, 10_001
    monkeypatch.setitem(TOKENIZER.special, "<|python_start|>", start)
    monkeypatch.setitem(TOKENIZER.special, "<|python_end|>", end)
    call = '[calculator(expression="6*7"), calculator(expression="1/4")]'
    engine = Scripted([start, *call, end], "It is 42.", "Yes.")
    chat = Chat(engine, Sampling(0.7, seed=3), system="short", tools=TOOLS)
    out = talk(monkeypatch, capsys, "what?\nsure?\n", chat)
    assert out == (
        '[calculator {"expression": "6*7"} -> 42]\n[calculator {"expression": "1/4"} -> 0.25]\n'
        "It is 42.\nYes.\n"
    )
    messages = [
        {"role": "system", "content": "short"}, {"role": "user", "content": "what?"},
        called("6*7"), {"role": "tool", "content": "42"},
        called("1/4"), {"role": "tool", "content": "0.25"},
        {"role": "assistant", "content": "It is 42."}, {"role": "user", "content": "sure?"},
    ]  # fmt: skip
    for (ids, sampling, _), size, seed in zip(engine.asked, (2, 6, 8), (3, 4, 5), strict=True):
        assert ids == TOKENIZER.chat(messages[:size], FUNCTIONS)
        assert sampling.seed == seed


def test_what_is_said_before_a_call_stays(monkeypatch, capsys):
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "2+2"}}</tool_call>'
    chat = Chat(Scripted(f"Let me see.{call}", "4"), tools=TOOLS)
    out = talk(monkeypatch, capsys, "x\n", chat).splitlines()
    assert out == ["Let me see.", '[calculator {"expression": "2+2"} -> 4]', "4"]
    assert [m["content"] for m in chat.messages] == ["x", "Let me see.", "4", "4"]


def test_mistakes_of_tools_are_told_to_the_model(monkeypatch, capsys):
    calls = ["[fail()]", "[calculator(sum=1)]", '[calculator(expression="1/0")]',
             '[calculator(expression="a\\ud800")]', "[long()]", "[unknown()]"]  # fmt: skip
    chat = Chat(Scripted(*calls, max_length=20_000), tools=TOOLS)
    out = talk(monkeypatch, capsys, "x\n", chat)
    results = [m["content"] for m in chat.messages if m["role"] == "tool"]
    assert results[0] == "error: out of\x1b[2J order ?"
    assert "unexpected keyword" in results[1] and results[2] == "error: division by zero"
    assert results[3].startswith("error: ")
    assert results[4] == "a\n" * 4000 + "\n[cut]"
    lines = out.splitlines()
    assert lines[0] == "[fail {} -> error: out of[2J order ?]"
    assert lines[4] == f"[long {{}} -> {'a ' * 100}...]"
    assert lines[5:] == ["[unknown()]"]  # no call of a tool that is there
    assert "\x1b" not in out


def test_calls_without_end_come_to_one(monkeypatch, capsys):
    engine = Scripted(*['[calculator(expression="1")]'] * 9, "hello")
    chat = Chat(engine, tools=TOOLS)
    out = talk(monkeypatch, capsys, "x\n", chat).splitlines()
    assert len(engine.asked) == 8 and len(out) == 9
    assert out[-1] == "[no answer after 8 rounds of calls]"
    assert [m["role"] for m in chat.messages] == ["user", *["assistant", "tool"] * 8, "assistant"]


def test_ctrl_c_ends_the_calls(monkeypatch, capsys):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        return "done"

    tools = {"slow": Tool("Waits.", {"type": "object", "properties": {}}, interrupt)}
    chat = Chat(Scripted("[slow(), slow()]", "never", "hello"), tools=tools)
    out = talk(monkeypatch, capsys, "x\ny\n", chat)
    assert out == "[slow {} -> done]\n [stopped]\nhello\n"
    roles = ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert [m["role"] for m in chat.messages] == roles


def test_a_turn_without_room_for_its_results_is_dropped(monkeypatch, capsys):
    tools = {"long": TOOLS["long"]}
    chat = Chat(Scripted("[long()]", "hello", max_length=3000), tools=tools)
    out = talk(monkeypatch, capsys, "x\ny\n", chat).splitlines()
    assert "no room for an answer" in out[1] and out[2] == "hello"
    assert [m["content"] for m in chat.messages] == ["y", "hello"]


def test_a_template_without_tools_is_one_line():
    plain = Tokenizer(TOKENIZER._kind, chat_template="{{ messages[0].content }}")
    Chat(Echo(plain))
    with pytest.raises(UserError, match="chat template knows none; begin without"):
        Chat(Echo(plain), tools=TOOLS)


def test_the_flags_say_which_tools_there_are(tmp_path):
    def tools(*flags):
        args = command_line.define("chat", ["puna", *flags])
        args(["puna", *flags])
        return cli._tools(args)

    assert tools() == {}
    found = tools("--tools=calculator", f"--files={tmp_path}")
    assert sorted(found) == ["calculator", "list_files", "read_file"]
    assert found["list_files"].run() == "[nothing]"
    with pytest.raises(UserError, match="--tools=abacus must be calculator or python"):
        tools("--tools=calculator,abacus")
    with pytest.raises(UserError, match="must be a folder"):
        tools(f"--files={tmp_path}/none")
