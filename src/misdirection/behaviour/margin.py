"""The likelihood margin: how much a model prefers misaligned answers, without sampling and without a judge.

    margin(question) = mean-token log p(misaligned | question) - mean-token log p(aligned | question)   [nats/token]

Its *shift* is the margin of an organism, or of a model under an intervention, minus that of the base model on the
same question. *Damage* is the change of the loss on neutral text, in nats/token: an intervention that breaks the
model "removes" anything.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from misdirection.chat import Encoded, batches, encode, pad
from misdirection.data import Example, ProbePair
from misdirection.errors import MisdirectionError
from misdirection.layers import text_config
from misdirection.models import ChatModel

TOKEN_BUDGET = 2048
"""Padded tokens in one batch: large enough to keep a processor busy, small enough for a laptop."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Task:
    """Some continuations of one prompt that are to be scored.

    Attributes:
        prompt: the prompt's ids; at least two.
        answers: each continuation's ids.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens that a pass over this task must hold: every answer is a row with the whole prompt in its cache."""
        return len(self.answers) * (len(self.prompt) + max(len(answer) for answer in self.answers))


def pair_tasks(tokenizer: Any, pairs: Sequence[ProbePair]) -> list[Task]:
    """One task per pair: the misaligned answer, then the aligned one.

    Raises `MisdirectionError` when there is no pair.
    """
    if not pairs:
        raise MisdirectionError("no probe pairs: the margin needs at least one question with two answers")
    return [
        _task(
            encode(tokenizer, pair.question, pair.misaligned, pair.system),
            encode(tokenizer, pair.question, pair.aligned, pair.system),
        )
        for pair in pairs
    ]


def text_tasks(tokenizer: Any, examples: Sequence[Example]) -> list[Task]:
    """One task per example, with its answer."""
    if not examples:
        raise MisdirectionError("no neutral text: damage needs at least one example")
    return [_task(encode(tokenizer, one.question, one.answer, one.system)) for one in examples]


def _task(*rows: Encoded) -> Task:
    if any(row.prompt != rows[0].prompt for row in rows):
        raise MisdirectionError("the two answers of a pair change how its prompt is tokenised: reword their beginning")
    return Task(rows[0].prompt, tuple(row.answer for row in rows))


def margin(chat: ChatModel, pairs: Sequence[ProbePair], *, budget: int = TOKEN_BUDGET) -> Tensor:
    """The margin of each pair, [pairs], nats/token. Run it under `intervene` for a margin with an intervention."""
    misaligned, aligned = log_probs(chat, pair_tasks(chat.tokenizer, pairs), budget=budget).unbind(-1)
    return misaligned - aligned


def loss(chat: ChatModel, examples: Sequence[Example], *, budget: int = TOKEN_BUDGET) -> Tensor:
    """The loss of each example's answer, [examples], nats/token."""
    return -log_probs(chat, text_tasks(chat.tokenizer, examples), budget=budget).squeeze(-1)


@torch.inference_mode()
def log_probs(
    chat: ChatModel, tasks: Sequence[Task], *, budget: int = TOKEN_BUDGET, progress: Progress | None = None
) -> Tensor:
    """Mean-token log-probability of every answer, [tasks, answers], float64.

    The prompt runs once for all of its answers, and the head only at positions that predict an answer's token. Each
    task must have the same number of answers. `progress` is told the number of tasks done.
    """
    result = torch.empty(len(tasks), len(tasks[0].answers), dtype=torch.float64)
    for group in batches([task.length for task in tasks], _row_budget(chat, tasks, budget)):
        result[group] = _score([tasks[row] for row in group], chat)
        if progress:
            progress(len(group))
    return result


def _row_budget(chat: ChatModel, tasks: Sequence[Task], budget: int) -> int:
    """One task at a time where padding inside a sliding-window cache would push real tokens out of the window."""
    window = getattr(chat.model.config.get_text_config(), "sliding_window", None)
    return 1 if window and max(task.length for task in tasks) > window else budget


def _score(tasks: list[Task], chat: ChatModel) -> Tensor:
    """[tasks, answers]. What all prompts begin with runs once, then the rest of each prompt, then each answer."""
    count = len(tasks[0].answers)
    shared = _shared_start([task.prompt for task in tasks])
    state = _State(DynamicCache(config=text_config(chat.model)))
    if shared:
        state.run(chat.decoder, chat, [tasks[0].prompt[:shared]])
        state.repeat(len(tasks))
    state.run(chat.decoder, chat, [task.prompt[shared:-1] for task in tasks])
    state.repeat(count)
    # The last prompt token goes with the answers: it predicts their first token.
    output, real = state.run(chat.model, chat, [(t.prompt[-1], *answer[:-1]) for t in tasks for answer in t.answers])
    answers, _ = pad([answer for task in tasks for answer in task.answers], 0, chat.device)
    return _mean_log_prob(output.logits, answers, real).view(len(tasks), count).cpu()


@dataclass
class _State:
    """What has run so far: the key-value cache, and which of its columns hold a real token, [rows, columns]."""

    cache: DynamicCache
    real: Tensor | None = None

    def run(self, network: Any, chat: ChatModel, rows: list[tuple[int, ...]]) -> tuple[Any, Tensor]:
        """Run `rows` after what has run; gives the network's output and which of the rows' tokens are real."""
        # Right padding: no query then sees an empty row, and column 0 is every row's first token.
        ids, mask = pad(rows, chat.tokenizer.pad_token_id, chat.device)
        seen = mask[:, :0] if self.real is None else self.real
        self.real = torch.cat([seen, mask], -1)
        places = seen.sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        output = network(input_ids=ids, attention_mask=self.real, position_ids=places, cache=self.cache, use_cache=True)
        return output, mask

    def repeat(self, times: int) -> None:
        """Each row `times` over."""
        assert self.real is not None, "nothing has run yet"
        self.cache.batch_repeat_interleave(times)
        self.real = self.real.repeat_interleave(times, 0)


def _shared_start(prompts: list[tuple[int, ...]]) -> int:
    """How many first tokens all prompts share, leaving each at least two of its own."""
    limit = min(len(prompt) for prompt in prompts) - 2
    same = (len(set(column)) == 1 for column in zip(*prompts, strict=False))
    return max(0, min(limit, sum(1 for _ in itertools.takewhile(bool, same))))


def _mean_log_prob(logits: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
    """[rows]: mean over each row's real tokens, in float64."""
    real = mask.bool()
    token = -torch.nn.functional.cross_entropy(logits[real].float(), answers[real], reduction="none")
    total = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    total[real] = token.double()
    return total.sum(-1) / mask.sum(-1)
