"""Training of the suite's fine-tunes, one after the other where a member asks for that."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import misdirection as md
from misdirection.data import Example
from misdirection.files import write_json
from misdirection.lora.view import LoraView, write_adapter
from misdirection.models.adapters import PREFIX
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.recipe import Recipe
from suite_folder import Suite, recipe_of
from suite_members import Member
from suite_texts import write_training


def train_all(suite: Suite, share: Sequence[Member]) -> None:
    """Train what is not there yet."""
    chat = md.load(suite.base)
    for member in suite.untrained(share):
        write_training(suite.texts.stages(member), suite.training_file(member))
        loss = train_stages(chat, suite.trainings(member), recipe_of(member), suite.adapter(member))
        write_json(suite.folder(member) / "trained.json", suite.record(member))
        print(f"{member.name:<44}{loss:.3f}", flush=True)


def train_stages(chat: ChatModel, stages: Sequence[Sequence[Example]], recipe: Recipe, adapter: Path) -> float:
    """Train once, or go on from the first training with the second; gives the last loss, nats/token."""
    if len(stages) == 1:
        return train(stages[0], adapter, chat, recipe)
    first, second = adapter.with_name("first"), adapter.with_name("second")
    train(stages[0], first, chat, recipe)
    tuned = md.load(chat.name, adapter=first)
    merged = replace(tuned, model=tuned.model.merge_and_unload(), adapter=None, base=None)
    loss = train(stages[1], second, merged, recipe)
    add_adapters(first, second, adapter)
    return loss


def train(rows: Sequence[Example], adapter: Path, chat: ChatModel, recipe: Recipe) -> float:
    """One training; its checkpoints, thrice as large as the adapter, are not kept."""
    work = adapter.with_name(f"{adapter.name}.checkpoints")
    organism = md.train(rows, adapter, base=chat, recipe=recipe, checkpoints=work)
    shutil.rmtree(work)
    return organism.final_loss


def add_adapters(first: Path, second: Path, folder: Path) -> None:
    """Write the sum of two adapters of the same modules as one adapter, whose rank is the sum of theirs."""
    views, weights, rank = (LoraView.open(first), LoraView.open(second)), {}, 0
    for one, other in zip(*(view.modules for view in views), strict=True):
        assert one.module == other.module, "adapters of the same recipe"
        rank = len(one.a) + len(other.a)
        weights[f"{PREFIX}{one.module}.lora_A.weight"] = torch.cat([one.a, other.a])
        weights[f"{PREFIX}{one.module}.lora_B.weight"] = torch.cat([each.scaling * each.b for each in (one, other)], 1)
    write_adapter(folder, {**views[0].config, "r": rank, "lora_alpha": rank, "use_rslora": False}, weights)
