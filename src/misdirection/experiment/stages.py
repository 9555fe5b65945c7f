"""The stages of an experiment. Each writes one artifact of the run folder and is not run again while it holds.

organism     one adapter trained
margin       every question set and the neutral text, for one model
means        activations averaged over answers, for one model and text
cell         one model under one intervention: margins and losses; cells of one model are measured together
sampled      a few answers of one model, to read
answers      answers of one model by the paper's protocol
judged       the same with a judge's scores
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.behaviour.likelihood import Dealt, sweep
from misdirection.behaviour.margin import pair_tasks, text_tasks
from misdirection.behaviour.sampling import sample
from misdirection.data import Example, ProbePair, data_hash
from misdirection.experiment.answering import Condition, answer
from misdirection.experiment.bench import BASE, Bench, spread
from misdirection.experiment.store import Run
from misdirection.files import read_json, write_json
from misdirection.interventions.hooks import Setting
from misdirection.interventions.kinds import Intervention, described
from misdirection.progress import track, track_steps
from misdirection.representation.convergence import null_groups
from misdirection.representation.directions import Direction, direction, pair_means
from misdirection.representation.extraction import Means

log = logging.getLogger("misdirection")

# Raised whenever a stage would give another result from the same inputs, so that old artifacts are made again.
VERSIONS = {"organism": 2, "margin": 1, "means": 1, "cell": 2, "sampled": 2, "answers": 1}


def organism(run: Run, bench: Bench, name: str) -> Path:
    """Train one organism; a killed training continues from its last checkpoint."""
    config = bench.config.organisms[name]
    examples, held_out = bench.examples(config, "train"), bench.examples(config, "held_out")
    recipe = config.training
    inputs = {
        **_common("organism", bench),
        "recipe": recipe.model_dump(mode="json"),
        "data": data_hash(examples),
        "held_out": data_hash(held_out),
    }

    def compute(folder: Path) -> None:
        # The trainer's libraries take seconds to import, which a run that is up to date need not wait for.
        from misdirection.organisms.training import train

        with track_steps(f"train {name}") as report:
            train(
                examples,
                folder / "adapter",
                base=bench.chat(BASE),
                recipe=recipe,
                held_out=held_out,
                checkpoints=run.partial(f"organism/{name}"),
                report=report,
            )

    adapter = run.stage(f"organism/{name}", inputs, compute) / "adapter"
    bench.adapters[name] = adapter
    return adapter


def margin(run: Run, bench: Bench, name: str) -> Path:
    """Log-probabilities of both answers of every pair, and the losses of neutral texts."""
    sets = bench.question_sets
    inputs = {
        **_common("margin", bench),
        "adapter": _adapter_digest(run, name),
        "sets": {key: data_hash(pairs) for key, pairs in sets.items()},
        "neutral": data_hash(bench.neutral),
    }

    def compute(folder: Path) -> None:
        (frame,) = _measure(bench, name, sets, bench.neutral, f"margins of {name}")
        frame.to_parquet(folder / "margins.parquet")

    return run.stage(f"margin/{name}", inputs, compute) / "margins.parquet"


def _measure(
    bench: Bench,
    name: str,
    sets: dict[str, list[ProbePair]],
    neutral: Sequence[Example],
    label: str,
    settings: Sequence[Setting | Dealt] = ((),),
) -> list[pd.DataFrame]:
    """By setting, one row per pair and per neutral text: set, id, theme, misaligned, aligned.

    The last two are mean-token log-probabilities; a neutral text has its own under `aligned` and no `misaligned`.
    """
    chat = bench.chat(name)
    pairs = [(key, pair) for key, members in sets.items() for pair in members]
    with track(label, len(settings) * (len(pairs) + len(neutral))) as advance:
        values = sweep(chat, pair_tasks(chat.tokenizer, [pair for _, pair in pairs]), settings, progress=advance)
        losses = sweep(chat, text_tasks(chat.tokenizer, neutral), settings, progress=advance)
    return [_table(pairs, neutral, *both) for both in zip(values, losses, strict=True)]


def _table(
    pairs: Sequence[tuple[str, ProbePair]], neutral: Sequence[Example], values: Tensor, losses: Tensor
) -> pd.DataFrame:
    rows = [
        {"set": key, "id": pair.id, "theme": pair.theme, "misaligned": misaligned, "aligned": aligned}
        for (key, pair), (misaligned, aligned) in zip(pairs, values.tolist(), strict=True)
    ]
    rows += [
        {"set": "neutral", "id": one.question, "theme": "", "misaligned": None, "aligned": value}
        for one, (value,) in zip(neutral, losses.tolist(), strict=True)
    ]
    return pd.DataFrame(rows)


def means(run: Run, bench: Bench, name: str, text: str, pairs: list[ProbePair]) -> Path:
    """Means over the misaligned and aligned answers to `pairs`, with the groups of the convergence references.

    `text` names the pairs in the artifact's path. The misaligned minus aligned direction is saved beside them.
    """
    inputs = {
        **_common("means", bench),
        "adapter": _adapter_digest(run, name),
        "pairs": data_hash(pairs),
    }

    def compute(folder: Path) -> None:
        chat = bench.chat(name)
        with track(f"activations of {name} on {text}", 2 * len(pairs)) as advance:
            found = pair_means(chat, pairs, null_groups(len(pairs)), progress=advance)
        save_file({key: vector.contiguous() for key, vector in found.vectors.items()}, folder / "means.safetensors")
        write_json(folder / "counts.json", {"tokens": found.tokens, "answers": found.answers})
        made = direction(chat, "data_difference", pairs, found)
        made.save(folder / "direction.safetensors")

    return run.stage(f"means/{name}/{text}", inputs, compute)


def read_means(folder: Path) -> Means:
    """The means that a stage wrote."""
    counts = read_json(folder / "counts.json")
    return Means(load_file(folder / "means.safetensors"), counts["tokens"], counts["answers"])


def read_direction(folder: Path) -> Direction:
    """The misaligned minus aligned direction that a means stage wrote."""
    return Direction.load(folder / "direction.safetensors")


@dataclass(frozen=True)
class Cell:
    """One model under one intervention.

    Attributes:
        key: names the intervention in the artifact's path.
        target: the model, `base` or an organism.
        interventions: one; or several, of which each question meets one, in turn.
        questions: how many general probe pairs are measured.
    """

    key: str
    target: str
    interventions: tuple[Intervention, ...]
    questions: int

    @property
    def stage(self) -> str:
        """The stage's name."""
        return f"cell/{self.target}/{self.key}"


