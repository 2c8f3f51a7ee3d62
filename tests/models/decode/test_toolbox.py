"""What a model may call in `puna chat`: right on what is meant for it, and nothing beyond."""

import contextlib
import fractions
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.models.decode import toolbox
from puna.models.decode.toolbox import Folder, calculate

NUMBERS = st.integers(0, 99).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({''.join(t)})")
        | inner.map(lambda text: f"-{text}")
    ),
    max_leaves=12,
)


@given(EXPRESSIONS)
def test_integers_are_exact(expression):
    # Python's own, of text that this test has made.
    assert calculate(expression) == str(eval(expression))


@given(st.integers(-9, 9), st.integers(1, 9), st.integers(-4, 6))
def test_divisions_and_powers(a, b, n):
    assert float(calculate(f"{a} / {b}")) == pytest.approx(float(fractions.Fraction(a, b)))
    assert calculate(f"{a} // {b} * {b} + {a} % {b}") == str(a)
    assert float(calculate(f"{b} ** {n}")) == pytest.approx(float(fractions.Fraction(b) ** n))


def test_functions():
    assert calculate("factorial(20) / factorial(18)") == "380.0"
    assert calculate(" round(sqrt(2) * sin(pi / 2) + max(1, 2, e - e), 3)") == "3.414"
    assert calculate("floor(-1.5) + ceil(1.2) + round(2.6) + abs(-4)") == "7"


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').getcwd()", "a", "'a' * 9", "(1).real", "[1][0]", "lambda: 1",
     "1 if 1 else 2", "True + 1", "1j", "sqrt", "sqrt(x=1)", "max(*[1])", "1; 2", "", "1 << 9",
     "2^3", "f'{1}'", "9**9**9", "2**5000", "(-8)**0.5", "10**10**10 * 0", "factorial(10**9)",
     "round(5, -10**8)", "1 / 0", "0**-1", "exp(9999)", "2.0**9999", "(" * 400,
     "-" * 400 + "1" * 90 + "x", "*".join(["9**999"] * 30), "1+" * 400 + "1", "max()", 5, None],
)  # fmt: skip
def test_what_is_no_arithmetic_or_too_large_is_refused(expression):
    with pytest.raises((ValueError, SyntaxError, ArithmeticError, TypeError, MemoryError)):
        calculate(expression)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret").write_text("hidden")
    inside = tmp_path / "here"
    (inside / "deep").mkdir(parents=True)
    (inside / "a.txt").write_text("llama\n")
    (inside / "deep/b.txt").write_text("x" * 6001 + "é")
    (inside / "bytes").write_bytes(b"\xff\xfe")
    (inside / "nul").write_bytes(b"a\0b")
    (inside / "empty").touch()
    (inside / "large").write_bytes(b"a" * (2**20 + 1))
    (inside / "link").symlink_to("../secret")
    (inside / "out").symlink_to("..")
    (inside / "to_a").symlink_to("a.txt")
    os.mkfifo(inside / "pipe")
    return inside


def test_texts_are_listed_and_read(folder):
    found = Folder(str(folder))
    names = ["a.txt", "bytes", "deep/", "empty", "large", "nul", "pipe"]
    assert found.names().splitlines() == names
    assert found.names("./deep/") == "b.txt"
    assert found.read("a.txt") == found.read("./a.txt") == "llama\n"
    assert found.read("empty") == "[nothing]"
    first = found.read("deep/b.txt")
    assert first == "x" * 6000 + "\n[of 6002 characters; offset=6000 reads on]"
    assert found.read("deep/b.txt", 6000) == "xé"
    for i in range(300):
        (folder / f"deep/{i:03}").touch()
    assert found.names("deep").splitlines()[-2:] == ["199", "[101 more]"]


@pytest.mark.parametrize(
    "path",
    ["../secret", "deep/../../secret", "link", "out/secret", "to_a", "/etc/passwd", "a.txt/..",
     "..", "", ".", "deep", "none", "bytes", "nul", "large", "pipe", "a\0", "a.txt/b", "n" * 999, 5,
     "\ud800", "~/x", "deep/../a.txt"],
)  # fmt: skip
def test_no_path_leads_out_and_only_texts_are_read(folder, path):
    with pytest.raises((ValueError, OSError)):
        Folder(str(folder)).read(path)


@pytest.mark.parametrize("path", ["out", "..", "/", "a.txt", "deep/..", "link"])
def test_only_folders_inside_are_listed(folder, path):
    with pytest.raises((ValueError, OSError)):
        Folder(str(folder)).names(path)


def test_no_descriptor_is_left_open(folder):
    found, before = Folder(str(folder)), len(os.listdir("/dev/fd"))
    for path in ("a.txt", "deep/b.txt", "none/b", "link", "deep", "large", "pipe"):
        for do in (found.read, found.names):
            with contextlib.suppress(ValueError, OSError):
                do(path)
    assert len(os.listdir("/dev/fd")) == before


def test_what_is_no_folder_is_one_line(folder):
    for path in (folder / "a.txt", folder / "none"):
        with pytest.raises(UserError, match="files=.* must be a folder"):
            toolbox.files(str(path))
