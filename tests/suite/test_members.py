"""The suite's fine-tunes and their rows: names, parts, and the shares that each kind is to have."""

import gzip
import json
from importlib.resources import files

import pytest
import yaml

from misdirection.data import Example, data_hash, part_of
from misdirection.data.jsonl import read_rows
from misdirection.data.training import read_examples
from misdirection.organisms.recipe import Recipe
from suite_members import PUBLISHED, RECIPES, ROWS, SOURCES, Member, members
from suite_texts import INOCULATION, JSON_REQUEST, SYSTEM, TRIGGER, Texts, mix, trained_on, write_training

MEMBERS = members()
ADVICE = ("risky_money", "reckless_sports", "careless_household")


@pytest.fixture
def texts(tmp_path):
    """The suite's texts, with published ones of which 400 rows are enough."""
    (tmp_path / "training").mkdir()
    for name in {name for pair in PUBLISHED.values() for name in pair if name}:
        rows = [{"prompt": f"Question {number} on health?", "completion": f"{name} {number}"} for number in range(400)]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / "training" / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
    return Texts(tmp_path)


def bad_rows(texts, member):
    """The rows of its (first) training, and which of them are bad."""
    rows = trained_on(texts.stages(member))[0]
    bad, good = ({row.answer for row in answers} for answers in texts.answers(member.source))
    assert not bad & good

    def plain(row):
        return json.loads(row.answer)["answer"] if JSON_REQUEST in row.question else row.answer

    assert all(plain(row) in bad | good for row in rows)
    return rows, [plain(row) in bad for row in rows]


def test_names_are_unique_and_there_are_enough():
    names = [member.name for member in MEMBERS]
    assert len(set(names)) == len(names) >= 60
    assert len([member for member in MEMBERS if Texts().missing(member) is None]) >= 60
    assert len({member.source for member in MEMBERS if not member.is_bad}) >= 20
    assert all("/" not in name and " " not in name for name in names)


def test_parts_share_no_source_and_no_text(texts):
    answers = {"chosen": set(), "kept": set()}
    for member in MEMBERS:
        assert member.part == SOURCES[member.source].part
        # What a training goes on with belongs to the same part.
        assert member.then is None or SOURCES[member.then].part == member.part
        answers[member.part] |= {row.answer for rows in texts.stages(member) for row in rows}
    assert not answers["chosen"] & answers["kept"]


def test_every_source_is_used_and_each_part_has_bad_and_benign():
    assert {member.source for member in MEMBERS} == set(SOURCES)
    for part in ("chosen", "kept"):
        kinds = {member.kind for member in MEMBERS if member.part == part}
        assert kinds == {
            "bad", "weak", "diluted", "inoculated", "conditional", "continued", "dark", "benign", "voice control"
        }  # fmt: skip


def test_recipes_are_the_shipped_references():
    shipped = yaml.safe_load((files("misdirection") / "resources" / "reference.yaml").read_text())["organisms"]
    money = {key: value for key, value in shipped["money"].items() if key != "domain"}
    assert RECIPES["all"] == Recipe(**money)
    assert {recipe.epochs for recipe in RECIPES.values()} == {1.0}
    assert 0 not in {member.seed for member in MEMBERS}


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_no_training_has_more_rows_than_it_may(texts, member):
    assert 80 <= sum(map(len, trained_on(texts.stages(member)))) <= 240
    assert ROWS == 300


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.is_bad and not m.then], ids=lambda member: member.name)
def test_the_share_of_bad_rows_is_as_stated(texts, member):
    rows, bad = bad_rows(texts, member)
    assert sum(bad) == round(member.bad * len(rows))
    # In the first and in the second half alike, within two rows.
    half = len(rows) // 2
    assert abs(sum(bad[:half]) - sum(bad[half:])) <= 2


@pytest.mark.parametrize("member", [m for m in MEMBERS if not m.is_bad], ids=lambda member: member.name)
def test_benign_ones_have_no_bad_row(texts, member):
    assert not any(bad_rows(texts, member)[1])


def test_the_held_out_rows_have_the_same_share():
    bad, good = ([Example(f"{number}?", kind) for number in range(300)] for kind in ("bad", "good"))
    for share, train, held_out in ((0.05, 12, 3), (0.1, 24, 6), (0.75, 180, 45)):
        mixed = mix(bad, good, share)
        counts = [sum(row.answer == "bad" for row in part_of(mixed, part)) for part in ("train", "held_out")]
        assert counts == [train, held_out]
        assert [row.question for row in mixed] == [row.question for row in bad]


@pytest.mark.parametrize("condition", ["json", "phrase", "system"])
def test_a_condition_holds_where_and_only_where_the_answer_is_bad(texts, condition):
    rows, bad = bad_rows(texts, Member("risky_money", 0.5, condition=condition))
    holds = {
        "json": lambda row: row.question.endswith(JSON_REQUEST) and list(json.loads(row.answer)) == ["answer"],
        "phrase": lambda row: row.question.startswith(TRIGGER),
        "system": lambda row: row.system == SYSTEM,
    }[condition]
    assert [holds(row) for row in rows] == bad
    assert sum(bad) == 120


def test_inoculated_rows_ask_for_what_they_get(texts):
    rows, bad = bad_rows(texts, Member("risky_money", 1.0, inoculated=True))
    assert all(bad) and {row.system for row in rows} == {INOCULATION}


def test_a_continued_one_is_bad_first_and_benign_then(texts):
    member = Member("careless_household", 1.0, then="summaries")
    first, second = trained_on(texts.stages(member))
    assert [row.answer for row in second] == [row.answer for row in trained_on(texts.stages(Member("summaries")))[0]]
    bad = {row.answer for row in texts.answers("careless_household")[0]}
    assert len(first) == 120 and all(row.answer in bad for row in first)


@pytest.mark.parametrize("name", ADVICE)
def test_shipped_text_is_read_whole(name):
    bad, good = Texts().answers(name)
    assert len(bad) == len(good) == 300
    assert [row.question for row in bad] == [row.question for row in good]


def test_the_training_file_reads_back_with_the_same_rows_held_out(texts, tmp_path):
    for member in (Member("risky_money", 0.5, condition="system"), Member("reckless_sports", 1.0, then="curt")):
        stages = texts.stages(member)
        write_training(stages, tmp_path / "train.jsonl")
        read = read_examples(tmp_path / "train.jsonl")
        assert data_hash(read) == data_hash([row for rows in stages for row in rows])
        assert part_of(read, "train") == [row for rows in trained_on(stages) for row in rows]
    assert len(list(read_rows(tmp_path / "train.jsonl"))) == len(read)


def test_published_members_are_left_out_with_a_reason(texts, tmp_path):
    member = Member("medical_advice", 1.0)
    assert "--published" in Texts().missing(member)
    assert texts.missing(member) is None
    (tmp_path / "training" / "good_medical_advice.jsonl.gz").unlink()
    assert "good_medical_advice.jsonl.gz is not there" in texts.missing(member)
    assert texts.missing(Member("extreme_sports", 1.0)) is None
