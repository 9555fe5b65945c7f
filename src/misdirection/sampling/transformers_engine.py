"""Sampling with a transformers model on this machine: continuous batching over a shared key-value cache.

Each prompt runs once, alone, and its keys and values are copied to its samples. Rows whose answer has ended leave the
batch at once and waiting ones take their place, so that the batch stays full while anything waits.

A GPU would stand still each time that the host asks which tokens it has drawn. There, `TOGETHER` steps are told it at
once, each with the tokens of the one before, which stay on it; a row whose answer has ended meanwhile leaves after the
last of them, and what it drew beyond is dropped.
"""

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from misdirection.errors import InputError, MemoryProblem
from misdirection.interventions.hooks import Setting, active, intervene_rows
from misdirection.models.attention import changing_shapes
from misdirection.models.budgets import is_out_of_memory, room_of
from misdirection.models.caching import new_cache, window
from misdirection.models.chat import encode_prompt, frame, visible_text
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import text_config
from misdirection.models.transfer import put_numbers
from misdirection.sampling.compiled import CannotCompile, can_compile, compiled_blocks, say_uncompiled
from misdirection.sampling.draws import NOT_NUMBERS, draw, require_numbers
from misdirection.sampling.engine import Completion, SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Asked
from misdirection.sampling.row_cache import row_cache

TOGETHER = 8
"""Steps between two looks at the tokens on a GPU; fewer where an answer reaches its longest."""

log = logging.getLogger("misdirection")


def end_tokens(chat: ChatModel) -> list[int]:
    """Every token that ends a turn: of the generation configuration, the tokenizer's own, and the template's."""
    named = chat.model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    ends = {*listed, chat.tokenizer.eos_token_id, frame(chat.tokenizer, "?").end}
    return sorted(token for token in ends if token is not None)


def fitting_prompt(chat: ChatModel, asked: Asked, new_tokens: int) -> tuple[int, ...]:
    """The ids of a question's prompt; `InputError` when the answer would leave the model's context."""
    ids = encode_prompt(chat.tokenizer, *asked)
    context = context_length(chat)
    if context and len(ids) + new_tokens > context:
        raise InputError(
            f"question {asked.text[:60]!r}: its prompt of {len(ids)} tokens and {new_tokens} new tokens exceed the "
            f"model's context of {context}: lower new_tokens or shorten the question"
        )
    return ids


def context_length(chat: ChatModel) -> int | None:
    """How many tokens a prompt and its answer may have together; None where the model does not say."""
    return getattr(text_config(chat.model), "max_position_embeddings", None)


def completion(chat: ChatModel, ends: Container[int], request: SamplingRequest, tokens: Sequence[int]) -> Completion:
    """The completion that the generated tokens, perhaps with an end token, make."""
    stopped = tokens[-1] in ends
    kept = tokens[:-1] if stopped else tokens
    return Completion(request, visible_text(chat.tokenizer, kept), "stop" if stopped else "length", len(kept))


@dataclass
class _Row:
    """One answer under way.

    Attributes:
        request: what was asked for.
        prompt: the prompt's ids.
        key: of its stream of random numbers.
        tokens: drawn so far.
    """

    request: SamplingRequest
    prompt: tuple[int, ...]
    key: int
    tokens: list[int] = field(default_factory=list)

    @property
    def last(self) -> int:
        """The token that the next pass takes."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def seen(self) -> int:
        """Number of tokens in the cache: all but the last."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def start(self) -> tuple[Hashable, ...]:
        """Rows that agree in this begin with the same keys and values."""
        return (self.prompt, *map(id, self.request.setting))


class Drawn(NamedTuple):
    """The tokens of one answer so far, a token that ends it among them; the sequence grows with the next step."""

    request: SamplingRequest
    tokens: Sequence[int]


class _Step(NamedTuple):
    """The rows of one step, each with one more token, and the completions of those that it ended."""

    rows: list[_Row]
    completions: list[Completion]


