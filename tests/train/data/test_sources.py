"""Source strings: parsing, and the text of what they name."""

import re

import pytest

from puna.configs.errors import UserError
from puna.configs.schema import DataConfig
from puna.train.data import iter_text, sources
from puna.train.data.quarantine import Quarantine
from puna.train.data.transforms import Text


@pytest.mark.parametrize(
    ("string", "parts"),
    [
        ("a.txt", [("a.txt", None)]),
        ("tfds:python_source:train[:10%]", [("tfds:python_source:train[:10%]", None)]),
        (
            "3*tfds:python_source:train,1*notes/*.jsonl",
            [("tfds:python_source:train", 3.0), ("notes/*.jsonl", 1.0)],
        ),
        ("0.5*a*, b/**/*.txt ,2.*c", [("a*", 0.5), ("b/**/*.txt", None), ("c", 2.0)]),
        ("3x*.txt,./3*.txt", [("3x*.txt", None), ("./3*.txt", None)]),
    ],
)
def test_parse(string, parts):
    assert sources.parse_sources(string) == [sources.Part(*part) for part in parts]


@pytest.mark.parametrize(
    ("string", "reason"),
    [
        ("", "names no data"),
        ("a,,b", "names no data"),
        ("2*", "names no data"),
        ("0*a,1*b", "the weight of a is 0"),
        ("0.0*a", "the weight of a is 0"),
    ],
)
def test_parse_refuses(string, reason):
    with pytest.raises(UserError, match=reason) as caught:
        sources.parse_sources(string)
    assert "\n" not in str(caught.value)


def test_iter_text_gives_every_document_once_in_order(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    (tmp_path / "b.txt").write_text("three")
    found = iter_text(DataConfig(text_key="body"), f"5*{tmp_path}/a.jsonl,{tmp_path}/*.txt")
    assert list(found) == ["one", "two", "three"]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_corpus_is_refused(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{path} holds no document")):
        sources.open_source(str(path), DataConfig(), Text(None), Quarantine())
