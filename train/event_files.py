"""Event files for TensorBoard: scalars by step, in the form of TensorFlow's TFRecord.

A record is its length, the masked CRC-32C of that, an `Event` as protocol buffers encode it, and
the CRC of that. Of `tensorflow/core/util/event.proto` and `framework/summary.proto` only what a
scalar needs is written here: a library for it would import torch wherever that is installed.
"""

import os
import pathlib
import secrets
import socket
import struct
import time


def _table() -> list[int]:
    """Remainders of each byte by the polynomial of Castagnoli, bits reversed."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_REMAINDERS = _table()


class EventFile:
    """A new file of events in a folder.

    Args:
      folder: is made if it is not there.
      purge_step: TensorBoard forgets what earlier files of the folder say from this step on.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self._file = open(folder / f"events.out.tfevents.{name}", "wb")
        self._write(_bytes(3, b"brain.Event:2"))
        start = _integer(1, 1)  # SessionLog.status = START
        self._write(_integer(2, purge_step) + _bytes(7, start))
        self.flush()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write one number."""
        scalar = _bytes(1, name.encode()) + _float(2, value)
        self._write(_integer(2, step) + _bytes(5, _bytes(1, scalar)))

    def flush(self) -> None:
        """Hand what is written to the system."""
        self._file.flush()

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def _write(self, fields: bytes) -> None:
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + fields  # wall_time
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _REMAINDERS[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # as int64 is encoded
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    try:
        return _varint(field << 3 | 5) + struct.pack("<f", value)
    except OverflowError:  # of what float32 holds
        return _float(field, float("inf") if value > 0 else float("-inf"))
