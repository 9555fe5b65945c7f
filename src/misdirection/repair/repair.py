"""Repair a fine-tune: take the general misalignment out of an adapter, keep what it learned, and say what it cost.

Beside OUT, `OUT.repair/` keeps the work: the audits before and after, the parts, and every candidate that was tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from misdirection.audit.audit import Request, audit
from misdirection.audit.carriers import loss_parts, margin_parts
from misdirection.audit.subject import TUNED
from misdirection.audit.texts import OwnTexts, own_texts
from misdirection.behaviour.margin import pair_tasks, text_tasks
from misdirection.data import Example, ProbePair, data_hash
from misdirection.errors import MisdirectionError
from misdirection.experiment.bench import spread
from misdirection.experiment.store import Run
from misdirection.files import atomic_folder, read_json, require_replaceable, write_json
from misdirection.interventions.kinds import digest
from misdirection.interventions.writers import post_norms
from misdirection.models import ChatModel, attach
from misdirection.progress import track
from misdirection.repair.candidates import Candidate, Material, setting
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
from misdirection.repair.write import bake_weights, write_adapter
from misdirection.report.repair import write_card

RECORD = "repair.json"
TRIALS = 24
_PAIRS, _FRAMED, _ROWS, _NEUTRAL = 16, 8, 12, 12
"""Texts of the search, and as many of the check."""

_TEXTS = ("pairs", "rows", "neutral")
_VERSION = 1


@dataclass(frozen=True)
class Half:
    """One half of the texts: of the search, or kept back for the check."""

    pairs: tuple[ProbePair, ...]
    rows: tuple[Example, ...]
    neutral: tuple[Example, ...]

    def tasks(self, chat: ChatModel) -> Tasks:
        """Tokenised."""
        pairs, rows, neutral = pair_tasks(chat.tokenizer, self.pairs), self.rows, self.neutral
        return Tasks(tuple(pairs), *(tuple(text_tasks(chat.tokenizer, some)) for some in (rows, neutral)))


def halves(general: Sequence[ProbePair], own: OwnTexts, neutral: Sequence[Example]) -> tuple[Half, Half]:
    """Two halves of all texts, by question: a question is in one of them, plain or framed."""
    searched = {pair.id for pair in general[::2]}

    def half(number: int) -> Half:
        plain = spread(general[number::2], _PAIRS)
        framed = [pair for pair in own.framed if (pair.id in searched) == (number == 0)]
        rows, texts = own.rows[number::2] or own.rows, neutral[number::2]
        return Half((*plain, *spread(framed, _FRAMED)), tuple(spread(rows, _ROWS)), tuple(spread(texts, _NEUTRAL)))

    return half(0), half(1)


def repair(request: Request, folder: Path, *, bake: bool = False, check: bool = False) -> dict[str, Any]:
    """Audit a fine-tune and, where it is found misaligned, write a repaired one into `folder`; gives `repair.json`.

    A fine-tune that is not is left alone: nothing is written, and the result says so.

    Args:
        request: with `data`, which the skill is measured on.
        bake: write the whole model with the repaired adapter in it.
        check: audit the result.

    Raises:
        MisdirectionError: no adapter, no data, a folder in the way, or what `audit` raises.
    """
    _check(request, folder)
    work = folder.with_name(f"{folder.name}.repair")
    before = audit(request, work / "before")
    found: dict[str, Any] = {"before": before, "repaired": before["verdict"] in ("watch", "misaligned")}
    if not found["repaired"]:
        return found
    with Run.open(work / "search", yaml.safe_dump({"repair": request.subject.name})) as run:
        found |= _Repair(request, run).write(folder, before, bake)
    if check:
        after = replace(request, subject=replace(request.subject, name=str(folder), folder=folder))
        found["after"] = audit(after, work / "after")
    write_json(folder / RECORD, found)
    return found


def _check(request: Request, folder: Path) -> None:
    subject = request.subject
    if not subject.is_adapter:
        raise MisdirectionError(
            f"{subject.name}: is a whole model, and a repair changes an adapter: give the adapter, or take a direction "
            "out of the weights with `misdirection bake`"
        )
    if request.data is None:
        raise MisdirectionError("--data: give the training file: what is to be kept is measured on it")
    if request.reference is None:
        raise MisdirectionError("a repair needs the base's reference: make it once with `misdirection reference`")
    require_replaceable(folder, RECORD)
    if subject.folder.resolve().is_relative_to(folder.resolve()):
        raise MisdirectionError(
            f"{folder}: holds the adapter itself, which is never written over: choose another --out"
        )


@dataclass
class _Repair:
    """One repair under way."""

    request: Request
    run: Run

    @cached_property
    def halves(self) -> tuple[Half, Half]:
        assert self.request.data is not None, "it was checked"
        texts = self.request.texts
        return halves(texts.general, own_texts(self.request.data, texts.general), texts.neutral)

    @cached_property
    def chat(self) -> ChatModel:
        return self.request.subject.chat(TUNED)

    def inputs(self) -> dict[str, Any]:
        """What every stage depends on."""
        subject = self.request.subject
        texts = {
            name: [data_hash(getattr(half, name)) for half in self.halves] for name in ("pairs", "rows", "neutral")
        }
        return {**subject.identity(), "version": _VERSION, "fine_tune": subject.digest(), **texts}

    def material(self) -> Material:
        """The components' parts, and the reference's directions."""

        def compute(folder: Path) -> None:
            half = self.halves[0]
            with track("what carries shift and skill", 2 * len(half.pairs) + len(half.rows)) as advance:
                margin = margin_parts(self.chat, half.pairs, advance)
                loss = loss_parts(self.chat, half.rows, advance)
            save_file(margin, folder / "margin.safetensors")
            save_file(loss, folder / "loss.safetensors")

        folder = self.run.stage("parts", self.inputs(), compute)
        assert self.request.reference is not None, "it was checked"
        directions = torch.stack(list(self.request.reference.directions.values()))
        return Material.of(load_file(folder / "margin.safetensors"), load_file(folder / "loss.safetensors"), directions)

    def tried(self, material: Material, space: Space) -> list[Tried]:
        """All candidates with what they do on the half of the search; a killed search goes on."""
        inputs = {**self.inputs(), "trials": TRIALS, "space": asdict(space), "directions": digest(material.directions)}

        def compute(folder: Path) -> None:
            path = self.run.partial("search") / "tried.json"
            begun = [Tried.from_dict(one) for one in read_json(path)] if path.exists() else []
            with track("candidates", TRIALS) as advance:
                advance(len(begun))
                ends = self.ends(0)

                def try_them(batch: Sequence[Candidate]) -> list[Outcome]:
                    settings = [setting(one, material) for one in batch]
                    scores = measure(self.chat, self.halves[0].tasks(self.chat), settings)
                    advance(len(batch))
                    return [outcome(one, *ends) for one in scores]

                found = search(try_them, space, TRIALS, begun, lambda all_: write_json(path, _plain(all_)))
            write_json(folder / "tried.json", _plain(found))

        folder = self.run.stage("search", inputs, compute)
        return [Tried.from_dict(one) for one in read_json(folder / "tried.json")]

    def ends(self, half: int) -> tuple[Scores, Scores]:
        """Base and fine-tune on one half."""
        tasks = self.halves[half].tasks(self.chat)
        with self.chat.as_base():
            (base,) = measure(self.chat, tasks, [()])
        (tuned,) = measure(self.chat, tasks, [()])
        return base, tuned

    def write(self, folder: Path, before: dict[str, Any], bake: bool) -> dict[str, Any]:
        """Search, choose, write, and measure what was written on the half that the search has not seen."""
        material = self.material()
        found = self.tried(material, self.space(material, bake))
        chosen = choose(found)
        with atomic_folder(folder) as temporary:
            # The base without its adapter; the fine-tune is loaded anew where it is needed again.
            base, tuned = self.ends(1)
            plain = self.request.subject.chat("base")
            write_adapter(plain, self.request.subject.folder, chosen.candidate, material, temporary)
            repaired = attach(plain, temporary)
            (own,) = measure(repaired, self.halves[1].tasks(repaired), [()])
            repaired.model.unload()
            record = {
                "candidate": asdict(chosen.candidate),
                "search": asdict(chosen.outcome),
                "check": {
                    **asdict(outcome(own, base, tuned)),
                    "fine_tune": _as_dicts(estimates(tuned, base)),
                    "repaired": _as_dicts(estimates(own, base)),
                },
                "tried": _plain(found),
                "front": front(found),
            }
            if bake:
                bake_weights(plain, temporary)
            subject = self.request.subject
            write_card(record | {"before": before}, subject.base, subject.name, temporary, is_adapter=not bake)
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
