"""Paths of a user: `~` in every flag and key, and URLs refused by name in every one of them."""

import getpass
import pathlib

import pytest

import puna
from puna import __main__ as cli
from puna.configs import get_config, paths, schema
from puna.configs.errors import ConfigError, UserError
from puna.eval import evaluate
from puna.models.decode import slots
from puna.models.release.convert import convert
from puna.models.text.tokenizer import byte_tokenizer

URLS = ("gs://bucket/run", "s3://bucket/run", "az://b/r", "hf://org/name", "https://host/x.gguf",
        "http://host/x", "file:///x", "ftp://h/x", "GS://bucket/x", "host:/export/x")  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and an empty current one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir())


def test_a_home_folder_is_expanded(home):
    assert paths.local("~", "x") == home
    assert paths.local("~/a/b", "x") == paths.local(pathlib.Path("~/a/b"), "x") == home / "a/b"
    me = getpass.getuser()
    assert paths.local(f"~{me}/a", "x") == pathlib.Path(f"~{me}/a").expanduser()
    for other in ("a~b", "./~/a", "a/~", "/~", "C:/a", "a:b", "x@3"):
        assert paths.local(other, "x") == pathlib.Path(other)


@pytest.mark.parametrize("path", URLS)
def test_urls_are_refused_by_name(path):
    scheme = path.partition(":")[0]
    for value in (path, pathlib.Path(path)):
        with pytest.raises(
            UserError, match=rf"^--workdir={scheme}:.* {scheme}:// is not supported"
        ):
            paths.local(value, "--workdir")


@pytest.mark.parametrize("path", [None, 3, b"x", "", "a\0b", ["a"]])
def test_what_is_no_path(path):
    with pytest.raises(UserError, match="^here"):
        paths.local(path, "here")


def test_a_home_folder_that_is_not_there(home):
    with pytest.raises(UserError, match="there is no home folder ~nobody-here; write ./~nobody-h"):
        paths.local("~nobody-here/x", "x")


def test_a_model_of_the_hub_is_to_be_downloaded_first(home):
    name = "meta-llama/Llama-3.2-1B"
    command = f"`hf download {name} --local-dir Llama-3.2-1B`"
    for load in (puna.load, puna.load_tokenizer, lambda path: convert(path, "to")):
        with pytest.raises(UserError, match=f"no such file or directory.*{command}"):
            load(name)
        for url in (f"hf://{name}", f"https://huggingface.co/{name}/tree/main"):
            with pytest.raises(UserError, match=command):
                load(url)
    for other in ("Llama-3.2-1B", "a/b/c", "/a/b", f"{home}/x"):
        assert "Hub" not in str(paths.missing(pathlib.Path(other)))


COMMANDS = {
    "--workdir": ["train", "--config=tiny", "--workdir={}"],
    "--config": ["train", "--config={}", "--workdir=x"],
    "train.init_from": ["train", "--config=tiny", "--workdir=x", "--init_from={}"],
    "train.local_dir": ["train", "--config=tiny", "--workdir=x", "--config.train.local_dir={}"],
    "data.tokenizer": ["train", "--config=tiny", "--workdir=x", "--config.data.tokenizer={}"],
    "data.data_dir": ["train", "--config=tiny", "--workdir=x", "--config.data.data_dir={}"],
    "--checkpoint": ["eval", "--config=tiny", "--checkpoint={}"],
    "--checkpoint=": ["generate", "--checkpoint={}", "--prompt=x"],
    "--workdir=": ["generate", "--checkpoint=x", "--prompt=x", "--workdir={}"],
    "SRC": ["convert", "{}", "x"],
    "DST": ["convert", "x", "{}"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("path", ["s3://bucket/run", "hf://org/name", "file:///x"])
def test_every_flag_and_key_refuses_urls_by_name(name, path, home):
    with pytest.raises(UserError, match=f"{name.rstrip('=')}=.*{path}") as caught:
        cli._run([part.format(path) for part in COMMANDS[name]])
    assert "path of this machine" in str(caught.value)


@pytest.mark.parametrize("key", [k for k, *_ in schema.keys() if f"{k.rsplit('.')[-1]}" in (
    "init_from", "local_dir", "tokenizer", "data_dir")])  # fmt: skip
def test_keys_refuse_urls_in_python_too(key):
    config = get_config("tiny")
    with pytest.raises(ConfigError, match=f"^{key}='s3://b/x' must be .*path of this machine"):
        config.update_from_flattened_dict({key: "s3://b/x"})
        schema.from_dict(config)


def test_functions_refuse_urls_by_name(home):
    config = get_config("tiny")
    for call in (
        lambda url: puna.train(config, url),
        lambda url: puna.evaluate(config, url),
        puna.load,
        puna.load_tokenizer,
        byte_tokenizer().save,
        lambda url: convert(url, "x"),
    ):
        for url in ("az://bucket/run", pathlib.Path("s3://bucket/run")):
            with pytest.raises(UserError, match="is not supported here yet"):
                call(url)


CONFIG = """
from puna.configs import base

def get_config(variant=""):
    config = base.get_config()
    config.model.update(vocab_size=264, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
                        head_dim=8, mlp_dim=24, compute_dtype="float32")
    config.data.update(train="2*~/a.txt,1*~/?.txt", validation="~/a.txt", seq_len=32,
                       tokenizer="~/tokenizer")
    config.optimizer.update(warmup_steps=1)
    config.train.update(steps=2, batch_size=8, save_every=2, local_dir="~/fast", local_every=1)
    return config
"""


def test_every_command_reads_and_writes_the_home_folder(home, capsys, monkeypatch):
    (home / "a.txt").write_text("llama walks over the puna. " * 40)
    (home / "my.py").write_text(CONFIG)
    byte_tokenizer().save("~/tokenizer")
    byte_tokenizer().save(pathlib.Path("~/tokenizer"))
    cli._run(["train", "--config=~/my.py", "--workdir=~/runs/x"])
    assert f"are in {home}/runs/x" in capsys.readouterr().out
    assert (home / "runs/x/results.json").exists() and (home / "fast").is_dir()
    cli._run(
        ["eval", "--config", "~/my.py:variant", "--checkpoint=~/runs/x", "--workdir=~/numbers"]
    )
    with monkeypatch.context() as patch:
        patch.setattr(slots.Engine, "stream", lambda *args, **options: [])  # compiling takes long
        cli._run(["generate", "--checkpoint", "~/runs/x", "--prompt=a", "--workdir=~/said"])
    cli._run(["convert", "~/runs/x", "~/release"])
    arguments = [
        "train",
        "--config=~/my.py:variant",
        "--workdir=~/runs/y",
        "--init_from=~/runs/x@2",
    ]
    cli._run([*arguments, "--config.train.local_dir=~/fast2"])
    names = {"a.txt", "my.py", "tokenizer", "runs", "fast", "fast2", "numbers", "said", "release"}
    assert names == {p.name for p in home.iterdir() if not p.name.startswith(".")}
    config = get_config("~/my.py")
    puna.train(config, pathlib.Path("~/runs/x"))  # nothing is left to do
    model, _ = puna.load("~/runs/x")
    assert model.config.vocab_size == 264
    assert puna.load_tokenizer("~/release").vocab_size == 259
    monkeypatch.setattr(evaluate.HeldOut, "__call__", lambda *args: {"loss": 1.0})
    assert puna.evaluate(config, "~/release")["checkpoint"] == f"{home}/release"
