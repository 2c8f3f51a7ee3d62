"""A guard refuses what is asked and what is answered; one that fails lets nothing pass."""

import asyncio
import json

import httpx
import pytest

from puna.configs.errors import UserError
from puna.configs.schema import ModelConfig
from puna.models import transformer
from puna.models.decode.slots import Engine, Token
from puna.models.text.tokenizer import train_bpe

guards = pytest.importorskip("puna.models.decode.server.guard", reason="needs the extra serve")
app = pytest.importorskip("puna.models.decode.server.app")
from puna.models.decode.server.worker import Worker  # noqa: E402

CONFIG = ModelConfig(
    vocab_size=288, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_dim=16, max_positions=128, compute_dtype="float32",
)  # fmt: skip
TOKENIZER = train_bpe(["the llama walks over the puna"] * 9, 280)


class Rule:
    """Refuses what has a word; keeps what it was shown."""

    def __init__(self):
        self.word, self.seen, self.fails = "never", [], False

    def __call__(self, messages):
        self.seen.append(messages)
        if self.fails:
            raise RuntimeError("no guard today")
        return "a rule" if self.word in messages[-1]["content"] else None


RULE = Rule()


@pytest.fixture(autouse=True)
def rule():
    RULE.__init__()
    return RULE


@pytest.fixture(scope="module")
def worker(drawn):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puna.models.decode.slots.PIECES", (16,))
        engine = Engine(transformer.Transformer(CONFIG), drawn(CONFIG), TOKENIZER, 2, 96)
        with Worker(engine, max_waiting=8) as worker:
            yield worker


@pytest.fixture(scope="module")
def client(worker, listening):
    with (
        listening(app.Server(worker, "tiny", guard=RULE)) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        yield client


def ask(client, **body):
    body = {"messages": [{"role": "user", "content": "a llama"}], "max_tokens": 40, **body}
    return client.post("/v1/chat/completions", json=body)


def pieces(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def test_what_passes_is_what_would_be_said_without_a_guard(client, worker, listening, rule):
    whole = ask(client).json()["choices"][0]
    assert [m[-1]["role"] for m in rule.seen] == ["user", "assistant"]
    assert rule.seen[-1][-1]["content"] == whole["message"]["content"] != ""
    streamed = pieces(ask(client, stream=True))
    assert "".join(c["delta"].get("content", "") for c in streamed) == rule.seen[1][-1]["content"]
    assert streamed[-1]["finish_reason"] == whole["finish_reason"]
    with listening(app.Server(worker, "tiny")) as url, httpx.Client(base_url=url) as other:
        assert ask(other).json()["choices"] == [whole]


def test_a_request_is_refused(client, rule):
    rule.word = "llama"
    response = ask(client)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "content_filter"
    ids = TOKENIZER.encode("the llama")
    response = client.post("/v1/completions", json={"prompt": ids})
    assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"
    assert 'puna_guard_total{what="input"}' in client.get("/metrics").text


def test_an_answer_is_withheld(client, rule):
    text = ask(client).json()["choices"][0]["message"]["content"]
    rule.word = text[-3:]  # known only at its end
    body = ask(client, logprobs=True).json()
    [choice] = body["choices"]
    assert choice["finish_reason"] == "content_filter" and choice["logprobs"] is None
    assert choice["message"]["content"] == "" and body["usage"]["completion_tokens"] > 1
    response = ask(client, stream=True, logprobs=True)
    assert response.status_code == 200 and text[:3] not in response.text
    assert pieces(response)[-1]["finish_reason"] == "content_filter"


def test_a_stream_is_judged_in_portions_before_they_are_sent(client, worker, rule, monkeypatch):
    monkeypatch.setattr(guards, "_PORTION", 10)
    text = ask(client).json()["choices"][0]["message"]["content"]
    rule.seen.clear()
    rule.word = text[20:24]
    found = pieces(ask(client, stream=True, max_tokens=60))
    sent = "".join(c["delta"].get("content", "") for c in found)
    assert sent == text[: len(sent)] and 0 < len(sent) < 24
    assert found[-1]["finish_reason"] == "content_filter"
    judged = [m[-1]["content"] for m in rule.seen[1:]]
    assert sent in judged and rule.word in judged[-1] and judged[-1].startswith(sent)
    # Its slot is free again, and another choice is not touched.
    assert ask(client, n=2, max_tokens=2).status_code == 200
    assert worker.counts == (0, 0)


def test_a_guard_that_fails_lets_nothing_pass(client, rule):
    rule.fails = True
    response = ask(client)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "guard_failed"
    rule.fails = False

    def fail_later(messages):
        rule.fails = messages[-1]["role"] == "assistant"
        return Rule.__call__(rule, messages)

    judge = guards.Judge(fail_later, lambda what: None)

    async def answer():
        yield 0, Token(1, 0.0, [], "text", 0, "stop")

    async def passed():
        asked = type("Ask", (), {"n": 1, "stream": False})
        return [x async for x in judge.passed(answer(), [[]], asked)]

    with pytest.raises(guards.ApiError, match="nothing is let through"):
        asyncio.run(passed())


class Says:
    """A worker whose model says one thing."""

    def __init__(self, text, tokenizer=TOKENIZER):
        self.text, self.engine, self.prompt = text, self, None
        self.tokenizer, self.check, self.cancel = tokenizer, lambda *_: None, lambda jobs: None

    def submit(self, jobs):
        [job] = jobs
        self.prompt = self.tokenizer.decode(job.prompt_ids, show_special=True)
        job.deliver(Token(0, 0.0, [], self.text[:3], 0, None))
        job.deliver(Token(0, 0.0, [], self.text[3:], 3, "stop"))


TALK = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": [{"type": "text", "text": "a llama"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "walk"}}]},
    {"role": "tool", "content": "walked"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reason"), [("\n\nsafe", None), ("\n\nunsafe\nS1,S9", "S1,S9"), ("unsafe", "unsafe")]
)
def test_a_model_is_asked_in_its_own_chat_format(text, reason):
    says = Says(text)
    assert guards.ModelGuard(says)(TALK) == reason
    for shown in ("short\n\na llama", '"name": "walk"', "walked"):
        assert shown in says.prompt


def test_a_model_that_says_neither_has_failed():
    with pytest.raises(UserError, match="not safe or unsafe"):
        guards.ModelGuard(Says("safely"))(TALK)


def test_a_template_that_does_not_show_the_conversation_is_no_guard():
    class Blind:
        def chat(self, messages):
            return TOKENIZER.encode("a task")

        decode = staticmethod(TOKENIZER.decode)

    with pytest.raises(UserError, match="does not show the conversation"):
        guards.ModelGuard(Says("safe", Blind()))(TALK)


def test_turns_begin_with_the_user_and_alternate():
    turns = guards.in_turns([{"role": "assistant", "content": "hi"}, *TALK])
    assert [t["role"] for t in turns] == ["user", "assistant", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere_at_all:f", "can be imported"), ("json:nothing", "imported"),
                          ("string:digits", "must be a function")],
)  # fmt: skip
def test_a_function_that_is_none_is_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        guards.function(name)
    assert "\n" not in str(error.value)


def test_a_path_is_no_function():
    assert guards.function("path/to/Llama-Guard-3-1B") is None
    assert guards.function("gs://bucket/guard") is None
    assert guards.function("json:dumps") is json.dumps
