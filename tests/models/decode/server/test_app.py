"""The server over HTTP, with a tiny model: answers, streams, mistakes, many clients at once."""

import asyncio
import functools
import json

import httpx
import jax
import numpy as np
import pytest

from puna.configs.errors import UserError
from puna.configs.schema import ModelConfig
from puna.models import transformer
from puna.models.adapters import Adapted
from puna.models.decode.generate import complete
from puna.models.decode.slots import Engine
from puna.models.text.tokenizer import byte_tokenizer, train_bpe

app = pytest.importorskip("puna.models.decode.server.app", reason="needs the extra serve")
from puna.models.decode.server.worker import Job, Worker  # noqa: E402

TOKENIZER = train_bpe(["the llama walks over the puna"] * 9, 280)
CONFIG = ModelConfig(
    vocab_size=288, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=128, rope_theta=100.0, nope_interval=2, chunk_size=6, qk_norm=True,
    compute_dtype="float32",
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)
LENGTH = 96
CHAT = [{"role": "system", "content": "short"}, {"role": "user", "content": "a llama"}]


@pytest.fixture(scope="module")
def params(drawn):
    return drawn(CONFIG)


def with_poet(params, **fields):
    """The model with an adapter of one weight."""
    wq = params["blocks"]["layer_0"]["attention"]["wq_DNH"]
    a, b = (np.random.default_rng(5).normal(size=(1, *shape)).astype(np.float32)
            for shape in ((32, 2), (2, 4, 8)))  # fmt: skip
    adapted = Adapted(wq, a, b, 1.0, **fields)
    layer = params["blocks"]["layer_0"]
    layer = layer | {"attention": layer["attention"] | {"wq_DNH": adapted}}
    return params | {"blocks": params["blocks"] | {"layer_0": layer}}


@pytest.fixture(scope="module")
def worker(params):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puna.models.decode.slots.PIECES", (16,))
        beside = with_poet(params, owner_r=np.zeros((1, 2), np.int32))
        engine = Engine(MODEL, beside, TOKENIZER, 4, LENGTH, adapters=["poet"])
        with Worker(engine, max_waiting=32) as worker:
            yield worker


@pytest.fixture(scope="module")
def url(worker, listening):
    with listening(app.Server(worker, "tiny")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


def post(client, path, **body):
    return client.post(f"/v1/{path}", json=body)


@pytest.fixture(scope="module")
def made(params):
    """What `complete` makes of prompts and a number of tokens."""
    return functools.partial(complete, MODEL, params, TOKENIZER)


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_what_generate_gives(client, made):
    [want] = made(["the llama"], 9)
    body = post(client, "completions", model="tiny", prompt="the llama", max_tokens=9).json()
    assert body["object"] == "text_completion" and body["model"] == "tiny"
    assert body["choices"] == [
        {"index": 0, "text": want.text, "logprobs": None, "finish_reason": want.finish_reason}
    ]
    prompt_tokens = len(TOKENIZER.encode("the llama", bos=True))
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(want.ids),
        "total_tokens": prompt_tokens + len(want.ids),
    }


def test_a_chat_is_what_generate_gives(client, made):
    [want] = made([TOKENIZER.chat(CHAT)], 9)
    body = post(client, "chat/completions", messages=CHAT, max_completion_tokens=9).json()
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.text, "refusal": None}
    assert choice["finish_reason"] == want.finish_reason
    # OpenAI's newer name of the role, and parts.
    parts = [{"type": "text", "text": "a llama"}]
    other = [{"role": "developer", "content": "short"}, {"role": "user", "content": parts}]
    again = post(client, "chat/completions", messages=other, max_tokens=9).json()
    assert again["choices"] == body["choices"]


