"""Write the pages of docs/ that are made from the code: `python docs/make.py` (or `make docs`).

    docs/files.md   every module with the first sentence of its docstring
    docs/config.md  every configuration key with its type, default and meaning

`tests/test_docs.py` fails where a page differs from what this command would write.
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "models", "train", "eval", "benchmarks", "docs")


def first_sentence(path: pathlib.Path) -> str:
    """The first sentence of a module's docstring, on one line, without its last stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    # A stop ends a sentence before a capital or the end, and not after "et al" or an initial.
    sentence = re.split(r"(?<!et al)(?<!\b[A-Z])\.(?= [A-Z`]|$)", paragraph)[0]
    return sentence.rstrip(".")


def modules() -> list[pathlib.Path]:
    """The files of the map, relative to the root, folder by folder."""
    found = [ROOT / name for name in ("__init__.py", "__main__.py", "setup.py")]
    for folder in FOLDERS:
        found += sorted((ROOT / folder).rglob("*.py"), key=lambda p: (p.parent.parts, p.name))
    return [path.relative_to(ROOT) for path in found]


def files_page() -> str:
    """The file map: a table for each folder."""
    lines = [
        "# The files",
        "",
        "Made by `python docs/make.py` from the modules' docstrings. Layers: `configs < models <",
        "train < eval < __main__`; a module imports only from its own layer or a lower one.",
    ]
    folder = None
    for path in modules():
        if path.parent != folder:
            folder = path.parent
            title = "The top level" if folder == pathlib.Path() else f"{folder.as_posix()}/"
            lines += ["", f"## {title}", "", "| file | what it is |", "|---|---|"]
        sentence = first_sentence(ROOT / path).replace("|", "\\|")
        lines.append(f"| `{path.as_posix()}` | {sentence} |")
    return "\n".join(lines) + "\n"


def config_page() -> str:
    """Every key of the schema: a table for each section."""
    from puna.configs import schema

    lines = [
        "# The configuration keys",
        "",
        "Made by `python docs/make.py` from `configs/schema.py`. On the command line:",
        "`--config.SECTION.KEY=VALUE`.",
    ]
    section = None
    for name, kind, default, doc in schema.keys():
        head, _, key = name.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"## {section}", "", "| key | type | default | meaning |"]
            lines += ["|---|---|---|---|"]
        meaning = " ".join(doc.split()).replace("|", "\\|")
        lines.append(f"| `{key}` | {kind.__name__} | `{default!r}` | {meaning} |")
    return "\n".join(lines) + "\n"


PAGES = {"files.md": files_page, "config.md": config_page}


def main():
    """Write the pages whose text has changed."""
    for name, page in PAGES.items():
        path = ROOT / "docs" / name
        path.write_text(page(), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(path.read_text(encoding='utf-8'))} characters")


if __name__ == "__main__":
    main()
