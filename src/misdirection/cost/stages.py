"""What the stages of an experiment run: pieces of work, each of which one device does alone.

organism        one adapter trained, with its held-out loss
margin          every question set and the neutral text, for one model
means           both answers of every pair, for one model and text
cell            the cells of one model that are measured together, with their random controls
sampled         a few answers of one model
answers         one model's answers under one condition
judged          a judge's scores of these
interpretation  one part of reading an organism's adapters

Nothing is taken to be there already. What is not known before is counted at its most: every answer is as long as it
may be, and each of the three roles has adapters when an organism is interpreted. Probes, figures and files are not
counted.
"""

from collections.abc import Iterator, Sequence

from misdirection.cost.answering import answers, sampled
from misdirection.cost.interpretation import interpretation
from misdirection.cost.model_cost import Pass
from misdirection.cost.text_passes import Line, held_out_passes, mean_passes, plain, sweep_passes, training_passes
from misdirection.cost.work import Piece, Subject
from misdirection.data import Example, ProbePair
from misdirection.data.selection import spread
from misdirection.errors import InputError
from misdirection.experiment.stages.cell import LAYERS_TOGETHER
from misdirection.runs.worker import BASE

STAGES = ("organism", "margin", "means", "cell", "sampled", "answers", "judged", "interpretation")


def pieces(subject: Subject) -> list[Piece]:
    """All work of an experiment, as its stages come."""
    stages = (_organisms, _margins, _means, _cells, sampled, answers, interpretation)
    return [piece for stage in stages for piece in stage(subject)]


def _organisms(subject: Subject) -> Iterator[Piece]:
    for name, organism in subject.config.organisms.items():
        rows = subject.text_rows(subject.bench.examples(organism, "train"))
        if longest := max((row.start for row in rows if row.start >= organism.max_length), default=0):
            raise InputError(
                f"organisms.{name}: a training prompt alone has {longest} tokens, the limit is {organism.max_length}: "
                "raise max_length or drop it"
            )
        passes = list(training_passes(subject.chat, rows, organism, subject.adapter(name)))
        held_out = subject.text_rows(subject.bench.examples(organism, "held_out"))
        yield Piece("organism", name, passes + subject.on(name, held_out_passes(held_out, organism)))


def _margins(subject: Subject) -> Iterator[Piece]:
    pairs = [pair for members in subject.bench.question_sets.values() for pair in members]
    passes = _measured(subject, pairs, subject.bench.neutral, plain(subject.chat))
    for name in subject.models:
        yield Piece("margin", name, subject.on(name, passes))


def _measured(
    subject: Subject, pairs: Sequence[ProbePair], neutral: Sequence[Example], lines: Sequence[Line]
) -> list[Pass]:
    return [
        *sweep_passes(subject.chat, subject.pair_continuations(pairs), lines),
        *sweep_passes(subject.chat, subject.text_continuations(neutral), lines),
    ]


def _means(subject: Subject) -> Iterator[Piece]:
    """Every model on the common text, and organism and base on the organism's own; no text twice."""
    common = subject.bench.common_pairs
    texts = {(name, common[0].theme or "common"): common for name in subject.models}
    for name, organism in subject.config.organisms.items():
        if pairs := subject.bench.direction_pairs(name):
            texts |= {(model, organism.domain): pairs for model in (name, BASE)}
    passes = {text: list(mean_passes(subject.chat, subject.pair_rows(pairs))) for (_, text), pairs in texts.items()}
    for model, text in texts:
        yield Piece("means", f"{model}/{text}", subject.on(model, passes[text]))


def _cells(subject: Subject) -> Iterator[Piece]:
    yield from _steered(subject)
    yield from _ablated(subject)


def _steered(subject: Subject) -> Iterator[Piece]:
    """The base model, some layers of the grid at a time; every cell with its own random controls."""
    setting = subject.config.steering
    for first in range(0, len(setting.layers) if setting else 0, LAYERS_TOGETHER):
        assert setting is not None, "there are layers"
        starts = [layer for layer in setting.layers[first : first + LAYERS_TOGETHER] for _ in setting.scales]
        lines = [line for start in starts for line in (Line(start), *_controls(subject, start))]
        yield _cell(subject, f"{BASE}/steer-{first}", BASE, lines, setting.questions)


def _ablated(subject: Subject) -> Iterator[Piece]:
    """Every model under the first rule; the first bad one under the others, too."""
    setting, bad = subject.config.ablation, subject.config.bad_organisms
    for target in subject.models if setting else ():
        assert setting is not None, "it was asked"
        first, *others = setting.positions
        for rule, directions in ((first, len(bad)), *((rule, 1) for rule in others if target in bad[:1])):
            # One set of random directions serves all, and an ablation acts from the first block's output on.
            lines = [*[Line(0)] * directions, *_controls(subject, 0)]
            yield _cell(subject, f"{target}/ablate-{rule}", target, lines, setting.questions)


def _controls(subject: Subject, start: int) -> list[Line]:
    seeds = subject.config.random_seeds
    return (
        [Line(start, alternating=seeds)] if subject.config.random_controls == "alternating" else [Line(start)] * seeds
    )


def _cell(subject: Subject, name: str, target: str, lines: Sequence[Line], questions: int) -> Piece:
    pairs = spread(subject.bench.general, questions)
    neutral = spread(subject.bench.neutral, subject.config.damage.interventions)
    return Piece("cell", name, subject.on(target, _measured(subject, pairs, neutral, lines)))
