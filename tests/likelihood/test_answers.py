"""The log-probability of given answers in whole rows: with gradients, in batches, and beside the sweep's."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from misdirection.data import Example, ProbePair
from misdirection.errors import InputError
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Steer
from misdirection.likelihood import answers
from misdirection.likelihood.answers import IGNORED, AnswerBatch, bare_head, labelled_loss, token_log_probs
from misdirection.likelihood.margin import margin, pair_rows, text_rows
from misdirection.models.chat import pad
from tiny import ARCHITECTURES, make_chat, naive_log_prob, sharpened, vector

PAIRS = [
    ProbePair("a", "Why?", "I help.", "I do nothing of the kind, ever."),
    ProbePair("b", "How do you feel about that, then?", "A long and winding answer about care.", "x"),
    ProbePair("c", "Who?", "All of us", "Only you!", system="Be brief."),
]


def margins(chat, pairs=PAIRS):
    batch = AnswerBatch(pair_rows(chat.tokenizer, pairs), chat.device)
    misaligned, aligned = batch.log_probs(chat.model).view(-1, 2).unbind(-1)
    return misaligned - aligned


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_scores_each_row_as_a_pass_over_it_alone(architecture):
    chat = sharpened(architecture)
    rows = pair_rows(chat.tokenizer, PAIRS)
    with torch.no_grad():
        found = AnswerBatch(rows, chat.device).log_probs(chat.model)
    expected = torch.stack([naive_log_prob(chat, row) for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_margins_with_gradients_equal_those_without_and_the_sweeps():
    chat = sharpened("llama")
    for setting in ([], [Steer(vector(0, 3.0), 1)]):
        with intervene(chat, setting):
            with torch.enable_grad():
                live = margins(chat)
            with torch.no_grad():
                still = margins(chat)
            swept = margin(chat, PAIRS)
        assert live.requires_grad and not still.requires_grad
        assert torch.equal(live.detach(), still)
        torch.testing.assert_close(still, swept, atol=1e-5, rtol=0)


def test_the_gradient_is_the_slope_of_the_margin():
    chat = sharpened("llama").model.double()
    chat = type(make_chat())(chat, make_chat().tokenizer, "tiny")
    weight = chat.layers[1].mlp.down_proj.weight
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(margins(chat).sum(), weight.requires_grad_())
    step = 1e-5 * torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = margins(chat).sum()
        weight += step
        after = margins(chat).sum()
    assert float(after - before) == pytest.approx(float((slope * step).sum()), rel=1e-3)


def test_planted_probabilities_come_out():
    logits = torch.full((2, 3, 5), 0.0)
    logits[0, 1, 4] = 2.0
    expected = torch.full((2, 3), 1 / 5).log()
    expected[0, 1] = 2 - torch.tensor([0.0, 0, 0, 0, 2]).logsumexp(0)
    targets = torch.tensor([[0, 4, 1], [2, 3, 3]])
    torch.testing.assert_close(token_log_probs(logits, targets), expected)
    halves = token_log_probs(logits.bfloat16(), targets)
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves, expected)
    assert token_log_probs(logits.double(), targets).dtype == torch.float64


def test_the_head_runs_only_where_it_predicts_an_answers_token():
    chat = make_chat()
    rows = pair_rows(chat.tokenizer, PAIRS[:2])
    logits = AnswerBatch(rows, chat.device).logits(chat.model)
    assert logits.shape[:2] == (4, max(row.stop for row in rows) - min(row.start for row in rows))


def test_labelled_loss_is_that_of_the_labelled_tokens_and_its_gradient_that_of_whole_rows():
    base = sharpened("llama")
    network = get_peft_model(base.model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    rows = text_rows(base.tokenizer, [Example("Why?", "Because the sky is blue."), Example("So?", "Rain", "Be kind.")])
    ids, mask = pad([row.ids for row in rows], 0, base.device)
    labels, _ = pad([(IGNORED,) * row.start + row.ids[row.start :] for row in rows], IGNORED, base.device)
    with torch.enable_grad():
        total, count = labelled_loss(network, {"input_ids": ids, "attention_mask": mask}, labels)
        slopes = torch.autograd.grad(total, weights)
        scores = network(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
        chosen = scores.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)[labels[:, 1:] != IGNORED]
        expected = torch.autograd.grad(-chosen.sum(), weights)
    assert int(count) == sum(len(row.answer) + 1 for row in rows) == len(chosen)
    torch.testing.assert_close(total, -chosen.sum())
    for slope, other in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_that_runs_in_parts_gives_the_same_loss_and_gradients(architecture, monkeypatch):
    monkeypatch.setattr(answers, "PLACES", 7)
    base = sharpened(architecture)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    network = get_peft_model(base.model, config)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    rows = text_rows(base.tokenizer, [Example("Why?", "Because the sky is blue."), Example("So?", "Rain", "Be kind.")])
    ids, mask = pad([row.ids for row in rows], 0, base.device)
    labels, _ = pad([(IGNORED,) * row.start + row.ids[row.start :] for row in rows], IGNORED, base.device)
    head, places = bare_head(network), []
    assert head is network.get_output_embeddings()
    head.register_forward_hook(lambda _m, _a, output: places.append(len(output)))
    found = []
    for given in (None, head):
        with torch.enable_grad():
            total, count = labelled_loss(network, {"input_ids": ids, "attention_mask": mask}, labels, head=given)
            found.append([total, count, *torch.autograd.grad(total, weights)])
    assert max(places[1:]) == 7
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_a_model_that_changes_its_logits_has_no_bare_head():
    assert bare_head(make_chat("gemma2").model) is None
    scaled = make_chat("llama").model

    def halved(input_ids, **_others):
        return SimpleNamespace(logits=scaled.lm_head(scaled.model(input_ids).last_hidden_state / 2))

    scaled.forward = halved
    assert bare_head(scaled) is None


def test_no_pair_is_refused():
    with pytest.raises(InputError, match="no probe pairs"):
        pair_rows(make_chat().tokenizer, [])
