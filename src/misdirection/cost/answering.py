"""What sampled answers and a judge's scores of them take."""

from collections.abc import Iterator, Sequence

from misdirection.cost.model_cost import Pass
from misdirection.cost.text_passes import sampled_together, sampling_passes
from misdirection.cost.work import Piece, Subject
from misdirection.judging.api import FIRST_TOKENS, REPLY_TOKENS
from misdirection.judging.config import JudgeConfig
from misdirection.judging.rubrics import read_rubrics
from misdirection.models.chat import encode_prompt
from misdirection.sampling.questions import Question, read_questions
from misdirection.sampling.sample import make_requests

_BYTES_PER_TOKEN = 4
_DIGITS = 10
"""Rows of one token after a local judge's first: nine second digits and one third."""


def sampled(subject: Subject) -> Iterator[Piece]:
    """A few answers of every model, to read."""
    samples = subject.config.samples
    questions = [Question(text, text) for text in samples.questions]
    for name in subject.models if questions else ():
        yield _answered(subject, "sampled", name, name, questions, [1] * len(questions), samples.new_tokens)


def answers(subject: Subject) -> Iterator[Piece]:
    """Every model plainly and, where it is asked for, under an ablation and a random one."""
    sampling = subject.config.sampling
    if sampling is None:
        return
    conditions = ["plain", *([f"ablated-{sampling.ablate}", "ablated-random"] if sampling.ablate else [])]
    for model in subject.models:
        for condition in conditions:
            yield from answers_of(subject, model, condition)


def answers_of(subject: Subject, model: str, condition: str) -> Iterator[Piece]:
    """One model's answers by the paper's protocol; where there is a judge, with its scores."""
    sampling, judge = subject.config.sampling, subject.config.judge
    assert sampling is not None, "the caller has one"
    questions = [one for source in sampling.questions for one in read_questions(source)]
    counts = [len(make_requests([one], sampling.n)) for one in questions]
    name = f"{model}/{condition}"
    yield _answered(subject, "answers", name, model, questions, counts, sampling.new_tokens)
    if judge:
        asked = [
            (rubric.fill(question.text, ""), count)
            for rubric in read_rubrics(list(judge.rubrics))
            for question, count in zip(questions, counts, strict=True)
        ]
        length = subject.length(sampling.new_tokens)
        yield _judged_here(subject, name, asked, length) if subject.judge else _judged(judge, name, asked, length)


def _answered(
    subject: Subject,
    stage: str,
    name: str,
    model: str,
    questions: Sequence[Question],
    counts: Sequence[int],
    new_tokens: int,
) -> Piece:
    prompts = [len(encode_prompt(subject.chat.tokenizer, one.text, one.system)) for one in questions]
    passes = subject.on(model, sampling_passes(prompts, counts, new_tokens, subject.length(new_tokens)))
    rows = min(sum(counts), sampled_together(prompts, new_tokens))
    return Piece(stage, name, passes, room=rows * (max(prompts) + new_tokens))


_Asked = Sequence[tuple[str, int]]
"""Rubrics filled with the question alone, and how many answers each is put to."""


def _judged(judge: JudgeConfig, name: str, asked: _Asked, answer: float) -> Piece:
    """Calls of an endpoint, without retries; tokens at four bytes each."""
    each = 1 if judge.logprobs else judge.samples
    sizes = [(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN + answer) * count for text, count in asked]
    calls = each * sum(count for _, count in asked)
    return Piece(
        "judged",
        name,
        judge_calls=calls,
        judge_tokens_in=round(each * sum(sizes)),
        judge_tokens_out=calls * (FIRST_TOKENS if judge.logprobs else REPLY_TOKENS[0]),
    )


def _judged_here(subject: Subject, name: str, asked: _Asked, answer: float) -> Piece:
    """A local judge: every prompt once, and the digits that may follow."""
    judge = subject.judge
    assert judge is not None, "the caller has one"
    passes = []
    for text, count in asked:
        length = len(encode_prompt(judge.tokenizer, text)) + round(answer)
        passes += [Pass(1, length, head=1, repeats=count), Pass(_DIGITS, 1, length, head=_DIGITS, repeats=count)]
    return Piece("judged", name, judge_passes=passes)
