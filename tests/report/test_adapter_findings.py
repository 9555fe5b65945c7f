"""What is claimed of adapters follows from the numbers, non-findings included."""

import pytest

from interpretation_fixture import adapters, judged, unmeasured
from misdirection.interpretation.results import AdapterFigures
from misdirection.report.adapter_findings import find_in_adapters


@pytest.fixture
def section():
    """The figures as JSON has them, to be changed."""
    return adapters().model_dump(mode="json")


def findings(section):
    return find_in_adapters(AdapterFigures.model_validate(section))


def finding(section, words):
    (found,) = [one for one in findings(section) if words in one.claim]
    return found


def probe(section, split, pooling="token"):
    (found,) = [
        one
        for one in section["probes"]
        if (one["features"], one["pooling"], one["split"]) == ("scalars", pooling, split)
        and one["name"].startswith("domain")
    ]
    return found


def spread(mean, half=0.03):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 20}


def test_a_probe_that_knows_unseen_questions_holds(section):
    probe(section, "question")["auroc"] = spread(0.8)
    probe(section, "question")["null_auroc"] = spread(0.5, 0.1)
    found = finding(section, "(domain, risky_money misaligned answers)")
    assert found.holds and "AUROC by question 0.80" in found.evidence and "shuffled labels 0.50" in found.evidence


def test_a_probe_that_knows_the_questions_alone_does_not_and_says_so(section):
    probe(section, "question")["auroc"] = spread(0.53, 0.1)
    probe(section, "answer")["auroc"] = spread(0.66)
    found = finding(section, "(domain, risky_money misaligned answers)")
    assert found.holds is False
    assert "it largely knows the questions" in found.evidence and "causal test" in found.evidence


def test_a_probe_no_better_than_its_null_does_not_hold(section):
    probe(section, "question")["auroc"] = spread(0.7)
    probe(section, "question")["null_auroc"] = spread(0.5, 0.25)
    assert finding(section, "(domain, risky_money misaligned answers)").holds is False


def test_a_probe_without_features_says_so(section):
    one = probe(section, "question")
    one["auroc"], one["coefficients"] = spread(0.5, 0), {name: [0.0] * 20 for name in one["coefficients"]}
    assert "left no feature" in finding(section, "(domain, risky_money misaligned answers)").evidence


def test_without_questions_nothing_is_claimed(section):
    section["probes"] = [one for one in section["probes"] if one["split"] == "answer"]
    found = finding(section, "(domain, risky_money misaligned answers)")
    assert found.holds is None and "questions are not known" in found.evidence


def test_roles_are_counted(section):
    found = finding(section, "carry general misalignment")
    by_role = {
        role: [one["layer"] for one in section["roles"] if one["role"] == role] for role in ("general", "domain")
    }
    assert found.holds is bool(by_role["general"] and by_role["domain"])
    for one in section["roles"]:
        one["role"] = "neither"
    assert finding(section, "carry general misalignment").holds is False


def judged_finding(section, verdict, change=None):
    """The finding on judged answers, with this verdict on all adapters off."""
    section["causal"]["judged"] = rows = [row.model_dump(mode="json") for row in judged()]
    rows[1] |= {"verdict": verdict} | ({"change": change} if change else {})
    return finding(section, "judged answers")


def test_fewer_misaligned_answers_without_adapters_hold(section):
    found = judged_finding(section, "lower")
    assert found.holds and found.evidence.startswith("Misaligned are 32.5% [")
    assert "all off -30.0 [-40.0, -20.0] (lower); general adapters off -25.0 [-35.0, -15.0] (lower)" in found.evidence
    assert found.evidence.endswith("40 answers to 8 questions each.")


def test_no_clear_effect_on_judged_answers_is_a_finding_too(section):
    found = judged_finding(section, "no clear change", spread(-0.01))
    assert found.holds is False
    assert "it may be chance" in found.evidence and "all off -1.0 [-4.0, +2.0] (no clear change)" in found.evidence
    assert judged_finding(section, "higher", spread(0.1)).holds is False
    assert "chance" not in judged_finding(section, "higher", spread(0.1)).evidence


@pytest.mark.parametrize(("verdict", "words"), [("broken", "incoherent"), ("cut off", "cut at the token limit")])
def test_answers_worth_nothing_show_neither(section, verdict, words):
    found = judged_finding(section, verdict)
    assert found.holds is None and words in found.evidence


def test_an_organism_without_misaligned_answers_has_none_to_lose(section):
    section["causal"]["judged"] = rows = [row.model_dump(mode="json") for row in judged()]
    rows[0]["em"] |= {"rate": 0.0, "hits": 0, "low": 0.0}
    rows[1]["verdict"] = "no clear change"
    found = finding(section, "judged answers")
    assert found.holds is False and "nothing to lower" in found.evidence


def test_without_a_judge_there_is_no_finding_on_judged_answers(section):
    assert not any("judged" in one.claim for one in findings(section))


def test_convergence_downstream_needs_a_small_cosine_of_b_and_a_large_one_later(section):
    effect = section["geometry"]["downstream"]
    for values in effect["cosine"].values():
        values[-1] = 0.9
    for cosines in section["geometry"]["cosines"].values():
        cosines[effect["direction"]] = [0.03] * len(cosines[effect["direction"]])
    assert finding(section, "converges").holds
    for values in effect["cosine"].values():
        values[-1] = 0.05
    assert finding(section, "converges").holds is False


def test_patching_must_beat_other_general_prompts(section):
    section["patching"]["in_domain_into_general"] = {"mean": 0.05, "low": 0.02, "high": 0.08, "n": 8}
    section["patching"]["general_into_general"] = {"mean": 0.0, "low": -0.01, "high": 0.01, "n": 8}
    assert finding(section, "in-domain prompts").holds
    section["patching"]["general_into_general"]["high"] = 0.06
    assert finding(section, "in-domain prompts").holds is False


def test_a_turn_of_most_adapters_is_a_phase_transition(section):
    for one in section["dynamics"]["features"].values():
        one["turn"] = None
    assert finding(section, "phase transition").holds is False
    for one in section["dynamics"]["features"].values():
        one["turn"] = section["dynamics"]["steps"][2]
    assert finding(section, "phase transition").holds


def test_an_empty_section_claims_nothing():
    assert find_in_adapters(unmeasured()) == []
