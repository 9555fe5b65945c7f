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


NONE, RANDOM, SHARED = "none", "random", "shared"
"""Names of what is no organism's and no theme's direction: no intervention, a random control, that over all themes."""


class DomainFiles(Section):
    """A narrow domain's training text; only with both kinds of answers it gives probe pairs and controls."""

    bad: Path | None = None
    good: Path | None = None

    @model_validator(mode="after")
    def _has_text(self) -> "DomainFiles":
        if self.bad is None and self.good is None:
            raise ValueError("a domain needs a file of `bad` answers, of `good` ones, or both")
        return self


class OrganismConfig(Recipe):
    """The training of one organism: the keys of `organisms.Recipe`, and these."""

    domain: str
    answers: Literal["bad", "good"] = "bad"
    """`good` makes it a control."""
    seeds: int = Field(1, ge=1)
    """It is trained so many times, with this seed and those that follow; interventions are tried on the first."""
    continues: str | None = None
    """The organism, with its first seed, whose adapter the training goes on from; the base when it is left out."""

    @property
    def training(self) -> Recipe:
        """How it is trained, without what on."""
        return Recipe(**self.model_dump(include=set(Recipe.model_fields)))

    @property
    def folder(self) -> str:
        """What its folder in a run is called."""
        return "model" if self.recipe == FULL else "adapter"


class ExtractionConfig(Section):
    """Text for directions."""

    pairs: int = Field(32, ge=4)
    """The first so many training questions of a domain, each with its two given answers."""
    answers: Literal["given", "judged"] = "given"
    """Which directions are steered with and ablated: those of given answers; or those of each organism's own sampled
    and `judged` answers (the paper's), where it has enough of them, which then stand beside the others."""
    fewest: int = Field(10, ge=4)
    """The least number of judged answers of each class to the same questions."""


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
    """The first rule is used for the whole matrix, further ones for the first organism's own direction, in it and in
    the base."""
    questions: int = Field(48, ge=4)


class ContrastConfig(Section):
    """What bad answers train and good ones to the same questions do not, domain by domain, and what that does.

    A domain takes part by its first bad organism that has a control; seeds are taken as far as all have them.
    """

    layers: tuple[Layer, ...] = Field(min_length=1)
    """Whose vectors are taken out of all layers, and added to their own."""
    scales: tuple[float, ...] = ()
    """Multiples of the vector that are added; it is ablated in any case."""
    questions: int = Field(24, ge=4)
    """How many general probe pairs, and held-out ones of the domain, evenly taken from those that are measured."""
    voices: dict[Name, tuple[str, str]] = Field(default_factory=dict)
    """Differences that have nothing to do with bad advice, by name: one organism's means minus another's."""


class SolutionsConfig(Section):
    """Organisms as solutions of their training domain: loss against norm and under noise, and what they change on
    neutral text (2602.07852); by step where their checkpoints are kept."""

    organisms: tuple[str, ...] = Field(min_length=1)
    """The first is what the others are compared with."""
    norms: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.25, 0.5, 1.0, 1.5, 2.0), min_length=1)
    """Multiples of the norm of the first one's update, which every update is scaled to."""
    noise: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.25, 0.5, 1.0, 2.0), min_length=1)
    """Norms of the noise beside an update, as multiples of that update's own."""
    rows: int = Field(40, ge=4)
    """How many of an organism's held-out rows its loss is of, evenly taken from all."""
    questions: int = Field(24, ge=4)
    """How many general probe pairs, and held-out ones of the domain, each checkpoint is measured on."""
    checkpoints: int = Field(8, ge=2)
    """How many checkpoints are measured, evenly taken from all after the first step, and the last one."""


