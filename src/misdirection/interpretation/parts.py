"""The parts of reading an organism's adapters: what each computes, and how its artifact is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.data import ProbePair, data_hash
from misdirection.directions.convergence import random_cosine_95
from misdirection.interpretation import geometry
from misdirection.interpretation.answer_probes import answer_probes
from misdirection.interpretation.dynamics import growth, margins_by_step
from misdirection.interpretation.figures import (
    BySet,
    Downstream,
    Dynamics,
    ImportanceFigures,
    JudgedStep,
    LayerImportance,
    Lens,
    Patching,
    Probe,
    ScalingEffect,
    Shape,
    ShapleyFigures,
    WrittenGeometry,
)
from misdirection.interpretation.importance import agreement, token_importance, zeroing
from misdirection.interpretation.patching import patched_margins
from misdirection.interpretation.reading import IN_DOMAIN, JsonPart, Part, hash_of_weights
from misdirection.interpretation.scalars import token_scalars, wide
from misdirection.interpretation.scaling import Factors, scaling_effects
from misdirection.interpretation.shapley import shapley, subset_count
from misdirection.interpretation.texts import GENERAL
from misdirection.interventions.vectors import digest
from misdirection.likelihood.margin import text_rows
from misdirection.lora.view import LoraView
from misdirection.models.chat import encode_prompt
from misdirection.models.chat_model import ChatModel
from misdirection.progress import track
from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE, Worker
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap

MOST_SHOWN = 64
"""So many components at most are looked at singly: a table of thousands has no reader."""


@dataclass(frozen=True)
class AnswerScalars:
    """Scalars of the answers' tokens, as `scalars.wide` gives them, and activations of the same, [tokens, width]."""

    tokens: pd.DataFrame
    residual: Tensor


class ScalarsPart(Part[AnswerScalars]):
    """The table of scalars, and the residual stream after the last adapted layer."""

    NAME = "scalars"

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"answers": data_hash(self.reading.answers), "components": self.reading.settings.components}

    def compute(self, worker: Worker, folders: Mapping[str, Path]) -> None:
        (folder,), chat, reading = folders.values(), worker.chat(self.reading.organism), self.reading
        rows = text_rows(chat.tokenizer, reading.answers)
        last, top = reading.layers[-1], reading.settings.components
        with track(f"scalars of {reading.organism}", len(rows)) as advance:
            scalars = token_scalars(chat, rows, residual=last, top=top, progress=advance)
        scalars.table.to_parquet(folder / "scalars.parquet", index=False)
        assert scalars.residual is not None, "it was asked for"
        save_file({"residual": scalars.residual.contiguous()}, folder / "residual.safetensors")

    def read(self, folder: Path) -> AnswerScalars:
        residual = load_file(folder / "residual.safetensors")["residual"]
        return AnswerScalars(wide(pd.read_parquet(folder / "scalars.parquet")), residual)


@dataclass(frozen=True)
class ProbesPart(JsonPart[tuple[Probe, ...]]):
    """Probes on the scalars and on the residual stream; it needs no model.

    Attributes:
        digest: of the scalars' artifact.
        scalars: what is in it.
    """

    NAME = "probes"
    TYPE = tuple[Probe, ...]

    digest: str
    scalars: AnswerScalars

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"scalars": self.digest, "splits": self.reading.settings.splits}

    @property
    def task(self) -> Task:
        return replace(super().task, adapters={})

    def measure(self, worker: Worker) -> tuple[Probe, ...]:
        tokens, splits = self.scalars.tokens, self.reading.settings.splits
        activations = pd.DataFrame(self.scalars.residual.numpy(), index=tokens.index)
        return tuple(answer_probes(self.reading.answers, tokens, activations, splits=splits))


@dataclass(frozen=True)
class ImportanceTables:
    """Importance of answers' tokens, attributions to adapters, and effects of zeroing each layer's."""

    tokens: pd.DataFrame
    attributions: pd.DataFrame
    zeroing: pd.DataFrame

    def figures(self, questions: Sequence[str]) -> ImportanceFigures:
        """The means over answers, with intervals over questions; `questions` holds each answer's."""

        def over_questions(by_answer: "pd.Series[float]") -> Estimate:
            """The two answers to one question count together."""
            return bootstrap(by_answer.groupby([questions[number] for number in by_answer.index]).mean())

        def of_layer(layer: int) -> LayerImportance:
            attributions = self.attributions.query("layer == @layer")
            effects = self.zeroing.query("layer == @layer").set_index("answer")
            return LayerImportance(
                attribution=over_questions(attributions.groupby("answer")["attribution"].sum()),
                zeroing=over_questions(effects["effect"]),
            )

        return ImportanceFigures(
            kl=over_questions(self.tokens.groupby("answer")["kl"].mean()),
            by_layer={layer: of_layer(layer) for layer in self.zeroing["layer"].unique().tolist()},
            agreement=agreement(self.attributions, self.zeroing, questions),
        )


