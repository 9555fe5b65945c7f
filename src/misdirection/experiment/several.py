"""One YAML file that is the same experiment on several base models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from misdirection.choices import DEVICE, Dtype, Thinking
from misdirection.data.text import read_yaml
from misdirection.errors import InputError
from misdirection.experiment.config import ExperimentConfig
from misdirection.files import plain_names
from misdirection.models.names import ModelName
from misdirection.models.weightless import read_structure
from misdirection.sampling.config import SamplingConfig
from misdirection.settings import Section, validate

_LAYER_KEYS = ("layer", "layers")
_ANY_DEPTH = 10_000
"""Layers of no model: with so many, every key of a file can be checked before a model is looked for."""


class ModelEntry(Section):
    """One of several base models: the keys of an experiment that may differ from one to the next."""

    model: str = Field(min_length=1)
    revision: str | None = None
    dtype: Dtype | None = None
    device: str | None = Field(None, pattern=f"^({DEVICE})$")
    thinking: Thinking | None = None
    chat_template: str | None = None

    @property
    def named(self) -> str:
        """The model as a command takes it."""
        return str(ModelName(self.model, self.revision))


class _Models(Section):
    models: tuple[ModelEntry, ...] = Field(min_length=1)

    @field_validator("models", mode="before")
    @classmethod
    def _by_name(cls, entries: Any) -> Any:
        """A model that is only named, `ID` or `ID@REVISION`."""
        if not isinstance(entries, list | tuple):
            return entries
        return [_entry(each) if isinstance(each, str) else each for each in entries]


def _entry(text: str) -> dict[str, str | None]:
    name = ModelName.parse(text)
    return {"model": name.name, "revision": name.revision}


@dataclass(frozen=True)
class SeveralConfig:
    """An experiment on several base models; made by `read_several`.

    Attributes:
        name: of the experiment.
        models: the base models, by what their folders are called.
        values: the keys that all share, as the file has them; a layer may be a depth, as a fraction between 0 and 1.
        source: what they come from.
    """

    name: str
    models: Mapping[str, ModelEntry]
    values: Mapping[str, Any]
    source: str

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> "SeveralConfig":
        """From what a file holds. `InputError` for a key or a value that no experiment has."""
        if alone := [key for key in ("model", "revision") if key in values]:
            raise InputError(f"{source}: {alone[0]}: goes without `models`: name each model, or ID@REVISION, there")
        entries = validate(_Models, {"models": values["models"]}, source).models
        models = dict(zip(plain_names([each.named for each in entries]), entries, strict=True))
        shared = {key: value for key, value in values.items() if key != "models"}
        config = cls(str(shared.get("name")), models, shared, source)
        for entry in entries:
            config._with(entry, _ANY_DEPTH)
        return config

    def experiment(self, model: str) -> ExperimentConfig:
        """The experiment on one of the models, with its own layers.

        Raises `InputError` for a model that is not there.
        """
        entry = self.models[model]
        return self._with(entry, len(read_structure(entry.model, entry.revision).chat.layers))

    def _with(self, entry: ModelEntry, layers: int) -> ExperimentConfig:
        own = entry.model_dump(exclude_none=True)
        return validate(ExperimentConfig, {**at_depths(self.values, layers), **own}, self.source)

    @property
    def sampling(self) -> SamplingConfig | None:
        """How answers are sampled, the same in every model; its layers may be none of theirs."""
        return self._with(next(iter(self.models.values())), _ANY_DEPTH).sampling

    def described(self) -> dict[str, Any]:
        """What the joint folder keeps of it."""
        return {**self.values, "models": [each.model_dump(exclude_none=True) for each in self.models.values()]}


def at_depths(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A configuration with the layers that its depths mean in a model of so many.

    Under `layer` and `layers` a fraction between 0.0 and 1.0 is a depth: 0.5 is layer 24 of 48, 1.0 the last. Whole
    numbers stay; of several depths that mean one layer, one does.
    """
    return {key: _resolved(value, layers, is_layer=key in _LAYER_KEYS) for key, value in values.items()}


def _resolved(value: Any, layers: int, *, is_layer: bool) -> Any:
    if isinstance(value, Mapping):
        return at_depths(value, layers)
    if isinstance(value, list):
        resolved = [_resolved(each, layers, is_layer=is_layer) for each in value]
        return list(dict.fromkeys(resolved)) if is_layer and resolved != value else resolved
    if is_layer and isinstance(value, float) and 0 <= value <= 1:
        return min(layers - 1, round(value * layers))
    return value


def read_experiment(path: str | Path) -> ExperimentConfig | SeveralConfig:
    """Read an experiment, on one model or, with the key `models`, on several.

    Raises `InputError` as `read_config` does.
    """
    values = read_yaml(path)
    if isinstance(values, dict) and "models" in values:
        return SeveralConfig.of(values, str(path))
    return validate(ExperimentConfig, values, str(path))


def read_several(path: str | Path) -> SeveralConfig:
    """Read an experiment on several base models. `InputError` as `read_config`, and for a file of one model."""
    config = read_experiment(path)
    if isinstance(config, ExperimentConfig):
        raise InputError(f"{path}: models: is missing: name several, or read the file with read_config")
    return config
