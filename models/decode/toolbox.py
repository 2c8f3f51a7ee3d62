"""Functions that a model may call in `puna chat`: arithmetic, and reading files under one folder.

They get what a model wrote, so each bounds its own work. A mistake is an exception, whose text the
model is told.
"""

import ast
import math
import operator
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from ...configs import paths
from ...configs.errors import UserError

_EXPRESSION = 500  # characters
_BITS = 4096  # of an integer, so that no product or power takes long
_LARGEST_FACTORIAL = 500  # which has fewer bits
_FILE_BYTES, _PART, _NAMES = 1 << 20, 6000, 200  # of a file; characters at a time; of a folder

_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_CONSTANTS = {"pi": math.pi, "e": math.e}


class Tool(NamedTuple):
    """A function that a model may call.

    Attributes:
      description: what the model is told of it.
      parameters: JSON schema of the object of its arguments.
      run: takes them by name and gives the result as text.
    """

    description: str
    parameters: dict
    run: Callable[..., str]


def parameters(required: tuple[str, ...], **properties: tuple[str, str]) -> dict:
    """The schema of some arguments, each with a type and a description."""
    described = {k: {"type": kind, "description": text} for k, (kind, text) in properties.items()}
    return {"type": "object", "properties": described, "required": list(required)}


def calculator() -> dict[str, Tool]:
    """The tool `calculator`."""
    functions = ", ".join(_FUNCTIONS)
    described = parameters(
        ("expression",), expression=("string", f"with + - * / // % **, pi, e, {functions}")
    )
    return {"calculator": Tool("Compute an arithmetic expression.", described, calculate)}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, which is walked and never run as Python.

    Raises:
      ValueError, SyntaxError: it is anything else, or a number in it becomes too large.
      ArithmeticError: such as a division by zero.
    """
    if not isinstance(expression, str) or len(expression) > _EXPRESSION:
        raise ValueError(f"expression must be text of at most {_EXPRESSION} characters")
    return str(_value(ast.parse(expression.strip(), mode="eval").body))


def _value(node) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.Name(id=name) if name in _CONSTANTS:
            value = _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            value = _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            value = _OPERATORS[type(op)](_value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            value = _FUNCTIONS[name](*map(_value, args))
        case _:
            raise ValueError(f"{ast.unparse(node)[:80]} is not arithmetic")
    if isinstance(value, complex):
        raise ValueError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise ValueError(f"an integer has more than {_BITS} bits: write floats, like 2.0")
    return value


def _power(base, exponent):
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent > 0
    # The bits of the result are more than (bits of the base - 1) times the exponent.
    if whole and (abs(base).bit_length() - 1) * exponent > _BITS:
        raise ValueError(f"a power has more than {_BITS} bits: write its base as a float, like 2.0")
    return base**exponent


def _factorial(n):
    if n > _LARGEST_FACTORIAL:
        raise ValueError(f"factorial takes at most {_LARGEST_FACTORIAL}")
    return math.factorial(n)


def _round(x, digits=0):
    # Python would compute ten to the power of any number of digits.
    if abs(digits) > 300:
        raise ValueError("round takes at most 300 digits")
    return round(x, digits) if digits else round(x)


_FUNCTIONS = {
    "abs": abs, "round": _round, "min": min, "max": max, "factorial": _factorial,
    **{name: getattr(math, name) for name in (
        "sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan",
        "floor", "ceil",
    )},
}  # fmt: skip


def files(folder: str) -> dict[str, Tool]:
    """The tools `list_files` and `read_file` of a folder.

    Raises:
      UserError: it is no folder that can be read.
    """
    found = Folder(folder)
    path = ("string", "relative to the folder")
    return {
        "list_files": Tool(
            "Names in the user's folder or in a folder of it.",
            parameters((), path=path),
            found.names,
        ),
        "read_file": Tool(
            "Read a text file of the user's folder.",
            parameters(("path",), path=path, offset=("integer", "of the first character")),
            found.read,
        ),
    }


class Folder:
    """A folder and what is under it; no path leads out, since none with `..` or a link is taken."""

    def __init__(self, path: str):
        """Open it; it may itself be a link.

        Raises:
          UserError: it is no folder that can be read.
        """
        self._root = paths.local(path, "files").absolute()
        if os.open not in os.supports_dir_fd:
            raise UserError(f"files={path}: this system cannot open files without following links")
        try:
            os.close(os.open(self._root, os.O_RDONLY | os.O_DIRECTORY))
        except OSError as error:
            raise UserError(f"files={path} must be a folder: {error.strerror}") from None

    def names(self, path: str = ".") -> str:
        """What is in a folder, a line each, folders with a slash behind; without links.

        Raises:
          ValueError, OSError: it is no folder here.
        """
        opened = self._open(path, os.O_DIRECTORY)
        try:
            with os.scandir(opened) as entries:
                found = sorted(
                    entry.name + "/" * entry.is_dir(follow_symlinks=False)
                    for entry in entries
                    if entry.name.isprintable() and not entry.is_symlink()
                )
        finally:
            os.close(opened)
        more = [f"[{len(found) - _NAMES} more]"] if len(found) > _NAMES else []
        return "\n".join(found[:_NAMES] + more) or "[nothing]"

    def read(self, path: str, offset: int = 0) -> str:
        """At most 6,000 characters of a text, and how to read on.

        Raises:
          ValueError, OSError: it is no file here, no text in UTF-8, or of more than 1 MiB.
        """
        if type(offset) is not int or offset < 0:
            raise ValueError("offset must be an integer of at least 0")
        opened = self._open(path, os.O_NONBLOCK)  # a pipe would wait for who writes
        try:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise ValueError(f"{path} is no file")
            with open(opened, "rb", closefd=False) as file:
                data = file.read(_FILE_BYTES + 1)
        finally:
            os.close(opened)
        if len(data) > _FILE_BYTES:
            raise ValueError(f"{path} has more than {_FILE_BYTES} bytes")
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not text in UTF-8") from None
        if "\0" in text:
            raise ValueError(f"{path} is not text")
        end = offset + _PART
        more = f"\n[of {len(text)} characters; offset={end} reads on]" if end < len(text) else ""
        return text[offset:end] + more or "[nothing]"

    def _open(self, path, flags) -> int:
        """Open folder by folder, so that nothing can be put in the place of one in between."""
        if not isinstance(path, str) or path.startswith("/") or "\0" in path:
            raise ValueError("path must be relative to the folder")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ValueError("path must not have .. in it")
        opened = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        for i, part in enumerate(parts, 1):
            kind = flags if i == len(parts) else os.O_DIRECTORY
            try:
                inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=opened)
            except OSError as error:
                raise ValueError(f"{path} cannot be opened: {error.strerror}") from None
            finally:
                os.close(opened)
            opened = inner
        return opened
