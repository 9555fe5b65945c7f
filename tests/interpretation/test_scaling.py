"""Settings of adapters and their effects, against models whose `lora_B` weights are multiplied by hand."""

import pytest
from scaled_models import NEUTRAL, PAIRS, TARGETS, adapted, multiplied

from misdirection.errors import MisdirectionError
from misdirection.interpretation.scaling import scaling_effects, scaling_settings
from misdirection.likelihood.margin import loss, margin
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap
from tiny import LAYERS


def test_every_layer_and_group_has_its_settings():
    assert scaling_settings([5, 3, 9], {"pair": (9, 3), "none": ()}) == {
        "all off": {3: 0.0, 5: 0.0, 9: 0.0},
        "layer 3 off": {3: 0.0},
        "layer 3 negated": {3: -1.0},
        "layer 3 doubled": {3: 2.0},
        "layer 3 only": {5: 0.0, 9: 0.0},
        "layer 5 off": {5: 0.0},
        "layer 5 negated": {5: -1.0},
        "layer 5 doubled": {5: 2.0},
        "layer 5 only": {3: 0.0, 9: 0.0},
        "layer 9 off": {9: 0.0},
        "layer 9 negated": {9: -1.0},
        "layer 9 doubled": {9: 2.0},
        "layer 9 only": {3: 0.0, 5: 0.0},
        "pair off": {3: 0.0, 9: 0.0},
        "pair only": {5: 0.0},
    }


def test_the_only_layer_alone_is_no_setting():
    assert list(scaling_settings([7])) == ["all off", "layer 7 off", "layer 7 negated", "layer 7 doubled"]


@pytest.mark.parametrize(
    ("layers", "groups", "message"),
    [
        ([], {}, "no layer with an adapter"),
        ([1, 2], {"few": [2, 3]}, "group 'few': layer 3 has no adapter: choose from 1, 2"),
        ([1, 2], {"layer 1": [2]}, "'layer 1 off' is there already"),
        ([1, 2], {"all": [2]}, "'all off' is there already"),
    ],
)
def test_impossible_settings_are_refused(layers, groups, message):
    with pytest.raises(MisdirectionError, match=message):
        scaling_settings(layers, groups)


# --- scaling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TARGETS)
def test_effects_equal_weights_multiplied_by_hand(architecture):
    layers, chat = (1, 3), adapted(architecture, (1, 3))
    settings = {"off": {1: 0.0}, "negated": {3: -1.0}, "mixed": {1: 30.0, 3: -20.0}}
    found = scaling_effects(chat, {"all": PAIRS, "last": PAIRS[1:]}, NEUTRAL, settings)
    assert list(found) == list(settings)
    for name, factors in settings.items():
        other = multiplied(architecture, layers, factors)
        change = margin(other, PAIRS) - margin(chat, PAIRS)
        assert found[name].factors == factors
        assert found[name].margin["all"].mean == pytest.approx(float(change.mean()), abs=1e-4)
        assert found[name].margin["last"].mean == pytest.approx(float(change[1:].mean()), abs=1e-4)
        assert (found[name].margin["all"].n, found[name].margin["last"].n) == (3, 2)
        damage = loss(other, NEUTRAL) - loss(chat, NEUTRAL)
        assert found[name].damage.mean == pytest.approx(float(damage.mean()), abs=1e-4)
        assert found[name].damage.n == 2 and change.abs().max() > 1e-3


def test_all_off_is_the_base_model():
    chat = adapted()
    off = scaling_effects(chat, {"all": PAIRS}, NEUTRAL, {"all off": dict.fromkeys(range(LAYERS), 0.0)})["all off"]
    own, own_loss = margin(chat, PAIRS), loss(chat, NEUTRAL)
    with chat.as_base():
        expected = bootstrap(margin(chat, PAIRS) - own), bootstrap(loss(chat, NEUTRAL) - own_loss)
    for found, right in zip((off.margin["all"], off.damage), expected, strict=True):
        assert found.as_dict() == pytest.approx(right.as_dict(), abs=1e-5)


def test_a_factor_of_one_is_as_if_it_were_not_named():
    found = scaling_effects(
        adapted(), {"all": PAIRS}, NEUTRAL, {"one": {0: 1.0}, "zero": {3: 0.0}, "both": {0: 1.0, 3: 0.0}}
    )
    assert found["one"].margin["all"] == Estimate(0.0, 0.0, 0.0, 3, p=1.0)
    assert found["both"].margin == found["zero"].margin and found["zero"].margin["all"].mean != 0


def test_a_layer_without_an_adapter_is_refused():
    with pytest.raises(MisdirectionError, match="layer 2 has no LoRA adapter"):
        scaling_effects(adapted(layers=(1, 3)), {"all": PAIRS}, NEUTRAL, scaling_settings([2, 3]))
