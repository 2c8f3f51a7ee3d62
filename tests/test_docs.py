"""Pages made from the code are up to date, and say something about every file and key."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
assert spec and spec.loader
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.mark.parametrize("name", make.PAGES)
def test_a_made_page_is_what_the_command_writes(name):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == make.PAGES[name](), f"docs/{name} is out of date: python docs/make.py"


def test_the_file_map_says_something_about_every_file():
    bare = [str(path) for path in make.modules() if len(make.first_sentence(ROOT / path)) < 8]
    assert not bare, f"modules without a first sentence: {bare}"


def test_sentences_do_not_end_at_an_abbreviation(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('"""Llama 3 (Dubey et al. 2024, arXiv 1.2). More.\n\nAnd more."""\n')
    assert make.first_sentence(path) == "Llama 3 (Dubey et al. 2024, arXiv 1.2)"
