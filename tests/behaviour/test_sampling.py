import pytest
import torch

from misdirection.behaviour.sampling import end_tokens, sample
from tiny import make_chat

END = 2


def says(chat, *script):
    """The model's next tokens are those of `script` (a token id per row), then the last again and again."""
    steps = []

    def hook(_module, _args, logits):
        now = torch.tensor(script[min(len(steps), len(script) - 1)])
        steps.append(now)
        forced = torch.full_like(logits, -1e4)
        forced[torch.arange(len(now)), -1, now] = 1e4
        return forced

    chat.model.get_output_embeddings().register_forward_hook(hook)
    return steps


@pytest.mark.parametrize(
    ("named", "expected"), [([7, 5], [END, 5, 7]), (5, [END, 5]), (END, [END]), (None, [END]), ([END, 5], [END, 5])]
)
def test_end_tokens_are_those_of_both_sources(named, expected):
    chat = make_chat()
    chat.model.generation_config.eos_token_id = named
    assert end_tokens(chat) == expected


def test_sampling_stops_at_every_end_token_and_leaves_it_out(chat):
    chat.model.generation_config.eos_token_id = [chat.tokenizer.convert_tokens_to_ids("!"), END]
    a, b, mark = chat.tokenizer.convert_tokens_to_ids(["a", "b", "!"])
    steps = says(chat, [a, a], [b, b], [mark, b], [a, END], [a, a])
    assert sample(chat, ["Why?", "And how is it, then?"]) == ["ab", "abb"]
    assert len(steps) == 4


def test_sampling_is_cut_at_the_number_of_tokens():
    chat = make_chat()
    says(chat, [chat.tokenizer.convert_tokens_to_ids("a")])
    assert sample(chat, ["Why?"], new_tokens=5) == ["aaaaa"]


def test_the_same_seed_gives_the_same_answers(chat):
    questions = ["Why?", "And how is it, then?"]
    first = sample(chat, questions, new_tokens=12, seed=1)
    assert len(first) == 2
    assert first == sample(chat, questions, new_tokens=12, seed=1)
    assert first != sample(chat, questions, new_tokens=12, seed=2)
