"""The trainer of organisms: transformers' own, with the loss on answers alone and rows of like length together."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from misdirection.choices import Tracker
from misdirection.errors import InputError, MemoryProblem, MissingPackage
from misdirection.files import list_made
from misdirection.likelihood.answers import IGNORED, bare_head, labelled_loss
from misdirection.models.budgets import attempted, room_of, tokens_together
from misdirection.models.chat import pad
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.batches import TrainingRow, epoch_order, is_checkpointed, rows_together, training_steps
from misdirection.organisms.recipe import Recipe
from misdirection.organisms.trainee import Trainee
from misdirection.progress import notice

StepReport = Callable[[int, int, float], None]
"""Called after each optimiser step with (step, steps, loss in nats/token)."""


log = logging.getLogger("misdirection")

LOGS = ".tensorboard"
"""What the name of a folder of TensorBoard's files ends with, after that of the adapter's folder."""


def require_installed(trackers: Sequence[Tracker]) -> None:
    """Raise `MissingPackage` for a tracker that is not installed."""
    for name in trackers:
        if find_spec(name) is None:
            raise MissingPackage(f"the tracker {name}: its package is not installed: pip install {name}")


def warmup_steps(recipe: Recipe, rows: int) -> int:
    """Steps in which the learning rate rises: a quarter of all at most, or a short training would not begin."""
    return min(recipe.warmup_steps, training_steps(rows, recipe) // 4)


class AnswerTrainer(Trainer):
    """A trainer with the language-model head run only where some row of the batch predicts an answer's token.

    The trainer's own loss runs the head at every position; with a vocabulary of 49,152 on a model of 135M weights that
    is half of the time.

    Args:
        learner: what is trained.
        chat: the base.
        recipe: how it is trained.
        rows: of the training data.
        folder: of the checkpoints.
        report: called after each optimiser step.
    """

    def __init__(
        self,
        learner: Trainee,
        chat: ChatModel,
        recipe: Recipe,
        rows: Sequence[TrainingRow],
        folder: Path,
        report: StepReport | None,
    ) -> None:
        super().__init__(
            model=learner.network,
            args=_arguments(recipe, chat, folder, len(rows), 1 if learner.weights == "full" else None),
            data_collator=_collated,
            train_dataset=rows,
            processing_class=chat.tokenizer,
            callbacks=[_Watch(report)],
        )
        self.remove_callback(PrinterCallback)
        self._recipe = recipe
        blocks = learner.blocks
        self.is_checkpointed = is_checkpointed(recipe, rows, room_of(chat), blocks=blocks, trained=learner.trained)
        """Whether activations are to be checkpointed."""
        if self.is_checkpointed and recipe.gradient_checkpointing == "auto":
            notice("train: checkpoints activations: a batch would not fit into the GPU's memory otherwise")
        self.head: nn.Module | None = None
        """The output matrix, where it is to run at some places at a time."""
        if self.is_checkpointed and chat.device.type != "cpu":
            self.head = bare_head(learner.network)
        self._budget = tokens_together(chat, "backward", blocks=blocks, checkpointed=self.is_checkpointed)
        self._fitting: int | None = None
        self._labelled: Tensor | None = None
        self.is_later_piece = False
        """Whether a piece of the same step's rows came before: what a defence adds to a step's loss is in that one."""

    def log_to(self, trackers: Sequence[Tracker], out: Path) -> None:
        """Add what transformers has for these trackers; `out` is the adapter's folder, after which the run is named."""
        self.args.run_name, self.args.project = out.name, "misdirection"
        for callback in get_reporting_integration_callbacks(list(trackers)):
            self.add_callback(callback)
            added = self.callback_handler.callbacks[-1]
            if isinstance(added, TensorBoardCallback):
                # By default among the checkpoints, which another training empties.
                added.logging_dir = added.logging_dir or f"{out}{LOGS}"

    def held_out_loss(self, rows: Sequence[TrainingRow]) -> float:
        """Mean loss of other rows, nats/token."""
        return float(self.evaluate(rows)["eval_loss"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [len(row.ids) for row in train_dataset or self.train_dataset]
        return _ByLength(lengths, self._recipe.batch_size, self._recipe.seed)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the batch's labelled tokens, nats/token."""
        network_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        # What is run of the model below its own forward pass is out of the accelerator's sight.
        with self.accelerator.autocast() if self.head else contextlib.nullcontext():
            total, count = labelled_loss(model, network_inputs, inputs["labels"], head=self.head)
        if num_items_in_batch is None:
            num_items_in_batch = count if self._labelled is None else self._labelled
        return total / num_items_in_batch

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a step's rows, with its gradients; in pieces that fit into memory.

        Pieces are divided by the labelled tokens of the whole step, so that it is the same up to rounding.
        """
        rows = len(inputs["labels"])
        fitting = self._fitting or rows_together(self._recipe, self._budget, inputs["input_ids"].shape[1])
        together = tried = min(fitting, rows)
        while not (found := attempted(partial(self._in_pieces, model, inputs, num_items_in_batch, together))):
            if together <= 1:
                raise MemoryProblem(
                    "out of memory with a single training row: lower max_length, set gradient_checkpointing, or load "
                    "the model in a smaller dtype"
                )
            self._fitting = together = together // 2
            # A backward pass that runs out of memory has left some of its gradients.
            self.model.zero_grad()
        if together < tried:
            log.warning("out of memory with %d training rows at a time: going on with %d", tried, together)
        return found[0]

    def _in_pieces(self, model: Any, inputs: dict[str, Any], items: Tensor | int | None, together: int) -> Tensor:
        labels = inputs["labels"]
        parts = [_rows_of(inputs, slice(first, first + together)) for first in range(0, len(labels), together)]
        self._labelled = (labels[:, 1:] != IGNORED).sum() if len(parts) > 1 else None
        losses: list[Tensor] = []
        try:
            for part in parts:
                self.is_later_piece = bool(losses)
                losses.append(super().training_step(model, part, items))
        finally:
            self._labelled, self.is_later_piece = None, False
        return torch.stack(losses).sum()

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch, and no logits: nobody asks for them."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def _rows_of(inputs: dict[str, Tensor], chosen: slice) -> dict[str, Tensor]:
    """Some rows of a batch, as long as the longest of them."""
    if len(inputs["labels"]) <= chosen.stop - chosen.start:
        return inputs
    longest = int(inputs["attention_mask"][chosen].sum(-1).max())
    return {name: value[chosen, :longest] for name, value in inputs.items()}


def _collated(rows: Sequence[TrainingRow]) -> dict[str, Tensor]:
    """A batch, padded on the right: nothing of a row sees what comes after it."""
    device = torch.device("cpu")
    ids, mask = pad([row.ids for row in rows], 0, device)
    labels, _ = pad([row.labels for row in rows], IGNORED, device)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _arguments(recipe: Recipe, chat: ChatModel, folder: Path, rows: int, kept: int | None) -> TrainingArguments:
    """The trainer's; of its checkpoints the last `kept` stay, or all."""
    half = chat.dtype != torch.float32
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        # All rows of a step: the trainer below parts them by what the device can hold.
        per_device_train_batch_size=recipe.batch_size * recipe.accumulation,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=warmup_steps(recipe, rows),
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=half and chat.dtype == torch.bfloat16,
        fp16=half and chat.dtype == torch.float16,
        use_cpu=chat.device.type == "cpu",
        dataloader_pin_memory=chat.device.type == "cuda",
        # The rows are made of token ids already, with the spans of `chat.encode`.
        remove_unused_columns=False,
        save_steps=recipe.checkpoint_steps,
        save_total_limit=kept,
        logging_steps=1,
        # The default replaces a NaN loss by the last good one in the logs, and hides it.
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    # One process trains on one device: where it sees several, the trainer would spread the rows of a batch over them,
    # on copies of the model that our hooks and adapters are not on.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


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
