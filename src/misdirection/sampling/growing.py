"""A table of answers that grows from start to start: its journal is the record, and the table is made from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from misdirection.data.tables import require_columns, table_suffix
from misdirection.errors import InputError
from misdirection.interventions.hooks import Setting
from misdirection.progress import track
from misdirection.sampling.answers import Answer, AnswerKey, Journal, answers_frame, read_answers, write_answers
from misdirection.sampling.collect import collect, in_order, require_same
from misdirection.sampling.engine import SamplingParameters, SamplingRequest
from misdirection.sampling.samplers import Sampler


def require_growing(table: Path) -> None:
    """Refuse a table of another form, and one that was not made from its journal: it would be written over."""
    table_suffix(table)
    if table.exists():
        require_columns(read_answers(table), AnswerKey._fields, str(table))
        if not _journal(table).exists():
            raise InputError(f"{table}: its journal {_journal(table).name} is missing: choose another --out")


def sample_into(
    table: Path,
    sampler: Sampler,
    requests: Sequence[SamplingRequest],
    parameters: SamplingParameters,
    *,
    organism: str,
    setting: Setting = (),
    intervention: str = "",
    how: Mapping[str, str | None] | None = None,
) -> list[Answer]:
    """Add a condition's answers to a table, with a bar of progress; those that are there are not sampled again.

    Args:
        table: .parquet or .csv; the journal beside it ends in .jsonl.
        requests: see `make_requests`.
        organism: what the answers say has answered.
        setting, intervention: what is done to the model meanwhile, and what the answers call it.
        how: what answers depend on besides the sampler and the parameters, as JSON has it.

    Gives the answers to `requests`. Raises `InputError` for a table that `require_growing` refuses, and for a condition
    that was sampled in another way.
    """
    require_growing(table)
    wanted = [replace(request, setting=setting) for request in requests]
    with Journal(_journal(table)) as journal, track(f"answers of {organism}", len(wanted)) as advance:
        require_same(journal, organism, intervention, {**sampler.how, **(how or {}), **asdict(parameters)})
        given = collect(
            sampler.start(),
            wanted,
            parameters,
            journal,
            organism=organism,
            intervention=intervention,
            progress=advance,
        )
        write_answers(_with_scores(answers_frame(in_order(journal.answers)), table), table)
    return given


def _journal(table: Path) -> Path:
    return table.with_suffix(".jsonl")


def _with_scores(answers: pd.DataFrame, table: Path) -> pd.DataFrame:
    """The answers, with the scores that those of them in the written table have."""
    if not table.exists():
        return answers
    keys = list(AnswerKey._fields)
    known = read_answers(table).drop_duplicates(keys)
    scores = known.columns.difference(answers.columns, sort=False).tolist()
    if not scores:
        return answers
    grown = answers.merge(known[[*keys, *scores]], on=keys, how="left")
    grown.attrs = known.attrs
    return grown
