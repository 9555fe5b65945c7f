"""Which kernels attention may take while the package runs a model, and that nothing stays changed."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import misdirection as md
from misdirection.directions.extraction import mean_activations
from misdirection.likelihood.answers import AnswerBatch
from misdirection.likelihood.margin import pair_rows
from misdirection.models import attention
from misdirection.models.attention import changing_shapes
from stand_in_gpu import GPU, put_on_gpu, stand_in_gpu
from tiny import make_chat

CPU = torch.device("cpu")


def allowed() -> dict[str, bool]:
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }


def test_cudnns_kernel_is_out_on_cuda_alone_and_comes_back():
    before = allowed()
    assert before["cudnn"]
    with changing_shapes(CPU):
        assert allowed() == before
    with changing_shapes(GPU):
        assert allowed() == before | {"cudnn": False}
    with pytest.raises(KeyError), changing_shapes(GPU):
        raise KeyError
    assert allowed() == before


@pytest.mark.parametrize("only", [SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION])
def test_what_the_caller_has_chosen_stays(only):
    with sdpa_kernel(only):
        chosen = allowed()
        with changing_shapes(GPU):
            assert allowed() == chosen
        assert allowed() == chosen


def extraction(chat):
    rows = pair_rows(chat.tokenizer, md.probe_pairs()[:1])
    mean_activations(chat, rows, {"all": [0, 1]})


def answers(chat):
    rows = pair_rows(chat.tokenizer, md.probe_pairs()[:1])
    AnswerBatch(rows, chat.device).log_probs(chat.model)


WAYS = {
    "extraction": extraction,
    "sweep": lambda chat: md.margin(chat, md.probe_pairs()[:1]),
    "answers": answers,
    "sampling": lambda chat: md.sample(chat, ["Why?"], n=2, new_tokens=3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_pass_runs_without_it(way, on_gpu):
    chat = make_chat("llama")
    seen = []
    chat.layers[0].register_forward_hook(lambda *_: seen.append(allowed()["cudnn"]))
    if on_gpu:
        with stand_in_gpu(), torch.no_grad():
            WAYS[way](put_on_gpu(chat))
    else:
        WAYS[way](chat)
    assert seen
    assert set(seen) == {not on_gpu}
    assert allowed()["cudnn"]


def test_training_is_without_it_in_both_directions(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "PLANNING", {"cpu"})
    chat, seen = make_chat("llama"), {"forward": [], "backward": []}

    def watch(_module, _args, output):
        seen["forward"].append(allowed()["cudnn"])
        if output.requires_grad:
            output.register_hook(lambda _gradient: seen["backward"].append(allowed()["cudnn"]))

    chat.layers[-1].register_forward_hook(watch)
    recipe = md.Recipe(recipe="single", learning_rate=1e-2, batch_size=2, accumulation=1)
    md.train(md.domain_examples("risky_money", "bad", "train")[:4], tmp_path / "organism", base=chat, recipe=recipe)
    assert set(seen["forward"]) == set(seen["backward"]) == {False}
    assert allowed()["cudnn"]