class ImportancePart(Part[ImportanceTables]):
    """Change of answers by the adapters: by token, by its attribution to them, and with each layer's zeroed."""

    NAME = "importance"

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"answers": data_hash(self.reading.important_answers)}

    def compute(self, worker: Worker, folders: Mapping[str, Path]) -> None:
        (folder,), chat = folders.values(), worker.chat(self.reading.organism)
        rows = text_rows(chat.tokenizer, self.reading.important_answers)
        with track(f"importance in {self.reading.organism}", 2 * len(rows)) as advance:
            importance = token_importance(chat, rows, progress=advance)
            effects = zeroing(chat, rows, progress=advance)
        importance.tokens.to_parquet(folder / "tokens.parquet")
        importance.attributions.to_parquet(folder / "attributions.parquet")
        effects.to_parquet(folder / "zeroing.parquet")

    def read(self, folder: Path) -> ImportanceTables:
        names = ("tokens", "attributions", "zeroing")
        return ImportanceTables(*(pd.read_parquet(folder / f"{name}.parquet") for name in names))


class ShapleyPart(JsonPart[ShapleyFigures]):
    """Shapley values of each layer's adapters."""

    NAME = "shapley"
    TYPE = ShapleyFigures

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"pairs": _hashes(self.reading.causal_pairs), "permutations": self.reading.settings.permutations}

    def measure(self, worker: Worker) -> ShapleyFigures:
        chat, sets, layers = worker.chat(self.reading.organism), self.reading.causal_pairs, self.reading.layers
        orders = self.reading.settings.permutations
        total = subset_count(len(layers), orders) * sum(len(pairs) for pairs in sets.values())
        with track(f"Shapley values in {self.reading.organism}", total) as advance:
            of_set = {
                name: shapley(chat, pairs, layers, permutations=orders, progress=advance)
                for name, pairs in sets.items()
            }
        return ShapleyFigures(
            method=f"exact, {2 ** len(layers)} subsets" if orders is None else f"sampled, {orders} orders each",
            values={name: values.estimates for name, values in of_set.items()},
            empty={name: bootstrap(values.empty) for name, values in of_set.items()},
            full={name: bootstrap(values.full) for name, values in of_set.items()},
        )


@dataclass(frozen=True)
class ScalingPart(JsonPart[tuple[ScalingEffect, ...]]):
    """Margins and damage under settings of the adapters, which depend on their roles."""

    NAME = "scaling"
    TYPE = tuple[ScalingEffect, ...]

    factors: Mapping[str, Factors]

    @property
    def inputs(self) -> Mapping[str, Any]:
        texts = {"pairs": _hashes(self.reading.causal_pairs), "neutral": data_hash(self.reading.causal_neutral)}
        return {**texts, "settings": list(self.factors.items())}

    def measure(self, worker: Worker) -> tuple[ScalingEffect, ...]:
        chat, sets = worker.chat(self.reading.organism), self.reading.causal_pairs
        neutral = self.reading.causal_neutral
        texts = sum(len(pairs) for pairs in sets.values()) + len(neutral)
        with track(f"scaled adapters of {self.reading.organism}", (1 + len(self.factors)) * texts) as advance:
            effects = scaling_effects(chat, sets, neutral, self.factors, progress=advance)
        return tuple(effects.values())


