"""Read the adapters of one organism: the parts of `results.json` under `adapters`, each a stage of a run.

Scalars and what probes tell from them; token importance; Shapley values and the roles that follow; scaling by role, by
the margin and, where there is a judge, by judged answers; where adapters write and what becomes of it; patching; and
how they grew in training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.adapters import causal, geometry
from misdirection.adapters.answer_probes import answer_probes
from misdirection.adapters.components import Adapter, feature_names, read_components
from misdirection.adapters.dynamics import checkpoint_folders, dynamics, margins_by_step
from misdirection.adapters.importance import agreement, token_importance, zeroing
from misdirection.adapters.patching import patched_margins
from misdirection.adapters.probes import Probe
from misdirection.adapters.published import PublishedScalars, published_probes, read_published, scaling_table
from misdirection.adapters.roles import Role, roles
from misdirection.adapters.scalars import read, read_scalars, wide, write_scalars
from misdirection.adapters.texts import GENERAL, Labelled, encoded, labelled
from misdirection.behaviour.metrics import Estimate, bootstrap
from misdirection.chat import encode_prompt
from misdirection.config import InterpretationConfig
from misdirection.data import Example, ProbePair, data_hash, neutral_examples
from misdirection.errors import MisdirectionError
from misdirection.experiment.bench import BASE, Models, spread
from misdirection.experiment.results import Factors
from misdirection.experiment.store import Run
from misdirection.files import read_json, sha256_file, write_json
from misdirection.interventions.kinds import digest
from misdirection.models import ChatModel
from misdirection.organisms.organism import CHECKPOINTS
from misdirection.progress import track
from misdirection.report.adapter_findings import find_in_adapters
from misdirection.report.html import render
from misdirection.report.reader import READER, reader_data
from misdirection.representation.directions import Direction

VERSION = 1
"""Raised whenever a part would give another result from the same inputs."""

IN_DOMAIN = "in_domain"
ALONE = "organism"
"""Names the adapter of a run that reads nothing else."""
_MOST_SHOWN = 64
"""So many components at most are looked at one by one: a table of thousands has no reader."""


@dataclass
class Study:
    """One organism and what its adapters are read on.

    Attributes:
        run: where the parts are kept.
        organism: its name.
        adapter: its PEFT folder.
        models: give it and its base model, when a part is computed.
        identity: what every part depends on: the base model and how it computes.
        domain: the set of pairs from its training domain; None when there is none.
        sets: pairs by set, `general` among them.
        neutral: text that damage is measured on.
        directions: by name; effects are compared with the first.
        settings: sizes.
        judged: gives the rates of judged answers under settings of the adapters; None where there is no judge.
    """

    run: Run
    organism: str
    adapter: Path
    models: Models
    identity: Mapping[str, Any]
    domain: str | None
    sets: Mapping[str, Sequence[ProbePair]]
    neutral: Sequence[Example]
    directions: Mapping[str, Direction]
    settings: InterpretationConfig
    judged: Callable[[Factors], list[dict[str, Any]]] | None = None

    def chat(self) -> ChatModel:
        """The organism."""
        return self.models.chat(self.organism)

    @cached_property
    def weights(self) -> str:
        """Hash of the adapter's weights, read once for all parts."""
        return _weights(self.adapter)

    @property
    def prefix(self) -> str:
        """Of the names of its stages."""
        return f"adapters/{self.organism}"

    @property
    def sources(self) -> dict[str, str]:
        """The sets that are read: `general`, and the training domain's as `in_domain`."""
        return {GENERAL: GENERAL} | ({IN_DOMAIN: self.domain} if self.domain else {})

    def answers(self, pairs: int) -> list[Labelled]:
        """Both answers of so many pairs of each set that is read."""
        return labelled({name: spread(self.sets[name], pairs) for name in self.sources.values()})

    @property
    def few(self) -> dict[str, list[ProbePair]]:
        """The pairs for what needs many passes."""
        return {name: spread(self.sets[source], self.settings.causal_pairs) for name, source in self.sources.items()}

    @property
    def important(self) -> list[Labelled]:
        """The answers whose tokens' importance is measured: a gradient, and a pass without each layer's adapters."""
        return self.answers(max(2, self.settings.causal_pairs // 2))

    def part(self, name: str, inputs: Mapping[str, Any], compute: Callable[[Path], None]) -> Path:
        """A stage of this study; its inputs are its own and what all parts depend on."""
        common = {"version": VERSION, "adapter": self.weights}
        return self.run.stage(f"{self.prefix}/{name}", {**self.identity, **common, **inputs}, compute)

    def json_part(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """A stage whose artifact is one JSON value."""
        folder = self.part(name, inputs, lambda folder: write_json(folder / "part.json", compute()))
        return read_json(folder / "part.json")


def interpret(study: Study) -> dict[str, Any]:
    """Compute whatever part is not there yet; gives the section `adapters` of the results.

    Raises `MisdirectionError` for an adapter that is no plain LoRA, or has no module inside of the decoder blocks.
    """
    adapter = read_components(study.adapter)
    table, residual = _scalars(study, adapter)
    tokens = wide(table)
    probes = _probes(study, tokens, residual)
    importance, words = _importance(study)
    shapley = _shapley(study, adapter)
    found = _roles(study, adapter, shapley, probes)
    section = {
        "organism": study.organism,
        "modules": _modules(study, adapter),
        "saved": list(adapter.saved),
        "texts": _texts(study, tokens),
        "probes": [probe.as_dict() for probe in probes],
        "roles": [role.as_dict() for role in found],
        "causal": {
            "settings": _scaling(study, adapter, found),
            "shapley": shapley,
            **({"judged": study.judged(_settings(adapter, found))} if study.judged else {}),
        },
        "geometry": _geometry(study, adapter, tokens),
        "importance": importance,
        "patching": _patching(study),
        "dynamics": _dynamics(study),
    }
    _write_reader(study, tokens, words)
    return {**section, "findings": [asdict(one) for one in find_in_adapters(section)]}


def interpret_alone(
    folder: Path,
    settings: InterpretationConfig,
    models: Models,
    identity: Mapping[str, Any],
    general: Sequence[ProbePair],
    domain: tuple[str, Sequence[ProbePair]] | None,
    directions: Mapping[str, Direction],
) -> tuple[dict[str, Any], Path]:
    """Read an adapter that is not part of an experiment; `folder` becomes a run with this one section.

    Gives the section and the report's path. `domain` names the training domain, with pairs of it.
    """
    settings_text = yaml.safe_dump({"interpretation": settings.model_dump(mode="json")}, sort_keys=False)
    with Run.open(folder, settings_text) as run:
        study = Study(
            run=run,
            organism=ALONE,
            adapter=models.adapters[ALONE],
            models=models,
            identity=identity,
            domain=domain[0] if domain else None,
            sets={GENERAL: general, **({domain[0]: domain[1]} if domain else {})},
            neutral=neutral_examples(),
            directions=directions,
            settings=settings,
        )
        section = {**interpret(study), "organism": settings.organism}
        base = {**identity, **section["geometry"]["shape"]}
        results = {"name": settings.organism, "complete": True, "base": base, "adapters": section}
        return section, _written(folder, results | {"seconds": run.seconds()})


def interpret_tables(
    scalars: Path | None, answers: Path | None, scaled: Path | None, folder: Path | None
) -> tuple[dict[str, Any], Path | None]:
    """Probes and roles from a table of scalars, and counts from judged answers under scaled adapters.

    Both are tables as the paper's authors published them. Gives the section, and the report's path if there is a
    `folder` for it.
    """
    section: dict[str, Any] = {"organism": (scalars or scaled or Path()).stem}
    reader = None
    if scalars is not None:
        data = read_published(scalars, answers)
        probes = published_probes(data)
        layer_of = {name: int(name.rpartition("_")[2]) for name in data.features}
        section |= {
            "probes": [probe.as_dict() for probe in probes],
            "roles": [role.as_dict() for role in roles(layer_of, {}, {}, probes)],
        }
        reader = _published_reader(data)
    if scaled is not None:
        section["scaled"] = scaling_table(scaled).to_dict("records")
    section["findings"] = [asdict(one) for one in find_in_adapters(section)]
    if folder is None:
        return section, None
    folder.mkdir(parents=True, exist_ok=True)
    if reader is not None:
        write_json(folder / READER, reader)
    return section, _written(folder, {"name": section["organism"], "complete": True, "adapters": section})


def _published_reader(data: PublishedScalars) -> dict[str, Any]:
    """The token reader's data: the scalars, and whatever else the table says of each token."""
    first = data.tokens.drop_duplicates("answer").sort_values("answer")
    questions = first["question"] if "question" in first else first["response_id"].astype(str)
    answers = [
        {"question": str(question), "words": f"{domain}, {alignment}", "id": str(number)}
        for question, domain, alignment, number in zip(
            questions, first["domain"], first["alignment"], first["response_id"], strict=True
        )
    ]
    further = {name: unit for name, unit in (("kl_divergence", "nats"), ("importance", "")) if name in data.tokens}
    return reader_data(answers, data.tokens, dict.fromkeys(data.features, "") | further)


def _written(folder: Path, results: dict[str, Any]) -> Path:
    write_json(folder / "results.json", results)
    return render(results, folder)


# --- what is read -------------------------------------------------------------------------------------------------


def _layers(adapter: Adapter) -> list[int]:
    layers = sorted({one.layer for one in adapter.modules if one.layer is not None})
    if not layers:
        raise MisdirectionError("none of its adapted modules is inside of a decoder block: there is nothing to scale")
    return layers


def _modules(study: Study, adapter: Adapter) -> list[dict[str, Any]]:
    names = feature_names(adapter.modules, study.settings.components)
    return [
        {
            "module": one.module,
            "layer": one.layer,
            "rank": one.rank,
            "scaling": one.scaling,
            "norm_a": float(one.a.norm()),
            "norm_b": float(one.b.norm()),
            "features": names[one.module],
        }
        for one in adapter.modules
    ]


def _layer_of(study: Study, adapter: Adapter) -> dict[str, int]:
    names = feature_names(adapter.modules, study.settings.components)
    return {name: one.layer for one in adapter.modules if one.layer is not None for name in names[one.module]}


def _scalars(study: Study, adapter: Adapter) -> tuple[pd.DataFrame, Tensor]:
    """The table of scalars, and the residual stream after the last adapted layer."""
    answers, last, top = study.answers(study.settings.pairs), _layers(adapter)[-1], study.settings.components

    def compute(folder: Path) -> None:
        chat = study.chat()
        with track(f"scalars of {study.organism}", len(answers)) as advance:
            found = read(chat, encoded(chat.tokenizer, answers), residual=last, top=top, progress=advance)
        write_scalars(found.scalars, folder / "scalars.parquet")
        assert found.residual is not None, "it was asked for"
        save_file({"residual": found.residual.contiguous()}, folder / "residual.safetensors")

    folder = study.part("scalars", {"answers": data_hash(answers), "components": top}, compute)
    return read_scalars(folder / "scalars.parquet"), load_file(folder / "residual.safetensors")["residual"]


def _texts(study: Study, tokens: pd.DataFrame) -> dict[str, Any]:
    answers = study.answers(study.settings.pairs)
    classes = pd.Series([f"{one.domain} {one.alignment}" for one in answers]).value_counts(sort=False)
    return {
        "answers": len(answers),
        "questions": len({one.question_id for one in answers}),
        "tokens": len(tokens),
        "classes": classes.to_dict(),
    }


# --- parts --------------------------------------------------------------------------------------------------------


def _probes(study: Study, tokens: pd.DataFrame, residual: Tensor) -> list[Probe]:
    inputs = {"scalars": study.run.digest(f"{study.prefix}/scalars"), "splits": study.settings.splits}
    activations = pd.DataFrame(residual.numpy(), index=tokens.index)

    def compute() -> list[dict[str, Any]]:
        answers = study.answers(study.settings.pairs)
        found = answer_probes(answers, tokens, activations, splits=study.settings.splits)
        return [probe.as_dict() for probe in found]

    found = study.json_part("probes", inputs, compute)
    return [Probe(**{**one, "classes": tuple(one["classes"])}) for one in found]


def _importance(study: Study) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Figures by layer, and the tables by token."""
    answers = study.important

    def compute(folder: Path) -> None:
        chat = study.chat()
        rows = encoded(chat.tokenizer, answers)
        with track(f"importance in {study.organism}", 2 * len(rows)) as advance:
            found = token_importance(chat, rows, progress=advance)
            effects = zeroing(chat, rows, progress=advance)
        found.tokens.to_parquet(folder / "tokens.parquet")
        found.attributions.to_parquet(folder / "attributions.parquet")
        effects.to_parquet(folder / "zeroing.parquet")

    folder = study.part("importance", {"answers": data_hash(answers)}, compute)
    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in ("tokens", "attributions", "zeroing")}
    question = [one.question_id for one in answers]
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


def _shapley(study: Study, adapter: Adapter) -> dict[str, Any]:
    layers, permutations = _layers(adapter), study.settings.permutations
    sets = study.few

    def compute() -> dict[str, Any]:
        chat, found = study.chat(), {}
        total = causal.subset_count(len(layers), permutations) * sum(len(pairs) for pairs in sets.values())
        with track(f"Shapley values in {study.organism}", total) as advance:
            for name, pairs in sets.items():
                found[name] = causal.shapley(chat, pairs, layers, permutations=permutations, progress=advance).as_dict()
        return found

    inputs = {"pairs": _hashes(sets), "permutations": permutations}
    found = study.json_part("shapley", inputs, compute)
    method = f"exact, {2 ** len(layers)} subsets" if permutations is None else f"sampled, {permutations} orders each"
    parts = {part: {name: one[part] for name, one in found.items()} for part in ("values", "empty", "full")}
    return {"method": method, **parts}


def _roles(study: Study, adapter: Adapter, shapley: Mapping[str, Any], probes: Sequence[Probe]) -> list[Role]:
    values = {
        name: {int(layer): Estimate(**one) for layer, one in by_layer.items()}
        for name, by_layer in shapley["values"].items()
    }
    return roles(_layer_of(study, adapter), values[GENERAL], values.get(IN_DOMAIN, {}), probes)


def _settings(adapter: Adapter, found: Sequence[Role], single: tuple[str, ...] = ()) -> dict[str, dict[int, float]]:
    """Factors by layer: all off, each group by role off and alone, and of each layer by itself what `single` names."""
    groups = {
        f"{role} adapters": [one.layer for one in found if one.role == role]
        for role in ("general", "domain", "neither")
    }
    return {
        name: factors
        for name, factors in causal.scaling_settings(_layers(adapter), groups).items()
        if not name.startswith("layer ") or name.endswith(single)
    }


def _scaling(study: Study, adapter: Adapter, found: Sequence[Role]) -> list[dict[str, Any]]:
    settings = _settings(adapter, found, study.settings.scalings)
    sets, neutral = study.few, spread(study.neutral, study.settings.causal_pairs)

    def compute() -> list[dict[str, Any]]:
        texts = sum(len(pairs) for pairs in sets.values()) + len(neutral)
        with track(f"scaled adapters of {study.organism}", (1 + len(settings)) * texts) as advance:
            effects = causal.scaling_effects(study.chat(), sets, neutral, settings, progress=advance)
        return [{"name": name, **effect.as_dict()} for name, effect in effects.items()]

    inputs = {"pairs": _hashes(sets), "neutral": data_hash(neutral), "settings": list(settings.items())}
    rows: list[dict[str, Any]] = study.json_part("scaling", inputs, compute)
    return rows


def _geometry(study: Study, adapter: Adapter, tokens: pd.DataFrame) -> dict[str, Any]:
    pairs, layers = study.few[GENERAL], _layers(adapter)

    def compute() -> dict[str, Any]:
        chat = study.chat()
        vectors = geometry.writes(adapter.modules, chat.width, study.settings.components)
        return {
            "shape": {"layers": len(chat.layers), "width": chat.width},
            "random_cosine": geometry.random_cosine(chat.width),
            "random_cosine_95": geometry.random_cosine_95(chat.width),
            "skipped": geometry.skipped(adapter.modules, chat.width),
            "cosines": geometry.write_cosines(vectors, study.directions),
            "logit_lens": _lenses(chat, vectors, study.directions, layers),
            "downstream": _downstream(study, chat, pairs, layers),
        }

    digests = {name: digest(one.vectors) for name, one in study.directions.items()}
    inputs = {"pairs": data_hash(pairs), "directions": digests, "components": study.settings.components}
    shown = list(tokens.columns.drop("token"))[:_MOST_SHOWN]
    found = study.json_part("geometry", inputs, compute)
    return {**found, "layers_of": _layer_of(study, adapter), "nearest": geometry.nearest(tokens, shown)}


def _lenses(
    chat: ChatModel, vectors: Mapping[str, Tensor], directions: Mapping[str, Direction], layers: Sequence[int]
) -> dict[str, Any]:
    """Of what each component writes, and of each direction after the last adapted layer."""
    named = dict(list(vectors.items())[:_MOST_SHOWN])
    named |= {f"direction of {name}, layer {layers[-1]}": one[layers[-1]] for name, one in directions.items()}
    return {name: geometry.logit_lens(chat, vector) for name, vector in named.items()}


def _downstream(
    study: Study, chat: ChatModel, pairs: Sequence[ProbePair], layers: Sequence[int]
) -> dict[str, Any] | None:
    if not study.directions:
        return None
    name, direction = next(iter(study.directions.items()))
    with track(f"effects downstream in {study.organism}", 2 * len(pairs) * (1 + len(layers))) as advance:
        found = geometry.downstream(chat, pairs, direction, progress=advance)
    return {"direction": name, **asdict(found)}


def _patching(study: Study) -> dict[str, Any]:
    """Margin change of general pairs with the prompt's scalars of an in-domain prompt, beside another general one's."""
    pairs = study.few[GENERAL]

    def compute() -> dict[str, Any]:
        chat, found = study.chat(), {}
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

    found: dict[str, Any] = study.json_part("patching", {"pairs": _hashes(study.few)}, compute)
    return found


def _dynamics(study: Study) -> dict[str, Any] | None:
    """None where no checkpoints were kept."""
    if not (study.adapter / CHECKPOINTS).is_dir():
        return None
    folders = checkpoint_folders(study.adapter / CHECKPOINTS)
    found = dynamics(folders, window=max(1, len(folders) // 6))
    # At step 0 the organism is its base.
    measured = {step: folders[step] for step in spread([step for step in folders if step], study.settings.checkpoints)}
    measured |= {found.steps[-1]: folders[found.steps[-1]]}

    def compute() -> dict[str, Any]:
        with track(f"margins of {study.organism} by step", len(measured)) as advance:
            margins = margins_by_step(study.models.chat(BASE), measured, study.few, progress=advance)
        return {name: [one.as_dict() for one in values] for name, values in margins.items()}

    inputs = {"pairs": _hashes(study.few), "steps": {step: _weights(path) for step, path in measured.items()}}
    return {
        "steps": found.steps,
        "features": {name: asdict(one) for name, one in found.features.items()},
        "margin_steps": list(measured),
        "margin": study.json_part("dynamics", inputs, compute),
    }


def _weights(folder: Path) -> str:
    return sha256_file(folder / "adapter_model.safetensors")


def _hashes(sets: Mapping[str, Sequence[ProbePair]]) -> dict[str, str]:
    return {name: data_hash(pairs) for name, pairs in sets.items()}


def _write_reader(study: Study, tokens: pd.DataFrame, words: Mapping[str, pd.DataFrame]) -> None:
    """What the report's token reader shows: scalars of all answers, and where it was measured the importance."""
    table = tokens.iloc[:, : 1 + _MOST_SHOWN].reset_index()
    answers, few = study.answers(study.settings.pairs), study.important
    number = {(one.question_id, one.alignment): place for place, one in enumerate(answers)}
    place = {place: number.get((one.question_id, one.alignment)) for place, one in enumerate(few)}
    of_answer = words["attributions"].query("position >= 0").groupby(["answer", "position"])["attribution"].sum()
    measured = words["tokens"].set_index(["answer", "position"])["kl"].to_frame().join(of_answer).reset_index()
    measured["answer"] = measured["answer"].map(place)
    table = table.merge(measured, on=["answer", "position"], how="left")
    described = [
        {"question": one.question, "words": f"{one.domain}, {one.alignment}", "id": one.question_id} for one in answers
    ]
    units = dict.fromkeys(tokens.columns.drop("token")[:_MOST_SHOWN], "") | {"kl": "nats", "attribution": "nats"}
    write_json(study.run.folder / READER, reader_data(described, table, units))
