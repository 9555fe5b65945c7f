"""One YAML file is one experiment."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from misdirection.choices import DEVICE, Dtype, Thinking
from misdirection.data.text import read_yaml
from misdirection.errors import InputError
from misdirection.interpretation.config import InterpretationConfig
from misdirection.interpretation.texts import QUESTION_SETS
from misdirection.interventions.positions import Positions
from misdirection.judging.config import JudgeConfig
from misdirection.organisms.recipe import FULL, Recipe
from misdirection.registry import nearest
from misdirection.sampling.config import SamplingConfig
from misdirection.settings import Section, validate


def _usable(name: str) -> str:
    if not name.isprintable() or "/" in name or name.strip(" .") != name or not 0 < len(name.encode()) <= _LONGEST:
        raise ValueError(f"{name!r} cannot name a file: give up to {_LONGEST} letters, without slashes and line breaks")
    return name


_LONGEST = 100

Name = Annotated[str, AfterValidator(_usable)]
"""What files and folders are called after."""

Layer = Annotated[int, Field(ge=0)]


class DomainFiles(Section):
    """A narrow domain's training text; without `good` answers it gives no probe pairs and no control."""

    bad: Path
    good: Path | None = None


class OrganismConfig(Recipe):
    """The training of one organism: the keys of `organisms.Recipe`, and these."""

    domain: str
    answers: Literal["bad", "good"] = "bad"
    """`good` makes it a control."""

    @property
    def training(self) -> Recipe:
        """How it is trained, without what on."""
        return Recipe(**self.model_dump(include=set(Recipe.model_fields)))

    @property
    def folder(self) -> str:
        """What its folder in a run is called."""
        return "model" if self.recipe == FULL else "adapter"


class ExtractionConfig(Section):
    """Text for directions: the first so many training questions of a domain, each with its two answers."""

    pairs: int = Field(32, ge=4)


class SteeringConfig(Section):
    """Steering of the base model, layers x scales."""

    direction: str
    """The organism whose direction is added."""
    layers: tuple[Layer, ...] = Field(min_length=1)
    scales: tuple[float, ...] = Field((1.0,), min_length=1)
    questions: int = Field(24, ge=4)
    """How many general probe pairs, evenly taken from all."""


class AblationConfig(Section):
    """Ablation of each bad organism's direction in every model: the transfer matrix."""

    layer: Layer
    """Whose layer's vector is taken out of all layers."""
    positions: tuple[Positions, ...] = Field(("not_first",), min_length=1)
    """The first rule is used for the whole matrix, further ones for the first organism's own direction."""
    questions: int = Field(48, ge=4)


class MarginConfig(Section):
    """How many probe pairs the models are measured on, evenly taken from all; all when left out."""

    general: int | None = Field(None, ge=4)
    """General probe pairs; those under interventions are taken from these."""
    sealed: int | None = Field(None, ge=4)
    """Shipped general probe pairs that nothing is chosen on."""
    held_out: int | None = Field(None, ge=4)
    """Of every domain's held-out pairs."""


class DamageConfig(Section):
    """How many neutral texts damage is measured on, evenly taken from all."""

    models: int = Field(40, ge=4)
    """For the models themselves."""
    interventions: int = Field(16, ge=4)
    """For each model under each intervention."""


class SamplesConfig(Section):
    """A few answers to read, side by side; they enter no figure."""

    questions: tuple[str, ...] = ()
    new_tokens: int = Field(60, ge=1)


def _as_files(value: Any) -> Any:
    return None if value == "shipped" else value


