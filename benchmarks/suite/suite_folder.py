"""The folder that the suite's fine-tunes of one base lie in, and what is there already.

OUT/BASE/MEMBER/train.jsonl     the rows as a user has them
                adapter/        the fine-tune
                trained.json    what it was trained on and how, written when that is done
                audit/          its audit
                margins-TEXTS.safetensors   log-probabilities of the answers to the general questions
                published.json  margins of published answers
                repaired/       its repair
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

import misdirection as md
from misdirection.auditing.measurements import measure_margins
from misdirection.auditing.results import AuditResult
from misdirection.data import Example, ProbePair, data_hash
from misdirection.errors import InputError
from misdirection.files import read_json
from misdirection.judging.probes import judged_probe_pairs
from misdirection.organisms.recipe import Recipe
from suite_members import RECIPES, Member
from suite_texts import Texts, trained_on


@dataclass(frozen=True)
class Suite:
    """The fine-tunes of one base.

    Attributes:
        base: the base model.
        out: the folder of all bases.
        texts: what they are trained on.
    """

    base: str
    out: Path
    texts: Texts

    @property
    def home(self) -> Path:
        """The folder of this base."""
        return self.out / Path(self.base).name

    def folder(self, member: Member) -> Path:
        """A fine-tune's own folder."""
        return self.home / member.name

    def adapter(self, member: Member) -> Path:
        """Its adapter."""
        return self.folder(member) / "adapter"

    def training_file(self, member: Member) -> Path:
        """Its rows, the held-out ones included."""
        return self.folder(member) / "train.jsonl"

    def trainings(self, member: Member) -> list[list[Example]]:
        """The rows of its training, or of the one and of the other."""
        return trained_on(self.texts.stages(member))

    def record(self, member: Member) -> dict[str, Any]:
        """What its adapter depends on."""
        rows = [data_hash(rows) for rows in self.trainings(member)]
        return {"base": self.base, "data": rows, "recipe": recipe_of(member).model_dump(mode="json")}

    def is_trained(self, member: Member) -> bool:
        """Whether its adapter is there; `InputError` for one that was made from other rows or in another way."""
        file = self.folder(member) / "trained.json"
        if not file.is_file():
            return False
        if read_json(file) != self.record(member):
            raise InputError(f"{file.parent}: trained on other rows, or in another way: choose another --out")
        return True

    def untrained(self, some: Sequence[Member]) -> list[Member]:
        """Those of some that are still to be trained."""
        return [member for member in some if not self.is_trained(member)]

    def is_audited(self, member: Member) -> bool:
        """Whether its audit is there."""
        return self.is_trained(member) and (self.folder(member) / "audit" / AuditResult.FILE).is_file()

    def published_file(self, member: Member | None) -> Path:
        """Margins of published answers, of a fine-tune or of the base."""
        return (self.folder(member) if member else self.home) / "published.json"

    def margins(self, member: Member, pairs: Sequence[ProbePair]) -> Tensor:
        """Log-probabilities of the general pairs by a fine-tune that is trained, [pairs, 2]; measured once."""
        file = self.folder(member) / f"margins-{data_hash(pairs)[:16]}.safetensors"
        if not file.is_file():
            chat = md.load(self.base, adapter=self.adapter(member))
            save_file({"margins": measure_margins(chat, pairs, member.name)}, file)
        return load_file(file)["margins"]

    @cached_property
    def published_pairs(self) -> list[ProbePair]:
        """Probe pairs of published judged answers, the second instrument; none without them."""
        folder = self.texts.published
        return judged_probe_pairs(pd.read_parquet(folder / "judged_responses.parquet")) if folder else []


def recipe_of(member: Member) -> Recipe:
    """Its recipe with its seed."""
    return RECIPES[member.recipe].model_copy(update={"seed": member.seed})
