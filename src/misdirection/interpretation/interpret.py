"""Interpretation of an organism's adapters: all parts of a reading, as typed results.

Scalars and what probes tell from them; token importance; Shapley values and the roles that follow; scaling by role, by
the margin and, where there is a judge, by judged answers; where adapters write and what becomes of it; patching; and
how they grew in training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml

from misdirection import data
from misdirection.choices import BUNDLED, Dtype, Thinking
from misdirection.data import ProbePair
from misdirection.directions.direction import Direction
from misdirection.files import atomic_folder, require_replaceable
from misdirection.interpretation import geometry
from misdirection.interpretation.checkpoints import named_checkpoints
from misdirection.interpretation.config import InterpretationConfig
from misdirection.interpretation.figures import Causal, Geometry, Probe, Role, SettingShares, ShapleyFigures, TextCounts
from misdirection.interpretation.judged import Judged, JudgedScalings
from misdirection.interpretation.parts import (
    MOST_SHOWN,
    DynamicsPart,
    GeometryPart,
    ImportancePart,
    ImportanceTables,
    PatchingPart,
    ProbesPart,
    ScalarsPart,
    ScalingPart,
    ShapleyPart,
)
from misdirection.interpretation.published import (
    PublishedScalars,
    published_probes,
    published_shares,
    read_published,
    scaled_shares,
)
from misdirection.interpretation.reading import IN_DOMAIN, AdapterReading, Part, ReadTexts
from misdirection.interpretation.results import AdapterFigures, InterpretationResults
from misdirection.interpretation.roles import roles
from misdirection.interpretation.scaling import explicit_settings, scaling_settings
from misdirection.interpretation.texts import GENERAL, Labelled
from misdirection.interpretation.token_results import AnswerLabel, TokenTable
from misdirection.interpretation.tokens import pack_tokens
from misdirection.models.adapters import local_adapter
from misdirection.models.identity import identify
from misdirection.models.loading import load
from misdirection.models.names import ModelName
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner, Runner
from misdirection.runs.worker import Models, Worker

T = TypeVar("T")

_ALONE = "organism"
"""Names the adapter of a run that reads nothing else."""


def interpret(
    adapter: str | Path,
    folder: str | Path,
    *,
    model: str = BUNDLED,
    settings: InterpretationConfig | None = None,
    pairs: Sequence[ProbePair] | None = None,
    domain: str | Path | None = None,
    directions: Mapping[str, Direction | str | Path] | None = None,
    checkpoints: str | Path | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    thinking: Thinking = "off",
    chat_template: str | None = None,
) -> InterpretationResults:
    """Reads an adapter that is not part of an experiment (paper, section on interpreting rank-1 adapters).

    `folder` becomes a run: what is there already is not computed again. The results, the token reader's data and the
    page are written into it.

    Args:
        adapter: a PEFT folder, or `ID@REVISION:SUBFOLDER` of the hub.
        folder: where the parts and the results are kept.
        model: its base model, with or without a revision.
        settings: sizes; a quick reading by default.
        pairs: general probe pairs; those of the package by default.
        domain: what the adapter was trained on: a domain of the package, or a JSONL file of probe pairs.
        directions: directions, or their files, by name; effects downstream are compared with the first.
        checkpoints: where those of its training are, in a folder or on the hub (see `named_checkpoints`); those that
            were kept in its own folder by default.
        dtype: as in `load`.
        device: as in `load`.
        thinking: as in `load`.
        chat_template: as in `load`.

    Raises:
        InputError: an adapter that is no plain LoRA, or has no module inside of the decoder blocks; or checkpoints that
            are not there.
    """
    base, path = ModelName.parse(model), local_adapter(*ModelName.parse(str(adapter)))
    settings, given = settings or InterpretationConfig.sized(str(adapter)), directions or {}
    reading = AdapterReading.open(
        _ALONE,
        path,
        identify(base.name, base.revision, dtype, device, thinking, chat_template),
        _texts(pairs, domain),
        {name: each if isinstance(each, Direction) else Direction.load(each) for name, each in given.items()},
        settings,
        named_checkpoints(str(checkpoints)) if checkpoints else None,
    )
    options: dict[str, Any] = {"thinking": thinking, "chat_template": chat_template, "tuned": path}
    load_base = partial(load, base.name, revision=base.revision, dtype=dtype, device=device, **options)
    models = Models(load_base, {_ALONE: path})
    inputs = yaml.safe_dump({"interpretation": settings.model_dump(mode="json")}, sort_keys=False)
    with RunFolder.open(Path(folder), inputs) as run:
        figures = read_adapters(reading, run, LocalRunner(run, Worker(models, run.partial)))
        figures = figures.model_copy(update={"organism": settings.organism})
        return _saved(InterpretationResults(base=reading.identity, adapters=figures, seconds=run.seconds()), run.folder)


def interpret_tables(
    scalars: Path | None = None, answers: Path | None = None, scaled: Path | None = None, folder: Path | None = None
) -> InterpretationResults:
    """Reads tables that were measured elsewhere, as the paper's authors published them.

    Args:
        scalars: scalars of answers' tokens, for probes and roles.
        answers: the answers, for the split by question.
        scaled: judged answers under scaled adapters, which are counted.
        folder: where the results, the token reader's data and the page are written, if anywhere.
    """
    if folder is not None:
        require_replaceable(folder)
    published = read_published(scalars, answers) if scalars else None
    probes = published_probes(published) if published else []
    figures = AdapterFigures(
        organism=(scalars or scaled or Path()).stem,
        modules=(),
        saved=(),
        dead=(),
        texts=None,
        probes=tuple(probes),
        roles=tuple(roles(published.layers_of, {}, {}, probes)) if published else (),
        causal=None,
        geometry=None,
        importance=None,
        patching=None,
        dynamics=None,
        scaled=scaled_shares(scaled) if scaled else (),
        shares=published_shares(scaled) if scaled else (),
    )
    results = InterpretationResults(base=None, adapters=figures, seconds={})
    if folder is None:
        return results
    with atomic_folder(folder) as temporary:
        if published:
            _published_table(published).save(temporary)
        return _saved(results, temporary)


def read_adapters(
    reading: AdapterReading, run: RunFolder, runner: Runner, judged: Judged | None = None
) -> AdapterFigures:
    """Makes whatever part is not there yet, and the token reader's data; gives the figures.

    Args:
        reading: the organism.
        run: where the parts are kept.
        runner: makes them.
        judged: what a judge says of the organism's answers; None where there is no judge.
    """
    made = _Made(run, runner)
    shapley, scalars, importance = ShapleyPart(reading), ScalarsPart(reading), ImportancePart(reading)
    written, patching = GeometryPart(reading), PatchingPart(reading)
    dynamics = DynamicsPart(reading) if reading.checkpoints else None
    # Whatever needs another part waits for all of these, so that the longest is the first.
    made.make([shapley, scalars, importance, written, patching, *([dynamics] if dynamics else [])])
    answers, tables = made.read(scalars), made.read(importance)
    probes = made.once(ProbesPart(reading, run.digest(scalars.stage), answers))
    by_layer = _roles(reading, made.read(shapley), probes)
    causal, shares = _causal(reading, made, made.read(shapley), by_layer, judged)
    steps = judged.steps(reading.checkpoints) if judged and dynamics else ()
    tokens = answers.tokens
    run.keep(_token_table(reading, tokens, tables))
    return AdapterFigures(
        organism=reading.organism,
        modules=reading.modules,
        saved=reading.saved,
        dead=reading.dead,
        texts=_counts(reading.answers, tokens),
        probes=probes,
        roles=by_layer,
        causal=causal,
        geometry=Geometry(
            **made.read(written).__dict__,
            layers_of=reading.layers_of,
            nearest=geometry.nearest(tokens, _shown(tokens)),
        ),
        importance=tables.figures([answer.question_id for answer in reading.important_answers]),
        patching=made.read(patching),
        dynamics=dynamics.figures(made.folder(dynamics), steps) if dynamics else None,
        scaled=(),
        shares=shares,
    )


@dataclass(frozen=True)
class _Made:
    """The parts of a reading that are made in a run."""

    run: RunFolder
    runner: Runner

    def make(self, parts: Sequence[Part[Any]]) -> None:
        """Makes parts that wait for nothing."""
        self.runner.make([part.task for part in parts])

    def folder(self, part: Part[Any]) -> Path:
        """The artifact of a part that was made."""
        return self.run.artifact(part.stage)

    def read(self, part: Part[T]) -> T:
        """The value of a part that was made."""
        return part.read(self.folder(part))

    def once(self, part: Part[T]) -> T:
        """Makes a part if need be, and reads it."""
        self.make([part])
        return self.read(part)


def _roles(reading: AdapterReading, shapley: ShapleyFigures, probes: Sequence[Probe]) -> tuple[Role, ...]:
    in_domain = shapley.values.get(IN_DOMAIN, {})
    return tuple(roles(reading.layers_of, shapley.values[GENERAL], in_domain, probes))


def _causal(
    reading: AdapterReading, made: _Made, shapley: ShapleyFigures, by_layer: Sequence[Role], judged: Judged | None
) -> tuple[Causal, tuple[SettingShares, ...]]:
    """What scaling does, by role and as it was written out: to margins, and to judged answers."""
    written = explicit_settings(reading.settings.explicit, reading.layers)
    scaling = ScalingPart(reading, _settings(reading.layers, by_layer, reading.settings.words) | written)
    answers = judged.scalings(_settings(reading.layers, by_layer) | written) if judged else JudgedScalings()
    return Causal(settings=made.once(scaling), shapley=shapley, judged=answers.rates), answers.shares


def _saved(results: InterpretationResults, folder: Path) -> InterpretationResults:
    """The results as their file has them, whose page is written: made again from the file it is the same bytes."""
    results.save(folder)
    saved = InterpretationResults.load(folder)
    saved.write_page(folder)
    return saved


def _texts(pairs: Sequence[ProbePair] | None, domain: str | Path | None) -> ReadTexts:
    """Texts for an adapter that is read alone; a domain of the package has its pairs held out of training."""
    general, neutral = pairs or data.probe_pairs(), data.neutral_examples()
    if domain is None:
        return ReadTexts(None, {GENERAL: general}, neutral)
    if domain in data.domains():
        name, own = str(domain), data.domain_pairs(str(domain), "held_out")
    else:
        name, own = Path(domain).stem, data.read_pairs(Path(domain))
    return ReadTexts(name, {GENERAL: general, name: own}, neutral)


def _settings(
    layers: Sequence[int], by_layer: Sequence[Role], single: tuple[str, ...] = ()
) -> dict[str, dict[int, float]]:
    """Factors by layer: all off, each group by role off and alone, and of each layer by itself what `single` names."""
    groups = {
        f"{name} adapters": [role.layer for role in by_layer if role.role == name]
        for name in ("general", "domain", "neither")
    }
    return {
        name: factors
        for name, factors in scaling_settings(layers, groups).items()
        if not name.startswith("layer ") or name.endswith(single)
    }


def _counts(answers: Sequence[Labelled], tokens: pd.DataFrame) -> TextCounts:
    classes = pd.Series([f"{answer.domain} {answer.alignment}" for answer in answers]).value_counts(sort=False)
    return TextCounts(
        answers=len(answers),
        questions=len({answer.question_id for answer in answers}),
        tokens=len(tokens),
        classes=classes.to_dict(),
    )


def _shown(tokens: pd.DataFrame) -> list[str]:
    """The features that are looked at singly."""
    return list(tokens.columns.drop("token"))[:MOST_SHOWN]


# --- the token reader -----------------------------------------------------------------------------------------------


def _token_table(reading: AdapterReading, tokens: pd.DataFrame, importance: ImportanceTables) -> TokenTable:
    """Scalars of all answers, and where it was measured the importance."""
    answers = reading.answers
    numbers = {(answer.question_id, answer.alignment): number for number, answer in enumerate(answers)}
    number_of = {
        number: numbers.get((answer.question_id, answer.alignment))
        for number, answer in enumerate(reading.important_answers)
    }
    own = importance.attributions.query("position >= 0").groupby(["answer", "position"])["attribution"].sum()
    measured = importance.tokens.set_index(["answer", "position"])["kl"].to_frame().join(own).reset_index()
    measured["answer"] = measured["answer"].map(number_of)
    features = _shown(tokens)
    table = tokens[["token", *features]].reset_index().merge(measured, on=["answer", "position"], how="left")
    labels = [
        AnswerLabel(question=answer.question, words=f"{answer.domain}, {answer.alignment}", id=answer.question_id)
        for answer in answers
    ]
    return pack_tokens(labels, table, dict.fromkeys(features, "") | {"kl": "nats", "attribution": "nats"})


def _published_table(published: PublishedScalars) -> TokenTable:
    """The scalars, and whatever else the table says of each token."""
    first = published.tokens.drop_duplicates("answer").sort_values("answer")
    questions = first["question"] if "question" in first else first["response_id"].astype(str)
    labels = [
        AnswerLabel(question=str(question), words=f"{domain}, {alignment}", id=str(number))
        for question, domain, alignment, number in zip(
            questions, first["domain"], first["alignment"], first["response_id"], strict=True
        )
    ]
    further = {name: unit for name, unit in (("kl_divergence", "nats"), ("importance", "")) if name in published.tokens}
    return pack_tokens(labels, published.tokens, dict.fromkeys(published.features, "") | further)
