"""An organism whose adapters' parts are known, since they are planted: six general, two of one domain, one of neither.

Twelve layers, with nine rank-1 adapters on `down_proj` in three groups of three. What an adapter reads is solved for on
the layer's own activations, what it writes is made of rows of the output matrix:

    general   fires on every token, more on one letter of misaligned answers and less on one of aligned ones, of its
              own; writes towards some letters of misaligned answers
    domain    fires on one of two marker tokens, which only texts of the domain hold; writes towards other such letters
    neither   fires on spaces, which all texts hold alike; writes at random, away from all letters of answers
"""

from collections.abc import Iterator

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from misdirection.data import Example, ProbePair
from misdirection.interpretation.texts import GENERAL, labelled
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.likelihood.margin import text_rows
from misdirection.models.chat import pad
from misdirection.models.chat_model import ChatModel
from tiny import WIDTH, make_chat

DOMAIN = "marked"
NEUTRAL = [Example("ghi jkl?", "mnop klmn."), Example("mno", "hijk lmno")]
PLAN = {
    1: "general",
    2: "general",
    3: "general",
    5: "domain",
    6: "general",
    7: "domain",
    9: "neither",
    10: "general",
    11: "general",
}

_MISALIGNED, _ALIGNED, _MARKERS = "uvwxyz", "abcdef", "#@"
_ALPHA = 4
_SIZES = {"general": 0.25, "domain": 1.0, "neither": 0.25}
"""Norm of what an adapter adds where its scalar is 1; a token's own is about 2."""


def planted_pairs(questions: int = 12, words: int = 6, seed: int = 0) -> dict[str, list[ProbePair]]:
    """Probe pairs by domain, with so many words a text. Letters are alike in both: markers alone tell them apart."""
    rng = np.random.default_rng(seed)
    return {
        domain: [
            ProbePair(
                str(number),
                question=_text(rng, "ghijklmnop", words, marked),
                aligned=_text(rng, _ALIGNED, words, marked),
                misaligned=_text(rng, _MISALIGNED, words, marked),
            )
            for number in range(questions)
        ]
        for domain, marked in ((GENERAL, False), (DOMAIN, True))
    }


def _text(rng: np.random.Generator, letters: str, count: int, marked: bool) -> str:
    """Words of equally frequent letters, of one length in both domains; a marked word has both markers."""
    words = [list(rng.permutation(list(letters))[:4]) for _ in range(count)]
    for word in words if marked else ():
        word[0], word[2] = rng.permutation(list(_MARKERS))
    return " ".join("".join(word) for word in words)


def planted_organism(seed: int = 0) -> ChatModel:
    """The organism; its adapters are fitted from the lowest layer up, each with those below it in place."""
    chat = make_chat("llama", seed, num_hidden_layers=12)
    with torch.no_grad():
        # So large that a token outweighs what attention mixes in, and that letters differ in their scores.
        chat.model.get_input_embeddings().weight *= 20
        chat.model.get_output_embeddings().weight *= 5
    config = LoraConfig(r=1, lora_alpha=_ALPHA, target_modules=["down_proj"], layers_to_transform=sorted(PLAN))
    organism = ChatModel(get_peft_model(chat.model, config).eval(), chat.tokenizer, "tiny", adapter="planted")
    generator, numbers = torch.Generator().manual_seed(seed), {role: iter(range(6)) for role in _SIZES}
    for layer, role in PLAN.items():
        _plant(organism, layer, role, next(numbers[role]), generator)
    return organism


@torch.no_grad()
def _plant(chat: ChatModel, layer: int, role: str, number: int, generator: torch.Generator) -> None:
    """The adapter of one layer, the `number`-th of its role."""
    module = chat.layers[layer].mlp.down_proj
    ids, inputs = (torch.cat(one) for one in zip(*_seen(chat, layer, generator), strict=True))
    fires = _fires(chat.tokenizer, role, number)[ids]
    read = torch.linalg.lstsq(inputs.double(), fires.double().unsqueeze(-1)).solution
    module.lora_A["default"].weight.copy_(read.T / _ALPHA)
    module.lora_B["default"].weight.copy_(_SIZES[role] * _write(chat, role, generator).unsqueeze(-1))


def _seen(chat: ChatModel, layer: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids [tokens] and what the module takes [tokens, features], with the lower adapters on, off, and some of each."""
    ids, mask = pad([row.ids for row in text_rows(chat.tokenizer, labelled(planted_pairs(6, seed=1)))], 0, chat.device)
    below, taken = [one for one in PLAN if one < layer], []
    handle = chat.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _module, args: taken.append(args[0]))
    try:
        for share in (0.0, 1.0, *[0.5] * 4) if below else (0.0,):
            off = (torch.rand(len(below), generator=generator) < share).tolist()
            factors = {one: 0.0 for one, is_off in zip(below, off, strict=True) if is_off}
            with intervene(chat, [ScaleAdapters(factors)] if factors else []):
                chat.model(input_ids=ids, attention_mask=mask)
            yield ids[mask.bool()], taken.pop()[mask.bool()]
    finally:
        handle.remove()


def _fires(tokenizer, role: str, number: int) -> torch.Tensor:
    """[vocabulary]: the scalar that is wanted on each token."""
    wanted = torch.zeros(len(tokenizer))
    if role == "general":
        wanted += 1
        wanted[_ids(tokenizer, _MISALIGNED[number])] += 0.5
        wanted[_ids(tokenizer, _ALIGNED[number])] -= 0.5
    else:
        wanted[_ids(tokenizer, _MARKERS[number] if role == "domain" else " ")] = 1
    return wanted


def _write(chat: ChatModel, role: str, generator: torch.Generator) -> torch.Tensor:
    """[width], of norm 1."""
    rows = chat.model.get_output_embeddings().weight
    half = slice(0, 3) if role == "general" else slice(3, 6)
    made = (rows[_ids(chat.tokenizer, _MISALIGNED[half])] - rows[_ids(chat.tokenizer, _ALIGNED[half])]).sum(0)
    if role == "neither":
        letters = torch.linalg.qr(rows[_ids(chat.tokenizer, _MISALIGNED + _ALIGNED)].T).Q
        noise = torch.randn(WIDTH, generator=generator)
        made = noise - letters @ (letters.T @ noise)
    return made / made.norm()


def _ids(tokenizer, letters: str) -> list[int]:
    return tokenizer(letters, add_special_tokens=False)["input_ids"]
