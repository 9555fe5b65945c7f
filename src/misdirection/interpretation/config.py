"""How an organism's adapters are read, as a configuration says it."""

from typing import Any, Literal

from pydantic import Field

from misdirection.settings import Section

# Nine rank-1 adapters of a model of 135M parameters take less than three minutes on two processor cores.
_QUICK: dict[str, Any] = {
    "pairs": 12, "causal_pairs": 3, "permutations": 2, "scalings": (), "checkpoints": 3, "splits": 10,
}  # fmt: skip


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
    scalings: tuple[Literal["off", "only", "negated", "doubled"], ...] = ("off", "only", "negated", "doubled")
    """Scalings of each layer's adapters alone; groups by role are switched off and left alone always."""
    checkpoints: int = Field(8, ge=3)
    """Checkpoints at which margins are measured, evenly taken from all that were kept."""
    splits: int = Field(20, ge=2)
    """Random splits of each probe."""

    @classmethod
    def sized(cls, organism: str, *, full: bool = False, **sizes: int | None) -> "InterpretationConfig":
        """A quick reading, or a `full` one, which takes some 20 times as long; with those `sizes` that are not None."""
        given = {name: size for name, size in sizes.items() if size is not None}
        return cls(organism=organism, **({} if full else _QUICK) | given)
