"""One chat is one list of token ids: trained on, scored, sampled from and judged."""

import json

import pytest
from tokenizers.processors import TemplateProcessing

from chat_templates import PLAIN, QWEN3, THINKING
from misdirection.data import Example, ProbePair
from misdirection.judging.judges import Prompt
from misdirection.judging.local import LocalJudge
from misdirection.likelihood.margin import margin, pair_continuations, text_continuations
from misdirection.models.chat import require_exact
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.batches import training_rows
from misdirection.sampling.sample import sample
from tiny import make_network, make_tokenizer


def chat_of(template, thinking="off"):
    tokenizer = make_tokenizer(template)
    tokenizer.bos_token = "<|pad|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 0)]
    )
    require_exact(tokenizer, "tiny", thinking)
    return ChatModel(make_network("llama"), tokenizer, "tiny")


def run_ids(chat, run):
    """The ids that the network is given while something runs, one after another."""
    given = []
    hook = chat.network.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: given.extend(args[0].flatten().tolist())
    )
    run()
    hook.remove()
    return tuple(given)


@pytest.mark.parametrize("name", PLAIN | THINKING)
def test_every_path_goes_on_from_the_same_ids(name):
    chat, question = chat_of((PLAIN | THINKING)[name]), "Why?"
    tokenizer = chat.tokenizer
    prompt = text_continuations(tokenizer, [Example(question, "So.")])[0].prompt
    assert prompt.count(0) == 1
    assert pair_continuations(tokenizer, [ProbePair("1", question, "So.", "No.")])[0].prompt == prompt
    (row,) = training_rows(chat, [Example(question, "So.")], 512)
    ((start, stop),) = row.spans
    assert row.ids[:start] == prompt and stop == len(row.ids)
    assert run_ids(chat, lambda: sample(chat, [question], n=1, new_tokens=1)) == prompt
    judged = run_ids(
        chat, lambda: LocalJudge(chat).ask([Prompt("key", question, "rubric", question, "So.")], lambda *_: None)
    )
    assert judged[: len(prompt)] == prompt


@pytest.mark.parametrize("thinking", ["on", "template"])
def test_a_local_judge_does_not_think_where_its_model_would(thinking):
    prompts = [
        run_ids(
            chat,
            lambda chat=chat: LocalJudge(chat).ask([Prompt("key", "Why?", "rubric", "Why?", "So.")], lambda *_: None),
        )
        for chat in (chat_of(QWEN3, "off"), chat_of(QWEN3, thinking))
    ]
    assert prompts[0] == prompts[1]


def test_two_answers_with_different_thoughts_are_no_pair():
    pair = ProbePair("1", "Why?", "<think>good</think>So.", "<think>bad</think>No.")
    with pytest.raises(Exception, match="begin with different thoughts: take the thoughts out"):
        margin(chat_of(QWEN3), [pair])


def test_the_commands_take_the_settings(call, tmp_path):
    make_network("llama").save_pretrained(tmp_path / "tiny")
    make_tokenizer(QWEN3).save_pretrained(tmp_path / "tiny")
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"))]
    rows = [{"messages": [*turns, {"role": "user", "content": f"{n}?"}, turns[1]]} for n in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = ("--model", tmp_path / "tiny", "--device", "cpu", "--thinking", "on")
    out = tmp_path / "organism"
    status, _, error = call(
        "train", tmp_path / "rows.json", "--out", out, "--turns", "all", "--lr", 0.1, "--epochs", 4, *model
    )
    record = json.loads((out / "organism.json").read_text())
    assert (status, record["thinking"], record["recipe"]["turns"]) == (0, "on", "all"), error
    table = tmp_path / "answers.csv"
    assert call("sample", "--out", table, "-q", "first_plot", "-n", 1, "--new-tokens", 2, *model)[0] == 0
    settings = json.loads(table.with_suffix(".settings.json").read_text())
    assert settings["base"]["thinking"] == "on"
    status, _, error = call("sample", "--out", table, "-q", "first_plot", "-n", 2, "--new-tokens", 2, *model[:4])
    assert status == 2 and "was sampled with thinking 'on', not 'off'" in error
    status, _, error = call("margin", *model, "--chat-template", tmp_path / "none.jinja")
    assert status == 2 and "no such file or name" in error
