"""Audit a fine-tune for broad misalignment: all evidence with intervals and nulls, and a verdict by a stated rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.auditing.attribution import by_layer, margin_parts
from misdirection.auditing.drift import drifts, model_difference
from misdirection.auditing.fine_tune import TUNED, Which
from misdirection.auditing.inputs import AuditInputs, Baseline, Directions, Judging
from misdirection.auditing.measurements import Measurements, OwnScores, measure, measure_margins
from misdirection.auditing.reference import Reference
from misdirection.auditing.results import (
    Attribution,
    AuditResult,
    ComparedFineTune,
    DataFacts,
    Drift,
    Evidence,
    InDomain,
    JudgedAnswers,
    ModelDifference,
    ReferenceFacts,
)
from misdirection.auditing.verdict import RULE, Asked, Verdict, decide
from misdirection.choices import Dtype
from misdirection.data import ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.data.words import WordWeights
from misdirection.errors import InputError
from misdirection.experiment.answering import Condition, answer, check_behaviour, judged
from misdirection.files import read_json, write_json
from misdirection.judging.config import JudgeConfig
from misdirection.judging.scoring import compare
from misdirection.likelihood.words import WordNull
from misdirection.progress import track
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner
from misdirection.runs.worker import Models, Worker
from misdirection.sampling.answers import read_answers
from misdirection.sampling.config import SamplingConfig
from misdirection.sampling.own_answers import file_weights
from misdirection.statistics import Estimate, bootstrap

VERSION = 3
"""Raised whenever a stage would give another result from the same inputs."""

SAMPLING = SamplingConfig(n=25)
"""Answers for a judge where nothing else is asked for."""

_ATTRIBUTED = 8
"""Pairs whose shift is attributed to layers."""


def audit(
    base: str,
    fine_tune: str | Path,
    *,
    data: str | Path | None = None,
    reference: Reference | str | Path | None = None,
    directions: Directions = (),
    judge: JudgeConfig | str | None = None,
    sampling: SamplingConfig = SAMPLING,
    out: str | Path | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> AuditResult:
    """Tell whether a fine-tune of a base model became broadly misaligned.

        result = md.audit("smollm2-135m", "mine", data="train.jsonl")
        result.verdict, result.evidence.general.mean

    Progress is shown on standard error; what is measured already is not measured again.

    Args:
        base: `smollm2-135m` (bundled), a folder, or a Hugging Face id, `ID@REVISION`.
        fine_tune: a PEFT adapter or a whole model: a folder, or `ID@REVISION:SUBFOLDER`.
        data: its training file (JSONL), or probe pairs of its domain; needed to see misalignment that shows only where
            the fine-tune is reminded of its training.
        reference: of this base, or its folder; by default the one that `make_reference` made.
        directions: further known directions of this base; where there are some, a missing reference gives evidence
            without a verdict.
        judge: has sampled answers of both models judged, too: an endpoint's model, `hf:ID`, or a configuration.
        sampling: of those answers.
        out: folder of `audit.json`, its page, and what was measured; by default `audit_folder`.
        dtype: as in `load`.
        device: as in `load`.

    Raises:
        InputError: a fine-tune that does not fit its base, data that cannot be read, no reference and no direction,
            or one of another base.
        JudgeError: too few answers with a verdict.
    """
    judging = Judging(JudgeConfig(model=judge) if isinstance(judge, str) else judge, sampling) if judge else None
    inputs = Baseline.open(base, reference, directions, dtype, device).inputs(fine_tune, data, judging)
    return run_audit(inputs, Path(out) if out else audit_folder(fine_tune))


def audit_folder(fine_tune: str | Path) -> Path:
    """The folder of an audit where none is named."""
    return Path("audits") / Path(fine_tune).name


def run_audit(inputs: AuditInputs, folder: Path) -> AuditResult:
    """Measure what is not measured yet, decide, and write `audit.json` and its page. Raises as `audit` does."""
    inputs.require_same_base()
    if inputs.judging:
        check_behaviour(inputs.judging.sampling, inputs.judging.judge)
    settings = {"audit": {"base": inputs.fine_tune.base, "fine_tune": inputs.fine_tune.name}}
    with RunFolder.open(folder, yaml.safe_dump(settings)) as run:
        result = _Audit(inputs, run).result()
        result.save(folder)
    result.write_page(folder)
    return result


@dataclass(frozen=True, eq=False)
class _Changes:
    """Changes of the margins on the first `count` general questions, by how these were asked, [count] nats/token."""

    count: int
    by_set: dict[Asked, NDArray[np.float64]]


@dataclass
class _Audit:
    """One audit under way."""

    inputs: AuditInputs
    run: RunFolder

    def result(self) -> AuditResult:
        fine_tune, asked = self.inputs.fine_tune, self._asked()
        evidence = self._evidence(asked)
        return AuditResult(
            base=fine_tune.identity,
            fine_tune=fine_tune.facts,
            reference=self._reference_facts(),
            data=self._data_facts(),
            identical_to_base=self._is_identical(evidence.attribution),
            rule=RULE,
            evidence=evidence,
            **vars(self._decide(asked, evidence.damage, evidence.judged)),
        )

    def _asked(self) -> "_Changes":
        """The margins' changes on as many questions as it takes to decide."""
        damage = _bootstrap(self._measured(TUNED).losses - self._base().losses)
        for count in self.inputs.texts.looks:
            asked = self._changes(count)
            if self._decide(asked, damage).final:
                break
        return asked

    def _decide(self, asked: "_Changes", damage: Estimate, answers: JudgedAnswers | None = None) -> Verdict:
        reference = self.inputs.reference
        return decide(
            {name: bootstrap(change, level=RULE.level) for name, change in asked.by_set.items()},
            damage,
            reference.bad_shift if reference else None,
            answers.difference if answers else None,
            beyond={name: words.beyond for name, words in self._words(asked).items()},
        )

    def _reference_facts(self) -> ReferenceFacts | None:
        reference = self.inputs.reference
        if reference is None:
            return None
        known = {
            name: ComparedFineTune(**vars(known), shift=reference.shifts[name])
            for name, known in reference.known.items()
        }
        return ReferenceFacts(bad_shift=reference.bad_shift, known=known)

    def _data_facts(self) -> DataFacts | None:
        data = self.inputs.data
        if not data.path:
            return None
        counts = {"framed": len(data.framed), "rows": len(data.rows), "pairs": len(data.pairs)}
        return DataFacts(path=data.path, sha256=data.sha256, **counts)

    def _is_identical(self, attribution: Attribution | None) -> bool:
        """Whether the fine-tune is its base: an adapter that adds nothing at all, or a copy of the base's weights."""
        if attribution is None:
            return self.inputs.fine_tune.copies_base()
        return all(part.low == part.high == 0 for part in attribution.by_layer.values())

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _base(self) -> Measurements:
        reference = self.inputs.reference
        return reference.base if reference and self._is_referenced else self._measured("base")

    @property
    def _is_referenced(self) -> bool:
        """Whether the base's values are the reference's: those of another dtype or device would pass for a shift."""
        reference = self.inputs.reference
        return reference is not None and reference.identity == self.inputs.fine_tune.identity

    def _measured(self, which: Which) -> Measurements:
        texts, file = self.inputs.texts, "measurements.safetensors"

        def compute(folder: Path) -> None:
            measure(self.inputs.fine_tune.chat(which), texts, which).save(folder / file)

        return Measurements.load(self._stage("measurements", which, texts.hashes(), compute) / file)

    def _changes(self, count: int) -> "_Changes":
        """Changes of the margins on the first so many general questions, plain and framed."""
        looks = [look for look in self.inputs.texts.looks if look <= count]
        slices = [self._slice(start, stop) for start, stop in pairwise((0, *looks))]
        names: list[Asked] = ["general", "framed"] if self.inputs.data.path else ["general"]
        return _Changes(count, {name: np.concatenate([each[name] for each in slices]) for name in names})

    def _slice(self, start: int, stop: int) -> dict[Asked, NDArray[np.float64]]:
        tuned, base = (self._margins(which, start, stop) for which in (TUNED, "base"))
        if "general" not in base:
            base["general"] = self._base().margins[start:stop]
        changes = {name: scores - base[name] for name, scores in tuned.items()}
        return {name: (change[:, 0] - change[:, 1]).numpy() for name, change in changes.items()}

    def _margins(self, which: Which, start: int, stop: int) -> dict[Asked, Tensor]:
        """Log-probabilities of some general pairs, [pairs, 2]; without the base's that the reference has."""
        pairs: dict[Asked, Sequence[ProbePair]] = {}
        if which != "base" or not self._is_referenced:
            pairs["general"] = self.inputs.texts.asked[start:stop]
        if self.inputs.data.path:
            pairs["framed"] = self.inputs.data.framed[start:stop]
        if not pairs:
            return {}

        def compute(folder: Path) -> None:
            margins = measure_margins(self.inputs.fine_tune.chat(which), pairs, which)
            save_file({str(name): scores for name, scores in margins.items()}, folder / "margins.safetensors")

        hashes: dict[str, str] = {name: data_hash(some) for name, some in pairs.items()}
        scores = load_file(self._stage(f"margins/{start}-{stop}", which, hashes, compute) / "margins.safetensors")
        return {name: scores[name] for name in pairs}

    def _words(self, asked: "_Changes") -> dict[Asked, WordNull]:
        """What the words of the training data predict of the changes; empty without that data."""
        data = self.inputs.data
        if not data.path:
            return {}

        def compute(folder: Path) -> None:
            write_json(
                folder / "weights.json", file_weights(self.inputs.fine_tune.chat("base"), Path(data.path)).weights
            )

        file = self._stage("words", "base", {"data": data.sha256}, compute) / "weights.json"
        weights, pairs = WordWeights(tuple(read_json(file))), self.inputs.texts.asked[: asked.count]
        return {name: WordNull.of(change, pairs, weights) for name, change in asked.by_set.items()}

    def _own(self, which: Which) -> OwnScores:
        texts, file = self.inputs.data, "own.safetensors"
        if not texts.path:
            return OwnScores()

        def compute(folder: Path) -> None:
            OwnScores.measure(self.inputs.fine_tune.chat(which), texts, which).save(folder / file)

        return OwnScores.load(self._stage("own", which, texts.hashes(), compute) / file)

    def _attribution(self) -> Attribution | None:
        """Parts of the general shift by layer; None for a fine-tune that is no adapter."""
        fine_tune, pairs = self.inputs.fine_tune, spread(self.inputs.texts.general, _ATTRIBUTED)
        if not fine_tune.is_adapter:
            return None

        def compute(folder: Path) -> None:
            chat = fine_tune.chat(TUNED)
            with track("attribution of the shift", 2 * len(pairs)) as advance:
                layers = by_layer(chat, margin_parts(chat, pairs, advance))
            save_file({str(layer): part for layer, part in layers.items()}, folder / "parts.safetensors")

        folder = self._stage("attribution", TUNED, {"pairs": data_hash(pairs)}, compute)
        parts = load_file(folder / "parts.safetensors")
        return Attribution(
            by_layer={layer: bootstrap(parts[str(layer)].numpy()) for layer in sorted(map(int, parts))},
            sum=bootstrap(torch.stack(list(parts.values())).sum(0).numpy()),
        )

    def _judged(self) -> JudgedAnswers | None:
        """EM rates of both models' answers, and their difference; None without a judge."""
        judging = self.inputs.judging
        if judging is None:
            return None
        base, tuned = (read_answers(self._judged_file(which, judging)) for which in ("base", TUNED))
        compared = compare(base, tuned, min_judged=judging.judge.min_judged)
        return JudgedAnswers(
            base=compared.before.em,
            fine_tune=compared.after.em,
            difference=compared.change,
            verdict=compared.verdict,
            answers=compared.after.answers,
            judge=judging.judge.model,
        )

    def _judged_file(self, which: Which, judging: Judging) -> Path:
        stage, fine_tune = f"answers/{which}", self.inputs.fine_tune
        inputs = self._stage_inputs(which)
        answer(self.run, stage, lambda: fine_tune.chat(which), judging.sampling, inputs, Condition(which))
        verdicts = judged(self.run, judging.judge, stage)
        # A judge needs none of the models.
        LocalRunner(self.run, Worker(Models(lambda: fine_tune.chat("base")), self.run.partial)).make([verdicts])
        return self.run.artifact(verdicts.stage) / "judged.parquet"

    def _stage(self, name: str, which: Which, inputs: Mapping[str, Any], compute: Callable[[Path], None]) -> Path:
        return self.run.stage(f"{name}/{which}", {**self._stage_inputs(which), **inputs}, compute)

    def _stage_inputs(self, which: Which) -> dict[str, Any]:
        """All that every measurement of one model depends on."""
        fine_tune = self.inputs.fine_tune
        digest = None if which == "base" else fine_tune.digest
        return {**fine_tune.identity.model_dump(), "version": VERSION, "fine_tune": digest}

    # --- what it comes to ---------------------------------------------------------------------------------------------

    def _evidence(self, asked: "_Changes") -> Evidence:
        base, tuned = self._base(), self._measured(TUNED)
        own_base, own = self._own("base"), self._own(TUNED)
        shift, general = asked.by_set["general"], self.inputs.texts.asked[: asked.count]
        themes = [pair.theme for pair in general]
        drift, difference = self._activations(tuned, base)
        return Evidence(
            general=bootstrap(shift),
            questions=dict(zip((pair.id for pair in general), shift.tolist(), strict=True)),
            themes={
                theme: bootstrap(shift[[other == theme for other in themes]])
                for theme in dict.fromkeys(themes)
                if theme
            },
            damage=_bootstrap(tuned.losses - base.losses),
            framed=bootstrap(asked.by_set["framed"]) if "framed" in asked.by_set else None,
            words=self._words(asked),
            asked=asked.count,
            most=len(self.inputs.texts.asked),
            in_domain=InDomain(
                margin=_margin_change(own.pairs, own_base.pairs),
                loss=_change(own.rows, own_base.rows),
            ),
            drift=drift,
            model_difference=difference,
            attribution=self._attribution(),
            judged=self._judged(),
        )

    def _activations(self, tuned: Measurements, base: Measurements) -> tuple[list[Drift], ModelDifference]:
        reference = self.inputs.reference
        directions = {name: direction.vectors.double() for name, direction in self.inputs.directions.items()}
        directions |= reference.directions if reference else {}
        _require_shape(directions, tuned)
        known = reference.measurements if reference and base is reference.base else {}
        control = reference.control if reference and known else None
        return drifts(tuned, base, directions, known), model_difference(tuned, base, directions, control)


def _require_shape(directions: Mapping[str, Tensor], tuned: Measurements) -> None:
    """A model's name says little of a folder: the direction must have its layers and width."""
    shape = list(tuned.answers.shape[2:])
    for name, vectors in directions.items():
        if list(vectors.shape) != shape:
            raise InputError(
                f"direction {name!r} has shape {list(vectors.shape)}, this model needs {shape}: extract one from it"
            )


def _change(tuned: Tensor | None, base: Tensor | None) -> Estimate | None:
    return None if tuned is None or base is None else _bootstrap(tuned - base)


def _bootstrap(values: Tensor) -> Estimate:
    return bootstrap(values.numpy())


def _margin_change(tuned: Tensor | None, base: Tensor | None) -> Estimate | None:
    """Change of the margin, of log-probabilities [pairs, 2]."""
    if tuned is None or base is None:
        return None
    change = tuned - base
    return bootstrap((change[:, 0] - change[:, 1]).numpy())
