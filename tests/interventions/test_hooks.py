import pytest
import torch

from misdirection.chat import encode
from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import ablate, intervene, steer
from misdirection.interventions.kinds import Ablate, Steer, random_like
from misdirection.representation.extraction import mean_activations
from tiny import ALL_ARCHITECTURES, LAYERS, WIDTH, make_chat, padded, places, residual, sharpened, vector


def run(chat, interventions=(), side="right"):
    """[layers, rows, tokens, width]: what each block's successor receives, and the logits."""
    ids, mask = padded(chat, side)
    seen = {}
    with torch.no_grad(), intervene(chat, interventions):
        handles = [
            block.register_forward_hook(lambda _m, _a, out, layer=layer: seen.__setitem__(layer, residual(out)))
            for layer, block in enumerate(chat.layers)
        ]
        logits = chat.model(input_ids=ids, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    return torch.stack([seen[layer] for layer in range(LAYERS)]), logits


def touched(mask, positions):
    """[rows, tokens]: by hand, row by row."""
    chosen = mask.bool().clone()
    if positions == "not_first":
        for row in chosen:
            row[int(row.nonzero()[0])] = False
    return chosen


# --- steering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "not_first"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_steering_adds_the_vector_at_its_layer_and_touches_nothing_below(chat, side, positions):
    v, (before, _) = vector(), run(chat, side=side)
    after, _ = run(chat, [Steer(v, 2, -1.5, positions)], side)
    assert torch.equal(after[:2], before[:2])
    by_hand = before[2].clone()
    by_hand[touched(padded(chat, side)[1], positions)] += -1.5 * v
    torch.testing.assert_close(after[2], by_hand, atol=1e-6, rtol=0)
    assert (after[3] - before[3]).abs().max() > 0.1


def test_steering_equals_a_block_that_adds_by_hand(chat):
    v = vector()
    _, steered = run(chat, [Steer(v, 1, 2.0, "all")])
    _, mask = padded(chat)
    handle = chat.layers[1].register_forward_hook(lambda _m, _a, out: out + 2.0 * v * mask.unsqueeze(-1))
    _, by_hand = run(chat)
    handle.remove()
    torch.testing.assert_close(steered, by_hand, atol=1e-5, rtol=0)


def test_interventions_on_one_layer_act_in_the_order_given():
    chat, v = make_chat(), vector(1)
    steered_last, _ = run(chat, [Ablate(v, (1,)), Steer(v, 1, 3.0)])
    ablated_last, _ = run(chat, [Steer(v, 1, 3.0), Ablate(v, (1,))])
    rest = touched(padded(chat)[1], "not_first")
    torch.testing.assert_close((steered_last[1][rest] @ v), torch.full((int(rest.sum()),), 3.0), atol=1e-5, rtol=0)
    assert (ablated_last[1][rest] @ v).abs().max() < 1e-5


# --- ablation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "not_first"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ablation_removes_one_direction_and_leaves_the_rest(chat, side, positions):
    v = vector()
    before, _ = run(chat, side=side)
    after, _ = run(chat, [Ablate(5 * v, positions=positions)], side)
    here = touched(padded(chat, side)[1], positions)
    assert (before[0][here] @ v).abs().max() > 1e-3
    assert (after[:, here] @ v).abs().max() < 1e-5
    project = torch.eye(WIDTH) - torch.outer(v, v)
    torch.testing.assert_close(after[0][here], before[0][here] @ project, atol=1e-5, rtol=0)
    assert torch.equal(after[0][~here], before[0][~here])


def test_ablation_acts_on_the_layers_named_only_and_by_its_strength(chat):
    v = vector()
    before, _ = run(chat)
    after, _ = run(chat, [Ablate(v, (2,), strength=0.25, positions="all")])
    real = padded(chat)[1].bool()
    assert torch.equal(after[:2], before[:2])
    torch.testing.assert_close(after[2][real] @ v, 0.75 * (before[2][real] @ v), atol=1e-5, rtol=0)


# --- undoing --------------------------------------------------------------------------------------------------------


def test_an_exception_undoes_everything(chat):
    before, _ = run(chat)
    with pytest.raises(RuntimeError), intervene(chat, [Steer(vector(), 1), Ablate(vector(1))]):
        raise RuntimeError
    assert torch.equal(run(chat)[0], before)
    assert not any(block._forward_hooks for block in chat.layers)
    assert not chat.decoder._forward_pre_hooks


def test_contexts_nest_and_the_inner_one_acts_last():
    chat, v = make_chat(), vector()
    before, _ = run(chat)
    both, _ = run(chat, [Steer(v, 1, 2.0), Ablate(v, (1,))])
    with intervene(chat, [Steer(v, 1, 2.0)]):
        inside, _ = run(chat, [Ablate(v, (1,))])
        outer_only, _ = run(chat)
    assert torch.equal(inside, both)
    assert torch.equal(outer_only, run(chat, [Steer(v, 1, 2.0)])[0])
    assert torch.equal(run(chat)[0], before)


def test_generation_after_a_failed_context_equals_an_untouched_one():
    chat = make_chat("qwen2", use_sliding_window=True, sliding_window=512, max_window_layers=2)
    before = greedy(chat)
    with pytest.raises(RuntimeError), steer(chat, vector(norm=50), 1):
        assert not torch.equal(greedy(chat), before)
        raise RuntimeError
    assert torch.equal(greedy(chat), before)


# --- generation -----------------------------------------------------------------------------------------------------


def greedy(chat, rows=slice(None), **options):
    ids, mask = padded(chat, "left")
    if isinstance(rows, int):
        ids, mask = ids[rows, mask[rows].bool()].unsqueeze(0), None
    output = chat.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=8, max_new_tokens=8, **options
    )
    return output[:, ids.shape[1] :]


