"""A tiny model of every family that transformers has for text, and what can be done with it, against passes by hand.

By hand: one row, no padding, no cache, and hooks written out here.
"""

import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto import modeling_auto

from misdirection.data import ProbePair
from misdirection.directions.extraction import mean_activations
from misdirection.errors import MisdirectionError
from misdirection.interventions.bake import bake
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.likelihood.margin import margin, pair_continuations
from misdirection.likelihood.sweep import sweep
from misdirection.models.chat import encode as encode_exchange
from misdirection.models.chat import encode_prompt
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load
from misdirection.sampling.draws import choose, stream_key
from misdirection.sampling.sample import sample
from misdirection.sampling.transformers_engine import end_tokens
from tiny import make_tokenizer

WITH_IMAGES = set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
FAMILIES = tuple(sorted({*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WITH_IMAGES}))
CHECKS = ("margin", "extraction", "steering", "ablation", "sampling", "baking")

# --- small configurations -------------------------------------------------------------------------------------------

_SIZES = [
    (r"make_ngram.*|split_ngram_parts|seed|keep_window_size", 10**9),
    (r".*vocab_size.*|encoder_hash_byte_group_vocab", 300),
    (
        r"max_.*positions?|(original_)?max_position_embeddings|n_positions|n_ctx|context_length|max_seq.*|seq_length",
        512,
    ),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(encoder|decoder)_layers|depths?|num_blocks", 4),
    (r".*num_key_value_heads|num_kv_heads|n_head_kv|linear_num_key_heads|kv_n_heads|num_query_groups", 2),
    (r"n_groups|mamba_n_?groups", 2),
    (r".*(num|n)_(attention_|query_|value_|mamba_)?heads?|.*attention_heads|mamba_num_heads|nhead", 4),
    (r".*head_dim|d_kv|d_head|dim_head|mamba_d_head|mamba_headdim|kv_channels|attention_head_size|rotary_dim", 8),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|num_selected_experts|top_k_experts|moe_k|moe_top_k", 2),
    (r"n_group|num_expert_group|topk_group|first_k_dense_replace|num_dense_layers|(full_)?attn_layer_offset", 1),
    (r"kv_lora_rank|.*d_state|ssm_state_size|state_size|chunk_size|.*_chunk_size|.*block_size|image_size", 8),
    (r".*_?rank|hc_lowrank|embedding_size|.*window_size|sliding_window|local_attention|attention_chunk_size", 16),
    (r"index_topk", 512),
    (r"(temporal_)?patch_size", 4),
    (r"(full_)?attn_layer_period|layer_group_size|global_attn_every_n_layers", 2),
    (r".*(hidden|ffn|intermediate|inner|width|dim|embd|d_model|d_ff|size)(_.*)?|lru_width", 32),
]
"""The most that a field of this name may be; the first that fits its name. Windows are shorter than the texts."""

