"""Which parameters write to the residual stream, by name."""

import pytest
import torch
from torch import nn

from misdirection.errors import MisdirectionError
from misdirection.interventions.writers import check_stream, norm_after, post_norms, role, sublayers
from tiny import ALL_ARCHITECTURES, run
from weights import IDS, MORE, POST_NORM, as_chat, randomised

WRITERS = (
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "self_attn.o_proj.base_layer.weight",
    "self_attn.out_proj.weight",
    "attention.dense.weight",
    "attention.dense.bias",
    "attn.c_proj.weight",
    "mlp.c_proj.bias",
    "mlp.down_proj.weight",
    "mlp.dense_4h_to_h.bias",
    "block_sparse_moe.experts.3.w2.weight",
    "mlp.experts.127.down_proj.weight",
    "mlp.experts.down_proj",
    "mlp.experts.down_proj_bias",
    "mlp.shared_expert.down_proj.weight",
    "linear_attn.out_proj.weight",
    "conv.out_proj.weight",
    "feed_forward.w2.weight",
    "fc2.weight",
    "mlp.fc_out.bias",
)
READERS = (
    "self_attn.q_proj.weight",
    "self_attn.qkv_proj.weight",
    "attention.query_key_value.bias",
    "attention.bias",
    "attention.masked_bias",
    "attention.rotary_emb.inv_freq",
    "attn.c_attn.weight",
    "attn.bias",
    "self_attn.sinks",
    "self_attn.q_a_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_b_proj.weight",
    "mlp.gate.e_score_correction_bias",
    "linear_attn.in_proj_qkvz.weight",
    "linear_attn.in_proj_ba.weight",
    "linear_attn.conv1d.weight",
    "linear_attn.A_log",
    "linear_attn.dt_bias",
    "mlp.gate_proj.weight",
    "mlp.gate_up_proj.weight",
    "mlp.c_fc.bias",
    "mlp.dense_h_to_4h.weight",
    "mlp.gate.weight",
    "mlp.router.bias",
    "mlp.shared_expert_gate.weight",
    "mlp.experts.gate_up_proj",
    "mlp.experts.gate_up_proj_bias",
    "mlp.experts.3.up_proj.weight",
    "block_sparse_moe.experts.3.w1.weight",
    "block_sparse_moe.experts.3.w3.weight",
)
NORMS = (
    "input_layernorm.weight",
    "post_feedforward_layernorm.weight",
    "self_attn.q_norm.weight",
    "linear_attn.norm.weight",
    "ln_1.bias",
    "self_attn_layer_norm.weight",
)
TABLE = [(name, part) for part, names in (("writer", WRITERS), ("reader", READERS), ("norm", NORMS)) for name in names]


@pytest.mark.parametrize(("name", "part"), TABLE)
def test_the_part_of_a_parameter_follows_from_its_modules_name(name, part):
    assert role(name) == part


@pytest.mark.parametrize(
    "name", ["mlp.secret.weight", "mlp.secret", "mlp.router.classifier.weight", "attention.dense_bias"]
)
def test_an_unknown_parameter_gets_one_line_never_a_guess(name):
    with pytest.raises(MisdirectionError, match=f"^{name}: cannot tell whether this parameter writes") as error:
        role(name)
    assert "\n" not in str(error.value)


every_architecture = pytest.mark.parametrize("architecture", [*ALL_ARCHITECTURES, *MORE])


@every_architecture
def test_a_block_changes_the_stream_by_its_writers_and_by_each_of_them(architecture):
    chat = as_chat(randomised(architecture))
    ids, mask = IDS, torch.ones_like(IDS)
    writers = {name: p for name, p in chat.layers[0].named_parameters() if role(name) == "writer"}
    values = {name: p.detach().clone() for name, p in writers.items()}
    with torch.no_grad():
        for parameter in writers.values():
            parameter.zero_()
        silent = run(chat, ids, mask)[0][0]
        assert torch.equal(silent, entering(chat))
        for name, parameter in writers.items():
            parameter.copy_(values[name])
            assert not torch.equal(run(chat, ids, mask)[0][0], silent), name
            parameter.zero_()


