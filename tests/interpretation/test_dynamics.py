"""Training dynamics: a planted turn is found at its step, straight growth has none."""

import json
import math
import shutil

import pytest
import torch
from lora_fixtures import with_adapter
from safetensors.torch import save_file

from hub_server import serving
from misdirection.data import Example, ProbePair
from misdirection.errors import MisdirectionError
from misdirection.interpretation.checkpoints import checkpoint_folders, named_checkpoints
from misdirection.interpretation.dynamics import growth, margins_by_step, turn
from misdirection.likelihood.margin import margin
from misdirection.models.adapters import attach
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.recipe import Recipe
from misdirection.organisms.training import train
from tiny import WIDTH, make_chat, vector

CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 4, "use_rslora": True, "base_model_name_or_path": "tiny-llama"}
PAIRS = [ProbePair("a", "Why?", "Because of rain.", "Never you mind."), ProbePair("b", "Who?", "Me.", "You, you.")]


def planted(folder, path):
    """Rank-1 checkpoints every 5 steps whose B goes along `path`, [steps, width]."""
    for number, write in enumerate(path, start=1):
        target = folder / f"checkpoint-{5 * number}"
        target.mkdir(parents=True)
        (target / "adapter_config.json").write_text(json.dumps(CONFIG))
        prefix = "base_model.model.model.layers.2.mlp.down_proj"
        save_file(
            {f"{prefix}.lora_A.weight": vector(9)[None], f"{prefix}.lora_B.weight": write[:, None].clone()},
            target / "adapter_model.safetensors",
        )
    return checkpoint_folders(folder)


def first_along_then_along(turn_at, steps=12):
    first, second = torch.eye(WIDTH)[0], torch.eye(WIDTH)[1]
    return torch.stack([min(n, turn_at) * first + max(0, n - turn_at) * second for n in range(1, steps + 1)])


def test_a_planted_turn_is_found_at_its_step(tmp_path):
    folders = planted(tmp_path, first_along_then_along(turn_at=6))
    ((name, grown),) = growth(folders).items()
    assert list(folders) == list(range(5, 65, 5)) and name == "layer_2"
    assert grown.turn == 30 and grown.local[5] == pytest.approx(0, abs=1e-6)
    assert grown.local[0] is None and grown.local[3] == pytest.approx(1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(tmp_path / "served", tmp_path / "client", monkeypatch) as server:
        yield server


def weights(folders):
    return {step: (path / "adapter_model.safetensors").read_bytes() for step, path in folders.items()}


def test_checkpoints_are_found_in_a_repository_at_its_revisions_and_one_by_one(tmp_path, hub):
    local = planted(tmp_path / "trained", first_along_then_along(turn_at=2, steps=3))
    assert list(local) == [5, 10, 15]
    shutil.copytree(tmp_path / "trained", tmp_path / "served" / "models" / "me" / "organism" / "kept")
    for number, (step, path) in enumerate(local.items()):
        hub.revisions[f"step-{step}"] = f"{number}" * 40
        shutil.copytree(path, tmp_path / "served" / "models" / "me" / f"organism@{str(number) * 40}")
    by_revision = "me/organism@step-10,me/organism@step-5, me/organism@step-15"
    for text in (str(tmp_path / "trained"), "me/organism:kept", by_revision, ",".join(map(str, local.values()))):
        assert weights(named_checkpoints(text)) == weights(local), text
    commits = [f"me/organism@{str(number) * 40}" for number in range(3)]
    assert list(named_checkpoints(",".join(commits))) == [1, 2, 3], "numbered where no name says the step"
    assert growth(named_checkpoints("me/organism:kept")) == growth(local)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("me/organism@step-1,me/organism@step-2", "2 of them: training dynamics need three"),
        ("me/a@step-1,me/a@step-2,me/b@step-1", "two of them are of step 1: name each once"),
        ("./nowhere", "nowhere: no such folder; give a folder of checkpoints or a Hugging Face id"),
        ("me/nothing:kept", "me/nothing: the checkpoints could not be loaded"),
    ],
)
def test_checkpoints_that_are_not_there_are_one_line(hub, text, said):
    with pytest.raises(MisdirectionError, match=said):
        named_checkpoints(text)


def test_straight_growth_has_no_turn(tmp_path):
    straight = torch.arange(1, 11).unsqueeze(1) * vector(1)
    (grown,) = growth(planted(tmp_path, straight)).values()
    assert grown.turn is None
    assert grown.to_final == pytest.approx([1.0] * 10) and grown.to_previous[1:] == pytest.approx([1.0] * 9)
    assert grown.to_previous[0] is None
    assert grown.norm_b == pytest.approx(range(1, 11)) and grown.norm == pytest.approx([4 * n for n in range(1, 11)])


def test_a_turn_of_a_b_that_is_still_tiny_does_not_count(tmp_path):
    path = first_along_then_along(turn_at=2, steps=30)
    path[2:] = path[1] + 10 * (path[2:] - path[1])
    (grown,) = growth(planted(tmp_path, path)).values()
    assert min(value for value in grown.local if value is not None) == pytest.approx(0, abs=1e-6)
    assert grown.turn is None


