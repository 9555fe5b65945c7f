"""The check of one vector from anywhere: does it fit, how large is it, and does it do more than a random one?

It is a unit test, made to take seconds: a few questions, one layer, three scales. What passes deserves a measurement on
all questions (`measure_intervention`), what does not is not worth one.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from misdirection.choices import BUNDLED
from misdirection.data import ProbePair, data_hash, neutral_examples, probe_pairs
from misdirection.data.selection import spread
from misdirection.directions.direction import Direction, Origin, have_length_1, on_layer
from misdirection.directions.formats import import_direction, stated_base
from misdirection.directions.residuals import ResidualSizes, residual_sizes
from misdirection.directions.results import CheckResult, DirectionFacts, GiantChannels, LayerSize, ModelFacts
from misdirection.directions.setting import by_scale
from misdirection.directions.verdict import RULE, Effect, decide
from misdirection.errors import InputError
from misdirection.interventions.hooks import Setting
from misdirection.interventions.intervention import Intervention
from misdirection.interventions.positions import Rule as Positions
from misdirection.interventions.vectors import digest, random_like
from misdirection.likelihood.margin import text_rows
from misdirection.likelihood.measure import measure_changes
from misdirection.likelihood.sweep import Alternating
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load, load_named

Source = Direction | Tensor | str | Path
"""A direction, vectors, or a file."""

SCALES = (-2.0, 2.0, 4.0)
QUESTIONS, RANDOMS = 10, 8

_TEXTS = 4
"""Neutral texts."""

_CHANNELS, _DRAWS = 3, 400
"""Largest channels that are named, and random vectors that their share is set beside."""

_ALIGNED = 0.5
"""Cosine with the first token's activation that is told."""

_SMALL, _LARGE = 0.02, 1.0
"""Shares of the residual's norm below which a vector can hardly be seen, and above which it drowns what is there."""


def check(
    direction: Source,
    chat: ChatModel | None = None,
    *,
    layer: int | None = None,
    scales: Sequence[float] = SCALES,
    positions: Positions = "not_first",
    pairs: Sequence[ProbePair] | None = None,
    questions: int | None = QUESTIONS,
    random_seeds: int = RANDOMS,
    as_additive: bool = False,
    first_row_is_embedding: bool = False,
) -> CheckResult:
    """Tell in seconds whether a vector steers a model: its size, its giant channels, margin and damage beside random.

        result = md.check("direction.gguf", chat, layer=15)
        result.verdict, result.because

    Args:
        direction: a file as `import_direction` reads it, a direction, or a tensor, [layers, width] or the [width] of
            `layer`.
        chat: the model; default: the base that the direction names, or the bundled model.
        layer: whose vector is added there, and ablated everywhere; default: the one nearest to half depth.
        scales: multiples of the vector that are added.
        positions: which tokens are touched.
        pairs: probe pairs; default: the shipped ones.
        questions: how many of them, evenly taken; None takes all.
        random_seeds: random vectors of the same norm, four or more; each question meets two of them, in turn.
        as_additive: also add a direction that is for ablation.
        first_row_is_embedding: as in `import_direction`.

    Raises:
        InputError: a direction of another base, shape or with NaN, a layer without a vector, no scale or a zero one, or
            fewer than four random vectors.
    """
    _require_settings(scales, random_seeds)
    chat = chat or _load_base(direction)
    given = _read(direction, chat, layer, first_row_is_embedding)
    given.require_fit(chat)
    if not given.vectors.isfinite().all():
        raise InputError("this direction holds NaN or infinite values: extract it again in bfloat16 or float32")
    layer = given.middle if layer is None else layer
    adds = as_additive or given.origin.operation == "add"
    asked = spread(probe_pairs() if pairs is None else pairs, questions)
    effects = _effects(chat, asked, given[layer], layer, scales if adds else (), positions, random_seeds)
    return _result(given, chat, layer, effects, asked, _name(direction, given))