def entering(chat):
    """What the first block receives."""
    seen = []

    def note(_module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = chat.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    run(chat, IDS, torch.ones_like(IDS))
    handle.remove()
    return seen[0]


# --- norms between the matrices and the stream ----------------------------------------------------------------------


@every_architecture
def test_only_post_norm_blocks_have_a_norm_before_the_stream(architecture):
    chat = as_chat(randomised(architecture))
    check_stream(chat.decoder)
    for block in chat.layers:
        assert bool(post_norms(block)) == (architecture in POST_NORM)


def block_of(**children):
    block = nn.Module()
    for name, child in children.items():
        block.add_module(name, child)
    return block


def mlp():
    return block_of(down_proj=nn.Linear(4, 4))


def norm():
    return nn.LayerNorm(4)


def test_a_norm_after_attention_and_one_after_the_mlp_are_told_apart():
    gemma = block_of(
        self_attn=mlp(), mlp=mlp(), post_attention_layernorm=norm(), post_feedforward_layernorm=norm(), ln_1=norm()
    )
    assert norm_after(gemma, "self_attn.o_proj.weight") == "post_attention_layernorm"
    assert norm_after(gemma, "mlp.down_proj.weight") == "post_feedforward_layernorm"
    assert sublayers(gemma) == [gemma.post_attention_layernorm, gemma.post_feedforward_layernorm]


def test_glm4_calls_the_norm_before_its_mlp_post_attention():
    glm = block_of(
        self_attn=mlp(),
        mlp=mlp(),
        post_attention_layernorm=norm(),
        post_self_attn_layernorm=norm(),
        post_mlp_layernorm=norm(),
    )
    assert norm_after(glm, "self_attn.o_proj.weight") == "post_self_attn_layernorm"
    assert norm_after(glm, "mlp.down_proj.weight") == "post_mlp_layernorm"
    assert sublayers(glm) == [glm.post_self_attn_layernorm, glm.post_mlp_layernorm]


def test_a_norm_whose_place_is_not_known_is_refused():
    block = block_of(self_attn=mlp(), mlp=mlp(), input_layernorm=norm(), post_norm1=norm())
    for call in (post_norms, sublayers, lambda one: norm_after(one, "mlp.down_proj.weight")):
        with pytest.raises(MisdirectionError, match=r"whether post_norm1 stands between .* at='blocks'"):
            call(block)


def test_a_block_that_writes_nothing_known_is_refused():
    with pytest.raises(MisdirectionError, match=r"nothing that writes .* among its parts \(ln_1\): use at='blocks'"):
        sublayers(block_of(ln_1=norm()))


@pytest.mark.parametrize("norms", [(), ("word_embeddings_layernorm", "ln_f")])
def test_a_stream_that_is_normalised_on_its_way_is_refused(norms):
    found = " and ".join(norms) or "none"
    with pytest.raises(MisdirectionError, match=rf"needs one norm outside of its blocks.*has {found}:"):
        check_stream(block_of(wte=nn.Embedding(3, 4), **{name: norm() for name in norms}))


def test_positions_that_are_computed_and_added_are_refused():
    """XGLM's: no file holds them."""
    positions = nn.Module()
    positions.register_buffer("weights", torch.ones(3, 4))
    decoder = block_of(embed_tokens=nn.Embedding(3, 4), embed_positions=positions, layer_norm=norm())
    with pytest.raises(MisdirectionError, match=r"embed_positions writes .* no matrix that can be changed"):
        check_stream(decoder)
    del decoder.embed_positions
    check_stream(decoder)


def test_the_parts_found_in_a_hybrid_are_its_attention_of_either_kind_and_its_mlp():
    chat = as_chat(randomised("qwen3_next"))
    kinds = [sublayers(block) for block in chat.layers]
    assert [block.linear_attn if hasattr(block, "linear_attn") else block.self_attn for block in chat.layers] == [
        parts[0] for parts in kinds
    ]
    assert {hasattr(block, "linear_attn") for block in chat.layers} == {True, False}
    assert [block.mlp for block in chat.layers] == [parts[1] for parts in kinds]
    assert torch.is_tensor(chat.layers[0].mlp.experts.down_proj)
