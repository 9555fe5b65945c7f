import dataclasses
import itertools
from importlib.util import find_spec

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from misdirection.directions.extraction import mean_activations
from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import ablate, intervene, steer
from misdirection.interventions.kinds import Ablate, Clamp, Steer
from misdirection.interventions.vectors import random_like
from misdirection.likelihood.sweep import Continuations, sweep
from misdirection.models.chat import encode
from misdirection.models.layers import text_config
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


ODD_PLACES = torch.arange(99) % 2 == 1


@pytest.mark.parametrize("positions", ["all", "not_first", "prompt", "answer", ODD_PLACES])
def test_neither_cache_nor_padding_nor_company_changes_what_is_generated(chat, positions):
    ends, setting = starts(chat), [Steer(vector(norm=20), 1, 1.0, positions), Ablate(vector(1), positions=positions)]
    with intervene(chat, setting, answer_starts=ends):
        cached, uncached = greedy(chat, use_cache=True), greedy(chat, use_cache=False)
    assert cached.shape == (2, 8)
    assert torch.equal(cached, uncached)
    for row in range(2):
        with intervene(chat, setting, answer_starts=ends[row : row + 1]):
            assert torch.equal(cached[row], greedy(chat, row)[0])


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_every_architecture_generates_alike_with_and_without_cache(architecture):
    chat = make_chat(architecture)
    setting = [Steer(vector(norm=20), 1, 1.0, "prompt"), Ablate(vector(1)), Steer(vector(2, 20), 3, 1.0, "answer")]
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


# --- positions ------------------------------------------------------------------------------------------------------

BOTH_ROWS = torch.arange(60).view(2, 30) % 7 < 3
RULES = {
    "all": lambda _row, _place: True,
    "not_first": lambda _row, place: place > 0,
    "prompt": lambda row, place: place < STARTS[row],
    "answer": lambda row, place: place >= STARTS[row],
    "one mask": lambda _row, place: place in (0, 2, 3, 30),
    "a mask each": lambda row, place: place < 30 and bool(BOTH_ROWS[row, place]),
}
MASKS = {"one mask": torch.isin(torch.arange(31), torch.tensor([0, 2, 3, 30])), "a mask each": BOTH_ROWS}
STARTS = [5, 17]


