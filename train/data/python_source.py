"""The corpus of the quickstart: the Python standard library that runs this program.

A TFDS builder, `python_source`, that needs no network: its documents are the library's own `.py`
files. Left out are the tests (some systems do not install them, and they would be half of the
corpus), tables written by programs (character maps, help texts, build settings), empty files and
repeated ones. Validation holds whole top-level modules, so no package is in both splits.
"""

import contextlib
import hashlib
import io
import os
import random
import sys
import sysconfig
from collections.abc import Iterator

import tensorflow_datasets as tfds

from ...configs.errors import UserError

RECIPE = 1  # counted up whenever the choice or the split of the files changes
VALIDATION_FRACTION = 0.05  # of the bytes
_NOT_SOURCE = {"__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """The .py files of the standard library, split into train and validation by module.

    The version names the interpreter and the recipe, `311.7.1` for Python 3.11.7 and recipe 1, so
    that another Python builds a corpus of its own. Examples are {"text": bytes, "path": bytes},
    the path relative to the library.
    """

    VERSION = tfds.core.Version(
        f"{sys.version_info.major}{sys.version_info.minor:02d}.{sys.version_info.micro}.{RECIPE}"
    )
    # TFDS would look here for checksums of downloads (there are none), by way of a package,
    # importlib_resources, that it does not require.
    code_path = None

    def __init__(self, *, file_format=None, **kwargs):
        # TFDS writes tfrecord unless told otherwise, and needs TensorFlow for it.
        super().__init__(file_format=file_format or "array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "path": tfds.features.Text()}
        return self.dataset_info_from_configs(
            description="The .py files of the Python standard library, without its tests.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://docs.python.org/3/library/",
            license="Python Software Foundation License Version 2",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        library = sysconfig.get_path("stdlib")
        documents = dict(read_library(library))
        if not documents:
            raise UserError(
                f"tfds:python_source: there are no .py files in {library}; this Python comes "
                "without its sources, so train on other data"
            )
        held_out = choose_validation(documents)
        splits = {"train": {}, "validation": {}}
        for path, text in documents.items():
            splits["validation" if _module(path) in held_out else "train"][path] = text
        return {name: self._generate_examples(texts) for name, texts in splits.items()}

    def _generate_examples(self, documents: dict[str, str]) -> Iterator[tuple[str, dict]]:
        for path, text in documents.items():
            yield path, {"text": text, "path": path}


def read_library(library: str) -> Iterator[tuple[str, str]]:
    """Yield (path relative to the library, text) of its distinct source files, in sorted order."""
    seen = set()
    for folder, names, files in os.walk(library):
        # Packages only: `site-packages` or `config-3.11-x86_64` cannot be names of modules.
        names[:] = sorted(name for name in names if name.isidentifier() and name not in _NOT_SOURCE)
        for file in sorted(files):
            if not file.endswith(".py") or file.startswith("_sysconfigdata"):
                continue
            path = os.path.join(folder, file)
            try:
                with open(path, encoding="utf-8") as stream:
                    text = stream.read()
            except (UnicodeDecodeError, FileNotFoundError, PermissionError):
                continue
            words = "\0".join(text.split())  # equal files may differ in white space
            digest = hashlib.sha256(words.encode()).digest()
            if words and digest not in seen:
                seen.add(digest)
                yield os.path.relpath(path, library).replace(os.sep, "/"), text


def choose_validation(documents: dict[str, str]) -> set[str]:
    """Return the top-level modules to hold out: in the order of a hash, up to 5% of the text.

    A plain threshold on the hash would hold out anything from nearly nothing to a tenth: there are
    only some two hundred modules, and a few are large.
    """
    sizes: dict[str, int] = {}
    for path, text in documents.items():
        sizes[_module(path)] = sizes.get(_module(path), 0) + len(text)
    room = VALIDATION_FRACTION * sum(sizes.values())
    held_out = set()
    for module in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[module] <= room:
            held_out.add(module)
            room -= sizes[module]
    return held_out


def prepare(builder: PythonSource) -> None:
    """Build the corpus in the builder's folder, unless another process gets there first.

    TFDS writes into a folder of its own and renames it at the end, so that a corpus is complete or
    absent, and the later of two processes finds its rename refused.

    Raises:
        UserError: the folder cannot be written.
    """
    print(f"puna: building {builder.info.full_name} in {builder.data_dir}", file=sys.stderr)
    random_state = random.getstate()
    silence = io.StringIO()  # it takes a second: TFDS's bars and its notes on stdout would be noise
    try:
        # TFDS names its folder by `random`: two processes with equal seeds would share it.
        random.seed()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            builder.download_and_prepare()
    except OSError as error:
        if not (builder.data_path.exists() and builder.is_prepared()):
            raise UserError(
                f"tfds:{builder.name}: {builder.data_dir} cannot be written "
                f"({error.strerror or error}); set data.data_dir to a folder that can"
            ) from error
    finally:
        random.setstate(random_state)


def _module(path: str) -> str:
    return path.partition("/")[0].removesuffix(".py")