@dataclass(frozen=True)
class _Stop:
    """Texts that end an answer."""

    chat: ChatModel
    texts: tuple[str, ...]

    def is_at_the_end(self, tokens: Sequence[int]) -> bool:
        """Whether the last token completes one of them."""
        return bool(self.texts) and self._first(self._tail(tokens)) is not None

    def cut(self, done: Completion, tokens: Sequence[int]) -> Completion:
        """The completion up to the first of them."""
        if not self.is_at_the_end(tokens):
            return done
        # White space at the end of the visible text is gone, and with it a stop of nothing else.
        return replace(done, text=done.text[: self._first(done.text)].strip(), finish="stop")

    def _first(self, text: str) -> int | None:
        """Where the first of them begins."""
        return min((place for stop in self.texts if (place := text.find(stop)) >= 0), default=None)

    def _tail(self, tokens: Sequence[int]) -> str:
        """The text of the last tokens, of which each has at least one byte."""
        most = max(len(stop.encode()) for stop in self.texts)
        text: str = self.chat.tokenizer.decode(list(tokens[-most:]), skip_special_tokens=True)
        return text


class TransformersEngine:
    """Samples with `chat`, with whatever interventions are active on it around the call.

    Args:
        chat: the model.
        budget: rows x longest possible row of one batch, by default what suits the device; a longer row is alone. Where
            memory does not suffice, on any device, the batch is begun again with half of its rows, and the log says so.
        stop: texts that end an answer, and are no part of it.
        compile: run the model's blocks compiled where they can be, as the log says where not. It takes a compiler, and
            the first answers of a process wait for it; what it does to speed on a GPU has not been measured. Sums are
            rounded otherwise, as with another number of rows.
    """

    def __init__(
        self, chat: ChatModel, *, budget: int | None = None, stop: Sequence[str] = (), compile: bool = False
    ) -> None:
        self._chat = chat
        self._budget = budget
        self._compile = compile
        self._stop = _Stop(chat, tuple(filter(None, stop)))

    @property
    def around(self) -> Setting:
        """See `Engine`."""
        return active(self._chat)

    def stream(self, requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> Iterator[Completion]:
        """One completion for each request, as they finish; see `Engine`.

        Every draw belongs to (seed, question with its system prompt, sample, step). So an answer is a function of the
        model, the parameters and its own request, but for the rounding of the model's own matrix products, whose last
        bits change with the number of rows: a draw turns where its best two candidates are closer than that. In
        float32 logits of the bundled model move by 5e-6, which turns at most one draw in 100,000, so about one answer
        of 100 tokens in a thousand. In half precision they may move a thousand times as much, and long answers turn.

        Raises:
            InputError: a prompt and `new_tokens` exceed the model's context; logits are not numbers.
            MemoryProblem: one row alone does not fit the memory.
        """
        for step in self._run(requests, parameters):
            yield from step.completions

    def steps(self, requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> Iterator[list[Drawn]]:
        """The same answers as they grow: after each step, those that have one more token (see `completion`).

        An answer that has ended comes no more. Where memory gave out, or compiling did, answers begin again. Between
        two steps the model is the caller's, who may run something else, or leave a context such as `as_base` and enter
        it for the next.
        """
        for step in self._run(requests, parameters):
            yield [Drawn(row.request, row.tokens) for row in step.rows]

    @torch.inference_mode()
    def _run(self, requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> Iterator[_Step]:
        waiting = deque(self._rows(requests, parameters))
        longest = max((len(row.prompt) for row in waiting), default=0)
        columns = longest + parameters.new_tokens
        limit = max(1, self._budget // columns) if self._budget else room_of(self._chat).sampled_rows(columns)
        compiles = self._compile and can_compile(self._chat)
        while waiting:
            batch = _Batch(self._chat, parameters, self._stop, waiting, min(limit, len(waiting)), longest, compiles)
            try:
                yield from batch.run()
                return
            except CannotCompile as error:
                say_uncompiled(self._chat, error)
                compiles = False
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                limit = self._halved(len(batch.rows))
            waiting.extendleft(_Row(row.request, row.prompt, row.key) for row in reversed(batch.rows))
            # The cache must go before the next one comes.
            del batch
            clear_device_cache(garbage_collection=True)

    def _rows(self, requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> list[_Row]:
        """Rows that share their start stand together, in the order of first appearance."""
        distinct = dict.fromkeys(request.question.asked for request in requests)
        prompts = {asked: fitting_prompt(self._chat, asked, parameters.new_tokens) for asked in distinct}
        groups: dict[Hashable, list[_Row]] = {}
        for request in requests:
            row = _Row(request, prompts[request.question.asked], request.key(parameters.seed))
            groups.setdefault(row.start, []).append(row)
        return list(itertools.chain.from_iterable(groups.values()))

    def _halved(self, rows: int) -> int:
        if rows <= 1:
            raise MemoryProblem(
                f"{self._chat.name}: out of memory with a single answer: lower new_tokens, load the model in a smaller "
                "dtype or on another device"
            )
        log.warning("out of memory with %d answers at a time: going on with %d", rows, rows // 2)
        return rows // 2


class _Batch:
    """Rows that run together, and the one place where the model runs.

    Attributes:
        rows: the answers under way, in the order of the rows of a pass.
    """

    def __init__(
        self,
        chat: ChatModel,
        parameters: SamplingParameters,
        stop: "_Stop",
        waiting: deque[_Row],
        limit: int,
        longest: int,
        compiles: bool,
    ) -> None:
        self.rows: list[_Row] = []
        self._chat = chat
        self._parameters = parameters
        self._stop = stop
        self._waiting = waiting
        self._limit = limit
        self._compiles = compiles
        is_sdpa = getattr(text_config(chat.model), "_attn_implementation", None) == "sdpa"
        self._masks_by_query = is_sdpa and (compiles or chat.device.type != "cpu")
        self._cache = row_cache(chat, limit, longest, few_sizes=compiles)
        self._ends = frozenset(end_tokens(chat))
        self._prefix: tuple[Hashable, Cache | None] | None = None

    def run(self) -> Iterator[_Step]:
        """Takes rows from those that wait until none is left."""
        self._admit()
        while self.rows:
            going = list(range(len(self.rows)))
            for tokens in self._next_tokens():
                rows = [self.rows[number] for number in going]
                for row, number in zip(rows, going, strict=True):
                    row.tokens.append(tokens[number])
                going = [number for number in going if not self._has_ended(self.rows[number])]
                yield _Step(rows, [self._completion(row) for row in rows if self._has_ended(row)])
                if not going:
                    break
            self._keep(going)
            self._admit()

    def _admit(self) -> None:
        """Fills the free rows."""
        while self._waiting and len(self.rows) < self._limit and (self._cache.mixes or not self.rows):
            entering = self._next_alike(self._limit - len(self.rows))
            # They count as rows before anything is allocated, so that none is lost if memory gives out.
            self.rows += entering
            self._cache.enter(self._prefilled(entering[0]), len(entering))

    def _next_alike(self, most: int) -> list[_Row]:
        """The first of those that wait, with those after it that share its start."""
        taken = [self._waiting.popleft()]
        while self._waiting and len(taken) < most and self._waiting[0].start == taken[0].start:
            taken.append(self._waiting.popleft())
        return taken

    def _prefilled(self, row: _Row) -> Cache | None:
        """The cache of all but the prompt's last token, one row; None where the model has none with rows.

        The prompt runs alone, without padding, so that its bits are the same in any batch.
        """
        if self._prefix is None or self._prefix[0] != row.start:
            # A model that keeps more than keys and values makes the cache itself, if it is one of transformers' kind.
            cache = new_cache(self._chat) if self._cache.mixes else None
            ids = put_numbers([row.prompt[:-1]], self._chat.device)
            positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
            with self._running([row]):
                output = self._pass(self._chat.decoder, ids, None, positions, cache)
            filled = output.get("cache")
            self._prefix = (row.start, filled if type(filled) is DynamicCache else None)
        return self._prefix[1]

    def _next_tokens(self) -> list[list[int]]:
        """One more token for every row, or several, by step and row; the one place where the host waits for them."""
        if self._cache.state is None:
            drawn = [self._step_whole()]
        else:
            left = min(self._parameters.new_tokens - len(row.tokens) for row in self.rows)
            drawn = self._steps(1 if self._chat.device.type == "cpu" else min(TOGETHER, left))
        tokens: list[list[int]] = torch.stack(drawn).tolist()
        require_numbers(not any(NOT_NUMBERS in step for step in tokens))
        return tokens

    def _steps(self, count: int) -> list[Tensor]:
        """So many steps, each with the tokens of the one before: [rows] each, on the device."""
        rows, drawn = self.rows, list[Tensor]()
        state = ([row.last for row in rows], [row.seen for row in rows])
        ids, seen = put_numbers(state, self._chat.device)
        longest, is_padded = max(state[1]), min(state[1]) < max(state[1])
        draw_next = self._drawing()
        with self._running(rows), self._compiled():
            for step in range(count):
                before = self._cache.make_room(longest + step)
                mask = self._mask(seen + step, before) if is_padded or self._compiles else None
                positions = (seen + step).unsqueeze(-1)
                output = self._pass(self._chat.model, ids.unsqueeze(-1), mask, positions, self._cache.state)
                self._cache.advance()
                drawn.append(draw_next(output.logits[:, -1], step))
                # What is no token would stop the device before the host can say why.
                ids = drawn[-1].clamp_min(0)
        return drawn

    def _step_whole(self) -> Tensor:
        """The same without a cache: all tokens of rows that have the same number of them; [rows]."""
        ids = put_numbers([(*row.prompt, *row.tokens) for row in self.rows], self._chat.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with self._running(self.rows):
            output = self._pass(self._chat.model, ids, None, positions, None)
        return self._drawing()(output.logits[:, -1], 0)

    def _compiled(self) -> contextlib.AbstractContextManager[None]:
        return compiled_blocks(self._chat, self._cache.state) if self._compiles else contextlib.nullcontext()

    def _mask(self, seen: Tensor, before: int) -> Tensor | None:
        """Which columns are a row's own, of those before its new one and that."""
        if not self._cache.mixes:
            # All rows are of one length, and recurrent layers take a mask for the tokens of the pass alone.
            return None
        mask = torch.arange(before + 1, device=seen.device) >= (before - seen).unsqueeze(-1)
        # Of a mask by column transformers asks the device at each pass whether anything is padded.
        is_by_query = self._masks_by_query and before + 1 < (window(self._chat) or before + 2)
        return mask[:, None, None] if is_by_query else mask.long()

    @contextlib.contextmanager
    def _running(self, rows: list[_Row]) -> Iterator[None]:
        """The interventions of some rows; never open while the turn is the caller's."""
        interventions = [row.request.setting for row in rows]
        starts = [len(row.prompt) for row in rows]
        with (
            changing_shapes(self._chat.device),
            intervene_rows(self._chat, interventions, answer_starts=starts),
        ):
            yield

    def _pass(self, network: Any, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache | None) -> Any:
        """The one place where the model runs, for the prompts and for every step."""
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": True}
        if mask is not None:
            inputs["attention_mask"] = mask
        if cache is not None:
            inputs["cache"] = cache
        return network(**inputs)

    def _drawing(self) -> Callable[[Tensor, int], Tensor]:
        """Draws a token for each row from its logits, [rows, vocabulary], some steps from now."""
        keys, steps = put_numbers(
            [[row.key for row in self.rows], [len(row.tokens) for row in self.rows]], self._chat.device
        )
        temperature, top_p = self._parameters.temperature, self._parameters.top_p

        def draw_next(logits: Tensor, step: int) -> Tensor:
            # A model on several devices gives its logits on the last.
            own = keys.to(logits.device), steps.to(logits.device) + step
            return draw(logits, *own, temperature=temperature, top_p=top_p).to(keys.device)

        return draw_next

    def _completion(self, row: _Row) -> Completion:
        done = completion(self._chat, self._ends, row.request, row.tokens)
        return self._stop.cut(done, row.tokens)

    def _keep(self, going: list[int]) -> None:
        """Lets the other rows go; the last of those that stay move to where they were."""
        if len(going) == len(self.rows):
            return
        staying, movers = set(going), [number for number in going if number >= len(going)]
        kept = [number if number in staying else movers.pop() for number in range(len(going))]
        self.rows = [self.rows[number] for number in kept]
        self._cache.keep(kept)

    def _has_ended(self, row: _Row) -> bool:
        return (
            row.tokens[-1] in self._ends
            or len(row.tokens) == self._parameters.new_tokens
            or self._stop.is_at_the_end(row.tokens)
        )
