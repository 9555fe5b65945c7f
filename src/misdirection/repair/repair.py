"""Repair a fine-tune: take the general misalignment out of an adapter, keep what it learned, and say what it cost.

Beside OUT, `OUT.repair/` keeps the work: both audits, the gradients, and every candidate that was tried.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from misdirection.audit.audit import Request, audit_fine_tune
from misdirection.audit.attribution import adapted_layers
from misdirection.audit.fine_tune import TUNED
from misdirection.audit.texts import OwnTexts
from misdirection.data import Example, ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.errors import InputError
from misdirection.files import atomic_folder, read_json, require_replaceable, write_json
from misdirection.interventions.kinds import digest
from misdirection.interventions.writers import post_norms
from misdirection.likelihood.margin import pair_continuations, text_continuations
from misdirection.models.loading import ChatModel, attach
from misdirection.progress import track
from misdirection.repair.candidates import Candidate, Material, setting
from misdirection.repair.gradients import margin_directions
from misdirection.repair.search import (
    Outcome,
    Scores,
    Space,
    Tasks,
    Tried,
    choose,
    estimates,
    front,
    measure,
    outcome,
    search,
)
from misdirection.repair.fluency import is_broken, speak
from misdirection.repair.write import ablate_all, bake_weights, write_adapter
from misdirection.report.repair import write_card
from misdirection.runs.folder import RunFolder

RECORD = "repair.json"
TRIALS = 16
_FRAMED = 8
"""Most framed questions of a third."""

_TEXTS = ("pairs", "rows", "neutral")
_VERSION = 1


@dataclass(frozen=True)
class Third:
    """One third of all texts.

    Gradients are taken on the first, candidates tried on the second; the figures are those of the last, which the
    search has not seen.
    """

    pairs: tuple[ProbePair, ...]
    rows: tuple[Example, ...]
    neutral: tuple[Example, ...]

    def tasks(self, chat: ChatModel) -> Tasks:
        """Tokenised."""
        rows, neutral = (tuple(text_continuations(chat.tokenizer, some)) for some in (self.rows, self.neutral))
        return Tasks(tuple(pair_continuations(chat.tokenizer, self.pairs)), rows, neutral)


def thirds(
    general: Sequence[ProbePair], own: OwnTexts, neutral: Sequence[Example], shifts: Mapping[str, float]
) -> tuple[Third, Third, Third]:
    """All texts, dealt out in turn; a question is in one third, plain or framed.

    `shifts` are those of the fine-tune by the pair's id: questions are dealt from the largest down, so that the thirds
    have about the same shift to lose.
    """
    general = sorted(general, key=lambda pair: -shifts[pair.id])
    place = {pair.id: number % 3 for number, pair in enumerate(general)}

    def third(number: int) -> Third:
        framed = [pair for pair in own.framed if place[pair.id] == number]
        pairs = [*general[number::3], *spread(framed, _FRAMED)]
        rows = own.rows[number::3] or own.rows
        return Third(tuple(pairs), tuple(rows), tuple(neutral[number::3]))

    return third(0), third(1), third(2)


def repair_fine_tune(request: Request, folder: Path, *, bake: bool = False, check: bool = False) -> dict[str, Any]:
    """Audit a fine-tune and, where it is found misaligned, write a repaired one into `folder`; gives `repair.json`.

    A fine-tune that is not is left alone: nothing is written, and the result says so.

    Args:
        request: with `data`, which the skill is measured on.
        bake: write the whole model with the repaired adapter in it.
        check: audit the result.

    Raises:
        InputError: no adapter, no data, a folder in the way, or what `audit_fine_tune` raises.
    """
    _check(request, folder)
    work = folder.with_name(f"{folder.name}.repair")
    before = audit_fine_tune(request, work / "before")
    found: dict[str, Any] = {"before": before, "repaired": before["verdict"] in ("watch", "misaligned")}
    if not found["repaired"]:
        return found
    with RunFolder.open(work / "search", yaml.safe_dump({"repair": request.subject.name})) as run:
        found |= _Repair(request, run, before).write(folder, bake)
    if check:
        after = replace(request, subject=replace(request.subject, name=str(folder), folder=folder))
        if not (work / "after").exists():
            # What was measured on the base holds for both audits.
            shutil.copytree(work / "before", work / "after")
        found["after"] = audit_fine_tune(after, work / "after")
    write_json(folder / RECORD, found)
    return found


def _check(request: Request, folder: Path) -> None:
    subject = request.subject
    if not subject.is_adapter:
        raise InputError(
            f"{subject.name}: is a whole model, and a repair changes an adapter: give the adapter, or take a direction "
            "out of the weights with `misdirection bake`"
        )
    if not request.data.path:
        raise InputError("--data: give the training file: what is to be kept is measured on it")
    if request.reference is None:
        raise InputError("a repair needs the base's reference: make it once with `misdirection reference`")
    require_replaceable(folder)
    if subject.folder.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder}: holds the adapter itself, which is never written over: choose another --out")


@dataclass
class _Repair:
    """One repair under way."""

    request: Request
    run: RunFolder
    before: dict[str, Any]

    @cached_property
    def thirds(self) -> tuple[Third, Third, Third]:
        texts = self.request.texts
        return thirds(texts.general, self.request.data, texts.neutral, self.before["evidence"]["questions"])

    @cached_property
    def chat(self) -> ChatModel:
        return self.request.subject.chat(TUNED)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every stage depends on."""
        subject = self.request.subject
        texts = {name: [data_hash(getattr(part, name)) for part in self.thirds] for name in _TEXTS}
        return {**subject.identity, "version": _VERSION, "fine_tune": subject.digest, **texts}

    def material(self) -> Material:
        """The directions that raise the margin, and the reference's."""

        def compute(folder: Path) -> None:
            pairs = self.thirds[0].pairs
            with track("what raises the margin", 2 * len(pairs)) as advance:
                save_file(margin_directions(self.chat, pairs, advance), folder / "gradients.safetensors")

        gradients = load_file(self.run.stage("gradients", self.inputs, compute) / "gradients.safetensors")
        assert self.request.reference is not None, "it was checked"
        directions = torch.stack(list(self.request.reference.directions.values()))
        return Material(gradients, tuple(sorted(set(adapted_layers(self.chat).values()))), directions)

    def tried(self, material: Material, space: Space) -> list[Tried]:
        """All candidates with what they do on the second third; a killed search goes on."""
        inputs = {**self.inputs, "trials": TRIALS, "space": asdict(space), "directions": digest(material.directions)}

        def compute(folder: Path) -> None:
            path = self.run.partial("search") / "tried.json"
            begun = [Tried.from_dict(one) for one in read_json(path)] if path.exists() else []
            with track("candidates", TRIALS) as advance:
                advance(len(begun))
                ends, tasks = self.ends(1), self.thirds[1].tasks(self.chat)

                def try_them(batch: Sequence[Candidate]) -> list[Outcome]:
                    settings = [setting(one, material) for one in batch]
                    scores = measure(self.chat, tasks, settings)
                    advance(len(batch))
                    return [outcome(one, *ends) for one in scores]

                found = search(try_them, space, TRIALS, begun, lambda all_: write_json(path, _plain(all_)))
            write_json(folder / "tried.json", _plain(found))

        folder = self.run.stage("search", inputs, compute)
        return [Tried.from_dict(one) for one in read_json(folder / "tried.json")]

    def ends(self, third: int) -> tuple[Scores, Scores]:
        """Base and fine-tune on one third."""
        tasks = self.thirds[third].tasks(self.chat)
        with self.chat.as_base():
            (base,) = measure(self.chat, tasks, [()])
        (tuned,) = measure(self.chat, tasks, [()])
        return base, tuned

    def write(self, folder: Path, bake: bool) -> dict[str, Any]:
        """Search, choose, write, and measure what was written on what the search has not seen."""
        material = self.material()
        found = self.tried(material, self.space(material, bake))
        chosen = choose(found)
        with atomic_folder(folder) as temporary:
            base, tuned = self.ends(2)
            (control,) = measure(
                self.chat, self.thirds[2].tasks(self.chat), [setting(chosen.candidate, material.random())]
            )
            said = [speak(self.chat, "the fine-tune")]
            write_adapter(self.chat, self.request.subject.folder, chosen.candidate, material, temporary)
            # The base without its adapter; the fine-tune is loaded anew where it is needed again.
            plain = self.request.subject.chat("base")
            ablate_all(plain, temporary, chosen.candidate, material)
            repaired = attach(plain, temporary)
            (own,) = measure(repaired, self.thirds[2].tasks(repaired), [()])
            said.append(speak(repaired, "the repaired one"))
            repaired.model.unload()
            record = {
                "candidate": asdict(chosen.candidate),
                "search": asdict(chosen.outcome),
                "check": {
                    **asdict(outcome(own, base, tuned)),
                    "random": asdict(outcome(control, base, tuned)),
                    "spoken": {name: asdict(one) for name, one in zip(("fine_tune", "repaired"), said, strict=True)},
                    "broken": is_broken(*said),
                    "fine_tune": _as_dicts(estimates(tuned, base)),
                    "repaired": _as_dicts(estimates(own, base)),
                },
                "tried": _plain(found),
                "front": front(found),
            }
            if bake:
                bake_weights(plain, temporary)
            subject = self.request.subject
            write_card(record | {"before": self.before}, subject.base, subject.name, temporary, is_adapter=not bake)
            # The mark of a folder that a later repair may replace.
            write_json(temporary / RECORD, record)
        return record

    def space(self, material: Material, bake: bool) -> Space:
        """What may be tried on this model and adapter."""
        count, layers, _ = material.directions.shape
        post = any(post_norms(block) for block in self.chat.layers)
        tied = getattr(self.chat.model.config.get_text_config(), "tie_word_embeddings", False)
        depths = tuple(sorted({layers // 3, layers // 2, 2 * layers // 3}))
        return Space(0 if post else min(3, count), depths, writes=not (bake and tied))


def _as_dicts(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one.as_dict() for name, one in values.items()}


def _plain(tried: Sequence[Tried]) -> list[dict[str, Any]]:
    return [one.as_dict() for one in tried]
