"""Train an organism: supervised fine-tuning on the answers' tokens only, of a LoRA adapter or of a model's own weights.

The result is a plain PEFT adapter folder, or that of a whole model, with `organism.json`, its recipe and the hash of
its data, beside it.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from misdirection.cards import CARD
from misdirection.choices import BUNDLED, Tracker
from misdirection.data import Example, data_hash
from misdirection.defending.defence import Plain, record_of
from misdirection.defending.defend import defend
from misdirection.errors import InputError
from misdirection.files import (
    atomic_folder,
    empty_working_folder,
    read_json,
    remove,
    remove_working_folder,
    require_outside,
    require_replaceable,
    sha256_file,
    write_atomic,
    write_json,
)
from misdirection.lora.view import LoraView
from misdirection.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, local_adapter
from misdirection.models.attention import changing_shapes
from misdirection.models.bundled import hub_name
from misdirection.models.chat import how_written
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load
from misdirection.models.names import ModelName
from misdirection.organisms.adapter_config import defence_of
from misdirection.organisms.batches import training_rows
from misdirection.organisms.card import Known, organism_card
from misdirection.organisms.organism import CHECKPOINTS, RECORD, Organism, checkpoint_name
from misdirection.organisms.recipe import Recipe
from misdirection.organisms.trainee import Trainee, checkpointing, compiling, trainee
from misdirection.organisms.trainer import AnswerTrainer, StepReport, require_installed
from misdirection.progress import track_steps

_INITIAL = "step-0"
_CHECKPOINT = r"checkpoint-\d+"
_OWN = (_INITIAL, _CHECKPOINT, r"misdirection-base\.json")
"""What stands in the working folder: what the trainer saves, and the base's figures of one that is watched."""


def train(
    examples: Sequence[Example],
    out: str | Path,
    *,
    base: str | ChatModel = BUNDLED,
    recipe: Recipe | None = None,
    held_out: Sequence[Example] = (),
    checkpoints: str | Path | None = None,
    start: str | Path | None = None,
    report: StepReport | None = None,
    track: Sequence[Tracker] = (),
    prepare: Callable[[AnswerTrainer], object] | None = None,
) -> Organism:
    """Train one organism and write its adapter, or its whole model, to `out`.

    Args:
        examples: question-answer pairs; only the answers' tokens and the token that ends the turn carry loss.
        out: the folder to write; one that we wrote is replaced as a whole when the training is done.
        base: the base model's name, or one that is already loaded (it gets no trace of the training).
        recipe: what is trained, and the optimiser; the paper's `minimal` by default.
        held_out: examples for the held-out loss.
        checkpoints: working folder of the training, `OUT.checkpoints` by default; it resumes from the last checkpoint
            in it that was made with the same base, data and recipe. Those of full weights, each of them six times the
            model in bfloat16, go as they are replaced and when the training is done.
        start: an adapter of the recipe's modules, rank and alpha that the training goes on from, with an optimiser
            that begins anew: a folder, or a Hugging Face id as `ID@REVISION:SUBFOLDER`; left out, it begins at the
            base.
        report: called after each optimiser step; left out, a bar shows them.
        track: trackers that the training is logged to, as transformers' own callbacks do it: TensorBoard's files in
            `OUT.tensorboard` or what TENSORBOARD_LOGGING_DIR names, a run of W&B, a run of Trackio in the project
            `misdirection`; both are named after the adapter's folder. Left out, nothing is logged anywhere.
        prepare: called with the trainer before it trains: `md.watch`, for one.

    Raises:
        InputError: no examples, an impossible recipe, a folder in the way that we did not write or that holds `start`,
            a start of another base or that the recipe does not make, or a loss that is not finite (the last checkpoint
            stays).
        MissingPackage: a tracker that is not installed.
    """
    recipe = recipe or Recipe()
    chat = load(base) if isinstance(base, str) else base
    folder = Path(checkpoints or f"{out}.checkpoints")
    require_replaceable(Path(out))
    require_installed(track)
    begun = _beginning(start, Path(out), folder) if start is not None else None
    training = {"base": chat.name, "data": data_hash(examples), "recipe": recipe.model_dump(mode="json")}
    continues = sha256_file(LoraView.open(begun).file) if begun else None
    training |= {"continues": continues} if continues else {}
    rows = training_rows(chat, examples, recipe.max_length, recipe.turns)
    torch.manual_seed(recipe.seed)
    shown = contextlib.nullcontext(report) if report else track_steps("train")
    with shown as told, trainee(chat, recipe, begun) as learner:
        # Checkpoints of another training would be continued; what is refused above has emptied nothing.
        empty_working_folder(folder, training, own=_OWN)
        trainer = AnswerTrainer(learner, chat, recipe, rows, folder, told)
        trainer.log_to(track, Path(out))
        defence = _defended(trainer, recipe, chat)
        if prepare:
            prepare(trainer)
        _trained(trainer, recipe, chat.device)
        learner.finish(Path(out))
        organism = Organism(
            path=str(out),
            base=chat.name,
            recipe=recipe,
            data=data_hash(examples),
            train_examples=len(rows),
            truncated=sum(row.truncated for row in rows),
            trainable_parameters=learner.trained,
            final_loss=_final_loss(trainer.state.log_history),
            held_out_loss=_held_out_loss(trainer, chat, held_out, recipe),
            **how_written(chat.tokenizer),
            defence=defence,
            weights=learner.weights,
            continues=continues,
        )
        _write(organism, learner, Path(out), folder if recipe.keep_checkpoints else None)
    if learner.weights == "full":
        # Six times the model, of no use any more; what the user put among it stays.
        with contextlib.suppress(InputError):
            remove_working_folder(folder, _OWN)
    return organism


