"""The stages of an experiment, as pieces. Each writes artifacts of the run folder, and none that holds is made again.

organism     one adapter trained
margin       every question set and the neutral text, for one model
means        activations averaged over answers, for one model and text
cell         one model under one intervention: margins and losses; cells of one model are measured together
sampled      a few answers of one model, to read
answers      answers of one model by the paper's protocol
judged       the same with a judge's scores
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.data import Example, ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.directions.convergence import null_groups
from misdirection.directions.direction import Direction, direction, pair_means
from misdirection.directions.extraction import Means
from misdirection.experiment.answering import Asking, Condition
from misdirection.experiment.config import SamplesConfig
from misdirection.experiment.texts import ExperimentTexts
from misdirection.files import read_json, write_json
from misdirection.interventions.hooks import Setting
from misdirection.interventions.kinds import Intervention, described
from misdirection.likelihood.margin import pair_continuations, text_continuations
from misdirection.likelihood.sweep import Alternating, sweep
from misdirection.models.loading import ChatModel
from misdirection.organisms.recipe import Recipe
from misdirection.progress import track, track_steps
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE, Worker
from misdirection.sampling.sample import sample
from misdirection.sampling.transformers_engine import TransformersEngine

# Raised whenever a stage would give another result from the same inputs, so that old artifacts are made again.
VERSIONS = {"organism": 2, "margin": 1, "means": 1, "cell": 2, "sampled": 2, "answers": 1}


LAYERS_TOGETHER = 4
"""Layers of a steering grid in one piece: more of them share one plain pass, fewer lose less when a run is killed."""

Folders = Mapping[str, Path]
"""The folder to fill for each stage."""


def organism(bench: ExperimentTexts, name: str) -> Task:
    """Train one organism; a killed training continues from its last checkpoint."""
    config = bench.config.organisms[name]
    examples, held_out = bench.examples(config, "train"), bench.examples(config, "held_out")
    inputs = {
        **_common("organism", bench),
        "recipe": config.training.model_dump(mode="json"),
        "data": data_hash(examples),
        "held_out": data_hash(held_out),
    }
    return Task({f"organism/{name}": inputs}, BASE, partial(_train, name, config.training, examples, held_out))


def _of(run: RunFolder, name: str) -> dict[str, Path]:
    """The adapter that a model is made with; the base has none."""
    return {} if name == BASE else {name: adapter(run, name)}


def adapter(run: RunFolder, name: str) -> Path:
    """The adapter folder of an organism, where it is or will be."""
    return run.artifact(f"organism/{name}") / "adapter"


def _train(
    name: str, recipe: Recipe, examples: list[Example], held_out: list[Example], place: Worker, folders: Folders
) -> None:
    # The trainer's libraries take seconds to import, which a run that is up to date need not wait for.
    from misdirection.organisms.training import train

    ((stage, folder),) = folders.items()
    with track_steps(f"train {name}") as report:
        train(
            examples,
            folder / "adapter",
            base=place.chat(BASE),
            recipe=recipe,
            held_out=held_out,
            checkpoints=place.partial(stage),
            report=report,
        )


def margin(run: RunFolder, bench: ExperimentTexts, name: str) -> Task:
    """Log-probabilities of both answers of every pair, and the losses of neutral texts."""
    sets, neutral = bench.question_sets, bench.neutral
    inputs = {
        **_common("margin", bench),
        "adapter": _adapter_digest(run, name),
        "sets": {key: data_hash(pairs) for key, pairs in sets.items()},
        "neutral": data_hash(neutral),
    }
    return Task({f"margin/{name}": inputs}, name, partial(_measure_model, name, sets, neutral), _of(run, name))


def _measure_model(
    name: str, sets: dict[str, list[ProbePair]], neutral: list[Example], place: Worker, folders: Folders
) -> None:
    (folder,) = folders.values()
    (frame,) = _measure(place.chat(name), sets, neutral, f"margins of {name}")
    frame.to_parquet(folder / "margins.parquet")


def _measure(
    chat: ChatModel,
    sets: dict[str, list[ProbePair]],
    neutral: Sequence[Example],
    label: str,
    settings: Sequence[Setting | Alternating] = ((),),
) -> list[pd.DataFrame]:
    """By setting, one row per pair and per neutral text: set, id, theme, misaligned, aligned.

    The last two are mean-token log-probabilities; a neutral text has its own under `aligned` and no `misaligned`.
    """
    pairs = [(key, pair) for key, members in sets.items() for pair in members]
    with track(label, len(settings) * (len(pairs) + len(neutral))) as advance:
        values = sweep(
            chat, pair_continuations(chat.tokenizer, [pair for _, pair in pairs]), settings, progress=advance
        )
        losses = sweep(chat, text_continuations(chat.tokenizer, neutral), settings, progress=advance)
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


def means(run: RunFolder, bench: ExperimentTexts, name: str, text: str, pairs: list[ProbePair]) -> Task:
    """Means over the misaligned and aligned answers to `pairs`, with the groups of the convergence references.

    `text` names the pairs in the artifact's path. The misaligned minus aligned direction is saved beside them.
    """
    inputs = {
        **_common("means", bench),
        "adapter": _adapter_digest(run, name),
        "pairs": data_hash(pairs),
    }
    return Task({f"means/{name}/{text}": inputs}, name, partial(_average, name, text, pairs), _of(run, name))


def _average(name: str, text: str, pairs: list[ProbePair], place: Worker, folders: Folders) -> None:
    (folder,), chat = folders.values(), place.chat(name)
    with track(f"activations of {name} on {text}", 2 * len(pairs)) as advance:
        found = pair_means(chat, pairs, null_groups(len(pairs)), progress=advance)
    save_file({key: vector.contiguous() for key, vector in found.vectors.items()}, folder / "means.safetensors")
    write_json(folder / "counts.json", {"tokens": found.tokens, "answers": found.answers})
    made = direction(chat, "data_difference", pairs, found)
    # By its name: the adapter's folder is another one wherever this is computed.
    origin = replace(made.origin, organism="" if name == BASE else name)
    replace(made, origin=origin).save(folder / "direction.safetensors")


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


def cells(run: RunFolder, bench: ExperimentTexts, together: Sequence[Cell], label: str) -> Task:
    """General margins and neutral losses of one model under each of some interventions, measured in one sweep.

    All have one target and one number of questions.
    """
    target, questions = together[0].target, together[0].questions
    pairs, neutral = spread(bench.general, questions), spread(bench.neutral, bench.config.damage.interventions)
    by_stage = {one.stage: one for one in together}
    inputs = {stage: _cell_inputs(run, bench, one, pairs, neutral) for stage, one in by_stage.items()}
    compute = partial(_measure_cells, by_stage, pairs, neutral, f"{label} in {target}")
    return Task(inputs, target, compute, _of(run, target))


def _measure_cells(
    cells: dict[str, Cell],
    pairs: list[ProbePair],
    neutral: list[Example],
    label: str,
    place: Worker,
    folders: Folders,
) -> None:
    wanted = [cells[stage] for stage in folders]
    controls = [Alternating(tuple([each] for each in cell.interventions)) for cell in wanted]
    frames = _measure(place.chat(wanted[0].target), {"general": pairs}, neutral, label, controls)
    for folder, frame in zip(folders.values(), frames, strict=True):
        frame.to_parquet(folder / "margins.parquet")


def _cell_inputs(
    run: RunFolder, bench: ExperimentTexts, one: Cell, pairs: Sequence[ProbePair], neutral: Sequence[Example]
) -> dict[str, Any]:
    return {
        **_common("cell", bench),
        "adapter": _adapter_digest(run, one.target),
        "interventions": [described(each) for each in one.interventions],
        "pairs": data_hash(pairs),
        "neutral": data_hash(neutral),
    }


def sampled(run: RunFolder, bench: ExperimentTexts, name: str) -> Task:
    """A few sampled answers."""
    config = bench.config.samples
    inputs = {
        **_common("sampled", bench),
        "adapter": _adapter_digest(run, name),
        "samples": config.model_dump(mode="json"),
    }
    return Task({f"sampled/{name}": inputs}, name, partial(_sample, name, config), _of(run, name))


def _sample(name: str, config: SamplesConfig, place: Worker, folders: Folders) -> None:
    (folder,) = folders.values()
    with track(f"answers of {name}", len(config.questions)) as advance:
        given = sample(place.chat(name), config.questions, n=1, new_tokens=config.new_tokens, progress=advance)
    write_json(folder / "answers.json", {one.question: one.answer.strip() for one in given})


def answers(
    run: RunFolder, bench: ExperimentTexts, name: str, key: str, intervention: Intervention | None, label: str
) -> Task:
    """Answers of one model to the question sets.

    `key` names what is done to the model in the artifact's path, `label` in the table.
    """
    config = bench.config.sampling
    assert config is not None, "the caller has one"
    asking = Asking.of(config, Condition(name, intervention, label))
    inputs = asking.inputs({**_common("answers", bench), "adapter": _adapter_digest(run, name)})
    # vLLM has all adapters from its start.
    needed = {one: adapter(run, one) for one in bench.config.organisms} if config.engine.vllm else _of(run, name)
    return Task({f"answers/{name}/{key}": inputs}, name, partial(_answer, asking), needed)


def _answer(asking: Asking, place: Worker, folders: Folders) -> None:
    ((stage, folder),) = folders.items()
    name = asking.condition.organism
    served = asking.config.engine.vllm is not None
    engine = place.vllm_engine(name) if served else TransformersEngine(place.chat(name))
    asking.ask(engine, place.partial(stage), folder)


def _common(stage: str, bench: ExperimentTexts) -> dict[str, Any]:
    return {"version": VERSIONS[stage], "base": bench.identity}


def _adapter_digest(run: RunFolder, name: str) -> str | None:
    return None if name == BASE else run.digest(f"organism/{name}")
