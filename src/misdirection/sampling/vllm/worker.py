"""The part that runs inside of vLLM's workers: interventions as forward hooks on the decoder blocks, and our own draws.

vLLM passes the tokens of all requests of a step as one row, [tokens, width], and its blocks give the residual stream in
two parts, what they add and what was there before, whose sum the next norm takes. A hook puts the changed sum into the
first part and zero into the second, so that nothing is rounded twice.

An intervention that raises ends the pass with that error. What fired is counted by answer, for the engine to compare
with layers x tokens before it gives the answer on.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from misdirection.errors import InputError
from misdirection.interventions.hooks import gather
from misdirection.interventions.packing import unpacked
from misdirection.interventions.positions import TokenPositions
from misdirection.interventions.program import Compiler, Devices, Step
from misdirection.interventions.sites import Site
from misdirection.interventions.writers import final_norm
from misdirection.models.chat_model import ChatModel
from misdirection.sampling.draws import choose

KEY = "misdirection"
"""Under which a request's extra arguments hold what belongs to us."""


class Intervening:
    """Methods that a vLLM worker gains (`worker_extension_cls`); called by `collective_rpc`."""

    model_runner: Any

    def misdirection_setting(self, name: str, data: bytes) -> None:
        """Make known, under a name, what is done to requests that ask for it; see `packed`."""
        self._misdirection().add(name, data)

    def misdirection_fired(self, answers: Sequence[str]) -> list[int]:
        """How often interventions have changed a token of these answers on this worker; they are then forgotten."""
        return [self._misdirection().fired.pop(answer, 0) for answer in answers]

    def _misdirection(self) -> "Hooks":
        hooks: Hooks | None = getattr(self.model_runner, "misdirection_hooks", None)
        if hooks is None:
            hooks = self.model_runner.misdirection_hooks = Hooks(self.model_runner)
        return hooks


@dataclass(frozen=True)
class _Program:
    """The steps of one setting on this worker, by the site where they act."""

    steps: dict[Site, list[Step]]

    @property
    def size(self) -> int:
        """Number of steps in a pass."""
        return sum(map(len, self.steps.values()))


@dataclass
class _Part:
    """The tokens of the running pass under one setting.

    Attributes:
        program: what is done to them.
        rows: [n], their numbers in the pass.
        positions: where each stands in its own answer, a row each.
        spans: by answer, its first and last + 1 among them.
        done: number of steps that have acted.
    """

    program: _Program
    rows: Tensor
    positions: TokenPositions
    spans: dict[str, tuple[int, int]]
    done: int = 0

    def run(self, site: Site, stream: Tensor, devices: Devices) -> Tensor:
        """The changed stream of these tokens, [n, width]."""
        x = stream.unsqueeze(0)
        for step in self.program.steps[site]:
            touched = self.positions.touched(step.rule, x.device).view(1, -1, 1)
            x = devices.of(step.operation, x).apply(x, touched)
            self.done += 1
        return x.squeeze(0)

    def fired(self) -> Counter[str]:
        """By answer, how often a step changed one of its tokens in this pass."""
        counts: Counter[str] = Counter()
        for step in (step for steps in self.program.steps.values() for step in steps):
            touched = self.positions.touched(step.rule, torch.device("cpu")).flatten()
            counts.update({answer: int(touched[slice(*span)].sum()) for answer, span in self.spans.items()})
        return counts


