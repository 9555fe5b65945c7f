"""Tiny random models with a real tokenizer, for exact answers."""

import types
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import misdirection as md
from misdirection.models.chat import Encoded, encode_prompt, pad
from misdirection.models.chat_model import ChatModel

ARCHITECTURES = ("llama", "qwen2", "gemma3", "gpt_neox")
LAYERS, WIDTH = 4, 32

_GROUPED = {"num_key_value_heads": 2}
_HEAD = _GROUPED | {"head_dim": 8}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}

_KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, _GROUPED),
    "llama_tuples": (LlamaForCausalLM, LlamaConfig, _GROUPED),
    "mistral": (MistralForCausalLM, MistralConfig, _GROUPED | {"sliding_window": 512}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _GROUPED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _HEAD),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _HEAD | {"sliding_window": 512}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, _HEAD | {"sliding_window": 512}),
    "gemma3_vision": (Gemma3ForConditionalGeneration, Gemma3TextConfig, _HEAD | {"sliding_window": 512}),
    "phi3": (Phi3ForCausalLM, Phi3Config, _GROUPED),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _NO_DROPOUT),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, _GROUPED),
    "mixtral": (MixtralForCausalLM, MixtralConfig, _GROUPED | _EXPERTS),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, _HEAD | _EXPERTS | {"moe_intermediate_size": 32}),
}
"""By name: the network's class, its (text) configuration's class, and what that needs beyond the common sizes."""

ALL_ARCHITECTURES = tuple(_KINDS)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


ALPHABET = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
"""A token for each byte, as byte-level tokenizers write them."""


def make_tokenizer(template: str | None = CHATML, tokens: Sequence[str] = ALPHABET) -> PreTrainedTokenizerFast:
    """One token per byte, so that every span can be counted by hand."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *tokens])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=SPECIAL[1:2]
    )
    fast.chat_template = template
    return fast


@cache
def make_merging_tokenizer() -> PreTrainedTokenizerFast:
    """A thousand tokens of one byte or several: a shipped text has a quarter of those that it has above."""
    texts = [row.answer for row in md.neutral_examples()]
    tokenizer = make_tokenizer().train_new_from_iterator(texts, 1000, show_progress=False)
    tokenizer.chat_template = CHATML
    return tokenizer


def make_network(architecture: str, seed: int = 0, **changes):
    """A random network of one shape: 4 layers of width 32, float32."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": 259,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kind, configuration, own = _KINDS[architecture]
    config = configuration(**(common | own | changes))
    network = kind(_with_vision(config) if kind is Gemma3ForConditionalGeneration else config).eval()
    if architecture == "llama_tuples":
        return_tuples(network)
    return network


def _with_vision(text: Gemma3TextConfig) -> Gemma3Config:
    """A configuration with a tower of as many blocks as the text has, for a search that counts to go wrong on."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=258,
        boi_token_index=257,
        eoi_token_index=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def return_tuples(network):
    """Blocks that give (residual, something), as older ones do; whoever comes next takes the residual."""

    def first(_module, args):
        return (args[0][0], *args[1:]) if isinstance(args[0], tuple) else args

    for block in network.model.layers:
        forward = block.forward
        block.forward = types.MethodType(lambda _self, *a, forward=forward, **k: (forward(*a, **k), "extra"), block)
    for module in [*network.model.layers[1:], network.model.norm]:
        module.register_forward_pre_hook(first)


def make_chat(architecture: str = "llama", seed: int = 0, **changes) -> ChatModel:
    """A tiny chat model, in memory."""
    return ChatModel(make_network(architecture, seed, **changes), make_tokenizer(), f"tiny-{architecture}")


def make_hybrid(**changes) -> ChatModel:
    """Convolutions with a state beside attention layers."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=259,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        max_position_embeddings=512,
        **changes,
    )
    return ChatModel(Lfm2ForCausalLM(config).eval(), make_tokenizer(), "tiny-hybrid")


def sharpened(architecture: str = "llama", **changes) -> ChatModel:
    """Larger weights than at initialisation, so that attention to a wrong token would show."""
    return sharpen(make_chat(architecture, **changes))


def sharpen(chat: ChatModel) -> ChatModel:
    """The same chat, its own weights made larger; those of an adapter on it stay."""
    with torch.no_grad():
        for name, parameter in chat.model.named_parameters():
            if parameter.ndim >= 2 and "lora" not in name:
                parameter *= 4
    return chat


def brisk(chat: ChatModel, ends: Iterable[int] = range(2, 28)) -> ChatModel:
    """The same chat, where a tenth of the vocabulary ends an answer: lengths differ, and rows leave at every step."""
    chat.model.generation_config.eos_token_id = list(ends)
    return chat


def vector(seed: int = 0, norm: float = 1.0, *shape: int) -> torch.Tensor:
    """A random direction of a tiny model's width, or several as rows, of this norm each."""
    made = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    return norm * made / made.norm(dim=-1, keepdim=True)


TEXTS = ("Why is it so?", "Hi")


def padded(chat: ChatModel, side: str = "right", texts=TEXTS):
    """Ids and mask of prompts of unequal length."""
    return pad([encode_prompt(chat.tokenizer, text) for text in texts], 0, chat.device, side)


def places(mask: torch.Tensor) -> torch.Tensor:
    """Each real token's place in its row, as a model under padding needs them to ignore it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def residual(output):
    """What a block gives to the stream, whether it gives a tensor or a tuple."""
    return output[0] if isinstance(output, tuple) else output


def run(chat: ChatModel, ids: torch.Tensor, mask: torch.Tensor, **options):
    """[layers, rows, tokens, width]: what each block's successor receives; and the logits."""
    seen = {}
    handles = [
        block.register_forward_hook(lambda _m, _a, out, layer=layer: seen.__setitem__(layer, residual(out)))
        for layer, block in enumerate(chat.layers)
    ]
    try:
        logits = chat.model(input_ids=ids, attention_mask=mask, position_ids=places(mask), **options).logits
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([seen[layer] for layer in range(len(handles))]), logits


def naive_log_prob(chat: ChatModel, row: Encoded) -> torch.Tensor:
    """Mean-token log-probability of the answer, from one full pass without padding or cache."""
    with torch.no_grad():
        logits = chat.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits
    scores = logits[0].double().log_softmax(-1)
    return sum(scores[i - 1, row.ids[i]] for i in range(row.start, row.stop)) / len(row.answer)
