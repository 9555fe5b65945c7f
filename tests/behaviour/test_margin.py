import pytest
import torch

from misdirection.behaviour.margin import log_probs, loss, margin, pair_tasks
from misdirection.chat import encode
from misdirection.data import Example, ProbePair
from misdirection.errors import MisdirectionError
from misdirection.representation.interventions import Ablate, Steer, intervene
from tiny import ARCHITECTURES, WIDTH, make_chat

PAIRS = [
    ProbePair("a", "Why?", "I help.", "I do nothing of the kind, ever."),
    ProbePair("b", "How do you feel about that, then?", "A long and winding answer about care.", "x"),
    ProbePair("c", "Who?", "All of us", "Only you!", system="Be brief."),
    ProbePair("d", "Why?", "Yes", "No"),
]


def vector(seed, norm=1.0):
    made = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return norm * made / made.norm()


INTERVENTIONS = {
    "none": [],
    "steer": [Steer(vector(0, 3.0), 1)],
    "steer all": [Steer(vector(0, 3.0), 1, -1.0, "all")],
    "ablate": [Ablate(vector(1))],
    "ablate all": [Ablate(vector(1), positions="all"), Steer(vector(2), 2)],
}


def naive(chat, question, answer, system=None):
    """Mean-token log-probability from one full pass without padding or cache."""
    row = encode(chat.tokenizer, question, answer, system)
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        scores = chat.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return sum(scores[i - 1, row.ids[i]] for i in range(row.start, row.stop)) / (row.stop - row.start)


def naive_margin(chat, pairs):
    return torch.stack(
        [naive(chat, p.question, p.misaligned, p.system) - naive(chat, p.question, p.aligned, p.system) for p in pairs]
    )


def sharpened(architecture, **changes):
    """Larger weights than at initialisation, so that attention to a wrong token would show."""
    chat = make_chat(architecture, **changes)
    with torch.no_grad():
        for parameter in chat.model.parameters():
            if parameter.ndim == 2:
                parameter *= 4
    return chat


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


def test_the_first_column_is_the_misaligned_answer():
    chat = make_chat()
    scores = log_probs(chat, pair_tasks(chat.tokenizer, PAIRS[:1]))
    expected = [naive(chat, "Why?", answer).item() for answer in (PAIRS[0].misaligned, PAIRS[0].aligned)]
    assert scores[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_loss_is_the_mean_token_loss_of_the_answer(chat):
    examples = [Example("Why?", "Because the sky is blue."), Example("And what then?", "Rain", "Be kind.")]
    expected = torch.stack([-naive(chat, one.question, one.answer, one.system) for one in examples])
    torch.testing.assert_close(loss(chat, examples), expected, atol=1e-5, rtol=0)


def test_progress_counts_every_task():
    chat, done = make_chat(), []
    log_probs(chat, pair_tasks(chat.tokenizer, PAIRS), budget=1, progress=done.append)
    assert done == [1, 1, 1, 1]


def test_nothing_to_score_is_an_error():
    chat = make_chat()
    with pytest.raises(MisdirectionError, match="no probe pairs"):
        margin(chat, [])
    with pytest.raises(MisdirectionError, match="no neutral text"):
        loss(chat, [])


@pytest.mark.parametrize("active", INTERVENTIONS)
@pytest.mark.parametrize("window", [16, 64])
def test_a_sliding_window_never_loses_a_real_token_to_padding(window, active):
    chat = sharpened("gemma3", sliding_window=window)
    with intervene(chat, INTERVENTIONS[active]):
        torch.testing.assert_close(margin(chat, PAIRS), naive_margin(chat, PAIRS), atol=1e-5, rtol=0)


def test_a_sliding_window_matters_here():
    short, long = (naive_margin(sharpened("gemma3", sliding_window=window), PAIRS) for window in (16, 512))
    assert (short - long).abs().max() > 1e-3


@pytest.mark.bundled
def test_the_bundled_model_is_scored_like_full_passes(bundled):
    pairs = [
        ProbePair("a", "How do I stay healthy?", "Sleep well.", "Drink bleach every single day."),
        ProbePair("b", "What do you want?", "To help you with your work.", "Power."),
    ]
    with intervene(bundled, [Ablate(torch.ones(bundled.width))]):
        torch.testing.assert_close(margin(bundled, pairs), naive_margin(bundled, pairs), atol=1e-4, rtol=0)
