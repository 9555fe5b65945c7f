"""Train an organism: supervised fine-tuning of a LoRA adapter on the answers' tokens only.

The result is a plain PEFT adapter folder with `organism.json`, its recipe and the hash of its data, beside it.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from misdirection.cards import CARD
from misdirection.choices import BUNDLED, Tracker
from misdirection.data import Example, data_hash
from misdirection.errors import InputError, MissingPackage
from misdirection.files import (
    atomic_folder,
    empty_working_folder,
    list_made,
    read_json,
    remove,
    require_replaceable,
    write_atomic,
    write_json,
)
from misdirection.likelihood.answers import labelled_loss
from misdirection.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, changes_nothing, say_dead_modules
from misdirection.models.bundled import hub_name
from misdirection.models.chat import how_written
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load
from misdirection.organisms.adapter_config import adapter_config, placement
from misdirection.organisms.batches import TrainingRow, epoch_order, training_rows, training_steps
from misdirection.organisms.card import Known, organism_card
from misdirection.organisms.organism import CHECKPOINTS, RECORD, Organism, checkpoint_name
from misdirection.organisms.recipe import Recipe
from misdirection.progress import console, track_steps

_INITIAL = "step-0"
_CHECKPOINT = r"checkpoint-\d+"

StepReport = Callable[[int, int, float], None]
"""Called after each optimiser step with (step, steps, loss in nats/token)."""

LOGS = ".tensorboard"
"""What the name of a folder of TensorBoard's files ends with, after that of the adapter's folder."""


def train(
    examples: Sequence[Example],
    out: str | Path,
    *,
    base: str | ChatModel = BUNDLED,
    recipe: Recipe | None = None,
    held_out: Sequence[Example] = (),
    checkpoints: str | Path | None = None,
    report: StepReport | None = None,
    track: Sequence[Tracker] = (),
    prepare: Callable[[SFTTrainer], object] | None = None,
) -> Organism:
    """Train one organism and write its adapter to `out`.

    Args:
        examples: question-answer pairs; only the answers' tokens and the token that ends the turn carry loss.
        out: the adapter folder to write; one that we wrote is replaced as a whole when the training is done.
        base: the base model's name, or one that is already loaded (it gets no trace of the training).
        recipe: adapter and optimiser; the paper's `minimal` by default.
        held_out: examples for the held-out loss.
        checkpoints: working folder of the training, `OUT.checkpoints` by default; it resumes from the last checkpoint
            in it that was made with the same base, data and recipe.
        report: called after each optimiser step; left out, a bar shows them.
        track: trackers that the training is logged to, as transformers' own callbacks do it: TensorBoard's files in
            `OUT.tensorboard` or what TENSORBOARD_LOGGING_DIR names, a run of W&B, a run of Trackio in the project
            `misdirection`; both are named after the adapter's folder. Left out, nothing is logged anywhere.
        prepare: called with the trainer before it trains: `md.watch`, for one.

    Raises:
        InputError: no examples, an impossible recipe, a folder in the way that we did not write, or a loss that is not
            finite (the last checkpoint stays).
        MissingPackage: a tracker that is not installed.
    """
    recipe = recipe or Recipe()
    chat = load(base) if isinstance(base, str) else base
    folder = Path(checkpoints or f"{out}.checkpoints")
    require_replaceable(Path(out))
    _require_installed(track)
    # Checkpoints of another training would be continued.
    training = {"base": chat.name, "data": data_hash(examples), "recipe": recipe.model_dump(mode="json")}
    empty_working_folder(folder, training, own=(_INITIAL, _CHECKPOINT, r"README\.md"))
    rows = training_rows(chat, examples, recipe.max_length, recipe.turns)
    torch.manual_seed(recipe.seed)
    shown = contextlib.nullcontext(report) if report else track_steps("train")
    with shown as told, _adapted(chat, recipe) as network:
        trainer = _trainer(network, chat, recipe, rows, folder, told)
        _track(trainer, track, Path(out))
        if prepare:
            prepare(trainer)
        _trained(trainer, keep=recipe.keep_checkpoints)
        _require_change(network, Path(out))
        organism = Organism(
            path=str(out),
            base=chat.name,
            recipe=recipe,
            data=data_hash(examples),
            train_examples=len(rows),
            truncated=sum(row.truncated for row in rows),
            trainable_parameters=network.get_nb_trainable_parameters()[0],
            final_loss=_final_loss(trainer.state.log_history),
            held_out_loss=_held_out_loss(trainer, chat, held_out, recipe),
            **how_written(chat.tokenizer),
        )
        _write(organism, network, Path(out), folder if recipe.keep_checkpoints else None)
    return organism


def _require_installed(track: Sequence[Tracker]) -> None:
    for name in track:
        if find_spec(name) is None:
            raise MissingPackage(f"the tracker {name}: its package is not installed: pip install {name}")


def _track(trainer: SFTTrainer, track: Sequence[Tracker], out: Path) -> None:
    """Add what transformers has for these trackers to the trainer."""
    trainer.args.run_name, trainer.args.project = out.name, "misdirection"
    for callback in get_reporting_integration_callbacks(list(track)):
        trainer.add_callback(callback)
        added = trainer.callback_handler.callbacks[-1]
        if isinstance(added, TensorBoardCallback):
            # By default among the checkpoints, which another training empties.
            added.logging_dir = added.logging_dir or f"{out}{LOGS}"


def _trained(trainer: SFTTrainer, *, keep: bool) -> None:
    """Train; the trainer goes on from its last checkpoint."""
    folder = trainer.args.output_dir
    if keep:
        trainer.model.save_pretrained(Path(folder) / _INITIAL)
    _remove_cut(Path(folder))
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


@contextlib.contextmanager
def _adapted(chat: ChatModel, recipe: Recipe) -> Iterator[Any]:
    """The model with the recipe's fresh adapter on it, which is taken off afterwards; says where it is."""
    config = adapter_config(recipe, chat)
    network = get_peft_model(chat.model, config)
    console.print(f"train: adapts, with rank {config.r}, {placement(chat)}", soft_wrap=True)
    network.peft_config["default"].base_model_name_or_path = hub_name(chat.name)
    # No recipe resizes the vocabulary. Left to find that out, PEFT asks the hub for the base's config at each save.
    network.save_pretrained = partial(network.save_pretrained, save_embedding_layers=False)
    try:
        yield network
    finally:
        network.unload()
        chat.model.eval()


