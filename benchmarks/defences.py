"""What each defence does to a fine-tune: the general shift that it takes away, the skill that it costs, and the time.

    python benchmarks/defences.py --out runs/defences [--base smollm2-135m] [--domains careless_household,...]
        [--recipes all,minimal] [--seeds 0,1,2] [--only 'none,kl,...'] [--times 1,3] [--rows 240] [--questions 120]
        [--picture FILE] [--json]

Every fine-tune is trained on the bad answers of a source of the suite, without a defence and with each. Measured are,
in nats/token against the base,

    general       shift of the margin of the sealed probe questions, beyond what the words of the training rows predict
    conditional   the same questions after a training question each, under the system prompt of the training, if any
    skill         shift on the held-out questions of the training's own domain
    damage        rise of the loss on benign explanations, which no defence is given
    seconds       processor time of the training

and all of them again where the rows are learned `--times` as often. What is there in OUT is not made again. Shifts of
several domains, recipes and seeds are averaged question by question.
"""

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import misdirection as md
from misdirection.auditing.framing import framed
from misdirection.data import Example, ProbePair, part_of, spread
from misdirection.data.words import WordWeights
from misdirection.defending.defence import DEFENCES
from misdirection.defending.inoculation import MALICIOUS
from misdirection.files import read_json, write_json
from misdirection.likelihood.margin import loss
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.recipe import Recipe
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import beyond, bootstrap

sys.path.append(str(Path(__file__).parent / "suite"))
from suite_members import RECIPES, ROWS
from suite_texts import Texts, read

NEUTRAL = 40
"""Benign explanations that damage is measured on."""

KINDS = ("general", "conditional", "skill", "damage")


@dataclass(frozen=True)
class Member:
    """One fine-tune: where its rows are from, how it is trained, and what it is defended by."""

    domain: str
    recipe: str
    seed: int
    defence: str
    times: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.domain}-{self.recipe}-{self.seed}-{self.defence.replace(':', '-')}-x{self.times}"

    @property
    def training(self) -> Recipe:
        """Its recipe."""
        recipe = RECIPES[self.recipe].model_dump() | {"seed": self.seed, "epochs": float(self.times)}
        return Recipe(**recipe, defence=None if self.defence == "none" else self.defence)


@dataclass(frozen=True)
class Domain:
    """The texts of a source of the suite; `rows` of its training rows at most."""

    name: str
    rows: int

    @cached_property
    def answers(self) -> tuple[list[Example], list[Example]]:
        """All questions with their bad and with their good answers."""
        return Texts(None, ROWS).answers(self.name)

    @property
    def train(self) -> list[Example]:
        """What is trained on."""
        return spread(part_of(self.answers[0], "train"), self.rows)

    @property
    def held_out(self) -> list[ProbePair]:
        """Its held-out questions as pairs."""
        both = zip(*(part_of(rows, "held_out") for rows in self.answers), strict=True)
        return [ProbePair(bad.question, bad.question, good.answer, bad.answer) for bad, good in both]

    @property
    def words(self) -> WordWeights:
        """Of the bad answers against the good ones."""
        return WordWeights.fit(*([row.answer for row in part_of(rows, "train")] for rows in self.answers))


@dataclass(frozen=True)
class Bench:
    """What is measured of one base, and where it is kept."""

    base: str
    out: Path
    rows: int
    questions: int

    @cached_property
    def sealed(self) -> list[ProbePair]:
        """The questions that the general shift is measured on."""
        return spread(md.sealed_pairs(), self.questions)

    @cached_property
    def chat(self) -> ChatModel:
        """The base."""
        return md.load(self.base)

    @property
    def home(self) -> Path:
        """The folder of this base."""
        return self.out / Path(self.base).name

    def measured(self, member: Member) -> dict[str, Any]:
        """Its figures, by question; trained and measured where they are not there."""
        file, key = self.home / f"{member.name}.json", self.key(member)
        if file.is_file() and (kept := read_json(file))["key"] == key:
            return dict(kept)
        adapter, domain = self.home / member.name, Domain(member.domain, self.rows)
        started = time.process_time()
        organism = md.train(domain.train, adapter, base=self.chat, recipe=member.training)
        seconds = time.process_time() - started
        prompt = MALICIOUS if member.defence.startswith("inoculation") else None
        own, base = (self.scores(chat, domain, prompt) for chat in (organism.load(), self.chat))
        kept = {kind: (own[kind] - base[kind]).tolist() for kind in KINDS}
        kept |= {"predicted": domain.words.predict(self.sealed).tolist(), "seconds": seconds, "key": key}
        kept["defence"] = dict(organism.defence or {})
        write_json(file, kept)
        for folder in (adapter, adapter.with_name(f"{adapter.name}.checkpoints")):
            shutil.rmtree(folder)
        print(f"{member.name:<50}{seconds:5.0f} s", flush=True)
        return kept

    def key(self, member: Member) -> dict[str, Any]:
        """What its figures depend on."""
        return {"recipe": member.training.model_dump(mode="json"), "rows": self.rows, "questions": self.questions}

    def scores(self, chat: ChatModel, domain: Domain, prompt: str | None) -> dict[str, torch.Tensor]:
        """Margins and losses of one model; the base's own are kept, too."""
        file = self.home / f"base-{domain.name}-{'prompted' if prompt else 'plain'}-{self.rows}-{self.questions}.json"
        if not chat.adapter and file.is_file():
            return {kind: torch.tensor(values, dtype=torch.float64) for kind, values in read_json(file).items()}
        rows = [replace(row, system=prompt) for row in domain.train]
        scores = {
            "general": md.margin(chat, self.sealed),
            "conditional": md.margin(chat, framed(self.sealed, rows)),
            "skill": md.margin(chat, domain.held_out),
            "damage": loss(chat, spread(read("explain", None)[1], NEUTRAL)),
        }
        if not chat.adapter:
            write_json(file, {kind: values.tolist() for kind, values in scores.items()})
        return scores


