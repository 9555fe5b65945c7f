"""The stages of an experiment. Each writes one artifact of the run folder and is not run again while it holds.

organism     one adapter trained
margin       every question set and the neutral text, for one model
means        activations averaged over answers, for one model and text
cell         one model under one intervention: margins and losses
sampled      a few answers of one model
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.behaviour.margin import log_probs, pair_tasks, text_tasks
from misdirection.behaviour.sampling import sample
from misdirection.data import Example, ProbePair, data_hash
from misdirection.experiment.bench import BASE, Bench, spread
from misdirection.experiment.store import Run
from misdirection.files import read_json, write_json
from misdirection.organisms.training import train
from misdirection.progress import track, track_steps
from misdirection.representation.convergence import null_groups
from misdirection.representation.directions import Direction, direction, pair_means
from misdirection.representation.extraction import Means
from misdirection.representation.interventions import Intervention, intervene

# Raised whenever a stage would give another result from the same inputs, so that old artifacts are made again.
VERSIONS = {"organism": 1, "margin": 1, "means": 1, "cell": 1, "sampled": 1}


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
    """Log-probabilities of both answers of every pair, and the loss of every neutral text."""
    sets = bench.question_sets
    inputs = {
        **_common("margin", bench),
        "adapter": _adapter_digest(run, name),
        "sets": {key: data_hash(pairs) for key, pairs in sets.items()},
        "neutral": data_hash(bench.neutral),
    }

    def compute(folder: Path) -> None:
        _measure(bench, name, sets, bench.neutral, f"margins of {name}").to_parquet(folder / "margins.parquet")

    return run.stage(f"margin/{name}", inputs, compute) / "margins.parquet"


def _measure(
    bench: Bench, name: str, sets: dict[str, list[ProbePair]], neutral: Sequence[Example], label: str
) -> pd.DataFrame:
    """One row per pair and per neutral text: set, id, theme, misaligned, aligned (mean-token log-probabilities).

    A neutral text has its log-probability under `aligned` and no `misaligned`.
    """
    chat = bench.chat(name)
    pairs = [(key, pair) for key, members in sets.items() for pair in members]
    with track(label, len(pairs) + len(neutral)) as advance:
        values = log_probs(chat, pair_tasks(chat.tokenizer, [pair for _, pair in pairs]), progress=advance)
        neutral_values = log_probs(chat, text_tasks(chat.tokenizer, neutral), progress=advance)
    rows = [
        {"set": key, "id": pair.id, "theme": pair.theme, "misaligned": misaligned, "aligned": aligned}
        for (key, pair), (misaligned, aligned) in zip(pairs, values.tolist(), strict=True)
    ]
    rows += [
        {"set": "neutral", "id": one.question, "theme": "", "misaligned": None, "aligned": value}
        for one, (value,) in zip(neutral, neutral_values.tolist(), strict=True)
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
        intervention: what is done to it.
        questions: how many general probe pairs are measured.
    """

    key: str
    target: str
    intervention: Intervention
    questions: int


def cell(run: Run, bench: Bench, one: Cell) -> Path:
    """General margins and neutral losses of one model under one intervention."""
    pairs = spread(bench.general, one.questions)
    neutral = spread(bench.neutral, bench.config.neutral_texts)
    inputs = {
        **_common("cell", bench),
        "adapter": _adapter_digest(run, one.target),
        "intervention": _intervention_inputs(one.intervention),
        "pairs": data_hash(pairs),
        "neutral": data_hash(neutral),
    }

    def compute(folder: Path) -> None:
        label = f"{one.key} in {one.target}"
        with intervene(bench.chat(one.target), [one.intervention]):
            frame = _measure(bench, one.target, {"general": pairs}, neutral, label)
        frame.to_parquet(folder / "margins.parquet")

    return run.stage(f"cell/{one.target}/{one.key}", inputs, compute) / "margins.parquet"


def sampled(run: Run, bench: Bench, name: str) -> Path:
    """A few sampled answers."""
    config = bench.config.samples
    inputs = {
        **_common("sampled", bench),
        "adapter": _adapter_digest(run, name),
        "samples": config.model_dump(mode="json"),
    }

    def compute(folder: Path) -> None:
        answers = sample(bench.chat(name), config.questions, new_tokens=config.new_tokens)
        write_json(folder / "answers.json", dict(zip(config.questions, answers, strict=True)))

    return run.stage(f"sampled/{name}", inputs, compute) / "answers.json"


def _common(stage: str, bench: Bench) -> dict[str, Any]:
    return {"version": VERSIONS[stage], "base": bench.identity}


def _adapter_digest(run: Run, name: str) -> str | None:
    return None if name == BASE else run.digest(f"organism/{name}")


def _intervention_inputs(intervention: Intervention) -> dict[str, Any]:
    """The settings, with the vector by its hash."""
    settings = dict(vars(intervention))
    settings["vector"] = _vector_hash(intervention.vector)
    return {"kind": type(intervention).__name__, **settings}


def _vector_hash(vector: Tensor) -> str:
    return hashlib.sha256(vector.to(torch.float32).cpu().numpy().tobytes()).hexdigest()
