"""Pages made from the code are up to date; the README stays short and links lead somewhere."""

import importlib.util
import re
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


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    assert not [line for line in lines if len(line) > 100]


def test_links_between_pages_lead_somewhere():
    dead = [
        f"{page.name}: {link}"
        for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if not link.startswith("http") and not leads_somewhere(page, link)
    ]
    assert not dead, dead


def leads_somewhere(page, link):
    path, _, heading = link.partition("#")
    target = page.parent / path if path else page
    if not heading or not target.exists():
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    return heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
