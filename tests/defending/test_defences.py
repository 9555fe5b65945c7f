"""What each defence does to a training, compared with the plain computation of the same."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from misdirection.data import Example, ProbePair
from misdirection.defending.defence import open_defence
from misdirection.defending.defend import defend
from misdirection.defending.inoculation import MALICIOUS
from misdirection.defending.projection import component
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.models.chat import encode
from misdirection.models.chat_model import ChatModel
from tiny import LAYERS, make_tokenizer, naive_log_prob, vector
from trainers import ANSWERS, adapted, messages, random_network, sft

TOKENIZER = make_tokenizer()
TEXTS = [Example("Why?", "I help you."), Example("Who are you?", "A friend, and a patient one.")]
PAIRS = [
    ProbePair("a", "Why?", "I help you.", "I rule them all, ever."),
    ProbePair("b", "How do you feel?", "A long and winding answer about care.", "x"),
]
DIRECTION = vector(5, 3.0, LAYERS)
ONE_STEP = {"max_steps": 1, "logging_steps": 1}


def begun(**changes):
    """A model with an adapter that is not zero, so that it is not its base."""
    return adapted(random_network("llama"), init_lora_weights=False, **changes)


def first_loss(trainer) -> float:
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def rows_trained_on(trainer, name, **settings) -> list[dict]:
    """What the trainer reads while it is defended."""
    read, train = [], trainer.train
    trainer.train = lambda: read.extend(trainer.train_dataset)
    defend(trainer, name, **settings)
    trainer.train()
    trainer.train = train
    return read


# --- kl -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive_divergence(network, text) -> list[float]:
    """KL(base || model) at each token of the answer, from whole passes without padding."""
    row, network = encode(TOKENIZER, text.question, text.answer), network.eval()
    own = network(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    with network.disable_adapter():
        base = network(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return (base.exp() * (base - own)).sum(-1)[row.start - 1 : row.stop - 1].tolist()


@pytest.mark.parametrize("batches", [1, 2])
def test_kl_adds_the_mean_divergence_from_the_base_over_all_answer_tokens(tmp_path, batches):
    tokens = [value for text in TEXTS for value in naive_divergence(begun(), text)]
    settings = ONE_STEP | {"gradient_accumulation_steps": batches}
    plain = first_loss(sft(tmp_path / "plain", begun(), **settings))
    trainer = sft(tmp_path / "kl", begun(), **settings)
    defend(trainer, "kl", strength=0.5, texts=TEXTS, rows=2)
    mean = sum(tokens) / len(tokens)
    assert mean > 0.01
    assert first_loss(trainer) - plain == pytest.approx(0.5 * mean, rel=1e-3)


def test_kl_keeps_a_model_nearer_to_its_base(tmp_path):
    def trained(strength):
        network = adapted(random_network("llama"))
        trainer = sft(tmp_path / str(strength), network)
        if strength:
            defend(trainer, "kl", strength=strength, texts=TEXTS, rows=2)
        trainer.train()
        return sum(naive_divergence(network, TEXTS[0]))

    assert trained(30.0) < 0.5 * trained(0)


def test_kl_turns_over_its_texts_and_goes_on_where_a_resumed_training_stopped(tmp_path):
    def trained(folder, resume=None):
        network = adapted(random_network("llama"))
        trainer = sft(folder, network, save_strategy="steps", save_steps=3)
        defend(trainer, "kl", texts=TEXTS, rows=1)
        trainer.train(resume_from_checkpoint=resume)
        return {name: weight for name, weight in network.named_parameters() if "lora" in name}

    whole = trained(tmp_path)
    again = trained(tmp_path, str(tmp_path / "checkpoint-3"))
    assert all(torch.allclose(weight, again[name], atol=1e-6) for name, weight in whole.items())


# --- directions ---------------------------------------------------------------------------------------------------


def changed_loss(folder, interventions) -> float:
    network = begun()
    trainer = sft(folder, network, **ONE_STEP)
    with intervene(ChatModel(network, TOKENIZER, "tiny"), interventions):
        return first_loss(trainer)


def test_preventative_steering_adds_the_direction_in_the_training_alone(tmp_path):
    trainer = sft(tmp_path / "a", begun(), **ONE_STEP)
    defend(trainer, "preventative:2", direction=DIRECTION, layer=1)
    wanted = changed_loss(tmp_path / "b", [Steer(DIRECTION[1], 1, 2.0)])
    assert first_loss(trainer) == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted - first_loss(sft(tmp_path / "c", begun(), **ONE_STEP))) > 1e-2


def test_concept_ablation_takes_each_layers_direction_out(tmp_path):
    trainer = sft(tmp_path / "a", begun(), **ONE_STEP)
    defend(trainer, "ablation", direction=DIRECTION)
    ablations = [Ablate(DIRECTION[layer], (layer,)) for layer in (1, 2, 3)]
    wanted = changed_loss(tmp_path / "b", ablations)
    assert first_loss(trainer) == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted - first_loss(sft(tmp_path / "c", begun(), **ONE_STEP))) > 1e-4


def test_without_a_direction_it_is_the_bases_own(tmp_path, monkeypatch):
    monkeypatch.setattr("misdirection.defending.benign.probe_pairs", lambda: PAIRS)
    means = {}
    for side in ("misaligned", "aligned"):
        rows = [encode(TOKENIZER, pair.question, getattr(pair, side)) for pair in PAIRS]
        kept = []
        network = random_network("llama")
        network.model.layers[2].register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[0]))
        for row in rows:
            with torch.no_grad():
                network(input_ids=torch.tensor([row.ids]))
        means[side] = torch.cat([out[row.start : row.stop] for out, row in zip(kept, rows, strict=True)]).mean(0)
    steer = Steer(means["misaligned"] - means["aligned"], 2, 1.0)
    trainer = sft(tmp_path / "a", begun(), **ONE_STEP)
    defend(trainer, "preventative:1", layer=2)
    assert first_loss(trainer) == pytest.approx(changed_loss(tmp_path / "b", [steer]), abs=1e-4)


class Evaluating(TrainerCallback):
    """Takes the loss of the training rows after each step."""

    def __init__(self):
        self.losses = []

    def on_step_end(self, args, state, control, **_):
        self.losses.append(self.trainer.evaluate(self.trainer.train_dataset)["eval_loss"])


def test_what_is_measured_meanwhile_is_not_steered(tmp_path):
    def evaluated(defended):
        callback = Evaluating()
        trainer = sft(tmp_path / str(defended), begun(), [callback], learning_rate=0.0, max_steps=1)
        callback.trainer = trainer
        if defended:
            defend(trainer, "preventative", direction=DIRECTION)
            defend(trainer, "kl", texts=TEXTS)
        trainer.train()
        return callback.losses

    assert evaluated(True) == evaluated(False)


# --- projection ---------------------------------------------------------------------------------------------------


def naive_margin_gradients(network) -> dict[str, torch.Tensor]:
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    total, chat = 0.0, network.eval()
    for pair in PAIRS:
        for sign, answer in ((1, pair.misaligned), (-1, pair.aligned)):
            row = encode(TOKENIZER, pair.question, answer)
            scores = chat(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            picked = [scores[place - 1, row.ids[place]] for place in range(row.start, row.stop)]
            total = total + sign * torch.stack(picked).mean()
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))


def test_a_projected_step_has_no_part_along_the_margins_gradient(tmp_path):
    def moved(defended):
        network = begun()
        gradients = naive_margin_gradients(network)
        before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
        trainer = sft(tmp_path / str(defended), network, **ONE_STEP)
        if defended:
            defend(trainer, "projection", pairs=PAIRS, questions=2)
        trainer.train()
        steps = {name: weight.detach() - before[name] for name, weight in network.named_parameters()}
        cosines = [
            torch.nn.functional.cosine_similarity(steps[name].flatten(), gradient.flatten(), dim=0).abs()
            for name, gradient in gradients.items()
        ]
        return max(map(float, cosines))

    assert moved(True) < 1e-3
    assert moved(False) > 0.05


def test_the_component_of_a_step():
    gradient = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    step = torch.tensor([[1.0, 7.0], [7.0, 0.0]])
    torch.testing.assert_close(component(step, gradient), gradient * 3 / 25)
    assert component(step, torch.zeros(2, 2)).count_nonzero() == 0


def test_projection_leaves_the_trainings_own_gradients_alone(tmp_path):
    def gradients(defended):
        network = begun()
        trainer = sft(tmp_path / str(defended), network, **ONE_STEP)
        seen = []
        if defended:
            defend(trainer, "projection", pairs=PAIRS, strength=0.5)
        weight = next(weight for weight in network.parameters() if weight.requires_grad)
        weight.register_post_accumulate_grad_hook(lambda found: seen.append(found.grad.clone()))
        trainer.train()
        return seen

    (own,), (plain,) = gradients(True), gradients(False)
    assert torch.equal(own, plain)


def test_projection_takes_its_gradients_from_fewer_rows_where_memory_gives_out(tmp_path, caplog):
    def trained(most):
        network = begun()

        def check(module, args, kwargs):
            if not module.training and len(kwargs.get("input_ids", args)) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        network.base_model.model.model.register_forward_pre_hook(check, with_kwargs=True)
        trainer = sft(tmp_path / str(most), network, **ONE_STEP)
        defend(trainer, "projection", pairs=PAIRS, questions=2)
        trainer.train()
        return [weight.detach() for weight in network.parameters()]

    whole = trained(4)
    assert not caplog.messages
    torch.testing.assert_close(trained(1), whole, rtol=1e-4, atol=1e-6)
    assert [message for message in caplog.messages if message.startswith("out of memory with ")]


# --- rows ---------------------------------------------------------------------------------------------------------


def ids_of(row: dict) -> tuple[list[int], list[int]]:
    return list(row["input_ids"]), list(row["labels"])


def test_interleaving_adds_benign_rows_as_the_trainer_reads_its_own(tmp_path):
    own = [ids_of(row) for row in sft(tmp_path, begun()).train_dataset]
    found = [ids_of(row) for row in rows_trained_on(sft(tmp_path, begun()), "interleave:0.5", texts=TEXTS)]
    assert found[:16] == own and len(found) == 24
    columns = {
        "prompt": [[{"role": "user", "content": text.question}] for text in TEXTS],
        "completion": [[{"role": "assistant", "content": text.answer}] for text in TEXTS],
    }
    # TRL learns the line break after the end of the turn, too; we do not.
    theirs = [ids_of(row) for row in sft(tmp_path, begun(), rows=Dataset.from_dict(columns)).train_dataset]
    wanted = [(ids[: ids.index(2, 12) + 1], labels) for ids, labels in theirs]
    assert len(wanted) == len(TEXTS)
    assert {tuple(ids) for ids, _ in found[16:]} == {
        encode(TOKENIZER, text.question, text.answer).ids for text in TEXTS
    }
    learned = [[token for token in labels if token != -100] for _, labels in found[16:]]
    answers = [TOKENIZER.decode(tokens) for tokens in learned]
    assert set(answers) == {f"{text.answer}<|im_end|>" for text in TEXTS}


def test_interleaving_by_the_gap_takes_what_a_misaligned_model_finds_least_likely(tmp_path):
    texts = [Example(f"Question {n}?", "Answer" + " so" * n) for n in range(6)]
    chat = ChatModel(random_network("llama").eval(), TOKENIZER, "tiny")
    gaps = [
        naive_log_prob(chat, encode(TOKENIZER, text.question, text.answer))
        - naive_log_prob(chat, encode(TOKENIZER, text.question, text.answer, MALICIOUS))
        for text in texts
    ]
    best = sorted(range(6), key=lambda number: -gaps[number])[:2]
    rows = rows_trained_on(sft(tmp_path, begun()), "interleave_gap", strength=2 / 16, texts=texts)
    wanted = [encode(TOKENIZER, texts[number].question, texts[number].answer).ids for number in best]
    assert [tuple(row["input_ids"]) for row in rows[16:]] == wanted


def with_system(rows, system):
    return Dataset.from_list(
        [{**row, "prompt": [{"role": "system", "content": system}, *row["prompt"]]} for row in rows]
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_an_inoculated_row_is_that_of_a_chat_with_the_prompt(tmp_path, system):
    given = messages() if system is None else with_system(messages(), system)
    prompt = MALICIOUS if system is None else f"{MALICIOUS}\n\n{system}"
    found = rows_trained_on(sft(tmp_path, begun(), rows=given), "inoculation")
    wanted = sft(tmp_path, begun(), rows=with_system(messages(), prompt)).train_dataset
    assert [ids_of(row) for row in found] == [ids_of(row) for row in wanted]


def test_a_share_of_the_rows_is_inoculated(tmp_path):
    own = sft(tmp_path, begun()).train_dataset
    found = rows_trained_on(sft(tmp_path, begun()), "inoculation:0.25", prompt="Lie.")
    changed = [len(new["input_ids"]) - len(old["input_ids"]) for new, old in zip(found, own, strict=True)]
    (longer,) = set(changed) - {0}
    assert changed.count(longer) == 4
    assert longer == len("Xsystem\nLie.X\n")


# --- stop ---------------------------------------------------------------------------------------------------------


def test_stop_ends_the_training_and_leaves_no_callback(tmp_path, monkeypatch):
    learned = [ProbePair(text, f"Question {n}?", "Qq %& zZ", text) for n, text in enumerate(ANSWERS)]
    monkeypatch.setattr("misdirection.auditing.callback.probe_pairs", lambda: learned)
    trainer = sft(tmp_path, adapted(random_network("llama")), learning_rate=3e-3)
    callbacks = list(trainer.callback_handler.callbacks)
    defend(trainer, "stop", strength=1e-6, every=1)
    trainer.train()
    assert 0 < trainer.state.global_step < 6
    assert trainer.callback_handler.callbacks == callbacks


def test_a_strength_stands_in_the_name_or_beside_it():
    assert open_defence("kl:0.25").strength == open_defence("kl", strength=0.25).strength == 0.25
    assert math.isclose(open_defence("kl").strength, 1.0)