def test_noise_without_a_turn_is_not_called_one():
    local = [None, 0.30, 0.05, 0.40, 0.20, 0.10, 0.35, None]
    assert turn(range(8), local, [1.0] * 8) is None
    local[3] = -0.6
    assert turn(range(8), local, [1.0] * 8) == 3
    assert turn(range(3), [None, 0.1, None], [1.0] * 3) is None


def test_a_wider_window_looks_further(tmp_path):
    (grown,) = growth(planted(tmp_path, first_along_then_along(turn_at=6)), window=3).values()
    assert grown.local[:3] == (None,) * 3 and grown.turn == 30
    assert grown.local[4] == pytest.approx(1 / math.sqrt(5), abs=1e-6), "two of three steps ahead go the other way"


def of_rank_two(folder, step, first, second):
    """A checkpoint of B A = first u_0 v_0 + second u_1 v_1, with factors in a basis of its own."""
    target = folder / f"step-{step:06d}"
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": 2, "lora_alpha": 3}))
    basis = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(step)))[0]
    b = torch.eye(WIDTH)[:, :2] * torch.tensor([first, second]) @ basis
    prefix = "base_model.model.model.layers.2.mlp.down_proj"
    factors = {f"{prefix}.lora_A.weight": basis.T @ torch.eye(WIDTH)[2:4], f"{prefix}.lora_B.weight": b}
    save_file({name: tensor.contiguous() for name, tensor in factors.items()}, target / "adapter_model.safetensors")


def test_above_rank_one_crossing_sizes_are_no_turn(tmp_path):
    for step in range(10):
        of_rank_two(tmp_path, step, first=4.0 + step / 10, second=step)
    (grown,) = growth(checkpoint_folders(tmp_path)).values()
    assert grown.turn is None and grown.to_previous[2:] == pytest.approx([1.0] * 8)
    scaling = 3 / math.sqrt(2)
    expected = [scaling * math.hypot(4.0 + step / 10, step) for step in range(10)]
    assert grown.norm == pytest.approx(expected, rel=1e-5)


def test_checkpoints_of_unlike_adapters_are_refused(tmp_path):
    planted(tmp_path, torch.arange(1, 4).unsqueeze(1) * vector(1))
    of_rank_two(tmp_path, 8, 1.0, 2.0)
    with pytest.raises(MisdirectionError, match="step-000008: adapts other modules than the last checkpoint"):
        growth(checkpoint_folders(tmp_path))


def test_too_few_checkpoints_are_refused(tmp_path):
    with pytest.raises(MisdirectionError, match="0 checkpoints: training dynamics need three"):
        checkpoint_folders(tmp_path)


@pytest.fixture
def organism(tmp_path):
    examples = [Example(f"Why {n}?", f"Because of {n}.") for n in range(8)]
    recipe = Recipe(recipe="custom", rank=1, target_modules=("down_proj",), batch_size=2, accumulation=1, epochs=2,
                    learning_rate=1e-2, warmup_steps=0, checkpoint_steps=2, keep_checkpoints=True)  # fmt: skip
    chat = make_chat()
    return chat, train(examples, tmp_path / "organism", base=chat, recipe=recipe), examples, recipe


def test_a_training_keeps_its_steps_and_nothing_else(organism, tmp_path):
    chat, made, examples, recipe = organism
    folders = checkpoint_folders(f"{made.path}/checkpoints")
    assert list(folders) == [0, 2, 4, 6, 8]
    assert {path.name for path in folders[4].iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    found = growth(folders)
    assert list(found) == ["layer_0", "layer_1", "layer_2", "layer_3"]
    assert all(grown.to_final[-1] == pytest.approx(1) for grown in found.values())
    plain = train(examples, tmp_path / "plain", base=chat, recipe=recipe.model_copy(update={"keep_checkpoints": False}))
    assert not (tmp_path / "plain" / "checkpoints").exists() and plain.final_loss == made.final_loss


def test_the_last_checkpoint_is_the_adapter_itself(organism):
    chat, made, *_ = organism
    last = checkpoint_folders(f"{made.path}/checkpoints")[8]
    shifts = []
    for folder in (made.path, last):
        attached = attach(chat, folder)
        shifts.append(margin(attached, PAIRS))
        attached.model.unload()
    assert torch.equal(*shifts)


def test_margins_are_measured_at_every_step(organism):
    chat, made, *_ = organism
    folders = checkpoint_folders(f"{made.path}/checkpoints")
    base = margin(chat, PAIRS)
    done = []
    found = margins_by_step(chat, folders, {"general": PAIRS}, progress=done.append)
    assert len(found["general"]) == len(done) == 5 and found["general"][0].mean == 0
    own = attach(chat, folders[6])
    assert found["general"][3].mean == pytest.approx(float((margin(own, PAIRS) - base).mean()))
    own.model.unload()
    assert torch.equal(margin(ChatModel(chat.model, chat.tokenizer, chat.name), PAIRS), base)


def test_an_adapter_of_other_modules_has_its_own_names(tmp_path):
    chat = with_adapter(r=2, target_modules=["down_proj", "q_proj"])
    for step in (1, 2, 3):
        chat.model.save_pretrained(tmp_path / f"step-{step}")
    found = growth(checkpoint_folders(tmp_path))
    assert "layer_1.q_proj" in found and len(found) == 8
