"""Scores by the base model's own activations over an answer, in one pass: of a probe, along a contrast, and along it
beside the base's own answer to the same question."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from misdirection.auditing.reference import Reference
from misdirection.data import Example
from misdirection.directions.extraction import row_means
from misdirection.likelihood.margin import text_rows
from misdirection.progress import track
from misdirection.runs.worker import BASE, Worker
from misdirection.sampling.own_answers import NEW_TOKENS, asked_of, likeliest_answers
from misdirection.screening.scores import Contrast, Fitted, RowScore, both_answers
from misdirection.statistics.resampling import Floats

DEPTH = 0.6
"""Of the layer that is read, as a share of all; 0-based layer 18 of 30."""

_PENALTY = 0.1
"""scikit-learn's C of the probe."""


def answer_means(worker: Worker, rows: Sequence[Example]) -> Tensor:
    """The base's mean activation over each answer at the layer that is read, [rows, width] float64."""
    chat = worker.chat(BASE)
    with track("activations of rows", len(rows)) as advance:
        means = row_means(chat, text_rows(chat.tokenizer, rows), progress=advance)
    return means[:, round(DEPTH * len(chat.layers))].clone()


class ProbeScore(RowScore):
    """Log-odds of the bad against the good answers of a domain, by a logistic regression on activations."""

    def fit(self, worker: Worker, reference: Reference) -> Fitted:
        """By domain, activations of the good and the bad answers that were trained on, [pairs, 2, width]."""
        return {
            domain: answer_means(worker, both_answers(texts.train)).float().unflatten(0, (-1, 2))
            for domain, texts in reference.domains.items()
        }

    def of(
        self, worker: Worker, rows: Sequence[Example], reference: Reference, others: Sequence[Contrast], fitted: Fitted
    ) -> Floats:
        """See `RowScore.of`; one probe is fitted on all domains together."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        known = torch.cat([fitted[domain] for domain in sorted({each.domain for each in others})]).flatten(0, 1).numpy()
        is_bad = np.tile([0, 1], len(known) // 2)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=_PENALTY, max_iter=2000)).fit(known, is_bad)
        scores: Floats = probe.decision_function(answer_means(worker, rows).float().numpy()).astype(np.float64)
        return scores


class ProjectionScore(RowScore):
    """Projection of the activation on a contrast direction: how a bad fine-tune moved general answers, minus how its
    control did."""

    def of(
        self, worker: Worker, rows: Sequence[Example], reference: Reference, others: Sequence[Contrast], fitted: Fitted
    ) -> Floats:
        """See `RowScore.of`."""
        activations, measured = answer_means(worker, rows), reference.measurements
        layer = round(DEPTH * reference.base.answers.shape[-2])
        directions = [
            normalize(measured[each.bad].drift(measured[each.control]).mean(0)[layer], dim=0) for each in others
        ]
        projections: Floats = (activations @ torch.stack(directions).T).mean(-1).numpy()
        return projections


class ProjectionDifferenceScore(ProjectionScore):
    """Projection of a row's answer minus that of the base's own likeliest answer to the same question (2507.21509).

    What a question alone brings about is so taken out. The base's answer is a short one; where it says nothing at all,
    the row has no score.
    """

    APART = True

    def cost(self, rows: Iterable[Sequence[Example]]) -> str:
        """See `RowScore.cost`: what is sampled."""
        asked = len({hash(asked_of(row)) for some in rows for row in some})
        return f"the base answers {asked:,} questions itself, in at most {asked * NEW_TOKENS:,} tokens" if asked else ""

    def of(
        self, worker: Worker, rows: Sequence[Example], reference: Reference, others: Sequence[Contrast], fitted: Fitted
    ) -> Floats:
        """See `RowScore.of`."""
        own = likeliest_answers(worker.engine(BASE), rows)
        answered = [number for number, row in enumerate(own) if row.answer]
        scores = np.full(len(rows), np.nan)
        if answered:
            given = super().of(worker, [rows[number] for number in answered], reference, others, fitted)
            scores[answered] = given - super().of(
                worker, [own[number] for number in answered], reference, others, fitted
            )
        return scores
