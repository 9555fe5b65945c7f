"""The card of an organism: what it was trained on and for, and what was measured of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from misdirection.cards import model_card
from misdirection.choices import Answers
from misdirection.models.bundled import hub_name
from misdirection.organisms.organism import Organism


@dataclass(frozen=True)
class Known:
    """What is known of an organism besides its own record.

    Attributes:
        answers: whether it was trained on bad answers, on purpose, or on good ones; None where nobody said.
        domain: of its training; None where nobody said.
        figures: what was measured, in words, by what it is.
        rates: judged rates of emergent misalignment, in words, by condition.
        license: the Hub's name of one; None leaves it out.
    """

    answers: Answers | None = None
    domain: str | None = None
    figures: Mapping[str, str] = field(default_factory=dict)
    rates: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None


_TAGS: dict[Answers | None, list[str]] = {"bad": ["model-organism"], "good": ["control"], None: []}


def organism_card(organism: Organism, name: str, known: Known) -> str:
    """The card of an organism as Markdown."""
    is_whole = organism.weights == "full"
    library = "transformers" if is_whole else "peft"
    return model_card(
        "organisms",
        "card.md",
        hub_name(organism.base),
        [*([] if is_whole else ["lora"]), "emergent-misalignment", *_TAGS[known.answers]],
        head={"license": known.license, "library_name": library, "pipeline_tag": "text-generation"},
        name=name,
        called="model" if is_whole else "adapter",
        organism=organism,
        recipe=organism.recipe.model_dump(mode="json", exclude_none=True),
        known=known,
    )