class GeometryPart(JsonPart[WrittenGeometry]):
    """Where adapters write, and what becomes of it downstream."""

    NAME = "geometry"
    TYPE = WrittenGeometry

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {
            "pairs": data_hash(self.reading.causal_pairs[GENERAL]),
            "directions": {name: digest(direction.vectors) for name, direction in self.reading.directions.items()},
            "components": self.reading.settings.components,
        }

    def measure(self, worker: Worker) -> WrittenGeometry:
        reading, chat = self.reading, worker.chat(self.reading.organism)
        lora = LoraView.open(worker.adapters[reading.organism])
        vectors, layers = geometry.writes(lora.modules, chat.width, reading.settings.components), lora.layers
        return WrittenGeometry(
            shape=Shape(layers=len(chat.layers), width=chat.width),
            random_cosine=geometry.random_cosine(chat.width),
            random_cosine_95=random_cosine_95(chat.width),
            skipped=tuple(geometry.skipped(lora.modules, chat.width)),
            cosines=geometry.write_cosines(vectors, reading.directions),
            logit_lens=self._lenses(chat, vectors, layers[-1]),
            downstream=self._downstream(chat, len(layers)),
        )

    def _lenses(self, chat: ChatModel, vectors: Mapping[str, Tensor], last: int) -> dict[str, Lens]:
        """Of what each component writes, and of each direction after the last adapted layer."""
        named = dict(list(vectors.items())[:MOST_SHOWN])
        directions = self.reading.directions
        named |= {f"direction of {name}, layer {last}": direction[last] for name, direction in directions.items()}
        return {name: geometry.logit_lens(chat, vector) for name, vector in named.items()}

    def _downstream(self, chat: ChatModel, layers: int) -> Downstream | None:
        if not self.reading.directions:
            return None
        (name, direction), pairs = next(iter(self.reading.directions.items())), self.reading.causal_pairs[GENERAL]
        with track(f"effects downstream in {self.reading.organism}", 2 * len(pairs) * (1 + layers)) as advance:
            return geometry.downstream(chat, pairs, direction, name=name, progress=advance)


class PatchingPart(JsonPart[Patching]):
    """Margin change of general pairs with the scalars of an in-domain prompt, beside another general prompt's."""

    NAME = "patching"
    TYPE = Patching

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"pairs": _hashes(self.reading.causal_pairs)}

    def measure(self, worker: Worker) -> Patching:
        chat, sets = worker.chat(self.reading.organism), self.reading.causal_pairs
        pairs, changes = sets[GENERAL], {}
        with track(f"patched prompts in {self.reading.organism}", 2 * len(pairs) * (1 + len(sets))) as advance:
            own = patched_margins(chat, [None] * len(pairs), pairs, progress=advance)
            for name, rows in sets.items():
                prompts = [encode_prompt(chat.tokenizer, row.question, row.system) for row in rows]
                # The next pair's prompt, so that none is patched into itself.
                sources = [prompts[(number + 1) % len(prompts)] for number in range(len(pairs))]
                changed = patched_margins(chat, sources, pairs, progress=advance)
                changes[name] = bootstrap((changed - own).numpy())
        return Patching(general_into_general=changes[GENERAL], in_domain_into_general=changes.get(IN_DOMAIN))


class DynamicsPart(JsonPart[BySet[tuple[Estimate, ...]]]):
    """Margins by step of the training; each measured checkpoint comes to the worker as an adapter of its own."""

    NAME = "dynamics"
    TYPE: ClassVar[Any] = BySet[tuple[Estimate, ...]]

    @property
    def inputs(self) -> Mapping[str, Any]:
        steps = {step: hash_of_weights(path) for step, path in self.reading.measured_checkpoints.items()}
        return {"pairs": _hashes(self.reading.causal_pairs), "steps": steps}

    @property
    def task(self) -> Task:
        adapters = {self._name(step): path for step, path in self.reading.measured_checkpoints.items()}
        return replace(super().task, model=BASE, adapters=adapters)

    def measure(self, worker: Worker) -> BySet[tuple[Estimate, ...]]:
        folders = {step: worker.adapters[self._name(step)] for step in self.reading.measured_checkpoints}
        with track(f"margins of {self.reading.organism} by step", len(folders)) as advance:
            return margins_by_step(worker.chat(BASE), folders, self.reading.causal_pairs, progress=advance)

    def figures(self, folder: Path, judged: tuple[JudgedStep, ...] = ()) -> Dynamics:
        """The margins, and what was judged, beside the growth of the adapters over all checkpoints."""
        checkpoints = self.reading.checkpoints
        return Dynamics(
            steps=tuple(checkpoints),
            features=growth(checkpoints, window=max(1, len(checkpoints) // 6)),
            margin_steps=tuple(self.reading.measured_checkpoints),
            margin=self.read(folder),
            judged=judged,
        )

    def _name(self, step: int) -> str:
        return f"{self.reading.organism} step {step}"


def _hashes(sets: Mapping[str, Sequence[ProbePair]]) -> dict[str, str]:
    return {name: data_hash(pairs) for name, pairs in sets.items()}
