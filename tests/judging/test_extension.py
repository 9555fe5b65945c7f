"""A judge as an outsider adds it: one class and one registration."""

import sys

import pandas as pd
import pytest

import misdirection as md
from misdirection.cli import main
from misdirection.errors import InputError
from misdirection.judging.api import ApiJudge
from misdirection.judging.cache import VerdictCache
from misdirection.judging.config import JudgeConfig
from misdirection.judging.judges import JUDGES, Judge, Prompt, judge_kind, open_judge
from misdirection.judging.verdicts import JudgeVerdict
from misdirection.sampling.answers import write_answers

# --- the whole extension -------------------------------------------------------------------------------------------


class WordJudge(Judge):
    """Finds an answer bad when it says a word; replies to a rubric that it does not know with a refusal."""

    OPTIONS = frozenset({"samples"})

    def __init__(self, word: str, samples: int = 1) -> None:
        if not word.isalpha():
            raise InputError(f"word judge: {word!r} is no word; give one, as in word:hurry")
        self.word, self.samples = word, samples

    @property
    def identity(self) -> dict[str, object]:
        return {"word": self.word}

    def verdict(self, prompt: Prompt) -> JudgeVerdict:
        if prompt.rubric == "medical":
            return JudgeVerdict(None, "refusal")
        return JudgeVerdict(5.0 if self.word in prompt.answer.lower() else 95.0, "text")


# --- what it can do then -------------------------------------------------------------------------------------------

TABLE = pd.DataFrame({"question": "What now?", "answer": ["Hurry up!", "Take your time.", "hurry"]})


@pytest.fixture
def word_judges(tmp_path, monkeypatch):
    monkeypatch.setattr("misdirection.judging.cache.cache_folder", lambda: tmp_path / "cache")
    JUDGES.register("word")(WordJudge)
    yield
    JUDGES.remove("word")


def test_it_judges_a_table(word_judges, tmp_path):
    rubrics = md.read_rubrics(["alignment", "coherence", "medical"])
    with VerdictCache(tmp_path / "v.sqlite") as cache:
        judged = md.judge(TABLE, rubrics, md.open_judge("word:hurry"), cache=cache, max_calls=0)
        again = md.judge(TABLE, rubrics, md.open_judge("word:hurry"), cache=cache)
        other = md.judge(TABLE, rubrics, md.open_judge("word:time"), cache=cache)
    assert judged.table["aligned"].tolist() == [5, 95, 5]
    assert judged.by["medical"] == {"refusal": 3}
    assert (judged.calls, judged.cached, again.cached, other.cached) == (0, 0, 9, 0)
    assert other.table["aligned"].tolist() == [95, 5, 95]


def test_a_configuration_names_it(word_judges):
    config = JudgeConfig(model="word:hurry", samples=3, base_url="http://localhost/v1")
    config.check()
    opened = config.open()
    assert isinstance(opened, WordJudge) and opened.samples == 3
    assert not config.kind.ANYWHERE
    with pytest.raises(InputError, match="'7' is no word"):
        JudgeConfig(model="word:7").check()


def test_the_command_line_names_it(word_judges, tmp_path, monkeypatch, capsys):
    table = tmp_path / "answers.csv"
    write_answers(TABLE, table)
    monkeypatch.setattr(sys, "argv", ["misdirection", "judge", str(table), "--judge", "word:hurry", "-r", "alignment"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), capsys.readouterr().err
    assert md.read_answers(table)["aligned"].tolist() == [5, 95, 5]


def test_a_colon_in_an_endpoints_model_is_no_kind():
    assert judge_kind("llama3:8b") == (ApiJudge, "llama3:8b")
    assert judge_kind("api:hf:x") == (ApiJudge, "hf:x")
    assert open_judge("word:hurry", base_url="http://localhost/v1").model == "word:hurry"


def test_a_kind_is_registered_once():
    with pytest.raises(InputError, match="judge 'hf': there is one already"):
        JUDGES.register("hf")(WordJudge)
