"""A file of answers that is judged, in its place or into a file of its own."""

from pathlib import Path

from misdirection.data.tables import table_suffix
from misdirection.files import require_replaceable
from misdirection.judging.config import JudgeConfig
from misdirection.judging.evidence import rows_for
from misdirection.judging.judge import Judged, JudgingCost, TooFewVerdicts, judge, judging_cost
from misdirection.judging.rubrics import read_rubrics
from misdirection.progress import notice, track
from misdirection.sampling.answers import read_answers, write_answers


def judge_file(path: Path, target: Path, config: JudgeConfig, *, plan_only: bool = False) -> JudgingCost | Judged:
    """Judge the answers in `path` and write them to `target`, also where too many have no verdict.

    Where there is only to be a plan, it gives what that would take. Raises as `judging.judge.judge` does, and
    `InputError` for a target that cannot be written, or holds another judge's verdicts.
    """
    table_suffix(target)
    # Judged in its own place, a table keeps all that it had.
    output = not (target == path or (target.exists() and path.exists() and target.samefile(path)))
    if output:
        require_replaceable(target, folder=False)
    rows, rubrics, who = read_answers(path), read_rubrics(list(config.rubrics)), config.open()
    if target != path:
        rows = rows_for(target, rows, who, rubrics)
    cost = judging_cost(rows, rubrics, who)
    notice(f"judging takes {cost}")
    if plan_only:
        return cost
    limits = config.model_dump(include={"concurrency", "max_calls"})
    with track("verdicts", cost.prompts + cost.cached) as advance:
        try:
            judged = judge(rows, rubrics, who, **limits, progress=advance)
        except TooFewVerdicts as error:
            write_answers(error.judged.table, target, output=output)
            raise
    write_answers(judged.table, target, output=output)
    return judged
