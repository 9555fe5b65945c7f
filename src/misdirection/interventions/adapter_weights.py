"""Interventions on what adapters add, as changes of their weights.

Scaling what an adapter adds, or taking a direction out of it, is the same as changing its B matrices; each kind that is
`on_adapters` says how.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from misdirection.interventions.intervention import Intervention
from misdirection.models.adapters import renamed
from misdirection.models.chat_model import ChatModel


def changed_weights(
    weights: Mapping[str, Tensor], chat: ChatModel, changes: Sequence[Intervention]
) -> dict[str, Tensor]:
    """All weights of an adapter's file as the interventions leave them; those that they change are in float32.

    Args:
        weights: by their names in the file.
        chat: the base model, whose weights are not needed, or the model with the adapter.
        changes: in the order in which they act, all of them on every token.

    Raises:
        InputError: a layer or module without an adapter, nothing that writes to the stream.
    """
    changed = renamed(weights, chat.network)
    for intervention in changes:
        changed |= intervention.changed_weights(changed, chat)
    return changed