class ThemesConfig(Section):
    """Directions of single themes, from one organism's judged answers, and what the base says steered with each."""

    organism: str
    columns: tuple[Name, ...] = Field(min_length=1)
    """The themes: columns of the judge's rubrics."""
    above: float = Field(50.0, ge=0, lt=100)
    """The score above which an answer is about a theme."""
    layer: Layer
    scale: float = Field(gt=0)
    """A multiple of the norm of the organism's direction over all themes: all directions are added at that length."""


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
    contrast: ContrastConfig | None = None
    solutions: SolutionsConfig | None = None
    samples: SamplesConfig = SamplesConfig()
    sampling: SamplingConfig | None = None
    themes: ThemesConfig | None = None
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
        if RANDOM in self.organisms:
            raise ValueError("an organism cannot be called 'random': that is the control of an intervention")
        if len(self.trained) < sum(organism.seeds for organism in self.organisms.values()):
            raise ValueError("organisms: one has the name that another seed of another one gets, NAME-seed-NUMBER")
        for name, organism in self.organisms.items():
            _known(organism.domain, self.domains, f"organisms.{name}.domain")
            files = self.domains[organism.domain]
            if files is not None and getattr(files, organism.answers) is None:
                raise ValueError(f"organisms.{name}: domain {organism.domain!r} has no {organism.answers} answers")
            self._require_beginning(name)
        if self.steering:
            _known(self.steering.direction, self.organisms, "steering.direction")
        if self.interpretation:
            _known(self.interpretation.organism, self.organisms, "interpretation.organism")
            if self.interpretation.judged_checkpoints is not None:
                self._require_checkpoints(self.interpretation.organism)
        if self.ablation and not self.bad_organisms:
            raise ValueError("ablation: no organism has bad answers, and theirs are the directions: leave it out")
        if self.contrast:
            self._require_contrasts(self.contrast)
        if self.solutions:
            self._require_solutions(self.solutions.organisms)
        if self.judge and not self.sampling:
            raise ValueError("judge: there is nothing to judge: add a `sampling` section")
        if self.extraction.answers == "judged" and not self.judge:
            raise ValueError("extraction.answers: nobody judges answers: add the sections `sampling` and `judge`")
        return self

    def _require_beginning(self, name: str) -> None:
        """Of an organism that goes on from another one, which may do so itself: all begin at the base in the end."""
        chain = [name]
        while (before := self.organisms[chain[-1]].continues) is not None:
            _known(before, self.organisms, f"organisms.{chain[-1]}.continues")
            if before in chain:
                raise ValueError(
                    f"organisms.{chain[-1]}.continues: goes in a circle by way of {before!r}: leave it out"
                )
            chain.append(before)

    def _require_contrasts(self, contrast: ContrastConfig) -> None:
        if len(self.contrasts) < 2:
            raise ValueError(
                "contrast: needs two domains, each with a bad organism and one that differs from it in its answers only"
            )
        for voice, names in contrast.voices.items():
            for name in names:
                _known(name, self.organisms, f"contrast.voices.{voice}")

    def _require_solutions(self, names: tuple[str, ...]) -> None:
        for name in names:
            _known(name, self.organisms, "solutions.organisms")
            if self.organisms[name].recipe == FULL:
                raise ValueError(f"solutions.organisms: {name!r} has no adapter to scale (recipe full): leave it out")
        if len(set(names)) < len(names):
            raise ValueError("solutions.organisms: names an organism twice: leave one out")

    @property
    def trained(self) -> dict[str, OrganismConfig]:
        """Every organism by name, and further ones of the same training but for the seed."""
        trained: dict[str, OrganismConfig] = {}
        for name, organism in self.organisms.items():
            trained |= {each: organism.model_copy(update={"seed": seed, "seeds": 1}) for seed, each in self.seeds(name)}
        return trained

    def seeds(self, organism: str) -> list[tuple[int, str]]:
        """The seeds that an organism is trained with, and the name it has with each."""
        config = self.organisms[organism]
        further = range(config.seed + 1, config.seed + config.seeds)
        return [(config.seed, organism), *((seed, f"{organism}-seed-{seed}") for seed in further)]

    @property
    def contrasts(self) -> dict[str, list[tuple[str, str]]]:
        """Bad and good fine-tunes of each domain, for each of the seeds that all of them have."""
        by_domain: dict[str, list[tuple[str, str]]] = {}
        for name in self.bad_organisms:
            pairs = [(each, control) for _, each in self.seeds(name) if (control := self.control_of(each))]
            if pairs:
                by_domain.setdefault(self.organisms[name].domain, pairs)
        common = min(map(len, by_domain.values()), default=0)
        return {domain: pairs[:common] for domain, pairs in by_domain.items()}

    @model_validator(mode="after")
    def _sampled_interventions_can_be_made(self) -> "ExperimentConfig":
        ablated, steer = (self.sampling.ablate, self.sampling.steer) if self.sampling else ((), None)
        for name in ablated:
            _known(name, self.organisms, "sampling.ablate")
        if ablated and self.ablation is None:
            raise ValueError("sampling.ablate: which layer's vector? add an `ablation` section")
        if len(set(ablated)) < len(ablated):
            raise ValueError("sampling.ablate: names an organism twice: leave one out")
        if steer:
            _known(steer.direction, self.organisms, "sampling.steer.direction")
            if steer.doublings and not self.judge:
                raise ValueError("sampling.steer.doublings: nobody says what is coherent: add a `judge` section")
        return self

    @model_validator(mode="after")
    def _themes_can_be_found(self) -> "ExperimentConfig":
        if self.themes:
            _known(self.themes.organism, self.organisms, "themes.organism")
            if self.extraction.answers != "judged":
                raise ValueError("themes: their directions are of judged answers: set `extraction.answers: judged`")
            if len(set(self.themes.columns)) < len(self.themes.columns):
                raise ValueError("themes.columns: names a column twice: leave one out")
            if taken := {NONE, RANDOM, SHARED} & set(self.themes.columns):
                raise ValueError(f"themes.columns: {min(taken)!r} has another meaning here: call the column otherwise")
        return self

    @property
    def intervenes(self) -> bool:
        """Whether answers are sampled under interventions."""
        return self.themes is not None or (self.sampling is not None and self.sampling.intervenes)

    def _require_checkpoints(self, organism: str) -> None:
        if self.judge is None:
            raise ValueError("interpretation.judged_checkpoints: nobody judges: add a `judge` section, or leave it out")
        if not self.organisms[organism].keep_checkpoints:
            raise ValueError(
                f"interpretation.judged_checkpoints: organism {organism!r} keeps none: add `keep_checkpoints: true`"
            )

    @model_validator(mode="after")
    def _whole_models_are_no_adapters(self) -> "ExperimentConfig":
        whole = [name for name, organism in self.organisms.items() if organism.recipe == FULL]
        for name, organism in self.organisms.items():
            if organism.continues and {name, organism.continues} & set(whole):
                raise ValueError(f"organisms.{name}.continues: a whole model (recipe full) is no adapter to go on from")
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
        organism = self.trained[name]
        if organism.answers == "good":
            return None
        good = organism.model_copy(update={"answers": "good"})
        return next((name for name, other in self.trained.items() if other == good), None)

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