def test_a_chat_may_fill_what_there_is_room_for(client, made):
    ids = TOKENIZER.chat(CHAT)
    [want] = made([ids], LENGTH - len(ids))
    body = post(client, "chat/completions", messages=CHAT).json()
    assert body["choices"][0]["message"]["content"] == want.text
    assert body["usage"]["completion_tokens"] == len(want.ids)


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_joins_to_the_whole(client, path, usage):
    chat = path.startswith("chat")
    asked = {"messages": CHAT} if chat else {"prompt": "the llama"}
    asked |= {"max_tokens": 12, "n": 2, "temperature": 1.2, "seed": 5}
    asked["logprobs"] = True if chat else 2
    whole = post(client, path, **asked).json()
    options = {"include_usage": True} if usage else {}
    response = post(client, path, **asked, stream=True, stream_options=options)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk" if chat else "text_completion"}
    if usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert not any("usage" in chunk for chunk in chunks)
    for want in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == want["index"]]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == want["finish_reason"]
        logprobs = [c["logprobs"] for c in mine if c["logprobs"]]
        if chat:
            assert mine[0]["delta"]["role"] == "assistant"
            text = "".join(c["delta"].get("content", "") for c in mine)
            assert text == want["message"]["content"]
            assert sum((p["content"] for p in logprobs), []) == want["logprobs"]["content"]
        else:
            assert "".join(c["text"] for c in mine) == want["text"]
            for key in ("tokens", "token_logprobs", "text_offset"):
                assert sum((p[key] for p in logprobs), []) == want["logprobs"][key]


