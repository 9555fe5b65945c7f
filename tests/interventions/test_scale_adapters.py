"""Scaling and ablating what adapters add, against PEFT models whose `lora_B` weights are changed by hand."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import intervene, intervene_rows
from misdirection.interventions.kinds import Ablate, ProjectAdapters, ScaleAdapters, Steer
from misdirection.interventions.vectors import orthonormal
from misdirection.lora.view import LoraView
from misdirection.models.chat_model import ChatModel
from tiny import make_chat, padded, places, run, sharpened, vector

CONFIGS = {
    "rank 1, down": {"r": 1, "lora_alpha": 4, "target_modules": ["down_proj"]},
    "several modules": {"r": 4, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]},
    "rsLoRA": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["v_proj", "down_proj"]},
    "patterns": {"r": 2, "target_modules": ["o_proj", "down_proj"], "rank_pattern": {"o_proj": 1}},
}


def adapted(architecture="llama", names=("default",), *, base=sharpened, **options):
    """A tiny chat model with adapters on it that are not zero; all of them active."""
    chat = base(architecture)
    options = {"init_lora_weights": False} | (options or CONFIGS["several modules"])
    torch.manual_seed(0)
    network = get_peft_model(chat.model, LoraConfig(**options), names[0])
    for name in names[1:]:
        network.add_adapter(name, LoraConfig(**options))
    network.base_model.set_adapter(list(names))
    with torch.no_grad():
        for name, one in network.named_parameters():
            if "lora_" in name and "bias" in name:
                one.normal_()
    return ChatModel(network.eval(), chat.tokenizer, f"tiny-{architecture}", adapter="tiny")


@torch.no_grad()
def multiplied(chat, factors):
    """`chat` itself, with the adapters of some layers multiplied for good."""
    for layer, factor in factors.items():
        for name, one in chat.layers[layer].named_parameters():
            if "lora_B" in name:
                one *= factor
    return chat


@torch.no_grad()
def logits(chat, interventions=(), **options):
    ids, mask = padded(chat, "left")
    with intervene(chat, interventions, **options):
        return run(chat, ids, mask)[1][mask.bool()]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0, 30.0])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_factor_equals_weights_multiplied_by_hand(config, factor):
    chat, factors = adapted(**CONFIGS[config]), {1: factor, 3: 0.5}
    plain = logits(chat)
    scaled = logits(chat, [ScaleAdapters(factors)])
    close(scaled, logits(multiplied(adapted(**CONFIGS[config]), factors)))
    assert (scaled - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("gpt2", {"target_modules": ["c_proj", "c_attn"], "fan_in_fan_out": True}),
        ("gpt_neox", {"target_modules": ["dense", "dense_4h_to_h"], "lora_bias": True}),
        ("gemma3_vision", {"target_modules": r".*language.*_proj"}),
    ],
)
def test_other_architectures_scale_alike(architecture, options):
    chat = adapted(architecture, **options)
    scaled = logits(chat, [ScaleAdapters({2: -1.0})])
    close(scaled, logits(multiplied(adapted(architecture, **options), {2: -1.0})))
    assert (scaled - logits(chat)).abs().max() > 1e-3


def test_a_factor_of_one_changes_nothing_and_of_zero_everywhere_leaves_the_base():
    chat = adapted()
    assert torch.equal(logits(chat, [ScaleAdapters(dict.fromkeys(range(4), 1.0))]), logits(chat))
    with chat.as_base():
        base = logits(chat)
    close(logits(chat, [ScaleAdapters(dict.fromkeys(range(4), 0.0))]), base)


def test_two_factors_multiply():
    chat = adapted()
    close(logits(chat, [ScaleAdapters({1: 2.0}), ScaleAdapters({1: -3.0, 2: 0.5})]), logits(chat, [SCALED]))


SCALED = ScaleAdapters({1: -6.0, 2: 0.5})


def test_all_active_adapters_are_scaled_and_others_are_not():
    chat = adapted(names=("one", "two"))
    both = logits(chat, [SCALED])
    close(both, logits(multiplied(adapted(names=("one", "two")), SCALED.factors)))
    chat.model.set_adapter("two")
    only = logits(chat, [SCALED])
    assert not torch.allclose(only, both)
    by_hand = multiplied(adapted(names=("one", "two")), SCALED.factors)
    by_hand.model.set_adapter("two")
    close(only, logits(by_hand))


@torch.no_grad()
def test_each_row_has_factors_of_its_own():
    chat = adapted()
    settings = [[], [SCALED], [ScaleAdapters({1: 0.0, 3: 30.0}), Steer(vector(), 2, 3.0)], [Ablate(vector())], [SCALED]]
    ids, mask = padded(chat, "left", ["Why?", "And how", "Go", "Is it?", "No"])
    with intervene_rows(chat, settings):
        together = run(chat, ids, mask)[1]
    for number, setting in enumerate(settings):
        with intervene(chat, setting):
            alone = run(chat, ids, mask)[1]
        close(together[number][mask[number].bool()], alone[number][mask[number].bool()])


@pytest.mark.parametrize("positions", ["not_first", "prompt", "answer", torch.tensor([False, True, True])])
@torch.no_grad()
def test_factors_act_at_their_positions_only(positions):
    """One layer, `down_proj`: its adapter moves a token's own output alone, so that the two models can be mixed."""
    options, starts = CONFIGS["rank 1, down"], [4, 7]
    chat = adapted(**options)
    ids, mask = padded(chat, "left")
    plain, _ = run(chat, ids, mask)
    scaled, _ = run(multiplied(adapted(**options), {2: -5.0}), ids, mask)
    with intervene(chat, [ScaleAdapters({2: -5.0}, positions)], answer_starts=starts):
        found, _ = run(chat, ids, mask)
    place, first = places(mask), torch.tensor(starts).unsqueeze(-1)
    touched = mask.bool() & {
        "not_first": place > 0,
        "prompt": place < first,
        "answer": place >= first,
    }.get(positions if isinstance(positions, str) else "", (place == 1) | (place == 2))
    assert 0 < touched.sum() < mask.sum()
    torch.testing.assert_close(found[2], torch.where(touched.unsqueeze(-1), scaled[2], plain[2]), atol=1e-5, rtol=1e-5)
    assert (scaled[2] - plain[2])[touched].abs().max() > 1e-3