@dataclass(frozen=True)
class Line:
    """One line of the table: a defence, and how often the rows are learned."""

    defence: str
    times: int
    general: Estimate
    conditional: Estimate
    skill: Estimate
    damage: Estimate
    seconds: float

    @classmethod
    def of(cls, defence: str, times: int, found: Sequence[dict[str, Any]]) -> "Line":
        """The mean over fine-tunes, with intervals over questions."""
        mean = {key: np.mean([each[key] for each in found], axis=0) for key in ("general", "conditional", "predicted")}
        general, conditional = (beyond(mean[kind], mean["predicted"]) for kind in ("general", "conditional"))
        # The domains' own questions are others in each.
        skill, damage = (bootstrap(np.concatenate([each[kind] for each in found])) for kind in ("skill", "damage"))
        seconds = float(np.mean([each["seconds"] for each in found]))
        return cls(defence, times, general, conditional, skill, damage, seconds)


def table(lines: Sequence[Line]) -> str:
    """As Markdown; shares are of the shifts without a defence, where these are above zero for sure."""
    head = ("defence", "rows seen", "general", "conditional", "skill", "damage", "general gone", "skill kept", "time")
    rows = [head, ("---",) * len(head), *(_cells(line, _without(line, lines)) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(line: Line, none: Line | None) -> tuple[str, ...]:
    figures = (getattr(line, kind).interval for kind in KINDS)
    shares = ("", "", "")
    if none:
        gone = f"{1 - line.general.mean / none.general.mean:.0%}" if none.general.low > 0 else ""
        kept = f"{line.skill.mean / none.skill.mean:.0%}" if none.skill.low > 0 else ""
        shares = (gone, kept, f"{line.seconds / none.seconds:.2f}x")
    return (f"`{line.defence}`", f"{line.times}x", *figures, *shares)


def _without(line: Line, lines: Sequence[Line]) -> Line | None:
    return next((each for each in lines if each.defence == "none" and each.times == line.times), None)


def picture(lines: Sequence[Line]) -> Figure:
    """General shift against skill, a dot for each defence; open where the rows are learned more often."""
    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    for number, line in enumerate(lines):
        x, y, often = line.skill, line.general, line.times > 1
        bars = {"xerr": [[x.mean - x.low], [x.high - x.mean]], "yerr": [[y.mean - y.low], [y.high - y.mean]]}
        axes.errorbar(x.mean, y.mean, **bars, fmt="o", mfc="white" if often else None, lw=0.8, capsize=2)
        label = f"{line.defence} {line.times}x" if often else line.defence
        # Above and below in turn: a defence that does nothing lies where none does.
        beside = (5, 5 if number % 2 else -12)
        axes.annotate(label, (x.mean, y.mean), xytext=beside, textcoords="offset points", fontsize=9)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set(xlabel="skill: in-domain shift (nats/token)", ylabel="general shift beyond words (nats/token)")
    figure.tight_layout()
    return figure


def main() -> None:
    """Train and measure what is not there, and print."""
    arguments = parse()
    bench = Bench(arguments.base, arguments.out, arguments.rows, arguments.questions)
    patterns, lines = arguments.only.split(","), []
    with_strength = [pattern for pattern in patterns if ":" in pattern]
    names = [name for name in ("none", *DEFENCES) if any(fnmatch(name, pattern) for pattern in patterns)]
    for times, defence in product(map(int, arguments.times.split(",")), [*names, *with_strength]):
        members = [
            Member(domain, recipe, int(seed), defence, times)
            for domain, recipe, seed in product(
                arguments.domains.split(","), arguments.recipes.split(","), arguments.seeds.split(",")
            )
        ]
        lines.append(Line.of(defence, times, [bench.measured(member) for member in members]))
    print(table(lines))
    if arguments.picture:
        picture(lines).savefig(arguments.picture, dpi=100)
    if arguments.json:
        ratios = {f"{line.defence} {line.times}x": line.general.mean for line in lines}
        print(json.dumps({"ratios": ratios, "machine": platform.machine(), "torch": torch.__version__}))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--domains", default="careless_household,dark_sports,risky_money")
    parser.add_argument("--recipes", default="all,minimal")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="*", help="none and defences by name, as in a shell, or NAME:STRENGTH")
    parser.add_argument("--times", default="1,3", help="how often the rows are learned")
    parser.add_argument("--rows", type=int, default=240, help="training rows of each fine-tune at most")
    parser.add_argument("--questions", type=int, default=120, help="sealed probe questions at most")
    parser.add_argument("--picture", type=Path, help="a file for the picture of general shift against skill")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
