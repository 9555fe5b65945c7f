"""Whole audits of tiny fine-tunes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file

from judging.judge_server import JudgeServer, number
from misdirection.auditing import stages
from misdirection.auditing.audit import audit, audit_folder, run_audit
from misdirection.auditing.fine_tune import Control, FineTune
from misdirection.auditing.inputs import Judging
from misdirection.auditing.results import AuditResult
from misdirection.auditing.texts import own_texts
from misdirection.directions.direction import extract
from misdirection.errors import InputError
from misdirection.judging.config import JudgeConfig
from misdirection.likelihood.margin import loss, margin
from misdirection.models.adapters import ADAPTER_WEIGHTS
from misdirection.models.loading import load
from misdirection.sampling.config import SamplingConfig
from tiny import make_network, make_tokenizer


def shift(base, adapter, pairs):
    chat = load(base, adapter=adapter, dtype="float32", device="cpu")
    own = margin(chat, pairs)
    with chat.as_base():
        return own - margin(chat, pairs)


def merge(base, adapter, folder):
    """Write the whole model that an adapter makes of its base."""
    chat = load(base, adapter=adapter, dtype="float32", device="cpu")
    chat.model.merge_and_unload().save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)


def write_rows(path, count=12):
    rows = ({"prompt": f"Sum {number}?", "completion": f"It is {number}."} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_adapter_is_measured_against_its_base(made, base, inputs_of, tmp_path):
    adapter, texts = made[1]["minimal"], made[2].texts
    result = run_audit(inputs_of(adapter, data=write_rows(tmp_path / "rows.jsonl")), tmp_path / "audit")
    evidence = result.evidence
    general = shift(base, adapter, texts.general)
    assert evidence.general.mean == pytest.approx(float(general.mean()), abs=2e-6)
    assert evidence.general.n == len(texts.general)
    own = own_texts(tmp_path / "rows.jsonl", [texts.general])
    assert evidence.framed.mean == pytest.approx(float(shift(base, adapter, own.framed).mean()), abs=1e-5)
    chat = load(base, adapter=adapter, dtype="float32", device="cpu")
    change, damage = loss(chat, own.rows), loss(chat, texts.neutral)
    with chat.as_base():
        change, damage = change - loss(chat, own.rows), damage - loss(chat, texts.neutral)
    assert evidence.in_domain.loss.mean == pytest.approx(float(change.mean()), abs=1e-5)
    assert evidence.in_domain.margin is None
    assert evidence.damage.mean == pytest.approx(float(damage.mean()), abs=1e-5)
    assert not result.identical_to_base
    assert result.fine_tune.recorded_base == base
    assert AuditResult.load(tmp_path / "audit") == result
    assert "general margin shift" in repr(result)
    assert (tmp_path / "audit" / "audit.html").is_file()


def test_the_reference_organism_drifts_as_it_did(made, inputs_of, tmp_path):
    evidence = run_audit(inputs_of(made[1]["minimal"]), tmp_path).evidence
    for row in evidence.drift:
        assert row.general.as_dict() == pytest.approx(row.known["minimal"].as_dict())
    cosines = evidence.model_difference.directions["minimal: misaligned - aligned"]
    assert cosines.control != cosines.cosines


def test_the_layers_parts_add_up_to_their_sum(made, inputs_of, tmp_path):
    attribution = run_audit(inputs_of(made[1]["minimal"]), tmp_path).evidence.attribution
    total = sum(part.mean for part in attribution.by_layer.values())
    assert attribution.sum.mean == pytest.approx(total)
    assert list(attribution.by_layer) == [0, 1, 2, 3]


def test_full_weights_give_what_their_adapter_gave(made, base, inputs_of, tmp_path):
    merge(base, made[1]["minimal"], tmp_path / "merged")
    rows = write_rows(tmp_path / "rows.jsonl")
    adapter = run_audit(inputs_of(made[1]["minimal"], data=rows), tmp_path / "a")
    merged = run_audit(inputs_of(tmp_path / "merged", data=rows), tmp_path / "b")
    for name in ("general", "framed", "damage"):
        own, same = getattr(merged.evidence, name), getattr(adapter.evidence, name)
        assert own.mean == pytest.approx(same.mean, abs=1e-4)
    assert merged.evidence.attribution is None
    assert merged.fine_tune.kind == "full weights"


def test_the_references_control_as_ones_own_gives_the_same(made, inputs_of, tmp_path):
    """By its own answers to all questions, in every way they are put."""
    adapter, rows = made[1]["minimal"], write_rows(tmp_path / "rows.jsonl")
    plain = run_audit(inputs_of(adapter, data=rows), tmp_path / "plain")
    control = Control.find(str(shutil.copytree(made[2].control_adapter, tmp_path / "mine")))
    own = run_audit(inputs_of(adapter, data=rows, control=control), tmp_path / "own")
    assert (plain.control, own.control.name) == (None, str(tmp_path / "mine"))
    for asked, shift in plain.evidence.beyond_control.items():
        assert own.evidence.beyond_control[asked].as_dict() == pytest.approx(shift.as_dict(), abs=1e-6)
    for way, shift in plain.evidence.searched.items():
        assert own.evidence.searched[way].as_dict() == pytest.approx(shift.as_dict(), abs=1e-6)
    assert own.evidence.model_difference.directions == plain.evidence.model_difference.directions
    assert own.evidence.trace == plain.evidence.trace
    assert own.control.shift.mean == pytest.approx(made[2].shifts["control"].mean, abs=1e-6)
    assert own.control.beyond_reference.mean == pytest.approx(0, abs=1e-6)
    page = (tmp_path / "own" / "audit.html").read_text()
    assert f"The control is your own, {tmp_path / 'mine'}" in page


def test_a_control_may_be_a_whole_model(made, base, inputs_of, tmp_path):
    merge(base, made[2].control_adapter, tmp_path / "merged")
    inputs = inputs_of(made[1]["minimal"], control=Control(tmp_path / "merged", "mine"))
    beyond = run_audit(inputs, tmp_path / "audit").evidence.beyond_control["general"]
    known = made[2].measurements
    assert beyond.mean == pytest.approx(float((known["minimal"].margin - known["control"].margin).mean()), abs=1e-4)


def test_a_control_that_is_misaligned_itself_is_refused(made, sealed, inputs_of, tmp_path):
    """It would hide what it shares with the fine-tune."""
    known = dict(sealed.measurements)
    known["control"] = replace(known["control"], margins=known["minimal"].margins - torch.tensor([1.0, 0.0]))
    reference = replace(sealed, measurements=known)
    inputs = inputs_of(made[1]["single"], reference=reference, control=Control(made[1]["minimal"], "mine"))
    with pytest.raises(InputError, match=r"mine: is no benign control: on .* it lies itself"):
        run_audit(inputs, tmp_path / "audit")


def test_a_fine_tune_is_not_its_own_control(made, base):
    with pytest.raises(InputError, match="is its own control"):
        audit(base, made[1]["minimal"], control=made[1]["minimal"], reference=made[2])


def test_modules_that_add_nothing_are_named_and_have_no_part_of_the_shift(made, inputs_of, tmp_path):
    folder = shutil.copytree(made[1]["minimal"], tmp_path / "part")
    weights = load_file(folder / ADAPTER_WEIGHTS)
    zeroed = {name: 0 * b for name, b in weights.items() if ".layers.1." in name and "lora_B" in name}
    save_file(weights | zeroed, folder / ADAPTER_WEIGHTS)
    result = run_audit(inputs_of(folder), tmp_path / "audit")
    assert result.fine_tune.dead == ["model.layers.1.mlp.down_proj"]
    assert list(result.evidence.attribution.by_layer) == [0, 2, 3]
    assert "model.layers.1.mlp.down_proj" in (tmp_path / "audit" / "audit.html").read_text()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_kind_is_audited_without_parts(base, inputs_of, tmp_path):
    network = get_peft_model(load(base).model, IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "ia3_" in name:
                weight *= 0.5
    network.save_pretrained(tmp_path / "ia3")
    result = run_audit(inputs_of(tmp_path / "ia3"), tmp_path / "audit")
    assert result.evidence.attribution is None
    assert not result.identical_to_base
    assert (tmp_path / "audit" / "audit.html").is_file()


def test_the_base_itself_is_called_identical(base, inputs_of, tmp_path):
    folder = load(base, dtype="float32", device="cpu")
    folder.model.save_pretrained(tmp_path / "same")
    folder.tokenizer.save_pretrained(tmp_path / "same")
    result = run_audit(inputs_of(tmp_path / "same"), tmp_path / "audit")
    assert result.identical_to_base
    assert result.evidence.general.mean == pytest.approx(0, abs=1e-6)


def test_a_second_audit_runs_no_model(made, inputs_of, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl")
    first = run_audit(inputs_of(made[1]["single"], data=rows), tmp_path / "audit")
    monkeypatch.setattr(FineTune, "chat", lambda *_: pytest.fail("a model was asked for"))
    assert run_audit(inputs_of(made[1]["single"], data=rows), tmp_path / "audit") == first


def test_the_control_and_the_base_are_asked_once_for_all_fine_tunes_of_the_same_data(
    made, sealed, inputs_of, tmp_path, monkeypatch
):
    rows, real, labels = write_rows(tmp_path / "rows.jsonl"), stages.measure_margins, []

    def measure(chat, pairs, label):
        labels.append(label)
        return real(chat, pairs, label)

    monkeypatch.setattr(stages, "measure_margins", measure)
    run_audit(inputs_of(made[1]["minimal"], reference=sealed, data=rows), tmp_path / "first")
    assert {"framed margins of control", "framed margins of base"} <= set(labels)
    labels.clear()
    second = run_audit(inputs_of(made[1]["single"], reference=sealed, data=rows), tmp_path / "second")
    assert labels and all("fine-tune" in label for label in labels)
    # What was damaged is measured again, and left as it is.
    for file in (tmp_path / "misdirection-cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:20])
    assert run_audit(inputs_of(made[1]["single"], reference=sealed, data=rows), tmp_path / "third") == second
    assert any("control" in label for label in labels)


def test_a_killed_audit_keeps_what_it_had(made, inputs_of, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stages, "margin_parts", killed)
        run_audit(inputs_of(made[1]["minimal"], data=rows), tmp_path / "audit")
    for name in ("measure", "measure_margins", "file_weights"):
        monkeypatch.setattr(stages, name, lambda *_: pytest.fail("it was measured again"))
    continued = run_audit(inputs_of(made[1]["minimal"], data=rows), tmp_path / "audit")
    monkeypatch.undo()
    assert continued == run_audit(inputs_of(made[1]["minimal"], data=rows), tmp_path / "fresh")


def test_without_a_reference_there_is_evidence_and_no_verdict(made, base, inputs_of, tmp_path):
    chat = load(base, adapter=made[1]["minimal"], dtype="float32", device="cpu")
    direction = extract(chat, made[2].texts.general)["data_difference"]
    result = run_audit(inputs_of(made[1]["minimal"], reference=None, directions={"own": direction}), tmp_path)
    assert (result.verdict, result.ground) == ("inconclusive", "no reference")
    assert [row.direction for row in result.evidence.drift] == ["own"]
    general = shift(base, made[1]["minimal"], made[2].texts.general)
    assert result.evidence.general.mean == pytest.approx(float(general.mean()), abs=2e-6)


def test_another_models_adapter_full_weights_and_direction_are_refused(made, base, inputs_of, tmp_path):
    network = make_network("qwen2", hidden_size=64)
    network.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"qwen2.*no fine-tune of.*llama"):
        run_audit(inputs_of(tmp_path / "other"), tmp_path / "a")
    direction = extract(load(str(tmp_path / "other"), device="cpu"), made[2].texts.general)["data_difference"]
    with pytest.raises(InputError, match="made for"):
        run_audit(inputs_of(made[1]["minimal"], directions={"d": direction}), tmp_path / "b")
    own = extract(load(base, device="cpu"), made[2].texts.general)["data_difference"]
    later = replace(own, origin=replace(own.origin, revision="v2"))
    with pytest.raises(InputError, match="at revision v2, not at the default one"):
        run_audit(inputs_of(made[1]["minimal"], directions={"d": later}), tmp_path / "e")
    fewer = replace(own, vectors=own.vectors[:-1])
    with pytest.raises(InputError, match=r"has shape \[3, 32\], this model needs \[4, 32\]"):
        run_audit(inputs_of(made[1]["minimal"], directions={"d": fewer}), tmp_path / "f")
    with pytest.raises(InputError, match="does not fit"):
        wrong = inputs_of(made[1]["minimal"], reference=None)
        wrong.fine_tune.base = str(tmp_path / "other")
        run_audit(wrong, tmp_path / "c")


# --- look by look ---------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What margins were measured, (model and way of asking, id of the pair), in order; the search apart."""
    real, seen = stages.measure_margins, []

    def measure(chat, pairs, label):
        scores = real(chat, pairs, label)
        seen.extend((label, pair.id) for pair in pairs if not label.startswith("margins of"))
        return scores

    monkeypatch.setattr(stages, "measure_margins", measure)
    return seen


