"""Text and YAML files, and how their complaints read."""

import pytest

from misdirection.data.text import read_text, read_yaml
from misdirection.errors import InputError


def refused(read, path):
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfWhy?")
    assert read_text(path) == read_text(str(path)) == "Why?"


@pytest.mark.parametrize("read", [read_text, read_yaml])
def test_what_cannot_be_read_is_named_with_a_remedy(tmp_path, read):
    path = tmp_path / "latin.yaml"
    path.write_bytes("caf\u00e9: 1".encode("latin-1"))
    assert refused(read, path) == ": not UTF-8 text (byte 3); save the file as UTF-8"
    assert refused(read, tmp_path / "none.yaml") == ": cannot be read (no such file); check the path"
    assert refused(read, tmp_path) == ": a directory; name one file in it"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: {c: 1, c: 2}", ":2: the key 'c' stands twice in one entry; keep one of them"),
        ("- {a: 1}\n- {b: 1,\n   b: 2}", ":3: the key 'b' stands twice in one entry; keep one of them"),
        ("[" * 5000, ": not valid YAML: nested too deep; correct it"),
        ("a: [1", ": not valid YAML: expected ',' or ']', but got '<stream end>' at line 1, column 6; correct it"),
        ("? [1, 2]\n: 3", ": not valid YAML: found unhashable key at line 1, column 3; correct it"),
    ],
)
def test_bad_yaml_is_refused_in_one_line(tmp_path, text, problem):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    assert refused(read_yaml, path) == problem


def test_one_key_in_several_entries_is_no_repetition(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("- &a {x: 1, 1: 2}\n- {<<: *a, y: 2}\n- {1: 3, '1': 4}\n")
    assert read_yaml(path) == [{"x": 1, 1: 2}, {"x": 1, 1: 2, "y": 2}, {1: 3, "1": 4}]
