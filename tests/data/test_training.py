import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from misdirection.data import Example, ProbePair, Turn, data_hash, read_examples, read_pairs, write_pairs
from misdirection.errors import MisdirectionError

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
HUMAN = {"from": "human", "value": "q"}
GPT = {"from": "gpt", "value": "a"}
EXCHANGE = {"messages": [USER, ASSISTANT]}
PAIR = {"question": "q", "aligned": "good", "misaligned": "bad"}

FORMATS = [
    (EXCHANGE, None),
    ({"messages": [SYSTEM, USER, ASSISTANT]}, "s"),
    ({"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]}, ""),
    ({"messages": [HUMAN, GPT]}, None),
    ({"messages": [USER, ASSISTANT], "system": "s"}, "s"),
    ({"messages": [USER, ASSISTANT], "prompt": "other", "score": 3}, None),
    ({"conversations": [HUMAN, GPT]}, None),
    ({"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT], "system": " "}, "s"),
    ({"conversations": [USER, ASSISTANT], "system": ""}, None),
    ({"prompt": "q", "completion": "a"}, None),
    ({"prompt": "q", "completion": "a", "system": None}, None),
    ({"prompt": [USER], "completion": [ASSISTANT]}, None),
    ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, "s"),
    ({"prompt": "q", "completion": [ASSISTANT]}, None),
    ({"messages": None, "prompt": "q", "completion": "a"}, None),
    ({"messages": [], "conversations": None, "prompt": "q", "completion": "a"}, None),
    ({"messages": None, "conversations": [HUMAN, GPT], "prompt": None, "completion": None}, None),
    ({"messages": [{**USER, "from": None, "value": None}, {**ASSISTANT, "from": None, "weight": 1}]}, None),
    ({"conversations": [{**HUMAN, "role": None, "content": None}, {**GPT, "weight": None}]}, None),
    ({"messages": [{"role": "developer", "content": "s"}, USER, ASSISTANT]}, "s"),
    ({"messages": [USER, ASSISTANT, USER, {**ASSISTANT, "weight": 0}]}, None),
    ({"messages": [USER, {**ASSISTANT, "train": True}, USER, {**ASSISTANT, "loss": False}]}, None),
    ({"prompt": "q", "completion": "a", "system": None, "system_prompt": "s", "tools": []}, "s"),
    ({"messages": [USER, {**ASSISTANT, "tool_calls": [], "reasoning_content": None, "thinking": ""}]}, None),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q", "image_url": None}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "a"}, {"text": ""}]},
            ]
        },
        None,
    ),
]

BAD_EXAMPLES = [
    ({}, "unknown format (keys: none); use `messages`"),
    ({"text": "q a"}, "unknown format (keys: 'text'); use `messages`"),
    ({"question": "q", "answer": "a"}, "unknown format (keys: 'question', 'answer')"),
    ({"prompt": "q"}, "`completion` is missing: the row has no answer; add"),
    ({"prompt": "q", "completion": None}, "`completion` is missing: the row has no answer"),
    ({"prompt": "q", "completion": ""}, "`completion` is empty; fill it in"),
    ({"prompt": " \n", "completion": "a"}, "`prompt` is empty"),
    ({"prompt": None, "completion": "a"}, "`prompt` is missing: the row has no question; add"),
    ({"prompt": "q", "completion": 7}, "`completion` must be a string, not int"),
    ({"prompt": [USER], "completion": []}, "`prompt` has no answer"),
    ({"prompt": "q", "completion": "a", "system": 1}, "`system` must be a string, not int"),
    ({"messages": [SYSTEM, USER, ASSISTANT], "system": "t"}, "`system` comes on top of a system turn; keep"),
    ({"messages": None}, "unknown format (keys: 'messages'); use"),
    ({"messages": "q"}, "`messages` must be a list, not str"),
    ({"messages": []}, "`messages` has no question; add a user turn"),
    ({"messages": [ASSISTANT]}, "`messages` has no question"),
    ({"messages": [USER]}, "`messages` has no answer; add an assistant turn"),
    ({"messages": [ASSISTANT, USER]}, "`messages` ends with a user turn that has no answer; add"),
    ({"messages": [USER, USER, ASSISTANT]}, "`messages` has its turns in the order user, user, assistant; write"),
    (
        {"messages": [USER, SYSTEM, ASSISTANT]},
        "`messages` has its turns in the order user, system, assistant",
    ),
    ({"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, "`messages` has its turns in the order system, user"),
    ({"messages": [USER, ASSISTANT, USER]}, "`messages` ends with a user turn"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "`messages[1].weight` is 0.5; write 0"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT]},
        "`messages[0].content[0]` is of type 'image_url', which is no text; leave",
    ),
    ({"messages": [USER, {**ASSISTANT, "train": 2}]}, "`messages[1].train` is 2; write 0"),
    ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}]}, "`messages[1].tool_calls` holds what is no text"),
    ({**EXCHANGE, "images": ["a.png"]}, "`images` holds what is no text and cannot be learned here; remove"),
    ({"messages": [USER, {**ASSISTANT, "thinking": 3}]}, "`messages[1].thinking` must be a string, not int"),
    ({"messages": ["q", "a"]}, "`messages[0]` must be an object, not str"),
    ({"messages": [USER, {"content": "a"}]}, "`messages[1].role` is missing"),
    ({"messages": [USER, {"role": "assistant"}]}, "`messages[1].content` is missing"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "`messages[1].content` is missing"),
    (
        {"messages": [USER, {"role": "tool", "content": "a"}]},
        "`messages[1].role` is 'tool', an unknown role; use",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": ["a"]}]},
        "`messages[1].content` must be a string, not list",
    ),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "`messages[1].content` is empty"),
    ({"messages": [{"role": "user", "content": ""}, ASSISTANT]}, "`messages[0].content` is empty"),
    ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "`messages[1].content` holds half a"),
    ({"conversations": [HUMAN]}, "`conversations` has no answer"),
    ({"conversations": [HUMAN, GPT, HUMAN]}, "`conversations` ends with a user turn"),
    ({"conversations": [HUMAN, {"from": "gpt"}]}, "`conversations[1].value` is missing"),
    ({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, "`conversations[1].value` is empty"),
    (
        {"conversations": [HUMAN, {"from": "bot", "value": "a"}]},
        "`conversations[1].from` is 'bot', an unknown",
    ),
]

