"""Whatever stands in a configuration or on the command line, it is valid or one line says why."""

import contextlib
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ml_collections import config_dict

from puna import __main__ as cli
from puna.configs import names, schema
from puna.configs.errors import ConfigError

KEYS = [name for name, *_ in schema.keys()]
KINDS = {name: kind for name, kind, *_ in schema.keys()}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**53, 0, 1, -1])
    | st.sampled_from([400, 5000]).map(lambda digits: -(10**digits))
    | st.floats()
    | st.complex_numbers()
    | st.binary(max_size=9)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
# Values of the right type, so that the rules between keys are reached too.
NUMBERS = st.integers(-2, 70) | st.sampled_from([2**31, 2**53])
OF_KIND = {
    int: NUMBERS,
    float: st.floats(-1, 2) | NUMBERS,
    bool: st.booleans(),
    str: st.sampled_from(
        ["", " ", "bytes", "train", "muon", "float32", "wsd", "expert_choice", "skip"]
    ),
}


def put(config, name, value):
    """Set a dotted key of a nested dict, through whatever stands there already."""
    *sections, last = name.split(".")
    for section in sections:
        inner = config.get(section)
        config[section] = config = inner if isinstance(inner, dict) else {}
    config[last] = value


@given(st.dictionaries(st.sampled_from([*KEYS, "model", "train", "x.y"]) | st.text(), VALUES))
@example({"train.steps": -(10**5000)})
@example({"optimizer.learning_rate": 10**400})
@example({"data.train": "x" * 10**6})
@example({"a\nb": 1})
def test_values_of_any_type(one_line, settings):
    config = {}
    for name, value in settings.items():
        put(config, name, value)
    with one_line():
        assert isinstance(schema.from_dict(config), schema.Config)


@given(st.data())
def test_values_of_the_right_type(one_line, data):
    config = {}
    for name in data.draw(st.lists(st.sampled_from(KEYS), max_size=12)):
        put(config, name, data.draw(OF_KIND[KINDS[name]]))
    with one_line():
        made = schema.from_dict(config)
        assert schema.from_dict(schema.to_dict(made)) == made


@given(VALUES | st.dictionaries(st.integers() | st.none() | st.tuples(st.text()), VALUES))
def test_what_is_no_configuration_at_all(one_line, value):
    with one_line():
        schema.from_dict(value)


def test_a_placeholder_that_nobody_filled():
    config = config_dict.ConfigDict({"train": {"steps": config_dict.required_placeholder(int)}})
    with pytest.raises(ConfigError, match="train.steps has no value .*set --config.train.steps="):
        schema.from_dict(config)


TEXTS = st.text(max_size=8) | st.sampled_from(
    [*("0", "1", "-1", "3.5", "1e3", "nan", "inf", "9" * 400, "9" * 5000, "true", "False", "None")]
    + [
        *(
            "1_0",
            "0x10",
            "0b1",
            "010",
            " 7 ",
            "\u0663",
            "\u00b2",
            "()",
            "[1]",
            "'a'",
            "\0",
            "\udcff",
        )
    ]
    + [*("adamw", "muon", "train", "bytes", "a.jsonl", "--workdir=x", "@x", "$x", "{}", "\n")]
)
FLAGS = st.one_of(
    st.builds("--config.{}={}".format, st.sampled_from(KEYS), TEXTS),
    st.builds("--config.{}={}".format, st.text(max_size=8), TEXTS),
    st.builds("{}config.{}".format, st.sampled_from(["--", "-", "--no"]), st.sampled_from(KEYS)),
    st.builds("--config={}".format, st.sampled_from([*names(), "tiny:x", "llama3:8b"]) | TEXTS),
    st.builds(
        "--{}={}".format,
        st.sampled_from(["workdir", "num_processes", "flagfile", "undefok", "help", "heartbeat"]),
        TEXTS,
    ),
    st.sampled_from(["--config", "--config.", "--", "-", "--workdir", "--flagfile", "--=", "-h"]),
    st.text(string.printable, max_size=10),
    TEXTS,
)


@given(command=st.sampled_from(["train", "eval"]), flags=st.lists(FLAGS, max_size=4))
@example(command="train", flags=["--config.train.steps=" + "9" * 5000])
@example(command="train", flags=["--config.optimizer.eps=" + "9" * 400])
@example(command="train", flags=["--config.train.steps"])
def test_a_command_line_of_anything(one_line, command, flags):
    started = []
    with pytest.MonkeyPatch.context() as patch, one_line():
        # What would start: up to there it is only reading.
        patch.setattr(cli, "_join", lambda args, command: None)
        patch.setattr(cli, f"_{command}", started.append)
        with contextlib.redirect_stdout(None):
            cli._run([command, "--config=tiny", *flags])
    for args in started:
        assert isinstance(schema.from_dict(args.config), schema.Config)


@given(st.lists(FLAGS | st.sampled_from(["train", "eval", "generate", "help"]), max_size=3))
def test_a_command_of_anything(one_line, arguments):
    with pytest.MonkeyPatch.context() as patch, one_line():
        for function in ("_join", "_train", "_eval", "_generate", "_launch", "_convert"):
            patch.setattr(cli, function, lambda *args: None)
        with contextlib.redirect_stdout(None):
            cli._run(arguments)
