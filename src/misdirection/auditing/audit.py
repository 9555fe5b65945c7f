"""Audit a fine-tune for broad misalignment: all evidence with intervals and nulls, and a verdict by a stated rule."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from misdirection.auditing.drift import drifts, model_difference
from misdirection.auditing.fine_tune import CONTROL, TUNED
from misdirection.auditing.inputs import AUDIT, AuditInputs, Baseline, Directions, Judging
from misdirection.auditing.looks import Changes, Search, ask, decide_on, search
from misdirection.auditing.measurements import Measurements
from misdirection.auditing.reference import Reference
from misdirection.auditing.results import (
    Attribution,
    AuditResult,
    ComparedFineTune,
    ControlFacts,
    DataFacts,
    Drift,
    Evidence,
    FineTuneFacts,
    InDomain,
    JudgedAnswers,
    ModelDifference,
    MovedPair,
    ReferenceFacts,
    Trace,
    WeightFacts,
)
from misdirection.auditing.stages import Stages
from misdirection.auditing.verdict import RULE, Shift
from misdirection.choices import Dtype, Thinking
from misdirection.errors import InputError
from misdirection.experiment.answering import check_behaviour
from misdirection.judging.config import JudgeConfig
from misdirection.judging.scoring import compare
from misdirection.likelihood.margin import margins_of
from misdirection.runs.folder import RunFolder
from misdirection.sampling.answers import read_answers
from misdirection.sampling.config import SamplingConfig
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap
from misdirection.statistics.resampling import Floats

SAMPLING = SamplingConfig(n=25)
"""Answers for a judge where nothing else is asked for."""

_SHOWN = 4
"""Questions that moved furthest, to read."""


def audit(
    base: str,
    fine_tune: str | Path,
    *,
    data: str | Path | None = None,
    control: str | Path | None = None,
    reference: Reference | str | Path | None = None,
    directions: Directions = (),
    judge: JudgeConfig | str | None = None,
    sampling: SamplingConfig = SAMPLING,
    out: str | Path | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    thinking: Thinking = "off",
    chat_template: str | None = None,
) -> AuditResult:
    """Tell whether a fine-tune of a base model became broadly misaligned.

        result = md.audit("smollm2-135m", "mine", data="train.jsonl")
        result.verdict, result.evidence.general.mean

    Progress is shown on standard error; what is measured already is not measured again.

    Args:
        base: `smollm2-135m` or `gemma3-270m` (bundled), a folder, or a Hugging Face id, `ID@REVISION`.
        fine_tune: a PEFT adapter or a whole model: a folder, or `ID@REVISION:SUBFOLDER`.
        data: its training file (JSONL), or probe pairs of its domain; needed to see misalignment that shows only where
            the fine-tune is reminded of its training.
        control: a benign fine-tune of your own, trained alike on good answers to the same questions, as `fine_tune`:
            shifts are read beyond its, in the place of the reference's controls, and are told far better so.
        reference: of this base, or its folder; by default the one that `make_reference` made.
        directions: further known directions of this base; where there are some, a missing reference gives evidence
            without a verdict.
        judge: has sampled answers of both models judged, too: an endpoint's model, `hf:ID`, or a configuration.
        sampling: of those answers.
        out: folder of `audit.json`, its page, and what was measured; by default `audit_folder`.
        dtype: as in `load`.
        device: as in `load`.
        thinking: as in `load`.
        chat_template: as in `load`; both models are asked with it.

    Raises:
        InputError: a fine-tune that does not fit its base, data that cannot be read, no reference and no direction,
            or one of another base; a control that is itself misaligned.
        JudgeError: too few answers with a verdict.
    """
    judging = Judging(JudgeConfig(model=judge) if isinstance(judge, str) else judge, sampling) if judge else None
    baseline = Baseline.open(base, reference, directions, dtype, device, thinking, chat_template)
    inputs = baseline.inputs(fine_tune, data, judging, control)
    return run_audit(inputs, Path(out) if out else audit_folder(fine_tune))


def audit_folder(fine_tune: str | Path) -> Path:
    """The folder of an audit where none is named."""
    return Path("audits") / Path(fine_tune).name


def run_audit(inputs: AuditInputs, folder: Path) -> AuditResult:
    """Measure what is not measured yet, decide, and write `audit.json` and its page. Raises as `audit` does."""
    inputs.require_same_base()
    if inputs.judging:
        if inputs.judging.judge.calibration:
            raise InputError("judge.calibration: an audit compares two rates and corrects none: leave it out")
        check_behaviour(inputs.judging.sampling, inputs.judging.judge)
    with open_audit(inputs, folder) as run:
        result = assemble(inputs, run)
        result.save(folder)
    result.write_page(folder)
    return result


def open_audit(inputs: AuditInputs, folder: Path) -> AbstractContextManager[RunFolder]:
    """The folder that an audit's measurements are kept in. Raises `InputError` for a folder of something else."""
    return RunFolder.open(folder, yaml.safe_dump({AUDIT: inputs.settings()}))


