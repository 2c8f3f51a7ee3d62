"""JSON that is not one record a line: an array of records, or records spread over lines."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

_PIECE_BYTES = 1 << 20
_BLANK = re.compile(r"\s*")


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield each element of an array, or each of the values of a file, on one line as it stands.

    A value is read as it comes: no more than one and a piece of the file are in memory.

    Raises:
      ValueError: a value is damaged or cut short, or something else stands among them.
    """
    decoder, text, at, done = json.JSONDecoder(), "", 0, 0
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()

    def more() -> bool:
        """Read on, at least as much as is there, so that a long value is tried few times."""
        nonlocal text, at, done
        if piece := file.read(max(_PIECE_BYTES, len(text) - at)):
            done, text, at = done + at, text[at:] + utf8.decode(piece), 0
            return True
        utf8.decode(b"", final=True)  # raises where a character is cut short
        return False

    def next_character() -> str:
        nonlocal at
        while (at := _BLANK.match(text, at).end()) == len(text):  # type: ignore[union-attr]
            if not more():
                return ""
        return text[at]

    def wrong(expected: str) -> ValueError:
        return ValueError(f"no {expected} at character {done + at + 1}: {text[at : at + 20]!r}")

    in_array = next_character() == "["
    at += in_array
    closed = False
    while character := next_character():
        if in_array and character == "]":
            at, closed = at + 1, True
            break
        while True:
            try:
                _, end = decoder.raw_decode(text, at)
                # A number at the end of what is read may go on.
                if end < len(text) or not more():
                    break
            except (json.JSONDecodeError, RecursionError):
                if not more():
                    raise wrong("whole JSON value") from None
        # Line breaks stand between tokens only: in a string they are written \n.
        yield text[at:end].replace("\n", " ").replace("\r", " ").encode()
        at = end
        if in_array:
            if next_character() == ",":
                at += 1
            elif next_character() != "]":
                raise wrong("comma or ]")
    if in_array and not closed:
        raise wrong("closing ]")
    if next_character():
        raise wrong("end of the file after its array")
