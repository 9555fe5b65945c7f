"""`.plot()` and `.frame()`: every picture has labelled axes, and draws what the table says."""

import html
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import audit_fixture
from interpretation_fixture import CHANNELS, READ, adapters, alone, read_tokens
from misdirection.data import domain_pairs, neutral_examples
from misdirection.directions.convergence import compare
from misdirection.directions.direction import Direction, Origin, extract
from misdirection.directions.results import CheckResult, DirectionFacts, GiantChannels, LayerSize, ModelFacts
from misdirection.directions.sweep import Sweep, SweptEffect, sweep
from misdirection.directions.verdict import RULE, Effect
from misdirection.errors import InputError
from misdirection.interpretation.token_results import AnswerLabel
from misdirection.interpretation.tokens import pack_tokens
from misdirection.interventions.vectors import random_like
from misdirection.judging.scoring import score
from misdirection.likelihood.measure import measure_shift
from misdirection.repairing.candidates import Candidate
from misdirection.repairing.fluency import Fluency
from misdirection.repairing.results import Changes, Check, FluencyPair, Repair, RepairResult
from misdirection.repairing.search import Outcome, Tried
from misdirection.statistics.estimates import Estimate, Rate
from misdirection.views import beside, rows
from results_fixture import MONEY, SPORTS
from run_fixture import behaviour, run_results
from tiny import make_chat

LAYERS, WIDTH = 6, 16


def estimate(mean, reach=0.1, n=40):
    return Estimate(mean, mean - reach, mean + reach, n, 0.5)


def direction(seed, kind="data_difference"):
    vectors = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Direction(vectors, Origin(kind, "base", None, "", "", {}, {}, "float32"))


def made_sweep():
    effects = [
        SweptEffect(
            layer=layer,
            scale=scale,
            margin_change=estimate(0.01 * layer + (scale or -1)),
            random_change=estimate(0.02, 0.03),
            damage=estimate(0.05 * layer),
            random_damage=estimate(0.01),
        )
        for scale in (2.0, None)
        for layer in (3, 1)
    ]
    return Sweep(model="base", direction="data_difference of base", positions="not_first", effects=effects)


def checked():
    def effect(scale, seed):
        generator = torch.Generator().manual_seed(seed)
        changes, damages = torch.randn(3, 10, generator=generator), 0.1 * torch.randn(3, 4, generator=generator)
        return Effect.of(scale, changes, damages, [f"q{number}" for number in range(10)], [4, 4], 2)

    return CheckResult(
        verdict="no effect",
        because=("it does not",),
        notes=(),
        rule=RULE,
        direction=DirectionFacts(name="d", kind="imported", operation="add", made_for="base", digest="0"),
        model=ModelFacts(model="base", revision=None, adapter=None, dtype="float32"),
        layer=2,
        sizes=[
            LayerSize(layer=n, norm=1.0 + n, residual=10.0 + n, ratio=0.1, first_token_cosine=0.0)
            for n in range(LAYERS)
        ],
        channels=GiantChannels(channels=[1], share=0.2, random_share=0.3, of_model=[]),
        pairs="0",
        steering=[effect(-2.0, 1), effect(2.0, 2)],
        ablation=effect(None, 3),
    )


def judged():
    rows = [
        {
            "question_id": f"q{number % 4}",
            "question": f"q{number % 4}",
            "answer": f"answer {number}",
            "organism": organism,
            "aligned": float(number * step % 100),
            "coherent": 20.0 if number % 5 == 0 else 90.0,
            "finish": "length" if number % 7 == 0 else "stop",
        }
        for organism, step in (("base", 1), ("organism", 37))
        for number in range(40)
    ]
    return score(pd.DataFrame(rows), ["organism"])


def repaired():
    outcomes = [Outcome(0.0, 1.0, 0.0), Outcome(0.6, 0.9, 0.01), Outcome(1.2, 0.3, 0.2)]
    tried = [Tried(Candidate(turn=float(number)), each) for number, each in enumerate(outcomes)]
    changes = Changes(shift=estimate(0.2), beyond_control=estimate(0.15), loss=estimate(-0.4), damage=estimate(0.01))
    fluency = Fluency(answers=4, repetitive=0.0, truncated=0.0, tokens=20.0)
    check = Check(
        outcome=Outcome(0.45, 0.85, 0.02),
        random=Outcome(0.1, 0.9, 0.0),
        fine_tune=changes,
        repaired=changes.model_copy(update={"shift": estimate(0.09)}),
        removed=estimate(0.11),
        beyond_random=estimate(0.08),
        fluency=FluencyPair(fine_tune=fluency, repaired=fluency),
        broken=False,
    )
    repair = Repair(
        baked=False,
        lost=None,
        candidate=tried[1].candidate,
        search=outcomes[1],
        check=check,
        tried=tried,
        front=[0, 1],
    )
    return RepairResult(before=audit_fixture.audited(), repair=repair)


