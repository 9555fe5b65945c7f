import gzip
import re
from pathlib import Path

import pytest

from misdirection.data import read_rows
from misdirection.errors import MisdirectionError


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def refused(path: Path) -> str:
    with pytest.raises(MisdirectionError) as caught:
        list(read_rows(path))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and "; " in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_come_with_line_numbers_that_count_blank_lines(tmp_path, name):
    path = write(tmp_path / name, b'{"a": 1}\n\n  \r\n{"b": "\xc3\xa9"}\r\n{"c": null}')
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"b": "\u00e9"}), (5, {"c": None})]


def test_only_line_feeds_end_a_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"a": "x\u2028y\u0085z"}\n{"a": 2}\n'.encode())
    assert list(read_rows(path)) == [(1, {"a": "x\u2028y\u0085z"}), (2, {"a": 2})]


def test_a_byte_order_mark_is_dropped(tmp_path):
    assert list(read_rows(write(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"a": 1}\n'))) == [(1, {"a": 1})]


def test_rows_are_read_lazily(tmp_path):
    rows = read_rows(write(tmp_path / "rows.jsonl", b'{"a": 1}\nnot json\n'))
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(MisdirectionError, match=":2: invalid JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("second_line", "problem"),
    [
        (b"{'a' 1}", ":2: invalid JSON (Expecting property name enclosed in double quotes at column 2"),
        (b'{"a": 1', ":2: invalid JSON"),
        (b"[" * 200_000, ":2: invalid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", ":2: invalid JSON"),
        (b'["a"]', ":2: a row must be an object, not list"),
        (b'"a"', ":2: a row must be an object, not str"),
        (b"null", ":2: a row must be an object, not NoneType"),
        (b'{"a": "\xe9"}', ":2: not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_bad_line_is_named(tmp_path, name, second_line, problem):
    path = write(tmp_path / name, b'{"a": 1}\n' + second_line + b'\n{"a": 3}\n')
    assert refused(path).startswith(problem)


def test_gzip_without_its_suffix_is_explained(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert re.match(r":1: not UTF-8 text; .*end its name in \.gz", refused(path))


def test_plain_text_named_gz_is_explained(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b'{"a": 1}\n')
    assert re.match(r":1: broken gzip .*drop \.gz from its name", refused(path))


def test_cut_off_gzip_is_named_after_the_lines_that_survive(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n{"a": 3}\n')[:-8])
    assert re.match(r":4: broken gzip", refused(path))


def test_damaged_gzip_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    content = bytearray(gzip.compress(b'{"a": 1}\n'))
    content[10:14] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert refused(path).startswith(":1: broken gzip")


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.jsonl.gz"])
def test_a_missing_file_is_refused(tmp_path, name):
    assert refused(tmp_path / name) == ": no such file; check the path"


@pytest.mark.parametrize("name", ["folder", "folder.gz"])
def test_a_directory_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    assert refused(tmp_path / name).startswith(": a directory; name one .jsonl")


def test_a_path_below_a_file_is_refused(tmp_path):
    write(tmp_path / "file", b"")
    assert refused(tmp_path / "file" / "rows.jsonl").startswith(": cannot be read (Not a directory)")
