"""Where records come from: the same records, places and errors wherever their files lie."""

import gzip
import json

import pyarrow
import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.text.records import entries_of, files_of, identity_of, load_records, parse_text, read_pieces

ROWS = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(3))
PACK = {".gz": gzip.compress, ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True)}


def loaded(path, *how):
    return load_records(path, parse_text, *how).records


@pytest.fixture
def memory():
    """An address of fsspec's, as s3:// is one, whose files lie in memory."""
    import fsspec

    system = fsspec.filesystem("memory")
    yield lambda name, data: system.pipe(f"/bucket/{name}", data)
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_has_the_same_records_places_and_errors(tmp_path, suffix):
    path = tmp_path / f"x.JSONL{suffix}"
    path.write_bytes(PACK[suffix]((ROWS[: len(ROWS) // 3]).encode()) + PACK[suffix]((ROWS[len(ROWS) // 3 :]).encode()))
    assert loaded(path) == ["text 0", "text 1", "text 2"]  # of several parts, as `cat a.gz b.gz` leaves them
    path.write_bytes(PACK[suffix]((ROWS + "{}\n").encode()))
    with pytest.raises(UserError, match=rf"x.JSONL{suffix}:4: no field 'text'"):
        loaded(path)
    path.write_bytes(PACK[suffix]("cafe\ncaf\xe9\n".encode("latin-1")))
    with pytest.raises(UserError, match=rf"x.JSONL{suffix}:2: not UTF-8"):
        loaded(path, "skip")
    for damaged in (PACK[suffix](ROWS.encode())[:-9], b"not packed"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"x.JSONL{suffix}: cannot be read \(\w[^\n]*\)"):
            loaded(path)


@pytest.mark.parametrize(("name", "text"), [
    ("x.json.gz", json.dumps([{"text": "a"}])), ("x.csv.zst", "text\na\n"), ("x.txt.gz", "a"),
])  # fmt: skip
def test_every_format_of_text_may_be_compressed(tmp_path, name, text):
    (tmp_path / name).write_bytes(PACK[name[name.rindex(".") :]](text.encode()))
    assert loaded(tmp_path / name) == ["a"]


def test_compressed_text_is_read_in_pieces(tmp_path):
    text = "word " * 40_000
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(text.encode()))
    pieces = list(read_pieces(tmp_path / "x.txt.gz"))
    assert "".join(pieces) == text and len(pieces) > 1


def test_a_folder_is_its_files_of_records(tmp_path):
    for name in ("b.jsonl", "a/z.csv.gz", "a/notes.md", ".hidden.jsonl", "a.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert files_of(tmp_path) == [str(tmp_path / name) for name in ("a.parquet", "a/z.csv.gz", "b.jsonl")]
    assert files_of([f"{tmp_path}/a", tmp_path / "b.jsonl"]) == [f"{tmp_path}/a/z.csv.gz", f"{tmp_path}/b.jsonl"]
    assert entries_of([tmp_path, "user/data"]) == [files_of(tmp_path), ["user/data"]]
    assert entries_of(tmp_path) == [[file] for file in files_of(tmp_path)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: a folder without files of records \(.jsonl, "):
        files_of(tmp_path / "empty")


def test_files_at_an_address(memory):
    memory("a.jsonl", ROWS.encode())
    memory("deep/b.jsonl.gz", gzip.compress(ROWS.encode()))
    memory("notes.md", b"")
    both = ["memory:///bucket/a.jsonl", "memory:///bucket/deep/b.jsonl.gz"]
    assert [file.replace("memory:///", "memory://") for file in files_of("memory://bucket")] == [
        file.replace("memory:///", "memory://") for file in both
    ]
    assert len(files_of("memory://bucket/*.jsonl")) == 1
    for file in files_of("memory://bucket"):
        assert loaded(file) == ["text 0", "text 1", "text 2"]
    before = identity_of("memory://bucket/a.jsonl")
    assert before == identity_of("memory://bucket/a.jsonl")
    memory("a.jsonl", ROWS.encode() + b"{}\n")
    assert identity_of("memory://bucket/a.jsonl") != before
    with pytest.raises(UserError, match=r"memory://bucket/a.jsonl:4: no field 'text'"):
        loaded("memory://bucket/a.jsonl")


@pytest.mark.parametrize(("path", "said"), [
    ("memory://bucket/none.jsonl", "cannot be read"), ("memory://bucket/none*.jsonl", "no file matches"),
    ("memory://none", "a folder without files of records"), ("nowhere://x/y.jsonl", "cannot be read"),
])  # fmt: skip
def test_what_is_not_at_an_address_is_one_line(path, said):
    with pytest.raises(UserError) as caught:
        for file in files_of(path):
            loaded(file)
    assert str(caught.value).startswith(f"{path}: {said}") and "\n" not in str(caught.value)


def test_a_data_set_by_its_name_split_and_columns(tmp_path, monkeypatch):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/data").mkdir(parents=True)  # datasets reads a folder as it reads what lies on the Hub
    (tmp_path / "user/data/test.jsonl").write_text(ROWS)
    (tmp_path / "user/data/train.jsonl").write_text('{"text": "t", "other": 1}\n')
    (name,) = files_of({"path": "user/data", "split": "test[:2]", "columns": ["text"]})
    assert name == "user/data?split=test[:2]&columns=text"
    assert loaded(name) == ["text 0", "text 1"] and files_of([name]) == [name]
    assert identity_of(name) is not None
    (name,) = files_of({"path": "user/data"})
    assert load_records(name, parse_text).unread == ["other"]
    for wrong, said in ({"split": "dev"}, "Unknown split"), ({"columns": ["words"]}, "words"), ({"name": "x"}, "x"):
        with pytest.raises(UserError) as caught:
            loaded(files_of({"path": "user/data", **wrong})[0])
        assert "as a Hub data set it could not be loaded" in str(caught.value) and said in str(caught.value)
        assert "\n" not in str(caught.value)
