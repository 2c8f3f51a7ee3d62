"""What threads and libraries report goes to the run's folder while it lasts, and only then."""

import logging
import pathlib
import sys
import threading

import pytest

from puna import __main__ as cli
from puna.configs.errors import UserError
from puna.train import loop
from puna.train.resilience.background import FILE, background_log


def settings():
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    return [threading.excepthook, sys.unraisablehook] + [
        (x.level, list(x.handlers), x.propagate, x.disabled) for x in loggers
    ]


class Finaliser:
    def __del__(self):
        raise ValueError("of a finaliser")


def report():
    """Everything that is printed by itself."""
    thread = threading.Thread(target=lambda: [][0], name="reader")
    thread.start()
    thread.join()
    Finaliser()
    logging.getLogger("absl").warning("from Orbax")
    logging.getLogger("asyncio").error("never retrieved")


def test_it_is_in_the_file(tmp_path, capfd):
    before = settings()
    with background_log(tmp_path / FILE):
        assert not (tmp_path / FILE).exists()
        report()
    assert settings() == before
    assert capfd.readouterr().err == ""
    text = (tmp_path / FILE).read_text()
    for said in ("in reader", "IndexError", "Finaliser.__del__", "of a finaliser", "from Orbax",
                 "asyncio: never retrieved"):  # fmt: skip
        assert text.count(said) >= 1, said


@pytest.mark.parametrize("path", ["none", "missing folder"])
def test_where_it_cannot_be_written_nothing_is_printed_either(tmp_path, capfd, path):
    with background_log(None if path == "none" else tmp_path / "missing" / FILE):
        report()
    assert capfd.readouterr().err == "" and not any(tmp_path.iterdir())


def test_a_disk_that_is_full_when_the_file_is_closed_is_no_error(tmp_path):
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    before = settings()
    (tmp_path / FILE).symlink_to("/dev/full")
    with pytest.raises(UserError), background_log(tmp_path / FILE):
        report()
        raise UserError("what the run says")
    assert settings() == before


@pytest.mark.parametrize("fails", [None, UserError("no"), KeyboardInterrupt()])
def test_a_run_leaves_hooks_and_loggers_as_they_were(config, tmp_path, monkeypatch, capfd, fails):
    config.train.update(steps=2, eval_every=0)
    before, during = settings(), []

    def batch(self, loader):
        during.append(settings())
        report()
        if fails:
            raise fails
        return next(loader)

    monkeypatch.setattr(loop.metrics.RunLog, "fetch", batch)
    if fails is None:
        loop.train(config, tmp_path)
    else:
        with pytest.raises(type(fails)):
            loop.train(config, tmp_path)
    assert settings() == before
    assert all(x != y for x, y in zip(during[0], before, strict=True))
    assert "IndexError" in (tmp_path / FILE).read_text()
    assert "IndexError" not in capfd.readouterr().err


def test_the_command_line_too(monkeypatch, capfd):
    before = settings()
    monkeypatch.setattr(cli, "_run", lambda arguments: report())
    cli.main()
    assert settings() == before and capfd.readouterr().err == ""
