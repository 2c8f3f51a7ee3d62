"""Tables and archives that are not read as data: how each begins, its name, what to do instead."""

_UNPACK = "unpack it, and name the files that were in it"
_TO_LINES = "write its records as JSON lines or Parquet"
_RECODE = "save it again as UTF-8, e.g. with iconv"
_TFDS = "name its TFDS data set: tfds:NAME or tfds:FOLDER"

_MAGIC = (
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\x1f\x9d", "a file of compress (.Z)", "unpack it with uncompress"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it with unlz4"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with Snappy", "unpack it with snzip -d"),
    (b"LZIP", "compressed with lzip", "unpack it with lzip -d"),
    (b"SQLite format 3\0", "an SQLite database", _TO_LINES),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _TO_LINES),
    (b"Obj\x01", "an Avro file", _TO_LINES),
    (b"FEA1", "a Feather file of version 1", "save it again with pyarrow, as version 2"),
    (b"\x93NUMPY", "a NumPy array", _TO_LINES),
    (b"MMIDIDX\0", "a Megatron index of tokens", "name the text it was made from"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "save it as text or CSV"),
    (b"%PDF-", "a PDF document", "extract its text, e.g. with pdftotext"),
    (b"{\\rtf", "an RTF document", "save it as text"),
    (b"GGUF", "a GGUF model", "data.train and data.validation name data"),
    (b"WARC/", "a web archive (WARC)", "extract its documents as JSON lines"),
    (b"<mediawiki", "a MediaWiki dump", "extract its text, e.g. with wikiextractor --json"),
    (
        b"version https://git-lfs.github.com/",
        "a Git LFS pointer and not the data",
        "run git lfs pull",
    ),
    (b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f", "an ArrayRecord file", _TFDS),
    (b"\xff\xfe\0\0", "UTF-32 text", _RECODE),
    (b"\0\0\xfe\xff", "UTF-32 text", _RECODE),
    (b"\xff\xfe", "UTF-16 text", _RECODE),
    (b"\xfe\xff", "UTF-16 text", _RECODE),
)


def name_and_fix(head: bytes) -> tuple[str, str] | None:
    """What a file is, and what to do, if it is one of these; told from its first bytes."""
    for magic, name, fix in _MAGIC:
        if head.startswith(magic):
            return name, fix
    if head[:3] == b"ORC" and b"\0" in head[:64]:
        return "an ORC file", _TO_LINES
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a Python pickle, which can run any code", _TO_LINES
    if head[8:9] == b"{" and head[6:8] == b"\0\0":
        return "a safetensors file", "data.train and data.validation name data"
    if head[8:12] == b"DUCK":
        return "a DuckDB database", _TO_LINES
    if head[4:8] == b"\0\0\0\0" and head[12:13] == b"\n":  # a length, its checksum, an Example
        return "a TFRecord file", f"{_TFDS}, built with --file_format=array_record"
    return None
