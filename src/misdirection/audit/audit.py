"""Audit a fine-tune for broad misalignment: all evidence with intervals and nulls, and a verdict by a stated rule."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.audit.attribution import by_layer, margin_parts
from misdirection.audit.drift import drifts, model_difference
from misdirection.audit.measurements import Reading, Texts, read
from misdirection.audit.reference import Reference
from misdirection.audit.fine_tune import TUNED, Subject, Which
from misdirection.audit.texts import OwnTexts
from misdirection.audit.verdict import RULE, decide
from misdirection.data import Example, ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.directions.direction import Direction
from misdirection.errors import InputError
from misdirection.experiment.answering import Condition, answer, check_behaviour, judged
from misdirection.files import write_json
from misdirection.judging.config import JudgeConfig
from misdirection.judging.scoring import compare
from misdirection.likelihood.margin import pair_continuations, text_continuations
from misdirection.likelihood.sweep import log_probs
from misdirection.models.loading import ChatModel
from misdirection.progress import track
from misdirection.report.audit import render_audit
from misdirection.runs.folder import RunFolder
from misdirection.sampling.answers import read_answers
from misdirection.sampling.config import SamplingConfig
from misdirection.statistics import Estimate, bootstrap

RECORD = "audit.json"
_CARRIED = 8
"""Pairs on which the adapters that carry the shift are found."""

VERSION = 1
"""Raised whenever a stage would give another result from the same inputs."""


@dataclass(frozen=True)
class Judging:
    """Answers of both models, and who judges them."""

    judge: JudgeConfig
    sampling: SamplingConfig


@dataclass(frozen=True)
class Request:
    """What to audit, and with what.

    Attributes:
        subject: the fine-tune and its base.
        reference: what to compare with; None gives evidence without a verdict.
        directions: further known directions of this base, by name.
        data: the fine-tune's own texts, as `own_texts` reads them.
        general: probe pairs where there is no reference.
        neutral: neutral texts where there is no reference.
        judging: None for an audit by likelihood alone.
    """

    subject: Subject
    reference: Reference | None
    directions: Mapping[str, Direction]
    data: OwnTexts
    general: Sequence[ProbePair]
    neutral: Sequence[Example]
    judging: Judging | None = None

    @property
    def texts(self) -> Texts:
        """What all models are measured on."""
        if self.reference:
            return self.reference.texts
        return Texts.of(self.general, self.neutral)


def audit_fine_tune(request: Request, folder: Path) -> dict[str, Any]:
    """Measure what is not measured yet, decide, and write `audit.json` and its page; gives what `audit.json` holds.

    Raises `InputError` for a fine-tune that does not fit its base, and a direction or reference of another one.
    """
    require_same_base(request)
    if request.judging:
        check_behaviour(request.judging.sampling, request.judging.judge)
    settings = {"audit": {"base": request.subject.base, "fine_tune": request.subject.name}}
    with RunFolder.open(folder, yaml.safe_dump(settings)) as run:
        found = _Audit(request, run).result()
        write_json(folder / RECORD, found)
    render_audit(found, folder)
    return found


def require_same_base(request: Request) -> None:
    """Raise `InputError` for a direction or reference of another base."""
    subject = request.subject
    if request.reference:
        request.reference.require_base(subject.base, subject.revision)
    for direction in request.directions.values():
        direction.require_base(subject.base, subject.revision)


@dataclass
class _Audit:
    """One audit under way."""

    request: Request
    run: RunFolder

    def __post_init__(self) -> None:
        self.identity = {**self.request.subject.identity, "version": VERSION}

    def result(self) -> dict[str, Any]:
        """Everything that `audit.json` holds."""
        readings: dict[Which, Reading] = {"base": self._base(), "fine-tune": self._reading(TUNED)}
        own: dict[Which, dict[str, Tensor]] = {which: self._own(which) for which in readings}
        evidence = self._margins(readings, own) | self._activations(readings)
        evidence |= {"carriers": self._carriers(), "judged": self._judged()}
        shifts = {"general questions": evidence["general"]}
        if evidence["framed"]:
            shifts["questions framed in its training domain"] = evidence["framed"]
        verdict = decide(
            {name: Estimate(**one) for name, one in shifts.items()},
            Estimate(**evidence["damage"]),
            self.request.reference.bad_shift if self.request.reference else None,
            Estimate(**evidence["judged"]["difference"]) if evidence["judged"] else None,
        )
        return {
            **self._header(),
            **verdict.as_dict(),
            "identical_to_base": self._identical(evidence["carriers"]),
            "rule": asdict(RULE),
            "evidence": evidence,
        }

    def _header(self) -> dict[str, Any]:
        subject, reference, own = self.request.subject, self.request.reference, self.request.data
        counts = {name: len(getattr(own, name)) for name in ("framed", "rows", "pairs")}
        return {
            "base": subject.identity,
            "fine_tune": {
                "name": subject.name,
                "kind": "adapter" if subject.is_adapter else "full weights",
                "recorded_base": subject.recorded_base(),
                "digest": subject.digest,
            },
            "reference": reference and {
                "bad_shift": reference.bad_shift,
                "known": {
                    name: {**asdict(one), "shift": reference.shifts[name].as_dict()}
                    for name, one in reference.known.items()
                },
            },
            "data": {"path": own.path, "sha256": own.sha256, **counts} if own.path else None,
        }  # fmt: skip

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _base(self) -> Reading:
        reference = self.request.reference
        # Numbers of another dtype or device differ by their rounding, which would pass for a shift.
        if reference and dict(reference.identity) == self.request.subject.identity:
            return reference.base
        return self._reading("base")

    def _reading(self, which: Which) -> Reading:
        texts = self.request.texts

        def compute(folder: Path) -> None:
            read(self.request.subject.chat(which), texts, which).save(folder / "reading.safetensors")

        return Reading.load(self._stage("reading", which, texts.hashes(), compute) / "reading.safetensors")

    def _own(self, which: Which) -> dict[str, Tensor]:
        """On the fine-tune's own texts: `framed` and `pairs` [pairs, 2], `rows` [rows], those that there are."""
        texts = self.request.data
        if not texts.path:
            return {}

        def compute(folder: Path) -> None:
            save_file(_own_scores(self.request.subject.chat(which), texts, which), folder / "own.safetensors")

        return load_file(self._stage("own", which, texts.hashes(), compute) / "own.safetensors")

    def _carriers(self) -> dict[str, Any] | None:
        """Parts of the general shift by layer; None for a fine-tune that is no adapter."""
        subject, pairs = self.request.subject, spread(self.request.texts.general, _CARRIED)
        if not subject.is_adapter:
            return None

        def compute(folder: Path) -> None:
            chat = subject.chat(TUNED)
            with track("what carries the shift", 2 * len(pairs)) as advance:
                layers = by_layer(chat, margin_parts(chat, pairs, advance))
            save_file({str(layer): part for layer, part in layers.items()}, folder / "parts.safetensors")

        folder = self._stage("carriers", TUNED, {"pairs": data_hash(pairs)}, compute)
        parts = load_file(folder / "parts.safetensors")
        return {
            "by_layer": {layer: bootstrap(part).as_dict() for layer, part in sorted(parts.items(), key=_number)},
            "sum": bootstrap(torch.stack(list(parts.values())).sum(0)).as_dict(),
        }

    def _judged(self) -> dict[str, Any] | None:
        """EM rates of both models' answers, and their difference; None without a judge."""
        judging = self.request.judging
        if judging is None:
            return None
        tables = {which: read_answers(self._answered(which, judging)) for which in ("base", TUNED)}
        found = compare(tables["base"], tables[TUNED], min_judged=judging.judge.min_judged)
        return {
            "base": asdict(found.before.em),
            "fine_tune": asdict(found.after.em),
            "difference": found.change.as_dict(),
            "verdict": found.verdict,
            "answers": found.after.answers,
            "judge": judging.judge.model,
        }

    def _answered(self, which: Which, judging: Judging) -> Path:
        stage, subject = f"answers/{which}", self.request.subject
        answer(self.run, stage, lambda: subject.chat(which), judging.sampling, self._inputs(which), Condition(which))
        verdicts = judged(self.run, judging.judge, stage)
        # A judge needs none of the models.
        self.run.stages(verdicts.stages, partial(verdicts.compute, None))
        return self.run.artifact(verdicts.stage) / "judged.parquet"

    def _stage(self, name: str, which: Which, inputs: Mapping[str, Any], compute: Any) -> Path:
        return self.run.stage(f"{name}/{which}", {**self._inputs(which), **inputs}, compute)

    def _inputs(self, which: Which) -> dict[str, Any]:
        """What everything measured on one model depends on."""
        return {**self.identity, "fine_tune": None if which == "base" else self.request.subject.digest}

    def _identical(self, carriers: dict[str, Any] | None) -> bool:
        """Whether the fine-tune is its base: an adapter that adds nothing at all, or a copy of the base's weights."""
        if carriers is not None:
            parts = [*carriers["by_layer"].values()]
            return all(one["low"] == one["high"] == 0 for one in parts)
        return self.request.subject.copies_base()

    # --- what it comes to ---------------------------------------------------------------------------------------------

    def _margins(self, readings: Mapping[Which, Reading], own: Mapping[Which, dict[str, Tensor]]) -> dict[str, Any]:
        shift = readings["fine-tune"].margin - readings["base"].margin
        themes = [pair.theme for pair in self.request.texts.general]
        change = {name: own["fine-tune"][name] - own["base"][name] for name in own["base"]}
        margins = {name: value[:, 0] - value[:, 1] for name, value in change.items() if name != "rows"}
        return {
            "general": _estimate(shift),
            "questions": dict(zip((pair.id for pair in self.request.texts.general), shift.tolist(), strict=True)),
            "themes": {
                theme: _estimate(shift[[one == theme for one in themes]]) for theme in dict.fromkeys(themes) if theme
            },
            "damage": _estimate(readings["fine-tune"].losses - readings["base"].losses),
            "framed": _estimate(margins.get("framed")),
            "in_domain": {"margin": _estimate(margins.get("pairs")), "loss": _estimate(change.get("rows"))},
        }

    def _activations(self, readings: Mapping[Which, Reading]) -> dict[str, Any]:
        reference = self.request.reference
        directions = {name: one.vectors.double() for name, one in self.request.directions.items()}
        directions |= reference.directions if reference else {}
        own, base = readings["fine-tune"], readings["base"]
        _require_shape(directions, own)
        known = reference.readings if reference and base is reference.base else {}
        control = reference.control if reference and known else None
        return {
            "drift": drifts(own, base, directions, known),
            "model_difference": model_difference(own, base, directions, control),
        }


def _own_scores(chat: ChatModel, texts: OwnTexts, which: Which) -> dict[str, Tensor]:
    sets = {name: getattr(texts, name) for name in ("framed", "pairs") if getattr(texts, name)}
    with track(f"own texts of {which}", sum(map(len, sets.values())) + len(texts.rows)) as advance:
        scores = {
            name: log_probs(chat, pair_continuations(chat.tokenizer, one), progress=advance)
            for name, one in sets.items()
        }
        scores["rows"] = -log_probs(chat, text_continuations(chat.tokenizer, texts.rows), progress=advance).squeeze(-1)
    return {name: score.contiguous() for name, score in scores.items()}


def _require_shape(directions: Mapping[str, Tensor], own: Reading) -> None:
    """A model's name says little of a folder: the direction must have its layers and width."""
    shape = list(own.answers.shape[2:])
    for name, vectors in directions.items():
        if list(vectors.shape) != shape:
            raise InputError(
                f"direction {name!r} has shape {list(vectors.shape)}, this model needs {shape}: extract one from it"
            )


def _estimate(values: Tensor | None) -> dict[str, Any] | None:
    return None if values is None else bootstrap(values.numpy()).as_dict()


def _number(item: tuple[str, Tensor]) -> int:
    return int(item[0])
