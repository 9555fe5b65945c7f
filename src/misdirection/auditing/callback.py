"""Watch a model while it is fine-tuned: how far its margin has moved from the base's, in any tracker, and not too far.

    trainer = SFTTrainer(...)
    watch(trainer, stop_above=0.01)
    trainer.train()

The model answers nothing: shipped questions with both of their answers, and neutral text, pass through it, in its own
forward pass, so that it computes there as in training (autocast, adapters), and one pass gives margins, losses and
activations.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from misdirection.auditing.drift import middle, random_95
from misdirection.auditing.results import TrainingBase
from misdirection.data import Example, ProbePair, data_hash, neutral_examples, probe_pairs
from misdirection.data.selection import spread
from misdirection.data.words import WordWeights
from misdirection.directions.direction import Direction
from misdirection.directions.in_training import fitting_vectors
from misdirection.errors import InputError
from misdirection.likelihood.answers import AnswerBatch
from misdirection.likelihood.margin import pair_rows, text_rows
from misdirection.models.budgets import fitting_batches
from misdirection.models.chat import Encoded
from misdirection.models.chat_model import ChatModel
from misdirection.models.in_training import chat_of, leaves_base, network_of, require_whole, tokenizer_of, untouched
from misdirection.models.layers import decoder_layers, hook_handles, stream_of
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import beyond, bootstrap
from misdirection.statistics.resampling import Floats

EVERY, EVERY_DECISIVE = 25, 100
"""Optimiser steps between two measurements: of a few questions, to be looked at, and of all, to decide by. With eight
exchanges a step, the first take about 3% of the time, the second by arithmetic about 8%."""

LOOKED_AT = 8
"""How many of the shipped probe pairs, of the neutral texts and of held-out rows are taken to be looked at. Nothing can
be decided by so few: the one fine-tune of the bundled model that was looked at, and that an audit calls misaligned,
does not move them for sure."""

log = logging.getLogger("misdirection")


def watch(
    trainer: Any,
    *,
    direction: Direction | Tensor | None = None,
    pairs: Sequence[ProbePair] | None = None,
    every: int | None = None,
    stop_above: float | None = None,
    words: WordWeights | None = None,
    held_out: Sequence[Example] = (),
) -> "AuditCallback":
    """Measure the model that `trainer` fine-tunes, every so many optimiser steps and after the last one.

    Call it before `trainer.train()`. It logs to `trainer.state.log_history` and to all trackers of `report_to`:

        misdirection/margin_shift        mean margin of the pairs, minus that of the base; nats/token
        misdirection/margin_shift_low    bounds of its 95% interval, bootstrap over questions
        misdirection/margin_shift_high
        misdirection/margin_shift_beyond_words       the shift beyond what the words of the training data predict, with
        misdirection/margin_shift_beyond_words_low   its bounds; with `words` only
        misdirection/margin_shift_beyond_words_high
        misdirection/damage              rise of the loss on neutral text, with its bounds; nats/token
        misdirection/damage_low
        misdirection/damage_high
        misdirection/in_domain_loss      change of the loss on `held_out`, with its bounds; with such rows only
        misdirection/in_domain_loss_low
        misdirection/in_domain_loss_high
        misdirection/drift               component along `direction` of the mean change of activations since the base,
                                         over the tokens of the same answers, at half depth; activation units
        misdirection/drift_random        size of the component that 95% of random directions do not exceed

    Trackers show these names after `train/`, where transformers puts all that a trainer logs. Drift is left out without
    a direction, and stops nothing: a benign fine-tune drifts along a misalignment direction as far as a bad one does,
    since most of it is style.

    The base is the model with its adapters switched off. Where there are none, or they do not leave the base's weights
    as they were (trained biases, PiSSA and other starts from the weights), it is the model as the training begins,
    whose measurements are kept in `args.output_dir`, so that a resumed training is compared with it, too.

    Args:
        trainer: a `transformers.Trainer` or one of TRL's, of a chat model, with its tokenizer as `processing_class`.
        direction: one vector per layer, [layers, width], or a `Direction` of this base model.
        pairs: questions with an aligned and a misaligned answer; by default eight of the shipped ones, of eight themes,
            and with `stop_above` or `words` all 120 open ones.
        every: optimiser steps between two measurements; by default 25, with `stop_above` or `words` 100.
        stop_above: stop the training when the lower bound of the margin's shift is above it, nats/token; None never
            stops. How much is large depends on the base model: what the bad fine-tunes and the controls of a reference
            moved (`misdirection reference`) tells. With `words` the shift beyond words must lie above zero, too.
        words: weights of the training answers' words against others, `WordWeights.fit(answers, others)`.
        held_out: rows of the training's own domain that are not trained on; eight of them are read, or all where all
            questions are asked.

    Raises:
        InputError: a number out of range, no pairs, no tokenizer or one without a chat template, a direction of
            another model, weights split over processes. `trainer.train()` raises it for a model that gives no finite
            margins, and for a resumed training whose base's values are missing or of other pairs.
    """
    is_decisive = stop_above is not None or words is not None
    every = (EVERY_DECISIVE if is_decisive else EVERY) if every is None else every
    if every < 1:
        raise InputError(f"every: {every} optimiser steps: give at least 1")
    if stop_above is not None and not stop_above > 0:
        raise InputError(f"stop_above: {stop_above} nats/token: give a shift above 0, or None never to stop")
    require_whole(trainer, "measured in training: audit its checkpoints with `misdirection audit`")
    count = None if is_decisive else LOOKED_AT
    chosen = spread(probe_pairs(), count) if pairs is None else list(pairs)
    neutral, own = spread(neutral_examples(), count), spread(held_out, count)
    tokenizer, texts = tokenizer_of(trainer), data_hash([*chosen, *neutral, *own])
    rows = _Rows(pair_rows(tokenizer, chosen), text_rows(tokenizer, neutral), text_rows(tokenizer, own))
    predicted = None if words is None else words.predict(chosen)
    callback = AuditCallback(trainer, rows, texts, every, stop_above, predicted)
    if direction is not None:
        callback.direction = _at_half_depth(direction, callback.network)
    trainer.add_callback(callback)
    return callback


@dataclass(frozen=True)
class _Rows:
    """What passes through the model.

    Attributes:
        pairs: two for each pair, the misaligned answer first.
        neutral: texts of no domain.
        held_out: of the training's own domain.
    """

    pairs: list[Encoded]
    neutral: list[Encoded]
    held_out: list[Encoded]


@dataclass(frozen=True, eq=False)
class _Measured:
    """One model on the rows.

    Attributes:
        margins: [pairs] float64, nats/token.
        neutral, held_out: losses, [rows] float64, nats/token.
        activation: [width] float64, at half depth: mean over each answer's tokens, then over all answers of the pairs.
    """

    margins: Tensor
    neutral: Tensor
    held_out: Tensor
    activation: Tensor


@dataclass(eq=False)
class AuditCallback(TrainerCallback):
    """Measures, logs and stops; made by `watch`, which alone can hand it the trainer.

    A callback is told of logged values after the trackers are, so that it cannot add to them: it has the trainer log
    its own. The model, its modes, gradients and hooks, and random numbers are afterwards what they were.

    Attributes:
        trainer: whose model is measured.
        rows: what passes through the model.
        texts: the hash of what they are.
        every: optimiser steps between two measurements.
        stop_above: nats/token, or None.
        predicted: what words predict of each pair, [pairs, sizes], or None.
        direction: [width] float64, of length one, at half depth; or None.
    """

    trainer: Any = field(repr=False)
    rows: _Rows = field(repr=False)
    texts: str
    every: int
    stop_above: float | None
    predicted: Floats | None = field(default=None, repr=False)
    direction: Tensor | None = field(default=None, repr=False)
    _base: _Measured | None = field(default=None, repr=False)

    @property
    def network(self) -> Any:
        """The model below what makes it parallel or compiled."""
        return network_of(self.trainer)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the base, once: a second training of the same model is compared with the same base."""
        self._base = self._base or self._measure_base(Path(args.output_dir), state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure and log, when it is time to, and stop."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        assert self._base is not None, "no step comes before the training begins"
        own = self._measure()
        shifts = own.margins - self._base.margins
        shift, words = bootstrap(shifts), None if self.predicted is None else beyond(shifts, self.predicted)
        losses = _values("damage", _rise(own.neutral, self._base.neutral))
        losses |= _values("in_domain_loss", _rise(own.held_out, self._base.held_out))
        drift = _drift(own.activation - self._base.activation, self.direction)
        margins = _values("margin_shift", shift) | _values("margin_shift_beyond_words", words)
        self._log(margins | losses | drift, control)
        above = self.stop_above is not None and shift.low > self.stop_above and (words is None or words.low > 0)
        if self.stop_above is not None and _agreed(above):
            moved = f"{shift.interval} nats/token"
            log.warning("training stops at step %d: its margin moved by %s", state.global_step, moved)
            control.should_training_stop = True

    def _measure_base(self, folder: Path, state: TrainerState) -> _Measured:
        network = self.network
        if leaves_base(network):
            with untouched(network), network.disable_adapter():
                return self._checked(self._measure())
        if state.global_step:
            return _load(folder, self.texts, state.global_step)
        base = self._checked(self._measure())
        # On every machine, since a resumed training reads it on all.
        if state.is_local_process_zero:
            kept = {name: values.tolist() for name, values in vars(base).items()}
            TrainingBase(texts=self.texts, **kept).save(folder)
        return base

    def _checked(self, base: _Measured) -> _Measured:
        if not all(values.isfinite().all() for values in vars(base).values()):
            dtype = self.network.dtype
            raise InputError(f"the base's margins are not finite in {dtype}: load it in bfloat16 or float32")
        return base

    def _measure(self) -> _Measured:
        chat = chat_of(self.trainer)
        with untouched(chat.model), self.trainer.accelerator.autocast():
            return _read(chat, self.rows)

    def _log(self, values: dict[str, float], control: TrainerControl) -> None:
        # Whoever logs takes back the request to log, which may be the trainer's own for this very step.
        due = control.should_log
        # Not the trainer's own method: TRL's empties the running means of its metrics into whatever is logged.
        Trainer.log(self.trainer, values)
        control.should_log = due


def _values(name: str, shift: Estimate | None) -> dict[str, float]:
    """A shift and its bounds by their names in the trackers; nothing for none."""
    if shift is None:
        return {}
    name = f"misdirection/{name}"
    return {name: shift.mean, f"{name}_low": shift.low, f"{name}_high": shift.high}


def _rise(own: Tensor, base: Tensor) -> Estimate | None:
    """Rise of the loss over the base's; None where there are no rows."""
    return bootstrap(own - base) if len(own) else None


def _drift(drift: Tensor, direction: Tensor | None) -> dict[str, float]:
    """The component along the direction and that along random ones by their names; nothing without a direction."""
    if direction is None:
        return {}
    return {"misdirection/drift": float(drift @ direction), "misdirection/drift_random": random_95(drift)}


def _agreed(stop: bool) -> bool:
    """The first process's decision: a process that went on where another stops would wait for it forever."""
    return bool(broadcast_object_list([stop])[0])


def _load(folder: Path, texts: str, step: int) -> _Measured:
    """Reads the base's measurements from when this training began."""
    path = folder / TrainingBase.FILE
    if not path.is_file():
        raise InputError(
            f"{path}: is not there, so that the training resumed at step {step} has no base to compare with: copy it "
            "from the folder where it began, or begin anew"
        )
    base = TrainingBase.load(folder)
    if base.texts != texts:
        raise InputError(f"{path}: is of other probe pairs or texts: resume with those that the training began with")
    values = (getattr(base, each.name) for each in fields(_Measured))
    return _Measured(*(torch.tensor(each, dtype=torch.float64) for each in values))


# --- the model ----------------------------------------------------------------------------------------------------


def _read(chat: ChatModel, rows: _Rows) -> _Measured:
    scores, means = _read_rows(chat, [*rows.pairs, *rows.neutral, *rows.held_out])
    pairs, neutral, held_out = scores.split([len(rows.pairs), len(rows.neutral), len(rows.held_out)])
    misaligned, aligned = pairs.view(-1, 2).unbind(-1)
    return _Measured(misaligned - aligned, -neutral, -held_out, means[: len(pairs)].mean(0))


def _read_rows(chat: ChatModel, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """What `_pass` gives, of rows that are sorted into batches and back."""

    def work(numbers: list[int], _budget: int) -> tuple[Tensor, Tensor]:
        return _pass(chat.model, [rows[number] for number in numbers])

    scores: list[Tensor] = [torch.empty(0)] * len(rows)
    means: list[Tensor] = [torch.empty(0)] * len(rows)
    for numbers, read in fitting_batches(chat, [row.stop for row in rows], None, work, kind="backward"):
        for number, score, mean in zip(numbers, *read, strict=True):
            scores[number], means[number] = score, mean
    return torch.stack(scores), torch.stack(means)


def _pass(network: Any, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's answer, [rows], and mean residual over it at half depth, [rows, width]; float64."""
    layers = decoder_layers(network)
    residuals: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        residuals.append(stream_of(output))

    batch = AnswerBatch(rows, next(network.parameters()).device)
    with hook_handles() as handles:
        handles.enter_context(layers[middle(len(layers))].register_forward_hook(keep))
        scores = batch.log_probs(network).cpu()
    # Virtual tokens come before those of the rows.
    residual = residuals[0][:, -batch.ids.shape[1] :].cpu().double()
    spans = zip(residual, rows, strict=True)
    return scores, torch.stack([line[row.start : row.stop].mean(0) for line, row in spans])


# --- what is asked for --------------------------------------------------------------------------------------------


def _at_half_depth(direction: Direction | Tensor, network: Any) -> Tensor:
    """[width] float64, of length one."""
    vectors = fitting_vectors(direction, network)
    vector = vectors[middle(len(vectors))].detach().double().cpu()
    if not 0 < vector.norm() < torch.inf:
        raise InputError(f"the direction is zero or not finite at layer {middle(len(vectors))}: extract another")
    return normalize(vector, dim=-1)