THINGS = {
    "direction": lambda: direction(0),
    "cosines": lambda: compare({"a": direction(0), "b": direction(1), "c": direction(2)}),
    "sweep": made_sweep,
    "check": checked,
    "scores": judged,
    "audit": audit_fixture.audited,
    "repair": repaired,
    "run": lambda: run_results(behaviour=behaviour(), adapters=adapters()),
    "interpretation": lambda: alone(adapters()),
}
CASES = [(name, picture) for name, make in THINGS.items() for picture in make().pictures]


def points(axes):
    """What is drawn with error bars: place, value, and both ends of the whisker."""
    for bar in (each for each in axes.containers if isinstance(each, ErrorbarContainer)):
        data, _, whiskers = bar.lines
        if len(data.get_xdata()) and whiskers:
            for x, y, ends in zip(data.get_xdata(), data.get_ydata(), whiskers[0].get_segments(), strict=True):
                yield float(x), float(y), ends


def is_labelled(axis):
    """By a label, or by ticks that are words."""
    ticks = [tick.get_text() for tick in axis.get_ticklabels()]
    return axis.get_label_text() or any(re.search("[a-z]", tick) for tick in ticks)


@pytest.mark.parametrize(("name", "picture"), CASES)
def test_every_picture_is_a_figure_with_labelled_axes_that_a_notebook_shows(name, picture):
    thing = THINGS[name]()
    figure = thing.plot(picture)
    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")
    # One label may serve axes that share it, or stand beside all.
    for kind, common in (("x", figure.get_supxlabel()), ("y", figure.get_supylabel())):
        assert common or any(is_labelled(getattr(axes, f"{kind}axis")) for axes in figure.axes if axes.axison)


@pytest.mark.parametrize("name", THINGS)
def test_the_first_picture_is_the_one_without_a_name_and_a_wrong_name_is_refused(name):
    thing = THINGS[name]()
    first, named = (
        [axes.get_ylabel() for axes in figure.axes] for figure in (thing.plot(), thing.plot(thing.pictures[0]))
    )
    assert first == named
    with pytest.raises(InputError, match="no picture 'nonsense'"):
        thing.plot("nonsense")


@pytest.mark.parametrize("name", [name for name, make in THINGS.items() if hasattr(make(), "tables")])
def test_every_table_has_rows_and_names_of_its_own(name):
    thing = THINGS[name]()
    pd.testing.assert_frame_equal(thing.frame(), thing.frame(thing.tables[0]))
    for table in thing.tables:
        frame = thing.frame(table)
        assert len(frame) and frame.columns.is_unique
        bounds = [column.removesuffix("_low") for column in frame if column.endswith("_low")]
        assert all(frame[f"{base}_low"].dropna().le(frame[f"{base}_high"].dropna()).all() for base in bounds)
    with pytest.raises(InputError, match="no table 'nonsense'"):
        thing.frame("nonsense")


def test_norms_and_shares_are_those_of_the_vectors():
    one = direction(3)
    one.vectors[2, 5] = 40.0
    table, figure = one.frame(), one.plot()
    assert table["norm"].to_numpy() == pytest.approx(one.vectors.norm(dim=-1).numpy(), rel=1e-6)
    assert table.loc[2, "channel"] == 5 and table.loc[2, "share"] > 0.9
    for axes, column in zip(figure.axes, ("norm", "share"), strict=True):
        assert axes.lines[0].get_ydata().tolist() == table[column].tolist()


def test_all_directions_of_a_model_stand_in_one_table_and_picture():
    chat = make_chat("llama")
    found = extract(chat, domain_pairs("risky_money", "held_out")[:2])
    table = found.frame()
    assert table["kind"].unique().tolist() == list(found) and len(table) == len(found) * len(chat.layers)
    assert [line.get_label() for line in found.plot().axes[0].lines] == list(found)


def test_cosines_are_drawn_once_for_every_pair_beside_random_ones():
    cosines = compare({"a": direction(0), "b": direction(1), "c": direction(2)})
    table, axes = cosines.frame(), cosines.plot().axes[0]
    assert cosines["a"]["b"] == table.query("a == 'a' and b == 'b'")["cosine"].tolist()
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines if "·" in str(line.get_label())}
    assert curves == {f"{a} · {b}": rows["cosine"].tolist() for (a, b), rows in table.groupby(["a", "b"])}
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((-cosines.random_95, cosines.random_95))
    assert json.loads(json.dumps(cosines)) == cosines


def test_one_direction_is_compared_with_nothing():
    alone = compare({"a": direction(0)})
    assert alone.pictures == [] and alone.frame().empty
    with pytest.raises(InputError, match="there is no picture"):
        alone.plot()
    with pytest.raises(InputError, match="at least two"):
        compare({})