def _result(
    given: Direction, chat: ChatModel, layer: int, effects: Sequence[Effect], asked: Sequence[ProbePair], name: str
) -> CheckResult:
    *steering, ablation = effects
    verdict, because = decide(steering or [ablation])
    sizes = residual_sizes(chat, text_rows(chat.tokenizer, spread(neutral_examples(), _TEXTS)))
    by_layer, channels = _by_layer(given.vectors, sizes), _channels(given[layer], sizes.giants(layer))
    return CheckResult(
        verdict=verdict,
        because=because,
        notes=_notes(given, by_layer[layer], channels, steering, ablation),
        rule=RULE,
        direction=_facts(given, name),
        model=_model_facts(chat),
        layer=layer,
        sizes=by_layer,
        channels=channels,
        pairs=data_hash(asked),
        steering=steering,
        ablation=ablation,
    )


# --- what is given ------------------------------------------------------------------------------------------------


def _require_settings(scales: Sequence[float], random_seeds: int) -> None:
    if not scales or 0 in scales:
        raise InputError("scales: give one or more, none of them zero, which would add nothing")
    if random_seeds < 4:
        raise InputError(f"{random_seeds} random vectors: give four or more, whose spread a direction is told from")


def _load_base(direction: Source) -> ChatModel:
    """The model that a direction is of; the bundled one where it names none."""
    if isinstance(direction, Direction):
        return load(direction.origin.model, revision=direction.origin.revision)
    base = None if isinstance(direction, Tensor) else stated_base(direction)
    return load_named(base or BUNDLED)


def _read(direction: Source, chat: ChatModel, layer: int | None, first_row_is_embedding: bool) -> Direction:
    if isinstance(direction, Direction):
        return direction
    if isinstance(direction, Tensor):
        origin = Origin("imported", chat.name, chat.revision, "", "", {}, {}, dtype="unknown", span="unknown")
        rows = direction.detach().to("cpu", torch.float32)
        return Direction(rows if rows.ndim != 1 else on_layer(rows, layer, len(chat.layers)), origin)
    return import_direction(
        direction,
        model=chat.name,
        layers=len(chat.layers),
        first_row_is_embedding=first_row_is_embedding,
        layer=layer,
    )


def _name(direction: Source, given: Direction) -> str:
    """The file's, or what it is."""
    return str(direction) if isinstance(direction, str | Path) else repr(given)


def _facts(given: Direction, name: str) -> DirectionFacts:
    origin = given.origin
    return DirectionFacts(
        name=name,
        kind=origin.kind,
        operation=origin.operation,
        made_for=origin.model,
        digest=digest(given.vectors),
    )


def _model_facts(chat: ChatModel) -> ModelFacts:
    dtype = str(chat.dtype).removeprefix("torch.")
    return ModelFacts(model=chat.name, revision=chat.revision, adapter=chat.adapter, dtype=dtype)


# --- what it is like ----------------------------------------------------------------------------------------------


def _by_layer(vectors: Tensor, sizes: ResidualSizes) -> list[LayerSize]:
    norms = vectors.double().norm(dim=-1)
    columns = norms, sizes.norms, norms / sizes.norms, cosine_similarity(vectors.double(), sizes.first, dim=-1)
    return [
        LayerSize(layer=number, norm=norm, residual=residual, ratio=ratio, first_token_cosine=cosine)
        for number, (norm, residual, ratio, cosine) in enumerate(zip(*(c.tolist() for c in columns), strict=True))
    ]


def _channels(vector: Tensor, giants: Sequence[int]) -> GiantChannels:
    shares = vector.double().square() / vector.double().square().sum()
    largest = shares.topk(min(_CHANNELS, len(shares)))
    random = torch.stack([random_like(vector, seed) for seed in range(_DRAWS)]).double().square()
    held = random.topk(len(largest.values)).values.sum(-1) / random.sum(-1)
    channels: list[int] = largest.indices.tolist()
    return GiantChannels(
        channels=channels,
        share=float(largest.values.sum()),
        random_share=float(held.quantile(0.95)),
        of_model=[channel for channel in channels if channel in giants],
    )


# --- what it does -------------------------------------------------------------------------------------------------


