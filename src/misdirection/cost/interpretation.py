"""What reading an organism's adapters takes, part by part; probes run on the processor and are not counted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from misdirection.cost.answering import answers_of
from misdirection.cost.model_cost import Pass
from misdirection.cost.text_passes import Line, mean_passes, plain, row_passes, sweep_passes
from misdirection.cost.work import Piece, Subject
from misdirection.data import ProbePair
from misdirection.data.selection import spread
from misdirection.errors import InputError
from misdirection.interpretation.config import InterpretationConfig
from misdirection.interpretation.scaling import scaling_settings
from misdirection.interpretation.shapley import EXACT_LAYERS, subset_count
from misdirection.interpretation.texts import GENERAL
from misdirection.likelihood.answers import BACKWARD_BUDGET as IMPORTANCE_BUDGET
from misdirection.likelihood.sweep import TOKEN_BUDGET

_ROLES = 3


def interpretation(subject: Subject) -> Iterator[Piece]:
    """Every part; where there is a judge also the answers with adapters scaled: all off, each role off and alone."""
    settings = subject.config.interpretation
    if settings is None:
        return
    name = settings.organism
    sets, domain = subject.bench.question_sets, subject.config.organisms[name].domain
    read = [sets[GENERAL], *([sets[domain]] if domain in sets else [])]
    for part, passes in _Reading(subject, settings, read, subject.adapter(name).layers).parts().items():
        yield Piece("interpretation", f"{name}/{part}", subject.on(name, passes))
    for number in range(1 + 2 * _ROLES) if subject.config.judge else ():
        yield from answers_of(subject, name, f"scaled-{number}")


@dataclass(frozen=True)
class _Reading:
    """One organism, the sets that it is read on, the general one first, and its adapted layers."""

    subject: Subject
    settings: InterpretationConfig
    read: Sequence[Sequence[ProbePair]]
    adapted: tuple[int, ...]

    def parts(self) -> dict[str, Iterator[Pass]]:
        """The passes of each part."""
        return {
            "scalars": self._scalars(),
            "importance": self._importance(),
            "shapley": self._shapley(),
            "scaling": self._scaling(),
            "geometry": self._downstream(),
            "patching": self._patching(),
            "dynamics": self._dynamics(),
        }

    @property
    def _few(self) -> list[list[ProbePair]]:
        return [spread(pairs, self.settings.causal_pairs) for pairs in self.read]

    def _scalars(self) -> Iterator[Pass]:
        pairs = [pair for members in self.read for pair in spread(members, self.settings.pairs)]
        yield from row_passes(self.subject.pair_rows(pairs), TOKEN_BUDGET)

    def _importance(self) -> Iterator[Pass]:
        """Base and organism, twice, once with a backward pass; and each layer's adapters off, from that layer on."""
        count, layers = max(2, self.settings.causal_pairs // 2), len(self.subject.chat.layers)
        rows = self.subject.pair_rows([pair for members in self.read for pair in spread(members, count)])
        for back in (0, 0, 0, layers - self.adapted[0]):
            yield from row_passes(rows, IMPORTANCE_BUDGET, head=True, back=back)
        for layer in self.adapted:
            yield from row_passes(rows, IMPORTANCE_BUDGET, head=True, blocks=layers - layer)

    def _shapley(self) -> Iterator[Pass]:
        chat, permutations = self.subject.chat, self.settings.permutations
        for pairs in self._few:
            tasks = self.subject.pair_continuations(pairs)
            if permutations is None:
                yield from self._all_subsets(pairs)
                continue
            lines = [Line(self.adapted[0] - 1)] * subset_count(len(self.adapted), permutations)
            for task in tasks:
                yield from sweep_passes(chat, [task], lines)

    def _all_subsets(self, pairs: Sequence[ProbePair]) -> Iterator[Pass]:
        """Subsets of the upper layers, once for each subset of the lower ones."""
        count, chat = len(self.adapted), self.subject.chat
        if count > EXACT_LAYERS:
            raise InputError(
                f"interpretation: exact Shapley values of {count} layers need {2**count} passes a question: give "
                "permutations"
            )
        high = self.adapted[count // 2 :]
        # So many subsets leave out this layer and none below it.
        times = [2 ** (len(high) - number - 1) for number in range(len(high))]
        lines = [Line(layer - 1) for layer, often in zip(high, times, strict=True) for _ in range(often)]
        for one in sweep_passes(chat, self.subject.pair_continuations(pairs), plain(chat) + lines):
            yield replace(one, repeats=one.repeats * 2 ** (count // 2))

    def _scaling(self) -> Iterator[Pass]:
        wanted = [
            factors
            for name, factors in scaling_settings(self.adapted).items()
            if not name.startswith("layer ") or name.endswith(self.settings.scalings)
        ]
        chat, neutral = self.subject.chat, spread(self.subject.bench.neutral, self.settings.causal_pairs)
        starts = [min(factors) - 1 for factors in wanted] + [self.adapted[0] - 1] * (2 * _ROLES)
        lines = plain(chat) + [Line(start) for start in starts]
        for tasks in (*map(self.subject.pair_continuations, self._few), self.subject.text_continuations(neutral)):
            yield from sweep_passes(chat, tasks, lines)

    def _downstream(self) -> Iterator[Pass]:
        """The organism, and each layer's adapters off."""
        if self.subject.config.bad_organisms:
            times = 1 + len(self.adapted)
            yield from mean_passes(self.subject.chat, self.subject.pair_rows(self._few[0]) * times, times)

    def _patching(self) -> Iterator[Pass]:
        """General pairs as they are, and with each set's prompts put in, which run before."""
        rows = self.subject.pair_rows(self._few[0])
        for number in range(1 + len(self.read)):
            for one in row_passes(rows, TOKEN_BUDGET, head=True):
                yield one
                yield Pass(one.rows, max(row.start for row in rows) if number else 1)

    def _dynamics(self) -> Iterator[Pass]:
        """The base, and checkpoints of the organism."""
        organism = self.subject.config.organisms[self.settings.organism]
        if not organism.keep_checkpoints:
            return
        rows = len(self.subject.bench.examples(organism, "train"))
        steps = organism.epochs * -(-rows // (organism.batch_size * organism.accumulation))
        measured = min(self.settings.checkpoints, max(1, int(steps // organism.checkpoint_steps)))
        for tasks in map(self.subject.pair_continuations, self._few):
            for one in sweep_passes(self.subject.chat, tasks, plain(self.subject.chat)):
                yield replace(one, repeats=1 + measured)
