"""Programs that others have written for OpenAI's API, against the server as it runs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from puna.configs.schema import ModelConfig
from puna.models import transformer
from puna.models.decode.generate import complete
from puna.models.decode.slots import Engine
from puna.models.text.tokenizer import train_bpe

app = pytest.importorskip("puna.models.decode.server.app", reason="needs the extra serve")
from puna.models.decode.server.worker import Worker  # noqa: E402

pytestmark = pytest.mark.slow

TOKENIZER = train_bpe(["the llama walks over the puna"] * 9, 280)
CONFIG = ModelConfig(
    vocab_size=288, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_dim=24, max_positions=2048, compute_dtype="float32",
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)
CHAT = [{"role": "system", "content": "short"}, {"role": "user", "content": "a llama"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["llama", "alpaca"]}, "tall": {"type": "boolean"}},
    "required": ["kind", "tall"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def params(drawn):
    return drawn(CONFIG, 0.4)


def running(params, max_length, max_waiting):
    return Worker(Engine(MODEL, params, TOKENIZER, 4, max_length), max_waiting=max_waiting)


@pytest.fixture(scope="module")
def worker(params):
    with running(params, 2048, 200) as worker:
        yield worker


@pytest.fixture(scope="module")
def url(worker, listening):
    with listening(app.Server(worker, "org/tiny", "key")) as url:
        yield url


@pytest.fixture(scope="module")
def openai():
    return pytest.importorskip("openai", reason="needs the extra clients")


@pytest.fixture(scope="module")
def client(openai, url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="key") as client:
        yield client


def made(params, prompts, max_tokens, **options):
    return complete(MODEL, params, TOKENIZER, prompts, max_tokens, **options)


def test_models(client, openai):
    assert [model.id for model in client.models.list()] == ["org/tiny"]
    assert client.models.retrieve("org/tiny").owned_by == "puna"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_with_logprobs(client, params):
    [want] = made(params, ["the llama"], 8)
    found = client.completions.create(
        model="org/tiny", prompt="the llama", max_tokens=8, logprobs=2
    ).choices[0]
    assert found.text == want.text and found.finish_reason == want.finish_reason
    kept = len(found.logprobs.tokens)
    np.testing.assert_allclose(found.logprobs.token_logprobs, want.logprobs[:kept], atol=1e-4)
    # Names of broken characters coincide.
    assert all(1 <= len(top) <= 3 for top in found.logprobs.top_logprobs)


def test_three_answers_of_a_chat_and_their_logprobs(client, params):
    want = made(params, [TOKENIZER.chat(CHAT)] * 3, 6, temperature=1.5, seed=4)
    found = client.chat.completions.create(
        model="org/tiny", messages=CHAT, n=3, seed=4, temperature=1.5, max_completion_tokens=6,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    assert [c.message.content for c in found.choices] == [w.text for w in want]
    assert found.usage.completion_tokens == sum(len(w.ids) for w in want)
    for choice, w in zip(found.choices, want, strict=True):
        logprobs = [token.logprob for token in choice.logprobs.content]
        np.testing.assert_allclose(logprobs, w.logprobs[: len(logprobs)], atol=1e-4)
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def test_a_stream_with_usage(client, params):
    [want] = made(params, [TOKENIZER.chat(CHAT)], 12)
    chunks = list(
        client.chat.completions.create(
            model="org/tiny",
            messages=CHAT,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == want.text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(want.ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    with client.chat.completions.stream(model="org/tiny", messages=CHAT, max_tokens=12) as stream:
        for _ in stream:
            pass
        assert stream.current_completion_snapshot.choices[0].message.content == want.text


def test_an_answer_of_a_pydantic_model(client, openai):
    pydantic = pytest.importorskip("pydantic")

    class Llama(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=5)
        legs: int = pydantic.Field(ge=0, le=9)
        herd: list[str] = pydantic.Field(max_length=1)

    try:
        found = client.chat.completions.parse(
            model="org/tiny", messages=CHAT, response_format=Llama, temperature=1, seed=2,
            max_tokens=1000,
        )  # fmt: skip
    except openai.LengthFinishReasonError:  # pragma: no cover
        pytest.fail("an answer of a bounded format has no end")
    assert isinstance(found.choices[0].message.parsed, Llama)


def test_functions_and_what_they_give(client):
    tool = {"type": "function", "function": {"name": "shear", "parameters": SCHEMA, "strict": True}}
    asked = {"model": "org/tiny", "tools": [tool], "max_tokens": 200, "temperature": 1, "seed": 3}
    found = client.chat.completions.create(
        messages=CHAT, tool_choice="required", parallel_tool_calls=False, **asked
    ).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.content is None
    [call] = found.message.tool_calls
    assert call.function.name == "shear" and set(json.loads(call.function.arguments)) == {
        "kind", "tall",
    }  # fmt: skip
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    messages = [*CHAT, found.message, result]
    assert client.chat.completions.create(messages=messages, **asked).choices[0].finish_reason
    with client.chat.completions.stream(
        messages=CHAT, tool_choice="required", parallel_tool_calls=False, **asked
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.arguments == call.function.arguments


def test_errors_are_the_exceptions_of_the_client(client, openai, url):
    chat = client.chat.completions
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="nonsense") as error:
        chat.create(model="org/tiny", messages=CHAT, response_format=bad)
    assert error.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as error:
        chat.create(model="org/tiny", messages=CHAT, max_tokens=4000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        chat.create(model="gpt-4", messages=CHAT)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()


@pytest.fixture
def brief(params, listening):
    """A server whose longest request, of as many texts as may wait, takes seconds."""
    with running(params, 256, 16) as worker:
        with listening(app.Server(worker, "org/tiny", "key")) as url:
            yield url, worker


def test_schemathesis_finds_nothing(brief, tmp_path):
    """Bodies that the OpenAPI document allows and such that it does not: no 500, no hang.

    Some 1,400 requests, a third of which are answered; PUNA_CASES=300 for more than 2,000.
    """
    url, worker = brief
    httpx = pytest.importorskip("httpx", reason="a client")
    pytest.importorskip("schemathesis", reason="needs the extra clients")
    cases = int(os.environ.get("PUNA_CASES", "100"))  # of each route
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json",
        "--header=Authorization: Bearer key", f"--max-examples={cases}", "--request-timeout=120",
        "--checks=not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance", "--phases=examples,coverage,fuzzing", "--seed=1",
        # Of a path's name, where most of what is drawn is no path.
        "--suppress-health-check=filter_too_much",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    counts = dict(line.rsplit(" ", 1) for line in lines if line.startswith("puna_requests_total"))
    print(done.stdout[-300:], counts)
    for path in ("/v1/completions", "/v1/chat/completions"):  # or what was sent tests nothing
        assert int(counts[f'puna_requests_total{{path="{path}",status="200"}}']) > 100
    assert worker.is_alive() and worker.counts == (0, 0)
