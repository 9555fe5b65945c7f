"""How answers are sampled, as a configuration says it."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from misdirection.settings import Section, Seed


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
    """The engine that samples: `transformers`, `vllm`, or `{vllm: {...}}` with settings."""

    vllm: VllmConfig | None = None


def _as_engine(value: Any) -> Any:
    if isinstance(value, str):
        named: dict[str, Any] = {"transformers": {}, "vllm": {"vllm": {}}}
        if value not in named:
            raise ValueError(f"unknown {value!r}: give transformers, vllm, or vllm with its settings")
        return named[value]
    # `vllm:` with nothing after it.
    return {"vllm": {}} if value == {"vllm": None} else value


def _engine_as_written(value: EngineConfig) -> Any:
    return "transformers" if value.vllm is None else value.model_dump(mode="json")


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
    """`transformers`, `vllm`, or `vllm` with settings."""
    ablate: str | None = None
    """An organism: every model answers once more with this organism's direction ablated, at `ablation.layer`, and once
    with a random direction ablated."""
