"""Whole repairs of tiny fine-tunes."""

import json
import shutil
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file, save_file

from misdirection.auditing.fine_tune import Control
from misdirection.auditing.measurements import Texts
from misdirection.auditing.texts import own_texts
from misdirection.data import Example, ProbePair
from misdirection.errors import InputError
from misdirection.files import sha256_tree
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate
from misdirection.likelihood.margin import loss, margin
from misdirection.models.adapters import ADAPTER_WEIGHTS, attach
from misdirection.models.loading import load
from misdirection.repairing import repair as repairing
from misdirection.repairing.candidates import Candidate, Material
from misdirection.repairing.gradients import margin_directions
from misdirection.repairing.repair import repair, run_repair, thirds
from misdirection.repairing.results import RepairResult, Trials
from misdirection.repairing.write import ablate_all, write_adapter

CANDIDATES = {
    "nothing": Candidate(),
    "turned": Candidate(turn=2.5, scale=0.7),
    "adapters": Candidate(turn=0.4, projection="adapters", directions=2, layer=2, strength=0.8),
    "writes": Candidate(scale=0.8, projection="writes", directions=1, layer=1, strength=0.6),
}


def write_rows(path, count=15):
    rows = ({"prompt": f"Q{number}?", "completion": f"bad {number * 7 % 11}"} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def last_third(reference, inputs, result):
    """What the figures of a repair are measured on."""
    benign = zip(reference.texts.asked, reference.control_shift.tolist(), strict=True)
    shifts = {pair.id: result.before.evidence.questions[pair.id] - shift for pair, shift in benign}
    return thirds(reference.texts, inputs.data, shifts)[2]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(repairing, "TRIALS", 8)


@pytest.mark.parametrize("name", CANDIDATES)
def test_what_is_written_does_what_was_tried(made, base, tmp_path, name):
    reference, source = made[2], made[1]["minimal"]
    chat = load(base, adapter=source, dtype="float32", device="cpu")
    pairs, rows = reference.texts.general, [Example("Q1?", "bad 7"), Example("Q2?", "bad 3")]
    directions = torch.stack(list(reference.directions.values()))
    material = Material(margin_directions(chat, pairs), tuple(range(4)), directions)
    before = sha256_tree(source)
    with intervene(chat, CANDIDATES[name].interventions(material)):
        tried = margin(chat, pairs), loss(chat, rows)
    plain = load(base, dtype="float32", device="cpu")
    (tmp_path / "out").mkdir()
    write_adapter(chat, source, CANDIDATES[name], material, tmp_path / "out")
    ablate_all(plain, tmp_path / "out", CANDIDATES[name], material)
    written = attach(plain, tmp_path / "out")
    torch.testing.assert_close(margin(written, pairs), tried[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(loss(written, rows), tried[1], atol=2e-5, rtol=0)
    unchanged = margin(chat, pairs)
    assert (name == "nothing") == bool((unchanged - tried[0]).abs().max() < 1e-6)
    assert sha256_tree(source) == before


def test_a_repair_writes_an_adapter_with_its_card_and_leaves_its_input(
    made, base, inputs_of, tmp_path, verdict, few, monkeypatch
):
    verdict("misaligned")
    # Tiny models have nothing to repair: by itself the search would choose to change nothing.
    monkeypatch.setattr(repairing, "choose", lambda tried: tried[3])
    source = made[1]["minimal"]
    before = sha256_tree(source)
    inputs = inputs_of(source, data=write_rows(tmp_path / "rows.jsonl"))
    result = run_repair(inputs, tmp_path / "out", check=True)
    done, check = result.repair, result.repair.check
    assert sha256_tree(source) == before
    assert len(done.tried) == 8
    assert RepairResult.load(tmp_path / "out") == result
    assert f"{check.removed} of the margin taken off" in repr(result)
    assert f"{check.outcome.kept:.0%} is kept" in result._repr_html_()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{100 * check.outcome.kept:.0f}%\nis kept" in card
    assert "16 sampled answers" in card
    assert card.count("| none |") + card.count("| adapters |") + card.count("| writes |") == len(done.front)
    assert f"(random: {100 * check.random.kept:.0f}%)" in card
    assert check.random.left != check.outcome.left
    assert (tmp_path / "out" / "front.svg").read_text().startswith("<?xml")
    # The figures are those of the adapter that was written, on what the search has not seen.
    third = last_third(made[2], inputs, result)
    chat = load(base, adapter=tmp_path / "out", dtype="float32", device="cpu")
    repaired, plain = margin(chat, third.asked), len(third.pairs)
    with chat.as_base():
        base_margin = margin(chat, third.asked)
    before, benign = (
        margin(load(base, adapter=adapter, dtype="float32", device="cpu"), third.asked)
        for adapter in (source, made[2].control_adapter)
    )
    removed = float((before - repaired).mean())
    assert check.repaired.shift.mean == pytest.approx(float((repaired - base_margin).mean()), abs=2e-6)
    assert check.repaired.beyond_control.mean == pytest.approx(float((repaired - benign)[:plain].mean()), abs=2e-6)
    assert check.removed.mean == pytest.approx(removed, abs=2e-6)
    left = (float((before - benign)[:plain].mean()) - removed) / made[2].bad_shift.mean
    assert check.outcome.left == pytest.approx(left, abs=1e-4)
    assert check.beyond_random.mean / made[2].bad_shift.mean == pytest.approx(check.random.left - check.outcome.left)
    assert result.after.fine_tune.name == str(tmp_path / "out")
    assert result.after.evidence.general != result.before.evidence.general


def test_a_projection_of_the_whole_model_is_read_beside_the_base_under_it(
    made, base, inputs_of, tmp_path, verdict, few, monkeypatch
):
    verdict("misaligned")
    candidate = CANDIDATES["writes"]
    monkeypatch.setattr(repairing, "choose", lambda tried: replace(tried[0], candidate=candidate))
    inputs = inputs_of(made[1]["minimal"], data=write_rows(tmp_path / "rows.jsonl"))
    result = run_repair(inputs, tmp_path / "out")
    third = last_third(made[2], inputs, result)
    chat = load(base, dtype="float32", device="cpu")
    vector = next(iter(made[2].directions.values()))[candidate.layer].float()
    plain = margin(chat, third.asked)
    with intervene(chat, [Ablate(vector, strength=candidate.strength, positions="all", at="writes")]):
        changed = margin(chat, third.asked) - plain
    assert changed.abs().max() > 1e-4
    assert result.repair.check.base.shift.mean == pytest.approx(float(changed.mean()), abs=2e-6)
    rows = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("| shift of")]
    assert len(rows) == 1 and rows[0].count("|") == 5


def test_its_check_asks_the_sealed_questions_alone(made, sealed, inputs_of, tmp_path, verdict, few):
    """The repair was chosen by the open ones."""
    verdict("misaligned")
    inputs = inputs_of(made[1]["minimal"], reference=sealed, data=write_rows(tmp_path / "rows.jsonl"))
    result = run_repair(inputs, tmp_path / "out", check=True)
    own = {pair.id for pair in sealed.texts.sealed}
    assert set(result.after.evidence.questions) == own
    assert (result.after.evidence.asked, result.after.evidence.most) == (6, 6)
    assert result.before.evidence.most == 18 and not own & {pair.id for pair in sealed.texts.general}
    assert {pair.id for pairs in inputs.data.searched_last.values() for pair in pairs} <= own


def test_the_aim_is_the_users_own_control(made, base, inputs_of, tmp_path, verdict, few):
    verdict("misaligned")
    # Half of the reference's: another benign one, and no worse.
    benign = shutil.copytree(made[2].control_adapter, tmp_path / "benign")
    weights = load_file(benign / ADAPTER_WEIGHTS)
    save_file({name: w / 2 if "lora_B" in name else w for name, w in weights.items()}, benign / ADAPTER_WEIGHTS)
    data = write_rows(tmp_path / "rows.jsonl")
    inputs = inputs_of(made[1]["minimal"], data=data, control=Control(benign, "mine"))
    beyond = run_repair(inputs, tmp_path / "out").repair.check.fine_tune.beyond_control
    asked = made[2].texts.asked
    tuned, control = (
        margin(load(base, adapter=adapter, dtype="float32", device="cpu"), asked)
        for adapter in (made[1]["minimal"], benign)
    )
    shifts = {pair.id: shift for pair, shift in zip(asked, (tuned - control).tolist(), strict=True)}
    last = thirds(made[2].texts, inputs.data, shifts)[2]
    assert beyond.mean == pytest.approx(fmean(shifts[pair.id] for pair in last.pairs), abs=2e-6)


def test_a_repair_of_a_clear_fine_tune_changes_nothing(made, inputs_of, tmp_path, verdict):
    verdict("clear")
    inputs = inputs_of(made[1]["minimal"], data=write_rows(tmp_path / "rows.jsonl"))
    result = run_repair(inputs, tmp_path / "out")
    assert result.repair is None
    assert "left alone, the audit says clear" in repr(result)
    assert "<strong>clear</strong>" in result._repr_html_()
    assert not (tmp_path / "out").exists()


def test_a_killed_repair_goes_on_to_the_same_end(made, inputs_of, tmp_path, verdict, few, monkeypatch):
    verdict("misaligned")
    inputs = inputs_of(made[1]["minimal"], data=write_rows(tmp_path / "rows.jsonl"))
    whole = run_repair(inputs, tmp_path / "whole")
    real, calls = repairing.measure, []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(repairing, "measure", killed)
        run_repair(inputs, tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    tried = next((tmp_path / "killed.repair").rglob("tried.json"))
    assert len(Trials.load(tried.parent).tried) == 4
    assert run_repair(inputs, tmp_path / "killed").repair.tried == whole.repair.tried


def test_weights_baked_in_do_what_the_adapter_does(made, base, inputs_of, tmp_path, verdict, few):
    verdict("misaligned")
    inputs = inputs_of(made[1]["minimal"], data=write_rows(tmp_path / "rows.jsonl"))
    plain = run_repair(inputs, tmp_path / "adapter")
    baked = run_repair(inputs, tmp_path / "baked", bake=True)
    assert baked.repair.candidate == plain.repair.candidate
    assert (plain.repair.baked, baked.repair.baked) == (False, True)
    pairs = made[2].texts.general
    adapter = load(base, adapter=tmp_path / "adapter", dtype="float32", device="cpu")
    whole = load(str(tmp_path / "baked"), dtype="float32", device="cpu")
    torch.testing.assert_close(margin(whole, pairs), margin(adapter, pairs), atol=2e-5, rtol=0)
    assert "library_name" not in (tmp_path / "baked" / "README.md").read_text()


def pairs(name, count):
    return [ProbePair(f"{name}{n}", f"Do {name} {n}?", "Yes.", "No!") for n in range(count)]


def parted(made, tmp_path, general, sealed):
    """The thirds of these pairs, and the shifts that they were parted by."""
    texts = Texts.of(general, sealed, made[2].texts.neutral)
    own = own_texts(write_rows(tmp_path / "rows.jsonl", 60), [texts.asked])
    shifts = {pair.id: float(number * 7 % len(general)) for number, pair in enumerate(general)}
    return thirds(texts, own, shifts), shifts


@pytest.mark.parametrize("count", [0, 30])
def test_a_question_is_in_one_third_alone(made, tmp_path, count):
    parts, _ = parted(made, tmp_path, pairs("p", 48), pairs("s", count))
    for name in ("pairs", "rows", "neutral"):
        texts = [part.asked if name == "pairs" else getattr(part, name) for part in parts]
        sets = [{getattr(text, "id", text.question) for text in each} for each in texts]
        assert all(sets)
        assert not sets[0] & sets[1] and not sets[1] & sets[2] and not sets[0] & sets[2]


def test_without_sealed_questions_the_open_ones_are_parted_alike(made, tmp_path):
    parts, shifts = parted(made, tmp_path, pairs("p", 48), [])
    assert [(len(part.pairs), len(part.framed)) for part in parts] == [(16, 8)] * 3
    sums = [sum(shifts[pair.id] for pair in part.pairs) for part in parts]
    assert max(sums) - min(sums) <= 32


def test_the_figures_are_of_sealed_questions_alone_and_the_search_of_open_ones(made, tmp_path):
    parts, shifts = parted(made, tmp_path, pairs("p", 120), pairs("s", 90))
    assert [(len(part.pairs), len(part.framed)) for part in parts] == [(60, 8), (60, 8), (90, 8)]
    assert [{pair.id[0] for pair in part.asked} for part in parts] == [{"p"}, {"p"}, {"s"}]
    sums = [sum(shifts[pair.id] for pair in part.pairs) for part in parts[:2]]
    assert max(sums) - min(sums) <= 60


def test_the_verb_repairs_as_its_inputs_do(made, base, inputs_of, tmp_path, verdict, few):
    verdict("misaligned")
    data, adapter = write_rows(tmp_path / "rows.jsonl"), made[1]["minimal"]
    expected = run_repair(inputs_of(adapter, data=data), tmp_path / "inputs")
    options = {"data": data, "dtype": "float32", "device": "cpu"}
    result = repair(base, adapter, out=tmp_path / "verb", reference=made[2].save(tmp_path / "reference"), **options)
    assert result == expected


def test_a_repair_needs_a_reference(made, base, tmp_path, monkeypatch):
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="misdirection reference"):
        repair(base, made[1]["minimal"], data=write_rows(tmp_path / "rows.jsonl"), out=tmp_path / "out")


def test_nothing_is_written_over(made, base, inputs_of, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes.txt"):
        run_repair(inputs_of(made[1]["minimal"], data=data), mine)
    copy = tmp_path / "copy"
    shutil.copytree(made[1]["minimal"], copy)
    (copy / RepairResult.FILE).write_text("{}")
    with pytest.raises(InputError, match=r"never written over|did not write"):
        run_repair(inputs_of(copy, data=data), copy)
    whole = load(base, dtype="float32", device="cpu")
    whole.model.save_pretrained(tmp_path / "whole")
    with pytest.raises(InputError, match="whole model"):
        run_repair(inputs_of(tmp_path / "whole", data=data), tmp_path / "out")
