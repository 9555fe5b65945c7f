"""Log-probabilities of given answers, without and with interventions, many settings at once.

What all prompts begin with runs once, then the rest of each prompt, then its answers, each on the key-value cache of
what ran before; the language-model head runs only where it predicts an answer's token. In a sweep, all rows of a batch
carry their own setting, and a pass starts at the lowest layer that its settings touch, from the stored residual.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from misdirection.interventions.hooks import Setting
from misdirection.interventions.kinds import check, first_block
from misdirection.interventions.passes import Passes, Phase, Rows, shared_start
from misdirection.interventions.resume import Recorded, can_resume, record, repeated, resume
from misdirection.likelihood.answers import token_log_probs
from misdirection.models.chat import batches, pad
from misdirection.models.layers import text_config
from misdirection.models.loading import ChatModel

TOKEN_BUDGET = 2048
"""Padded tokens in one batch: large enough to keep a processor busy, small enough for a laptop."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Continuations:
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


def log_probs(
    chat: ChatModel, tasks: Sequence[Continuations], *, budget: int = TOKEN_BUDGET, progress: Progress | None = None
) -> Tensor:
    """Mean-token log-probability of every answer, [tasks, answers], float64.

    Each task must have the same number of answers. `progress` is told the number of tasks done.
    """
    return sweep(chat, tasks, [()], budget=budget, progress=progress)[0]


@dataclass(frozen=True)
class Dealt:
    """Settings dealt out over the tasks in turn: the first to the first task, ..., and from the start again."""

    settings: tuple[Setting, ...]

    def of(self, task: int) -> Setting:
        """The setting of one task, by its number."""
        return self.settings[task % len(self.settings)]


@torch.inference_mode()
def sweep(
    chat: ChatModel,
    tasks: Sequence[Continuations],
    settings: Sequence[Setting | Dealt],
    *,
    budget: int = TOKEN_BUDGET,
    progress: Progress | None = None,
) -> Tensor:
    """Mean-token log-probability of every answer under every setting, [settings, tasks, answers], float64.

    A setting is a list of interventions; the empty one is the model as it is. A row's result does not depend on the
    rows beside it, up to the rounding of batched products. `progress` is told the number of (setting, task) done.
    """
    for one in settings:
        for setting in one.settings if isinstance(one, Dealt) else (one,):
            # Before a pass is begun at the layer that a setting names.
            for intervention in setting:
                check(intervention, len(chat.layers), chat.width)
    result = torch.empty(len(settings), len(tasks), len(tasks[0].answers), dtype=torch.float64)
    for numbers in batches([task.length for task in tasks], _row_budget(chat, tasks, budget)):
        group = [tasks[number] for number in numbers]
        lines = [[one.of(n) if isinstance(one, Dealt) else one for n in numbers] for one in settings]
        for chosen, scores in _sweep_group(chat, group, lines, budget):
            result[torch.tensor(chosen).unsqueeze(-1), torch.tensor(numbers)] = scores
            if progress:
                progress(len(chosen) * len(numbers))
    return result


def _row_budget(chat: ChatModel, tasks: Sequence[Continuations], budget: int) -> int:
    """One task at a time where padding inside a sliding-window cache would push real tokens out of the window."""
    window = getattr(chat.model.config.get_text_config(), "sliding_window", None)
    return 1 if window and max(task.length for task in tasks) > window else budget


Line = list[Setting]
"""What is done to each task of a group."""


def _sweep_group(
    chat: ChatModel, tasks: list[Continuations], lines: list[Line], budget: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of lines and their scores, [these lines, tasks, answers], batch by batch."""
    starts = [min(_start(setting, len(chat.layers)) for setting in line) for line in lines]
    order = sorted(range(len(lines)), key=lambda number: starts[number])
    size = max(1, budget // (len(tasks) * max(task.length for task in tasks)))
    chunks = [order[first : first + size] for first in range(0, len(order), size)]
    memory = _Memory(chat, sorted({starts[chunk[0]] for chunk in chunks} - {-1}))
    if memory.pays([starts[chunk[0]] for chunk in chunks for _line in chunk]):
        _score(chat, tasks, [[()] * len(tasks)], memory.recording)
    for chunk in chunks:
        yield chunk, _score(chat, tasks, [lines[number] for number in chunk], memory.resuming(starts[chunk[0]]))


def _start(setting: Setting, layers: int) -> int:
    """The block up to which this setting changes nothing that blocks compute; -1 when it changes all."""
    return min((first_block(one) for one in setting), default=layers - 1)


@dataclass
class _Memory:
    """What some blocks gave in each phase (0 the shared start, 1 the prompts, 2 the answers) of one group of tasks."""

    chat: ChatModel
    layers: list[int]
    phases: dict[int, Recorded] = field(default_factory=dict)

    def pays(self, starts: list[int]) -> bool:
        """Whether the blocks that lines with these starts may skip are more than the line that records them runs."""
        config = text_config(self.chat.model)
        # Blocks that read the keys and values of lower blocks need those to run.
        shares = getattr(config, "num_kv_shared_layers", 0)
        skipped = sum(start + 1 for start in starts)
        return skipped > len(self.chat.layers) and not shares and can_resume(DynamicCache(config=config))

    @contextlib.contextmanager
    def recording(self, phase: int, _rows: int) -> Iterator[None]:
        """Keep what the blocks give."""
        with record(self.chat, self.layers) as kept:
            yield
        self.phases[phase] = kept

    def resuming(self, layer: int) -> Phase:
        """Begin each pass with what block `layer` gave, if it was recorded; the rows come again for each line."""

        def phase(number: int, rows: int) -> contextlib.AbstractContextManager[None]:
            if layer not in self.phases.get(number, {}):
                return contextlib.nullcontext()
            return resume(self.chat, layer, repeated(self.phases[number][layer], rows))

        return phase


def _score(chat: ChatModel, tasks: list[Continuations], lines: list[Line], phase: Phase) -> Tensor:
    """[lines, tasks, answers]. Rows are by line, then by task, then by answer."""
    answers = len(tasks[0].answers)
    rows = [(setting, task) for line in lines for setting, task in zip(line, tasks, strict=True)]
    settings, starts = [setting for setting, _ in rows], [len(task.prompt) for _, task in rows]
    shared = shared_start([task.prompt for task in tasks], own=2)
    passes = Passes(chat, phase)
    if shared:
        passes.run_start(tasks[0].prompt[:shared], settings)
    passes.run(1, chat.decoder, Rows([task.prompt[shared:-1] for _, task in rows], settings, starts))
    passes.select([number for number in range(len(rows)) for _ in range(answers)])
    # The last prompt token goes with the answers: it predicts their first token.
    last = Rows(
        [(task.prompt[-1], *answer[:-1]) for _, task in rows for answer in task.answers],
        [setting for setting in settings for _ in range(answers)],
        [start for start in starts for _ in range(answers)],
    )
    output, real = passes.run(2, chat.model, last)
    targets, _ = pad([answer for _, task in rows for answer in task.answers], 0, chat.device)
    return _mean_log_prob(output.logits, targets, real).view(len(lines), len(tasks), answers).cpu()


def _mean_log_prob(logits: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
    """[rows] float64: mean over each row's real tokens."""
    token = token_log_probs(logits, answers).double()
    return token.masked_fill(~mask.bool(), 0).sum(-1) / mask.sum(-1)