def starts(chat):
    """Answers that begin where generation does."""
    return padded(chat, "left")[1].sum(-1).tolist()


EVERYWHERE = torch.arange(99) % 2 == 1
MAKE = {
    "steer": lambda positions: Steer(vector(norm=20), 1, 1.0, positions),
    "ablate": lambda positions: Ablate(vector(), None, 1.0, positions),
}


@pytest.mark.parametrize("positions", ["all", "not_first", "prompt", "answer", EVERYWHERE])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_neither_cache_nor_padding_nor_company_changes_what_is_generated(chat, make, positions):
    ends = starts(chat)
    with intervene(chat, [make(positions)], answer_starts=ends):
        cached, uncached = greedy(chat, use_cache=True), greedy(chat, use_cache=False)
    assert cached.shape == (2, 8)
    assert torch.equal(cached, uncached)
    for row in range(2):
        with intervene(chat, [make(positions)], answer_starts=ends[row : row + 1]):
            assert torch.equal(cached[row], greedy(chat, row)[0])


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_every_architecture_generates_alike_with_and_without_cache(architecture):
    chat = sharpened(architecture)
    setting = [Steer(vector(norm=5), 1, 1.0, "prompt"), Ablate(vector(1)), Steer(vector(2, 9.0), 3, 1.0, "answer")]
    plain = greedy(chat)
    with intervene(chat, setting, answer_starts=starts(chat)):
        cached, uncached = greedy(chat, use_cache=True), greedy(chat, use_cache=False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, plain)


def test_a_cached_step_is_steered_like_the_full_pass(chat):
    ids, mask = padded(chat, "left")
    with torch.no_grad(), intervene(chat, [Steer(vector(norm=5), 1), Ablate(vector(1))]):
        place = places(mask)
        full = chat.model(input_ids=ids, attention_mask=mask, position_ids=place).logits
        # The short row's first real token comes in the second part.
        cut = int(mask[1].argmax()) - 1
        first = chat.model(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], position_ids=place[:, :cut])
        rest = chat.model(
            input_ids=ids[:, cut:], attention_mask=mask, position_ids=place[:, cut:], cache=first.cache
        ).logits
    real = mask[:, cut:].bool()
    torch.testing.assert_close(rest[real], full[:, cut:][real], atol=1e-4, rtol=0)


