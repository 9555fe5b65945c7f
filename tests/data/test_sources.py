"""Rows from every kind of source."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from misdirection.data import Example, holds_pairs, read_examples, read_pairs
from misdirection.data.sources import read_source
from misdirection.errors import InputError

CHAT = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "prompt": None,
    "completion": None,
    "system": None,
}
PLAIN = {"messages": None, "prompt": "r", "completion": "007", "system": "s"}
ROWS = [CHAT, PLAIN]
EXAMPLES = [Example("q", "a"), Example("r", "007", "s")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Data sets of the hub are kept in a cache, which is made when the library is imported."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path):
    array = json.dumps(ROWS).encode()
    contents = {
        "rows.json": array,
        "rows.json.gz": gzip.compress(array),
        "rows.JSON": array,
        "lines.json": b"\n".join(json.dumps(row).encode() for row in ROWS),
        "rows.jsonl": b"\n".join(json.dumps(row).encode() for row in ROWS),
    }
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix.lower() == ".csv":
        chat = json.dumps(CHAT["messages"]).replace('"', '""')
        path.write_text(f'messages,prompt,completion,system\n"{chat}",,,\n,r,007,s\n')
    else:
        path.write_bytes(contents[path.name])
    return path


@pytest.mark.parametrize(
    "name",
    ["rows.json", "rows.json.gz", "rows.JSON", "lines.json", "rows.jsonl", "rows.parquet", "rows.csv", "rows.CSV"],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name)
    assert read_examples(path) == read_examples(str(path)) == EXAMPLES


def test_pairs_are_read_from_tables_too(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("question,aligned,misaligned,theme\nWhy?,good,12,3\n")
    assert holds_pairs(path)
    (pair,) = read_pairs(path)
    assert (pair.id, pair.question, pair.misaligned, pair.theme) == ("line-1", "Why?", "12", "3")


@pytest.mark.parametrize("name", ["owner/advice", "owner/advice:train"])
def test_a_data_set_is_read_by_its_id(tmp_path, monkeypatch, name):
    folder = tmp_path / "owner" / "advice"
    folder.mkdir(parents=True)
    write(folder / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    assert read_examples(name) == EXAMPLES
    assert read_examples(folder) == EXAMPLES


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.json", b"[1]", ":1: an element must be an object, not int; write"),
        ("rows.json", b"[{]", ":1: invalid JSON"),
        ("rows.json", b'[{"prompt": "a", "prompt": "b"}]', ": the key 'prompt' stands twice in one object; keep"),
        ("rows.csv.gz", b"", ": rows cannot be read from such a file; save it as .jsonl"),
        ("rows.TSV", b"prompt\tcompletion\n", ": rows cannot be read from such a file; save it as .jsonl"),
        ("rows.parquet", b"no table", ": damaged, or not a .parquet table"),
        ("rows.csv", b"prompt,prompt\na,b\n", ": two columns are called 'prompt'"),
        ("rows.csv", b"prompt,completion\n,b\n", ":1: `prompt` is missing"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}{problem}") and "\n" not in str(caught.value)


def test_a_data_set_that_is_not_there_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no data set could be read") as caught:
        list(read_source(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"rows\.jsonl: no such file"):
        read_examples("owner/rows.jsonl")
