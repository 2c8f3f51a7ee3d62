"""The page in a browser: benchmarks/page.py types into it, reads it and looks for errors."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from puna.configs.architecture import ModelConfig, VisionConfig
from puna.models import transformer
from puna.models.decode.generate import complete
from puna.models.decode.slots import Engine
from puna.models.text.tokenizer import train_bpe

app = pytest.importorskip("puna.models.decode.server.app", reason="needs the extra serve")
from puna.models.decode.server.page import page  # noqa: E402
from puna.models.decode.server.worker import Worker  # noqa: E402

SCRIPT = pathlib.Path(__file__).parents[4] / "benchmarks" / "page.py"
TOKENIZER = train_bpe(["the llama walks over the puna"] * 9, 280)
TEXT = ModelConfig(
    vocab_size=288, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=512, compute_dtype="float32",
)  # fmt: skip
EYES = VisionConfig(
    num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, image_size=8, patch_size=2,
    adapter_dim=20, max_tiles=4, token_id=TOKENIZER.special["<|patch|>"],
)  # fmt: skip


def test_pictures_are_offered_only_where_they_are_read():
    assert page(True).replace("<label >", "<label hidden>") == page(False) != page(True)


def browse(listening, config, params, *arguments):
    """Run the command against a server of the model; the process, and what was told."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("needs Chromium: apt-get install chromium")
    model = transformer.Transformer(config)
    with (
        Worker(Engine(model, params, TOKENIZER, 2, 256)) as worker,
        listening(app.Server(worker, "tiny", "key")) as url,
    ):
        done = subprocess.run(
            [sys.executable, SCRIPT, f"--url={url}", *arguments],
            capture_output=True, text=True, timeout=300, env={**os.environ, "XLA_FLAGS": ""},
        )  # fmt: skip
    return done, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_conversation(listening, drawn, tmp_path):
    params, out = drawn(TEXT, 3), tmp_path / "page.png"
    said = ["the llama & <b>puna</b>", "over the puna"]
    messages = [f"--message={text}" for text in said]
    # Of this scale both answers end by themselves.
    done, found = browse(listening, TEXT, params, "--key=key", "--system=short",
                         f"--out={out}", *messages)  # fmt: skip
    assert done.returncode == 0, done.stderr
    conversation = [{"role": "system", "content": "short"}]
    for text, answer in zip(said, found, strict=True):
        conversation.append({"role": "user", "content": text})
        ids = TOKENIZER.chat(conversation)
        [want] = complete(transformer.Transformer(TEXT), params, TOKENIZER, [ids], 256 - len(ids))
        assert answer["answer"] == want.text and answer["pieces"] > 2
        conversation.append({"role": "assistant", "content": want.text})
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_goes_wrong_is_told(listening, drawn, tmp_path):
    done, _ = browse(listening, TEXT, drawn(TEXT, 0.4), "--message=the llama", "--key=wrong",
                     f"--out={tmp_path / 'page.png'}")  # fmt: skip
    assert done.returncode == 1 and "the API key is missing or wrong" in done.stderr


@pytest.mark.slow
def test_a_message_with_a_picture(listening, drawn, tmp_path):
    Image = pytest.importorskip("PIL.Image", reason="needs the extra images")
    file, out = tmp_path / "a.png", f"--out={tmp_path / 'page.png'}"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    asked = ["--key=key", "--message=the llama", f"--picture={file}", out]
    config = dataclasses.replace(TEXT, vision=EYES)
    done, [found] = browse(listening, config, drawn(config, 0.4), *asked)
    assert done.returncode == 0 and found["answer"], done.stderr
    done, _ = browse(listening, TEXT, drawn(TEXT, 0.4), *asked)
    assert done.returncode == 1 and "takes no pictures" in done.stderr
