"""`puna chat` and `puna serve` as commands, on a small release."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import types

import pytest

from puna import __main__ as cli
from puna.configs.errors import UserError
from puna.models.release import source
from puna.models.text.tokenizer import byte_tokenizer, train_bpe

httpx = pytest.importorskip("httpx", reason="a client")


@pytest.fixture(scope="module")
def release(files, tmp_path_factory):
    """A model with Llama 4's control tokens, so that it has a chat format."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = files.model_config(files.TINY | {"vocab_size": 304, "max_positions": 128})
    files.write_hf(
        folder, source.hf_table(config)[1], files.random_tensors(files.hf_shapes(config))
    )
    train_bpe(["the llama walks over the puna"] * 9, 290).save(folder)
    return folder


def test_chat_answers_what_a_pipe_says(release, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/reset\nhi\nhi\n"))
    cli._run(["chat", f"--checkpoint={release}", "--max_tokens=6", "--system=short"])
    out = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    cli._run(["chat", f"--checkpoint={release}", "--max_tokens=6", "--system=short"])
    once = capsys.readouterr().out
    assert len(once) > 2 and out.startswith(once * 2) and len(out) > 2 * len(once)


def test_chat_needs_a_chat_format(release, tmp_path):
    byte_tokenizer().save(tmp_path)
    with pytest.raises(UserError, match="has no chat format") as error:
        cli._run(["chat", f"--checkpoint={tmp_path}"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_serve_ends_in_order_when_told_to(release, number):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    process = subprocess.Popen(
        [sys.executable, "-m", "puna", "serve", f"--checkpoint={release}", "--port=0"],
        env={**os.environ, "PUNA_API_KEY": "key", "XLA_FLAGS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("tiny at http://127.0.0.1:"), process.stderr.read()
        url, asked = line.split()[-1], {"prompt": "the", "max_tokens": 100, "stream": True}
        assert httpx.post(f"{url}/v1/completions", json=asked).status_code == 401
        headers = {"authorization": "Bearer key"}
        text = ""
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, headers=headers) as answer:
            for piece in answer.iter_text():
                if not text:
                    process.send_signal(number)
                text += piece
        events = [json.loads(e[6:]) for e in text.split("\n\n") if e.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert text.endswith("data: [DONE]\n\n")
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
    finally:
        process.kill()


@pytest.mark.slow
def test_serve_asks_a_guard_that_is_a_model(release):
    # This one was never trained, and says neither safe nor unsafe.
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    command = [sys.executable, "-m", "puna", "serve", f"--checkpoint={release}", "--port=0"]
    process = subprocess.Popen(
        [*command, f"--guard={release}", "--slots=1"], env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = process.stdout.readline().split()[-1]
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "the"}, timeout=60)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "guard_failed"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "not safe or unsafe" in err
    finally:
        process.kill()


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_cut_off_at_the_end_is_no_traceback(stream):
    app = pytest.importorskip("puna.models.decode.server.app", reason="needs the extra serve")
    from puna.models.decode.server.worker import Worker

    # It is not started, so what is submitted stays.
    engine = types.SimpleNamespace(
        num_slots=1, max_length=99, adapters=(), tokenizer=byte_tokenizer(),
        check=lambda *_, **__: None,
    )  # fmt: skip
    idle = Worker(engine, max_waiting=0)
    body = json.dumps({"prompt": "a", "stream": stream}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "headers": [],
        "query_string": b"", "http_version": "1.1", "asgi": {"spec_version": "2.3"},
    }  # fmt: skip
    received = [{"type": "http.request", "body": body}]

    async def receive():
        return received.pop() if received else await asyncio.Event().wait()

    async def send(message):
        pass

    async def cut():
        task = asyncio.ensure_future(app.Server(idle, "tiny").app(scope, receive, send))
        while idle.counts != (0, 1):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    asyncio.run(cut())
    assert idle.counts == (0, 0)


def test_an_address_that_is_taken_is_one_line():
    app = pytest.importorskip("puna.models.decode.server.app", reason="needs the extra serve")

    with app.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}: Address already in use"):
            app.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--host=no.such.host.invalid --port=80: "):
        app.listen("no.such.host.invalid", 80)
    with pytest.raises(UserError, match=r"--port=70000 must lie in 0\.\.65535"):
        app.listen("127.0.0.1", 70000)