def test_logprobs_are_those_of_the_forward_pass(client, made, params):
    body = post(client, "completions", prompt="the llama", max_tokens=12, logprobs=3).json()
    [want] = made(["the llama"], 12)
    prompt = TOKENIZER.encode("the llama", bos=True)
    row = np.array([[*prompt, *want.ids]])
    logits = jax.jit(lambda ids: MODEL.apply({"params": params}, ids).logits_BTV)(row)[0]
    all_TV = np.asarray(jax.nn.log_softmax(logits[len(prompt) - 1 : -1]))
    found = body["choices"][0]["logprobs"]
    ids = want.ids[: len(found["tokens"])]  # without the end token
    assert len(ids) > 4 and len(want.ids) - len(ids) == (want.finish_reason == "stop")
    all_TV = all_TV[: len(ids)]
    np.testing.assert_allclose(found["token_logprobs"], all_TV[range(len(ids)), ids], atol=1e-4)
    names = [TOKENIZER.decode([i], show_special=True) for i in range(TOKENIZER.vocab_size)]
    for top, all_V in zip(found["top_logprobs"], all_TV, strict=True):
        best = np.argsort(-all_V[: TOKENIZER.vocab_size])[:3]
        # Names of broken characters coincide.
        assert set(top) == {names[i] for i in best}
        assert max(top.values()) == pytest.approx(all_V.max(), abs=1e-4)

    ids = TOKENIZER.chat(CHAT)
    [want] = made([ids], 5)
    asked = {"messages": CHAT, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    content = post(client, "chat/completions", **asked).json()["choices"][0]["logprobs"]["content"]
    np.testing.assert_allclose([t["logprob"] for t in content], want.logprobs, atol=1e-4)
    data = [bytes(t["bytes"]) for t in content]
    assert data == [TOKENIZER.decode_bytes([i], show_special=True) for i in want.ids]
    assert [len(t["top_logprobs"]) for t in content] == [2] * 5
    assert all(t["top_logprobs"][0]["token"] == t["token"] for t in content)


def test_several_texts_of_several_prompts(client, made):
    prompts = ["the llama", TOKENIZER.encode("puna")]
    asked = {"prompt": prompts, "n": 3, "temperature": 1.3, "top_p": 0.95, "seed": 4}
    body = post(client, "completions", **asked, max_tokens=8).json()
    assert [c["index"] for c in body["choices"]] == list(range(6))
    texts = [c["text"] for c in body["choices"]]
    for p, prompt in enumerate(prompts):
        want = made([prompt] * 3, 8, temperature=1.3, top_p=0.95, seed=4)
        assert texts[3 * p : 3 * p + 3] == [completion.text for completion in want]
    assert len(set(texts)) == 6
    assert body["usage"]["prompt_tokens"] == sum(
        map(len, (TOKENIZER.encode("the llama", bos=True), prompts[1]))
    )
    # Without a seed each request draws anew.
    asked.pop("seed")
    one, two = (post(client, "completions", **asked).json()["choices"] for _ in range(2))
    assert [c["text"] for c in one] != [c["text"] for c in two]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_in_no_part_of_the_answer(client, stream, made):
    [want] = made(["the llama"], 12)
    stop = want.text[4:6]
    cut = want.text[: want.text.index(stop)]
    asked = {"prompt": "the llama", "max_tokens": 12, "stop": [stop, "nowhere"], "logprobs": 0}
    response = post(client, "completions", **asked, stream=stream)
    bodies = events(response) if stream else [response.json()]
    choices = [c for body in bodies for c in body["choices"]]
    assert "".join(c["text"] for c in choices) == cut
    assert choices[-1]["finish_reason"] == "stop"
    offsets = sum((c["logprobs"]["text_offset"] for c in choices if c["logprobs"]), [])
    assert offsets and max(offsets) < len(cut)


BAD = [
    ("completions", b"{", 400, "not JSON"),
    ("completions", b"[" * 100_000, 400, "not JSON"),
    ("completions", b'{"prompt": "a", "temperature": NaN}', 400, "not JSON"),
    ("completions", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    ("completions", b"\xff\xfe", 400, "not JSON"),
    ("completions", [], 400, "must be a JSON object"),
    ("completions", {}, 400, "prompt must be a text"),
    ("completions", {"prompt": []}, 400, "prompt must be a text"),
    ("completions", {"prompt": [[1], 2]}, 400, "prompt must be a text"),
    ("completions", {"prompt": [True]}, 400, "prompt must be a text"),
    ("completions", {"prompt": [280_000]}, 400, "id 280000"),
    ("completions", {"prompt": [10**30]}, 400, "id 1000000"),
    ("completions", {"prompt": "a" * 500}, 400, "more than this server's 96"),
    ("completions", {"prompt": "a", "max_tokens": 95}, 400, "max_tokens=95"),
    ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens must lie in 1.."),
    ("completions", {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens must be an integer"),
    ("completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens must be an integer"),
    ("completions", {"prompt": "a", "max_tokens": "9"}, 400, "max_tokens must be an integer"),
    ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature must lie"),
    ("completions", {"prompt": "a", "top_p": 0}, 400, "top_p must be above 0"),
    ("completions", {"prompt": "a", "seed": 2**64}, 400, "seed must lie"),
    ("completions", {"prompt": "a", "n": 129}, 400, "n must lie"),
    ("completions", {"prompt": "a", "n": 40}, 400, "n=40 is more than the 36 texts"),
    ("completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs must be an integer in 0..20"),
    ("completions", {"prompt": "a", "stop": [""]}, 400, "stop takes"),
    ("completions", {"prompt": "a", "stop": 3}, 400, "stop must be"),
    ("completions", {"prompt": "a", "stream": "yes"}, 400, "stream must be true or false"),
    ("completions", {"prompt": "a", "echo": True}, 400, "echo is not supported"),
    ("completions", {"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
    ("completions", {"prompt": "a", "temprature": 1}, 400, "unknown field 'temprature'"),
    ("completions", {"prompt": "a", "\ud800": 1}, 400, "unknown field"),
    ("completions", {"prompt": "a", "model": "other"}, 404, "there is 'tiny'"),
    ("completions", {"prompt": "a", "model": "\ud800"}, 404, "there is 'tiny'"),
    ("chat/completions", {}, 400, "messages must be a list"),
    ("chat/completions", {"messages": [3]}, 400, "messages[0] must be an object"),
    ("chat/completions", {"messages": [{}]}, 400, "messages[0]: has no 'role'"),
    ("chat/completions", {"messages": [{"role": "x", "content": ""}]}, 400, "role 'x'"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "has no 'content'"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "type text",
    ),
    ("chat/completions", {"messages": CHAT * 9}, 400, "more than this server's 96"),
    ("chat/completions", {"messages": CHAT, "top_logprobs": 2}, 400, "needs logprobs=true"),
    ("chat/completions", {"messages": CHAT, "tools": [{}]}, 400, "tools[0] must be"),
    ("completions", b"a" * (9 << 20), 413, "larger than"),
    ("nothing", {}, 404, "/v1/nothing"),
]  # fmt: skip


@pytest.mark.parametrize("path, body, status, message", BAD)
def test_a_bad_request_is_told_so(client, worker, path, body, status, message):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(f"/v1/{path}", content=data)
    error = response.json()["error"]
    assert (response.status_code, message in error["message"]) == (status, True), error
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    assert worker.counts == (0, 0) and worker.is_alive()


def test_odd_texts_are_answered(client):
    for prompt in ("", "\x00\ud800\U0001f999", "<|eot|>"):
        response = client.post(
            "/v1/completions", content=json.dumps({"prompt": prompt, "max_tokens": 2})
        )
        assert response.status_code == 200


def test_what_there_is_to_know(client):
    listed = client.get("/v1/models").json()["data"]
    assert listed[0]["id"] == "tiny" and listed[0]["max_model_len"] == LENGTH
    assert client.get("/v1/models/tiny").json() == listed[0]
    assert client.get("/v1/models/a%2Fb").json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/health").json() == {"status": "ok"}
    schema = client.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]
    fields = schema["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields["n"]["anyOf"][0]["maximum"] == 128 and "messages" not in fields
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("https://", "http").replace('"http', "")


def metric(client, name):
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_metrics_count_what_was_done(client):
    value = functools.partial(metric, client)
    names = (
        "puna_generated_tokens_total", 'puna_requests_total{path="/v1/completions",status="200"}',
        'puna_requests_total{path="/v1/completions",status="400"}',
    )  # fmt: skip
    before = [value(name) for name in names]
    post(client, "completions", prompt="a llama", max_tokens=3, n=2)
    post(client, "completions")
    after = [value(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [6, 1, 1]
    assert value("puna_slots") == 4 and value("puna_running") == 0


def test_many_clients_get_their_own_and_leave_when_they_like(url, worker, client, made):
    prompts = [f"llama number {i}" for i in range(20)]
    want = [c.text for c in made(prompts, 24, temperature=1.1, seed=np.arange(20))]

    async def one(client, i):
        asked = {"prompt": prompts[i], "max_tokens": 24, "temperature": 1.1, "seed": i}
        await asyncio.sleep(0.01 * (i * 7 % 20))
        if i % 2:
            response = await client.post("/v1/completions", json=asked)
            return response.json()["choices"][0]["text"]
        text = ""
        async with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as r:
            async for line in r.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if i % 4 == 0 and len(text) > 3:
                        return text
        return text

    async def leave(client):
        with pytest.raises(httpx.ReadTimeout):
            asked = {"prompt": "x", "max_tokens": 90, "n": 9}
            await client.post("/v1/completions", json=asked, timeout=httpx.Timeout(9, read=0.1))

    async def everyone():
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            *texts, _, _ = await asyncio.gather(
                *(one(client, i) for i in range(20)), leave(client), leave(client)
            )
        for _ in range(100):
            if worker.counts == (0, 0):
                return texts
            await asyncio.sleep(0.1)
        raise AssertionError(f"left behind: {worker.counts}")

    for i, (text, whole) in enumerate(zip(asyncio.run(everyone()), want, strict=True)):
        if i % 4:
            assert text == whole
        else:
            assert whole.startswith(text) and text
    assert metric(client, "puna_cancelled_total") >= 2


# Without a socket


def asked(server, method="POST", path="/v1/completions", headers=None, **body):
    """What the routes answer to one request."""

    async def request():
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, json=body or None, headers=headers)

    return asyncio.run(request())


def test_an_adapter_is_a_model_of_its_own(client, params, worker):
    listed = client.get("/v1/models").json()["data"]
    assert [(m["id"], m.get("parent")) for m in listed] == [("tiny", None), ("poet", "tiny")]
    assert client.get("/v1/models/poet").json() == listed[1]
    [wanted] = complete(MODEL, with_poet(params), TOKENIZER, ["the llama"], 8)
    [plain] = complete(MODEL, params, TOKENIZER, ["the llama"], 8)
    assert wanted.text != plain.text
    for model, made in (("poet", wanted), ("tiny", plain), ("poet", wanted)):
        answer = post(client, "completions", model=model, prompt="the llama", max_tokens=8).json()
        assert (answer["model"], answer["choices"][0]["text"]) == (model, made.text)
    answer = post(client, "completions", model="clerk", prompt="a")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith(
        "'clerk' is not here; there is 'tiny', 'poet'"
    )
    with pytest.raises(UserError, match="^--adapter=poet=... must have another name than the mo"):
        app.serve(worker.engine, None, None, "poet")


def test_an_api_key_is_needed_where_there_is_one(worker):
    server = app.Server(worker, "tiny", api_key="s\u00e9cret")
    for key in (None, "Bearer wrong", "Bearer ", "Basic s\u00e9cret", "s\u00e9cret"):
        headers = {"authorization": key.encode()} if key else {}
        response = asked(server, headers=headers, prompt="a")
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    right = {"authorization": "Bearer s\u00e9cret".encode("latin-1")}
    assert asked(server, "GET", "/v1/models", right).status_code == 200
    assert asked(server, "GET", "/health").status_code == 200


def test_pages_of_other_sites_are_refused(worker):
    server = app.Server(worker, "tiny")
    known = ("http://evil", 403), ("null", 403), ("http://[", 403), ("http://here", 200)
    for origin, status in known:
        assert asked(server, "GET", "/v1/models", {"origin": origin}).status_code == status


def test_a_name_that_was_led_here_is_another_sites(worker):
    server = app.Server(worker, "tiny", local=True)
    for url, status in (
        ("http://evil.example:8000", 403), ("http://localhost:8000", 200),
        ("http://127.0.0.1:8000", 200), ("http://[::1]:8000", 200), ("https://behind.tls", 200),
    ):  # fmt: skip
        headers = {"origin": url, "host": url.partition("//")[2]}
        assert asked(server, "GET", "/v1/models", headers).status_code == status
    keyed = app.Server(worker, "tiny", api_key="key", local=True)
    headers = {"origin": "http://a", "host": "a", "authorization": "Bearer key"}
    assert asked(keyed, "GET", "/v1/models", headers).status_code == 200


def test_a_model_without_a_chat_format(worker):
    server = app.Server(worker, "tiny")
    plain = Engine.__new__(Engine)
    plain.__dict__.update(worker.engine.__dict__, tokenizer=byte_tokenizer())
    server.engine = plain
    response = asked(server, path="/v1/chat/completions", messages=CHAT)
    assert response.status_code == 400
    assert "has no chat format" in response.json()["error"]["message"]


def test_a_full_queue_asks_for_patience(worker):
    # It has not been started, so what is submitted stays.
    idle = Worker(worker.engine, max_waiting=0)
    server = app.Server(idle, "tiny")
    idle.submit([Job([1], None, 1, print)] * 3)
    response = asked(server, prompt="a", n=2)
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert response.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_ends_the_answers(worker, stream):
    class Broken:
        num_slots, free, max_length, adapters = 1, 1, LENGTH, ()
        tokenizer, check = TOKENIZER, worker.engine.check

        def insert(self, *args):
            return 0

        def step(self):
            raise ValueError("broken")

    ended = []
    broken = Worker(Broken(), on_failure=lambda: ended.append(True))
    server = app.Server(broken, "tiny")
    broken.start()
    response = asked(server, prompt="a", stream=stream)
    error = events_or_error(response)
    assert "ending" in error["message"] and "broken" not in error["message"]
    broken.join()
    assert ended and isinstance(broken.error, ValueError)
    assert asked(server, "GET", "/health").status_code == 503
    assert asked(server, prompt="a").status_code == 503


def events_or_error(response):
    if response.status_code == 200:
        return json.loads(response.text.split("\n\n")[0].removeprefix("data: "))["error"]
    assert response.status_code == 503
    return response.json()["error"]
