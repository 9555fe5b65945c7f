"""An organism: a fine-tune, the base model it belongs to, and how it was trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from misdirection.files import read_json
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load
from misdirection.organisms.recipe import Recipe

RECORD = "organism.json"
CHECKPOINTS = "checkpoints"


def checkpoint_name(step: int) -> str:
    """The folder of the adapter after an optimiser step, inside of `CHECKPOINTS`."""
    return f"step-{step:06d}"


@dataclass(frozen=True)
class Organism:
    """A fine-tune: the base model it belongs to, its adapter or its whole weights, and how it was trained.

    Attributes:
        path: the folder of a PEFT adapter, or of a whole model that transformers loads; with `keep_checkpoints`, it has
            the adapter of every checkpoint, from the initial one in `checkpoints/step-000000/` to that of the last
            step.
        base: name of the base model.
        recipe: how it was trained.
        data: hash of the training examples.
        train_examples: number of examples trained on.
        truncated: how many of them were cut at `max_length`.
        trainable_parameters: number of trained weights.
        final_loss: mean training loss over the last quarter of the steps, nats/token.
        held_out_loss: loss on the held-out examples, nats/token; None without any.
        thinking, chat_template: how its chats were written; see `how_written`.
        defence: what it was defended by while it was trained: its name, strength and settings; None without one.
        weights: `full` for a whole model, whose own weights were trained.
        continues: hash of the weights of the adapter that the training went on from; None where it began at the base.
    """

    path: str
    base: str
    recipe: Recipe
    data: str
    train_examples: int
    truncated: int
    trainable_parameters: int
    final_loss: float
    held_out_loss: float | None
    thinking: str = "off"
    chat_template: str = ""
    defence: Mapping[str, str | float | None] | None = None
    weights: Literal["adapter", "full"] = "adapter"
    continues: str | None = None

    def load(self, **options: Any) -> ChatModel:
        """Base model and fine-tune, ready to run; `options` as in `misdirection.load`."""
        return load(self.base, adapter=self.path, **options)

    def record(self) -> dict[str, Any]:
        """What is kept in its folder; without the keys that say what an organism of an older version was, too."""
        record = {**asdict(self), "recipe": self.recipe.model_dump(mode="json")}
        usual = {"path": self.path, "defence": None, "weights": "adapter", "continues": None}
        return {key: value for key, value in record.items() if key not in usual or value != usual[key]}

    @classmethod
    def open(cls, path: str | Path) -> "Organism":
        """Read an organism's folder; `InputError` when its record is missing or damaged."""
        record = read_json(Path(path) / RECORD)
        return cls(**{**record, "path": str(path), "recipe": Recipe(**record["recipe"])})
