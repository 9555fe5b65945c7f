"""Whether what a fine-tune itself says to general questions tells bad fine-tunes from benign ones.

    python benchmarks/suite/own_answers.py --out runs/audit-suite [--published DIR] [--only PATTERN]

Its likeliest answer to every open question is scored by the reference: log-probability under the bad fine-tunes minus
that under their controls, nats/token, mean over domains. What is measured is kept in `screened/BASE.said.jsonl`, and
not measured again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

import misdirection as md
from audit_suite import load_reference
from misdirection.auditing.reference import Reference
from misdirection.data import Example
from misdirection.models.chat_model import ChatModel
from misdirection.runs.worker import Models, Worker
from misdirection.sampling.own_answers import likeliest_answers
from misdirection.sampling.transformers_engine import TransformersEngine
from misdirection.screening.scores import SCORES, score_rows
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap
from screen_suite import is_kept, measure_all, plain_members, read_kept
from suite_folder import Suite
from suite_members import Member
from suite_options import suite_parser
from suite_tables import area, interval, print_auroc
from suite_texts import Texts

SAID = ".said"
"""Names the file of what is kept."""


def measure_said(suite: Suite, some: Sequence[Member]) -> None:
    """Train and measure what is not measured yet."""
    reference = load_reference(suite.base)

    def figures(member: Member) -> dict:
        return {"said": asdict(score(reference, md.load(suite.base, adapter=suite.adapter(member))))}

    measure_all(suite, some, figures, SAID)


def score(reference: Reference, chat: ChatModel) -> Estimate:
    """How much more the answers of a model are at home in the reference's bad fine-tunes than in their controls."""
    asked = [Example(pair.question, "", pair.system) for pair in reference.texts.general]
    answers = [row for row in likeliest_answers(TransformersEngine(chat), asked) if row.answer]
    models = Models(partial(md.load, reference.identity.model), dict(reference.adapters))
    way = SCORES["likelihood"].open(None)
    return bootstrap(score_rows(way, Worker(models, Path), answers, reference, {}))


def show(base: str, some: Sequence[Member]) -> dict[str, float]:
    """Print what was measured, the highest first, and how well it tells; gives the area."""
    known = read_kept(base, SAID)
    measured = {member: Estimate(**known[member.name]["said"]) for member in some if member.name in known}
    print("| fine-tune | kind | its answers, nats/token |\n|---|---|---|")
    for member, said in sorted(measured.items(), key=lambda each: -each[1].mean):
        print(f"| {member.name} | {member.kind} | {interval(said)} |")
    bad = np.array([member.is_bad for member in measured])
    if bad.all() or not bad.any():
        return {}
    told = area(np.array([said.mean for said in measured.values()]), bad)
    print(f"\nAUROC {print_auroc(told)}")
    return {"AUROC by its own answers": told.mean}


def main() -> None:
    """Measure, and print."""
    arguments = suite_parser(__doc__).parse_args()
    suite = Suite(arguments.base, arguments.out, Texts(arguments.published))
    some = [member for member in plain_members(arguments.only) if is_kept(member.source)]
    some = [member for member in some if not suite.texts.missing(member)]
    measure_said(suite, some)
    figures = show(suite.base, some)
    if arguments.json:
        print(json.dumps({"ratios": figures}))


if __name__ == "__main__":
    main()
