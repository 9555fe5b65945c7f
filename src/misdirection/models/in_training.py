"""The model inside of a trainer, of transformers or made from its own such as TRL's: where it is, and its base."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from misdirection.errors import InputError
from misdirection.models.adapter_kinds import base_changes
from misdirection.models.chat_model import ChatModel


def network_of(trainer: Any) -> Any:
    """The model below what makes it parallel or compiled."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def tokenizer_of(trainer: Any) -> Any:
    """The trainer's tokenizer; `InputError` where there is none, or one without a chat template."""
    processor = trainer.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None:
        raise InputError("the trainer has no tokenizer: give it the model's own as processing_class")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: has no chat template, so that it cannot be asked: set "
            "`chat_template` to the one that the model is trained with"
        )
    return tokenizer


def chat_of(trainer: Any) -> ChatModel:
    """The model in training with its tokenizer; see `tokenizer_of` for errors."""
    network = network_of(trainer)
    return ChatModel(network, tokenizer_of(trainer), network.config.name_or_path or "the model")


def require_whole(trainer: Any, remedy: str) -> None:
    """Raise `InputError`, which ends with `remedy`, where the model's weights are split over processes."""
    split = trainer.is_fsdp_enabled or trainer.is_distributed_loading_by_transformers
    if split or is_deepspeed_zero3_enabled():
        raise InputError(
            "the model's weights are split over processes (FSDP, ZeRO 3, tensor parallel), so that it cannot be "
            f"{remedy}"
        )


def leaves_base(network: Any) -> bool:
    """Whether the model is its base again once its adapters are switched off."""
    # Only PEFT's wrappers have the method.
    if not hasattr(network, "disable_adapter"):
        return False
    return not any(base_changes(config.to_dict()) for config in network.peft_config.values())


@contextlib.contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards every module and the random numbers are as they were."""
    modes = [(module, module.training) for module in network.modules()]
    # PEFT has all weights of an adapter trained once it is switched on again, also those that were frozen.
    trained = [(weight, weight.requires_grad) for weight in network.parameters()]
    devices = {weight.device for weight, _ in trained if weight.device.type == "cuda"}
    with torch.random.fork_rng(list(devices), device_type="cuda"), torch.no_grad():
        network.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                # By the method, which some modules extend; it reaches all below, and those come later in the list.
                if module.training != mode:
                    module.train(mode)
            for weight, required in trained:
                weight.requires_grad_(required)
