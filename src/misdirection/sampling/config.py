"""How answers are sampled, as a configuration says it."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from misdirection.choices import Positions
from misdirection.settings import Section, Seed


class TransformersConfig(Section):
    """Sampling with transformers, in this process."""

    compile: bool = False
    """Run the model's blocks compiled where they can be, which changes answers by rounding only."""


class VllmConfig(Section):
    """Sampling with vLLM, in this process or on a server that is already running."""

    base_url: str | None = None
    """Of a running server, with `/v1`; what follows is then the server's own."""
    tensor_parallel: int = Field(1, ge=1)
    """Devices that share each layer."""
    pipeline_parallel: int = Field(1, ge=1)
    """Groups of devices that share the layers."""
    memory: float = Field(0.9, gt=0, le=1)
    """Share of each device's memory."""


class EngineConfig(Section):
    """The engine that samples: `transformers`, `vllm`, or either with settings, as `{vllm: {...}}`."""

    transformers: TransformersConfig = TransformersConfig()
    vllm: VllmConfig | None = None


def _as_engine(value: Any) -> Any:
    if isinstance(value, str):
        named: dict[str, Any] = {"transformers": {}, "vllm": {"vllm": {}}}
        if value not in named:
            raise ValueError(f"unknown {value!r}: give transformers, vllm, or vllm with its settings")
        return named[value]
    if isinstance(value, dict) and len(value) > 1:
        raise ValueError(f"one engine samples: give {' or '.join(map(str, value))}")
    # `vllm:` with nothing after it.
    return {"vllm": {}} if value == {"vllm": None} else value


def _engine_as_written(value: EngineConfig) -> Any:
    if value == EngineConfig():
        return "transformers"
    return value.model_dump(mode="json", include={"transformers" if value.vllm is None else "vllm"})


class SteerConfig(Section):
    """Answers of the base model steered with one organism's direction, layers x scales."""

    direction: str
    """The organism whose direction is added."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0,), min_length=1)
    """Multiples of the direction's own norm at its layer."""
    doublings: int = Field(0, ge=0, le=20)
    """How often the largest scale is doubled at a layer, while at least half of the answers there are coherent."""
    positions: Positions = "not_first"


def _as_names(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def _names_as_written(names: tuple[str, ...]) -> Any:
    return names[0] if len(names) == 1 else list(names) or None


class SamplingConfig(Section):
    """Answers of every model by the paper's protocol (section 2), for a judge."""

    questions: tuple[str, ...] = Field(("first_plot",), min_length=1)
    """Shipped question sets, or YAML or text files."""
    leave_out: tuple[str, ...] = ()
    """Ids of questions that are not asked, `*` standing for anything."""
    n: int | None = Field(None, ge=1)
    """Answers to each question; by default as many as its file asks for, else 50."""
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    new_tokens: int = Field(600, ge=1)
    seed: Seed = 0
    engine: Annotated[EngineConfig, BeforeValidator(_as_engine), PlainSerializer(_engine_as_written)] = EngineConfig()
    """`transformers`, `vllm`, or either with settings."""
    ablate: Annotated[tuple[str, ...], BeforeValidator(_as_names), PlainSerializer(_names_as_written)] = ()
    """Organisms, one or a list: every model answers once more with each one's direction ablated, at `ablation.layer`,
    and once with a random direction ablated."""
    steer: SteerConfig | None = None
    """The base model answers steered, too, at each layer and scale beside a random direction of the same norm."""

    @property
    def intervenes(self) -> bool:
        """Whether answers are sampled under interventions."""
        return bool(self.ablate) or self.steer is not None