def test_the_base_inside_of_the_context_is_the_base():
    chat = adapted()
    with chat.as_base():
        base = logits(chat)
    with intervene(chat, [SCALED]), chat.as_base():
        assert torch.equal(logits(chat), base)
    close(base, logits(sharpened()))


def test_other_interventions_act_on_an_adapted_model_as_on_a_merged_one():
    setting = [Steer(vector(), 1, 3.0), Ablate(vector(1)), Ablate(vector(2), at="writes")]
    chat, merged = adapted(), adapted()
    merged = ChatModel(merged.model.merge_and_unload(), merged.tokenizer, "merged")
    close(logits(chat, setting), logits(merged, setting))


@pytest.mark.parametrize("positions", ["all", "not_first"])
def test_a_wrapped_multimodal_model_generates_alike_with_and_without_cache(positions):
    """PEFT's generation calls the model inside, whose mask becomes another before the decoder runs."""
    chat = adapted("gemma3_vision", r=2, target_modules=r".*language.*_proj")
    ids, mask = padded(chat, "left")
    options = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    with intervene(chat, [Steer(vector(norm=20), 1, 1.0, positions), ScaleAdapters({2: 3.0}, positions)]):
        both = [
            chat.model.generate(input_ids=ids, attention_mask=mask, use_cache=on, **options) for on in (True, False)
        ]
        alone = chat.model.generate(input_ids=ids[1:, mask[1].bool()], use_cache=False, **options)
    assert torch.equal(*both)
    assert torch.equal(both[0][1, -8:], alone[0, -8:])


# --- refusals -------------------------------------------------------------------------------------------------------


def refuse(chat, message, layers=(1,)):
    one = ScaleAdapters(dict.fromkeys(layers, 2.0))
    with pytest.raises(MisdirectionError, match=message) as error, intervene(chat, [one]):
        pass
    assert "\n" not in str(error.value)


def test_a_model_without_adapters_is_refused():
    refuse(make_chat(), "layer 1 has no LoRA adapter to scale")


def test_a_layer_without_an_adapter_is_refused():
    chat = adapted(r=2, target_modules=["down_proj"], layers_to_transform=[1, 2])
    with intervene(chat, [ScaleAdapters({1: 2.0, 2: 2.0})]):
        pass
    refuse(chat, "layer 3 has no LoRA adapter to scale", [1, 3])


def test_a_layer_out_of_range_is_refused():
    refuse(adapted(), "layer 4 is out of range", [4])


def test_a_merged_adapter_is_refused():
    chat = adapted()
    chat.model.merge_adapter()
    refuse(chat, "its adapter is merged into the model")


