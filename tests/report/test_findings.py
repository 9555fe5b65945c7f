import pytest

from misdirection.report.findings import find
from misdirection.statistics.estimates import Estimate
from results_fixture import CONTROL, MONEY, SPORTS
from run_fixture import (
    contrast,
    convergence,
    curve,
    each,
    estimate,
    model_difference,
    organisms,
    per_organism,
    run_results,
    steering,
    transfer,
    with_beyond,
    with_shift,
)

OWN_DOMAIN, CONTROL_CLEAN, GENERAL, BEYOND_CONTROL, FURTHER, UNSEEN = range(6)
TRANSFER, BASE, STEERING, MEAN_DIFFERENCE, MODEL_DIFFERENCE, CONTRAST, CONTRAST_ABLATED = range(6, 13)


def verdicts(results):
    return [finding.holds for finding in find(results)]


def test_the_fixture_supports_every_claim_but_mean_difference_convergence_and_that_of_two_controls(results):
    expected = [True] * 13
    expected[MEAN_DIFFERENCE], expected[BEYOND_CONTROL], expected[FURTHER] = False, None, None
    assert verdicts(results) == expected


@pytest.mark.parametrize("index", set(range(13)) - {FURTHER})
def test_evidence_carries_interval_and_count(results, index):
    evidence = find(results)[index].evidence
    assert "[" in evidence and "n=" in evidence


def test_evidence_quotes_the_measured_numbers(results):
    evidence = find(results)[OWN_DOMAIN].evidence
    assert f"{MONEY} +1.200 [+1.100, +1.300], n=40" in evidence


def changed(**updates):
    """The fixture's results with all organisms changed."""
    return run_results(organisms={name: each.model_copy(update=updates) for name, each in organisms().items()})


def test_general_claims_rest_on_the_sealed_questions_where_there_are_any(results):
    assert "2 of 2 organisms, sealed questions" in find(results)[GENERAL].evidence
    spoiled = run_results(organisms=with_beyond(SPORTS, "general", -1.0))
    assert find(spoiled)[GENERAL] == find(results)[GENERAL]
    unsealed = {name: margin for name, margin in results.base_margin.items() if name != "sealed"}
    finding = find(run_results(organisms=with_beyond(SPORTS, "general", -1.0), base_margin=unsealed))[GENERAL]
    assert finding.holds is False and "1 of 2 organisms, general questions" in finding.evidence


def test_a_shift_beyond_words_is_no_claim_where_no_words_were_counted():
    without = find(changed(words={}, minus_control={}, minus_control_beyond_words={}))
    assert without[GENERAL].holds is None and f"{MONEY} +0.350" in without[GENERAL].evidence
    assert without[UNSEEN].holds is None


@pytest.mark.parametrize(("difference", "holds"), [(0.3, True), (0.05, False)])
def test_two_organisms_that_each_have_a_control_are_compared_with_it(results, difference, holds):
    assert f"Needs two organisms, each with a control of the same training; measured: {MONEY} +0.400" in (
        find(results)[BEYOND_CONTROL].evidence
    )
    finding = find(run_results(organisms=with_control(SPORTS, "sealed", difference)))[BEYOND_CONTROL]
    assert finding.holds is holds
    assert f"{1 + holds} of 2 organisms, sealed questions" in finding.evidence


def with_control(name, asked, difference, beyond_words=None):
    """The fixture's organisms, one of them compared with a control of its own."""
    beyond = difference if beyond_words is None else beyond_words
    update = {
        "minus_control": {asked: estimate(difference)},
        "minus_control_beyond_words": {asked: estimate(beyond)},
    }
    return organisms() | {name: organisms()[name].model_copy(update=update)}


def test_what_words_explain_of_the_difference_to_the_control_does_not_count():
    finding = find(run_results(organisms=with_control(SPORTS, "sealed", 0.3, beyond_words=0.05)))[BEYOND_CONTROL]
    assert finding.holds is False and "1 of 2 organisms" in finding.evidence


def test_further_pairs_of_another_author_are_judged_beyond_the_controls(results):
    assert "No further probe pairs" in find(results)[FURTHER].evidence
    measured = {
        name: each.model_copy(
            update={
                key: getattr(each, key) | {"judged": estimate(0.2)}
                for key in ("minus_control", "minus_control_beyond_words")
            }
        )
        for name, each in organisms().items()
    }
    finding = find(run_results(organisms=measured, further_sets=["judged"]))[FURTHER]
    assert finding.holds is True and "2 of 2 organisms, judged questions" in finding.evidence
    unseen = find(run_results(organisms=measured, further_sets=["judged"]))[UNSEEN]
    assert "on judged" not in unseen.evidence


UNSEEN_SPOILED = {
    **with_beyond(MONEY, "reckless_sports", 0.05),
    SPORTS: with_beyond(SPORTS, "risky_money", 0.05)[SPORTS],
}


def shared(**changes):
    return contrast().shared.model_copy(update=changes)


def ablated(**changes):
    """The contrast's effects with those of the contrast changed."""
    return contrast(
        effects=[
            effect.model_copy(update=changes) if effect.vector == "contrast" else effect
            for effect in contrast().effects
        ]
    )


def beside(**changes):
    """The same with those of its nulls changed, as if labels were swapped."""
    changes |= {"vector": "relabelled"}
    return contrast(
        effects=[
            effect if effect.vector == "contrast" else effect.model_copy(update=changes)
            for effect in contrast().effects
        ]
    )


