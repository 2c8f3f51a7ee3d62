"""The quickstart corpus: what is in it, that it builds safely, and TFDS without TensorFlow."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from puna.configs.errors import UserError
from puna.configs.schema import DataConfig
from puna.train.data import python_source, sources
from puna.train.data.quarantine import Quarantine
from puna.train.data.transforms import Text

VERSION = str(python_source.PythonSource.VERSION)


def open_source(name, **config):
    config = DataConfig(**config)
    text = Text(None, config.text_key)
    return list(sources.open_source(name, config, text, Quarantine()).parsed())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder in which the corpus is built."""
    folder = tmp_path_factory.mktemp("tfds")
    open_source("tfds:python_source", data_dir=str(folder))
    return str(folder)


def test_files_are_chosen(tmp_path):
    files = {
        "b.py": "x = 1\n",
        "a.py": "# é\ny = 2\n",
        "copy.py": "x  =  1\r\n",
        "empty.py": " \n",
        "latin.py": "x = 1\n",
        "notes.txt": "x = 1\n",
        "_sysconfigdata_linux.py": "z = 3\n",
        "pack/__init__.py": "",
        "pack/in/c.py": "c = 4\n",
        "pack/test/d.py": "d = 5\n",
        "site-packages/e.py": "e = 6\n",
        "encodings/cp1.py": "f = 7\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    found = dict(python_source.read_library(str(tmp_path)))
    assert found == {name: files[name] for name in ("a.py", "b.py", "pack/in/c.py")}


def test_whole_modules_are_held_out():
    documents = {f"m{i}.py": "x" * 10 for i in range(100)}
    documents |= {f"p{i}/{j}.py": "x" * 10 for i in range(20) for j in range(5)}
    held_out = python_source.choose_validation(documents)
    size = sum(10 for path in documents if path.split("/")[0].removesuffix(".py") in held_out)
    assert size == 100
    assert python_source.choose_validation(dict(reversed(documents.items()))) == held_out


def test_the_corpus(data_dir):
    builder = tfds.builder("python_source", data_dir=data_dir)
    assert builder.info.file_format.value == "array_record"
    train, validation = (
        {example["path"].decode(): example["text"] for example in builder.as_data_source(split)}
        for split in ("train", "validation")
    )
    assert b"class JSONDecoder" in (train | validation)["json/decoder.py"]
    modules = [
        {path.split("/")[0].removesuffix(".py") for path in split} for split in (train, validation)
    ]
    assert not modules[0] & modules[1]
    sizes = [sum(map(len, split.values())) for split in (train, validation)]
    assert 4e6 < sum(sizes) < 25e6
    assert 0.03 < sizes[1] / sum(sizes) <= 0.051
    texts = [b" ".join(text.split()) for text in (train | validation).values()]
    assert len(set(texts)) == len(texts) and all(texts)
    assert not any("test" in path.split("/")[:-1] for path in train | validation)


def test_splits_are_read_as_text(data_dir):
    def read(source):
        return list(open_source(source, data_dir=data_dir))

    whole = read("tfds:python_source:validation")
    assert all(isinstance(text, str) for text in whole)
    assert read(f"tfds:python_source/{VERSION}:validation") == whole
    assert read(f"tfds:{data_dir}/python_source/{VERSION}:validation") == whole
    half = read("tfds:python_source:validation[:50%]")
    assert half == whole[: len(half)] and 0 < len(half) < len(whole)
    assert len(read("tfds:python_source")) > len(whole)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("tfds:python_source:dev", "'dev' names no examples (its splits: train, validation"),
        ("tfds:python_source:train[:x]", "'train[:x]' names no examples"),
        ("tfds:python_source:train[:0]", "'train[:0]' names no examples"),
        ("tfds:python_source/1.0.0", "cannot be loaded at"),
        ("tfds:no_such_thing", "no data set of this name is known or prepared under"),
        ("tfds:mnist", "is not prepared in"),
        ("tfds:imdb_reviews/none", "BuilderConfig none not found"),
        ("tfds:", "write tfds:DATASET"),
        ("tfds:two words", "write tfds:DATASET"),
        ("tfds:./nowhere", "no TFDS data set is in this folder"),
    ],
)
def test_what_is_not_there_is_named(data_dir, source, reason):
    with pytest.raises(UserError) as caught:
        open_source(source, data_dir=data_dir)
    message = str(caught.value)
    assert reason in message and source.partition(":")[2].partition(":")[0] in message
    assert "\n" not in message


def test_another_feature_has_to_be_there_and_a_text(data_dir):
    path = open_source("tfds:python_source", text_key="path", data_dir=data_dir)[0]
    assert path.endswith(".py")
    with pytest.raises(UserError, match="no feature 'body' .its features: text, path.; set data"):
        open_source("tfds:python_source", text_key="body", data_dir=data_dir)


def test_a_data_set_stored_as_tfrecord_is_refused(data_dir, tmp_path):
    folder = tmp_path / "old_news" / "1.0.0"
    folder.mkdir(parents=True)
    for file in (Path(data_dir) / "python_source" / VERSION).iterdir():
        name = file.name.replace("python_source", "old_news").replace("array_record", "tfrecord")
        shutil.copy(file, folder / name)
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"name": "old_news", "version": "1.0.0", "fileFormat": "tfrecord"}
    (folder / "dataset_info.json").write_text(
        json.dumps(info).replace("python_source-", "old_news-")
    )
    for name in ("old_news", f"{folder}"):
        with pytest.raises(UserError, match="is stored as tfrecord.*--file_format=array_record"):
            open_source(f"tfds:{name}", data_dir=str(tmp_path))


def test_a_broken_or_forbidden_folder_is_named(tmp_path):
    (tmp_path / "python_source" / VERSION).mkdir(parents=True)
    with pytest.raises(UserError, match="is not a complete data set; delete it"):
        open_source("tfds:python_source", data_dir=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .*; set data.data_dir"):
        open_source("tfds:python_source", data_dir=str(tmp_path / "file"))


def test_the_first_use_says_so_and_later_ones_do_not(tmp_path, capfd):
    random.seed(3)
    expected = random.Random(3).random()
    for line in (f"puna: building python_source/{VERSION} in {tmp_path}", ""):
        open_source("tfds:python_source", data_dir=str(tmp_path))
        output = capfd.readouterr()
        assert output.out == "" and output.err.startswith(line)
        assert output.err.count("\n") == bool(line)
    assert random.random() == expected


READ = """
import random, sys
random.seed(0)
from puna.configs.schema import DataConfig
from puna.train.data import iter_text
print(sum(map(len, iter_text(DataConfig(data_dir=sys.argv[1]), "tfds:python_source:validation"))))
assert "tensorflow" not in sys.modules
"""


def test_two_processes_build_at_once_and_import_no_tensorflow(tmp_path):
    trap = tmp_path / "trap" / "tensorflow"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise RuntimeError('something imports tensorflow')")
    # `puna` is where this test found it, installed or not.
    path = os.pathsep.join(filter(None, [str(trap.parent), *sys.path]))
    command = [sys.executable, "-c", READ, str(tmp_path)]
    both = [
        subprocess.Popen(
            command, stdout=-1, stderr=-1, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        for _ in range(2)
    ]
    results = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert int(results[0][0]) == int(results[1][0]) > 0
    assert os.listdir(tmp_path / "python_source") == [VERSION]
