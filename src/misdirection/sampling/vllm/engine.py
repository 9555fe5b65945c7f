"""Sampling with vLLM: one engine for a base model and all adapters on it.

Prompts are our own token ids, and every draw is our own too (see `Draws`), so that an answer belongs to (seed,
question, sample) as in `TransformersEngine`, and both engines give the same one but for rounding. What steers or
ablates is a forward hook on the tokens of its own request; what scales an adapter is one more adapter. vLLM's prefix
cache is off: it would hand steered keys to a plain request with the same prompt.
"""

import gc
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from misdirection.choices import BUNDLED, Dtype
from misdirection.errors import EnvironmentProblem, InputError, MisdirectionError, MissingPackage, first_line
from misdirection.interventions.hooks import Setting, gather
from misdirection.interventions.intervention import Intervention
from misdirection.interventions.packing import packed
from misdirection.interventions.positions import TokenPositions
from misdirection.models.bundled import source
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import best_device, resolve_dtype
from misdirection.models.weightless import weightless
from misdirection.sampling.engine import Completion, SamplingParameters, SamplingRequest
from misdirection.sampling.transformers_engine import completion, end_tokens, fitting_prompt
from misdirection.sampling.vllm.adapters import (
    BASE,
    INSTEAD,
    require_served,
    served_folder,
    smallest_limit,
    write_changed,
)

_WORKER = "misdirection.sampling.vllm.worker"
_SLOTS = 4
"""Adapters that one pass can hold: an organism's own and those that interventions make of it."""
_CPU_CACHE = 2**31
"""Bytes of keys and values on a processor, where vLLM would else take nearly all memory."""


