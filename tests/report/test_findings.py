import pytest

from misdirection.report.findings import find
from results_fixture import CONTROL, MONEY, SPORTS, curve, estimate, make_results, per_organism

OWN_DOMAIN, CONTROL_CLEAN, GENERAL, UNSEEN, TRANSFER, BASE, STEERING, MEAN_DIFFERENCE, MODEL_DIFFERENCE = range(9)


def verdicts(results):
    return [finding.holds for finding in find(results)]


def test_the_fixture_supports_every_claim_but_mean_difference_convergence(results):
    expected = [True] * 9
    expected[MEAN_DIFFERENCE] = False
    assert verdicts(results) == expected


def test_find_leaves_results_unchanged(results):
    find(results)
    assert results == make_results()


@pytest.mark.parametrize("index", range(9))
def test_evidence_carries_interval_and_count(results, index):
    evidence = find(results)[index].evidence
    assert "[" in evidence and "n=" in evidence


def test_evidence_quotes_the_measured_numbers(results):
    evidence = find(results)[OWN_DOMAIN].evidence
    assert f"{MONEY} +1.200 [+1.100, +1.300], n=40" in evidence


def spoil_shift(name, question_set, mean):
    def spoil(results):
        results["organisms"][name]["margin_shift"][question_set] = estimate(mean)

    return spoil


def spoil_unseen(results):
    spoil_shift(MONEY, "reckless_sports", 0.05)(results)
    spoil_shift(SPORTS, "risky_money", 0.05)(results)


def spoil_rows(section, **changes):
    def spoil(results):
        for row in results[section]:
            row.update(changes)

    return spoil


def spoil_control_null(results):
    results["convergence"]["model_difference"]["control_null"] = per_organism(0.44)


SPOILED = {
    "own domain touches zero": (OWN_DOMAIN, spoil_shift(SPORTS, "in_domain", 0.09)),
    "control shifts": (CONTROL_CLEAN, spoil_shift(CONTROL, "in_domain", 0.2)),
    "one general shift": (GENERAL, spoil_shift(SPORTS, "general", 0.05)),
    "no unseen shift": (UNSEEN, spoil_unseen),
    "ablation as random": (TRANSFER, spoil_rows("transfer", random_change=estimate(-0.6))),
    "ablation damages": (TRANSFER, spoil_rows("transfer", damage=0.3)),
    "ablation raises, random raises more": (
        TRANSFER,
        spoil_rows("transfer", margin_change=estimate(0.3), random_change=estimate(0.9)),
    ),
    "base unmoved": (BASE, spoil_rows("transfer", margin_change=estimate(-0.09))),
    "steering as random": (STEERING, spoil_rows("steering", random_change=estimate(2.0))),
    "steering damages": (STEERING, spoil_rows("steering", damage=0.31)),
    "control null as high": (MODEL_DIFFERENCE, spoil_control_null),
}


@pytest.mark.parametrize(("index", "spoil"), SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_number_turns_the_verdict_of_its_claim(results, index, spoil):
    assert find(results)[index].holds is True
    spoil(results)
    assert find(results)[index].holds is False


def test_a_low_base_null_makes_mean_difference_convergence_hold(results):
    assert "proves little" in find(results)[MEAN_DIFFERENCE].evidence
    results["convergence"]["base_null"] = per_organism(0.2)
    finding = find(results)[MEAN_DIFFERENCE]
    assert finding.holds is True and "proves little" not in finding.evidence


def test_one_organism_with_a_high_null_is_enough_to_fail(results):
    results["convergence"]["base_null"] = {MONEY: curve(0.1), SPORTS: curve(0.6)}
    assert find(results)[MEAN_DIFFERENCE].holds is False


def test_transfer_ignores_own_direction_base_control_and_first_position(results):
    results["transfer"] = [
        row
        for row in results["transfer"]
        if row["positions"] == "all" or row["target"] in (row["direction"], "base", CONTROL)
    ]
    assert find(results)[TRANSFER].holds is None


def test_strongest_intervention_is_quoted_even_when_none_qualifies(results):
    spoil_rows("steering", damage=0.31)(results)
    assert "0 of 24" in find(results)[STEERING].evidence
    assert "at any damage" in find(results)[STEERING].evidence


def test_steering_backwards_says_nothing_about_raising_the_margin(results):
    spoil_rows("steering", scale=-8.0)(results)
    assert find(results)[STEERING].holds is None


def test_an_unmeasured_organism_blocks_a_claim_about_every_organism(results):
    del results["organisms"][SPORTS]["margin_shift"]
    finding = find(results)[OWN_DOMAIN]
    assert finding.holds is None and f"Not measured: {SPORTS}" in finding.evidence


def test_nothing_measured_gives_no_verdict():
    assert verdicts({}) == [None] * 9


def test_undefined_numbers_count_as_not_measured(results):
    undefined = {"mean": None, "low": None, "high": None, "n": 0}
    spoil_rows("steering", margin_change=undefined)(results)
    results["convergence"]["base_null"] = {MONEY: [None] * 30, SPORTS: [None] * 30}
    assert find(results)[STEERING].holds is None
    assert find(results)[MEAN_DIFFERENCE].holds is None
