"""Parts of reading an organism's adapters, each a piece: what it computes at its place, and how that is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.data import Example, ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.directions.direction import Direction
from misdirection.errors import InputError
from misdirection.files import read_json, sha256_file, write_json
from misdirection.interpretation import causal, geometry
from misdirection.interpretation.answer_probes import answer_probes
from misdirection.interpretation.config import InterpretationConfig
from misdirection.interpretation.dynamics import checkpoint_folders, dynamics, margins_by_step
from misdirection.interpretation.importance import agreement, token_importance, zeroing
from misdirection.interpretation.patching import patched_margins
from misdirection.interpretation.probes import Probe
from misdirection.interpretation.scalars import read, read_scalars, write_scalars
from misdirection.interpretation.texts import GENERAL, Labelled, labelled
from misdirection.interventions.vectors import digest
from misdirection.likelihood.margin import text_rows
from misdirection.lora.components import feature_names
from misdirection.lora.view import LoraFiles, LoraView
from misdirection.models.chat import encode_prompt
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.organism import CHECKPOINTS
from misdirection.progress import track
from misdirection.runs.tasks import Compute, Folders, Task
from misdirection.runs.worker import BASE, Worker
from misdirection.statistics import bootstrap

Factors = Mapping[str, Mapping[int, float]]
"""What adapters are multiplied by, by layer, by the name of the setting."""

VERSION = 1
"""Raised whenever a part would give another result from the same inputs."""

IN_DOMAIN = "in_domain"
_JSON = "part.json"
MOST_SHOWN = 64
"""So many components at most are looked at one by one: a table of thousands has no reader."""


@dataclass(frozen=True)
class Study:
    """One organism and what its adapters are read on: plain data, which go with a part to wherever it is computed.

    Attributes:
        organism: its name.
        adapter: its PEFT folder where the run is; a part finds it among its place's adapters.
        identity: what every part depends on: the base model and how it computes.
        domain: the set of pairs from its training domain; None when there is none.
        sets: pairs by set, `general` among them.
        neutral: text that damage is measured on.
        directions: by name; effects are compared with the first.
        settings: sizes.
    """

    organism: str
    adapter: Path
    identity: Mapping[str, Any]
    domain: str | None
    sets: Mapping[str, Sequence[ProbePair]]
    neutral: Sequence[Example]
    directions: Mapping[str, Direction]
    settings: InterpretationConfig

    @cached_property
    def weights(self) -> str:
        """Hash of the adapter's weights, read once for all parts."""
        return _weights(self.adapter)

    @property
    def sources(self) -> dict[str, str]:
        """The sets that are read: `general`, and the training domain's as `in_domain`."""
        return {GENERAL: GENERAL} | ({IN_DOMAIN: self.domain} if self.domain else {})

    @property
    def answers(self) -> list[Labelled]:
        """The answers that are read token by token."""
        return self._answers(self.settings.pairs)

    @property
    def important(self) -> list[Labelled]:
        """The answers whose tokens' importance is measured: a gradient, and a pass without each layer's adapters."""
        return self._answers(max(2, self.settings.causal_pairs // 2))

    def _answers(self, pairs: int) -> list[Labelled]:
        """Both answers of so many pairs of each set that is read."""
        return labelled({name: spread(self.sets[name], pairs) for name in self.sources.values()})

    @property
    def few(self) -> dict[str, list[ProbePair]]:
        """The pairs for what needs many passes."""
        return {name: spread(self.sets[source], self.settings.causal_pairs) for name, source in self.sources.items()}

    def stage(self, part: str) -> str:
        """The name of a part's stage."""
        return f"adapters/{self.organism}/{part}"

    def task(self, part: str, inputs: Mapping[str, Any], compute: Compute) -> Task:
        """A part that needs the organism; its inputs are its own and what all parts depend on."""
        common = {"version": VERSION, "adapter": self.weights}
        stages = {self.stage(part): {**self.identity, **common, **inputs}}
        return Task(stages, self.organism, compute, {self.organism: self.adapter})

    def json_task(self, part: str, inputs: Mapping[str, Any], compute: Callable[[Worker], Any]) -> Task:
        """The same for a part that is one JSON value; `read_part` reads it."""
        return self.task(part, inputs, partial(_compute_json, compute))


def independent_parts(study: Study, layers: Sequence[int]) -> list[Task]:
    """The parts that need no other part: what follows waits for all of them, so that the longest is the first."""
    pieces = [
        _shapley(study, layers),
        _scalars(study, layers[-1]),
        _importance(study),
        _geometry(study),
        _patching(study),
    ]
    return [*pieces, _dynamics(study)] if _checkpoints(study) else pieces


def adapted_layers(adapter: LoraFiles) -> list[int]:
    layers = sorted({one.layer for one in adapter.modules if one.layer is not None})
    if not layers:
        raise InputError("none of its adapted modules is inside of a decoder block: there is nothing to scale")
    return layers


def feature_layers(study: Study, adapter: LoraFiles) -> dict[str, int]:
    names = feature_names(adapter.modules, study.settings.components)
    return {name: one.layer for one in adapter.modules if one.layer is not None for name in names[one.module]}


def _compute_json(compute: Callable[[Worker], Any], place: Worker, folders: Folders) -> None:
    (folder,) = folders.values()
    write_json(folder / _JSON, compute(place))


def read_part(folder: Path) -> Any:
    return read_json(folder / _JSON)


def _scalars(study: Study, last: int) -> Task:
    """The table of scalars, and the residual stream after the last adapted layer."""
    inputs = {"answers": data_hash(study.answers), "components": study.settings.components}
    return study.task("scalars", inputs, partial(_compute_scalars, study, last))


def _compute_scalars(study: Study, last: int, place: Worker, folders: Folders) -> None:
    (folder,), chat, top = folders.values(), place.chat(study.organism), study.settings.components
    rows = text_rows(chat.tokenizer, study.answers)
    with track(f"scalars of {study.organism}", len(rows)) as advance:
        found = read(chat, rows, residual=last, top=top, progress=advance)
    write_scalars(found.scalars, folder / "scalars.parquet")
    assert found.residual is not None, "it was asked for"
    save_file({"residual": found.residual.contiguous()}, folder / "residual.safetensors")


def read_scalar_table(folder: Path) -> tuple[pd.DataFrame, Tensor]:
    return read_scalars(folder / "scalars.parquet"), load_file(folder / "residual.safetensors")["residual"]


def probes_part(study: Study, scalars: str, tokens: pd.DataFrame, residual: Tensor) -> Task:
    """What probes tell from the scalars, whose digest is given, and from the residual stream."""
    inputs = {"scalars": scalars, "splits": study.settings.splits}
    activations = pd.DataFrame(residual.numpy(), index=tokens.index)
    piece = study.json_task("probes", inputs, partial(_compute_probes, study, tokens, activations))
    return replace(piece, adapters={})


def _compute_probes(
    study: Study, tokens: pd.DataFrame, activations: pd.DataFrame, _place: Worker
) -> list[dict[str, Any]]:
    found = answer_probes(study.answers, tokens, activations, splits=study.settings.splits)
    return [probe.as_dict() for probe in found]


def read_probes(folder: Path) -> list[Probe]:
    return [Probe(**{**one, "classes": tuple(one["classes"])}) for one in read_part(folder)]


def _importance(study: Study) -> Task:
    """What the adapters change in answers: by token, by its attribution to them, and with each layer's zeroed."""
    return study.task("importance", {"answers": data_hash(study.important)}, partial(_compute_importance, study))


def _compute_importance(study: Study, place: Worker, folders: Folders) -> None:
    (folder,), chat = folders.values(), place.chat(study.organism)
    rows = text_rows(chat.tokenizer, study.important)
    with track(f"importance in {study.organism}", 2 * len(rows)) as advance:
        found = token_importance(chat, rows, progress=advance)
        effects = zeroing(chat, rows, progress=advance)
    found.tokens.to_parquet(folder / "tokens.parquet")
    found.attributions.to_parquet(folder / "attributions.parquet")
    effects.to_parquet(folder / "zeroing.parquet")


def read_importance(study: Study, folder: Path) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Figures by layer, and the tables by token."""
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in ("tokens", "attributions", "zeroing")}
    question = [one.question_id for one in study.important]
    section = {
        "kl": _over_questions(tables["tokens"].groupby("answer")["kl"].mean(), question),
        "by_layer": {
            str(layer): {
                "attribution": _over_questions(rows.groupby("answer")["attribution"].sum(), question),
                "zeroing": _over_questions(
                    tables["zeroing"].query("layer == @layer").set_index("answer")["effect"], question
                ),
            }
            for layer, rows in tables["attributions"].groupby("layer")
        },
        "agreement": agreement(tables["attributions"], tables["zeroing"], question),
    }
    return section, tables


def _over_questions(by_answer: "pd.Series[float]", question: Sequence[str]) -> dict[str, Any]:
    """Mean over answers, the two answers to one question together, with its interval over questions."""
    by_question = by_answer.groupby([question[number] for number in by_answer.index]).mean()
    return bootstrap(by_question).as_dict()


def _shapley(study: Study, layers: Sequence[int]) -> Task:
    """Shapley values of each layer's adapters."""
    inputs = {"pairs": _hashes(study.few), "permutations": study.settings.permutations}
    return study.json_task("shapley", inputs, partial(_compute_shapley, study, layers))


def _compute_shapley(study: Study, layers: Sequence[int], place: Worker) -> dict[str, Any]:
    chat, sets, permutations = place.chat(study.organism), study.few, study.settings.permutations
    found = {}
    total = causal.subset_count(len(layers), permutations) * sum(len(pairs) for pairs in sets.values())
    with track(f"Shapley values in {study.organism}", total) as advance:
        for name, pairs in sets.items():
            found[name] = causal.shapley(chat, pairs, layers, permutations=permutations, progress=advance).as_dict()
    return found


def read_shapley(study: Study, folder: Path, layers: Sequence[int]) -> dict[str, Any]:
    found, permutations = read_part(folder), study.settings.permutations
    method = f"exact, {2 ** len(layers)} subsets" if permutations is None else f"sampled, {permutations} orders each"
    parts = {part: {name: one[part] for name, one in found.items()} for part in ("values", "empty", "full")}
    return {"method": method, **parts}


def scaling_part(study: Study, settings: Factors) -> Task:
    """Margins and damage under settings of the adapters."""
    neutral = spread(study.neutral, study.settings.causal_pairs)
    inputs = {"pairs": _hashes(study.few), "neutral": data_hash(neutral), "settings": list(settings.items())}
    return study.json_task("scaling", inputs, partial(_compute_scaling, study, neutral, settings))


def _compute_scaling(
    study: Study, neutral: Sequence[Example], settings: Factors, place: Worker
) -> list[dict[str, Any]]:
    sets = study.few
    texts = sum(len(pairs) for pairs in sets.values()) + len(neutral)
    with track(f"scaled adapters of {study.organism}", (1 + len(settings)) * texts) as advance:
        effects = causal.scaling_effects(place.chat(study.organism), sets, neutral, settings, progress=advance)
    return [{"name": name, **effect.as_dict()} for name, effect in effects.items()]


def _geometry(study: Study) -> Task:
    """Where adapters write, and what becomes of it downstream."""
    inputs = {
        "pairs": data_hash(study.few[GENERAL]),
        "directions": {name: digest(one.vectors) for name, one in study.directions.items()},
        "components": study.settings.components,
    }
    return study.json_task("geometry", inputs, partial(_compute_geometry, study))


def _compute_geometry(study: Study, place: Worker) -> dict[str, Any]:
    chat, adapter = place.chat(study.organism), LoraView.open(place.adapters[study.organism])
    vectors, layers = geometry.writes(adapter.modules, chat.width, study.settings.components), adapted_layers(adapter)
    return {
        "shape": {"layers": len(chat.layers), "width": chat.width},
        "random_cosine": geometry.random_cosine(chat.width),
        "random_cosine_95": geometry.random_cosine_95(chat.width),
        "skipped": geometry.skipped(adapter.modules, chat.width),
        "cosines": geometry.write_cosines(vectors, study.directions),
        "logit_lens": _lenses(chat, vectors, study.directions, layers),
        "downstream": _downstream(study, chat, layers),
    }


def read_geometry(study: Study, folder: Path, adapter: LoraFiles, tokens: pd.DataFrame) -> dict[str, Any]:
    shown = list(tokens.columns.drop("token"))[:MOST_SHOWN]
    nearest = geometry.nearest(tokens, shown)
    return {**read_part(folder), "layers_of": feature_layers(study, adapter), "nearest": nearest}


def _lenses(
    chat: ChatModel, vectors: Mapping[str, Tensor], directions: Mapping[str, Direction], layers: Sequence[int]
) -> dict[str, Any]:
    """Of what each component writes, and of each direction after the last adapted layer."""
    named = dict(list(vectors.items())[:MOST_SHOWN])
    named |= {f"direction of {name}, layer {layers[-1]}": one[layers[-1]] for name, one in directions.items()}
    return {name: geometry.logit_lens(chat, vector) for name, vector in named.items()}


def _downstream(study: Study, chat: ChatModel, layers: Sequence[int]) -> dict[str, Any] | None:
    if not study.directions:
        return None
    (name, direction), pairs = next(iter(study.directions.items())), study.few[GENERAL]
    with track(f"effects downstream in {study.organism}", 2 * len(pairs) * (1 + len(layers))) as advance:
        found = geometry.downstream(chat, pairs, direction, progress=advance)
    return {"direction": name, **asdict(found)}


def _patching(study: Study) -> Task:
    """Margin change of general pairs with the prompt's scalars of an in-domain prompt, beside another general one's."""
    return study.json_task("patching", {"pairs": _hashes(study.few)}, partial(_compute_patching, study))


def _compute_patching(study: Study, place: Worker) -> dict[str, Any]:
    chat, pairs, found = place.chat(study.organism), study.few[GENERAL], {}
    donors = {f"{name}_into_general": rows for name, rows in study.few.items()}
    with track(f"patched prompts in {study.organism}", 2 * len(pairs) * (1 + len(donors))) as advance:
        own = patched_margins(chat, [None] * len(pairs), pairs, progress=advance)
        for name, rows in donors.items():
            prompts = [encode_prompt(chat.tokenizer, row.question, row.system) for row in rows]
            # The next pair's prompt, so that none is patched into itself.
            sources = [prompts[(number + 1) % len(prompts)] for number in range(len(pairs))]
            changed = patched_margins(chat, sources, pairs, progress=advance)
            found[name] = bootstrap((changed - own).numpy()).as_dict()
    return found


def _checkpoints(study: Study) -> dict[int, Path]:
    """The organism's adapter folders by step of its training; none where none were kept."""
    kept = study.adapter / CHECKPOINTS
    return checkpoint_folders(kept) if kept.is_dir() else {}


def _measured(study: Study) -> dict[int, Path]:
    """The checkpoints whose margins are measured."""
    folders = _checkpoints(study)
    # At step 0 the organism is its base.
    steps = spread([step for step in folders if step], study.settings.checkpoints)
    return {step: folders[step] for step in dict.fromkeys([*steps, max(folders)])}


def _dynamics(study: Study) -> Task:
    """Margins by step; each measured checkpoint comes to the place as an adapter of its own."""
    measured = _measured(study)
    names = {step: f"{study.organism} step {step}" for step in measured}
    inputs = {"pairs": _hashes(study.few), "steps": {step: _weights(path) for step, path in measured.items()}}
    piece = study.json_task("dynamics", inputs, partial(_compute_dynamics, study, names))
    return replace(piece, model=BASE, adapters={names[step]: path for step, path in measured.items()})


def _compute_dynamics(study: Study, names: Mapping[int, str], place: Worker) -> dict[str, Any]:
    folders = {step: place.adapters[name] for step, name in names.items()}
    with track(f"margins of {study.organism} by step", len(folders)) as advance:
        margins = margins_by_step(place.chat(BASE), folders, study.few, progress=advance)
    return {name: [one.as_dict() for one in values] for name, values in margins.items()}


def read_dynamics(study: Study, folder: Path) -> dict[str, Any] | None:
    """None where no checkpoints were kept."""
    folders = _checkpoints(study)
    if not folders:
        return None
    found = dynamics(folders, window=max(1, len(folders) // 6))
    return {
        "steps": found.steps,
        "features": {name: asdict(one) for name, one in found.features.items()},
        "margin_steps": list(_measured(study)),
        "margin": read_part(folder),
    }


def _weights(folder: Path) -> str:
    return sha256_file(folder / "adapter_model.safetensors")


def _hashes(sets: Mapping[str, Sequence[ProbePair]]) -> dict[str, str]:
    return {name: data_hash(pairs) for name, pairs in sets.items()}