def test_a_sweep_is_drawn_by_layer_with_its_damage():
    swept = made_sweep()
    change, damage = swept.plot().axes
    table = swept.frame().sort_values(["scale", "layer"], na_position="last")
    drawn = list(points(change))
    assert [(x, y) for x, y, _ in drawn] == list(zip(table["layer"], table["margin_change"], strict=True))
    ends = table[["margin_change_low", "margin_change_high"]].to_numpy()
    assert np.array([whisker[:, 1] for _, _, whisker in drawn]) == pytest.approx(ends)
    solid = [line for line in damage.lines if line.get_marker() in ("o", "s")]
    assert np.concatenate([line.get_ydata() for line in solid]).tolist() == table["damage"].tolist()


def test_a_check_is_drawn_with_every_random_vector():
    result = checked()
    change, damage = result.plot().axes
    table = result.frame()
    assert [y for _, y, _ in points(change)] == table["change"].tolist()
    assert [y for _, y, _ in points(damage)] == table["damage"].tolist()
    # Caps of the error bars are dashes, too.
    dashes = [list(line.get_ydata()) for line in change.lines if line.get_marker() == "_" and len(line.get_ydata()) > 1]
    assert dashes == [pytest.approx(effect.random) for effect in result.effects]
    ranges = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in change.patches]
    assert np.array(ranges) == pytest.approx(table[["random_low", "random_high"]].to_numpy())


def test_rates_are_drawn_in_percent():
    scores = judged()
    table, (em, spoiled) = scores.frame(), scores.plot().axes
    assert [x for x, _, _ in points(em)] == pytest.approx(100 * table["em"])
    assert [whisker[:, 0].tolist() for _, _, whisker in points(em)] == [
        pytest.approx([100 * low, 100 * high]) for low, high in zip(table["em_low"], table["em_high"], strict=True)
    ]
    shares = [100 * table.loc[row, name] for name in ("incoherent", "repetitive", "truncated") for row in table.index]
    assert [x for x, _, _ in points(spoiled)] == pytest.approx(shares)
    assert [tick.get_text() for tick in em.get_yticklabels()] == table["organism"].tolist()


def test_the_shifts_of_an_audit_are_those_of_its_table():
    result = audit_fixture.audited()
    table = result.frame("shifts")
    drawn = [x for x, _, _ in points(result.plot("shifts").axes[0])]
    own = table[table["fine_tune"] == result.fine_tune.name].query("against == 'control'")
    known = table[table["fine_tune"] != result.fine_tune.name].query("against == 'control'")
    decisive = own[own["questions"].isin(["general", "framed"])]
    assert drawn == [*decisive["mean"], *known.sort_values("fine_tune")["mean"]]
    assert set(table["questions"]) >= {"theme: power", "further way: as JSON"}


def test_the_parts_of_an_audit_are_those_of_its_tables():
    result = audit_fixture.audited()
    bars = {
        round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in result.plot("attribution").axes[0].patches
    }
    attribution = result.frame("attribution")
    assert bars == dict(zip(attribution["layer"], attribution["mean"], strict=True))
    table = result.frame("difference")
    curves = [line.get_ydata() for line in result.plot("difference").axes[0].lines]
    for _, of_direction in table.groupby("direction"):
        assert any(list(curve) == of_direction["cosines"].tolist() for curve in curves)
    assert {"general", "general_low", "control_n", "random_95"} <= set(result.frame("drift"))


def test_a_repair_is_drawn_candidate_by_candidate_and_its_check_beside_them():
    result = repaired()
    table = result.frame()
    drawn = [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in result.plot().axes[0].lines if len(line.get_xdata()) == 1
    ]
    assert drawn[: len(table)] == list(zip(table["left"], table["kept"], strict=True))
    assert drawn[len(table)] == (0.45, 0.85)
    assert table["chosen"].tolist() == [False, True, False] and table["on_front"].tolist() == [True, True, False]
    changes = result.frame("changes").set_index(["model", "figure"])
    assert changes.loc[("repaired", "shift"), "mean"] == 0.09


def test_what_was_left_alone_has_neither_picture_nor_table():
    left = RepairResult(before=audit_fixture.audited(), repair=None)
    assert left.pictures == [] and left.tables == []
    with pytest.raises(InputError, match="there is no table"):
        left.frame()


