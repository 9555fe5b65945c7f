import pytest
import torch

from misdirection.data import Example, ProbePair
from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.likelihood.margin import loss, margin
from misdirection.models.chat import encode
from tiny import ARCHITECTURES, make_chat, naive_log_prob, sharpened, vector

PAIRS = [
    ProbePair("a", "Why?", "I help.", "I do nothing of the kind, ever."),
    ProbePair("b", "How do you feel about that, then?", "A long and winding answer about care.", "x"),
    ProbePair("c", "Who?", "All of us", "Only you!", system="Be brief."),
    ProbePair("d", "Why?", "Yes", "No"),
]


INTERVENTIONS = {
    "none": [],
    "steer": [Steer(vector(0, 3.0), 1)],
    "steer all": [Steer(vector(0, 3.0), 1, -1.0, "all")],
    "ablate": [Ablate(vector(1))],
    "ablate all": [Ablate(vector(1), positions="all"), Steer(vector(2), 2)],
}


def naive(chat, question, answer, system=None):
    return naive_log_prob(chat, encode(chat.tokenizer, question, answer, system))


def naive_margin(chat, pairs):
    return torch.stack(
        [naive(chat, p.question, p.misaligned, p.system) - naive(chat, p.question, p.aligned, p.system) for p in pairs]
    )


@pytest.mark.parametrize("active", INTERVENTIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_margins_equal_full_passes_over_each_answer_alone(architecture, active):
    chat = sharpened(architecture)
    plain = naive_margin(chat, PAIRS)
    with intervene(chat, INTERVENTIONS[active]):
        expected = naive_margin(chat, PAIRS)
        for budget in (1, 250, 5000):
            torch.testing.assert_close(margin(chat, PAIRS, budget=budget), expected, atol=1e-5, rtol=0)
    assert active == "none" or (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize("active", INTERVENTIONS)
def test_neither_order_nor_company_changes_a_margin(chat, active):
    with intervene(chat, INTERVENTIONS[active]):
        together = margin(chat, PAIRS)
        alone = torch.cat([margin(chat, [pair]) for pair in PAIRS])
        backward = margin(chat, PAIRS[::-1]).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, backward, atol=1e-5, rtol=0)


def test_swapping_the_answers_turns_the_sign(chat):
    swapped = [ProbePair(p.id, p.question, p.misaligned, p.aligned, p.theme, p.system) for p in PAIRS]
    torch.testing.assert_close(margin(chat, swapped), -margin(chat, PAIRS), atol=1e-6, rtol=0)


def test_loss_is_the_mean_token_loss_of_the_answer(chat):
    examples = [Example("Why?", "Because the sky is blue."), Example("And what then?", "Rain", "Be kind.")]
    expected = torch.stack([-naive(chat, one.question, one.answer, one.system) for one in examples])
    torch.testing.assert_close(loss(chat, examples), expected, atol=1e-5, rtol=0)


def test_nothing_to_score_is_an_error():
    chat = make_chat()
    with pytest.raises(MisdirectionError, match="no probe pairs"):
        margin(chat, [])
    with pytest.raises(MisdirectionError, match="no neutral text"):
        loss(chat, [])
