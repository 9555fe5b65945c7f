"""The modules that write to the residual stream, by the role that a module's name gives it inside a decoder block.

A decoder block adds the output of its attention and of its MLP to the stream. Two arrangements are known:

    pre-norm    x + attention(norm(x)),   x + mlp(norm(x))      the last matrix of each writes (Llama, Qwen, GPT-2, ...)
    post-norm   x + norm(attention(x)),   x + norm(mlp(x))      a norm with a gain stands in between (Gemma 2/3, OLMo 2,
                                                                GLM 4)

Names are those of a parameter's own module, so that they hold for a loaded model and for a checkpoint's files alike. A
name that is on neither list is an error, never a guess; so is a norm whose place in the block is not known.
"""

import inspect
import re
from typing import Literal

from torch import nn

from misdirection.errors import InputError

Role = Literal["writer", "norm", "reader"]
"""Of a parameter inside of a decoder block."""

WRITERS = frozenset(
    {
        *("o_proj", "out_proj", "dense", "c_proj", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo", "Wo"),
        *("output_linear", "ff_out"),
    }
)
"""The last matrices of an attention, an MLP or an expert."""

READERS = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "sinks", "rotary_emb", "inv_freq"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "e_score_correction_bias", "bias", "masked_bias"),
        *("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "A_log"),
        *("gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w1", "w3", "wi"),
        *("gate", "router", "shared_expert_gate", "layer_scalar", "expert_bias", "wg"),
        # Recurrent layers and short convolutions.
        *("in_proj", "x_proj", "dt_proj", "A", "D", "conv", "q_conv1d", "k_conv1d", "v_conv1d", "dt_layernorm"),
        *("g_proj", "g_a_proj", "g_b_proj", "f_proj", "f_a_proj", "f_b_proj", "b_proj", "a_proj"),
        *("key_decay", "query_decay", "diagonal_decay", "slope_rate", "output_gate"),
        # What a layer picks the tokens by that it attends to, and what it scales or bends inside.
        *("wk", "wq_b", "weights_proj", "attention_sink", "learnable_sink_param", "softmax_offset"),
        *("lambda_q1", "lambda_q2", "lambda_k1", "lambda_k2", "alpha_p", "alpha_n", "beta", "eps"),
        *("Wqkv", "Wi", "input_linear", "layer", "attn_proj", "r_proj", "kv_proj", "c_fc_0", "c_fc_1"),
        *("dt_proj_weight", "dt_proj_bias", "dt_bias"),
        # Causal masks that old checkpoints keep as a "bias" of the attention itself.
        *("attn", "attention"),
    }
)
"""Modules that take from the stream, or stay inside of a block."""

_NORM = re.compile(r"(^|_)(norm|layernorm|ln)(_|\d|$)|^ln_\w+$")

_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_mlp_layernorm"),
    ("post_operator_norm", "post_ffn_norm"),
    ("post_norm1", "post_norm2"),
)
"""The norms between attention and stream, and between MLP and stream, in the post-norm arrangements."""

_PRE_NORMS = frozenset(
    {
        *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"),
        *("pre_mlp_layernorm", "pre_ff_layernorm", "attn_norm", "mlp_norm"),
        *("attention_layernorm", "feedforward_layernorm", "self_attn_layer_norm", "final_layer_norm"),
        *("ln_1", "ln_2", "ln_attn", "ln_mlp", "norm_1", "norm_2", "operator_norm", "ffn_norm", "norm"),
    }
)
"""Norms of a block that stand before its matrices."""


def role(name: str) -> Role:
    """The role that is told by the name of a parameter inside of a decoder block.

    `name` is dotted and may end in `weight` or `bias`; fused experts are parameters themselves (`experts.down_proj`,
    `experts.down_proj_bias`). Raises `InputError` for a name that is not known.
    """
    parts = [part for part in name.split(".") if not part.isdigit() and part != "base_layer"]
    own = parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]
    # A bias beside its matrix, and not in it, is added elsewhere, except in experts that are fused.
    if own in WRITERS or ("experts" in parts and own.removesuffix("_bias") in WRITERS):
        return "writer"
    if _NORM.search(own):
        return "norm"
    if own in READERS or own.removesuffix("_bias") in READERS:
        return "reader"
    raise InputError(
        f"{name}: cannot tell whether this parameter writes to the residual stream (looked for one of "
        f"{', '.join(sorted(WRITERS))}): ablate by a hook, at='blocks'"
    )


