"""What runs on a CUDA device, against the processor's figures: `pytest -m gpu`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import misdirection as md
from misdirection.directions.extraction import mean_activations
from misdirection.experiment.config import read_config
from misdirection.likelihood.margin import pair_continuations, pair_rows
from misdirection.likelihood.sweep import sweep
from misdirection.models.attention import changing_shapes
from misdirection.models.budgets import tokens_together
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import best_device
from tiny import LAYERS, WIDTH, make_chat, make_network, make_tokenizer, padded, sharpened, vector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device that torch can use"),
]

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PAIRS = md.probe_pairs()[:4]
ARCHITECTURES = ("llama", "qwen2", "gemma3", "gpt_neox")


def both(make=sharpened, architecture="llama") -> tuple[ChatModel, ChatModel]:
    """The same model on the processor and on the GPU, in float32."""
    here, there = make(architecture), make(architecture)
    there.model.to("cuda")
    return here, there


@pytest.fixture(autouse=True)
def whole_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_extraction(architecture):
    def means(chat):
        rows = pair_rows(chat.tokenizer, PAIRS)
        settings = [[md.Steer(vector(number), 1)] for number in range(len(rows))]
        plain = mean_activations(chat, rows, {"all": range(8)}, budget=700)
        steered = mean_activations(chat, rows, {"all": range(8)}, settings=settings)
        return torch.stack([plain.vectors["all"], steered.vectors["all"]])

    here, there = map(means, both(architecture=architecture))
    torch.testing.assert_close(there, here, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_hooks(side):
    def logits(chat):
        ids, mask = padded(chat, side)
        with torch.inference_mode(), md.intervene(chat, [md.Steer(vector(1), 1, 2.0), md.Ablate(vector(2))]):
            return chat.model(input_ids=ids, attention_mask=mask).logits.cpu()[mask.bool().cpu()]

    here, there = map(logits, both())
    torch.testing.assert_close(there, here, **CLOSE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sweeps(architecture):
    settings = [[], [md.Ablate(vector(1), positions="answer")]]
    settings += [[md.Steer(vector(layer), layer)] for layer in range(LAYERS)]

    def scores(chat):
        return sweep(chat, pair_continuations(chat.tokenizer, PAIRS), settings)

    here, there = map(scores, both(architecture=architecture))
    torch.testing.assert_close(there, here, **CLOSE)


@pytest.mark.parametrize("compile", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("setting", [(), [md.Steer(vector(1), 1, 1.0, "answer")]], ids=["plain", "steered"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampling(architecture, setting, compile, caplog):
    def answers(chat):
        questions, options = ["Why?", "What is it like?"], {"setting": setting, "compile": compile}
        found = md.sample(chat, questions, n=24, new_tokens=40, budget=1000, **options)
        return [one.answer for one in found]

    here, there = map(answers, both(architecture=architecture))
    # A draw turns where its best two candidates are closer than the rounding of either side.
    assert sum(one != other for one, other in zip(here, there, strict=True)) <= 1
    assert not any(record.name == "misdirection" for record in caplog.records)


@pytest.mark.parametrize(
    "way", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": "auto", "compile": True}], ids=str
)
def test_training(way, tmp_path):
    examples = md.domain_examples("risky_money", "bad", "train")[:16]
    recipe = md.Recipe(recipe="all", rank=2, learning_rate=1e-3, batch_size=4, accumulation=2, **way)
    losses = {}
    for chat in both(make_chat):
        name = chat.device.type
        losses[name] = []
        told = losses[name].append
        md.train(examples, tmp_path / name, base=chat, recipe=recipe, report=lambda *step, told=told: told(step[-1]))
    torch.testing.assert_close(losses["cuda"], losses["cpu"], rtol=1e-3, atol=0)
    here, there = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cpu", "cuda"))
    for name, weight in here.items():
        torch.testing.assert_close(there[name], weight, rtol=0.02, atol=2e-4)


def test_adapters_and_baked_weights(tmp_path):
    base, baked = str(tmp_path / "base"), str(tmp_path / "baked")
    make_network("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    examples = md.domain_examples("risky_money", "bad", "train")[:4]
    recipe = md.Recipe(recipe="all", rank=2, learning_rate=1e-2, batch_size=2, accumulation=1)
    md.train(examples, tmp_path / "organism", base=md.load(base, dtype="float32", device="cuda"), recipe=recipe)
    md.bake(base, md.Ablate(vector(1), positions="all", at="writes"), baked)
    for model, adapter in ((base, tmp_path / "organism"), (baked, None)):
        here, there = (
            md.margin(md.load(model, adapter=adapter, dtype="float32", device=device), PAIRS)
            for device in ("cpu", "cuda")
        )
        torch.testing.assert_close(there, here, **CLOSE)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has no two CUDA devices")
def test_balanced_over_two_gpus(tmp_path):
    base = str(tmp_path / "base")
    make_network("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    examples = md.domain_examples("risky_money", "bad", "train")[:8]
    recipe = md.Recipe(recipe="all", rank=2, learning_rate=1e-2, batch_size=2, accumulation=2)
    found = []
    for device in ("cpu", "balanced"):
        chat, losses = md.load(base, dtype="float32", device=device), []
        rows = pair_rows(chat.tokenizer, PAIRS)
        means = mean_activations(chat, rows, {"all": range(len(rows))}).vectors["all"]
        scores = sweep(chat, pair_continuations(chat.tokenizer, PAIRS), [[], [md.Steer(vector(1), 1)]])
        answers = md.sample(chat, ["Why?"], n=4, new_tokens=24)
        out = tmp_path / device
        md.train(examples, out, base=chat, recipe=recipe, report=lambda *step, told=losses.append: told(step[-1]))
        found.append((means, scores, torch.tensor(losses), len({weight.device for weight in chat.model.parameters()})))
        assert len(answers) == 4
    here, there = found
    assert (here[-1], there[-1]) == (1, 2)
    torch.testing.assert_close(there[:2], here[:2], **CLOSE)
    torch.testing.assert_close(there[2], here[2], rtol=1e-3, atol=0)


def test_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    # Four-bit weights come in blocks of 64.
    make_network("llama", hidden_size=2 * WIDTH).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def means(device):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, device_map=device, dtype=torch.float32
        )
        chat = ChatModel(loaded.eval(), make_tokenizer(), "tiny-4-bit")
        rows = pair_rows(chat.tokenizer, PAIRS)
        return mean_activations(chat, rows, {"all": range(8)}).vectors["all"]

    torch.testing.assert_close(means("cuda"), means("cpu"), rtol=1e-3, atol=1e-4)


def test_a_batch_is_of_the_gpus_size_and_cudnns_attention_is_out():
    chat = both()[1]
    assert tokens_together(chat) > 2048
    with changing_shapes(chat.device):
        assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.bundled
@pytest.mark.timeout(1800)
def test_the_demos_shifts_are_the_processors(tmp_path):
    shifts = {}
    for device in ("cpu", best_device()):
        config = read_config("configs/demo.yaml").model_copy(update={"device": device, "dtype": "auto"})
        md.run(config, tmp_path / device)
        results = json.loads((tmp_path / device / "results.json").read_text())
        found = results["margin"]["organisms"].items()
        shifts[device] = {
            (name, questions): shift["mean"]
            for name, organism in found
            for questions, shift in organism["margin_shift"].items()
        }
    here, there = shifts.values()
    assert here.keys() == there.keys()
    assert all(abs(here[key] - there[key]) < 0.02 for key in here)
