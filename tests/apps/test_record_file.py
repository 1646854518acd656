"""Files of records that several programs write."""

import pytest

from lit_rlhf.apps.record_file import RecordFile
from lit_rlhf.errors import UserError


def test_the_last_equal_record_is_taken_out_and_no_other_byte_changes(tmp_path):
    file = RecordFile(tmp_path / "new" / "labels-0.jsonl")
    for record in ({"a": 1}, {"b": (2, "\u2028 \r é")}, {"a": 1}):
        file.append(record)
    foreign = b'{"by":   "hand"}\r\n\nnot a record\n'
    with file.path.open("ab") as raw:
        raw.write(foreign + b'{"cut off')
    file.remove({"a": 1})
    file.remove({"c": 3})  # which is not there
    file.remove({"b": (2, "\u2028 \r é")}, {"e": 5})
    file.remove({"c": 3}, {"b": (2, "\u2028 \r é")})
    file.remove({"e": 5})
    file.append({"d": 4})
    first, second = b'{"a": 1}\n', '{"b": [2, "\u2028 \\r é"]}\n'.encode()
    assert file.path.read_bytes() == first + foreign + second + b'{"d": 4}\n'
    with pytest.raises(UserError, match=r"labels-0.jsonl:4: damaged \(not a record: not JSON \(Expecting value"):
        file.read()
    file.path.write_bytes(first + b"7\n")
    with pytest.raises(UserError, match=r"labels-0.jsonl:2: damaged \(not a record: an object with named"):
        file.read()


def test_a_disk_that_is_full_keeps_no_half_line(tmp_path, monkeypatch):
    file = RecordFile(tmp_path / "labels-0.jsonl")
    record = {"item": "x", "turn": 1, "annotator": "ann"}
    file.append(record)
    before = file.path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"not saved \(No space left on device\)"):
        file.append({**record, "turn": 2})
    assert file.path.read_bytes() == before