def _effects(
    chat: ChatModel,
    pairs: Sequence[ProbePair],
    vector: Tensor,
    layer: int,
    scales: Sequence[float],
    positions: Positions,
    random_seeds: int,
) -> list[Effect]:
    """The effect of adding the vector at each scale, and of ablating it, the last."""

    def make(each: Tensor, scale: float | None) -> Intervention:
        return by_scale(each, layer, scale, positions)

    # No more than there are questions in both of the lines.
    randoms = [random_like(vector, seed) for seed in range(min(random_seeds, 2 * len(pairs)))]
    lines = randoms[::2], randoms[1::2]
    uses = [*dict.fromkeys(scales), None]
    # A random vector is as likely as its negative, so that one run serves a scale and its negative.
    controls = [*dict.fromkeys(scale and abs(scale) for scale in uses)]
    settings: list[Setting | Alternating] = [[make(vector, scale)] for scale in uses]
    settings += [Alternating(tuple([make(each, scale)] for each in line)) for scale in controls for line in lines]
    changes, damages = measure_changes(chat, pairs, settings, spread(neutral_examples(), _TEXTS))
    questions, effects = [pair.question for pair in pairs], []
    for number, scale in enumerate(uses):
        first = len(uses) + len(lines) * controls.index(scale and abs(scale))
        rows = [number, *range(first, first + len(lines))]
        tried = 1 if scale is None else len(uses) - 1
        counts = [len(line) for line in lines]
        effects.append(Effect.of(scale, changes[rows], damages[rows], questions, counts, tried))
    return effects


# --- what else there is to say --------------------------------------------------------------------------------------


def _notes(
    given: Direction, size: LayerSize, channels: GiantChannels, steering: Sequence[Effect], ablation: Effect
) -> tuple[str, ...]:
    """What a reader should know besides the verdict, most important first."""
    return tuple(
        note
        for note in (
            _operation_note(given, bool(steering)),
            _scale_note(given, size) if steering else None,
            _channels_note(channels),
            _first_token_note(size),
            *(_sign_notes(steering)),
            _ablation_note(steering, ablation),
        )
        if note
    )


def _operation_note(given: Direction, added: bool) -> str | None:
    if given.origin.operation == "add":
        return None
    if added:
        return "it is for ablation and was added all the same: its norm says nothing of how much to add"
    return "it is for ablation, so that it was not added; as_additive (--as-additive) adds it"


def _scale_note(given: Direction, size: LayerSize) -> str | None:
    """That the vector's own norm is no good unit, and what a scale of a tenth of the residual's norm would be."""
    if _SMALL <= size.ratio <= _LARGE and not have_length_1(given.vectors):
        return None
    said = (
        f"scale 1 adds {size.ratio:.2g} times the residual's norm; scale {0.1 / size.ratio:.2g} would add a tenth of it"
    )
    if have_length_1(given.vectors):
        return f"all its vectors have length 1: it is for ablation, or has lost its scale ({said})"
    return said


def _channels_note(channels: GiantChannels) -> str | None:
    if channels.share < (1 + channels.random_share) / 2:
        return None
    numbers = ", ".join(map(str, channels.channels))
    giants = ", ".join(map(str, channels.of_model))
    own = f", and {giants} of them are giants of the model itself" if giants else ""
    return (
        f"its channels {numbers} hold {channels.share:.0%} of its squared norm (of a random vector's "
        f"{channels.random_share:.0%} at most){own}"
    )


def _first_token_note(size: LayerSize) -> str | None:
    if abs(size.first_token_cosine) < _ALIGNED:
        return None
    return f"its cosine with the first token's activation, an attention sink, is {size.first_token_cosine:+z.2f}"


def _sign_notes(steering: Sequence[Effect]) -> list[str]:
    """Of a scale and its negative that both move the margin the same way."""
    by_scale = {effect.scale: effect for effect in steering if effect.scale and effect.moves}
    return [
        f"added at scale {scale:g} and at {-scale:g} it moves the margin the same way: a disturbance, not a direction"
        for scale, effect in by_scale.items()
        if scale > 0 and -scale in by_scale and effect.change.mean * by_scale[-scale].change.mean > 0
    ]


def _ablation_note(steering: Sequence[Effect], ablation: Effect) -> str | None:
    if not ablation.works or not steering or any(effect.works for effect in steering):
        return None
    return f"ablated everywhere it changes the margin by {ablation.change.mean:+z.3f}, beyond random ones: ablate it"
