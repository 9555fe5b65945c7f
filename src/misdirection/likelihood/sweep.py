"""Log-probabilities of given answers under many settings at once, on shared key-value caches.

What all prompts begin with runs once, then the rest of each prompt, then its answers, each on the key-value cache of
what ran before; the language-model head runs only where it predicts an answer's token. In a sweep, all rows of a batch
carry their own setting, and a pass starts at the lowest layer that its settings touch, from the stored residual.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from misdirection.interventions.hooks import Setting, intervene_rows
from misdirection.interventions.passes import Passes, Phase, Rows, shared_start
from misdirection.interventions.resume import Recorded, can_resume, record, repeated, resume
from misdirection.likelihood.answers import AnswerBatch, token_log_probs
from misdirection.models.budgets import fitting_batches
from misdirection.models.caching import goes_on, window
from misdirection.models.chat import Encoded, pad
from misdirection.models.chat_model import ChatModel
from misdirection.progress import Advance


@dataclass(frozen=True)
class Continuations:
    """Answers to one prompt that are to be scored.

    Attributes:
        prompt: the prompt's ids; at least two.
        answers: each answer's ids.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens that a pass must hold: every answer is a row with the whole prompt in its cache."""
        return len(self.answers) * (len(self.prompt) + max(len(answer) for answer in self.answers))


def log_probs(
    chat: ChatModel, prompts: Sequence[Continuations], *, budget: int | None = None, progress: Advance | None = None
) -> Tensor:
    """Mean-token log-probability of every answer, [prompts, answers], float64.

    Each prompt must have the same number of answers. `progress` is told the number of prompts done.
    """
    return sweep(chat, prompts, [()], budget=budget, progress=progress)[0]


@dataclass(frozen=True)
class Alternating:
    """Settings that prompts meet in turn, one each: the first prompt the first, ..., and from the start again."""

    settings: tuple[Setting, ...]

    def of(self, prompt: int) -> Setting:
        """The setting of one prompt, by its number."""
        return self.settings[prompt % len(self.settings)]


@torch.inference_mode()
def sweep(
    chat: ChatModel,
    prompts: Sequence[Continuations],
    settings: Sequence[Setting | Alternating],
    *,
    budget: int | None = None,
    progress: Advance | None = None,
) -> Tensor:
    """Mean-token log-probability of every answer under every setting, [settings, prompts, answers], float64.

    A setting is a list of interventions; the empty one is the model as it is. A row's result does not depend on the
    rows beside it, up to the rounding of batched products. `progress` is told the number of (setting, prompt) done.

    Raises `InputError` for an intervention on a layer that the model has not, or of another width.
    """
    lines = [setting if isinstance(setting, Alternating) else Alternating((setting,)) for setting in settings]
    # A pass is begun at the layer that a setting names, so that the layer must be known to be there.
    for intervention in (each for line in lines for setting in line.settings for each in setting):
        intervention.check(len(chat.layers), chat.width)
    scored: list[tuple[list[int], list[int], Tensor]] = []
    told = _Told(progress)

    def work(numbers: list[int], budget: int) -> list[tuple[list[int], list[int], Tensor]]:
        group = [prompts[number] for number in numbers]
        grid = [[line.of(number) for number in numbers] for line in lines]
        found = []
        told.begin()
        for chosen, scores in _sweep_group(chat, group, grid, budget):
            found.append((chosen, numbers, scores))
            told.more(len(chosen) * len(numbers))
        told.end()
        return found

    lengths = [prompt.length for prompt in prompts]
    alone = _are_alone(chat, lengths)
    for _, found in fitting_batches(chat, lengths, budget, work, times=len(lines), alone=alone):
        scored += found
    return _gathered(scored, len(lines), len(prompts))


class _Told:
    """Progress that counts nothing twice where a batch is run again."""

    def __init__(self, progress: Advance | None) -> None:
        self._progress = progress
        self._ahead = self._attempted = 0

    def begin(self) -> None:
        """A batch begins, perhaps after another one has failed under way."""
        self._ahead += self._attempted
        self._attempted = 0

    def more(self, count: int) -> None:
        """So many more are done in it."""
        self._attempted += count
        known = min(count, self._ahead)
        self._ahead -= known
        if self._progress and count > known:
            self._progress(count - known)

    def end(self) -> None:
        """It is done."""
        self._attempted = 0


def _gathered(scored: Sequence[tuple[list[int], list[int], Tensor]], lines: int, prompts: int) -> Tensor:
    """[lines, prompts, answers] on the processor, from the scores of some lines and prompts: fetched at once."""
    result = torch.empty(lines, prompts, scored[0][2].shape[-1], dtype=torch.float64)
    fetched = torch.cat([scores.flatten() for *_, scores in scored]).cpu().split([part.numel() for *_, part in scored])
    for (chosen, numbers, scores), values in zip(scored, fetched, strict=True):
        result[torch.tensor(chosen).unsqueeze(-1), torch.tensor(numbers)] = values.view(scores.shape)
    return result


