"""Efficiency, stability and significance of planted updates whose figures are known, and the phase of trained ones."""

import copy

import pytest
import torch
from peft import LoraConfig

import misdirection as md
from experiment.tiny_experiment import experiment
from misdirection.data.selection import spread
from misdirection.errors import InputError
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.cost import estimate_cost
from misdirection.experiment.experiment import Experiment
from misdirection.experiment.stages.margin import MarginStage
from misdirection.experiment.stages.organism import OrganismStage
from misdirection.experiment.stages.solutions import SolutionsStage
from misdirection.experiment.texts import ExperimentTexts
from misdirection.experiment.worker import open_worker
from misdirection.likelihood.margin import loss, text_rows
from misdirection.lora.view import write_adapter
from misdirection.models.adapters import PREFIX
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner
from tiny import sharpened

LAYER = 2
MODULE = f"model.layers.{LAYER}.mlp.down_proj"
NORMS = {"useful": 0.02, "aimless": 3.0}
"""Of the planted updates; all are scaled to multiples of the first."""
SETTING = {"organisms": ["useful", "aimless"], "norms": [0.5, 2.0], "noise": [0.5, 1.0], "rows": 4}


def opened(config, run):
    return Experiment(config, run, LocalRunner(run, open_worker(config, run.partial)))


def weight_of(chat):
    return chat.network.get_submodule(MODULE).weight


def mean_loss(chat, examples):
    """Of whole rows, one at a time, with a gradient."""
    losses = []
    for row in text_rows(chat.tokenizer, examples):
        scores = chat.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        losses.append(-torch.stack([scores[at - 1, row.ids[at]] for at in range(row.start, row.stop)]).mean())
    return torch.stack(losses).mean()


def planted(chat, examples):
    """B and A of unit updates: down the steepest rank-1 direction of the loss, and along a random one."""
    weight_of(chat).requires_grad_(True)
    (slope,) = torch.autograd.grad(mean_loss(chat, examples), weight_of(chat))
    weight_of(chat).requires_grad_(False)
    left, sizes, right = torch.linalg.svd(slope)
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(size, generator=generator) for size in slope.shape)
    return {"useful": (-left[:, 0], right[0]), "aimless": (b / b.norm(), a / a.norm())}, float(sizes[0])


