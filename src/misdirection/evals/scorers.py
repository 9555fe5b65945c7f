"""The paper's rubrics as a scorer of Inspect's, and the figures of `score` and of `margin` as its metrics.

A score holds `aligned` and `coherent`, 0 to 100, by log-probabilities where the judge gives some, and how they came
about. Verdicts come from the cache that `misdirection judge` has, and go there.
"""

from typing import TYPE_CHECKING

from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, Value, metric, scorer
from inspect_ai.solver import TaskState

from misdirection.evals.refusals import in_one_line

if TYPE_CHECKING:
    from misdirection.evals.panel import Panel

MARGIN = "margin"
"""The key in a sample's store under which its margin is."""


@metric(name="em", scores="unreduced")
def em_rates() -> Metric:
    """The figures of `misdirection score`: EM among all and among coherent answers, with intervals over questions.

    Beside them the shares of coherent, repetitive and truncated answers, and how many are unscored. EM and coherence
    are NaN where too few answers have a verdict for `score` to give any.
    """

    def compute(scores: list[SampleScore]) -> Value:
        from misdirection.evals.figures import em_figures

        return em_figures(scores)

    return compute


def panel_of(
    judge: str,
    rubric: str | list[str] | None,
    base_url: str | None,
    logprobs: bool,
    replies: int | None,
    timeout: float | None,
) -> "Panel":
    """Who judges, by the options of `judged`."""
    from misdirection.evals.panel import open_panel

    rubrics = tuple(rubric) if isinstance(rubric, list) else rubric
    return open_panel(judge, rubrics, base_url=base_url, logprobs=logprobs, samples=replies, timeout=timeout)


@scorer(metrics=[em_rates()])
def judged(
    judge: str,
    rubric: str | list[str] | None = None,
    base_url: str | None = None,
    logprobs: bool = True,
    replies: int | None = None,
    timeout: float | None = None,
) -> Scorer:
    """Puts the paper's rubrics to a judge about each answer; the options are those of `misdirection judge`.

    Args:
        judge: a model of an OpenAI-style endpoint, `hf:ID` for a local one, or `KIND:NAME` of another registered kind.
        rubric: alignment and coherence, the paper's, where it is left out; else names or YAML files of others.
        base_url: of the endpoint; by default OPENAI_BASE_URL, else OpenAI's.
        logprobs: score by log-probabilities, or read the number in the text.
        replies: so many are averaged where the text is read.
        timeout: seconds until a reply must be there.
    """
    from misdirection.sampling.logs import finish_of, question_of

    with in_one_line():
        panel = panel_of(judge, rubric, base_url, logprobs, replies, timeout)

    async def compute(state: TaskState, target: Target) -> Score:
        question = str(state.metadata.get("question_id", state.sample_id))
        with in_one_line():
            return await panel.score(
                question, question_of(state.input), state.output.completion, finish_of(state.output)
            )

    return compute


@metric(name="margin")
def mean_margin() -> Metric:
    """The mean over pairs, nats/token, with its interval over questions: that of `misdirection margin`."""

    def compute(scores: list[SampleScore]) -> Value:
        from misdirection.evals.figures import margin_figures

        return margin_figures(scores)

    return compute


@scorer(metrics=[mean_margin()])
def margin_score() -> Scorer:
    """The margin that the solver `answers_scored` has found."""

    async def compute(state: TaskState, target: Target) -> Score:
        return Score(value=state.store.get(MARGIN), metadata=dict(state.store.items()))

    return compute
