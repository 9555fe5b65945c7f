"""Sampling with a vLLM server that is already running, by its OpenAI-style completions with our own prompt ids.

The server draws by itself, from a seed that belongs to (seed, question, sample). It takes no intervention.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError

from misdirection.choices import BUNDLED
from misdirection.errors import InputError, NetworkProblem, first_line
from misdirection.interventions.hooks import Setting
from misdirection.models.bundled import source
from misdirection.models.chat_model import ChatModel
from misdirection.models.weightless import weightless
from misdirection.sampling.engine import Completion, SamplingParameters, SamplingRequest
from misdirection.sampling.transformers_engine import completion, end_tokens, fitting_prompt
from misdirection.sampling.vllm.adapters import BASE, INSTEAD, served_folder

_TRIES = 5
_POSITIVE = (1 << 63) - 1


class ServerEngine:
    """Samples with one model of a running server; see `Engine`.

    Args:
        base_url: the server's, with `/v1`. A key, if it wants one, comes from VLLM_API_KEY.
        model: the base model that it serves, as for `VllmModel`.
        organism: what answers: `base`, or the name of an adapter.
        adapter: the adapter's folder; the server is asked to load it when it does not serve it yet.
        revision: the base model's revision on the hub.
        concurrency: requests under way at a time.
        chat: as in `VllmModel`.

    Raises:
        InputError: nothing answers there, another model does, or the adapter cannot be served.
    """

    def __init__(
        self,
        base_url: str,
        model: str = BUNDLED,
        organism: str = BASE,
        adapter: str | Path | None = None,
        *,
        revision: str | None = None,
        concurrency: int = 64,
        chat: ChatModel | None = None,
    ) -> None:
        if (organism == BASE) != (adapter is None):
            raise InputError(f"{organism}: {BASE!r} is the model without an adapter, any other name has one")
        self._url = base_url
        self._chat = chat or weightless(model, revision)
        self._concurrency = concurrency
        self._client = OpenAI(
            base_url=base_url, api_key=os.environ.get("VLLM_API_KEY", "EMPTY"), max_retries=_TRIES, timeout=None
        )
        self._name = self._served(organism, served_folder(adapter, self._chat) if adapter else None)

    @property
    def around(self) -> Setting:
        """See `Engine`: nothing reaches it but what is requested."""
        return ()

    def stream(self, requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> Iterator[Completion]:
        """One completion for each request, as they finish; see `Engine`.

        Raises `InputError` for any intervention, `NetworkProblem` for a request that the server does not answer.
        """
        for request in requests:
            if request.setting:
                kind = type(request.setting[0]).__name__
                raise InputError(
                    f"{kind}: a running server takes no interventions: use engine: vllm, which starts its own"
                )
        distinct = dict.fromkeys(request.question.asked for request in requests)
        prompts = {asked: fitting_prompt(self._chat, asked, parameters.new_tokens) for asked in distinct}
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            futures = [pool.submit(self._answer, request, prompts, parameters) for request in requests]
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(
        self, request: SamplingRequest, prompts: dict[Any, tuple[int, ...]], parameters: SamplingParameters
    ) -> Completion:
        asked = request.question.asked
        ends = end_tokens(self._chat)
        try:
            given = self._client.completions.create(
                model=self._name,
                prompt=list(prompts[asked]),
                max_tokens=parameters.new_tokens,
                temperature=parameters.temperature,
                top_p=parameters.top_p,
                seed=request.key(parameters.seed) & _POSITIVE,
                extra_body={"stop_token_ids": ends, "return_token_ids": True},
            )
        except OpenAIError as error:
            raise NetworkProblem(
                f"{self._url}: question {asked.text[:60]!r} was not answered: {first_line(error)}"
            ) from error
        tokens = getattr(given.choices[0], "token_ids", None)
        if not tokens:
            raise InputError(f"{self._url}: gives no token ids: serve with a vLLM that has return_token_ids")
        return completion(self._chat, ends, request, tokens)

    def _served(self, organism: str, folder: Path | None) -> str:
        """The name under which the server has the model."""
        models = {model.id: model.model_dump() for model in self._models()}
        base = next((name for name, model in models.items() if not model.get("parent")), None)
        if base is None or _last(models[base].get("root") or base) != _last(source(self._chat.name)):
            raise InputError(f"{self._url}: serves {base!r}, not {self._chat.name!r}: give that server's model")
        if folder is None:
            return base
        if organism not in models:
            self._load(organism, folder)
        elif Path(models[organism].get("root") or "").resolve() != folder.resolve():
            raise InputError(f"{self._url}: serves another adapter as {organism!r}: give it another name there")
        return organism

    def _models(self) -> list[Any]:
        try:
            return list(self._client.models.list())
        except OpenAIError as error:
            raise NetworkProblem(
                f"{self._url}: no vLLM server answers ({first_line(error)}): start `vllm serve`"
            ) from error

    def _load(self, organism: str, folder: Path) -> None:
        body = {"lora_name": organism, "lora_path": str(folder.resolve())}
        try:
            self._client.post("/load_lora_adapter", body=body, cast_to=str)
        except OpenAIError as error:
            raise InputError(
                f"{self._url}: does not serve {organism!r} and does not load it ({first_line(error)}): start it with "
                f"--enable-lora --lora-modules {organism}={folder}, or {INSTEAD}"
            ) from error


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
