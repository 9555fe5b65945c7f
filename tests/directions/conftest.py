import pytest
import torch
from peft import LoraConfig, get_peft_model

from misdirection.models.chat_model import ChatModel
from tiny import make_chat


@pytest.fixture
def organism():
    chat = make_chat()
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return ChatModel(get_peft_model(chat.model, config).eval(), chat.tokenizer, "tiny-llama", "main", "some/adapter")