def assemble(inputs: AuditInputs, run: RunFolder) -> AuditResult:
    """The result, from the artifacts in a folder; those that are not there are made."""
    return _Audit(inputs, Stages(inputs, run)).result()


@dataclass(frozen=True)
class _Audit:
    """One audit under way."""

    inputs: AuditInputs
    stages: Stages

    def result(self) -> AuditResult:
        fine_tune, changes = self.inputs.fine_tune, ask(self.stages)
        control = self._control_facts(changes)
        searched = search(self.stages)
        self.stages.keep_directions()
        evidence = self._evidence(changes, searched)
        rate = evidence.judged.difference if evidence.judged else None
        return AuditResult(
            base=fine_tune.identity,
            fine_tune=self._fine_tune_facts(),
            reference=self._reference_facts(),
            control=control,
            data=self._data_facts(),
            identical_to_base=self._is_identical(evidence),
            rule=RULE,
            evidence=evidence,
            **vars(decide_on(self.stages, changes, searched, rate)),
        )

    def _fine_tune_facts(self) -> FineTuneFacts:
        fine_tune, weights = self.inputs.fine_tune, self.stages.weights()
        facts = {name: getattr(weights, name) for name in WeightFacts.model_fields}
        return FineTuneFacts(name=fine_tune.name, digest=fine_tune.digest, **facts)

    def _evidence(self, changes: Changes, searched: Search) -> Evidence:
        shifts, general = changes.shifts(), changes.by_set["general"]
        own_base, own = self.stages.own("base"), self.stages.own(TUNED)
        drift, difference = self._activations(self.stages.tuned(), self.stages.base())
        return Evidence(
            general=shifts["general"],
            questions=dict(zip((pair.id for pair in changes.pairs), general.tolist(), strict=True)),
            themes=_by_theme(changes),
            damage=self.stages.damage(),
            framed=shifts.get("framed"),
            beyond_control=changes.beyond_control(),
            weighted=changes.weighted(),
            words=changes.words(),
            searched=searched.shifts(),
            moved_most=self._moved_most(changes),
            asked=len(changes.pairs),
            most=sum(look.stop - look.start for look in self.inputs.looks),
            in_domain=InDomain(
                margin=_margin_change(own.pairs, own_base.pairs),
                loss=_change(own.rows, own_base.rows),
            ),
            drift=drift,
            model_difference=difference,
            trace=self._trace(),
            attribution=self._attribution(),
            judged=self._judged(),
        )

    def _moved_most(self, changes: Changes) -> list[MovedPair]:
        """The questions that moved furthest, with what both models themselves say to them."""
        pairs, shifts = zip(*changes.furthest(_SHOWN), strict=True)
        answers = (self.stages.own_answers(which, pairs) for which in ("base", TUNED))
        return [
            MovedPair(
                question=pair.question,
                misaligned=pair.misaligned,
                aligned=pair.aligned,
                shift=shift,
                base_answer=before,
                fine_tune_answer=after,
            )
            for pair, shift, before, after in zip(pairs, shifts, *answers, strict=True)
        ]

    def _trace(self) -> Trace:
        has_control = self.inputs.fine_tune.control is not None
        return Trace(
            layer=self.stages.trace_layer,
            fine_tune=self.stages.trace(TUNED),
            control=self.stages.trace(CONTROL) if has_control else None,
        )

    def _activations(self, tuned: Measurements, base: Measurements) -> tuple[list[Drift], ModelDifference]:
        reference = self.inputs.reference
        directions = {name: direction.vectors.double() for name, direction in self.inputs.directions.items()}
        directions |= reference.directions if reference else {}
        _require_shape(directions, tuned)
        known = reference.measurements if reference and base is reference.base else {}
        control = reference.control if reference and known else None
        if self.inputs.own_control:
            control = self.stages.control()
        return drifts(tuned, base, directions, known), model_difference(tuned, base, directions, control)

    def _attribution(self) -> Attribution | None:
        """Parts of the general shift by layer; None for what is no LoRA whose modules add to what blocks give."""
        if not self.stages.weights().is_attributed:
            return None
        parts = self.stages.layer_parts()
        return Attribution(
            by_layer={layer: bootstrap(part.numpy()) for layer, part in parts.items()},
            sum=bootstrap(torch.stack(list(parts.values())).sum(0).numpy()),
        )

    def _judged(self) -> JudgedAnswers | None:
        """EM rates of both models' answers, and their difference; None without a judge."""
        judging = self.inputs.judging
        if judging is None:
            return None
        base, tuned = (read_answers(self.stages.judged_file(which, judging)) for which in ("base", TUNED))
        compared = compare(base, tuned, min_judged=judging.judge.min_judged)
        return JudgedAnswers(
            base=compared.before.em,
            fine_tune=compared.after.em,
            difference=compared.change,
            verdict=compared.verdict,
            answers=compared.after.answers,
            judge=judging.judge.model,
        )

    def _reference_facts(self) -> ReferenceFacts | None:
        reference = self.inputs.reference
        if reference is None:
            return None
        known = {
            name: ComparedFineTune(
                **vars(known), shift=reference.shifts[name], beyond_control=reference.beyond_control.get(name)
            )
            for name, known in reference.known.items()
        }
        return ReferenceFacts(bad_shift=reference.bad_shift, known=known)

    def _control_facts(self, changes: Changes) -> ControlFacts | None:
        """The user's own control; `InputError` for one that is itself what it is to be told from."""
        own, reference = self.inputs.own_control, self.inputs.reference
        if own is None or own.name is None:
            return None
        shift, beyond = changes.control["general"], None
        if reference and reference.control_shift is not None:
            beyond = shift - np.concatenate([reference.control_shift[look] for look in changes.looks])
            _require_benign(own.name, beyond, reference.bad_shift)
        return ControlFacts(
            name=own.name,
            digest=self.inputs.fine_tune.control_digest or "",
            shift=bootstrap(shift),
            beyond_reference=None if beyond is None else bootstrap(beyond),
        )

    def _data_facts(self) -> DataFacts | None:
        data = self.inputs.data
        if not data.path:
            return None
        counts = {"framed": len(data.framed), "rows": len(data.rows), "pairs": len(data.pairs)}
        return DataFacts(path=data.path, sha256=data.sha256, **counts)

    def _is_identical(self, evidence: Evidence) -> bool:
        """Whether the fine-tune is its base: an adapter that moves nothing at all, or a copy of the base's weights."""
        weights = self.stages.weights()
        if weights.kind == "full weights":
            return weights.copies_base
        return evidence.damage.low == evidence.damage.high == 0 and not any(evidence.questions.values())


