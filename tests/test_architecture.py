"""The rules of the code base that a reader relies on: layers, names, sizes, the file map.

Everything here reads source text, except the tests that ask a fresh interpreter what an import
loads. `python -m puna` and notebooks see the package under the same conditions.
"""

import ast
import collections
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("configs", "models", "train", "eval", "__main__")
FOLDERS = LAYERS[:-1]
MAX_LINES = 500
MAX_KEYS, MAX_KEYS_OF_A_SECTION = 160, 40
MAX_LINES_WITHOUT_A_TEST_FILE = 60
# What is tested through the module that uses it, and where: parts of one thing seen from outside.
TESTED_WITH = {
    "configs/test_published_sizes.py": ["configs/llama3.py", "configs/llama4.py"],
    "configs/test_schema.py": ["configs/architecture.py", "configs/fields.py", "configs/rules.py"],
    "eval/judging/test_judge.py": ["eval/judging/sandbox.py"],
    "eval/tasks/test_definition.py": [
        "eval/tasks/documents.py", "eval/tasks/grade.py", "eval/tasks/made.py",
    ],
    "eval/tasks/test_evaluate.py": ["eval/tasks/report.py", "eval/tasks/requests.py"],
    "eval/test_harness.py": ["eval/harness_model.py"],
    "eval/test_several.py": ["eval/command.py"],
    "models/kernels/test_experts.py": ["models/kernels/experts_gpu.py"],
    "test_commands.py": ["configs/command_line.py"],
    "train/objectives/test_multi_token.py": ["models/multi_token.py"],
    "models/decode/server/test_app.py": [
        "models/decode/server/answer.py", "models/decode/server/openapi.py",
        "models/decode/server/prepare.py", "models/decode/server/worker.py",
    ],
    "models/decode/test_chat.py": ["models/decode/profile.py"],
    "models/decode/test_slots.py": ["models/decode/cached_model.py"],
    "models/decode/test_generate.py": ["models/decode/engine.py", "models/decode/sampling.py"],
    "models/release/test_convert.py": [
        "models/release/card.py", "models/release/source.py", "models/weights/licences.py",
    ],
    "models/test_quantize.py": ["models/leaf.py"],
    "models/test_cross.py": [
        "models/tiled_vision.py", "models/weights/tiled_vision_table.py",
    ],
    "models/test_vision.py": ["models/encoder.py", "models/weights/vision_table.py"],
    "models/text/test_files.py": ["models/text/gguf.py"],
    "models/text/test_template.py": ["models/text/sandbox.py"],
    "models/text/test_tokenizer.py": ["models/text/bpe.py"],
    "models/weights/test_config.py": ["models/weights/rope_keys.py"],
    "models/weights/test_load.py": ["models/weights/huggingface.py", "models/weights/placing.py"],
    "models/weights/test_meta.py": ["models/weights/torch_files.py"],
    "models/weights/test_safetensors_files.py": ["models/weights/tensors.py"],
    "train/data/formats/test_formats.py": [
        "train/data/formats/arrow.py", "train/data/formats/compression.py",
        "train/data/formats/json_values.py",
    ],
    "train/data/test_chats.py": ["train/data/preview.py"],
    "train/data/test_packing.py": ["train/data/examples.py"],
    "train/data/test_python_source.py": [
        "train/data/documents.py", "train/data/tfds_documents.py", "train/data/transforms.py",
    ],
    # What processes tell each other needs several of them, which `puna launch` starts.
    "train/resilience/test_processes.py": [
        "models/parallel/processes.py", "models/parallel/roll_call.py",
    ],
    # A run's folder is read as training leaves it.
    "train/test_checkpoint.py": ["models/weights/checksum.py", "models/weights/run.py"],
    "train/plan/test_plan.py": ["train/plan/figures.py", "train/plan/step.py"],
    "train/test_loop.py": ["train/data/tokenizer.py", "train/step.py"],
}  # fmt: skip


def source_files():
    """Map module name -> path for every module of the package."""
    paths = [ROOT / "__init__.py", ROOT / "__main__.py"]
    paths += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    names = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(("puna", *(p for p in parts if p != "__init__")))] = path
    return names


