"""What `pip install` gives: declared dependencies, and a wheel that holds the package alone."""

import ast
import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "models", "train", "eval")


@pytest.fixture(scope="module")
def setup_arguments():
    """Return what setup.py passes to `setup`."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def distributions(requirements):
    """Return the normalized distribution names of requirement strings."""
    names = (re.match(r"[A-Za-z0-9._-]+", requirement).group() for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def third_party(tree, nested):
    """Yield (top-level name, line) of absolute imports: all of them, or only the outermost."""
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        for name in names:
            top = name.split(".")[0]
            if top != "puna" and top not in sys.stdlib_module_names:
                yield top, node.lineno


def undeclared(declared, nested):
    providers = importlib.metadata.packages_distributions()
    files = [ROOT / "__init__.py", ROOT / "__main__.py"]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line in third_party(ast.parse(path.read_text(encoding="utf-8")), nested)
        # Without a provider the package isn't installed here: its name is the best guess.
        if not distributions(providers.get(name, [name])) & declared
    ]


# Loaded by the one command that needs the extra, which says so where it is missing.
OF_AN_EXTRA = {"models/decode/server/app.py": "serve"}


def test_version_is_that_of_the_source(setup_arguments):
    import puna

    assert setup_arguments["version"] == puna.__version__


def test_packages_are_the_layers_alone(setup_arguments):
    packages = setup_arguments["packages"]
    assert {f"puna.{folder}" for folder in FOLDERS} <= set(packages)
    assert {name.split(".")[0] for name in packages} == {"puna"}
    assert {name.split(".")[1] for name in packages if "." in name} == set(FOLDERS)


def test_modules_import_at_the_top_only_what_the_base_install_has(setup_arguments):
    base = setup_arguments["install_requires"]
    missing = undeclared(distributions(base), nested=False)
    for path, extra in OF_AN_EXTRA.items():
        of_it = [line for line in missing if line.startswith(f"{path}:")]
        assert of_it, f"{path} is like any other by now: take it out of OF_AN_EXTRA"
        more = undeclared(distributions(base + setup_arguments["extras_require"][extra]), False)
        missing = [line for line in missing if line not in of_it or line in more]
    assert not missing, "\n".join(missing)


def test_every_import_is_declared(setup_arguments):
    extras = setup_arguments["extras_require"]
    for_users = [extras[kind] for kind in extras if kind not in ("dev", "reference")]
    declared = distributions(sum(for_users, start=setup_arguments["install_requires"]))
    missing = undeclared(declared, nested=True)
    assert not missing, "\n".join(missing)


def test_the_base_install_has_no_other_framework_and_no_accelerator(setup_arguments):
    names = distributions(setup_arguments["install_requires"])
    assert not {"tensorflow", "torch", "transformers"} & names
    assert not [r for r in setup_arguments["install_requires"] if "[" in r]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT,
        tree,
        ignore=shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__"),
    )
    stale = tree / "build" / "lib" / "puna" / "models" / "deleted.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    (tree / "scratch.py").touch()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", tmp_path, tree], check=True)
    (wheel,) = tmp_path.glob("puna-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    expected = {"puna/__init__.py", "puna/__main__.py", "puna/py.typed"}
    expected.add("puna/train/plan/facts.toml")
    expected.add("puna/eval/audits/prompts.toml")
    definitions = (ROOT / "eval" / "tasks" / "definitions").glob("*.toml")
    expected |= {f"puna/{path.relative_to(ROOT)}" for path in definitions}
    for folder in FOLDERS:
        expected |= {f"puna/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    assert names == expected

    # A module in a folder without __init__.py would be missing from the packages, and so from
    # the wheel: the equality above says so. What is installed must also run.
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import puna; print(puna.__file__)"
    run = [sys.executable, "-c", code, str(site)]
    where = subprocess.run(run, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert where.stdout.strip() == str(site / "puna" / "__init__.py")