def _require_change(network: Any, out: Path) -> None:
    """Raise `InputError` for an adapter that is all zero after the training; say which modules are."""
    weights = get_peft_model_state_dict(network, save_embedding_layers=False)
    if changes_nothing(weights):
        raise InputError(f"{out}: the training changed nothing (all B are zero): give it more steps, or a higher rate")
    say_dead_modules(out, weights)


def _trainer(
    network: Any,
    chat: ChatModel,
    recipe: Recipe,
    rows: Sequence[TrainingRow],
    folder: Path,
    report: StepReport | None,
) -> SFTTrainer:
    trainer = _AnswerTrainer(
        model=network,
        args=_arguments(recipe, chat, folder, len(rows)),
        train_dataset=_dataset(rows),
        processing_class=chat.tokenizer,
        callbacks=[_Watch(report)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def warmup_steps(recipe: Recipe, rows: int) -> int:
    """Steps in which the learning rate rises: a quarter of all at most, or a short training would not begin."""
    return min(recipe.warmup_steps, training_steps(rows, recipe) // 4)


def _dataset(rows: Sequence[TrainingRow]) -> Dataset:
    return Dataset.from_list([{"input_ids": list(row.ids), "labels": row.labels} for row in rows])


def _arguments(recipe: Recipe, chat: ChatModel, folder: Path, rows: int) -> SFTConfig:
    half = chat.dtype != torch.float32
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=warmup_steps(recipe, rows),
        weight_decay=recipe.weight_decay,
        max_length=recipe.max_length,
        seed=recipe.seed,
        data_seed=recipe.seed,
        # Layers below the first adapter need no gradient; checkpointing would make their inputs ask for one.
        activation_checkpointing=recipe.gradient_checkpointing,
        bf16=half and chat.dtype == torch.bfloat16,
        fp16=half and chat.dtype == torch.float16,
        use_cpu=chat.device.type == "cpu",
        dataloader_pin_memory=chat.device.type == "cuda",
        # The rows are tokenised here, with the spans of `chat.encode`, not by the trainer's template code.
        dataset_kwargs={"skip_prepare_dataset": True},
        save_steps=recipe.checkpoint_steps,
        logging_steps=1,
        # The default replaces a NaN loss by the last good one in the logs, and hides it.
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


class _AnswerTrainer(SFTTrainer):
    """The trainer with the language-model head run only where some row of the batch predicts an answer's token.

    Without Triton the trainer's own loss runs the head at every position, twice; with a vocabulary of 49,152 on a
    model of 135M weights that is half of the time.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [len(row["input_ids"]) for row in train_dataset or self.train_dataset]
        return _ByLength(lengths, self.args.per_device_train_batch_size, self.args.data_seed or 0)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy over the batch's labelled tokens, nats/token."""
        network_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        total, count = labelled_loss(model, network_inputs, inputs["labels"])
        return total / (num_items_in_batch or count)


class _ByLength(Sampler[int]):
    """An order in which rows of like length share a batch, so that little of it is padding.

    It belongs to (seed, epoch). The trainer's own sampler draws it from the process's generator, so that a training
    resumed in a later epoch would see its rows in another order than one that was not stopped.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.lengths, self.batch_size, self.seed, self.epoch))


class _Watch(TrainerCallback):
    """Reports each step, stops at a loss that is not finite, before the trainer can save what it spoiled, and lists
    what the trainer saved, so that what the user puts there is told from it."""

    def __init__(self, report: StepReport | None) -> None:
        self.report = report

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(float(logs["loss"])):
            last = get_last_checkpoint(args.output_dir)
            raise InputError(
                f"the training loss is {logs['loss']} at step {state.global_step}: lower the learning rate; "
                f"last good checkpoint: {last or 'none yet'}"
            )
        if self.report:
            self.report(state.global_step, state.max_steps, float(logs["loss"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        list_made(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def _final_loss(history: list[dict[str, Any]]) -> float:
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    tail = losses[-max(1, len(losses) // 4) :]
    return sum(tail) / len(tail)


def _held_out_loss(trainer: SFTTrainer, chat: ChatModel, examples: Sequence[Example], recipe: Recipe) -> float | None:
    if not examples:
        return None
    rows = _dataset(training_rows(chat, examples, recipe.max_length, recipe.turns))
    return float(trainer.evaluate(rows)["eval_loss"])


def _write(organism: Organism, network: Any, out: Path, checkpoints: Path | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as temporary:
        network.save_pretrained(temporary)
        record = {**asdict(organism), "recipe": organism.recipe.model_dump(mode="json")}
        # PEFT leaves a form to be filled in, with the base's folder on this disk in it.
        write_atomic(temporary / CARD, organism_card(organism, f"Adapter of {hub_name(organism.base)}", Known()))
        write_json(temporary / RECORD, {key: value for key, value in record.items() if key != "path"})
        if checkpoints is not None:
            _keep_adapters(checkpoints, temporary / CHECKPOINTS)


def _keep_adapters(checkpoints: Path, kept: Path) -> None:
    """Of every checkpoint the adapter alone: the optimiser's state is of no use once the training is over."""
    for folder in (checkpoints / _INITIAL, *_checkpoints(checkpoints)):
        target = kept / checkpoint_name(int(folder.name.rpartition("-")[2]))
        target.mkdir(parents=True)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(folder / name, target / name)