SOURCES = source_files()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def layer(module):
    """Return the layer's index of a module, or None for the root `puna` itself."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 else None


def base_of(node, module, path):
    """Return the absolute name that an `ast.ImportFrom` imports from."""
    if not node.level:
        return node.module
    parts = module.split(".")
    # A package's own __init__ is one level nearer to its modules than its siblings are.
    up = node.level - (path.name == "__init__.py")
    parts = parts[: len(parts) - up]
    return ".".join((*parts, *([node.module] if node.module else [])))


def imports_of(module, path):
    """Yield (imported puna module, line, relative?) for each import statement, nested or not."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "puna":
                    yield alias.name, node.lineno, False
        elif isinstance(node, ast.ImportFrom):
            base = base_of(node, module, path)
            if base.split(".")[0] == "puna":
                for alias in node.names:
                    submodule = f"{base}.{alias.name}"
                    yield (submodule if submodule in SOURCES else base), node.lineno, node.level > 0


# The root's lazy names point at every layer by design and load nothing, so it has no edges.
EDGES = {
    module: list(imports_of(module, path)) for module, path in SOURCES.items() if module != "puna"
}


def is_experiment(module):
    """Tell a config file, which --config loads by its path and so can't import relatively."""
    from puna import configs

    return module.startswith("puna.configs.") and SOURCES[module].stem in configs.names()


def test_every_layer_is_there():
    missing = [folder for folder in FOLDERS if f"puna.{folder}" not in SOURCES]
    assert not missing, f"layers without an __init__.py: {missing}"
    assert (ROOT / "__main__.py").exists()


def test_imports_stay_in_their_layer_or_below():
    upward = [
        f"{module}:{line} imports {target}"
        for module, edges in EDGES.items()
        for target, line, _ in edges
        if layer(target) is not None and layer(target) > layer(module)
    ]
    assert not upward, f"{' < '.join(LAYERS)} is broken by:\n" + "\n".join(upward)


def test_nothing_is_imported_by_its_name_as_text():
    # An import that is no statement would escape the tests above. The root's lazy names load what
    # a user asks for; an objective is a file of its own folder, whose imports are read too.
    dynamic = [
        f"{module}:{node.lineno}"
        for module, path in SOURCES.items()
        if module not in ("puna", "puna.train.objectives")
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and node.attr == "import_module")
        or (isinstance(node, ast.Name) and node.id in ("import_module", "__import__"))
    ]
    assert not dynamic, dynamic


def test_no_private_module_of_others_is_imported():
    private = [
        f"{module}:{node.lineno}"
        for module, path in SOURCES.items()
        for node in ast.walk(parse(path))
        for name in imported_names(node)
        if any(part.startswith("_") and part[:2] != "__" for part in name.split("."))
    ]
    assert not private, private


