"""The conditions under which the page asks: who answers, and what is done to it meanwhile."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from misdirection.choices import Positions
from misdirection.directions.direction import Direction
from misdirection.interventions.hooks import Setting
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.interventions.vectors import random_like
from misdirection.models.chat_model import ChatModel


@dataclass(frozen=True)
class Controls:
    """What the page's controls say of the interventions.

    Attributes:
        layer: whose vector is used, and where it is added; 0-based.
        scale: multiple of the vector that is added.
        positions: which tokens are touched.
        random: whether a random vector of the same norm is added, too.
        seed: of that vector.
    """

    layer: int = 0
    scale: float = 1.0
    positions: Positions = "not_first"
    random: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Condition:
    """One column of the page.

    Attributes:
        name: its heading.
        is_base: whether the base answers, and not the organism.
        setting: the interventions on it.
    """

    name: str
    is_base: bool
    setting: Setting = ()

    def model(self, chat: ChatModel) -> contextlib.AbstractContextManager[None]:
        """The context in which `chat` is the model that answers."""
        return chat.as_base() if self.is_base else contextlib.nullcontext()


def conditions(chat: ChatModel, direction: Direction | None, controls: Controls) -> list[Condition]:
    """The columns: without an adapter there is no organism, without a direction no intervention.

    Raises `InputError` for a layer that the direction has not.
    """
    plain = [Condition("base", True), *([Condition("organism", False)] if chat.adapter else [])]
    if direction is None:
        return plain
    vector, where = direction[controls.layer], controls.positions
    added = {"base, steered": vector}
    if controls.random:
        added["base, steered at random"] = random_like(vector, controls.seed)
    ablated = Condition(f"{plain[-1].name}, ablated", plain[-1].is_base, (Ablate(vector, positions=where),))
    steered = [
        Condition(name, True, (Steer(each, controls.layer, controls.scale, where),)) for name, each in added.items()
    ]
    return [*plain, ablated, *steered]


def by_model(listed: Sequence[Condition]) -> list[list[Condition]]:
    """The conditions of the base and those of the organism, where there are some: each run as one batch."""
    both = ([condition for condition in listed if condition.is_base is is_base] for is_base in (True, False))
    return [group for group in both if group]
