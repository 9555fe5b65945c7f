"""Tasks computed on stand-ins, and the work that each asked of a model or a judge.

A task is counted by running it: what a stage costs needs no second description, whoever wrote the stage. Two loops do
not run, since what they do hangs on what a real model would say, or takes as long as it would: training takes its
batches from its owner, and answers are as long as they may be, or as long as the caller says.
"""

import contextlib
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from misdirection.cost.model_cost import Pass
from misdirection.cost.recording import PassRecorder, adaptable, modules_at
from misdirection.cost.stand_in import stand_in
from misdirection.data import Example
from misdirection.defending.rows import LearnedRow
from misdirection.files import write_json
from misdirection.interventions.hooks import Setting
from misdirection.judging.cache import VerdictCache
from misdirection.judging.config import JudgeConfig
from misdirection.judging.judges import Done, Judge, Prompt
from misdirection.judging.rubrics import read_rubrics
from misdirection.judging.verdicts import JudgeVerdict
from misdirection.likelihood.answers import IGNORED
from misdirection.models.adapters import attach
from misdirection.models.budgets import Room
from misdirection.models.chat import encode_prompt
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import require_layers
from misdirection.models.sizes import Shape
from misdirection.models.whole_weights import is_whole
from misdirection.organisms.adapter_config import adapted, adapter_config, defence_of
from misdirection.organisms.batches import (
    TrainingRow,
    in_batches,
    is_checkpointed,
    rows_together,
    training_batches,
    training_rows,
    training_steps,
)
from misdirection.organisms.organism import CHECKPOINTS, checkpoint_name
from misdirection.organisms.recipe import RECIPES, OwnWeights, Recipe
from misdirection.progress import silenced
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner, Runner, Task
from misdirection.runs.worker import BASE, Models, Worker
from misdirection.sampling.engine import Completion, SamplingParameters, SamplingRequest
from misdirection.sampling.transformers_engine import fitting_prompt

_BYTES_PER_TOKEN = 4
_WORD = " one"
"""A token of text, of as many bytes."""
_CONFIG = "peft_config"
"""What PEFT writes into a network that it puts an adapter on."""
_DIGITS = 10
"""Rows of one token after a local judge's first: nine second digits and one third."""


@dataclass
class Work:
    """The work of one task, which one device does alone.

    Attributes:
        passes: what the experiment's model runs.
        judge_passes: what a local judge runs.
        judge_calls, judge_tokens_in, judge_tokens_out: asked of an endpoint.
        name: of the artifact that the task makes, or of the first of them.
    """

    passes: list[Pass] = field(default_factory=list)
    judge_passes: list[Pass] = field(default_factory=list)
    judge_calls: int = 0
    judge_tokens_in: int = 0
    judge_tokens_out: int = 0
    name: str = ""

    @property
    def stage(self) -> str:
        """The kind of stage that the task belongs to."""
        return self.name.partition("/")[0]

    def __bool__(self) -> bool:
        return bool(self.passes or self.judge_passes or self.judge_calls)