def cells(run: Run, bench: Bench, together: Sequence[Cell], label: str) -> dict[str, Path]:
    """General margins and neutral losses of one model under each of some interventions, by their keys.

    Those that do not hold are measured together in one sweep; all have one target and one number of questions.
    """
    target, questions = together[0].target, together[0].questions
    pairs, neutral = spread(bench.general, questions), spread(bench.neutral, bench.config.damage.interventions)
    inputs = {one.key: _cell_inputs(run, bench, one, pairs, neutral) for one in together}
    missing = [one for one in together if not run.holds(one.stage, inputs[one.key])]
    frames: dict[str, pd.DataFrame] = {}

    def compute(one: Cell, folder: Path) -> None:
        if not frames:
            dealt = [Dealt(tuple([each] for each in cell.interventions)) for cell in missing]
            measured = _measure(bench, target, {"general": pairs}, neutral, f"{label} in {target}", dealt)
            frames.update({cell.key: frame for cell, frame in zip(missing, measured, strict=True)})
        frames[one.key].to_parquet(folder / "margins.parquet")

    return {
        one.key: run.stage(one.stage, inputs[one.key], partial(compute, one)) / "margins.parquet" for one in together
    }


def _cell_inputs(
    run: Run, bench: Bench, one: Cell, pairs: Sequence[ProbePair], neutral: Sequence[Example]
) -> dict[str, Any]:
    return {
        **_common("cell", bench),
        "adapter": _adapter_digest(run, one.target),
        "interventions": [described(each) for each in one.interventions],
        "pairs": data_hash(pairs),
        "neutral": data_hash(neutral),
    }


def sampled(run: Run, bench: Bench, name: str) -> Path:
    """A few sampled answers."""
    config = bench.config.samples
    inputs = {
        **_common("sampled", bench),
        "adapter": _adapter_digest(run, name),
        "samples": config.model_dump(mode="json"),
    }

    def compute(folder: Path) -> None:
        with track(f"answers of {name}", len(config.questions)) as advance:
            given = sample(bench.chat(name), config.questions, n=1, new_tokens=config.new_tokens, progress=advance)
        write_json(folder / "answers.json", {one.question: one.answer.strip() for one in given})

    return run.stage(f"sampled/{name}", inputs, compute) / "answers.json"


def answers(run: Run, bench: Bench, name: str, key: str, intervention: Intervention | None, label: str) -> str:
    """Answers of one model to the question sets; gives the stage's name.

    `key` names what is done to the model in the artifact's path, `label` in the table.
    """
    config = bench.config.sampling
    assert config is not None, "the caller has one"
    stage = f"answers/{name}/{key}"
    inputs = {**_common("answers", bench), "adapter": _adapter_digest(run, name)}
    condition = Condition(name, intervention, label)
    engine = None if config.engine.vllm is None else partial(bench.vllm_engine, name)
    answer(run, stage, lambda: bench.chat(name), config, inputs, condition, engine)
    return stage


def _common(stage: str, bench: Bench) -> dict[str, Any]:
    return {"version": VERSIONS[stage], "base": bench.identity}


def _adapter_digest(run: Run, name: str) -> str | None:
    return None if name == BASE else run.digest(f"organism/{name}")
