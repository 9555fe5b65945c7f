"""What every section of a configuration is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a configuration: frozen, and no key that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)
