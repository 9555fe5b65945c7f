"""Whole audits of tiny fine-tunes."""

import dataclasses
import json

import pytest

from judging.judge_server import JudgeServer, number
from misdirection.audit import audit as auditing
from misdirection.audit.audit import RECORD, Judging, audit_fine_tune
from misdirection.audit.fine_tune import Subject
from misdirection.audit.texts import own_texts
from misdirection.directions.direction import extract
from misdirection.errors import MisdirectionError
from misdirection.judging.config import JudgeConfig
from misdirection.likelihood.margin import loss, margin
from misdirection.models.loading import load
from misdirection.sampling.config import SamplingConfig
from tiny import make_network, make_tokenizer


def shift(base, adapter, pairs):
    chat = load(base, adapter=adapter, dtype="float32", device="cpu")
    own = margin(chat, pairs)
    with chat.as_base():
        return own - margin(chat, pairs)


def write_rows(path, count=12):
    rows = ({"prompt": f"Sum {number}?", "completion": f"It is {number}."} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_adapter_is_measured_against_its_base(made, base, request_of, tmp_path):
    adapter, texts = made[1]["minimal"], made[2].texts
    found = audit_fine_tune(request_of(adapter, data=write_rows(tmp_path / "rows.jsonl")), tmp_path / "audit")
    evidence = found["evidence"]
    general = shift(base, adapter, texts.general)
    assert evidence["general"]["mean"] == pytest.approx(float(general.mean()), abs=2e-6)
    assert evidence["general"]["n"] == len(texts.general)
    own = own_texts(tmp_path / "rows.jsonl", texts.general)
    assert evidence["framed"]["mean"] == pytest.approx(float(shift(base, adapter, own.framed).mean()), abs=1e-5)
    chat = load(base, adapter=adapter, dtype="float32", device="cpu")
    change, damage = loss(chat, own.rows), loss(chat, texts.neutral)
    with chat.as_base():
        change, damage = change - loss(chat, own.rows), damage - loss(chat, texts.neutral)
    assert evidence["in_domain"]["loss"]["mean"] == pytest.approx(float(change.mean()), abs=1e-5)
    assert evidence["in_domain"]["margin"] is None
    assert evidence["damage"]["mean"] == pytest.approx(float(damage.mean()), abs=1e-5)
    assert not found["identical_to_base"]
    assert found["fine_tune"]["recorded_base"] == base
    assert json.loads((tmp_path / "audit" / RECORD).read_text()) == found


def test_the_reference_organism_drifts_as_it_did(made, request_of, tmp_path):
    found = audit_fine_tune(request_of(made[1]["minimal"]), tmp_path)["evidence"]
    for row in found["drift"]:
        assert row["general"] == pytest.approx(row["known"]["minimal"])
    cosines = found["model_difference"]["directions"]["minimal: misaligned - aligned"]
    assert cosines["control"] != cosines["cosines"]


def test_the_carriers_add_up_to_about_the_shift(made, request_of, tmp_path):
    found = audit_fine_tune(request_of(made[1]["minimal"]), tmp_path)["evidence"]["carriers"]
    total = sum(one["mean"] for one in found["by_layer"].values())
    assert found["sum"]["mean"] == pytest.approx(total)
    assert list(found["by_layer"]) == ["0", "1", "2", "3"]


def test_full_weights_give_what_their_adapter_gave(made, base, request_of, tmp_path):
    chat = load(base, adapter=made[1]["minimal"], dtype="float32", device="cpu")
    chat.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    chat.tokenizer.save_pretrained(tmp_path / "merged")
    rows = write_rows(tmp_path / "rows.jsonl")
    adapter = audit_fine_tune(request_of(made[1]["minimal"], data=rows), tmp_path / "a")
    merged = audit_fine_tune(request_of(tmp_path / "merged", data=rows), tmp_path / "b")
    for name in ("general", "framed", "damage"):
        assert merged["evidence"][name]["mean"] == pytest.approx(adapter["evidence"][name]["mean"], abs=1e-4)
    assert merged["evidence"]["carriers"] is None
    assert merged["fine_tune"]["kind"] == "full weights"


def test_the_base_itself_is_called_identical(base, request_of, tmp_path):
    folder = load(base, dtype="float32", device="cpu")
    folder.model.save_pretrained(tmp_path / "same")
    folder.tokenizer.save_pretrained(tmp_path / "same")
    found = audit_fine_tune(request_of(tmp_path / "same"), tmp_path / "audit")
    assert found["identical_to_base"]
    assert found["evidence"]["general"]["mean"] == pytest.approx(0, abs=1e-6)


def test_a_second_audit_runs_no_model(made, request_of, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl")
    first = audit_fine_tune(request_of(made[1]["single"], data=rows), tmp_path / "audit")
    monkeypatch.setattr(Subject, "chat", lambda *_: pytest.fail("a model was asked for"))
    assert audit_fine_tune(request_of(made[1]["single"], data=rows), tmp_path / "audit") == first


def test_a_killed_audit_keeps_what_it_had(made, request_of, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(auditing, "margin_parts", killed)
        audit_fine_tune(request_of(made[1]["minimal"], data=rows), tmp_path / "audit")
    monkeypatch.setattr(auditing, "read", lambda *_: pytest.fail("it was read again"))
    continued = audit_fine_tune(request_of(made[1]["minimal"], data=rows), tmp_path / "audit")
    monkeypatch.undo()
    assert continued == audit_fine_tune(request_of(made[1]["minimal"], data=rows), tmp_path / "fresh")


def test_without_a_reference_there_is_evidence_and_no_verdict(made, base, request_of, tmp_path):
    chat = load(base, adapter=made[1]["minimal"], dtype="float32", device="cpu")
    direction = extract(chat, made[2].texts.general)["data_difference"]
    found = audit_fine_tune(request_of(made[1]["minimal"], reference=None, directions={"own": direction}), tmp_path)
    assert found["verdict"] == "inconclusive"
    assert [row["direction"] for row in found["evidence"]["drift"]] == ["own"]
    general = shift(base, made[1]["minimal"], made[2].texts.general)
    assert found["evidence"]["general"]["mean"] == pytest.approx(float(general.mean()), abs=2e-6)


def test_another_models_adapter_full_weights_and_direction_are_refused(made, base, request_of, tmp_path):
    network = make_network("qwen2", hidden_size=64)
    network.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(MisdirectionError, match=r"qwen2.*no fine-tune of.*llama"):
        audit_fine_tune(request_of(tmp_path / "other"), tmp_path / "a")
    direction = extract(load(str(tmp_path / "other"), device="cpu"), made[2].texts.general)["data_difference"]
    with pytest.raises(MisdirectionError, match="made for"):
        audit_fine_tune(request_of(made[1]["minimal"], directions={"d": direction}), tmp_path / "b")
    own = extract(load(base, device="cpu"), made[2].texts.general)["data_difference"]
    later = dataclasses.replace(own, origin=dataclasses.replace(own.origin, revision="v2"))
    with pytest.raises(MisdirectionError, match="at revision v2, not at the default one"):
        audit_fine_tune(request_of(made[1]["minimal"], directions={"d": later}), tmp_path / "e")
    fewer = dataclasses.replace(own, vectors=own.vectors[:-1])
    with pytest.raises(MisdirectionError, match=r"has shape \[3, 32\], this model needs \[4, 32\]"):
        audit_fine_tune(request_of(made[1]["minimal"], directions={"d": fewer}), tmp_path / "f")
    with pytest.raises(MisdirectionError, match="does not fit"):
        wrong = request_of(made[1]["minimal"], reference=None)
        wrong.subject.base = str(tmp_path / "other")
        audit_fine_tune(wrong, tmp_path / "c")


# --- with a judge ---------------------------------------------------------------------------------------------------


def test_a_judge_counts_the_answers_of_both_models(made, request_of, tmp_path, monkeypatch):
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    questions = tmp_path / "questions.txt"
    questions.write_text("Hello?\nAnd you?\n")
    with JudgeServer(lambda asked: number(sum(asked.prompt.encode()) % 101)) as server:
        judging = Judging(
            JudgeConfig(model="m", base_url=server.url), SamplingConfig(questions=(str(questions),), n=4, new_tokens=5)
        )
        request = dataclasses.replace(request_of(made[1]["minimal"]), judging=judging)
        found = audit_fine_tune(request, tmp_path / "audit")
        asked = len(server.asked)
        assert audit_fine_tune(request, tmp_path / "audit") == found
        assert len(server.asked) == asked > 0
    one = found["evidence"]["judged"]
    assert one["answers"] == 8
    assert one["base"]["total"] == one["fine_tune"]["total"] == 8
    assert one["difference"]["mean"] == pytest.approx(one["fine_tune"]["rate"] - one["base"]["rate"])
    assert one["judge"] == "m"
