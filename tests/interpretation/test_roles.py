"""Roles of adapters: the stated rules, each on figures made to meet or to miss it."""

from pathlib import Path

import pytest

from misdirection.errors import MisdirectionError
from misdirection.interpretation.figures import Coefficient, Evidence, Probe
from misdirection.interpretation.published import published_probes, read_published
from misdirection.interpretation.roles import roles
from misdirection.statistics.estimates import Estimate

PAPER = Path(__file__).resolve().parents[2].parent / "shared" / "paper"
FEATURES = {"layer_1": 1, "layer_2": 2, "layer_3": 3, "layer_4": 4}


def values(**means):
    """Estimates by layer, from `layer_1=(mean, low)`."""
    return {int(name[6:]): Estimate(mean, low, 2 * mean - low, 12) for name, (mean, low) in means.items()}


def probe(name, split="question", features="scalars", pooling="token", **coefficients):
    spread = {"mean": 0.7, "low": 0.6, "high": 0.8, "n": 3.0}
    counts = {"splits": 3, "answers": 20, "questions": 10, "tokens": 400}
    return Probe(
        name=name,
        classes=("one", "other"),
        split=split,
        pooling=pooling,
        features=features,
        C=0.01,
        **counts,
        accuracy=spread,
        auroc=spread,
        null_auroc=spread,
        baseline=0.5,
        coefficients={feature: list(three) for feature, three in coefficients.items()},
    )


NOTHING = (0.0, 0.0, 0.0)
ALIGNMENT = probe(
    "alignment, all answers",
    layer_1=(-1.0, -0.8, -0.9),
    layer_2=(0.1, 0.2, 0.1),
    layer_3=(0.1, -0.1, 0.1),
    layer_4=NOTHING,
)
DOMAIN = probe(
    "domain, misaligned answers", layer_1=(0.2, 0.2, 0.1), layer_2=(-1, -2, -1), layer_3=(1, 1, 2), layer_4=NOTHING
)
GENERAL_VALUES = values(layer_1=(0.4, 0.3), layer_2=(0.2, -0.01), layer_3=(0.003, 0.001), layer_4=(-0.2, -0.3))
DOMAIN_VALUES = values(layer_1=(0.4, 0.3), layer_2=(0.4, 0.1), layer_3=(0.3, 0.2), layer_4=(0.3, -0.1))


def names(found):
    return {one.layer: one.role for one in found}


# --- Shapley values -------------------------------------------------------------------------------------------------


def test_values_decide_and_a_value_must_be_above_zero_and_count():
    found = roles(FEATURES, GENERAL_VALUES, DOMAIN_VALUES, [])
    assert names(found) == {1: "general", 2: "domain", 3: "domain", 4: "neither"}
    assert "for the general margin is above 0" in found[0].rule
    assert "for the in-domain margin is above 0" in found[1].rule
    assert "none of its Shapley values" in found[3].rule


def test_coefficients_stand_beside_values_but_do_not_decide():
    against = probe("alignment", layer_1=NOTHING, layer_2=NOTHING, layer_3=NOTHING, layer_4=(5, 5, 5))
    with_probes = roles(FEATURES, GENERAL_VALUES, DOMAIN_VALUES, [against, DOMAIN])
    assert names(with_probes) == names(roles(FEATURES, GENERAL_VALUES, DOMAIN_VALUES, []))
    coefficients = {
        "alignment": Coefficient(feature="layer_4", split="question", mean=5, low=5, high=5),
        DOMAIN.name: Coefficient(feature="layer_4", split="question", mean=0, low=0, high=0),
    }
    evidence = Evidence(general=GENERAL_VALUES[4], domain=DOMAIN_VALUES[4], coefficients=coefficients)
    assert with_probes[3].evidence == evidence


def test_without_domain_questions_there_is_no_domain_role():
    assert names(roles(FEATURES, GENERAL_VALUES, {}, [])) == {1: "general", 2: "neither", 3: "neither", 4: "neither"}


def test_a_control_that_lowers_the_margin_has_no_general_layer():
    lowered = values(layer_1=(-0.4, -0.5), layer_2=(-0.2, -0.3), layer_3=(-0.1, -0.2), layer_4=(0.001, 0.0005))
    assert set(names(roles(FEATURES, lowered, {}, [])).values()) == {"neither"}


# --- coefficients ---------------------------------------------------------------------------------------------------