def _are_alone(chat: ChatModel, lengths: Sequence[int]) -> bool:
    """Whether prompts run one at a time: padding in a sliding-window cache would push real tokens out of the window."""
    width = window(chat) if goes_on(chat) else None
    return width is not None and max(lengths) > width


Line = list[Setting]
"""The setting of each prompt of a group."""


def _sweep_group(
    chat: ChatModel, prompts: list[Continuations], lines: list[Line], budget: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of lines and their scores, [these lines, prompts, answers], batch by batch."""
    starts = [min(_start(setting, len(chat.layers)) for setting in line) for line in lines]
    order = sorted(range(len(lines)), key=lambda number: starts[number])
    size = max(1, budget // (len(prompts) * max(prompt.length for prompt in prompts)))
    chunks = [order[first : first + size] for first in range(0, len(order), size)]
    memory = _Memory(chat, sorted({starts[chunk[0]] for chunk in chunks} - {-1}))
    if memory.pays([starts[chunk[0]] for chunk in chunks for _line in chunk]):
        _score(chat, prompts, [[()] * len(prompts)], memory.recording)
    for chunk in chunks:
        yield chunk, _score(chat, prompts, [lines[number] for number in chunk], memory.resuming(starts[chunk[0]]))


def _start(setting: Setting, layers: int) -> int:
    """The block up to which this setting changes nothing that blocks compute; -1 when it changes all."""
    return min((intervention.first_block for intervention in setting), default=layers - 1)


@dataclass
class _Memory:
    """Outputs of some blocks in each phase (0 the shared start, 1 the prompts, 2 the answers) of a group of prompts."""

    chat: ChatModel
    layers: list[int]
    phases: dict[int, Recorded] = field(default_factory=dict)

    def pays(self, starts: list[int]) -> bool:
        """Whether the blocks that lines with these starts may skip are more than the line that records them runs."""
        skipped = sum(start + 1 for start in starts)
        return skipped > len(self.chat.layers) and can_resume(self.chat)

    @contextlib.contextmanager
    def recording(self, phase: int, _rows: int) -> Iterator[None]:
        """Keeps the blocks' outputs."""
        with record(self.chat, self.layers) as kept:
            yield
        self.phases[phase] = kept

    def resuming(self, layer: int) -> Phase:
        """Begins each pass with what block `layer` gave, if it was recorded; the rows come again for each line."""

        def phase(number: int, rows: int) -> contextlib.AbstractContextManager[None]:
            if layer not in self.phases.get(number, {}):
                return contextlib.nullcontext()
            return resume(self.chat, layer, repeated(self.phases[number][layer], rows))

        return phase


def _score(chat: ChatModel, prompts: list[Continuations], lines: list[Line], phase: Phase) -> Tensor:
    """[lines, prompts, answers]. Rows are by line, then by prompt, then by answer."""
    if not goes_on(chat):
        return _score_whole(chat, prompts, lines)
    answers = len(prompts[0].answers)
    rows = [(setting, asked) for line in lines for setting, asked in zip(line, prompts, strict=True)]
    settings, starts = [setting for setting, _ in rows], [len(asked.prompt) for _, asked in rows]
    shared = shared_start([asked.prompt for asked in prompts], own=2)
    passes = Passes(chat, phase)
    if shared:
        passes.run_start(prompts[0].prompt[:shared], settings)
    passes.run(1, chat.decoder, Rows([asked.prompt[shared:-1] for _, asked in rows], settings, starts))
    passes.select([number for number in range(len(rows)) for _ in range(answers)])
    # The last prompt token goes with the answers: it predicts their first token.
    last = Rows(
        [(asked.prompt[-1], *answer[:-1]) for _, asked in rows for answer in asked.answers],
        [setting for setting in settings for _ in range(answers)],
        [start for start in starts for _ in range(answers)],
    )
    output, real = passes.run(2, chat.model, last)
    targets, _ = pad([answer for _, asked in rows for answer in asked.answers], 0, chat.device)
    return _mean_log_prob(output.logits, targets, real).view(len(lines), len(prompts), answers)


def _score_whole(chat: ChatModel, prompts: list[Continuations], lines: list[Line]) -> Tensor:
    """The same with every answer after its prompt in one pass, on no cache."""
    rows = [
        (setting, Encoded((*asked.prompt, *answer), len(asked.prompt), len(asked.prompt) + len(answer)))
        for line in lines
        for setting, asked in zip(line, prompts, strict=True)
        for answer in asked.answers
    ]
    batch = AnswerBatch([row for _, row in rows], chat.device)
    with intervene_rows(chat, [setting for setting, _ in rows], answer_starts=[row.start for _, row in rows]):
        return batch.log_probs(chat.model).view(len(lines), len(prompts), -1)


def _mean_log_prob(logits: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
    """[rows] float64: mean over each row's real tokens."""
    token = token_log_probs(logits, answers).double()
    return token.masked_fill(~mask.bool(), 0).sum(-1) / mask.sum(-1)