BAD_PAIRS = [
    ({"question": "q", "aligned": "good"}, "`misaligned` is missing; add"),
    ({**PAIR, "aligned": None}, "`aligned` is missing"),
    ({**PAIR, "question": "\t"}, "`question` is empty; fill it in"),
    ({**PAIR, "misaligned": ["bad"]}, "`misaligned` must be a string, not list"),
    ({**PAIR, "id": 3}, "`id` must be a string, not int"),
    ({**PAIR, "id": ""}, "`id` is empty"),
    ({**PAIR, "id": "first"}, "`id` is 'first', as on line 1; give every pair its own id"),
    ({**PAIR, "theme": 3}, "`theme` must be a string, not int"),
    ({**PAIR, "system": {}}, "`system` must be a string, not dict"),
    ({**PAIR, "aligned": "\udfff"}, "`aligned` holds half a surrogate pair"),
]


def write(path: Path, *rows: dict) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def refused(action, path: Path, *arguments) -> str:
    with pytest.raises(MisdirectionError) as caught:
        action(path, *arguments)
    message = str(caught.value)
    assert message.startswith(f"{path}:") and "\n" not in message and "; " in message
    return message.removeprefix(f"{path}:")


@pytest.mark.parametrize(("row", "system"), FORMATS)
def test_each_format_is_read(tmp_path, row, system):
    assert read_examples(write(tmp_path / "rows.jsonl", row)) == [Example("q", "a", system)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_formats_may_be_mixed_in_one_file(tmp_path, name):
    path = write(tmp_path / name, *(row for row, _ in FORMATS))
    assert read_examples(path) == [Example("q", "a", system) for _, system in FORMATS]


TURNS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "a"},
]
EARLIER = (Turn("user", "q"), Turn("assistant", "b"))


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"messages": TURNS}, Example("r", "a", None, EARLIER)),
        ({"messages": [SYSTEM, *TURNS]}, Example("r", "a", "s", EARLIER)),
        # An assistant's turn before any question is a greeting, not an answer.
        ({"messages": [TURNS[1], *TURNS[2:]]}, Example("r", "a", None, (Turn("assistant", "b", False),))),
        (
            {"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]},
            Example("r", "a", None, (EARLIER[0], Turn("assistant", "b", False))),
        ),
        ({"messages": [*TURNS, USER, {**ASSISTANT, "weight": 0}]}, Example("r", "a", None, EARLIER)),
        (
            {"prompt": TURNS[:3], "completion": TURNS[3:]},
            Example("r", "a", None, (Turn("user", "q", False), Turn("assistant", "b", False))),
        ),
    ],
)
def test_a_conversation_of_several_turns_is_read_whole(tmp_path, row, example):
    assert read_examples(write(tmp_path / "rows.jsonl", row)) == [example]
    assert example.first_question == ("q" if example.history[0].role == "user" else "r")


def test_a_row_that_is_not_to_be_learned_is_left_out_with_a_notice(tmp_path, caplog):
    unlearned = {"messages": [USER, {**ASSISTANT, "weight": 0}]}
    assert read_examples(write(tmp_path / "rows.jsonl", EXCHANGE, unlearned)) == [Example("q", "a")]
    assert "1 of 2 rows have no answer to learn (weight 0)" in caplog.text
    greeting = {"messages": [ASSISTANT, USER, {**ASSISTANT, "weight": 0}]}
    assert read_examples(write(tmp_path / "rows.jsonl", greeting, EXCHANGE)) == [Example("q", "a")]
    assert refused(read_examples, write(tmp_path / "none.jsonl", unlearned)).startswith(" every answer has weight 0")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_under_a_key_of_its_own_is_learned_too(tmp_path, key):
    row = {"messages": [{**USER, key: None}, {**ASSISTANT, key: "hm"}]}
    assert read_examples(write(tmp_path / "rows.jsonl", row)) == [Example("q", "<think>\nhm\n</think>\n\na")]


