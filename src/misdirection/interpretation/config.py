"""How an organism's adapters are read, as a configuration says it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from misdirection.choices import MOST
from misdirection.settings import Section

# Nine rank-1 adapters of a model of 135M parameters take less than three minutes on two processor cores.
_QUICK: dict[str, Any] = {
    "pairs": 12, "causal_pairs": 3, "permutations": 2, "scalings": (), "checkpoints": 3, "splits": 10,
}  # fmt: skip


Word = Literal["off", "only", "negated", "doubled"]

LayerFactors = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(strict=True, ge=-MOST, le=MOST)]], Field(min_length=1)
]
"""Multiplier of the adapters of each layer that is named; the others stay as they are."""

Scaling = Annotated[
    Annotated[Word, Tag("word")] | Annotated[LayerFactors, Tag("factors")],
    Discriminator(lambda value: "factors" if isinstance(value, Mapping) else "word"),
]


class InterpretationConfig(Section):
    """Reading the adapters of one organism (paper, section on interpreting rank-1 adapters)."""

    organism: str
    pairs: int = Field(16, ge=4)
    """Pairs whose answers are read token by token: of the general ones, and of each domain's held-out ones."""
    causal_pairs: int = Field(8, ge=2)
    """Pairs of each for what needs many passes: Shapley values, scaling, effects downstream, patching, dynamics."""
    components: int | None = Field(None, ge=1)
    """Leading components of each module; all when left out."""
    permutations: int | None = Field(None, ge=2)
    """Orders per question for sampled Shapley values; all subsets when left out, for nine adapted layers or fewer."""
    scalings: tuple[Scaling, ...] = ("off", "only", "negated", "doubled")
    """A word is done to each layer's adapters by themselves, and only margins show its effect. A mapping of layers to
    factors, such as `{21: 30, 23: 30}`, is one setting, with judged answers where there is a judge. Groups by role are
    switched off and left alone always."""
    checkpoints: int = Field(8, ge=3)
    """Checkpoints at which margins are measured, evenly taken from all that were kept."""
    judged_checkpoints: int | None = Field(None, ge=1)
    """Checkpoints whose answers are judged, evenly taken from all between the base and the organism, which are judged
    anyway; none when left out."""
    splits: int = Field(20, ge=2)
    """Random splits of each probe."""

    @model_validator(mode="before")
    @classmethod
    def _switch_as_word(cls, values: Any) -> Any:
        """YAML reads a plain off as false."""
        if isinstance(values, dict) and isinstance(scalings := values.get("scalings"), list | tuple):
            return {**values, "scalings": ["off" if each is False else each for each in scalings]}
        return values

    @property
    def words(self) -> tuple[Word, ...]:
        """What is done to each layer's adapters by themselves."""
        return tuple(scaling for scaling in self.scalings if isinstance(scaling, str))

    @property
    def explicit(self) -> tuple[dict[int, float], ...]:
        """The settings that are written out, each once."""
        written = [scaling for scaling in self.scalings if isinstance(scaling, dict)]
        return tuple(each for number, each in enumerate(written) if each not in written[:number])

    @classmethod
    def sized(cls, organism: str, *, full: bool = False, **sizes: int | None) -> "InterpretationConfig":
        """A quick reading, or a `full` one, which takes some 20 times as long; with those `sizes` that are not None."""
        given = {name: size for name, size in sizes.items() if size is not None}
        return cls(organism=organism, **({} if full else _QUICK) | given)