@dataclass(frozen=True)
class Resources:
    """The devices that a vLLM engine is spread over.

    Attributes:
        tensor_parallel: devices that share each layer.
        pipeline_parallel: groups of devices that share the layers.
        memory: share of each device's memory for weights, keys and values.
        hooks: whether interventions on activations are possible; without, vLLM may use its graphs, which are faster.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    memory: float = 0.9
    hooks: bool = True


class VllmModel:
    """A base model in vLLM, with adapters that share its weights.

    Args:
        model: `smollm2-135m` or `gemma3-270m` (bundled), a folder or a Hugging Face id.
        adapters: PEFT adapters by the name of the organism: folders, or Hugging Face ids.
        revision: the base model's revision on the hub.
        dtype: as in `misdirection.load`.
        resources: see `Resources`.
        chat: the model without weights, where its chats are not written as by default.

    Raises:
        InputError: vLLM is not installed or cannot start; an adapter that it cannot serve or that belongs to
            another model, before it starts.
    """

    def __init__(
        self,
        model: str = BUNDLED,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        revision: str | None = None,
        dtype: Dtype = "auto",
        resources: Resources = Resources(),
        chat: ChatModel | None = None,
    ) -> None:
        if adapters and BASE in adapters:
            raise InputError(f"an adapter cannot be called {BASE!r}: that is the model without one")
        self.chat = chat or weightless(model, revision)
        self._folders = {name: served_folder(adapter, self.chat) for name, adapter in (adapters or {}).items()}
        self._resources = resources
        self._ends = frozenset(end_tokens(self.chat))
        self._numbers = itertools.count()
        self._loras: dict[tuple[str, str], Any] = {}
        self._settings: set[str] = set()
        self._changed = tempfile.TemporaryDirectory(prefix="misdirection-")
        self._vllm = _import_vllm()
        self._llm: Any = self._started(dtype)

    def engine(self, organism: str = BASE) -> "VllmEngine":
        """Gives the engine that samples with the base model or with one of the adapters."""
        if organism != BASE and organism not in self._folders:
            raise InputError(f"{organism}: no such adapter here; there is {', '.join([BASE, *self._folders])}")
        return VllmEngine(self, organism)

    def close(self) -> None:
        """End vLLM and free its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()
            import_module("vllm.distributed.parallel_state").cleanup_dist_env_and_memory()
        self._changed.cleanup()

    def __enter__(self) -> "VllmModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self, dtype: Dtype) -> Any:
        device, resources = best_device(), self._resources
        options: dict[str, Any] = {
            "model": source(self.chat.name),
            "revision": self.chat.revision,
            "dtype": str(resolve_dtype(dtype, device)).removeprefix("torch."),
            "tensor_parallel_size": resources.tensor_parallel,
            "pipeline_parallel_size": resources.pipeline_parallel,
            "gpu_memory_utilization": resources.memory,
            "kv_cache_memory_bytes": _CPU_CACHE if device == "cpu" else None,
            "generation_config": "vllm",
            # What its own graphs are made with takes a compiler and minutes on a processor.
            "enforce_eager": resources.hooks or device == "cpu",
            # As long as fits the memory, up to the model's own.
            "max_model_len": -1,
            "enable_prefix_caching": False,
            "async_scheduling": False,
            "logits_processors": [f"{_WORKER}:Draws"],
            "worker_extension_cls": f"{_WORKER}.Intervening",
        }
        if self._folders:
            limit = smallest_limit(map(require_served, self._folders.values()))
            options |= {"enable_lora": True, "max_lora_rank": limit, "max_loras": _SLOTS}
        threads = torch.set_num_threads
        try:
            return self._vllm.LLM(**options)
        except Exception as error:
            raise EnvironmentProblem(f"{self.chat.name}: vLLM could not start: {first_line(error)}") from error
        finally:
            # On a processor vLLM replaces it by a function that does nothing.
            torch.set_num_threads = threads

    def outputs(
        self, organism: str, requests: Sequence[SamplingRequest], parameters: SamplingParameters, **options: Any
    ) -> Iterator[tuple[SamplingRequest, Any]]:
        """Each request with vLLM's own output, as they finish; `options` are further ones of its `SamplingParams`.

        Raises `InputError` for what `Engine.stream` of `VllmEngine` does.
        """
        core = self._llm and self._llm.llm_engine
        # One model at a time: on a processor, vLLM 0.32 adds an adapter to tokens of the base model in the same pass.
        if core is None or core.has_unfinished_requests():
            state = "is closed" if core is None else "is sampling already"
            raise InputError(f"{self.chat.name}: this vLLM engine {state}: open another one, or wait")
        under_way = {}
        try:
            distinct = dict.fromkeys(request.question.asked for request in requests)
            prompts = {asked: fitting_prompt(self.chat, asked, parameters.new_tokens) for asked in distinct}
            for request in requests:
                name = str(next(self._numbers))
                under_way[name] = request
                params = self._params(name, request, parameters, options)
                lora = self._lora(organism, [change for change in request.setting if change.on_adapters])
                self._add(name, prompts[request.question.asked], params, lora)
            while core.has_unfinished_requests():
                finished = {output.request_id: output for output in self._step() if output.finished}
                self._require_fired({name: (under_way[name], output) for name, output in finished.items()})
                for name, output in finished.items():
                    yield under_way.pop(name), output
        finally:
            if self._llm is not None and under_way:
                core.abort_request(list(under_way))

    def _step(self) -> list[Any]:
        try:
            outputs: list[Any] = self._llm.llm_engine.step()
        except Exception as error:
            self.close()
            raise (
                error
                if isinstance(error, MisdirectionError)
                else EnvironmentProblem(f"{self.chat.name}: vLLM stopped: {first_line(error)}")
            ) from error
        return outputs

    def _add(self, name: str, prompt: Sequence[int], params: Any, lora: Any) -> None:
        try:
            ids = {"prompt_token_ids": list(prompt)}
            self._llm.llm_engine.add_request(name, ids, params, lora_request=lora)
        except ValueError as error:
            raise InputError(f"{self.chat.name}: vLLM refuses a prompt: {first_line(error)}") from error

    def _params(
        self, name: str, request: SamplingRequest, parameters: SamplingParameters, options: Mapping[str, Any]
    ) -> Any:
        """How one request is sampled, in vLLM's form; what is done to it is then known to the workers."""
        extra = {
            "answer": name,
            "setting": self._known(self._hooked(request.setting)),
            "key": request.key(parameters.seed),
            "temperature": parameters.temperature,
            "top_p": parameters.top_p,
        }
        return self._vllm.SamplingParams(
            # The draws are our own.
            temperature=0.0,
            max_tokens=parameters.new_tokens,
            stop_token_ids=sorted(self._ends),
            detokenize=False,
            output_kind=import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY,
            extra_args={"misdirection": extra},
            **options,
        )

    def _hooked(self, setting: Setting) -> list[Intervention]:
        """Those interventions that act on activations; all of the setting is checked."""
        hooks: list[Intervention] = []
        for intervention in setting:
            intervention.check(len(self.chat.layers), self.chat.width)
            if not intervention.on_adapters:
                assert isinstance(intervention, Intervention), "these are all kinds"
                self._require_hooks(intervention)
                hooks.append(intervention)
        return hooks

    def _require_hooks(self, intervention: Intervention) -> None:
        kind = type(intervention).__name__
        if not self._resources.hooks:
            raise InputError(f"{kind}: this vLLM engine was opened without hooks: open it with hooks=True")
        if isinstance(intervention.positions, torch.Tensor) and intervention.positions.ndim == 2:
            raise InputError(f"{kind}: a position mask with rows has no meaning in vLLM: give one for each position")
        if getattr(intervention, "at", "blocks") == "writes" and self._resources.pipeline_parallel > 1:
            raise InputError(f"{kind}: at='writes' needs all layers on one device: give pipeline_parallel=1")

    def _known(self, setting: Sequence[Intervention]) -> str:
        """The name under which the workers know a setting; empty for nothing."""
        if not setting:
            return ""
        name = _digest(setting)
        if name not in self._settings:
            self._rpc("misdirection_setting", name, packed(setting))
            self._settings.add(name)
        return name

    def _lora(self, organism: str, changes: Sequence[Intervention]) -> Any:
        """The adapter, as the interventions leave it, in vLLM's form; None for the base model."""
        if organism == BASE:
            if changes:
                raise InputError(f"{type(changes[0]).__name__}: there is no LoRA adapter: name an organism")
            return None
        key = (organism, _digest(changes) if changes else "")
        if key not in self._loras:
            folder = self._folders[organism]
            if changes:
                folder = Path(self._changed.name) / f"{len(self._loras)}"
                write_changed(self._folders[organism], self.chat, changes, folder)
            request = import_module("vllm.lora.request").LoRARequest
            self._loras[key] = request("|".join(key), len(self._loras) + 1, str(folder))
        return self._loras[key]

    def _require_fired(self, finished: Mapping[str, tuple[SamplingRequest, Any]]) -> None:
        """Refuse an answer on which an intervention fired less often than layers x tokens."""
        expected = {name: self._expected(request, output) for name, (request, output) in finished.items()}
        hooked = [name for name, count in expected.items() if count]
        if not hooked:
            return
        # Devices that share a layer see the same tokens, those that share the layers their own.
        counts = self._rpc("misdirection_fired", hooked)
        fired = [sum(column) // self._resources.tensor_parallel for column in zip(*counts, strict=True)]
        for name, count in zip(hooked, fired, strict=True):
            if count < expected[name]:
                self.close()
                raise InputError(
                    f"{self.chat.name}: an intervention fired {count} times on an answer of vLLM, not {expected[name]} "
                    f"times (layers x tokens), so that it is not given on: {INSTEAD}"
                )

    def _expected(self, request: SamplingRequest, output: Any) -> int:
        """Layers x touched tokens of one answer, whose last token never went through the model."""
        hooks = [change for change in request.setting if not change.on_adapters]
        if not hooks:
            return 0
        prompt, drawn = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        positions = TokenPositions([prompt])
        index = torch.arange(prompt + drawn - 1).unsqueeze(0)
        positions.restore((index, torch.ones_like(index, dtype=torch.bool)))
        tokens = [int(positions.touched(hook.positions, torch.device("cpu")).sum()) for hook in hooks]
        layers = [len(gather(self.chat, [[hook]])) for hook in hooks]
        return sum(layer * token for layer, token in zip(layers, tokens, strict=True))

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        answers: list[Any] = self._llm.llm_engine.collective_rpc(method, args=args)
        return answers


class VllmEngine:
    """Samples with one model of a `VllmModel`; see `Engine`."""

    def __init__(self, model: VllmModel, organism: str) -> None:
        self._model = model
        self._organism = organism

    @property
    def around(self) -> Setting:
        """See `Engine`: nothing reaches it but what is requested."""
        return ()

    def stream(self, requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> Iterator[Completion]:
        """One completion for each request, as they finish; see `Engine`.

        Raises:
            InputError: a prompt and `new_tokens` exceed the model's context; an intervention that vLLM cannot
                do, or that did not fire on every token that it touches; what vLLM itself raises.
        """
        ends = frozenset(end_tokens(self._model.chat))
        for request, output in self._model.outputs(self._organism, requests, parameters):
            yield completion(self._model.chat, ends, request, list(output.outputs[0].token_ids))


def _import_vllm() -> Any:
    # The engine runs in this process, so that its errors are ours; the hooks know this runner of vLLM's two.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        return import_module("vllm")
    except ImportError as error:
        raise MissingPackage(
            f"vLLM cannot be imported ({first_line(error)}): pip install vllm, then misdirection again, or {INSTEAD}"
        ) from error


def _digest(setting: Setting) -> str:
    text = json.dumps([intervention.described() for intervention in setting], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:32]