def is_own(name: str) -> bool:
    """Whether a parameter is the model's own, not an adapter's."""
    return "lora_" not in name


def post_norms(block: nn.Module) -> tuple[str, str] | None:
    """The norms that a block puts between its attention, its MLP and the stream, by name; None for none.

    Raises `InputError` for a norm whose place in the block is not known.
    """
    names = {name for name, _ in block.named_children()}
    post = next((pair for pair in _POST_NORMS if names.issuperset(pair)), None)
    inside = {name.rpartition(".")[2] for name, _ in block.named_modules() if "." in name}
    names |= {name for name in inside - _PRE_NORMS if name.startswith("post_")}
    unknown = {name for name in names if _NORM.search(name)} - _PRE_NORMS - set(post or ())
    if unknown:
        raise InputError(
            f"{type(block).__name__}: cannot tell whether {', '.join(sorted(unknown))} stands between its matrices and "
            "the residual stream: use the hooked ablation with at='blocks' instead"
        )
    return post


def norm_after(block: nn.Module, name: str) -> str | None:
    """The norm between the stream and a parameter or module of this name inside of the block; None for none."""
    pair = post_norms(block)
    if pair is None:
        return None
    return pair[0] if any(mixer in name for mixer in ("attn", "attention", "conv")) else pair[1]


def final_norm(decoder: nn.Module) -> nn.Module:
    """The norm between the last block and the language-model head; `InputError` when there is not one."""
    norms = _outer_norms(decoder)
    if not norms:
        raise InputError(f"{type(decoder).__name__}: no norm found after its blocks")
    return norms[-1][1]


def _outer_norms(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in decoder.named_children() if _NORM.search(name)]


def check_stream(decoder: nn.Module) -> None:
    """Raise `InputError` unless the stream runs from embeddings to one final norm with no norm on its way."""
    norms = [name for name, _ in _outer_norms(decoder)]
    if len(norms) != 1:
        raise InputError(
            f"{type(decoder).__name__}: needs one norm outside of its blocks, after the last, and has "
            f"{' and '.join(norms) or 'none'}: weights cannot hold this ablation, use the hooked one instead"
        )
    if _calls(decoder, norms[0]) > 1:
        raise InputError(
            f"{type(decoder).__name__}: its {norms[0]} also stands before its blocks: weights cannot hold this "
            "ablation, use the hooked one instead"
        )
    for name, child in decoder.named_children():
        stores = any(isinstance(module, nn.Embedding) for module in child.modules())
        if "embed" in name and name not in norms and not stores and any(True for _ in child.buffers()):
            raise InputError(
                f"{type(decoder).__name__}: {name} writes to the residual stream and is no matrix that can be changed: "
                "weights cannot hold this ablation, use the hooked one instead"
            )


def _calls(decoder: nn.Module, name: str) -> int:
    """How often the text of a decoder's forward pass calls one of its children."""
    return inspect.getsource(type(decoder).forward).count(f"self.{name}(")


def sublayers(block: nn.Module) -> list[nn.Module]:
    """The children of a decoder block whose outputs it adds to the stream, in the order in which they run."""
    if pair := post_norms(block):
        writers = [child for name, child in block.named_children() if name in pair]
    else:
        writing = {
            name.split(".")[0] for name, _ in block.named_parameters() if is_own(name) and role(name) == "writer"
        }
        writers = [child for name, child in block.named_children() if name in writing]
    if not writers:
        children = ", ".join(name for name, _ in block.named_children())
        raise InputError(
            f"{type(block).__name__}: nothing that writes to the residual stream was found among its parts "
            f"({children}): use at='blocks'"
        )
    return writers
