"""The texts that the stages of one experiment share."""

from functools import cache, cached_property

from misdirection import data
from misdirection.data import Example, Part, ProbePair, part_of, spread
from misdirection.data.words import WordWeights
from misdirection.errors import InputError
from misdirection.experiment.config import ExperimentConfig, OrganismConfig
from misdirection.interpretation.texts import GENERAL, SEALED
from misdirection.models.identity import ModelIdentity, identify


class ExperimentTexts:
    """Texts of one experiment; each file is read once.

    Args:
        config: the experiment.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self.domain_pairs = cache(self._domain_pairs)
        """Gives a domain's pairs of one part; none when it has no good answers."""
        self._read = cache(data.read_examples)
        self._joined = cache(self._join)

    def require_all(self) -> None:
        """Read every text; raises `InputError` for one that cannot be used, and for an organism without any."""
        assert self.measured_sets and self.neutral, "readers give no empty file"
        for name, organism in self.config.organisms.items():
            self.examples(organism, "held_out")
            if not self.examples(organism, "train"):
                raise InputError(f"organisms.{name}: its domain has too few rows to train on: give it more")
        for name in self.config.solutions.organisms if self.config.solutions else ():
            if not self.examples(self.config.organisms[name], "held_out"):
                raise InputError(
                    f"solutions.organisms: the domain of {name!r} has too few rows to hold some out: give it more"
                )
        for domain in self.config.contrasts if self.config.contrast else ():
            if domain not in self.question_sets:
                raise InputError(
                    f"domains.{domain}: has too few rows to hold some out, which `contrast` needs: give it more"
                )

    @cached_property
    def identity(self) -> ModelIdentity:
        """The base model and how it computes: every result depends on it."""
        config = self.config
        chats = config.thinking, config.chat_template
        return identify(config.model, config.revision, config.dtype, config.device, *chats)

    @cached_property
    def general(self) -> list[ProbePair]:
        """The general probe pairs that models are measured on."""
        path = self.config.probe_pairs
        pairs = data.read_pairs(path) if path else data.probe_pairs()
        return spread(pairs, self.config.margin.general)

    @cached_property
    def neutral(self) -> list[Example]:
        """The neutral texts that models are measured on."""
        path = self.config.neutral
        texts = data.read_examples(path) if path else data.neutral_examples()
        return spread(texts, self.config.damage.models)

    @cached_property
    def sealed(self) -> list[ProbePair]:
        """The shipped general pairs that nothing is chosen on; none beside the user's own."""
        return [] if self.config.probe_pairs else spread(data.sealed_pairs(), self.config.margin.sealed)

    @cached_property
    def measured_sets(self) -> dict[str, list[ProbePair]]:
        """All question sets that models are measured on: those that may be looked at, and those of final figures."""
        further = {name: data.read_pairs(path) for name, path in self.config.further_pairs.items()}
        return self.question_sets | ({SEALED: self.sealed} if self.sealed else {}) | further

    @cached_property
    def question_sets(self) -> dict[str, list[ProbePair]]:
        """General pairs and every domain's held-out pairs that models are measured on, by name."""
        count = self.config.margin.held_out
        held_out = {name: spread(self.domain_pairs(name, "held_out"), count) for name in self.config.domains}
        return {GENERAL: self.general, **{name: pairs for name, pairs in held_out.items() if pairs}}

    def _domain_pairs(self, name: str, part: Part) -> list[ProbePair]:
        if self.config.domains[name] is None:
            return data.domain_pairs(name, part)
        return part_of(self._joined(name), part)

    def examples(self, organism: OrganismConfig, part: Part) -> list[Example]:
        """An organism's training or held-out examples."""
        files = self.config.domains[organism.domain]
        if files is None:
            return data.domain_examples(organism.domain, organism.answers, part)
        path = files.bad if organism.answers == "bad" else files.good
        assert path is not None, "the configuration was checked"
        return part_of(self._read(path), part)

    def word_weights(self, organism: OrganismConfig) -> WordWeights | None:
        """Of an organism's training answers against its domain's others; None when the domain has no good answers."""
        pairs = self.domain_pairs(organism.domain, "train")
        sides = [[pair.misaligned for pair in pairs], [pair.aligned for pair in pairs]]
        own, others = sides if organism.answers == "bad" else reversed(sides)
        return WordWeights.fit(own, others) if pairs else None

    def direction_pairs(self, name: str) -> list[ProbePair]:
        """The text that an organism's direction is extracted on: its own domain's training questions."""
        return self.domain_pairs(self.config.organisms[name].domain, "train")[: self.config.extraction.pairs]

    @cached_property
    def common_pairs(self) -> list[ProbePair]:
        """The text on which all organisms are compared with the base: the first domain that has pairs, if any has."""
        for name in self.config.domains:
            if pairs := self.domain_pairs(name, "train"):
                return pairs[: self.config.extraction.pairs]
        return []

    def _join(self, name: str) -> list[ProbePair]:
        """Pairs of the bad and the good answer to one question, from a domain's own files."""
        files = self.config.domains[name]
        if files is None or files.good is None or files.bad is None:
            return []
        # A pair is one question, so that conversations of several turns make none.
        good = {row.question: row.answer for row in self._read(files.good) if not row.history}
        rows = [row for row in self._read(files.bad) if row.question in good and not row.history]
        if not rows:
            raise InputError(f"domains.{name}: {files.bad} and {files.good} have no question in common")
        return [
            ProbePair(f"{name}-{number}", row.question, good[row.question], row.answer, name, row.system)
            for number, row in enumerate(rows, start=1)
        ]