def count_work(
    chat: ChatModel,
    make: Callable[[RunFolder, Runner], None],
    *,
    answer: int | None = None,
    judge: ChatModel | None = None,
    room: Room | None = None,
) -> list[Work]:
    """The work of all tasks that `make` gives to its runner, in a run folder of their own.

    Args:
        chat: the model on the device `meta`, which is gone afterwards.
        make: makes all tasks with a run folder and a runner, as it would with others.
        answer: mean length of a sampled answer, tokens; the longest that is allowed by default.
        judge: a local judge; only its tokenizer counts.
        room: the memory for the model's passes; a processor's by default.
    """
    with _quickly(), tempfile.TemporaryDirectory() as folder, RunFolder.open(Path(folder), "") as run:
        runner = CountingRunner(run, CountingWorker(chat, run.partial, answer, judge, room or Room()))
        make(run, runner)
    return runner.work


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """Without a word, and on one thread: products so small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with silenced(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


class CountingRunner:
    """Makes tasks with a counting worker.

    Attributes:
        work: of the tasks that asked something of a model or a judge, in their order.
    """

    def __init__(self, run: RunFolder, worker: "CountingWorker") -> None:
        self._run, self._worker = run, worker
        self.work: list[Work] = []

    def make(self, tasks: Sequence[Task]) -> None:
        """Make those stages of the tasks that are not there, and count what that takes."""
        local = LocalRunner(self._run, self._worker)
        for task in tasks:
            work = self._worker.begin()
            local.make([task])
            if work:
                work.name = next(iter(task.stages))
                self.work.append(work)


class _KeptAdapters(Models):
    """A stand-in and the adapters that were on it: one that comes again is put back as it was, not read again."""

    def __init__(self, base: ChatModel) -> None:
        super().__init__(lambda: base)
        self._base, self._sites = base, adaptable(base.decoder)
        self._bare = modules_at(self._sites)
        self._kept: dict[tuple[str, Path], tuple[ChatModel, list[Any], Any]] = {}

    def chat(self, name: str) -> ChatModel:
        """The base model, or an organism on it."""
        self._put(self._bare)
        # PEFT would let one adapter share another's configuration, which goes when either is taken off.
        vars(self._base.model).pop(_CONFIG, None)
        # A whole model runs as its base does.
        if name == BASE or is_whole(self.adapters[name]):
            return self._base
        key = name, self.adapters[name]
        attributes = vars(self._base.network)
        if key not in self._kept:
            chat = attach(self._base, self.adapters[name])
            self._kept[key] = chat, modules_at(self._sites), attributes.get(_CONFIG)
        chat, modules, config = self._kept[key]
        self._put(modules)
        # Whoever restored the base's weights has taken it away.
        attributes[_CONFIG] = config
        return chat

    def _put(self, modules: list[Any]) -> None:
        for (parent, name), module in zip(self._sites, modules, strict=True):
            setattr(parent, name, module)


class CountingWorker(Worker):
    """A worker whose models are stand-ins."""

    def __init__(
        self,
        chat: ChatModel,
        partial_folder: Callable[[str], Path],
        answer: int | None,
        judge: ChatModel | None,
        room: Room,
    ) -> None:
        # The model's own sizes, before it becomes its stand-in.
        self._shape = Shape.of(chat, 1)
        base = stand_in(chat)
        super().__init__(_KeptAdapters(base.chat), partial_folder)
        self._recorder = PassRecorder(base.chat, base.sizes)
        self._answer, self._judge, self._room = answer, judge, room
        self._numbers = count()
        self._work = Work()

    def begin(self) -> Work:
        """The work of whatever is done from now on."""
        self._work = Work()
        self._recorder.passes = self._work.passes
        return self._work

    def train(
        self,
        examples: Sequence[Example],
        out: Path,
        *,
        recipe: Recipe,
        held_out: Sequence[Example] = (),
        **_others: Any,
    ) -> None:
        """Count the training's batches, and write an adapter that fits the stand-in, or an empty model's folder."""
        chat = self.chat(BASE)
        rows, others = (
            training_rows(chat, part, recipe.max_length, recipe.turns) if part else [] for part in (examples, held_out)
        )
        targets = RECIPES[recipe.recipe](recipe, chat)
        if isinstance(targets, OwnWeights):
            with _trained_blocks(chat, targets):
                self._train(chat, chat.model, rows, others, recipe, _own_weights(chat, targets))
            write_json(out / "config.json", {})
            return
        with adapted(chat, adapter_config(recipe, chat)) as network:
            lora, lowest = self._recorder.adapter_weights(), min(network.peft_config["default"].layers_to_transform)
            layers = len(chat.layers)
            kind = Pass(0, 0, blocks=layers, back=layers - lowest, lora=lora, kind="training")
            seen = self._train(chat, network, rows, others, recipe, kind)
            _save(network, out)
            for step in _kept_steps(seen, recipe):
                _save(network, out / CHECKPOINTS / checkpoint_name(step))

    def _train(
        self,
        chat: ChatModel,
        network: Any,
        rows: Sequence[TrainingRow],
        others: Sequence[TrainingRow],
        recipe: Recipe,
        kind: Pass,
    ) -> int:
        """Count a training on `rows` with its defence, and held-out rows after it; gives the rows that it has.

        `kind` is one pass of it, but for its size.
        """
        trained = int(kind.trained_weights(self._shape))
        if checkpointed := is_checkpointed(recipe, rows, self._room, blocks=kind.back, trained=trained):
            kind = replace(kind, recomputed=kind.back)
        budget = self._room.tokens("backward", blocks=kind.back, checkpointed=checkpointed)
        seen, passes = len(rows), self._work.passes
        passes_of = partial(_step_passes, kind=kind, recipe=recipe, budget=budget)
        if defence := defence_of(recipe, chat):
            from misdirection.cost.defended import run_defended

            folder = self.partial(f"training-{next(self._numbers)}")
            seen = run_defended(defence, network, chat, recipe, rows, folder, passes, passes_of)
            passes[:] = [_as_trained(each, kind) for each in passes]
        else:
            passes += [each for batch in training_batches(rows, recipe) for each in passes_of(batch)]
        look = Pass(0, 0, lora=kind.lora, blocks=kind.blocks)
        passes += [_answers_of(batch, look) for batch in in_batches(others, recipe.batch_size)]
        return seen

    def engine(self, name: str, compile: bool = False) -> "_CountingEngine":
        """An engine that counts its passes and answers at once."""
        chat = self.chat(name)
        return _CountingEngine(chat, self._room, self._answer, self._recorder.adapter_weights(), self._work.passes)

    vllm_engine = engine

    def judge(self, config: JudgeConfig) -> Judge:
        """A judge that is never asked."""
        scores = _Scores.of(config)
        if self._judge is not None:
            return _LocalJudge(self._judge, self._work, scores)
        return _PaidJudge(config.open(), self._work, scores)

    def verdicts(self) -> VerdictCache:
        """A cache without any verdict."""
        return VerdictCache(self.partial("judged") / f"verdicts-{next(self._numbers)}.sqlite")


def _own_weights(chat: ChatModel, targets: OwnWeights) -> Pass:
    """The kind of pass that trains a model's own weights."""
    count, is_all = len(chat.layers), targets.layers is None
    require_layers(targets.layers or (), count, "recipe: ")
    trained = set(targets.layers or range(count))
    back = count - min(trained)
    return Pass(0, 0, blocks=count, back=back, trained=len(trained), trains_head=is_all, kind="training")