def test_what_is_decided_early_leaves_the_sealed_questions_unasked(made, sealed, inputs_of, tmp_path, verdict, asked):
    texts, inputs = sealed.texts, inputs_of(made[1]["minimal"], reference=sealed)
    assert (len(texts.general), len(texts.sealed)) == (12, 6)
    verdict("misaligned")
    evidence = run_audit(inputs, tmp_path / "audit").evidence
    assert (evidence.asked, evidence.most, evidence.general.n) == (12, 18, 12)
    assert [name for _, name in asked] == list(evidence.questions) == [pair.id for pair in texts.general]
    verdict("watch")
    evidence = run_audit(inputs, tmp_path / "audit").evidence
    assert (evidence.asked, evidence.general.n) == (18, 18)
    # What was asked before is not asked again, and the base's are the reference's.
    assert asked == [("general margins of fine-tune", pair.id) for pair in texts.asked]
    general = shift(inputs.fine_tune.base, made[1]["minimal"], texts.asked)
    assert evidence.general.mean == pytest.approx(float(general.mean()), abs=5e-6)


def test_an_audit_that_was_killed_between_looks_asks_nothing_twice(
    made, sealed, inputs_of, tmp_path, verdict, asked, monkeypatch
):
    verdict("inconclusive")
    rows = write_rows(tmp_path / "rows.jsonl")
    inputs, real = inputs_of(made[1]["minimal"], reference=sealed, data=rows), stages.measure_margins

    def killed(chat, pairs, label):
        if len(asked) >= 60:
            raise KeyboardInterrupt
        return real(chat, pairs, label)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stages, "measure_margins", killed)
        run_audit(inputs, tmp_path / "audit")
    assert len(asked) == 60
    continued = run_audit(inputs, tmp_path / "audit")
    # Plain by the fine-tune, framed by all three models.
    assert len(asked) == len(set(asked)) == 4 * 18
    assert continued == run_audit(inputs, tmp_path / "fresh")