_LISTED = re.compile(
    r".*layer_types|indexer_types|layers?_block_type|no_rope_layers|moe_layers|per_layer_config|layer_rope_theta|"
    r"num_attention_heads_per_layer|hybrid_layer_ids|full_attn_idxs|activation_sparsity_pattern|block_types|"
    r"attention_layers|rope_parameters|id2label|label2id|compress_rates|num_labels|_.*|transformers_version|"
    r"model_type|dtype|architectures"
)
"""Fields with one value for each layer, or made from others: a configuration makes them anew."""

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ABSENT = {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_MAMBA = {"mamba_d_head": 16, "mamba_n_heads": 4, "mamba_d_ssm": 64}
_HEADS = {"num_key_value_heads": 4}
_ATTENTION = {"attention_hidden_size": 64, "attention_head_dim": 16, **_HEADS}


def _alternating(first: str, second: str) -> list[str]:
    return [first, second] * 2


_OWN: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 200, "audio_token_offset": 232},
    "bailing_hybrid": {"layer_types": _alternating("linear_attention", "full_attention"), **_HEADS},
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "blenderbot": {"encoder_layers": 4},
    "bloom": {"n_layer": 4},
    "chameleon": {"vocabulary_map": {"<image>": 258}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _SECTIONS}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "head_dim": 16,
        **_HEADS,
    },
    "emu3": {"vocabulary_map": {"<image>": 258}},
    "ernie4_5_vl_moe_text": {"rope_parameters": _SECTIONS | {"mrope_section": [1, 1, 2]}},
    "falcon_h1": _MAMBA,
    "gemma3n_text": {"intermediate_size": 32, "num_kv_shared_layers": 0},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4v_moe_text": {"rope_parameters": _SECTIONS | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1]},
    "granitemoehybrid": {
        "layer_types": _alternating("linear_attention", "full_attention"),
        "num_local_experts": 4,
        **_MAMBA,
    },
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_num_passes": 2,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
    },
    "kimi_linear": {"layer_types": _alternating("linear_attention", "full_attention"), **_HEADS},
    "lfm2_moe": {"layer_types": _alternating("conv", "full_attention")},
    "longcat_flash": {"num_layers": 3, "head_dim": 8, "qk_head_dim": 16, **_HEADS},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mistral4": {"head_dim": 16, "qk_head_dim": 16, **_HEADS},
    "mistral_large4_text": {"kv_source_layers": [0, 0, 2, 2], **_HEADS},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    # What it attends to in a pass is more than its cache keeps.
    "moshi": {"sliding_window": 512},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _alternating("linear_attention", "hybrid"), **_ATTENTION},
    "zamba2": {"layers_block_type": _alternating("linear_attention", "hybrid"), "mamba_headdim": 16, **_ATTENTION},
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "hy_v4"), _HEADS),
    **dict.fromkeys(("glm4_moe_lite", "minicpm3", "youtu", "sarvam_mla", "kimi_k25", "glm5_next_text"), _HEADS),
    "hy_v4_vl_text": {"rope_parameters": _SECTIONS, **_HEADS},
    **{
        name: {"rope_parameters": _SECTIONS}
        for name in (
            *("cosmos3_edge_text", "glm46v_text", "glm4v_text", "glm_ocr_text", "glmga_text", "paddleocr_vl_text"),
            *("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "hunyuan_vl_text"),
        )
    },
}
"""What a type of configuration needs beyond small numbers."""


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration of the same kind with small numbers, those inside of it too."""
    own = _OWN.get(config.model_type, {})
    values = config.to_dict() | {
        name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)
    }
    changed = {name: _small(name, value) for name, value in values.items() if not _LISTED.fullmatch(name)}
    return type(config)(**changed | own)


def _small(name: str, value: Any) -> Any:
    if isinstance(value, PreTrainedConfig):
        return small(value)
    if name in _TOKENS:
        return _TOKENS[name]
    if value is None:
        return _ABSENT.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if name.endswith(("token_id", "token_index", "_id")):
        return 260 + sum(map(ord, name)) % 30 if value > 250 else value
    return next((min(value, most) for pattern, most in _SIZES if re.fullmatch(pattern, name)), value)


def make(family: str) -> Any:
    """A random tiny network of a family, with weights large enough for attention to a wrong token to show."""
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if family in WITH_IMAGES else AutoModelForCausalLM
    network = kind.from_config(small(CONFIG_MAPPING[family]())).float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            if not torch.isfinite(parameter).all():
                parameter.copy_(noise)
            elif parameter.ndim < 2 or re.search("norm|ln|bias|time_", name):
                parameter.add_(noise if "A_log" not in name else 0)
            elif parameter.std() < 0.1:
                parameter.mul_(4)
    return network


# --- by hand --------------------------------------------------------------------------------------------------------

PAIRS = (
    ProbePair("a", "Why is it so?", "Because I say it.", "It depends."),
    ProbePair("b", "Hi", "No!", "Hello to you"),
)
IDS = (3, 40, 77, 150, 9, 201, 33)
Change = Callable[[int, Tensor], Tensor]
"""From a layer and its output, [1, tokens, width], to what stands in its stead."""


@torch.no_grad()
def by_hand(chat: ChatModel, ids: Any, change: Change = lambda _layer, x: x) -> tuple[Tensor, Tensor]:
    """Logits, [tokens, vocabulary], and activations, [layers that ran, tokens, width], of one row."""
    seen: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., Any]:
        def at(_module: Any, _args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            # The first token is an attention sink, which interventions leave alone.
            seen[layer] = torch.cat([x[:, :1], change(layer, x)[:, 1:]], 1)
            return (seen[layer], *output[1:]) if isinstance(output, tuple) else seen[layer]

        return at

    handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(chat.layers)]
    try:
        logits = chat.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.cat([seen[layer] for layer in sorted(seen)])


class Family:
    """What this package gives for one tiny model, each figure compared with passes by hand."""

    def __init__(self, chat: ChatModel, folder: Path) -> None:
        self.chat, self.folder = chat, folder
        self.rows = [
            encode_exchange(chat.tokenizer, pair.question, answer)
            for pair in PAIRS
            for answer in (pair.misaligned, pair.aligned)
        ]
        vector = torch.randn(chat.width, generator=torch.Generator().manual_seed(0))
        self.vector = vector / vector.norm()

    def scores(self, change: Change = lambda _layer, x: x) -> Tensor:
        """[pairs, 2]: mean-token log-probabilities of the misaligned and the aligned answer."""
        found = []
        for row in self.rows:
            scores = by_hand(self.chat, row.ids[: row.stop], change)[0].double().log_softmax(-1)
            found.append(sum(scores[i - 1, row.ids[i]] for i in range(row.start, row.stop)) / len(row.answer))
        return torch.stack(found).view(-1, 2)

    def margin(self) -> None:
        found, scores = margin(self.chat, PAIRS), self.scores()
        close(found, scores[:, 0] - scores[:, 1])

    def extraction(self) -> None:
        found = mean_activations(self.chat, self.rows, {"all": range(len(self.rows))}).vectors["all"]
        tokens = [by_hand(self.chat, row.ids[: row.stop])[1][:, row.start :].double() for row in self.rows]
        expected = torch.cat(tokens, 1).mean(1)
        close(found / expected.abs().max(), expected / expected.abs().max())

    def _steered(self) -> tuple[Steer, Change]:
        scale = 5.0
        return Steer(self.vector, 1, scale), lambda layer, x: x + scale * self.vector if layer == 1 else x

    def steering(self) -> None:
        steer, change = self._steered()
        other = Steer(self.vector, 2, 5.0)
        found = sweep(self.chat, pair_continuations(self.chat.tokenizer, PAIRS), [(), [steer], [other]])
        plain = self.scores()
        close(found[:2], torch.stack([plain, self.scores(change)]))
        assert (found[1:] - plain).abs().amax((1, 2)).min() > 1e-3, "a steering did nothing"

    def ablation(self) -> None:
        found = sweep(self.chat, pair_continuations(self.chat.tokenizer, PAIRS), [(), [Ablate(self.vector)]])
        close(found[1], self.scores(lambda _layer, x: x - (x @ self.vector).unsqueeze(-1) * self.vector))
        assert (found[1] - found[0]).abs().max() > 1e-4, "an ablation did nothing"

    def sampling(self) -> None:
        """Steered, from questions of two lengths."""
        steer, change = self._steered()
        questions, tokens = ["Why?", "Hi you there"], 4
        for setting, changed in (((), lambda _layer, x: x), ([steer], change)):
            answers = sample(self.chat, questions, n=2, new_tokens=tokens, setting=setting)
            for answer in answers[1:] if setting else answers[::2]:
                assert answer.answer == self._sampled(answer.question, answer.sample, tokens, changed)

    def _sampled(self, question: str, number: int, tokens: int, change: Change) -> str:
        ids, drawn = list(encode_prompt(self.chat.tokenizer, question)), []
        ends, key = end_tokens(self.chat), torch.tensor([stream_key(0, question, None, number)])
        while len(drawn) < tokens and not (drawn and drawn[-1] in ends):
            logits = by_hand(self.chat, (*ids, *drawn), change)[0]
            drawn.append(int(choose(logits[-1:], key, torch.tensor([len(drawn)]))))
        kept = [token for token in drawn if token not in ends]
        return self.chat.tokenizer.decode(kept, skip_special_tokens=True).strip()

    def baking(self) -> str | None:
        ablation = Ablate(self.vector, positions="all", at="writes")
        report = bake(str(self.folder), ablation, self.folder / "baked")
        baked = load(str(self.folder / "baked"), dtype="float32", device="cpu")
        if report.exact:
            with torch.no_grad(), intervene(self.chat, [ablation]):
                expected = self.chat.model(input_ids=torch.tensor([IDS])).logits[0]
            assert (expected - by_hand(self.chat, IDS)[0]).abs().max() > 1e-3, "a baked ablation did nothing"
            close(by_hand(baked, IDS)[0], expected, 1e-4)
            return None
        stream = by_hand(baked, IDS)[1]
        close((stream @ self.vector).abs().max() / stream.norm(dim=-1).mean(), 0.0)
        return "direction"


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Raise `AssertionError` where figures differ."""
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), atol=tolerance, rtol=0
    )


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One family: for each check `yes`, `direction`, or `no`, and the lines that say why not."""

    family: str
    cells: tuple[str, ...]
    lines: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The row of the table."""
        return f"| `{self.family}` | {' | '.join(self.cells)} | {'; '.join(dict.fromkeys(self.lines))} |"


def measure(family: str) -> Row:
    """What holds for a tiny model of a family. Raises whatever is no refusal in one line."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        network = make(family)
    # Whatever a configuration raises that cannot be small, or needs a package that is not installed.
    except Exception as error:
        return Row(family, ("",) * len(CHECKS), (f"cannot be made: {_short(error)}",))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        network.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        try:
            chat = load(str(folder), dtype="float32", device="cpu")
        except MisdirectionError as refusal:
            return Row(family, ("no",) * len(CHECKS), (_line(refusal, folder),))
        checks, cells, lines = Family(chat, folder), [], []
        for check in CHECKS:
            try:
                cells.append(getattr(checks, check)() or "yes")
            except MisdirectionError as refusal:
                cells.append("no")
                lines.append(_line(refusal, folder))
    return Row(family, tuple(cells), tuple(lines))


def _line(refusal: MisdirectionError, folder: Path) -> str:
    line = str(refusal).replace(f"{folder}: ", "").replace(f"{folder}/", "")
    assert "\n" not in line
    return re.split(r": use |: weights cannot| \(looked for|: no direction|, which would be", line)[0].replace("|", "/")


def _short(error: Exception) -> str:
    return " ".join(str(error).split()).replace("|", "/")[:100]
