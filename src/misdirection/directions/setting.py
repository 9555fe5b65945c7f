"""The intervention that a direction file, a layer and a scale name: steering by a scale, without one ablation."""

from pathlib import Path

from misdirection.choices import Positions
from misdirection.directions.direction import Direction
from misdirection.errors import InputError
from misdirection.interventions.hooks import Setting
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.models.chat_model import ChatModel


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
    if scale is None:
        return [Ablate(vectors[layer], positions=positions)], f"ablate {name}"
    vectors.require_additive(as_additive)
    return [Steer(vectors[layer], layer, scale, positions)], f"steer {name} scale {scale:g}"
