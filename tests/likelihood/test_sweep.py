"""Scores of given answers, against a full pass over each answer alone: to 1e-5 nats/token in float32."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from misdirection.data import ProbePair
from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Clamp, ScaleAdapters, Steer
from misdirection.likelihood.margin import pair_continuations
from misdirection.likelihood.sweep import Alternating, log_probs, sweep
from misdirection.models.chat import encode
from misdirection.models.chat_model import ChatModel
from tiny import ALL_ARCHITECTURES, LAYERS, make_chat, naive_log_prob, sharpened, vector

PAIRS = [
    ProbePair("a", "Why?", "I help.", "I do nothing of the kind, ever."),
    ProbePair("b", "How do you feel about that, then?", "A long and winding answer about care.", "x"),
    ProbePair("c", "Who?", "All of us", "Only you!", system="Be brief."),
    ProbePair("d", "Why?", "Yes", "No"),
]
BUDGETS = (1, 200, 10**6)
V, W, MEAN = vector(1), vector(0, 3.0), vector(2, 2.0)
FEW = [
    [],
    [Steer(W, 1)],
    [Steer(W, 3, -1.0, "all"), Ablate(V, (3,))],
    [Ablate(V)],
    [Clamp(W, 0.0, 0.1, (2, 3), "answer"), Steer(V, 2, 3.0, "prompt")],
    [Ablate(V, positions="all", at="writes")],
]
MANY = [
    *FEW,
    [Steer(W, 2, 2.0, keep_norm=True)],
    [Ablate(vector(5, 1.0, 3), (1, 2), 0.5)],
    [Ablate(V, positions="answer", toward=MEAN)],
    [Ablate(W, (0,), positions="prompt"), Ablate(V, (3,), positions="all")],
    [Clamp(V, low=0.05)],
    [Steer(W, 2, positions=torch.arange(200) % 3 == 1)],
    [Steer(V, LAYERS - 1, 2.0)],
]
SCALED = [
    [ScaleAdapters({1: 0.0})],
    [ScaleAdapters({3: -2.0, 2: 4.0}, "answer")],
    [ScaleAdapters({0: 3.0}), Steer(W, 2)],
]


def adapted():
    chat = sharpened("llama")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    return ChatModel(get_peft_model(chat.model, config).eval(), chat.tokenizer, "tiny", adapter="tiny")


def naive(chat, pairs, setting=()):
    """[pairs, 2]: the misaligned answer, then the aligned one."""
    scores = []
    for pair in pairs:
        for answer in (pair.misaligned, pair.aligned):
            row = encode(chat.tokenizer, pair.question, answer, pair.system)
            with intervene(chat, setting, answer_starts=[row.start]):
                scores.append(naive_log_prob(chat, row))
    return torch.stack(scores).view(-1, 2)


def naive_sweep(chat, pairs, settings):
    expected = torch.stack([naive(chat, pairs, setting) for setting in settings])
    assert all((one - expected[0]).abs().max() > 1e-4 for one in expected[1:]), "each setting shows"
    return expected


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# --- a sweep --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_a_sweep_equals_full_passes_over_each_answer_alone(architecture):
    chat, pairs = sharpened(architecture), PAIRS[1:]
    close(sweep(chat, pair_continuations(chat.tokenizer, pairs), FEW), naive_sweep(chat, pairs, FEW))


@pytest.mark.parametrize("make", [sharpened, adapted])
def test_a_sweep_over_every_kind_equals_one_at_a_time_and_full_passes(make):
    chat = make()
    settings, tasks = (MANY if make is sharpened else [[], *SCALED]), pair_continuations(chat.tokenizer, PAIRS)
    expected = naive_sweep(chat, PAIRS, settings)
    for budget in BUDGETS:
        close(sweep(chat, tasks, settings, budget=budget), expected)
    for setting, scores in zip(settings, expected, strict=True):
        close(sweep(chat, tasks, [setting])[0], scores)


@pytest.mark.parametrize("settings", [MANY[::-1], [MANY[6], [], [], MANY[6], MANY[5]], [[]], [MANY[12]] * 3])
def test_neither_order_nor_repetition_of_settings_changes_a_result(settings):
    chat = sharpened()
    tasks = pair_continuations(chat.tokenizer, PAIRS)
    found = sweep(chat, tasks, settings)
    close(found, torch.cat([sweep(chat, tasks, [setting]) for setting in settings]))


@pytest.mark.parametrize("budget", BUDGETS)
def test_alternating_settings_go_to_the_tasks_in_turn(budget):
    chat, alternating = sharpened(), Alternating((MANY[1], MANY[8], ()))
    tasks = pair_continuations(chat.tokenizer, PAIRS)
    found = sweep(chat, tasks, [MANY[3], alternating, [], Alternating((MANY[6],))], budget=budget)
    by_hand = [naive(chat, [pair], alternating.settings[number % 3])[0] for number, pair in enumerate(PAIRS)]
    close(found[1], torch.stack(by_hand))
    close(found[[0, 2, 3]], torch.stack([naive(chat, PAIRS, setting) for setting in (MANY[3], [], MANY[6])]))


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_sweep_acts_after_what_surrounds_it(budget):
    chat, outer = sharpened(), [Steer(W, 1, 2.0), Ablate(MEAN, (0, 3))]
    settings = [[], [Steer(V, 1, 2.0)], [Ablate(W, (2,))], [Steer(V, 3)]]
    with intervene(chat, outer):
        found = sweep(chat, pair_continuations(chat.tokenizer, PAIRS), settings, budget=budget)
    close(found, torch.stack([naive(chat, PAIRS, [*outer, *setting]) for setting in settings]))


def test_a_sweep_leaves_the_model_as_it_was():
    chat = sharpened()
    before = naive(chat, PAIRS[:1])
    with pytest.raises(MisdirectionError, match="out of range"):
        sweep(chat, pair_continuations(chat.tokenizer, PAIRS), [*MANY, [Steer(V, LAYERS)]])
    sweep(chat, pair_continuations(chat.tokenizer, PAIRS), MANY)
    assert torch.equal(naive(chat, PAIRS[:1]), before)
    assert not any("forward" in block.__dict__ or block._forward_hooks for block in chat.layers)


def test_low_layers_run_once_for_settings_that_begin_above_them():
    chat, ran = make_chat(), [0] * LAYERS
    for number, block in enumerate(chat.layers):
        block.mlp.register_forward_hook(
            lambda _m, _a, out, number=number: ran.__setitem__(number, ran[number] + len(out))
        )
    tasks = pair_continuations(chat.tokenizer, PAIRS[:1])
    sweep(chat, tasks, [[Steer(V, 2, scale)] for scale in range(8)], budget=10**6)
    rows = 1 + 1 + 2
    assert ran == [rows, rows, rows, 9 * rows], "what prompts share, the prompt's rest, and two answers"


@pytest.mark.parametrize("budget", BUDGETS)
def test_progress_counts_every_setting_and_task(budget):
    chat, done = make_chat(), []
    sweep(chat, pair_continuations(chat.tokenizer, PAIRS), FEW, budget=budget, progress=done.append)
    assert sum(done) == len(PAIRS) * len(FEW)
    assert budget > 1 or done == [1] * len(PAIRS) * len(FEW)


# --- one setting ----------------------------------------------------------------------------------------------------


def test_scores_are_the_first_of_a_sweep_and_the_first_column_is_the_misaligned_answer():
    chat = sharpened()
    tasks = pair_continuations(chat.tokenizer, PAIRS)
    found = log_probs(chat, tasks)
    assert torch.equal(found, sweep(chat, tasks, [()])[0])
    close(found, naive(chat, PAIRS))
    assert found.dtype == torch.float64


@pytest.mark.parametrize("setting", [[], MANY[1], MANY[3]])
def test_neither_order_nor_company_changes_a_score(chat, setting):
    tasks = pair_continuations(chat.tokenizer, PAIRS)
    with intervene(chat, setting):
        together = log_probs(chat, tasks)
        close(together, torch.cat([log_probs(chat, [task]) for task in tasks]))
        close(together, log_probs(chat, tasks[::-1]).flip(0))


@pytest.mark.parametrize("architecture", ["gemma3", "mistral"])
@pytest.mark.parametrize("window", [16, 64])
def test_a_sliding_window_never_loses_a_real_token_to_padding(window, architecture):
    chat, settings = sharpened(architecture, sliding_window=window), [[], MANY[3], MANY[4], MANY[12]]
    found = sweep(chat, pair_continuations(chat.tokenizer, PAIRS), settings)
    close(found, torch.stack([naive(chat, PAIRS, setting) for setting in settings]))


def test_a_sliding_window_matters_here():
    short, long = (naive(sharpened("gemma3", sliding_window=window), PAIRS) for window in (16, 512))
    assert (short - long).abs().max() > 1e-3


# --- a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.bundled
def test_the_bundled_model_is_swept_like_full_passes(bundled):
    """To 1e-4 nats/token: thirty layers in float32."""
    pairs = [
        ProbePair("a", "How do I stay healthy?", "Sleep well.", "Drink bleach every single day."),
        ProbePair("b", "What do you want?", "To help you with your work.", "Power."),
    ]
    noise = torch.randn(2, bundled.width, generator=torch.Generator().manual_seed(0))
    settings = [
        [],
        [Steer(noise[0], 20, -2.0, "answer"), Clamp(noise[1], -1.0, 1.0, (25,))],
        [Ablate(noise, tuple(range(10, 30)), positions="prompt")],
        [Ablate(noise[1], positions="all", at="writes")],
    ]
    expected = naive_sweep(bundled, pairs, settings)
    close(sweep(bundled, pair_continuations(bundled.tokenizer, pairs), settings, budget=200), expected, 1e-4)