class ExperimentConfig(Section):
    """A whole experiment."""

    name: Name
    model: str = Field(min_length=1)
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = Field("auto", pattern=f"^({DEVICE})$")
    thinking: Thinking = "off"
    """Of a model that can think before it answers; see `misdirection.load`."""
    chat_template: str | None = None
    """The name of one of the model's several chat templates, or a file; the model's own when it is left out."""
    domains: dict[Name, Annotated[DomainFiles | None, BeforeValidator(_as_files)]] = Field(min_length=1)
    """By name: `shipped`, or files."""
    organisms: dict[Name, OrganismConfig] = Field(min_length=1)
    probe_pairs: Path | None = None
    """General probe pairs, JSONL; the shipped ones when it is left out."""
    further_pairs: dict[Name, Path] = Field(default_factory=dict)
    """Further probe pairs that the models are measured on, JSONL by name: an instrument of another author."""
    neutral: Path | None = None
    """Neutral text for damage; the shipped one when it is left out."""
    margin: MarginConfig = MarginConfig()
    damage: DamageConfig = DamageConfig()
    random_seeds: int = Field(3, ge=1)
    """Random directions beside every intervention."""
    random_controls: Literal["every", "alternating"] = "every"
    """`every` question meets each random direction; or, `alternating`, each question meets one of them, in turn."""
    extraction: ExtractionConfig = ExtractionConfig()
    steering: SteeringConfig | None = None
    ablation: AblationConfig | None = None
    samples: SamplesConfig = SamplesConfig()
    sampling: SamplingConfig | None = None
    judge: JudgeConfig | None = None
    interpretation: InterpretationConfig | None = None
    left_out: tuple[str, ...] = ()
    """Sentences for the report: what this experiment leaves out of the paper's."""

    @model_validator(mode="before")
    @classmethod
    def _switch_as_word(cls, values: Any) -> Any:
        """YAML reads a plain on or off as true or false."""
        if isinstance(values, dict) and isinstance(switch := values.get("thinking"), bool):
            return {**values, "thinking": "on" if switch else "off"}
        return values

    @model_validator(mode="after")
    def _sets_have_names_of_their_own(self) -> "ExperimentConfig":
        for name in self.domains:
            if name in QUESTION_SETS:
                raise ValueError(f"domains.{name}: is the name of another question set: choose another")
        for name in self.further_pairs:
            if name in self.domains or name in QUESTION_SETS:
                raise ValueError(f"further_pairs.{name}: is the name of another question set: choose another")
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> "ExperimentConfig":
        if "base" in self.organisms:
            raise ValueError("an organism cannot be called 'base': that is the model without adapter")
        if "random" in self.organisms:
            raise ValueError("an organism cannot be called 'random': that is the control of an intervention")
        for name, organism in self.organisms.items():
            _known(organism.domain, self.domains, f"organisms.{name}.domain")
            files = self.domains[organism.domain]
            if organism.answers == "good" and files is not None and files.good is None:
                raise ValueError(f"organisms.{name}.answers: domain {organism.domain!r} has no good answers")
        if self.steering:
            _known(self.steering.direction, self.organisms, "steering.direction")
        if self.interpretation:
            _known(self.interpretation.organism, self.organisms, "interpretation.organism")
        if self.ablation and not self.bad_organisms:
            raise ValueError("ablation: no organism has bad answers, and theirs are the directions: leave it out")
        if self.judge and not self.sampling:
            raise ValueError("judge: there is nothing to judge: add a `sampling` section")
        if self.sampling and self.sampling.ablate is not None:
            _known(self.sampling.ablate, self.organisms, "sampling.ablate")
            if self.ablation is None:
                raise ValueError("sampling.ablate: which layer's vector? add an `ablation` section")
        return self

    @model_validator(mode="after")
    def _whole_models_are_no_adapters(self) -> "ExperimentConfig":
        whole = [name for name, organism in self.organisms.items() if organism.recipe == FULL]
        if self.interpretation and (name := self.interpretation.organism) in whole:
            raise ValueError(f"interpretation.organism: {name!r} has no adapter to read: name another organism")
        served = self.sampling.engine.vllm if self.sampling else None
        if whole and served and served.base_url:
            raise ValueError(
                f"sampling.engine.vllm.base_url: a server has the base, and {whole[0]!r} is a model of its own (recipe "
                "full): leave it out"
            )
        return self

    @property
    def bad_organisms(self) -> list[str]:
        """Names of the organisms that are no control."""
        return [name for name, organism in self.organisms.items() if organism.answers == "bad"]

    def control_of(self, name: str) -> str | None:
        """The organism that differs from a bad one in its answers only; None for a control."""
        organism = self.organisms[name]
        if organism.answers == "good":
            return None
        good = organism.model_copy(update={"answers": "good"})
        return next((name for name, other in self.organisms.items() if other == good), None)

    @property
    def control(self) -> str | None:
        """The first organism trained on good answers."""
        return next((name for name, organism in self.organisms.items() if organism.answers == "good"), None)


def _known(name: str, names: Any, key: str) -> None:
    if name not in names:
        raise ValueError(f"{key}: unknown {name!r}{nearest(name, list(names))}")


def read_config(path: str | Path) -> ExperimentConfig:
    """Read one experiment. `InputError` names the file, the key and the nearest right name."""
    values = read_yaml(path)
    if isinstance(values, dict) and "models" in values:
        raise InputError(f"{path}: models: one model is needed here: name it as `model`, or give the file to `run`")
    return validate(ExperimentConfig, values, str(path))