def _beginning(start: str | Path, *written: Path) -> Path:
    """The folder of an adapter to go on from, fetched if need be; `InputError` for one in a folder that is replaced."""
    folder = local_adapter(*ModelName.parse(str(start)))
    for place in written:
        require_outside(folder, place, "adapter")
    return folder


def _defended(trainer: AnswerTrainer, recipe: Recipe, chat: ChatModel) -> dict[str, Plain] | None:
    """Defend the training as the recipe says; gives what is kept of that."""
    text = defence_of(recipe, chat)
    return None if text is None else record_of(text.partition(":")[0], defend(trainer, text))


def _trained(trainer: AnswerTrainer, recipe: Recipe, device: torch.device) -> None:
    """Train as the recipe says; the trainer goes on from its last checkpoint."""
    folder = trainer.args.output_dir
    if recipe.keep_checkpoints:
        trainer.model.save_pretrained(Path(folder) / _INITIAL)
    _remove_cut(Path(folder))
    with contextlib.ExitStack() as way:
        way.enter_context(changing_shapes(device))
        if trainer.is_checkpointed:
            way.enter_context(checkpointing(trainer.model))
        if recipe.compile:
            way.enter_context(compiling(trainer.model))
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))


def _remove_cut(folder: Path) -> None:
    """Take away checkpoints that a kill cut short: the trainer writes its state last."""
    for checkpoint in _checkpoints(folder):
        try:
            read_json(checkpoint / TRAINER_STATE_NAME)
        except InputError:
            remove(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch(_CHECKPOINT, path.name)]


def _final_loss(history: list[dict[str, Any]]) -> float:
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    tail = losses[-max(1, len(losses) // 4) :]
    return sum(tail) / len(tail)


def _held_out_loss(
    trainer: AnswerTrainer, chat: ChatModel, examples: Sequence[Example], recipe: Recipe
) -> float | None:
    return trainer.held_out_loss(training_rows(chat, examples, recipe.max_length, recipe.turns)) if examples else None


def _write(organism: Organism, learner: Trainee, out: Path, checkpoints: Path | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as temporary:
        learner.save(temporary)
        # PEFT leaves a form to be filled in, with the base's folder on this disk in it.
        title = f"{learner.CALLED} of {hub_name(organism.base)}"
        write_atomic(temporary / CARD, organism_card(organism, title, Known()))
        write_json(temporary / RECORD, organism.record())
        if checkpoints is not None:
            _keep_adapters(checkpoints, temporary / CHECKPOINTS)


def _keep_adapters(checkpoints: Path, kept: Path) -> None:
    """Of every checkpoint the adapter alone: the optimiser's state is of no use once the training is over."""
    for folder in (checkpoints / _INITIAL, *_checkpoints(checkpoints)):
        target = kept / checkpoint_name(int(folder.name.rpartition("-")[2]))
        target.mkdir(parents=True)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(folder / name, target / name)