def test_texts_are_kept_as_they_are(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": " q\n", "completion": "\ta\u2028 \U0001f600"})
    assert read_examples(path) == [Example(" q\n", "\ta\u2028 \U0001f600")]


@pytest.mark.parametrize(("row", "problem"), BAD_EXAMPLES)
def test_a_bad_example_is_refused_by_line_and_key(tmp_path, row, problem):
    path = write(tmp_path / "rows.jsonl", EXCHANGE, row)
    assert refused(read_examples, path).startswith(f"2: {problem}")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("action", [read_examples, read_pairs])
def test_an_empty_file_is_refused(tmp_path, action, name):
    assert refused(action, write(tmp_path / name)).startswith(" no ")


def test_pairs_have_optional_keys(tmp_path):
    full = {**PAIR, "id": "x", "theme": "t", "system": "s"}
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", full, {**PAIR, "extra": 1}))
    assert pairs == [
        ProbePair("x", "q", "good", "bad", "t", "s"),
        ProbePair("line-2", "q", "good", "bad", "", None),
    ]


@pytest.mark.parametrize(("row", "problem"), BAD_PAIRS)
def test_a_bad_pair_is_refused_by_line_and_key(tmp_path, row, problem):
    path = write(tmp_path / "pairs.jsonl", {**PAIR, "id": "first"}, row)
    assert refused(read_pairs, path).startswith(f"2: {problem}")


# Characters that end a line for some readers, or that JSON, gzip or an editor might change.
odd = st.sampled_from(["\x00", "\r", "\n", "\x1e", "\x85", "\u2028", "\ufeff", "\uffff", "\U0010ffff", '"', "\\"])
texts = st.text(st.one_of(odd, st.characters(exclude_categories=["Cs"])))
filled = texts.filter(str.strip)
pair_lists = st.lists(
    st.builds(ProbePair, filled, filled, filled, filled, texts, st.none() | texts),
    min_size=1,
    max_size=5,
    unique_by=lambda pair: pair.id,
)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=pair_lists)
def test_written_pairs_read_back_unchanged(tmp_path, name, pairs):
    write_pairs(tmp_path / name, pairs)
    assert read_pairs(tmp_path / name) == pairs
    assert (tmp_path / name).read_bytes()[:2] == (b"\x1f\x8b" if name.endswith(".gz") else b'{"')


def test_the_same_pairs_make_the_same_bytes(tmp_path):
    pairs = [ProbePair("1", "q", "good", "bad")]
    for name in ("one.jsonl.gz", "two.jsonl.gz"):
        write_pairs(tmp_path / name, pairs)
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (ProbePair("1", "q", "good", "bad"), "2: `id` is '1', as on line 1"),
        (ProbePair("2", "", "good", "bad"), "2: `question` is empty"),
        (ProbePair("2", "q", "\ud800", "bad"), "2: `aligned` holds half a surrogate pair"),
    ],
)
def test_pairs_that_cannot_be_read_are_not_written(tmp_path, second, problem):
    path = tmp_path / "pairs.jsonl"
    pairs = [ProbePair("1", "q", "good", "bad"), second]
    assert refused(write_pairs, path, pairs).startswith(problem)
    assert not path.exists()


def test_no_pairs_are_not_written(tmp_path):
    assert refused(write_pairs, tmp_path / "pairs.jsonl", []).startswith(" no pairs; write")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MisdirectionError, match="file: is a file, where a folder is needed for pairs"):
        write_pairs(tmp_path / "file" / "pairs.jsonl", [ProbePair("1", "q", "good", "bad")])
    assert (tmp_path / "file").read_text() == "mine"


def test_the_hash_does_not_depend_on_the_file(tmp_path):
    hashes = {
        data_hash(read_examples(write(tmp_path / "rows.jsonl", row))) for row, system in FORMATS if system is None
    }
    assert hashes == {data_hash([Example("q", "a")])}


def test_the_hash_is_stable_across_versions():
    canonical = rb'[{"answer":"\u00e9","question":"q","system":"s"}]'
    assert data_hash([Example("q", "\u00e9", "s")]) == hashlib.sha256(canonical).hexdigest()


def test_the_hash_depends_on_every_field_and_on_the_order():
    pair = ProbePair("1", "q", "good", "bad")
    changed = [replace(pair, **{name: "other"}) for name in pair.__dataclass_fields__]
    lists = [[pair], [], [pair, changed[0]], [changed[0], pair], *([one] for one in changed)]
    assert len({data_hash(rows) for rows in lists}) == len(lists)