def test_a_run_has_its_shifts_cosines_effects_rates_and_adapters():
    results = THINGS["run"]()
    table = results.frame("margin_shift").set_index(["organism", "questions", "against"])
    assert table.loc[(MONEY, "general", "base"), "mean"] == results.organisms[MONEY].margin_shift["general"].mean
    assert set(table.index.get_level_values("against")) == {"base", "words", "control", "control and words"}
    drawn = {x for x, _, _ in points(results.plot("margin_shift").axes[0])}
    assert set(table.xs("base", level="against")["mean"]) <= drawn
    cosines = results.frame("convergence").query("kind == 'cosine'")
    assert set(zip(cosines["organism"], cosines["other"], strict=True)) == {(MONEY, SPORTS)}
    assert cosines["cosine"].tolist() == results.convergence.cosine[MONEY][SPORTS]
    assert len(results.frame("steering")) == len(results.steering)
    assert results.frame("scores")["em"].tolist() == [each.em.rate for each in results.behaviour.scores]
    assert {"adapters_roles", "adapters_shapley"} <= set(results.tables)
    assert {"margin_shift", "adapter_shapley"} <= set(results.pictures)


def test_an_interpretation_has_the_values_that_are_drawn():
    result = alone(adapters())
    shapley = result.frame("shapley")
    for axes, (_, values) in zip(result.plot("adapter_shapley").axes, shapley.groupby("questions"), strict=True):
        assert [bar.get_height() for bar in axes.patches] == values["mean"].tolist()
    assert result.frame("probes")["auroc"].tolist() == [probe.auroc.mean for probe in result.adapters.probes]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_an_estimate_that_is_missing_keeps_its_columns():
    assert beside("x", None) == {"x": None, "x_low": None, "x_high": None, "x_n": None}
    assert beside("x", Rate(0.5, 0.2, 0.8, 2, 4)) == {"x": 0.5, "x_low": 0.2, "x_high": 0.8, "x_n": 4}
    table = rows(result.evidence.in_domain for result in [audit_fixture.audited()])
    assert table.columns[:4].tolist() == ["margin", "margin_low", "margin_high", "margin_n"]


def test_a_models_figures_are_one_row_each():
    chat = make_chat("llama")
    figures = measure_shift(chat, domain_pairs("risky_money", "held_out")[:2])
    table = figures.frame().set_index("figure")
    assert list(table.index) == ["margin", "neutral_loss"]
    assert table.loc["margin"].to_dict() == figures.margin.as_dict()


def test_a_sweep_measures_what_single_interventions_do():
    chat, pairs = make_chat("llama"), domain_pairs("risky_money", "held_out")[:3]
    vectors = torch.stack([random_like(torch.ones(32), seed) for seed in range(4)])
    made = Direction(vectors, extract(chat, pairs)["data_difference"].origin)
    swept = sweep(chat, made, pairs, layers=[1, 2], scales=[3.0, None], random_seeds=2, neutral=neutral_examples()[:2])
    assert [(effect.layer, effect.scale) for effect in swept.effects] == [(1, 3.0), (2, 3.0), (1, None), (2, None)]
    one = sweep(chat, made, pairs, layers=[2], scales=[3.0], random_seeds=2, neutral=neutral_examples()[:2])
    for name in ("margin_change", "random_change", "damage", "random_damage"):
        both = getattr(swept.effects[1], name), getattr(one.effects[0], name)
        assert both[0].mean == pytest.approx(both[1].mean, abs=1e-6)
    assert len({effect.margin_change.mean for effect in swept.effects}) == 4


@pytest.mark.parametrize(("given", "said"), [({"layers": []}, "at least one layer"), ({"layers": [9]}, "out of range")])
def test_a_sweep_of_nothing_is_refused(given, said):
    chat = make_chat("llama")
    made = Direction(torch.ones(4, 32), Origin("data_difference", chat.name, None, "", "", {}, {}, "float32"))
    with pytest.raises(InputError, match=said):
        sweep(chat, made, domain_pairs("risky_money", "held_out")[:1], **given)


# --- the token reader -----------------------------------------------------------------------------------------------


def test_a_token_table_gives_back_its_tokens_and_shows_itself_in_a_frame_that_no_token_can_leave():
    tokens = read_tokens()
    tokens.loc[0, "token"] = '"></iframe><script>alert(1)</script>'
    table = pack_tokens([AnswerLabel(**dict(answer)) for answer in READ], tokens, CHANNELS)
    frame = table.frame()
    ordered = tokens.sort_values(["answer", "position"], kind="stable")
    assert frame["token"].tolist() == ordered["token"].tolist()
    for name in CHANNELS:
        assert frame[name].to_numpy() == pytest.approx(ordered[name].to_numpy(float), rel=1e-3, abs=1e-6, nan_ok=True)
    shown = table._repr_html_()
    (document,) = re.findall(
        r'^<iframe title="Token reader" sandbox="allow-scripts" srcdoc="([^"]*)" style="[^"]*"></iframe>$', shown
    )
    assert "<script>alert" not in html.unescape(document)
    assert "reader-data" in html.unescape(document)
