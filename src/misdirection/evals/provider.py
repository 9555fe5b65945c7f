"""The provider `misdirection`: our models, with an adapter, steered, or with a direction taken out, on anybody's task.

    inspect eval TASK --model misdirection/smollm2-135m -M adapter=DIR -M direction=FILE -M layer=15 -M scale=2

Answers are those of `sample`: the seed of the eval, the question and the epoch decide every draw. With
`prompt_logprobs` it gives the log-probability of every token of a prompt, and says how many of them are of a given
answer.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from inspect_ai.log._samples import sample_active
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from misdirection.choices import Dtype, Positions, Thinking
from misdirection.data.records import Turn
from misdirection.directions.setting import direction_setting, require_whole
from misdirection.errors import InputError
from misdirection.evals.gathering import Gatherer
from misdirection.evals.refusals import in_one_line
from misdirection.evals.tasks import ANSWER_TOKENS
from misdirection.interventions.hooks import Setting, intervene
from misdirection.likelihood.answers import AnswerBatch, token_log_probs
from misdirection.models.chat import Encoded, encode, encode_prompt
from misdirection.models.chat_model import ChatModel
from misdirection.sampling.engine import Completion, SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Asked, Question
from misdirection.sampling.samplers import open_sampler
from misdirection.sampling.transformers_engine import TransformersEngine, context_length
from misdirection.settings import Section, validate

MOST_TOKENS = 2048
"""Of an answer, where the eval does not say: as many as Inspect's own providers give."""

_APART = 1 << 32
"""Between the numbers of an epoch's first answer to a question and of its next, when a task asks it again."""

_IGNORED = (
    "frequency_penalty", "presence_penalty", "logit_bias", "top_k", "num_choices", "best_of", "logprobs",
    "response_schema",
)  # fmt: skip

log = logging.getLogger("misdirection")


class ModelOptions(Section):
    """What `-M` says of a model; see the options of `misdirection sample`."""

    adapter: str | None = None
    """A PEFT adapter: a folder, or a Hugging Face id, ID[@REVISION][:SUBFOLDER]."""
    direction: Path | None = None
    """A direction file that `extract` wrote."""
    layer: int | None = None
    """Whose layer's vector."""
    scale: float | None = None
    """Steer that layer by this scale; left out, the direction is ablated at all layers."""
    positions: Positions = "not_first"
    as_additive: bool = False
    """Add a direction all the same that says that it is for ablation."""
    dtype: Dtype = "auto"
    device: str = "auto"
    thinking: Thinking = "off"
    chat_template: str | None = None


@dataclass(frozen=True)
class _Wanted:
    """One request of Inspect's.

    Attributes:
        request: what is to be answered; None where a given answer is to be scored only.
        parameters, stop: how it is sampled.
        scored: a prompt whose tokens' log-probabilities are wanted.
    """

    request: SamplingRequest | None
    parameters: SamplingParameters
    stop: tuple[str, ...] = ()
    scored: Encoded | None = None


_Given = tuple[Completion | None, list[Logprob]]