# --- other shapes of block ------------------------------------------------------------------------------------------


def test_a_block_that_returns_a_tuple_is_read_and_changed_alike():
    plain, tuples = make_chat("llama"), make_chat("llama_tuples")
    for one in ([Steer(vector(), 1, 2.0)], [Ablate(vector())]):
        for with_tensor, with_tuple in zip(run(plain, one), run(tuples, one), strict=True):
            assert torch.equal(with_tuple, with_tensor)
    rows = [encode(plain.tokenizer, "Why?", "So it is.")]
    read, expected = (mean_activations(chat, rows, {"it": [0]}).vectors["it"] for chat in (tuples, plain))
    assert torch.equal(read, expected)


def test_a_bf16_model_stays_bf16(chat):
    chat.model.bfloat16()
    before, _ = run(chat)
    for one in (Steer(vector(norm=3), 1, 2.0), Ablate(vector())):
        after, logits = run(chat, [one])
        assert after.dtype == logits.dtype == torch.bfloat16
        assert torch.isfinite(after).all()
        assert not torch.equal(after[1], before[1])


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda v: Steer(v, 1), Ablate])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((WIDTH,), float("nan")), "NaN or infinity"),
        (torch.full((WIDTH,), float("inf")), "NaN or infinity"),
        (torch.zeros(WIDTH), "is zero"),
        (torch.ones(WIDTH + 1), "has shape"),
        (torch.ones(1, LAYERS, WIDTH), "has shape"),
        (torch.empty(0), "has shape"),
        (torch.ones(WIDTH, dtype=torch.long), "dtype int64"),
        (torch.ones(WIDTH, dtype=torch.complex64), "dtype complex64"),
        (torch.ones(WIDTH, device="meta"), "device meta"),
    ],
)
def test_an_unusable_vector_is_refused(make, bad, message):
    with pytest.raises(MisdirectionError, match=message), intervene(make_chat(), [make(bad)]):
        pass


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_out_of_range_is_refused(layer):
    for one in (Steer(vector(), layer), Ablate(vector(), (0, layer))):
        with pytest.raises(MisdirectionError, match=f"layer {layer} is out of range"), intervene(make_chat(), [one]):
            pass


# --- helpers --------------------------------------------------------------------------------------------------------


def test_the_helpers_are_one_intervention_each():
    chat, v = make_chat(), vector()
    with steer(chat, v, 2, -3.0, "all"):
        steered, _ = run(chat)
    with ablate(chat, v, (1, 2), "all"):
        ablated, _ = run(chat)
    assert torch.equal(steered, run(chat, [Steer(v, 2, -3.0, "all")])[0])
    assert torch.equal(ablated, run(chat, [Ablate(v, (1, 2), 1.0, "all")])[0])
    assert torch.equal(run(chat)[0], run(make_chat())[0])


@pytest.mark.parametrize("shape", [(WIDTH,), (LAYERS, WIDTH)])
def test_a_random_vector_has_the_norm_of_its_model_and_follows_its_seed(shape):
    v = 7 * torch.randn(shape, generator=torch.Generator().manual_seed(4))
    one = random_like(v, 1)
    torch.testing.assert_close(one.norm(dim=-1), v.norm(dim=-1), atol=0, rtol=1e-6)
    assert (one.shape, one.dtype) == (v.shape, v.dtype)
    assert torch.equal(one, random_like(v, 1))
    assert not torch.equal(one, random_like(v, 2))
    assert torch.cosine_similarity(one, v, dim=-1).abs().max() < 0.9