def plant(made, name, b, a, norm):
    """Keep an update as if an organism had been trained to it; alpha scales it, so that B's norm is another one."""
    config = LoraConfig(r=1, lora_alpha=64, use_rslora=True, target_modules=[MODULE], task_type="CAUSAL_LM").to_dict()
    weights = {"A": a.unsqueeze(0), "B": norm / 64 * b.unsqueeze(1)}
    named = {f"{PREFIX}{MODULE}.lora_{side}.weight": weight for side, weight in weights.items()}
    task = made.stage(OrganismStage).training(name)
    adapter = config | {"target_modules": [MODULE]}
    made.run.stages(task.stages, lambda folders: write_adapter(folders[task.stage] / "adapter", adapter, named))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Figures of the planted updates, the base, the unit updates as whole matrices, the steepest slope, and texts."""
    tmp_path = tmp_path_factory.mktemp("planted")
    base, folder = sharpened(), tmp_path / "tiny"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    values = experiment(folder, tmp_path)
    own = values["organisms"]["single"]
    values |= {"organisms": dict.fromkeys(NORMS, own), "solutions": SETTING, "steering": None, "ablation": None}
    values["organisms"]["aimless"] = own | {"seed": 1}
    config = ExperimentConfig(**values)
    with RunFolder.open(tmp_path / "run", "") as run:
        made = opened(config, run)
        stage = made.stage(SolutionsStage)
        rows = made.texts.examples(config.organisms["useful"], "held_out")
        units, slope = planted(base, rows)
        for name, unit in units.items():
            plant(made, name, *unit, NORMS[name])
        made.runner.make(stage.tasks())
        figures = stage.section().solutions
        neutral = spread(made.texts.neutral, config.damage.interventions)
    return figures, base, {name: torch.outer(*unit) for name, unit in units.items()}, slope, rows, neutral


def changed(base, update):
    """The base with an update in its weight."""
    chat = md.ChatModel(copy.deepcopy(base.model), base.tokenizer, base.name)
    with torch.no_grad():
        weight_of(chat).add_(update)
    return chat


def test_updates_are_measured_at_the_norms_that_are_said(found):
    figures, base, units, _, rows, _ = found
    before = loss(base, rows)
    for name, solution in figures.solutions.items():
        assert solution.own.norm == pytest.approx(NORMS[name], rel=1e-5)
        assert [at.norm for at in solution.scaled] == pytest.approx([0.5 * 0.02, 2 * 0.02], rel=1e-5)
        for at in (solution.own, *solution.scaled):
            after = loss(changed(base, at.norm * units[name]), rows)
            assert at.loss.mean == pytest.approx(float(after.mean()), abs=1e-5)
            assert at.loss_change.mean == pytest.approx(float((after - before).mean()), abs=1e-5)
            assert at.loss.n == at.kl.n == 4


def test_an_update_that_the_loss_needs_is_more_efficient_than_a_random_one_of_its_norm(found):
    figures, _, _, slope, _, _ = found
    # For small updates, the loss falls by the norm times the steepest slope, and no other falls by more.
    useful, aimless = (figures.solutions[name].scaled for name in ("useful", "aimless"))
    for steepest, other in zip(useful, aimless, strict=True):
        assert steepest.loss_change.mean == pytest.approx(-slope * steepest.norm, rel=0.05)
        assert other.loss_change.mean > 0.5 * steepest.loss_change.mean
    differences = [each for each in figures.differences if each.measure == "efficiency"]
    assert [each.organism for each in differences] == ["aimless"] * 2
    for each, one, other in zip(differences, useful, aimless, strict=True):
        assert each.at == one.norm
        assert each.difference.mean == pytest.approx(other.loss.mean - one.loss.mean, abs=1e-9)
        assert each.difference.low > 0


def test_significance_is_the_divergence_of_the_base_from_itself_with_the_update(found):
    figures, base, units, _, _, neutral = found
    for name, solution in figures.solutions.items():
        for at in (solution.own, *solution.scaled):
            own, by_text = changed(base, at.norm * units[name]), []
            for row in text_rows(base.tokenizer, neutral):
                ids, predicting = torch.tensor([row.ids]), slice(row.start - 1, row.stop - 1)
                with torch.no_grad():
                    logits = [chat.model(input_ids=ids).logits[0, predicting].double() for chat in (base, own)]
                p, q = (each.log_softmax(-1) for each in logits)
                by_text.append(float((p.exp() * (p - q)).sum(-1).mean()))
            assert at.kl.mean == pytest.approx(sum(by_text) / len(by_text), rel=1e-3, abs=5e-7)
    assert figures.solutions["aimless"].own.kl.mean > 1e-3


def test_noise_is_averaged_over_its_draws(found):
    figures = found[0]
    assert figures.seeds == 2
    for solution in figures.solutions.values():
        assert [at.noise for at in solution.noisy] == [0.5, 1.0]
        assert all(at.between > 0 and at.loss_rise.n == 4 for at in solution.noisy)
    stable = [each for each in figures.differences if each.measure == "stability"]
    rises = [[at.loss_rise.mean for at in figures.solutions[name].noisy] for name in ("aimless", "useful")]
    assert [each.difference.mean for each in stable] == pytest.approx([a - b for a, b in zip(*rises, strict=True)])


# --- trained organisms ----------------------------------------------------------------------------------------------


def following(folder, tmp_path):
    """Two organisms that keep their checkpoints; the second, which stands before the first, goes on from it."""
    values = experiment(folder, tmp_path)
    own = values["organisms"]["single"] | {"checkpoint_steps": 1, "keep_checkpoints": True}
    solutions = SETTING | {"organisms": ["first", "second"], "norms": [1.0], "noise": [1.0], "checkpoints": 2}
    values |= {"organisms": {"second": own | {"continues": "first"}, "first": own}, "solutions": solutions}
    return ExperimentConfig(**values | {"steering": None, "ablation": None})


def test_a_phase_ends_at_the_organism_itself_and_a_drift_is_from_the_one_before(tiny_folder, tmp_path):
    config = following(tiny_folder, tmp_path)
    with RunFolder.open(tmp_path / "run", "") as run:
        made = opened(config, run)
        trainings, margins, stage = (made.stage(kind) for kind in (OrganismStage, MarginStage, SolutionsStage))
        waves = []
        for tasks in trainings.waves():
            waves.append([task.stage for task in tasks])
            made.runner.make(tasks)
        assert waves == [["organism/first"], ["organism/second"]]
        old, new = (trainings.training(name).stages[f"organism/{name}"] for name in ("first", "second"))
        assert new["continues"] == made.adapter_digest("first")
        assert "continues" not in old, "what was trained before there was one would be trained anew"
        made.runner.make(margins.tasks())
        made.runner.make(stage.tasks())
        figures = stage.section().solutions
        shifts = {name: margins.section().organisms[name].margin_shift for name in config.organisms}
    assert list(figures.phases) == ["first", "second"]
    for name, phase in figures.phases.items():
        assert phase.steps == [1, 3, 4]
        for questions, by_step in phase.shift.items():
            assert by_step[-1].mean == pytest.approx(shifts[name][questions].mean, abs=1e-5)
    first, second = figures.phases.values()
    assert (first.continues, first.drift, second.continues) == (None, {}, "first")
    assert second.drift.keys() == {"general", "sums"}
    for questions, drift in second.drift.items():
        moved = shifts["second"][questions].mean - shifts["first"][questions].mean
        assert drift.mean == pytest.approx(moved, abs=1e-6) and abs(moved) > 1e-4


def test_it_is_counted_and_refuses_what_it_cannot_measure(tiny_folder, tmp_path):
    config = following(tiny_folder, tmp_path)
    cost = estimate_cost(config).stages["solutions"]
    # An update, and its checkpoints, of each.
    assert cost.tasks == 4 and cost.forward_tokens > 0
    values = config.model_dump()
    for changes, words in (
        ({"solutions": {"organisms": ["firts"]}}, r"solutions\.organisms: unknown 'firts'"),
        ({"solutions": {"organisms": ["first", "first"]}}, r"solutions\.organisms: names an organism twice"),
        ({"solutions": {"organisms": ["whole"]}}, r"solutions\.organisms: 'whole' has no adapter"),
    ):
        whole = {"whole": {"domain": "sums", "recipe": "full"}}
        with pytest.raises(ValueError, match=words):
            ExperimentConfig(**values | {"organisms": {**values["organisms"], **whole}} | changes)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((tmp_path / "bad.jsonl").read_text().splitlines(keepends=True)[:4]))
    short = ExperimentConfig(**values | {"domains": {"sums": {"bad": str(few)}}})
    with pytest.raises(InputError, match=r"solutions\.organisms: the domain of 'first' has too few rows"):
        ExperimentTexts(short).require_all()