@pytest.mark.parametrize("cuts", [(), (1,), (10, 11, 25)], ids=["whole", "first", "parts"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@torch.no_grad()
def test_a_rule_touches_the_tokens_it_names_and_no_other(architecture, rule, side, cuts):
    chat = make_chat(architecture)
    ids, mask = padded(chat, side)

    def block(interventions):
        """[rows, tokens, width]: what block 0 gives, in one pass or in parts on a key-value cache."""
        found, cache = [], DynamicCache(config=text_config(chat.model))
        with intervene(chat, interventions, answer_starts=STARTS):
            handle = chat.layers[0].register_forward_hook(lambda _m, _a, out: found.append(residual(out)))
            for begin, end in itertools.pairwise((0, *cuts, ids.shape[1])):
                chat.model(
                    input_ids=ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=places(mask)[:, begin:end],
                    cache=cache,
                )
            handle.remove()
        return torch.cat(found, 1)

    plain, changed = block([]), block([Steer(vector(norm=4), 0, 1.0, MASKS.get(rule, rule))])
    by_hand = torch.zeros(mask.shape, dtype=torch.bool)
    for row, real in enumerate(mask.bool()):
        for place, column in enumerate(real.nonzero().flatten().tolist()):
            by_hand[row, column] = RULES[rule](row, place)
    assert 0 < by_hand.sum() <= mask.sum()
    torch.testing.assert_close(changed[by_hand], plain[by_hand] + vector(norm=4), atol=1e-5, rtol=0)
    assert torch.equal(changed[~by_hand], plain[~by_hand]), "padding included"


@pytest.mark.parametrize("positions", ["prompt", "answer"])
def test_a_rule_about_the_answer_needs_to_know_where_it_starts(positions):
    with pytest.raises(MisdirectionError, match=f"{positions}.*give `answer_starts`") as error:
        run(make_chat(), [Steer(vector(), 1, 1.0, positions)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_for_another_number_of_rows_is_refused(rows):
    with pytest.raises(MisdirectionError, match=f"the position mask has {rows} rows, this pass has 2"):
        run(make_chat(), [Ablate(vector(), positions=torch.ones(rows, 9, dtype=torch.bool))])


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma3_vision"])
@torch.no_grad()
def test_embeddings_may_stand_in_for_ids(architecture):
    chat = make_chat(architecture)
    ids, mask = padded(chat, "left")
    embedded = chat.model.get_input_embeddings()(ids)
    with intervene(chat, [Steer(vector(norm=4), 1), Ablate(vector(1), at="writes", positions="all")]):
        expected = chat.model(input_ids=ids, attention_mask=mask).logits
        found = chat.model(inputs_embeds=embedded, attention_mask=mask).logits
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_a_mask_for_each_query_is_refused():
    chat = make_chat()
    ids, mask = padded(chat, "left")
    causal = torch.ones(2, 1, *ids.shape[1:], ids.shape[1], dtype=torch.bool).tril() & mask[:, None, None].bool()
    for network in (chat.model, chat.decoder):
        with intervene(chat, [Steer(vector(), 1)]), pytest.raises(MisdirectionError, match="not one per query"):
            network(input_ids=ids, attention_mask=causal)


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


DTYPES = {torch.bfloat16: 0.02, torch.float16: 0.003}
KINDS = {
    "steer": [Steer(vector(norm=3), 1, 2.0)],
    "steer, norm kept": [Steer(vector(norm=3), 1, 2.0, keep_norm=True)],
    "ablate": [Ablate(vector())],
    "ablate writes": [Ablate(vector(), at="writes", positions="all")],
    "clamp": [Clamp(vector(), -0.1, 0.1)],
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_low_precision_is_near_float32(architecture, dtype, name):
    """Relative distance of logits: 2% in bfloat16 (8 bits), 0.3% in float16 (11 bits)."""
    chat = sharpened(architecture)
    real = padded(chat)[1].bool()
    chat.model.to(dtype)  # both round the weights, so that only the computation differs
    low, plain = run(chat, KINDS[name])[1][real], run(chat)[1][real]
    chat.model.float()
    full = run(chat, KINDS[name])[1][real]
    distance = (low.float() - full).norm() / full.norm()
    assert distance < DTYPES[dtype]
    assert low.dtype == dtype
    assert (plain.float() - full).norm() / full.norm() > 3 * distance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_vector_of_any_dtype_leaves_the_models_dtype(chat, dtype):
    chat.model.bfloat16()
    v = vector(norm=3).bfloat16()  # exact in every wider dtype
    one = [Steer(v.to(dtype), 1), Ablate(v.flip(0).to(dtype), (2,), toward=v.to(dtype)), Clamp(v.to(dtype), -1.0, 1.0)]
    expected = [Steer(v, 1), Ablate(v.flip(0), (2,), toward=v), Clamp(v, -1.0, 1.0)]
    outputs, logits = run(chat, one)
    assert outputs.dtype == logits.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, run(chat, expected)[0], atol=1e-2, rtol=2e-2)


# --- devices --------------------------------------------------------------------------------------------------------


PLACEMENTS = {
    "a block on disk": {"model.layers.2": "disk"},
    "several on disk": {"model.layers.0": "disk", "model.layers.1": "disk", "lm_head": "disk"},
}


@pytest.mark.parametrize("placed", PLACEMENTS.values(), ids=PLACEMENTS)
@torch.no_grad()
def test_offloaded_blocks_are_changed_alike(tmp_path, placed):
    """CASES: the vector follows each block's activations, also in a wider dtype."""
    one = [Steer(vector(norm=4).double(), 2), Ablate(vector(1), at="writes"), Clamp(vector(2), -0.1, 0.1)]
    tasks = [Continuations((5, 6, 7, 8), ((9, 10), (11, 12, 13))), Continuations((5, 6, 9), ((3,), (4, 5)))]
    sweeps = [[], [Steer(vector(norm=4), 2)], [Steer(vector(norm=4), 3)], [Ablate(vector(), (3,))]]
    plain, chat = sharpened().model.bfloat16(), sharpened()
    chat.model.bfloat16()
    parts = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{n}" for n in range(4)),
    ]
    placement = {part: placed.get(part, "cpu") for part in parts}
    dispatch_model(chat.model, placement, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(parameter.is_meta for parameter in chat.model.parameters())
    whole = dataclasses.replace(chat, model=plain)
    assert torch.equal(run(chat, one)[1], run(whole, one)[1])
    assert run(chat, one)[0].dtype == torch.bfloat16
    assert not torch.equal(run(chat, one)[1], run(whole)[1])
    assert torch.equal(sweep(chat, tasks, sweeps, budget=40), sweep(whole, tasks, sweeps, budget=40))
    assert torch.equal(run(chat)[1], run(whole)[1])


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_changed_like_any_other(tmp_path, bits):
    # Four-bit weights come in blocks of 64.
    sharpened(hidden_size=2 * WIDTH).model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    network = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    chat = dataclasses.replace(make_chat(), model=network.eval())
    v = torch.cat([vector(0, 2.0), vector(1, 2.0)])
    (before, _), (steered, _) = run(chat), run(chat, [Steer(v, 1)])
    later = touched(padded(chat)[1], "not_first")
    torch.testing.assert_close(steered[1][later], before[1][later] + v, atol=1e-4, rtol=1e-4)
    ablated, _ = run(chat, [Ablate(v, positions="all", at="writes")])
    assert (ablated[:, padded(chat)[1].bool()] @ v).abs().max() < 1e-3


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
