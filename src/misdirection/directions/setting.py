"""The intervention that a direction file, a layer and a scale name: steering by a scale, without one ablation."""

from pathlib import Path

from torch import Tensor

from misdirection.choices import Positions
from misdirection.directions.direction import Direction
from misdirection.errors import InputError
from misdirection.interventions.hooks import Setting
from misdirection.interventions.intervention import Intervention
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.interventions.positions import Rule
from misdirection.models.chat_model import ChatModel


def by_scale(vector: Tensor, layer: int, scale: float | None, positions: Rule) -> Intervention:
    """What a scale says is done with a vector, [width]: it is added at `layer`; None ablates it at all layers."""
    return Ablate(vector, positions=positions) if scale is None else Steer(vector, layer, scale, positions)


def in_words(scale: float | None) -> str:
    """The same for people."""
    return "ablated everywhere" if scale is None else f"added at scale {scale:g}"


def require_whole(direction: Path | None, layer: int | None, scale: float | None) -> None:
    """Raises `InputError` for a layer or a scale without a direction, and for a direction without a layer."""
    if direction is None and (layer is not None or scale is not None):
        raise InputError("a layer and a scale go with a direction: name its file (--direction)")
    if direction is not None and layer is None:
        raise InputError(f"{direction}: name the layer whose vector is used (--layer)")


def direction_setting(
    chat: ChatModel,
    direction: Path | None,
    layer: int | None,
    scale: float | None = None,
    positions: Positions = "not_first",
    as_additive: bool = False,
) -> tuple[Setting, str]:
    """The setting, and what tables of answers call it; without a direction nothing, and an empty name.

    Args:
        chat: the model that it is for.
        direction: a file that `extract` wrote.
        layer: whose vector is used: it is added at that layer, or taken out of all of them.
        scale: a multiple of the vector's own norm that is added; None ablates.
        positions: which tokens are touched.
        as_additive: add a direction all the same that says that it is for ablation.

    Raises `InputError` as `require_whole` does, and for a direction of another model.
    """
    require_whole(direction, layer, scale)
    if direction is None or layer is None:
        return [], ""
    vectors = Direction.load(direction)
    vectors.require_fit(chat)
    name = f"{direction.stem} layer {layer} {positions}"
    if scale is not None:
        vectors.require_additive(as_additive)
    called = f"ablate {name}" if scale is None else f"steer {name} scale {scale:g}"
    return [by_scale(vectors[layer], layer, scale, positions)], called
