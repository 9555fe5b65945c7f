"""From artifacts to `results.json`: every figure with its 95% interval over questions and n. Nothing is run here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from misdirection.directions.convergence import (
    compare_tensors,
    cosines,
    project_away,
    shuffled,
    split_half,
)
from misdirection.directions.extraction import Means
from misdirection.judging.scoring import Score, compare_all, score
from misdirection.organisms.organism import Organism
from misdirection.sampling.answers import read_answers
from misdirection.statistics import auc, bootstrap

NEUTRAL = "neutral"

Factors = Mapping[str, Mapping[int, float]]
"""What adapters are multiplied by, by layer, by the name of the setting."""


@dataclass(frozen=True)
class Margins:
    """One model's measured log-probabilities: the table that a margin or cell stage wrote."""

    frame: pd.DataFrame

    @classmethod
    def read(cls, path: Path) -> "Margins":
        """Read the stage's table."""
        return cls(pd.read_parquet(path).set_index(["set", "id"]))

    def of(self, question_set: str) -> pd.Series:
        """Margin by question id, nats/token."""
        rows = self.frame.loc[question_set]
        return rows["misaligned"] - rows["aligned"]

    def loss(self) -> pd.Series:
        """Loss by neutral text, nats/token."""
        return -self.frame.loc[NEUTRAL]["aligned"]

    def auc(self, question_set: str) -> float:
        """AUROC of misaligned against aligned answers."""
        rows = self.frame.loc[question_set]
        return auc(rows["misaligned"].to_numpy(), rows["aligned"].to_numpy())

    @property
    def sets(self) -> list[str]:
        """The question sets."""
        return [name for name in self.frame.index.unique("set") if name != NEUTRAL]


def change(after: pd.Series, before: pd.Series) -> dict[str, Any]:
    """Mean change over the questions that both have, with its interval."""
    shared = after.index
    return bootstrap(after.to_numpy() - before.loc[shared].to_numpy()).as_dict()


def base_section(base: Margins) -> dict[str, Any]:
    """The base model's own margins and AUROC."""
    return {
        "base_margin": {name: bootstrap(base.of(name).to_numpy()).as_dict() for name in base.sets},
        "base_auc": {name: base.auc(name) for name in base.sets},
    }


def organism_section(organism: Organism, domain: str, answers: str, own: Margins, base: Margins) -> dict[str, Any]:
    """One organism: how it was trained, how far its margins shifted, and at what damage."""
    shifts = {name: change(own.of(name), base.of(name)) for name in base.sets}
    damage = change(own.loss(), base.loss())
    return {
        "recipe": organism.recipe.recipe,
        "domain": domain,
        "answers": answers,
        "trainable_parameters": organism.trainable_parameters,
        "train_pairs": organism.train_examples,
        "epochs": organism.recipe.epochs,
        "final_loss": organism.final_loss,
        "held_out_loss": organism.held_out_loss,
        "margin_shift": {**shifts, **({"in_domain": shifts[domain]} if domain in shifts else {})},
        "auc": {name: own.auc(name) for name in own.sets},
        "damage": damage["mean"],
        "damage_interval": damage,
    }


def intervention_row(measured: Margins, draws: Sequence[Margins], before: Margins) -> dict[str, Any]:
    """What one intervention changed in a model, beside the mean of its random controls."""
    general = measured.of("general")
    plain = before.of("general").loc[general.index].to_numpy()
    random = np.stack([draw.of("general").loc[general.index].to_numpy() - plain for draw in draws], axis=1)
    damage = change(measured.loss(), before.loss())
    return {
        "margin_change": bootstrap(general.to_numpy() - plain).as_dict(),
        "random_change": bootstrap(random).as_dict(),
        "damage": damage["mean"],
        "damage_interval": damage,
        "random_damage": float(np.mean([change(d.loss(), before.loss())["mean"] for d in draws])),
    }


def convergence_section(
    own: Mapping[str, Means], base: Mapping[str, Means], common: Mapping[str, Means], control: str | None
) -> dict[str, Any]:
    """Cosines by layer between organisms' directions, with their references.

    Args:
        own: each organism's means on its own domain's text.
        base: the base model's means on the same text, by organism.
        common: means of every organism, and of `base`, on one text that is the same for all.
        control: the organism trained on good answers.
    """
    data = {name: means.difference("misaligned", "aligned") for name, means in own.items()}
    text = {name: means.difference("misaligned", "aligned") for name, means in base.items()}
    return {
        "cosine": compare_tensors(data),
        "base_null": {name: cosines(data[name], text[name]) for name in data},
        "base_pair_null": compare_tensors(text),
        "control_null": _with_control(data, control),
        "shuffled_null": {name: shuffled(means) for name, means in own.items()},
        "split_half": {name: split_half(means) for name, means in own.items()},
        "model_difference": _model_difference(common, control),
    }


