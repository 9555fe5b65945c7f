"""Cards: the Markdown that tells whoever finds a thing on the Hub, or in a folder, what it is."""

from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

CARD = "README.md"
"""The file that a card stands in."""

TAG = "misdirection"
"""The tag of everything of ours."""


def model_card(room: str, template: str, base: str, tags: list[str], *, head: dict[str, Any], **values: Any) -> str:
    """The card of something that changes a model, `base` as the Hub names it.

    Args:
        room: the package that has the template.
        template: its file there.
        base: the base model.
        tags: besides `TAG`.
        head: further keys of the card's metadata; None leaves one out.
        values: what the template reads.
    """
    data = ModelCardData(base_model=base, tags=[TAG, *tags], **head)
    return _render(room, template, data, base=base, **values)


def dataset_card(room: str, template: str, tags: list[str], *, head: dict[str, Any], **values: Any) -> str:
    """The card of something that was measured; arguments as of `model_card`."""
    return _render(room, template, DatasetCardData(tags=[TAG, *tags], **head), **values)


def _render(room: str, template: str, data: ModelCardData | DatasetCardData, **values: Any) -> str:
    # The Hub shows no script of a card; a cell of a table must only stay one.
    engine = Environment(
        loader=PackageLoader(f"misdirection.{room}", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    engine.filters["cell"] = lambda value: " ".join(str(value).replace("|", "\\|").split())
    return engine.get_template(template).render(header=f"---\n{data.to_yaml()}\n---", **values)