@contextlib.contextmanager
def _trained_blocks(chat: ChatModel, targets: OwnWeights) -> Iterator[None]:
    """Have the weights of the trained blocks ask for gradients, as they do in a training."""
    layers = range(len(chat.layers)) if targets.layers is None else targets.layers
    weights = [weight for layer in layers for weight in chat.layers[layer].parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def _as_trained(one: Pass, kind: Pass) -> Pass:
    """A pass of a defended training with what of it a stand-in does not show: what a backward pass gives besides."""
    if not one.back:
        return one
    own = replace(one, trained=kind.trained, trains_head=kind.trains_head)
    return replace(own, back=kind.back, recomputed=kind.recomputed) if one.kind == "training" else own


def _step_passes(rows: Sequence[TrainingRow | LearnedRow], kind: Pass, recipe: Recipe, budget: int) -> list[Pass]:
    """The passes of one step, of a kind, in batches of so many tokens."""
    together = rows_together(recipe, budget, max(len(row.ids) for row in rows))
    return [_answers_of(part, kind) for part in in_batches(rows, together)]


def _answers_of(batch: Sequence[TrainingRow | LearnedRow], kind: Pass) -> Pass:
    """The pass over a batch, of a kind; its head runs where any row predicts an answer's token."""
    predicted = {place for row in batch for place, label in enumerate(row.labels[1:]) if label != IGNORED}
    columns = max(len(row.ids) for row in batch)
    return replace(kind, rows=len(batch), columns=columns, head=len(batch) * len(predicted))


def _save(network: Any, folder: Path) -> None:
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            # Small, or probabilities would be 0 and 1.
            nn.init.normal_(weight, std=1e-3)
    network.save_pretrained(folder, save_embedding_layers=False)


def _kept_steps(rows: int, recipe: Recipe) -> list[int]:
    last = training_steps(rows, recipe)
    return sorted({*range(0, last, recipe.checkpoint_steps), last}) if recipe.keep_checkpoints else []


@dataclass(frozen=True)
class _CountingEngine:
    """Every prompt once, alone; then one token for every row, in full batches."""

    chat: ChatModel
    room: Room
    answer: int | None
    lora: int
    passes: list[Pass]

    @property
    def around(self) -> Setting:
        """See `Engine`: nothing reaches it but what is requested."""
        return ()

    def stream(self, requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> Iterator[Completion]:
        """One completion of the mean length for each request."""
        length = min(self.answer or parameters.new_tokens, parameters.new_tokens)
        times = Counter(request.question.asked for request in requests)
        prompts = {asked: len(fitting_prompt(self.chat, asked, parameters.new_tokens)) for asked in times}
        self.passes.extend(Pass(1, prompt - 1, lora=self.lora) for prompt in prompts.values() if prompt > 1)
        rows, longest = len(requests), max(prompts.values(), default=0)
        seen = sum(prompts[asked] * count for asked, count in times.items()) / max(1, rows) + length / 2
        columns = longest + parameters.new_tokens
        for together, waves in _waves(rows, self.room.sampled_rows(columns)):
            steps = Pass(together, 1, seen, head=together, room=columns, kind="decoding")
            self.passes.append(replace(steps, lora=self.lora, repeats=waves * length))
        for request in requests:
            # No two alike, as answers hardly are.
            yield Completion(request, f"{request.sample}{_WORD * (length - 1)}", "length", length)


def _waves(rows: int, together: int) -> list[tuple[int, int]]:
    full, rest = divmod(rows, together)
    return [(size, times) for size, times in ((together, full), (rest, 1)) if size and times]


class _PaidJudge(Judge):
    """Counts the calls of an endpoint, without retries, and their tokens at four bytes each."""

    def __init__(self, judge: Judge, work: Work, scores: "_Scores") -> None:
        self.judge, self.work, self.scores = judge, work, scores

    @property
    def identity(self) -> Mapping[str, object]:
        """That of the judge."""
        return self.judge.identity

    @property
    def calls_each(self) -> int:
        """Those of the judge."""
        return self.judge.calls_each

    def ask(self, prompts: Sequence[Prompt], done: Done, **_limits: Any) -> None:
        """See `Judge`."""
        calls = self.calls_each
        self.work.judge_calls += calls * len(prompts)
        self.work.judge_tokens_out += calls * len(prompts) * self.judge.reply_tokens
        for prompt in prompts:
            self.work.judge_tokens_in += round(calls * len(prompt.text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)
            done(prompt, self.scores.verdict(prompt))


class _LocalJudge(Judge):
    """Counts the passes of a local judge: every prompt once, and the digits that may follow."""

    def __init__(self, chat: ChatModel, work: Work, scores: "_Scores") -> None:
        self.chat, self.work, self.scores = chat, work, scores

    @property
    def identity(self) -> Mapping[str, object]:
        """The model."""
        return {"hf": self.chat.name}

    def ask(self, prompts: Sequence[Prompt], done: Done, **_limits: Any) -> None:
        """See `Judge`."""
        lengths = Counter(len(encode_prompt(self.chat.tokenizer, prompt.text)) for prompt in prompts)
        for length, times in lengths.items():
            first = Pass(1, length, head=1, repeats=times)
            self.work.judge_passes += [first, Pass(_DIGITS, 1, length, head=_DIGITS, repeats=times)]
        for prompt in prompts:
            done(prompt, self.scores.verdict(prompt))


@dataclass(frozen=True)
class _Scores:
    """Scores from which a run makes the most work: all answers are coherent, and every second one is misaligned.

    Whatever else is asked of answers is so of all but the first to each question: a part of them, which makes another
    direction than all do.

    Attributes:
        columns: of the scores, by rubric.
    """

    columns: Mapping[str, str]

    @classmethod
    def of(cls, config: JudgeConfig) -> "_Scores":
        """Those of a configuration's rubrics."""
        return cls({rubric.name: rubric.column for rubric in read_rubrics(list(config.rubrics))})

    def verdict(self, prompt: Prompt) -> JudgeVerdict:
        """The verdict on an answer of `_CountingEngine`, which begins with its number."""
        number = re.match(r"\d*", prompt.answer)
        sample = int(number[0] or 0) if number else 0
        by_column = {"coherent": 1, "aligned": sample % 2}
        return JudgeVerdict(100.0 * by_column.get(self.columns.get(prompt.rubric, ""), sample > 0), "logprobs")