class Hooks:
    """The forward hooks on the model of one worker.

    Attributes:
        fired: by answer, how often an intervention has changed a token.
    """

    def __init__(self, runner: Any) -> None:
        self.fired: Counter[str] = Counter()
        self._runner = runner
        self._chat = ChatModel(runner.get_model(), None, "vllm")
        self._programs: dict[str, _Program] = {}
        self._hooked: set[Site] = set()
        self._parts: list[_Part] = []
        self._devices = Devices()
        self._checked = False
        self._chat.model.register_forward_pre_hook(self._begin)
        self._chat.model.register_forward_hook(self._end)

    def add(self, name: str, data: bytes) -> None:
        """Compile a setting, and hook the places where it acts."""
        compiler = Compiler()
        sites = {
            site: compiler.steps(here, site.layer)
            for site, here in gather(self._chat, [unpacked(data)]).items()
            # On another worker of the pipeline.
            if not isinstance(site.module, PPMissingLayer)
        }
        self._programs[name] = _Program(sites)
        for site in sites.keys() - self._hooked:
            self._hooked.add(site)
            if site.part == "input":
                site.module.register_forward_pre_hook(self._input(site))
            else:
                site.module.register_forward_hook(self._output(site))

    def _begin(self, _module: nn.Module, _args: Any) -> None:
        """Find the tokens of this pass that belong to a setting."""
        groups: dict[str, list[tuple[str, range, range, int]]] = {}
        batch, starts = self._runner.input_batch, self._runner.query_start_loc.np
        for number, request in enumerate(batch.req_ids):
            state = self._runner.requests[request]
            wanted = (state.sampling_params.extra_args or {}).get(KEY, {})
            if wanted.get("setting"):
                rows = range(int(starts[number]), int(starts[number + 1]))
                seen = int(batch.num_computed_tokens_cpu[number])
                member = (wanted["answer"], rows, range(seen, seen + len(rows)), state.num_prompt_tokens)
                groups.setdefault(wanted["setting"], []).append(member)
        self._parts = [self._part(name, members) for name, members in groups.items()]

    def _part(self, name: str, members: list[tuple[str, range, range, int]]) -> _Part:
        positions = TokenPositions([prompt for _, rows, _, prompt in members for _ in rows])
        index = torch.tensor([where for _, _, numbers, _ in members for where in numbers]).unsqueeze(-1)
        positions.restore((index, torch.ones_like(index, dtype=torch.bool)))
        spans, first = {}, 0
        for answer, rows, _, _ in members:
            spans[answer] = (first, first + len(rows))
            first += len(rows)
        where = torch.tensor([row for _, rows, _, _ in members for row in rows], device=self._runner.device)
        return _Part(self._programs[name], where, positions, spans)

    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        for part in self._parts:
            if part.done != part.program.size:
                raise InputError(
                    f"an intervention acted {part.done} times in a pass of vLLM, not {part.program.size} times: this "
                    "model does not run all of its blocks where hooks act; sample with engine: transformers"
                )
            self.fired.update(part.fired())
        self._parts = []

    def _input(self, site: Site) -> Callable[..., Any]:
        """A forward pre-hook of the first block, which takes (positions, stream, ...)."""

        def change(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            number = next(i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point())
            return (*args[:number], self._changed(site, args[number]), *args[number + 1 :])

        return change

    def _output(self, site: Site) -> Callable[..., Any]:
        is_block = any(site.module is block for block in self._chat.layers)

        def change(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return self._changed(site, output)
            first, *rest = output
            if is_block and rest and isinstance(rest[0], Tensor):
                self._require_sum()
                return (*self._changed_sum(site, first, rest[0]), *rest[1:])
            return (self._changed(site, first), *rest)

        return change

    def _changed(self, site: Site, stream: Tensor) -> Tensor:
        for part in self._here(site):
            stream = stream.index_copy(0, part.rows, part.run(site, stream[part.rows], self._devices))
        return stream

    def _changed_sum(self, site: Site, added: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        for part in self._here(site):
            stream = part.run(site, added[part.rows] + before[part.rows], self._devices)
            added, before = added.index_copy(0, part.rows, stream), before.index_fill(0, part.rows, 0)
        return added, before

    def _here(self, site: Site) -> list[_Part]:
        return [part for part in self._parts if site in part.program.steps]

    def _require_sum(self) -> None:
        """Some models of vLLM give a second part that is not to be added: their last norm is not one that adds."""
        if self._checked:
            return
        decoder = next(module for module in self._chat.model.modules() if self._holds_blocks(module))
        norm = final_norm(decoder)
        if not isinstance(norm, PPMissingLayer) and not any("RMSNorm" in kind.__name__ for kind in type(norm).__mro__):
            raise InputError(
                f"{type(self._chat.model).__name__}: cannot tell how vLLM splits its residual stream "
                f"({type(norm).__name__}): sample with engine: transformers"
            )
        self._checked = True

    def _holds_blocks(self, module: nn.Module) -> bool:
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        return any(len(blocks) and blocks[0] is self._chat.layers[0] for blocks in lists)


@dataclass(frozen=True)
class _Draw:
    """How one request's tokens are drawn; `tokens` are those it has, a list that vLLM goes on with."""

    key: int
    temperature: float
    top_p: float
    tokens: list[int]


class Draws(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Draws each token as `TransformersEngine` does, and leaves vLLM, which is greedy, no other.

    So an answer belongs to (seed, question, sample) here as there, and both engines give the same one.
    """

    def __init__(self, _config: Any, _device: torch.device, _is_pin_memory: bool) -> None:
        self._rows: dict[int, _Draw] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides the argmax."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests as they enter, leave and move."""
        process_dict_updates(self._rows, batch_update, _as_draw)

    def apply(self, logits: Tensor) -> Tensor:
        """Only the drawn token of each row that is not greedy stays possible."""
        ways: dict[tuple[float, float], list[int]] = {}
        for number, draw in self._rows.items():
            ways.setdefault((draw.temperature, draw.top_p), []).append(number)
        for (temperature, top_p), numbers in ways.items():
            rows = torch.tensor(numbers, device=logits.device)
            keys = torch.tensor([self._rows[number].key for number in numbers], device=logits.device)
            steps = torch.tensor([len(self._rows[number].tokens) for number in numbers], device=logits.device)
            drawn = choose(logits[rows], keys, steps, temperature=temperature, top_p=top_p)
            logits[rows] = -torch.inf
            logits[rows, drawn] = 0.0
        return logits


def _as_draw(params: Any, _prompt: Any, tokens: list[int]) -> _Draw | None:
    wanted = (params.extra_args or {}).get(KEY)
    return _Draw(wanted["key"], wanted["temperature"], wanted["top_p"], tokens) if wanted else None