def imported_names(node):
    """The full names that an import statement of something outside of puna brings."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_imports_name_modules_that_exist():
    unknown = [
        f"{module}:{line} imports {target}"
        for module, edges in EDGES.items()
        for target, line, _ in edges
        if target not in SOURCES
    ]
    assert not unknown, "\n".join(unknown)


def test_no_circular_imports():
    graph = {module: {t for t, _, _ in edges if t != module} for module, edges in EDGES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("circular imports: " + " -> ".join(reversed(error.args[1])))


def test_imports_are_relative_but_in_experiment_files():
    wrong = [
        f"{module}:{line}"
        for module, edges in EDGES.items()
        for _, line, relative in edges
        if relative == is_experiment(module)
    ]
    assert not wrong, f"absolute in configs/NAME.py, relative elsewhere: {wrong}"


def test_no_utils_and_no_giants():
    files = [*SOURCES.values(), ROOT / "setup.py"]
    files += [f for folder in ("tests", "benchmarks") for f in (ROOT / folder).rglob("*.py")]
    assert not [f for f in files if f.name == "utils.py"]
    long = {
        str(f.relative_to(ROOT)): lines
        for f in files
        if (lines := len(f.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_tests_mirror_the_tree():
    elsewhere = {path: test for test, paths in TESTED_WITH.items() for path in paths}
    own, needed = set(), set()
    for path in (p.relative_to(ROOT) for p in SOURCES.values() if p.stem[:2] != "__"):
        if (ROOT / "tests" / path.with_name(f"test_{path.name}")).exists():
            own.add(str(path))
        elif len((ROOT / path).read_text(encoding="utf-8").splitlines()) > (
            MAX_LINES_WITHOUT_A_TEST_FILE
        ):
            needed.add(str(path))
    missing = needed - set(elsewhere)
    assert not missing, f"give them tests/FOLDER/test_NAME.py, or a place in TESTED_WITH: {missing}"
    assert not own & set(elsewhere), "these have test files of their own by now"
    gone = [test for test in TESTED_WITH if not (ROOT / "tests" / test).exists()]
    gone += [path for path in elsewhere if not (ROOT / path).exists()]
    assert not gone, f"TESTED_WITH names files that do not exist: {gone}"


def test_small_files_have_one_writer():
    # Of configs/files.py: atomic, synced, valid JSON.
    plain = [
        f"{module}:{node.lineno}"
        for module, path in SOURCES.items()
        if module != "puna.configs.files"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("write_text", "write_bytes", "dump")
        and not (isinstance(node.func.value, ast.Name) and node.func.value.id == "files")
    ]
    assert not plain, f"written without configs/files.py: {plain}"


def test_tests_are_not_a_package():
    # With __init__.py files, tests/models would be imported as the module `models`.
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_package_has_one_name_here():
    import puna

    # vars, since asking a lazy module for an attribute may import it.
    files = {name: vars(module).get("__file__") for name, module in list(sys.modules.items())}
    assert [name for name, file in files.items() if file == puna.__file__] == ["puna"]


def test_the_schema_stays_within_its_budget():
    from puna.configs import schema

    sections = collections.Counter(key.rsplit(".", 1)[0] for key, *_ in schema.keys())
    assert sections.total() <= MAX_KEYS
    assert max(sections.values()) <= MAX_KEYS_OF_A_SECTION, sections


def loaded_after(code, cwd):
    """Return what top-level modules a fresh interpreter has loaded or tried to after `code`.

    Attempts count, so that the answer doesn't depend on what happens to be installed here.
    """
    spy = (
        "import sys\n"
        "class Spy:\n"
        "    seen = set()\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        self.seen.add(name.split('.')[0])\n"
        "sys.meta_path.insert(0, Spy())\n"
    )
    end = "\nprint('LOADED', *sorted(Spy.seen | {name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run(
        [sys.executable, "-c", spy + code + end], cwd=cwd, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.rsplit("LOADED", 1)[1].split())


def test_importing_puna_loads_nothing_heavy(tmp_path):
    heavy = {"jax", "flax", "numpy", "ml_collections", "absl", "tensorflow", "torch"}
    assert not heavy & loaded_after("import puna; dir(puna)", tmp_path)


def test_importing_models_loads_no_other_framework(tmp_path):
    assert not {"tensorflow", "torch"} & loaded_after("import puna.models", tmp_path)


def test_importing_everything_claims_no_foreign_name(tmp_path):
    everything = "\n".join(f"import {module}" for module in SOURCES)
    loaded = loaded_after(everything, tmp_path)
    assert not {"models", "train", "eval", "configs"} & loaded
    assert not {"tensorflow", "torch", "transformers"} & loaded


@pytest.mark.parametrize("first", ["puna", "puna.train.loop", "puna.models"])
def test_public_names_resolve_whatever_is_imported_first(first, tmp_path):
    # puna.train is a package and a function: neither import order may lose one of them.
    code = (
        f"import {first}, puna\n"
        "assert all(callable(getattr(puna, name)) for name in puna.__all__ if name[0] != '_')\n"
        "import puna.train.loop\n"
        "assert callable(puna.train) and callable(puna.train.loop.train)\n"
    )
    loaded_after(code, tmp_path)