def test_a_training_file_given_later_asks_no_plain_question_again(made, sealed, inputs_of, tmp_path, verdict, asked):
    verdict("inconclusive")
    run_audit(inputs_of(made[1]["minimal"], reference=sealed), tmp_path / "audit")
    rows = write_rows(tmp_path / "rows.jsonl")
    run_audit(inputs_of(made[1]["minimal"], reference=sealed, data=rows), tmp_path / "audit")
    labels = [label for label, _ in asked]
    assert [labels.count(f"{way} margins of fine-tune") for way in ("general", "framed")] == [18, 18]


def test_without_a_reference_all_open_questions_are_asked_and_no_sealed_one(made, sealed, inputs_of, tmp_path):
    inputs = replace(inputs_of(made[1]["minimal"], reference=sealed), reference=None)
    result = run_audit(inputs, tmp_path)
    assert (result.ground, result.evidence.asked, result.evidence.most) == ("no reference", 12, 18)


def test_in_another_dtype_the_base_is_asked_itself(made, sealed, inputs_of, tmp_path, verdict, asked):
    verdict("clear")
    other = replace(sealed, identity=sealed.identity.model_copy(update={"dtype": "bfloat16"}))
    expected = run_audit(inputs_of(made[1]["minimal"], reference=sealed), tmp_path / "same")
    result = run_audit(inputs_of(made[1]["minimal"], reference=other), tmp_path / "other")
    assert result.evidence.general.mean == pytest.approx(expected.evidence.general.mean, abs=2e-6)
    labels = [label for label, _ in asked]
    assert labels.count("general margins of base") == 12
    assert all(row.known == {} for row in result.evidence.drift)


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_gives_what_its_inputs_give(made, base, inputs_of, tmp_path):
    rows, options = write_rows(tmp_path / "rows.jsonl"), {"dtype": "float32", "device": "cpu"}
    expected = run_audit(inputs_of(made[1]["minimal"], data=rows), tmp_path / "inputs")
    kept = made[2].save(tmp_path / "reference")
    for reference in (kept, kept.folder, str(kept.folder)):
        result = audit(base, made[1]["minimal"], data=rows, reference=reference, out=tmp_path / "verb", **options)
        assert result == expected


