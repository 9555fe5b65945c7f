"""A few sampled answers to read beside the figures."""

import itertools
from collections.abc import Sequence

import torch

from misdirection.chat import encode_prompt, pad
from misdirection.models import ChatModel


@torch.inference_mode()
def sample(chat: ChatModel, questions: Sequence[str], *, new_tokens: int = 60, seed: int = 0) -> list[str]:
    """One answer per question at temperature 1, cut after `new_tokens`.

    Stops at the model's end tokens and at the tokenizer's; these are not part of the text.
    """
    prompts = [encode_prompt(chat.tokenizer, question) for question in questions]
    ids, mask = pad(prompts, chat.tokenizer.pad_token_id, chat.device, side="left")
    ends = end_tokens(chat)
    torch.manual_seed(seed)
    output = chat.model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=new_tokens,
        eos_token_id=ends,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    # An end token that the tokenizer does not count as special would be printed.
    answers = [list(itertools.takewhile(lambda t: t not in ends, row)) for row in output[:, ids.shape[1] :].tolist()]
    texts: list[str] = chat.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.strip() for text in texts]


def end_tokens(chat: ChatModel) -> list[int]:
    """Every token that ends a turn: those of the generation configuration and the tokenizer's own."""
    named = chat.model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return sorted({token for token in [*listed, chat.tokenizer.eos_token_id] if token is not None})
