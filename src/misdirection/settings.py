"""Sections of a configuration, and the one way from values that a user wrote to a typed object."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator

from misdirection.choices import MOST
from misdirection.errors import InputError
from misdirection.registry import nearest

T = TypeVar("T")


Seed = Annotated[int, Field(ge=0, le=MOST)]
"""Of random numbers."""


class Section(BaseModel):
    """A part of a configuration: frozen, no key that it does not know, and no value that nobody can mean."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what Python would take for something else: yes for 1, numbers beyond all sizes, what is no text."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("Input should not be yes or no")
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, int) and abs(each) > MOST:
                raise ValueError(f"Input should be a number up to {MOST}")
            if isinstance(each, str) and ("\0" in each or holds_half_surrogate(each)):
                raise ValueError("Input should be text, without NUL and halves of surrogate pairs")
        return value


def holds_half_surrogate(value: str) -> bool:
    """Whether it is no text: an escape of JSON or YAML can write half of a pair, which neither UTF-8 nor a tokenizer
    takes."""
    return any("\ud800" <= character <= "\udfff" for character in value)


def validate(kind: type[T], values: Any, source: str, remedy: str = "") -> T:
    """Gives the object of a pydantic model or a dataclass that the values of a file or of options describe.

    Args:
        kind: the class.
        values: by key, as YAML or JSON has them.
        source: what the values come from, such as a file and its line; complaints begin with it.
        remedy: what ends a complaint about a value.

    Raises `InputError`, one line with the key and, for a key that is none, the nearest right name.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: must be a mapping of keys, not {type(values).__name__}; write `key: value` lines")
    try:
        value: T = _adapter(cast(Any, kind)).validate_python(values)
        return value
    except ValidationError as error:
        problem = _first_problem(kind, error)
        raise InputError(f"{source}: {problem}{remedy and f'; {remedy}'}") from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first_problem(kind: type, error: ValidationError) -> str:
    # A key that is missing is often one that is mistyped.
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    *section, name = first["loc"] or ("",)
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(str(name), _right_keys(kind, section))}"
    said = first["msg"].removeprefix("Value error, ")
    return f"{key}: {said}" if key else said


def _right_keys(kind: type, location: list[Any]) -> list[str]:
    """The keys that are right in the section at a location."""
    sections = _models(kind)
    for part in location:
        inner = [section.model_fields[part].annotation for section in sections if part in section.model_fields]
        # Otherwise it is the key of a mapping, an index, or the tag of a union, whose models are in `sections` already.
        sections = [model for annotation in inner for model in _models(annotation)] or sections
    return [name for section in sections for name in section.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """All models that a type mentions: `Model | None`, `dict[str, Model]` and so on."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]
