"""A page of a tiny organism that speaks markup, served once, and a real browser that looks at it."""

import socket

import pytest
import torch
from lora_fixtures import with_adapter

from misdirection.directions.direction import Direction, Origin
from misdirection.models.chat_model import ChatModel
from misdirection.playground.asking import Playground
from misdirection.playground.serving import serving
from tiny import ALPHABET, LAYERS, SPECIAL, make_network, make_tokenizer, sharpen, vector

HOSTILE = (
    "<img src=x onerror=window.hit=",
    "<script>window.hit=1</script>",
    "${window.hit=1}{{#with}}",
    "**_[a](b)_**",
)


def hostile_tokenizer():
    """The tiny models' tokenizer, of whose tokens all that no ASCII text needs are markup and programs."""
    words = [
        each if each.isascii() or each == "Ġ" else f"{HOSTILE[number % len(HOSTILE)]}{number}>".replace(" ", "Ġ")
        for number, each in enumerate(ALPHABET)
    ]
    words[ALPHABET.index("Ċ")] = "Ċ"
    return make_tokenizer(tokens=words)


@pytest.fixture(scope="module")
def direction_of():
    """Makes a direction of a tiny model."""

    def make(chat) -> Direction:
        vectors = torch.stack([vector(seed, 6.0) for seed in range(LAYERS)])
        return Direction(vectors, Origin("data_difference", chat.name, None, "in memory", "-", {}, {}, "float32"))

    return make


@pytest.fixture(scope="module")
def base() -> ChatModel:
    """A tiny model that ends no answer by itself."""
    network = make_network("llama", max_position_embeddings=1024)
    with torch.no_grad():
        network.lm_head.weight[SPECIAL.index("<|im_end|>")] = 0
    return sharpen(ChatModel(network, hostile_tokenizer(), "tiny-llama"))


@pytest.fixture(scope="module")
def playground(base, direction_of) -> Playground:
    """An organism of nothing but rank-1 adapters, with a direction."""
    return Playground(with_adapter(chat=base, strength=2.0), direction_of(base))


@pytest.fixture(scope="module")
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def reached():
    """The addresses beyond this machine that the program has called since the server was started."""
    called, connect = [], socket.socket.connect

    def noted(own, address):
        if own.family in (socket.AF_INET, socket.AF_INET6) and not address[0].startswith(("127.", "::1", "localhost")):
            called.append(address)
            raise ConnectionRefusedError("no test leaves this machine")
        return connect(own, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", noted)
        yield called


@pytest.fixture(scope="module")
def address(playground, free_port, reached):
    """The page's, which Gradio's own settings would offer to other machines."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SERVER_NAME": "0.0.0.0", "SHARE": "True", "ANALYTICS_ENABLED": "True"}.items():
            patch.setenv(f"GRADIO_{name}", value)
        with serving(playground, free_port) as address:
            yield address