def test_without_values_coefficients_decide_and_the_rule_says_what_they_are_worth():
    found = roles(FEATURES, {}, {}, [ALIGNMENT, DOMAIN])
    assert names(found) == {1: "general", 2: "domain", 3: "domain", 4: "neither"}
    assert all("a coefficient does not prove what an adapter does" in one.rule for one in found)
    assert all("over splits by question" in one.rule for one in found)


def test_a_leading_layer_must_keep_its_sign():
    wavering = probe("domain", layer_1=NOTHING, layer_2=(-1, 2, 2), layer_3=NOTHING, layer_4=NOTHING)
    assert names(roles(FEATURES, {}, {}, [ALIGNMENT, wavering]))[2] == "general"


@pytest.mark.parametrize("second", [0.41, 1.0])
def test_nothing_leads_where_no_coefficient_stands_out(second):
    even = probe("domain", layer_1=(second,) * 3, layer_2=(1, 1, 1), layer_3=(second,) * 3, layer_4=(second,) * 3)
    assert names(roles(FEATURES, {}, {}, [even]))[2] == "neither"


def test_one_coefficient_of_two_and_a_half_times_the_others_leads():
    one = probe("domain", layer_1=(-0.39,) * 3, layer_2=(1, 1, 1), layer_3=(0.39,) * 3, layer_4=(0.2,) * 3)
    assert names(roles(FEATURES, {}, {}, [one])) == {1: "neither", 2: "domain", 3: "neither", 4: "neither"}


def test_more_than_half_of_the_layers_cannot_lead():
    most = probe("domain", layer_1=(1, 1, 1), layer_2=(1, 1, 1), layer_3=(1, 1, 1), layer_4=NOTHING)
    assert set(names(roles(FEATURES, {}, {}, [most])).values()) == {"neither"}


def test_probes_by_question_come_first_and_other_kinds_do_not_count():
    reversed_order = {"layer_1": NOTHING, "layer_2": NOTHING, "layer_3": NOTHING, "layer_4": (1, 1, 1)}
    others = [
        probe("alignment", features="residual"),
        probe("alignment", pooling="max", **reversed_order),
        probe("theme", **reversed_order),
        probe("alignment", split="answer", **reversed_order),
    ]
    assert names(roles(FEATURES, {}, {}, [*others, ALIGNMENT]))[4] == "neither"
    by_answer = roles(FEATURES, {}, {}, others)
    assert names(by_answer) == {1: "neither", 2: "neither", 3: "neither", 4: "general"}
    assert "over splits by answer" in by_answer[0].rule


def test_of_several_features_in_a_layer_the_largest_counts():
    features = {"layer_1.o_proj": 1, "layer_1.down_proj": 1, "layer_2.down_proj": 2}
    one = probe("alignment", **{"layer_1.o_proj": (0.1,), "layer_1.down_proj": (-3.0,), "layer_2.down_proj": (0.0,)})
    first, second = roles(features, {}, {}, [one])
    assert (first.role, second.role) == ("general", "neither")
    assert first.evidence.coefficients["alignment"].feature == "layer_1.down_proj"


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("general", "domain", "probes", "message"),
    [
        ({}, {}, [], "neither Shapley values nor a probe"),
        ({}, {}, [probe("theme", layer_1=NOTHING)], "neither Shapley values nor a probe"),
        (values(layer_1=(1, 1)), {}, [], "no Shapley value of layer 2 for the general margin"),
        (GENERAL_VALUES, values(layer_1=(1, 1)), [], "no Shapley value of layer 2 for the domain margin"),
        ({}, {}, [probe("domain", layer_1=NOTHING)], "probe 'domain': has no coefficient of 'layer_2'"),
    ],
)
def test_missing_figures_are_refused(general, domain, probes, message):
    with pytest.raises(MisdirectionError, match=message):
        roles(FEATURES, general, domain, probes)


def test_what_was_not_measured_is_no_evidence():
    first = roles(FEATURES, GENERAL_VALUES, {}, [])[0]
    assert first.evidence == Evidence(general=GENERAL_VALUES[1], domain=None, coefficients={})


# --- the paper's scalars --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PAPER.is_dir(), reason="the published data is not here")
def test_layers_21_and_23_are_the_domain_layers_of_the_published_scalars():
    data = read_published(PAPER / "lora_scalars.parquet", PAPER / "lora_scalar_responses.parquet")
    probes = published_probes(data, splits=8, poolings=["token"])
    for split in ("question", "answer"):
        found = names(roles(data.layers_of, {}, {}, [one for one in probes if one.split == split]))
        assert {layer for layer, role in found.items() if role == "domain"} == {21, 23}
        assert found[27] == found[29] == found[15] == "general" and found[16] == found[28] == "neither"
