"""Which paths name object storage, and whose fault its errors are."""

import pathlib
import sys

import pytest

from puna.configs import paths, storage
from puna.configs.errors import MachineError, UserError


def test_what_is_of_this_machine_stays_what_it_is():
    assert storage.anywhere("~/a", "x") == pathlib.Path.home() / "a"
    assert storage.at("~/a") == pathlib.Path("~/a")
    for other in ("s3://bucket/run", "GS://bucket/run", "hf://org/name", "file:///x"):
        with pytest.raises(UserError, match="^x=.*is not supported"):
            storage.anywhere(other, "x")
    with pytest.raises(UserError, match="^x: a path is text"):
        storage.anywhere(3, "x")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^x=gs://b/run: .* gcsfs: pip install 'puna\[remote\]'"):
        storage.anywhere("gs://b/run", "x")


@pytest.mark.parametrize("text", ["gs://bucket/a/run", "gs://bucket/a/run/", "gs:/bucket/a/run"])
def test_a_path_in_a_bucket(text):
    pytest.importorskip("gcsfs")
    path = storage.at(text)
    assert str(path) == str(storage.at(path)) == "gs://bucket/a/run"
    assert path.name == "run" and str(path / "b") == "gs://bucket/a/run/b"
    assert paths.absolute(path) is path and paths.in_bucket(path)
    # As pathlib spells it, where a library has made a path of the text.
    assert storage.at(pathlib.Path(text)) == path


@pytest.mark.parametrize("text", ["gs://", "gs://a b/run", "gs://bucket//run"])
def test_what_is_no_folder_of_a_bucket(text):
    pytest.importorskip("gcsfs")
    with pytest.raises(UserError, match="must be like gs://BUCKET/FOLDER"):
        storage.anywhere(text, "x")


class HttpError(Exception):
    """As gcsfs has one."""

    def __init__(self, code):
        super().__init__(f"status {code}")
        self.code = code


HttpError.__module__ = "gcsfs.retry"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("bucket/run"), None),
        (ValueError("NOT_FOUND: Error opening zarr"), None),
        (ValueError("checksum does not match"), None),
        (ValueError("UNAVAILABLE: connect failed"), MachineError),
        (TimeoutError(), MachineError),
        (HttpError(503), MachineError),
        (HttpError(403), UserError),
        (PermissionError("no"), UserError),
        (OSError("Forbidden: bucket"), UserError),
        (ValueError("PERMISSION_DENIED: bucket"), UserError),
    ],
)
def test_whose_fault_it_is(error, kind):
    assert storage.fault(error) is kind
    try:
        raise RuntimeError("a save failed") from error
    except RuntimeError as outer:
        assert storage.fault(outer) is kind
    with pytest.raises(kind or (UserError, MachineError), match="^gs://b/run: ") as caught:
        with storage.explained("gs://b/run"):
            raise error
    assert "\n" not in str(caught.value)
    # What a disk says is explained elsewhere.
    with pytest.raises(type(error)), storage.explained("/b/run"):
        raise error