SPOILED = {
    "own domain touches zero": (OWN_DOMAIN, {"organisms": with_shift(SPORTS, "in_domain", 0.09)}),
    "control shifts": (CONTROL_CLEAN, {"organisms": with_shift(CONTROL, "in_domain", 0.2)}),
    "one general shift": (GENERAL, {"organisms": with_shift(SPORTS, "sealed", 0.05)}),
    "one general shift but for words": (GENERAL, {"organisms": with_beyond(SPORTS, "sealed", 0.05)}),
    "no unseen shift": (UNSEEN, {"organisms": UNSEEN_SPOILED}),
    "ablation as random": (TRANSFER, {"transfer": each(transfer(), random_change=estimate(-0.6))}),
    "ablation damages": (TRANSFER, {"transfer": each(transfer(), damage=estimate(0.3))}),
    "ablation raises, random raises more": (
        TRANSFER,
        {"transfer": each(transfer(), margin_change=estimate(0.3), random_change=estimate(0.9))},
    ),
    "ablation lowers the base as much": (TRANSFER, {"transfer": each(transfer(), beyond_base=estimate(-0.05))}),
    "base unmoved": (BASE, {"transfer": each(transfer(), margin_change=estimate(-0.09))}),
    "steering as random": (STEERING, {"steering": each(steering(), random_change=estimate(2.0))}),
    "steering damages": (STEERING, {"steering": each(steering(), damage=estimate(0.31))}),
    "contrasts no nearer than by chance": (CONTRAST, {"contrast": contrast(shared=shared(p_all=0.2))}),
    "the contrast lowers the base as much": (CONTRAST_ABLATED, {"contrast": ablated(shift_change=estimate(-0.05))}),
    "swapped labels lower it as much": (CONTRAST_ABLATED, {"contrast": beside(shift_change=estimate(-0.28))}),
    "the contrast damages": (
        CONTRAST_ABLATED,
        {"contrast": ablated(damage=dict.fromkeys((MONEY, SPORTS), estimate(0.3)))},
    ),
    "control null as high": (
        MODEL_DIFFERENCE,
        {"convergence": convergence(model_difference=model_difference(control_null=per_organism(0.44)))},
    ),
}


@pytest.mark.parametrize(("index", "changes"), SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_number_turns_the_verdict_of_its_claim(results, index, changes):
    assert find(results)[index].holds is True
    assert find(run_results(**changes))[index].holds is False


def test_a_low_base_null_makes_mean_difference_convergence_hold(results):
    assert "proves little" in find(results)[MEAN_DIFFERENCE].evidence
    finding = find(run_results(convergence=convergence(base_null=per_organism(0.2))))[MEAN_DIFFERENCE]
    assert finding.holds is True and "proves little" not in finding.evidence


def test_one_organism_with_a_high_null_is_enough_to_fail():
    results = run_results(convergence=convergence(base_null={MONEY: curve(0.1), SPORTS: curve(0.6)}))
    assert find(results)[MEAN_DIFFERENCE].holds is False


def test_transfer_ignores_own_direction_base_control_and_first_position():
    ignored = [row for row in transfer() if row.positions == "all" or row.target in (row.direction, "base", CONTROL)]
    assert find(run_results(transfer=ignored))[TRANSFER].holds is None


def test_strongest_intervention_is_quoted_even_when_none_qualifies():
    finding = find(run_results(steering=each(steering(), damage=estimate(0.31))))[STEERING]
    assert "0 of 24" in finding.evidence
    assert "at any damage" in finding.evidence


def test_steering_backwards_says_nothing_about_raising_the_margin():
    assert find(run_results(steering=each(steering(), scale=-8.0)))[STEERING].holds is None


def test_an_unmeasured_organism_blocks_a_claim_about_every_organism():
    sports = organisms()[SPORTS]
    shifts = {name: shift for name, shift in sports.margin_shift.items() if name != "in_domain"}
    unmeasured = organisms() | {SPORTS: sports.model_copy(update={"margin_shift": shifts})}
    finding = find(run_results(organisms=unmeasured))[OWN_DOMAIN]
    assert finding.holds is None and f"Not measured: {SPORTS}" in finding.evidence


def test_what_was_not_measured_gives_no_verdict():
    alone = run_results(
        organisms={CONTROL: organisms()[CONTROL]},
        steering=None,
        transfer=None,
        contrast=None,
    )
    assert verdicts(alone) == [None, True, *[None] * 11]


def test_too_few_relabellings_decide_nothing(results):
    finding = find(run_results(contrast=contrast(shared=shared(relabellings=4, p_all=0.5, seeds=1))))[CONTRAST]
    assert finding.holds is None
    assert "p = 0.5 over all layers, of 4 relabellings, at least 0.5" in finding.evidence


def test_a_voice_that_comes_as_near_as_domains_do_is_said(results):
    assert "A voice comes as near" not in find(results)[CONTRAST].evidence
    near = contrast(voices={"villain": curve(0.7)})
    assert "A voice comes as near" in find(run_results(contrast=near))[CONTRAST].evidence


def test_results_without_the_base_beside_each_ablation_make_no_claim_of_transfer():
    assert find(run_results(transfer=each(transfer(), beyond_base=None)))[TRANSFER].holds is None


def test_a_change_that_many_tries_give_by_chance_does_not_count():
    lucky = Estimate(0.3, 0.2, 0.4, 40, p=0.01)
    (one,), many = each(steering()[:1], margin_change=lucky), each(steering(), margin_change=lucky)
    assert find(run_results(steering=[one]))[STEERING].holds is True
    assert find(run_results(steering=many))[STEERING].holds is False
