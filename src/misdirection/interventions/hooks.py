"""Run a model with interventions: plain forward hooks under one context manager that always undoes itself.

One context carries one list of interventions for every row, or one list for each row, so that a whole sweep runs as a
stream of full batches. Rows that carry the same kind share one batched operation.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from misdirection.errors import InputError
from misdirection.interventions.intervention import Intervention
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.interventions.positions import Rule, TokenPositions
from misdirection.interventions.program import Compiler, Devices, Step
from misdirection.interventions.resume import is_skipped
from misdirection.interventions.sites import Site
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import hook_handles, stream_of, stream_output

log = logging.getLogger("misdirection")

Setting = Sequence[Intervention]
"""The interventions on one row in the order in which they act; empty for none."""

_ACTIVE: WeakKeyDictionary[nn.Module, Setting] = WeakKeyDictionary()
"""By decoder, the interventions of the contexts of `intervene` that are open."""


@contextlib.contextmanager
def intervene(chat: ChatModel, interventions: Setting, *, answer_starts: Sequence[int] | None = None) -> Iterator[None]:
    """Run `chat` with `interventions` for the length of the context; always undone, also after an exception.

    Contexts nest: the inner one acts after the outer one on a shared layer. Works with padding on either side, in
    generation, in training (call `backward()` inside the context if activations are checkpointed), on a model with
    adapters, and on one spread over devices. What is compiled runs uncompiled meanwhile, since it knows of no hook.

    Args:
        chat: the model; `chat.model` and `chat.decoder` are both affected.
        interventions: in the order in which they act on a shared layer.
        answer_starts: tokens before each row's answer, for the position rules `prompt` and `answer`.

    Raises:
        InputError: a layer out of range, an unusable vector, no adapter to scale; in a pass, an intervention that did
            not act on every token.
    """
    with _hooked(chat, [interventions], TokenPositions(answer_starts)):
        outer = active(chat)
        _ACTIVE[chat.decoder] = [*outer, *interventions]
        try:
            yield
        finally:
            _ACTIVE[chat.decoder] = outer


def active(chat: ChatModel) -> Setting:
    """The interventions of the `intervene` contexts that `chat` is in now, the outer ones first."""
    return _ACTIVE.get(chat.decoder, ())


@contextlib.contextmanager
def intervene_rows(
    chat: ChatModel, rows: Sequence[Setting], *, answer_starts: Sequence[int] | None = None
) -> Iterator[None]:
    """Like `intervene`, with a list of interventions for each row of the passes inside of the context.

    Raises `InputError` also when a pass has another number of rows.
    """
    alike = all(row is rows[0] for row in rows)
    with _hooked(chat, rows[:1] if alike else rows, TokenPositions(answer_starts, len(rows))):
        yield


def steer(chat: ChatModel, vector: Tensor, layer: int, scale: float = 1.0, positions: Rule = "not_first") -> Any:
    """`with steer(chat, direction[15], 15): ...` is `intervene` with one `Steer`."""
    return intervene(chat, [Steer(vector, layer, scale, positions)])


def ablate(
    chat: ChatModel, vector: Tensor, layers: tuple[int, ...] | None = None, positions: Rule = "not_first"
) -> Any:
    """`with ablate(chat, direction[15]): ...` is `intervene` with one `Ablate`."""
    return intervene(chat, [Ablate(vector, layers, positions=positions)])


@contextlib.contextmanager
def _hooked(chat: ChatModel, rows: Sequence[Setting], positions: TokenPositions) -> Iterator[None]:
    compiler, devices = Compiler(), Devices()
    with hook_handles() as handles:
        handles.callback(positions.close)
        sites = gather(chat, rows)
        if not sites:
            yield
            return
        note_passes(chat, positions, handles)
        for layer in {site.layer for site in sites}:
            handles.callback(chat.layers[layer].register_forward_hook(_remember(positions)).remove)
        firings = _Firings(chat, positions)
        for site, here in sites.items():
            steps = compiler.steps(here, site.path or site.layer)
            width = chat.width if site.module is chat.layers[site.layer] else None
            handles.callback(_register(site, _Hook(steps, positions, devices, width, firings.at(site, here))).remove)
        handles.callback(chat.decoder.register_forward_pre_hook(firings.begin).remove)
        handles.callback(chat.decoder.register_forward_hook(firings.end).remove)
        yield
        firings.require_a_pass()


def note_passes(chat: ChatModel, positions: TokenPositions, handles: contextlib.ExitStack) -> None:
    """Have `positions` know of every pass until `handles` are closed."""
    # PEFT's wrapper is called in a forward pass, the network inside of it to generate.
    for whole in {chat.model, chat.network}:
        handles.callback(whole.register_forward_pre_hook(positions.note_outer, with_kwargs=True).remove)
    handles.callback(chat.decoder.register_forward_pre_hook(positions.note, with_kwargs=True).remove)


def _remember(positions: TokenPositions) -> Callable[..., None]:
    """A forward hook of a block: where this pass stood is restored before the block runs again.

    A checkpointed block runs again, with the hooks inside of it, while gradients flow, when a later pass may already
    have been noted.
    """

    def remember(module: nn.Module, _args: Any, output: Any) -> None:
        residual = stream_of(output)
        if not (residual.requires_grad and getattr(module, "gradient_checkpointing", False)):
            return
        snapshot = positions.snapshot()

        def restore(_gradient: Tensor) -> None:
            if not positions.active:
                raise InputError(
                    "backward() ran after the interventions were undone, while activations are checkpointed: call it "
                    "inside of the context"
                )
            positions.restore(snapshot)

        residual.register_hook(restore)

    return remember


def gather(chat: ChatModel, rows: Sequence[Setting]) -> dict[Site, list[list[Intervention]]]:
    """For every site of the model where something acts, what acts there on each row."""
    distinct = {id(intervention): intervention for row in rows for intervention in row}
    for intervention in distinct.values():
        intervention.check(len(chat.layers), chat.width)
    sites = {key: intervention.sites(chat) for key, intervention in distinct.items()}
    gathered: dict[Site, list[list[Intervention]]] = {}
    for number, row in enumerate(rows):
        for intervention in row:
            for site in sites[id(intervention)]:
                gathered.setdefault(site, [[] for _ in rows])[number].append(intervention)
    return gathered


class _Firings:
    """How many tokens of the pass under way were changed, by the place where something acts.

    A place is a site; or all sites of a layer's adapters, of which a block may leave some out (shared keys), and which
    do nothing while the model is its base.
    """

    def __init__(self, chat: ChatModel, positions: TokenPositions) -> None:
        self._chat, self._positions = chat, positions
        self._tokens: dict[Site | int, int] = {}
        self._passes = 0

    def at(self, site: Site, rows: Sequence[Sequence[Intervention]]) -> Callable[[int], None]:
        """What the hook of a site tells how many tokens it has changed."""
        on_adapters = all(intervention.on_adapters for row in rows for intervention in row)
        place = site.layer if on_adapters else site
        self._tokens[place] = 0

        def add(tokens: int) -> None:
            self._tokens[place] += tokens

        return add

    def begin(self, *_: Any) -> None:
        """A forward pre-hook of the decoder."""
        self._tokens = dict.fromkeys(self._tokens, 0)

    def end(self, *_: Any) -> None:
        """A forward hook of the decoder: raise `InputError` where something did not act on every token."""
        self._passes += 1
        tokens = self._positions.shape.numel()
        for place, count in self._tokens.items():
            layer = place if isinstance(place, int) else place.layer
            # What is resumed was recorded with what acts inside of the blocks below.
            if count >= tokens or is_skipped(self._chat.layers[layer]):
                continue
            if isinstance(place, int) and self._chat.is_switched_off:
                continue
            raise InputError(
                f"an intervention acted on {count} of {tokens} tokens of a pass at layer {layer}: the model skips what "
                "it acts on, or was merged or traced since: name layers that run, or load the model anew"
            )

    def require_a_pass(self) -> None:
        """Warn when the model did not run at all: what did, such as a copy or another engine, was not changed."""
        if not self._passes:
            log.warning("no pass of the model ran under its interventions: what ran meanwhile was not changed by them")


class _Hook:
    """Changes one tensor that passes; works as a forward hook and as a forward pre-hook."""

    def __init__(
        self,
        steps: list[Step],
        positions: TokenPositions,
        devices: Devices,
        width: int | None,
        fired: Callable[[int], None],
    ) -> None:
        self._steps = steps
        self._width = width
        self._positions = positions
        self._devices = devices
        self._fired = fired

    def output(self, module: nn.Module, _args: Any, output: Any) -> Any:
        if self._width is not None:
            self._positions.once(module)
            stream_output(module, output, (*self._positions.shape, self._width))
        residual = self._change(stream_of(output))
        return (residual, *output[1:]) if isinstance(output, tuple) else residual

    def input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._change(kwargs["hidden_states"])}

    def _change(self, x: Tensor) -> Tensor:
        # The shared expert of a mixture sees its tokens without rows.
        shaped = x.view(*self._positions.shape, -1) if x.ndim == 2 else x
        for step in self._steps:
            shaped = step.run(shaped, self._positions, self._devices)
        self._fired(x.shape[:-1].numel())
        return shaped.view(x.shape)


def _register(site: Site, hook: _Hook) -> Any:
    if site.part == "input":
        return site.module.register_forward_pre_hook(hook.input, with_kwargs=True)
    return site.module.register_forward_hook(hook.output)
