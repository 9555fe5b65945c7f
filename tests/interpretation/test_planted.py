"""The planted organism: Shapley values, scaling, probes and roles all recover what was planted."""

import numpy as np
import pytest
from planted import DOMAIN, NEUTRAL, PLAN, planted_organism, planted_pairs

from misdirection.interpretation.probes import fit_probe
from misdirection.interpretation.roles import roles
from misdirection.interpretation.scalars import scalars, wide
from misdirection.interpretation.scaling import scaling_effects, scaling_settings
from misdirection.interpretation.shapley import shapley
from misdirection.interpretation.texts import GENERAL, labelled
from misdirection.likelihood.margin import text_rows

FEATURES = {f"layer_{layer}": layer for layer in PLAN}
PENALTY = 0.03
"""C of the probes: their L1 penalty weighs the more the fewer tokens there are, and here are few."""


def planned(role):
    return {layer for layer, name in PLAN.items() if name == role}


@pytest.fixture(scope="module")
def organism():
    return planted_organism()


@pytest.fixture(scope="module")
def values(organism):
    """Exact Shapley values by domain."""
    pairs = planted_pairs(6, words=3)
    return {name: shapley(organism, pairs[name], PLAN, budget=8192) for name in (GENERAL, DOMAIN)}


@pytest.fixture(scope="module")
def probes(organism):
    answers = labelled(planted_pairs(12))
    table = wide(scalars(organism, text_rows(organism.tokenizer, answers)))
    number = table.index.get_level_values("answer").to_numpy()
    misaligned = np.array([answers[one].alignment == "misaligned" for one in number])
    marked = np.array([answers[one].domain == DOMAIN for one in number])
    questions = np.array([answers[one].question_id for one in number])
    features = table[list(FEATURES)]
    return [
        fit_probe(
            features, misaligned, number, questions, name="alignment", classes=("misaligned", "aligned"), C=PENALTY
        ),
        fit_probe(
            features[misaligned],
            marked[misaligned],
            number[misaligned],
            questions[misaligned],
            name="domain",
            classes=(DOMAIN, GENERAL),
            C=PENALTY,
        ),
    ]


def test_shapley_values_recover_the_plan(values):
    general, domain = (values[name].estimates for name in (GENERAL, DOMAIN))
    for layer in planned("general"):
        assert general[layer].low > 0.05 and domain[layer].low > 0.03
    for layer in planned("domain"):
        assert abs(general[layer].mean) < 0.002 and domain[layer].low > 0.03
    for layer in planned("neither"):
        assert abs(general[layer].mean) < 0.005 and abs(domain[layer].mean) < 0.005


def test_sampled_values_recover_it_too(organism):
    found = shapley(organism, planted_pairs(6, words=3)[GENERAL], PLAN, permutations=2).estimates
    assert {layer for layer, estimate in found.items() if estimate.low > 0.03} == planned("general")


def test_roles_recover_the_plan_from_shapley_values(values):
    found = roles(FEATURES, values[GENERAL].estimates, values[DOMAIN].estimates, [])
    assert {one.layer: one.role for one in found} == PLAN


def test_roles_recover_the_plan_from_probes(probes):
    found = roles(FEATURES, {}, {}, probes)
    assert {one.layer: one.role for one in found} == PLAN


def test_probes_tell_the_planted_classes_apart(probes):
    alignment, domain = probes
    assert alignment.auroc.low > 0.8 and alignment.null_auroc.low < 0.6
    # A marked answer has markers on some of its tokens, and on the others nothing tells its domain.
    assert domain.auroc.low > 0.7 and domain.auroc.high < 0.9


def test_groups_do_what_their_roles_say(organism):
    groups = {role: sorted(planned(role)) for role in ("general", "domain", "neither")}
    names = [f"{name} {what}" for name in groups for what in ("off", "only")]
    settings = {name: one for name, one in scaling_settings(PLAN, groups).items() if name in [*names, "all off"]}
    effects = scaling_effects(organism, planted_pairs(6, words=3), NEUTRAL, settings)
    change = {name: {of: one.mean for of, one in effect.margin.items()} for name, effect in effects.items()}
    whole = change["all off"]
    assert max(whole.values()) < -0.3
    assert change["general off"][GENERAL] == pytest.approx(whole[GENERAL], abs=0.02)
    assert change["general only"][GENERAL] == pytest.approx(0, abs=0.02)
    assert change["domain off"][GENERAL] == pytest.approx(0, abs=0.005) and change["domain off"][DOMAIN] < -0.1
    assert change["domain only"][GENERAL] == pytest.approx(whole[GENERAL], abs=0.02)
    assert change["domain only"][DOMAIN] > whole[DOMAIN] + 0.1
    assert max(map(abs, change["neither off"].values())) < 0.02
