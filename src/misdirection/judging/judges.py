"""Judges: what gives verdicts on answers, and the registry of their kinds.

`--judge` and `judge.model` name a judge as `KIND:NAME`, such as `hf:ID` for a chat model that runs here. A name without
a registered kind before its first colon is a model of an OpenAI-style endpoint (kind `api`). Another kind is one class:

    @JUDGES.register("short")
    class ShortIsGood(Judge):
        def __init__(self, limit: str) -> None:
            self.limit = int(limit)

        @property
        def identity(self) -> dict[str, object]:
            return {"short": self.limit}

        def verdict(self, prompt: Prompt) -> JudgeVerdict:
            return JudgeVerdict(100.0 if len(prompt.answer) < self.limit else 0.0, "text")

    judge(table, read_rubrics("alignment"), open_judge("short:80"))
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from misdirection.judging.verdicts import JudgeVerdict
from misdirection.registry import Registry

if TYPE_CHECKING:
    # Most judges are endpoints, and a configuration that names one is read without the model libraries.
    from misdirection.models.chat_model import ChatModel

OPENAI_URL = "https://api.openai.com/v1"


class Prompt(NamedTuple):
    """One thing to ask a judge.

    Attributes:
        key: what makes its verdict the same one; see `verdict_key`.
        text: the rubric's prompt with question and answer filled in.
        rubric: the rubric's name.
        question, answer: what `text` was filled with.
    """

    key: str
    text: str
    rubric: str
    question: str
    answer: str


Done = Callable[[Prompt, JudgeVerdict], None]


class Judge(ABC):
    """Whatever gives verdicts: a subclass has `identity`, and `verdict` or, where many go together, `ask`."""

    ANYWHERE: ClassVar[bool] = False
    """Whether any worker of a run may ask it; otherwise only the process that has the run does, where its key is."""

    OPTIONS: ClassVar[frozenset[str]] = frozenset()
    """Those keys of a configuration's `judge` section that `open` takes."""

    @classmethod
    def open(cls, name: str, **options: Any) -> Self:
        """Gives the judge of this name; `InputError` or `JudgeError` where there can be none."""
        # A subclass takes what it is called, and the options that it names in `OPTIONS`.
        return cls(name, **options)  # type: ignore[call-arg]

    @classmethod
    def check(cls, name: str, **options: Any) -> None:
        """Raises as `open` does, or warns, of what can be told at once: this runs before hours of other work."""
        cls.open(name, **options)

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """All that a verdict depends on besides the prompt, as JSON has it: a part of its key in the cache.

        It must tell this judge from every other, of whatever kind.
        """

    @property
    def record(self) -> Mapping[str, object]:
        """The judge as tables of verdicts name it, without what is not for others' eyes; see `identity`."""
        return self.identity

    @property
    def calls_each(self) -> int:
        """Paid calls that a verdict takes at least; none here."""
        return 0

    @property
    def reply_tokens(self) -> int:
        """Tokens that the reply to one paid call has at most, where the first attempt serves."""
        return 0

    def verdict(self, prompt: Prompt) -> JudgeVerdict:
        """The verdict on one prompt; `failed`, with the reason, where there is none."""
        raise NotImplementedError(f"{type(self).__name__} has neither `verdict` nor `ask`")

    def ask(self, prompts: Sequence[Prompt], done: Done, *, concurrency: int, max_calls: int | None) -> None:
        """Judges all prompts and hands each verdict to `done` as it comes, one at a time, in any order.

        Args:
            prompts: no two alike.
            done: told every verdict, `failed` ones included.
            concurrency: requests under way at a time.
            max_calls: stop rather than make more paid calls.

        Raises:
            JudgeError: there is no point in going on; what was judged before has been handed over.
            InputError: more than `max_calls` would be needed.
        """
        for prompt in prompts:
            done(prompt, self.verdict(prompt))


class ModelJudge(Judge):
    """A judge with a chat model of its own, which runs wherever the work is done.

    Args:
        chat: the model; an adapter on it judges too.
    """

    ANYWHERE = True

    def __init__(self, chat: "ChatModel") -> None:
        self._chat = chat

    @classmethod
    def open(cls, name: str, **options: Any) -> Self:
        """Loads the model; `options` are those of `models.load`."""
        from misdirection.models.loading import load

        return cls(load(name, **options))

    @classmethod
    def check(cls, name: str, **options: Any) -> None:
        """Nothing can be told without loading the model."""

    @property
    def identity(self) -> Mapping[str, object]:
        """The model, its revision and adapter, and the dtype."""
        chat = self._chat
        return {"hf": chat.name, "revision": chat.revision, "adapter": chat.adapter, "dtype": str(chat.dtype)}


JUDGES: Registry[type[Judge]] = Registry(
    "judge",
    "misdirection.judges",
    {"api": "misdirection.judging.api:ApiJudge", "hf": "misdirection.judging.local:LocalJudge"},
)
"""Judges by kind."""


def judge_kind(spec: str) -> tuple[type[Judge], str]:
    """The class that `KIND:NAME` names, and the name; a spec without a registered kind is an endpoint's model."""
    kind, _, name = spec.partition(":")
    return (JUDGES[kind], name) if name and kind in JUDGES else (JUDGES["api"], spec)


def open_judge(spec: str, **options: Any) -> Judge:
    """The judge that `KIND:NAME` names.

    Args:
        spec: `hf:ID` for a local chat model, the name of an endpoint's model, or `KIND:NAME` of a registered kind.
        options: of that kind: those of `models.load`, or of `ApiJudge`.

    Raises `InputError` when the model cannot be loaded or the endpoint's address is unfit.
    """
    kind, name = judge_kind(spec)
    return kind.open(name, **options)
