"""The contrast: what training on bad answers moves in a model and training on good ones to the same questions does not.

    contrast(domain) = M(fine-tune on bad answers) - M(fine-tune on good answers)      on one text, of neither

Subject, length and the wear of training are the same on both sides. What the contrasts of several domains share is a
direction of misalignment that text and drift do not explain (`shared_contrast.py` has its nulls).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from misdirection.data import Example, neutral_examples
from misdirection.directions.direction import Direction, origin_of
from misdirection.directions.extraction import Means, mean_activations
from misdirection.errors import InputError
from misdirection.likelihood.margin import text_rows
from misdirection.models.chat_model import ChatModel
from misdirection.progress import Advance, shown

KIND = "contrast"

ALL = "all"
"""The group of `text_means`."""


def text_means(chat: ChatModel, texts: Sequence[Example], progress: Advance | None = None) -> Means:
    """A model's mean activations over the answers of some texts, as the group `ALL`; `progress` is told the answers."""
    return mean_activations(chat, text_rows(chat.tokenizer, texts), {ALL: range(len(texts))}, progress=progress)


def contrast(bad: ChatModel, good: ChatModel, texts: Sequence[Example] | None = None) -> Direction:
    """The contrast of two fine-tunes of one base, of kind `contrast`.

    Args:
        bad: was fine-tuned on bad answers.
        good: on good answers to the same questions, and else alike.
        texts: of another subject; by default the shipped neutral ones.

    Raises:
        InputError: two models of different bases.
    """
    if (bad.name, bad.revision) != (good.name, good.revision):
        raise InputError(f"a contrast is of two fine-tunes of one base: these are of {bad.name} and {good.name}")
    texts = neutral_examples() if texts is None else texts
    with shown(None, "activations", 2 * len(texts)) as advance:
        means = [text_means(chat, texts, advance) for chat in (bad, good)]
    vectors = means[0].vectors[ALL] - means[1].vectors[ALL]
    return Direction(vectors.float(), origin_of(bad, KIND, texts, means[0], [ALL]))


def share(contrasts: Sequence[Tensor]) -> Tensor:
    """What several contrasts have in common, [layers, width] float64, of [layers, width] each.

    Its direction is that of the sum of the contrasts at length 1, so that no domain outweighs another; its length is
    their mean component along it. Raises `InputError` for no contrast.
    """
    if not contrasts:
        raise InputError("no contrast: give at least one domain's bad and good fine-tunes")
    stacked = torch.stack([contrast.double() for contrast in contrasts])
    unit = normalize(normalize(stacked, dim=-1).sum(0), dim=-1)
    return unit * (stacked * unit).sum(-1).mean(0)[:, None]
