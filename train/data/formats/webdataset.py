"""WebDataset: a tar archive in which files of one name, but for what follows its first dot, make a
sample: `7.jpg`, `7.txt`, `7.json`.

`.txt` is the text of a record, `.json` its fields, pictures and sounds are its `images` and
`audios` in the order of the archive; what else a sample has is left out.
"""

import base64
import json
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

TEXTS = ("txt", "text", "transcript")
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
SOUNDS = ("wav", "flac", "ogg", "mp3")
_MAX_BYTES = 1 << 30  # of a member: no picture or text has as many


def is_tar(head: bytes) -> bool:
    """Whether a file begins like a tar archive."""
    return head[257:262] == b"ustar"


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield each sample as a JSON object, in the order of the archive; bytes as `arrow.rows` does.

    Raises:
      ValueError: the archive is damaged or cut short, or a member is not what its name says.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            found = False
            for line in _samples(archive):
                found = True
                yield line
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"is a damaged tar archive ({error})") from None
    # tarfile takes any block that is no header for the end.
    file.seek(end)
    rest = file.read(1 << 16)
    if not rest or any(rest):
        raise ValueError(f"is a tar archive that is damaged or cut short at byte {end}")
    if not found:
        raise ValueError(
            "is a tar archive without samples (NAME.txt, NAME.json, pictures, sounds): unpack it, "
            "and name the files that were in it"
        )


def _samples(archive: tarfile.TarFile) -> Iterator[bytes]:
    current, record = None, {}
    for member in archive:
        folder, _, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        if not member.isfile() or not stem or not kind:
            continue
        if (folder, stem) != current:
            if record:
                yield json.dumps(record, ensure_ascii=False).encode()
            current, record = (folder, stem), {}
        _add(record, member, kind.lower(), archive)
    if record:
        yield json.dumps(record, ensure_ascii=False).encode()


def _add(record: dict[str, Any], member, kind: str, archive) -> None:
    last = kind.rpartition(".")[2]
    wanted = last in (*TEXTS, *PICTURES, *SOUNDS, "json")
    if not wanted:
        return
    if member.size > _MAX_BYTES:
        raise ValueError(f"{member.name} has {member.size} bytes, more than {_MAX_BYTES}")
    data = archive.extractfile(member).read()
    if last in PICTURES or last in SOUNDS:
        several = record.setdefault("images" if last in PICTURES else "audios", [])
        several.append(f"data:;base64,{base64.b64encode(data).decode()}")
        return
    try:
        text = data.decode("utf-8-sig")
        fields = json.loads(text) if last == "json" else {"text": text}
    except (ValueError, RecursionError) as error:
        what = "JSON" if last == "json" else "UTF-8 text"
        raise ValueError(f"{member.name} is not {what} ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{member.name} must hold a JSON object")
    if twice := sorted(fields.keys() & record.keys()):
        raise ValueError(f"{member.name}: its sample has {twice[0]!r} already")
    record |= fields
