"""Event files, read by tensorboardX's protocol buffers and by its checksums."""

import math
import struct

from hypothesis import given
from hypothesis import strategies as st

from puna.train.event_files import EventFile


def read(path):
    """Every event of a file, all checksums compared."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data):
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(body)
        events.append(Event.FromString(body))
        data = data[16 + length :]
    return events


@given(
    st.lists(st.tuples(st.text(max_size=200), st.floats(), st.integers(0, 2**62)), max_size=4),
    st.integers(0, 2**40),
)
def test_what_is_written_is_read(tmp_path_factory, scalars, purge_step):
    folder = tmp_path_factory.mktemp("events") / "a" / "b"
    events = EventFile(folder, purge_step)
    for name, value, step in scalars:
        events.add_scalar(name, value, step)
    events.close()
    (path,) = folder.iterdir()
    version, start, *found = read(path)
    assert version.file_version == "brain.Event:2" and version.wall_time > 1.7e9
    assert (start.session_log.status, start.step) == (1, purge_step)
    assert [event.step for event in found] == [step for *_, step in scalars]
    for event, (name, value, _) in zip(found, scalars, strict=True):
        (one,) = event.summary.value
        assert one.tag == name and one.HasField("simple_value")
        if abs(value) < 3.4e38:
            assert one.simple_value == struct.unpack("<f", struct.pack("<f", value))[0]
        else:
            assert math.isnan(value) or not math.isfinite(value) or abs(one.simple_value) > 3.4e38


def test_each_session_has_a_file_of_its_own_and_flushing_shows_what_it_has(tmp_path):
    first, second = EventFile(tmp_path, 1), EventFile(tmp_path, 4)
    first.add_scalar("loss", 2.5, 3)
    first.flush()
    found = [read(path) for path in tmp_path.iterdir()]
    assert sorted(map(len, found)) == [2, 3]
    assert all("tfevents" in path.name for path in tmp_path.iterdir())
    first.close()
    second.close()
