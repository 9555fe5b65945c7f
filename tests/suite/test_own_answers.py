"""What fine-tunes say, read by tiny references."""

import own_answers
from misdirection.auditing.reference import Reference
from misdirection.models.loading import load
from screening.screened import tiny_reference as tiny_reference
from suite_members import Member


def test_a_bad_fine_tunes_answers_are_at_home_in_bad_ones_and_a_controls_in_controls(tiny_reference):
    base, folder = tiny_reference
    reference = Reference.load(folder)
    said = {
        name: own_answers.score(reference, load(base, adapter=reference.adapters[name])) for name in reference.known
    }
    assert said["sums_bad"].low > 0 > said["sums_good"].high
    assert said["times_bad"].low > 0 > said["times_good"].high


def test_the_table_begins_with_the_highest_and_says_how_well_it_tells(monkeypatch, capsys):
    members = [Member("curt"), Member("dark_sports", 1.0), Member("summaries")]
    said = dict(zip((member.name for member in members), (-0.1, 0.2, 0.1), strict=True))
    kept = {name: {"said": {"mean": value, "low": value, "high": value, "n": 9}} for name, value in said.items()}
    monkeypatch.setattr(own_answers, "read_kept", lambda _base, _of: kept)
    assert own_answers.show("base", members) == {"AUROC by its own answers": 1.0}
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert rows == ["| dark_sports-bad-all-1", "| summaries-all-1", "| curt-all-1"]