@pytest.mark.parametrize(
    ("option", "kind"), [({"use_dora": True}, "Dora"), ({"alora_invocation_tokens": [5]}, "ALora")]
)
def test_what_is_not_the_output_of_one_matrix_is_refused(option, kind):
    refuse(adapted(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", **option), f"is not plain LoRA .{kind}")


def test_an_adapter_on_a_bare_parameter_is_refused():
    """PEFT adds such an adapter's product to the weights: no module gives what it adds."""
    chat = adapted("mixtral", r=2, target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"])
    refuse(chat, "mlp.experts is not plain LoRA .ParamWrapper")


def test_an_adapter_of_another_kind_is_refused():
    chat = make_chat()
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    chat = ChatModel(get_peft_model(chat.model, config), chat.tokenizer, "tiny", adapter="tiny")
    refuse(chat, "layer 1 has no LoRA adapter to scale")


# --- single components, and what adapters write -------------------------------------------------------------------


def drawn(chat, seed=0, count=1):
    """Random orthonormal directions in the output of every module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: orthonormal(torch.randn(count, site.b.shape[0], generator=generator))
        for name, site in LoraView.of(chat).linear_sites.items()
    }


@torch.no_grad()
def projected_by_hand(chat, bases, strength):
    for name, basis in bases.items():
        weight = LoraView.of(chat).linear_sites[name].output.weight
        weight -= strength * basis.T @ (basis @ weight)
    return chat


@pytest.mark.parametrize(("count", "strength"), [(1, 1.0), (1, 2.5), (2, 0.4)])
@pytest.mark.parametrize("config", CONFIGS)
def test_directions_of_each_module_equal_b_without_them(config, count, strength):
    chat = adapted(**CONFIGS[config])
    bases = drawn(chat, count=count)
    hooked = logits(chat, [ProjectAdapters(bases, strength)])
    assert (hooked - logits(chat)).abs().max() > 1e-2
    close(hooked, logits(projected_by_hand(chat, bases, strength)))


def test_each_row_has_its_own_directions_and_some_name_fewer_modules():
    chat = adapted(**CONFIGS["several modules"])
    ids, mask = padded(chat, "left")
    one, other = drawn(chat, 1), dict(list(drawn(chat, 2).items())[:3])
    settings = [[ProjectAdapters(one)], [ProjectAdapters(other, 2.0)]]
    with torch.no_grad(), intervene_rows(chat, settings):
        together = run(chat, ids, mask)[1]
    for row, setting in enumerate(settings):
        with torch.no_grad(), intervene(chat, setting):
            alone = run(chat, ids, mask)[1]
        close(together[row][mask[row].bool()], alone[row][mask[row].bool()])


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_ablated_writes_of_adapters_equal_b_without_the_directions(strength):
    chat = adapted(**CONFIGS["several modules"])
    vectors = torch.stack([vector(0), vector(1)])
    hooked = logits(chat, [Ablate(vectors, strength=strength, positions="all", at="adapters")])
    assert (hooked - logits(chat)).abs().max() > 1e-2
    writers = [name for name in LoraView.of(chat).linear_sites if name.endswith(("o_proj", "down_proj"))]
    close(hooked, logits(projected_by_hand(chat, dict.fromkeys(writers, orthonormal(vectors)), strength)))


def refuse_it(chat, one, message):
    with pytest.raises(MisdirectionError, match=message), intervene(chat, [one]):
        pass


def test_what_cannot_be_done_is_refused():
    chat = adapted(**CONFIGS["rank 1, down"])
    refuse_it(chat, ProjectAdapters({"model.layers.0.self_attn.q_proj": torch.ones(1, 32)}), r"q_proj has no LoRA")
    refuse_it(chat, ProjectAdapters({"model.layers.0.mlp.down_proj": torch.full((1, 32), torch.nan)}), "NaN")
    refuse_it(make_chat(), Ablate(vector(), at="adapters"), "no adapter of this model writes")
    refuse_it(chat, Ablate(vector(), layers=(1,), at="adapters"), "leave out `layers`")
    refuse_it(adapted("gemma2", **CONFIGS["rank 1, down"]), Ablate(vector(), at="adapters"), "norms stand between")


def test_its_description_is_json_and_tells_directions_apart():
    one, other = (ProjectAdapters({"m": torch.tensor([[value, 0.0]])}).described() for value in (1.0, -1.0))
    assert one != other
    assert one["bases"].keys() == {"m"}