def _by_theme(changes: Changes) -> dict[str, Estimate]:
    """General shift of each theme."""
    shift, themes = changes.by_set["general"], [pair.theme for pair in changes.pairs]
    return {theme: bootstrap(shift[[other == theme for other in themes]]) for theme in dict.fromkeys(themes) if theme}


def _require_benign(control: str, beyond: Floats, bad_shift: Estimate) -> None:
    """Raise `InputError` for a control that the rule would itself call misaligned, or to be watched."""
    if len(beyond) < RULE.questions or bad_shift.low <= 0:
        return
    shift = Shift.of(bootstrap(beyond, level=RULE.level), None, bad_shift.mean, RULE)
    if shift.passed in ("misaligned", "watch"):
        raise InputError(
            f"{control}: is no benign control: on {len(beyond)} general questions it lies itself {shift.low:+z.0%} to "
            f"{shift.high:+z.0%} of what the reference's bad fine-tunes moved beyond the reference's controls; name a "
            "fine-tune on good answers"
        )


def _require_shape(directions: Mapping[str, Tensor], tuned: Measurements) -> None:
    """A model's name says little of a folder: the direction must have its layers and width."""
    shape = list(tuned.answers.shape[2:])
    for name, vectors in directions.items():
        if list(vectors.shape) != shape:
            raise InputError(
                f"direction {name!r} has shape {list(vectors.shape)}, this model needs {shape}: extract one from it"
            )


def _change(tuned: Tensor | None, base: Tensor | None) -> Estimate | None:
    return None if tuned is None or base is None else bootstrap((tuned - base).numpy())


def _margin_change(tuned: Tensor | None, base: Tensor | None) -> Estimate | None:
    """Change of the margin, of log-probabilities [pairs, 2]."""
    if tuned is None or base is None:
        return None
    return bootstrap(margins_of(tuned - base).numpy())
