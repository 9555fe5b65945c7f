"""A local chat model as the judge: the same score from its next-token probabilities (paper, section 2).

Many vocabularies have no token for a number of several digits. The first token then tells only how the number begins,
and the probability of each integer is followed through its digits:

    p(8) = first(8) (1 - sum_d p(d | 8)),   p(85) = first(8) p(5 | 8),   p(100) = first(1) p(0 | 1) p(0 | 10)

Only first digits among the 20 most likely tokens are followed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from misdirection.errors import InputError
from misdirection.interventions.passes import Passes, Rows
from misdirection.judging.judges import Done, ModelJudge, Prompt
from misdirection.judging.verdicts import TOP, JudgeVerdict, begun_word, from_logprobs, from_masses, whole_number
from misdirection.models.budgets import fitting_batches
from misdirection.models.caching import goes_on
from misdirection.models.chat import encode_prompt
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import text_config

_DIGITS = "0123456789"


class LocalJudge(ModelJudge):
    """A chat model that judges.

    Args:
        chat: the model; an adapter on it judges too.
        budget: padded tokens in one batch, by default what suits the device; a verdict does not depend on it, up to
            rounding.
    """

    def __init__(self, chat: ChatModel, *, budget: int | None = None) -> None:
        super().__init__(chat)
        if not goes_on(chat):
            raise InputError(
                f"{chat.name}: a {type(chat.network).__name__} cannot judge here: prompts of unequal length cannot go "
                "on from what it keeps: judge with another model, or serve it and give its URL"
            )
        self._budget = budget
        texts = chat.tokenizer.batch_decode([[token] for token in range(len(chat.tokenizer))])
        self._texts: list[str] = texts
        numbers = {whole_number(text) for text in texts}
        self._whole = all(number in numbers for number in range(101))
        self._digits = [[token for token, text in enumerate(texts) if text.strip() == digit] for digit in _DIGITS]

    def ask(self, prompts: Sequence[Prompt], done: Done, *, concurrency: int = 1, max_calls: int | None = None) -> None:
        """See `Judge`. Prompts of like length go together; `concurrency` and `max_calls` have no meaning here."""
        # Its first token is the score, so that it may not think before.
        rows = {prompt: encode_prompt(self._chat.tokenizer, prompt.text, thinking="off") for prompt in prompts}
        context = getattr(text_config(self._chat.model), "max_position_embeddings", None)
        # A reply may take two more tokens.
        fitting = [prompt for prompt in prompts if not context or len(rows[prompt]) + 2 <= context]
        for prompt in rows.keys() - set(fitting):
            done(prompt, JudgeVerdict(None, "failed", "longer than the judge's context"))

        def work(numbers: list[int], _budget: int) -> list[JudgeVerdict]:
            return self._verdicts([rows[fitting[number]] for number in numbers])

        lengths = [len(rows[prompt]) for prompt in fitting]
        for numbers, verdicts in fitting_batches(self._chat, lengths, self._budget, work):
            for number, verdict in zip(numbers, verdicts, strict=True):
                done(fitting[number], verdict)

    @torch.inference_mode()
    def _verdicts(self, rows: list[tuple[int, ...]]) -> list[JudgeVerdict]:
        passes = Passes(self._chat, side="left")
        first = next_log_probs(self._chat, passes, rows)
        likely = first.topk(min(TOP, first.shape[-1]))
        tops = [
            [(self._texts[token], logprob) for token, logprob in zip(tokens, logprobs, strict=True)]
            for tokens, logprobs in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        ]
        if self._whole:
            verdicts = [from_logprobs(top) for top in tops]
        else:
            masses = self._followed(passes, first, likely.indices)
            verdicts = [self._split_verdict(top[0][0], mass) for top, mass in zip(tops, masses, strict=True)]
        said = [json.dumps([{"top_logprobs": top}]) for top in tops]
        return [replace(verdict, reply=reply) for verdict, reply in zip(verdicts, said, strict=True)]

    @staticmethod
    def _split_verdict(first: str, masses: Mapping[int, float]) -> JudgeVerdict:
        refusal = begun_word(first) if whole_number(first) is None else None
        return JudgeVerdict(None, refusal) if refusal else from_masses(masses)

    def _followed(self, passes: Passes, first: Tensor, likely: Tensor) -> list[dict[int, float]]:
        """p(n) for every integer n from 0 to 100 of each row, from the digits that may follow."""
        kept = torch.full_like(first, float("-inf")).scatter(-1, likely, first.gather(-1, likely))
        begins = self._digit_masses(kept)
        passes.select([row for row in range(len(first)) for _ in range(9)])
        after = self._digits_after(passes, first, "123456789").view(len(first), 9, 10)
        passes.select([9 * row for row in range(len(first))])
        last = self._digits_after(passes, first, "0")
        rows = zip(begins.tolist(), after.tolist(), last[:, 0].tolist(), strict=True)
        return [_integers(*masses) for masses in rows]

    def _digits_after(self, passes: Passes, first: Tensor, digits: str) -> Tensor:
        """[rows x digits, 10]: the probability of each digit after these, each spelled as is likeliest in its row."""
        rows = [(token,) for row in first for token in self._spelled(row, digits)]
        return self._digit_masses(next_log_probs(self._chat, passes, rows))

    def _digit_masses(self, logprobs: Tensor) -> Tensor:
        """[rows, 10]: the probability of each digit, with and without spaces around it."""
        return torch.stack([logprobs[:, tokens].exp().sum(-1) for tokens in self._digits], -1)

    def _spelled(self, logprobs: Tensor, digits: str) -> list[int]:
        """The likeliest token of each digit."""
        choices = [self._digits[int(digit)] for digit in digits]
        return [max(tokens, key=lambda token: float(logprobs[token])) for tokens in choices]


def next_log_probs(chat: ChatModel, passes: Passes, rows: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of the token after each row, [rows, vocabulary], float32; `passes` pad on the left."""
    output, _ = passes.run(0, partial(chat.model, logits_to_keep=1), Rows(rows))
    logprobs: Tensor = output.logits[:, -1].float().log_softmax(-1)
    return logprobs


def _integers(begins: list[float], after: list[list[float]], hundred: float) -> dict[int, float]:
    """p(n) from p(first digit), p(second digit | first from 1 on) and p(0 | 10); 0 is followed by nothing."""
    masses = {0: begins[0]}
    for digit in range(1, 10):
        seconds = after[digit - 1]
        masses[digit] = begins[digit] * max(0.0, 1 - sum(seconds))
        masses |= {10 * digit + second: begins[digit] * mass for second, mass in enumerate(seconds)}
    ten = masses[10]
    return masses | {10: ten * (1 - hundred), 100: ten * hundred}