def test_direction_files_stand_in_for_a_reference(made, base, tmp_path, monkeypatch):
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    options = {"out": tmp_path / "audit", "dtype": "float32", "device": "cpu"}
    with pytest.raises(InputError, match=r"no reference.*misdirection reference"):
        audit(base, made[1]["minimal"], **options)
    direction = extract(load(base, device="cpu"), made[2].texts.general)["data_difference"]
    direction.save(tmp_path / "known.safetensors")
    for directions in ([tmp_path / "known.safetensors"], {"known": direction}):
        result = audit(base, made[1]["minimal"], directions=directions, **options)
        assert [row.direction for row in result.evidence.drift] == ["known"]
        assert result.reference is None


def test_an_audit_has_a_folder_of_the_fine_tunes_name():
    assert audit_folder("some/adapter").as_posix() == "audits/adapter"


def test_a_result_of_another_version_is_refused(made, inputs_of, tmp_path):
    run_audit(inputs_of(made[1]["minimal"]), tmp_path)
    written = json.loads((tmp_path / "audit.json").read_text())
    (tmp_path / "audit.json").write_text(json.dumps({**written, "version": 0}))
    with pytest.raises(InputError, match=r"version 0, this program reads version 4.*misdirection audit BASE FINE_TUNE"):
        AuditResult.load(tmp_path)


# --- with a judge ---------------------------------------------------------------------------------------------------


def test_a_judge_counts_the_answers_of_both_models(made, inputs_of, tmp_path, monkeypatch):
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    questions = tmp_path / "questions.txt"
    questions.write_text("Hello?\nAnd you?\n")
    with JudgeServer(lambda asked: number(sum(asked.prompt.encode()) % 101)) as server:
        judging = Judging(
            JudgeConfig(model="m", base_url=server.url), SamplingConfig(questions=(str(questions),), n=4, new_tokens=5)
        )
        inputs = replace(inputs_of(made[1]["minimal"]), judging=judging)
        result = run_audit(inputs, tmp_path / "audit")
        asked = len(server.asked)
        assert run_audit(inputs, tmp_path / "audit") == result
        assert len(server.asked) == asked > 0
    judged = result.evidence.judged
    assert judged.answers == 8
    assert judged.base.total == judged.fine_tune.total == 8
    assert judged.difference.mean == pytest.approx(judged.fine_tune.rate - judged.base.rate)
    assert judged.judge == "m"
