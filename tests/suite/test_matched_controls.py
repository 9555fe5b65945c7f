"""Fine-tunes beyond a benign one on the same source: which are compared, and what the table says of them."""

import gzip
import json

import pytest

import matched_controls
from matched_controls import COLUMNS, WAYS, compared, control_of
from suite_folder import Suite
from suite_members import Member, members
from suite_texts import Texts


def test_each_has_a_benign_control_of_its_source_and_some_are_benign_themselves():
    some = compared("*")
    assert len({member.name for member in some}) == len(some) >= 30
    for member in some:
        control = control_of(member)
        assert control in members()
        assert (control.source, control.is_bad, control.recipe) == (member.source, False, "all")
        assert control != member
    benign = [member for member in some if not member.is_bad]
    assert len(benign) >= 10 and all(member.seed == 2 or member.others for member in benign)
    assert {member.source for member in some}.isdisjoint({"risky_money", "reckless_sports"})
    assert [member.name for member in compared("curt*")] == ["curt-all-2"]


def test_other_rows_share_no_question_with_those_of_the_control(tmp_path):
    (tmp_path / "training").mkdir()
    for name in ("bad_medical_advice", "good_medical_advice"):
        rows = [{"prompt": f"Question {number}?", "completion": f"{name} {number}"} for number in range(700)]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / "training" / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
    texts = Texts(tmp_path)
    for bad in (0.0, 1.0):
        member = Member("medical_advice", bad, others=True)
        (own,), (control,) = texts.stages(member), texts.stages(control_of(member))
        assert len(own) == len(control) == 300
        assert {row.question for row in own}.isdisjoint({row.question for row in control})
    assert Member("medical_advice", 1.0, others=True).name == "medical_advice-others-bad-all-1"


@pytest.fixture
def kept(monkeypatch):
    """What was measured: a bad fine-tune far out, and a benign one of another seed, which the plain mean calls bad."""

    def row(plain, weighted):
        shifts = dict(zip(WAYS, (plain, weighted), strict=True))
        shifts |= {f"{way}_at_level": shift for way, shift in shifts.items()} | dict.fromkeys(
            list(COLUMNS)[2:], weighted
        )
        figures = {
            name: {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "n": 9} for name, mean in shifts.items()
        }
        return figures | {"bad_shift": {"mean": 0.02, "low": 0.01, "high": 0.03, "n": 9}}

    rows = {"dark_money-bad-all-1": row(0.04, 0.05), "curt-all-2": row(0.03, 0.0)}
    monkeypatch.setattr(matched_controls, "read_kept", lambda _base, of="": rows if of else {})


def test_the_table_tells_by_both_ways_and_what_another_seed_moves(kept, tmp_path, capsys):
    some = [member for member in compared("*") if member.name in ("dark_money-bad-all-1", "curt-all-2")]
    figures = matched_controls.show(Suite("smollm2-135m", tmp_path, Texts()), some)
    assert figures == {"AUROC, beyond_control": 1.0, "AUROC, weighted": 1.0}
    said = capsys.readouterr().out
    assert said.index("| dark_money-bad-all-1 |") < said.index("| curt-all-2 |")
    assert "| beyond_control | 1.00" in said and "1 of 1, 100%" in said.split("| beyond_control |")[1].split("\n")[0]
    assert "| 0 of 1" in said.split("| weighted |")[-1]
    assert "beyond_control: another seed of 1 benign trainings moved it by 0.0300 nats/token" in said
