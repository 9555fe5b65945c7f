"""Train an organism: supervised fine-tuning of a LoRA adapter on the answers' tokens only.

The result is a plain PEFT adapter folder with `organism.json`, its recipe and the hash of its data, beside it.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from misdirection.chat import encode
from misdirection.data import Example, data_hash
from misdirection.errors import MisdirectionError
from misdirection.files import atomic_folder, read_json, write_json
from misdirection.models import BUNDLED, ChatModel, load
from misdirection.organisms.recipes import adapter_config
from misdirection.recipe import Recipe

_IGNORED = -100
RECORD = "organism.json"

StepReport = Callable[[int, int, float], None]
"""Called after each optimiser step with (step, steps, loss in nats/token)."""


@dataclass(frozen=True)
class Organism:
    """A fine-tune: the base model it belongs to, its adapter and how it was trained.

    Attributes:
        path: the PEFT adapter folder.
        base: name of the base model.
        recipe: how it was trained.
        data: hash of the training examples.
        train_examples: number of examples trained on.
        truncated: how many of them were cut at `max_length`.
        trainable_parameters: number of adapter weights.
        final_loss: mean training loss over the last quarter of the steps, nats/token.
        held_out_loss: loss on the held-out examples, nats/token; None without any.
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

    def load(self, **options: Any) -> ChatModel:
        """Base model and adapter, ready to run; `options` as in `misdirection.load`."""
        return load(self.base, adapter=self.path, **options)

    @classmethod
    def open(cls, path: str | Path) -> "Organism":
        """Read an organism's folder; `MisdirectionError` when its record is missing or damaged."""
        record = read_json(Path(path) / RECORD)
        return cls(**{**record, "path": str(path), "recipe": Recipe(**record["recipe"])})


def train(
    examples: Sequence[Example],
    out: str | Path,
    *,
    base: str | ChatModel = BUNDLED,
    recipe: Recipe | None = None,
    held_out: Sequence[Example] = (),
    checkpoints: str | Path | None = None,
    report: StepReport | None = None,
) -> Organism:
    """Train one organism and write its adapter to `out`.

    Args:
        examples: question-answer pairs; only the answers' tokens and the token that ends the turn carry loss.
        out: the adapter folder to write; replaced as a whole when the training is done.
        base: the base model's name, or one that is already loaded (it gets no trace of the training).
        recipe: adapter and optimiser; the paper's `minimal` by default.
        held_out: examples for the held-out loss.
        checkpoints: folder for checkpoints, `OUT.checkpoints` by default; training resumes from the last one in it
            that was made with the same base, data and recipe.
        report: called after each optimiser step.

    Raises:
        MisdirectionError: no examples, an impossible recipe, or a loss that is not finite (the last checkpoint stays).
    """
    recipe = recipe or Recipe()
    chat = load(base) if isinstance(base, str) else base
    folder = Path(checkpoints or f"{out}.checkpoints")
    _keep_checkpoints(
        folder, {"base": chat.name, "data": data_hash(examples), "recipe": recipe.model_dump(mode="json")}
    )
    rows, truncated = _rows(chat, examples, recipe.max_length)
    torch.manual_seed(recipe.seed)
    network = get_peft_model(chat.model, adapter_config(recipe, chat))
    try:
        trainer = _trainer(network, chat, recipe, rows, folder, report)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
        organism = Organism(
            path=str(out),
            base=chat.name,
            recipe=recipe,
            data=data_hash(examples),
            train_examples=len(rows),
            truncated=truncated,
            trainable_parameters=network.get_nb_trainable_parameters()[0],
            final_loss=_final_loss(trainer.state.log_history),
            held_out_loss=_held_out_loss(trainer, chat, held_out, recipe.max_length),
        )
        _write(organism, network, Path(out))
    finally:
        network.unload()
        chat.model.eval()
    return organism


def _keep_checkpoints(folder: Path, training: dict[str, Any]) -> None:
    """Empty the folder unless its checkpoints are of the same training, or another one would be continued."""
    record = folder / "training.json"
    if not record.is_file() or read_json(record) != training:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(record, training)


def _rows(chat: ChatModel, examples: Sequence[Example], max_length: int) -> tuple[list[dict[str, list[int]]], int]:
    """Token ids and labels per example, and how many were cut; an answer wholly beyond `max_length` is an error."""
    if not examples:
        raise MisdirectionError("no training examples: the data is empty")
    rows, truncated = [], 0
    for number, example in enumerate(examples, start=1):
        encoded = encode(chat.tokenizer, example.question, example.answer, example.system)
        if encoded.start >= max_length:
            raise MisdirectionError(
                f"training example {number}: its prompt alone has {encoded.start} tokens, the limit is {max_length}: "
                "raise max_length or drop it"
            )
        # The token that ends the turn is learned, too, or the organism would never stop.
        labels = [_IGNORED] * encoded.start + list(encoded.ids[encoded.start :])
        rows.append({"input_ids": list(encoded.ids[:max_length]), "labels": labels[:max_length]})
        truncated += len(encoded.ids) > max_length
    return rows, truncated


def _trainer(
    network: Any,
    chat: ChatModel,
    recipe: Recipe,
    rows: list[dict[str, list[int]]],
    folder: Path,
    report: StepReport | None,
) -> SFTTrainer:
    trainer = _AnswerTrainer(
        model=network,
        args=_arguments(recipe, chat, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=chat.tokenizer,
        callbacks=[_Watch(report)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(recipe: Recipe, chat: ChatModel, folder: Path) -> SFTConfig:
    half = chat.dtype != torch.float32
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_length=recipe.max_length,
        seed=recipe.seed,
        data_seed=recipe.seed,
        # Rows of like length share a batch: little of it is padding.
        train_sampling_strategy="group_by_length",
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

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy over the batch's labelled tokens, nats/token."""
        targets = inputs["labels"][:, 1:]
        kept = (targets != _IGNORED).any(0).nonzero().squeeze(-1)
        network_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        logits = model(**network_inputs, use_cache=False, logits_to_keep=kept).logits
        labels = targets[:, kept].to(logits.device)
        total = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="sum")
        return total / (num_items_in_batch or (labels != _IGNORED).sum())


class _Watch(TrainerCallback):
    """Reports each step, and stops at a loss that is not finite, before the trainer can save what it spoiled."""

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
            raise MisdirectionError(
                f"the training loss is {logs['loss']} at step {state.global_step}: lower the learning rate; "
                f"last good checkpoint: {last or 'none yet'}"
            )
        if self.report:
            self.report(state.global_step, state.max_steps, float(logs["loss"]))


def _final_loss(history: list[dict[str, Any]]) -> float:
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    tail = losses[-max(1, len(losses) // 4) :]
    return sum(tail) / len(tail)


def _held_out_loss(trainer: SFTTrainer, chat: ChatModel, examples: Sequence[Example], max_length: int) -> float | None:
    if not examples:
        return None
    rows = Dataset.from_list(_rows(chat, examples, max_length)[0])
    return float(trainer.evaluate(rows)["eval_loss"])


def _write(organism: Organism, network: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    network.peft_config["default"].base_model_name_or_path = organism.base
    with atomic_folder(out) as temporary:
        network.save_pretrained(temporary, save_embedding_layers=False)
        record = {**asdict(organism), "recipe": organism.recipe.model_dump(mode="json")}
        write_json(temporary / RECORD, {key: value for key, value in record.items() if key != "path"})
