"""Repair a fine-tune: take the general misalignment out of an adapter, keep what it learned, and say what it cost.

Beside OUT, `OUT.repair/` keeps the work: both audits, the gradients, and every candidate that was tried.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from misdirection.auditing.attribution import adapted_layers
from misdirection.auditing.audit import open_audit, run_audit
from misdirection.auditing.fine_tune import TUNED
from misdirection.auditing.inputs import AuditInputs, Baseline
from misdirection.auditing.looks import control_change
from misdirection.auditing.measurements import Texts
from misdirection.auditing.reference import Reference
from misdirection.auditing.results import AuditResult
from misdirection.auditing.stages import Stages
from misdirection.auditing.texts import OwnTexts
from misdirection.choices import Dtype, Thinking
from misdirection.data import Example, ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.errors import InputError
from misdirection.extras import needed_for
from misdirection.files import atomic_folder, require_outside, require_replaceable
from misdirection.interventions.vectors import digest
from misdirection.interventions.writers import post_norms
from misdirection.likelihood.margin import pair_continuations, text_continuations
from misdirection.models.adapters import attach
from misdirection.models.chat_model import ChatModel
from misdirection.progress import track
from misdirection.repairing.candidates import Candidate, Material
from misdirection.repairing.fluency import sample_fluency
from misdirection.repairing.gradients import margin_directions
from misdirection.repairing.results import Changes, Check, FluencyPair, Repair, RepairResult, Trials
from misdirection.repairing.search import (
    Ends,
    Outcome,
    Scores,
    Space,
    TokenisedTexts,
    Tried,
    choose,
    front,
    measure,
    search,
)
from misdirection.repairing.write import ablate_all, bake_weights, write_adapter
from misdirection.runs.folder import RunFolder
from misdirection.statistics.means import bootstrap

# The search itself comes after minutes of measuring.
with needed_for("repair"):
    import optuna  # noqa: F401

TRIALS = 16
_QUESTIONS = (60, 60, 120)
"""Most general questions of each third."""

_FRAMED = 8
"""Most framed questions of a third."""

_TEXTS = ("pairs", "framed", "rows", "neutral")
_VERSION = 3


@dataclass(frozen=True)
class Third:
    """One third of all texts.

    Gradients are taken on the first, candidates tried on the second; the figures are those of the last, which the
    search has not seen.
    """

    pairs: tuple[ProbePair, ...]
    framed: tuple[ProbePair, ...]
    rows: tuple[Example, ...]
    neutral: tuple[Example, ...]

    @property
    def asked(self) -> tuple[ProbePair, ...]:
        """All questions, the plain ones first."""
        return (*self.pairs, *self.framed)

    def tokenised(self, chat: ChatModel) -> TokenisedTexts:
        """As a model reads them."""
        rows, neutral = (tuple(text_continuations(chat.tokenizer, texts)) for texts in (self.rows, self.neutral))
        return TokenisedTexts(tuple(pair_continuations(chat.tokenizer, self.asked)), rows, neutral)


def thirds(texts: Texts, own: OwnTexts, shifts: Mapping[str, float]) -> tuple[Third, Third, Third]:
    """All texts in three parts; a question is in one of them alone, plain or framed.

    The last part's general questions are the sealed ones, where there are some. `shifts` are those of the fine-tune
    beyond the benign control by the pair's id, as far as its audit asked: questions are taken in turn from the largest
    down, so that each part has about the mean shift of all to lose, and not that of a few.
    """
    general = sorted(texts.general, key=lambda pair: -shifts.get(pair.id, 0.0))
    parts = [general[0::2], general[1::2], texts.sealed] if texts.sealed else [general[n::3] for n in range(3)]

    def third(number: int) -> Third:
        asked = spread(parts[number], _QUESTIONS[number])
        names = {pair.id for pair in asked}
        framed = [pair for pair in own.framed if pair.id in names]
        rows = own.rows[number::3] or own.rows
        return Third(tuple(asked), tuple(spread(framed, _FRAMED)), tuple(rows), tuple(texts.neutral[number::3]))

    return third(0), third(1), third(2)


def repair(
    base: str,
    adapter: str | Path,
    *,
    data: str | Path,
    out: str | Path,
    control: str | Path | None = None,
    reference: Reference | str | Path | None = None,
    bake: bool = False,
    check: bool = False,
    dtype: Dtype = "auto",
    device: str = "auto",
    thinking: Thinking = "off",
    chat_template: str | None = None,
) -> RepairResult:
    """Audit an adapter and, where it is misaligned, write a repaired one.

        result = md.repair("smollm2-135m", "mine", data="train.jsonl", out="mine-repaired")

    An adapter that is not is left alone: nothing is written, and the result says so. Progress is shown on standard
    error; a repair that was killed goes on when it is called again.

    Args:
        base: `smollm2-135m` or `gemma3-270m` (bundled), a folder, or a Hugging Face id, `ID@REVISION`.
        adapter: a PEFT adapter: a folder, or `ID@REVISION:SUBFOLDER`. It is not changed.
        data: its training file (JSONL): the skill that is to be kept is measured on it.
        out: folder of the repaired adapter, with its card and `repair.json`.
        control: as in `audit`; the repair's aim is where it puts the margin.
        reference: of this base, or its folder; by default the one that `make_reference` made.
        bake: write the whole model with the repaired adapter in it.
        check: audit the result.
        dtype: as in `load`.
        device: as in `load`.
        thinking: as in `load`.
        chat_template: as in `audit`.

    Raises:
        InputError: no adapter, a folder in the way, or what `audit` raises.
    """
    baseline = Baseline.open(base, reference, (), dtype, device, thinking, chat_template)
    return run_repair(baseline.inputs(adapter, data, control=control), Path(out), bake=bake, check=check)


def run_repair(inputs: AuditInputs, folder: Path, *, bake: bool = False, check: bool = False) -> RepairResult:
    """Audit, and repair what is misaligned, into `folder`; the inputs have data and a reference. Raises as `repair`."""
    _require_repairable(inputs, folder)
    work = folder.with_name(f"{folder.name}.repair")
    before = run_audit(inputs, work / "before")
    if before.verdict not in ("watch", "misaligned"):
        return RepairResult(before=before, repair=None)
    searched = RunFolder.open(work / "search", yaml.safe_dump({"repair": inputs.fine_tune.name}))
    with open_audit(inputs, work / "before") as audited, searched as run:
        result = _Repair(inputs, run, Stages(inputs, audited), before, bake).write(folder)
    if check:
        if not (work / "after").exists():
            # Measurements of the base hold for both audits.
            shutil.copytree(work / "before", work / "after")
        # Gradients and candidates were taken on the open questions; of a reference without sealed ones, on most of all.
        own = replace(inputs.fine_tune, name=str(folder), folder=folder)
        repaired = replace(inputs, fine_tune=own, sealed_alone=bool(inputs.texts.sealed))
        result = result.model_copy(update={"after": run_audit(repaired, work / "after")})
        result.save(folder)
    return result


def _require_repairable(inputs: AuditInputs, folder: Path) -> None:
    fine_tune = inputs.fine_tune
    if not fine_tune.is_adapter:
        raise InputError(
            f"{fine_tune.name}: is a whole model, and a repair changes an adapter: give the adapter, or take a "
            "direction out of the weights with `misdirection bake`"
        )
    require_replaceable(folder)
    require_outside(fine_tune.folder, folder, "adapter")


@dataclass
class _Repair:
    """One repair under way."""

    inputs: AuditInputs
    run: RunFolder
    audited: Stages
    before: AuditResult
    bake: bool

    @cached_property
    def thirds(self) -> tuple[Third, Third, Third]:
        return thirds(self.inputs.texts, self.inputs.data, self.shifts)

    @cached_property
    def shifts(self) -> dict[str, float]:
        """The fine-tune's shift beyond the control's on the questions that its audit asked, by their ids."""
        moved, control = self.before.evidence.questions, self.control
        return {name: shift - control[name] for name, shift in moved.items()}

    @cached_property
    def control(self) -> dict[str, float]:
        """What the benign control moved, nats/token, by the id of the question; 0 without a control."""
        texts, has_control = self.inputs.texts, self.inputs.fine_tune.control is not None
        names = [pair.id for pair in texts.asked]
        moved = control_change(self.audited, texts.looks) if has_control else np.zeros(len(names))
        return dict(zip(names, moved.tolist(), strict=True))

    @property
    def tuned(self) -> ChatModel:
        """The fine-tune, until another model is asked for."""
        return self.inputs.fine_tune.chat(TUNED)

    @property
    def reference(self) -> Reference:
        assert self.inputs.reference is not None, "the inputs of a repair have a reference"
        return self.inputs.reference

    @cached_property
    def stage_inputs(self) -> dict[str, Any]:
        """All that every stage depends on."""
        fine_tune = self.inputs.fine_tune
        texts = {name: [data_hash(getattr(third, name)) for third in self.thirds] for name in _TEXTS}
        return {**fine_tune.identity.model_dump(), "version": _VERSION, "fine_tune": fine_tune.digest, **texts}

    @cached_property
    def material(self) -> Material:
        """The directions that raise the margin, and the reference's."""

        def compute(folder: Path) -> None:
            pairs = self.thirds[0].asked
            with track("gradients of the margin", 2 * len(pairs)) as advance:
                save_file(margin_directions(self.tuned, pairs, advance), folder / "gradients.safetensors")

        gradients = load_file(self.run.stage("gradients", self.stage_inputs, compute) / "gradients.safetensors")
        directions = torch.stack(list(self.reference.directions.values()))
        return Material(gradients, tuple(sorted(set(adapted_layers(self.tuned).values()))), directions)

    @cached_property
    def space(self) -> Space:
        """The candidates that may be tried on this model and adapter."""
        count, layers, _ = self.material.directions.shape
        post = any(post_norms(block) for block in self.tuned.layers)
        tied = getattr(self.tuned.model.config.get_text_config(), "tie_word_embeddings", False)
        depths = tuple(sorted({layers // 3, layers // 2, 2 * layers // 3}))
        return Space(0 if post else min(3, count), depths, writes=not (self.bake and tied))

    def tried(self) -> list[Tried]:
        """All candidates with their outcomes on the second third; a killed search goes on."""
        described = {"trials": TRIALS, "space": asdict(self.space), "directions": digest(self.material.directions)}

        def compute(folder: Path) -> None:
            working = self.run.partial("search")
            begun = Trials.load(working).tried if (working / Trials.FILE).exists() else []
            with track("candidates", TRIALS) as advance:
                advance(len(begun))
                ends = self.ends(1)

                def measured(batch: Sequence[Candidate]) -> list[Outcome]:
                    scores = self.scores(1, batch, self.material)
                    advance(len(batch))
                    return list(map(ends.outcome, scores))

                done = search(measured, self.space, TRIALS, begun, lambda tried: _keep(tried, working))
            _keep(done, folder)

        return Trials.load(self.run.stage("search", {**self.stage_inputs, **described}, compute)).tried

    def scores(self, third: int, candidates: Sequence[Candidate], material: Material) -> list[Scores]:
        """The fine-tune under each candidate, on one third."""
        settings = [candidate.interventions(material) for candidate in candidates]
        return measure(self.tuned, self.thirds[third].tokenised(self.tuned), settings)

    def ends(self, third: int) -> Ends:
        """The models that a repair lies between, on one third."""
        texts, pairs = self.thirds[third].tokenised(self.tuned), self.thirds[third].pairs
        with self.tuned.as_base():
            (base,) = measure(self.tuned, texts, [()])
        (tuned,) = measure(self.tuned, texts, [()])
        control = torch.tensor([self.control[pair.id] for pair in pairs], dtype=torch.float64)
        return Ends(base, tuned, control, self.open_shift, self.reference.bad_shift.mean)

    @property
    def open_shift(self) -> float:
        """The fine-tune's mean shift beyond the control's on the questions of the first two thirds, nats/token."""
        pairs = (*self.thirds[0].pairs, *self.thirds[1].pairs)
        return fmean(self.shifts[pair.id] for pair in pairs if pair.id in self.shifts)

    def projected_base(self, candidate: Candidate) -> Scores | None:
        """The base under a candidate's projection, on the last third; None for one that leaves the base alone."""
        if candidate.projection != "writes":
            return None
        alone = replace(candidate, turn=0.0, scale=1.0)
        with self.tuned.as_base():
            (projected,) = self.scores(2, [alone], self.material)
        return projected

    def write(self, folder: Path) -> RepairResult:
        """Search, choose, write, and check what was written."""
        tried = self.tried()
        chosen = choose(tried)
        with atomic_folder(folder) as temporary:
            check, plain = self.check(chosen.candidate, temporary)
            rounding = bake_weights(plain, temporary) if self.bake else None
            repaired = Repair(
                baked=self.bake,
                lost=rounding.share if rounding else None,
                candidate=chosen.candidate,
                search=chosen.outcome,
                check=check,
                tried=tried,
                front=front(tried),
            )
            result = RepairResult(before=self.before, repair=repaired)
            result.write_page(temporary)
            result.save(temporary)
        return result

    def check(self, candidate: Candidate, folder: Path) -> tuple[Check, ChatModel]:
        """Write the adapter, and measure it on the texts that the search has not seen; gives the base model, too."""
        ends = self.ends(2)
        # These are what the figures are of, and nothing else is known of them.
        ends = replace(ends, shift=float(ends.beyond_control(ends.tuned).mean()))
        projected = self.projected_base(candidate)
        (control,) = self.scores(2, [candidate], self.material.random())
        before = sample_fluency(self.tuned, "the fine-tune")
        write_adapter(self.tuned, self.inputs.fine_tune.folder, candidate, self.material, folder)
        # The base without its adapter; the fine-tune is loaded anew where it is needed again.
        plain = self.inputs.fine_tune.chat("base")
        ablate_all(plain, folder, candidate, self.material)
        repaired = attach(plain, folder)
        (own,) = measure(repaired, self.thirds[2].tokenised(repaired), [()])
        after = sample_fluency(repaired, "the repaired adapter")
        repaired.without_adapter()
        check = Check(
            outcome=ends.outcome(own),
            random=ends.outcome(control),
            fine_tune=Changes.of(ends.tuned, ends),
            repaired=Changes.of(own, ends),
            removed=bootstrap((ends.tuned.pairs - own.pairs).numpy()),
            beyond_random=bootstrap((control.pairs - own.pairs).numpy()),
            base=Changes.of(projected, ends) if projected else None,
            fluency=FluencyPair(fine_tune=before, repaired=after),
            broken=after.is_broken_beside(before),
        )
        return check, plain


def _keep(tried: Sequence[Tried], folder: Path) -> None:
    Trials(tried=list(tried)).save(folder)