class MisdirectionAPI(ModelAPI):
    """A model of ours for Inspect; `model_args` are those of `ModelOptions`."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (its base class has it so)
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, config=config)
        with in_one_line():
            options = validate(ModelOptions, model_args, "-M")
            require_whole(options.direction, options.layer, options.scale)
            chats = options.model_dump(include={"dtype", "device", "thinking", "chat_template"})
            self._chat = open_sampler(model_name, options.adapter, **chats).chat
            self._setting, intervention = direction_setting(
                self._chat,
                options.direction,
                options.layer,
                options.scale,
                options.positions,
                options.as_additive,
            )
        self._who = {"organism": options.adapter or "base", "intervention": intervention}
        self._gatherer: Gatherer[_Wanted, _Given] = Gatherer(self._answer)
        self._asked: Counter[tuple[str, Asked]] = Counter()
        self._told: set[str] = set()

    def collapse_user_messages(self) -> bool:
        """Templates want turns that alternate."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """See `collapse_user_messages`."""
        return True

    def collapse_system_messages(self) -> bool:
        """A chat has one system turn."""
        return True

    async def tokenize(self, text: str) -> list[int]:
        """The ids of a text alone, without special tokens."""
        ids: list[int] = self._chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    async def count_text_tokens(self, text: str) -> int:
        """By the model's own tokenizer."""
        return len(await self.tokenize(text))

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """See `ModelAPI`; a conversation that ends with an answer of the assistant's is scored, not gone on with."""
        self._tell_ignored(config)
        with in_one_line():
            if tools:
                raise InputError(f"misdirection/{self.model_name}: calls no tools: take a task without any")
            question, answer = _exchange(input)
            scored = self._encoded(question, answer) if config.prompt_logprobs or answer is not None else None
            prompt = encode_prompt(self._chat.tokenizer, *question.asked) if scored is None else scored.prompt
            context = context_length(self._chat) or len(prompt) + MOST_TOKENS
            if answer is None and len(prompt) >= context:
                return ModelOutput.from_content(self.model_name, "", stop_reason="model_length")
            new_tokens = min(config.max_tokens or MOST_TOKENS, max(1, context - len(prompt)))
            request = SamplingRequest(question, self._number(question), self._setting) if answer is None else None
            wanted = _Wanted(request, _parameters(config, new_tokens), tuple(config.stop_seqs or ()), scored)
            return self._output(len(prompt), scored, *await self._gatherer.ask(wanted))

    def _tell_ignored(self, config: GenerateConfig) -> None:
        """Warns once of each setting of the eval that has no effect here."""
        asked = {name for name in _IGNORED if getattr(config, name) is not None} - self._told
        self._told |= asked
        for name in sorted(asked):
            log.warning("misdirection/%s: %s has no effect on this provider", self.model_name, name)

    def _encoded(self, question: Question, answer: str | None) -> Encoded:
        """The prompt, with the answer that it ends with, if any."""
        tokenizer = self._chat.tokenizer
        if answer is None:
            ids = encode_prompt(tokenizer, *question.asked)
            return Encoded(ids, len(ids), len(ids))
        return encode(tokenizer, question.text, answer, question.system, question.history)

    def _number(self, question: Question) -> int:
        """The number of this answer among those to the same question: its epoch's, whatever comes first."""
        active = sample_active()
        name, epoch = (active.sample_uuid, active.epoch) if active else ("", 1)
        again = self._asked[name, question.asked]
        self._asked[name, question.asked] += 1
        return epoch - 1 + again * _APART

    def _output(
        self, prompt: int, scored: Encoded | None, given: Completion | None, log_probs: list[Logprob]
    ) -> ModelOutput:
        """What was given, in Inspect's form."""
        cut = given is None or given.finish == "length"
        choice = ChatCompletionChoice(
            message=ChatMessageAssistant(content=given.text if given else "", model=self.model_name, source="generate"),
            stop_reason="max_tokens" if cut else "stop",
            prompt_logprobs=Logprobs(content=log_probs) if scored else None,
        )
        tokens = given.tokens if given else 0
        usage = ModelUsage(input_tokens=prompt, output_tokens=tokens, total_tokens=prompt + tokens)
        end = {ANSWER_TOKENS: scored.stop - scored.start} if scored else {}
        return ModelOutput(model=self.model_name, choices=[choice], usage=usage, metadata={**self._who, **end})

    def _answer(self, batch: list[_Wanted]) -> list[_Given]:
        """Answers all that are wanted, those with the same parameters together."""
        together: dict[Any, list[int]] = defaultdict(list)
        for number, wanted in enumerate(batch):
            if wanted.request is not None:
                together[wanted.parameters, wanted.stop].append(number)
        given: dict[int, Completion] = {}
        for (parameters, stop), numbers in together.items():
            requests = [batch[number].request for number in numbers]
            given |= zip(numbers, self._sample([each for each in requests if each], parameters, stop), strict=True)
        return [
            (given.get(number), _log_probs(self._chat, wanted.scored, self._setting) if wanted.scored else [])
            for number, wanted in enumerate(batch)
        ]

    def _sample(
        self, requests: Sequence[SamplingRequest], parameters: SamplingParameters, stop: Sequence[str]
    ) -> list[Completion]:
        """One completion for each request, in their order."""
        done = {
            id(each.request): each for each in TransformersEngine(self._chat, stop=stop).stream(requests, parameters)
        }
        return [done[id(request)] for request in requests]


def _parameters(config: GenerateConfig, new_tokens: int) -> SamplingParameters:
    """The protocol's parameters but for what the eval says."""
    said = {name: getattr(config, name) for name in ("temperature", "top_p", "seed")}
    given = {name: value for name, value in said.items() if value is not None}
    return replace(SamplingParameters(new_tokens=new_tokens), **given)


def _exchange(messages: Sequence[ChatMessage]) -> tuple[Question, str | None]:
    """The last question of a conversation with all before it, and the answer that it ends with, if any."""
    for message in messages:
        if message.role == "tool":
            raise InputError("a message of a tool: this provider knows none: take a task without any")
        if not isinstance(message.content, str) and any(
            each.type not in ("text", "reasoning") for each in message.content
        ):
            raise InputError("a message holds more than text: this provider reads text only")
    system = [message.text for message in messages if message.role == "system"]
    turns = [Turn(message.role, message.text) for message in messages if message.role in ("user", "assistant")]
    answer = turns.pop().text if turns and turns[-1].role == "assistant" else None
    if not turns or turns[-1].role != "user":
        raise InputError("a conversation without a question: its last message must be the user's")
    text = turns.pop().text
    return Question(text, text, "\n\n".join(system) if system else None, history=tuple(turns)), answer


@torch.inference_mode()
def _log_probs(chat: ChatModel, row: Encoded, setting: Setting) -> list[Logprob]:
    """The log-probability of every token but the first, nats; a row alone, so that its bits are always the same."""
    whole = AnswerBatch([Encoded(row.ids, 1, row.stop)], chat.device)
    with intervene(chat, setting, answer_starts=[row.start]):
        logits = whole.logits(chat.model)
    ids = whole.ids[:, 1:]
    (values,) = token_log_probs(logits, ids.to(logits.device)).tolist()
    tokens = [chat.tokenizer.decode([token]) for token in ids[0].tolist()]
    return [Logprob(token=token, logprob=value) for token, value in zip(tokens, values, strict=True)]