def _model_difference(common: Mapping[str, Means], control: str | None) -> dict[str, Any]:
    """Organism minus base on the same answers, with and without the control's drift."""
    base = common["base"]
    organisms = [name for name in common if name != "base"]
    drift = {name: common[name].vectors["all"] - base.vectors["all"] for name in organisms}
    removed: dict[str, Tensor] = {}
    if control:
        removed = {name: project_away(drift[name], drift[control]) for name in organisms if name != control}
    return {
        "cosine": compare_tensors(drift),
        "control_removed": compare_tensors(removed),
        "control_null": _with_control(drift, control),
        "split_half": {name: _drift_halves(common[name], base) for name in organisms},
    }


def _with_control(vectors: Mapping[str, Tensor], control: str | None) -> dict[str, list[float]]:
    if not control:
        return {}
    return {name: cosines(vector, vectors[control]) for name, vector in vectors.items() if name != control}


def _drift_halves(own: Means, base: Means) -> list[float]:
    first, second = (own.vectors[f"half_{i}/all"] - base.vectors[f"half_{i}/all"] for i in (0, 1))
    return cosines(first, second)


def behaviour_section(tables: Sequence[Path], min_judged: float) -> dict[str, Any]:
    """EM rates of judged answers by organism and intervention, and what changed against the base and by ablation.

    `min_judged` is the smallest share of a condition's answers that must have a verdict.
    """
    frame = pd.concat([read_answers(path) for path in tables], ignore_index=True)
    by = ["organism", "intervention"]
    return {
        "scores": [one.as_dict() for one in score(frame, by, min_judged=min_judged)],
        "by_question": [one.as_dict() for one in score(frame, [*by, "question_id"], min_judged=0.0)],
        "comparisons": [one.as_dict() for one in compare_all(list(_compared(frame)), min_judged=min_judged)],
    }


def _compared(frame: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Every organism beside the base, and every model under an intervention beside itself."""
    conditions = dict(iter(frame.groupby(["organism", "intervention"], sort=False)))
    for (organism, intervention), rows in conditions.items():
        before = conditions.get((organism, "") if intervention else ("base", ""))
        if before is not None and before is not rows:
            yield before, rows


def scaled_rows(plain: Path, scaled: Mapping[str, Path], settings: Factors, min_judged: float) -> list[dict[str, Any]]:
    """EM rates of one organism's judged answers: as it is, then with its adapters scaled, with the change against that.

    Args:
        plain: judged answers of the organism as it is.
        scaled: those under each setting.
        settings: the factors of each.
        min_judged: the smallest share of a setting's answers that must have a verdict.
    """
    before = read_answers(plain)
    (own,) = score(before, [], min_judged=min_judged)
    rows = [{"name": "as it is", "factors": {}, **_counted(own), "change": None, "verdict": None}]
    compared = compare_all([(before, read_answers(path)) for path in scaled.values()], min_judged=min_judged)
    for name, found in zip(scaled, compared, strict=True):
        change = found.change.as_dict()
        factors = {str(layer): factor for layer, factor in settings[name].items()}
        row = {"name": name, "factors": factors, **_counted(found.after)}
        rows.append({**row, "change": change, "verdict": found.verdict})
    return rows


def _counted(one: Score) -> dict[str, Any]:
    return {key: value for key, value in one.as_dict().items() if key != "group"}


def directions_section(vectors: Mapping[str, Tensor], layer: int, count: int = 5) -> dict[str, Any]:
    """Of each vector, [width]: its norm, and the channels that carry most of its squared norm."""
    return {name: {"layer": layer, **_carriers(vector.double(), count)} for name, vector in vectors.items()}


def _carriers(vector: Tensor, count: int) -> dict[str, Any]:
    top = (vector**2 / vector.dot(vector)).topk(min(count, len(vector)))
    shares = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return {
        "norm": float(vector.norm()),
        "top_channels": [{"channel": channel, "share": share} for channel, share in shares],
    }
