"""Control vectors to and from repeng itself.

repeng 0.4.0 pins numpy below 2, so it runs in an environment of its own: the two of them, and behind them the packages
of the environment that runs the tests.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from misdirection.directions.direction import Direction, Origin
from misdirection.directions.formats import export_direction, import_direction
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Steer
from tiny import LAYERS, WIDTH, make_chat

PACKAGES = ("numpy<2", "repeng==0.4.0")
IDS = torch.tensor([[5, 9, 17, 33, 65, 129]])
COEFFICIENT = 1.5

IN_REPENG = """
import json, sys
from pathlib import Path
import numpy as np, torch, transformers
from repeng import ControlModel, ControlVector

folder = Path(sys.argv[1])
asked = json.loads((folder / "asked.json").read_text())
vector = ControlVector.import_gguf(folder / "ours.gguf")
np.savez(folder / "read.npz", **{str(layer): row for layer, row in vector.directions.items()})

mine = ControlVector("llama", {layer: np.full(asked["width"], layer + 0.1, np.float32) for layer in (2, 1)})
mine.export_gguf(folder / "theirs.gguf")

logits = {}
network = transformers.LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
for layer in range(1, asked["layers"]):
    control = ControlModel(network, [layer])
    control.set_control(vector, asked["coefficient"])
    with torch.no_grad():
        logits[str(layer)] = control(input_ids=torch.tensor(asked["ids"])).logits.numpy()
    control.unwrap()
np.savez(folder / "logits.npz", **logits)
print(json.dumps({"numpy": np.__version__, "hint": vector.model_type}))
"""


@dataclass(frozen=True)
class Result:
    """What repeng made of our file, and its own file."""

    folder: Path
    said: dict[str, Any]
    direction: Direction
    chat: Any


def python_with_repeng(folder: Path) -> Path:
    """An interpreter that finds numpy 1 and repeng first, then everything that this one has."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "30"]
    install = [sys.executable, "-m", "pip", "--python", python, "install", *options, *PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {' and '.join(PACKAGES)}: {done.stderr.strip().splitlines()[-1]}")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-E", "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    # The paths of a .pth file come after the folder that it lies in.
    behind = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(own) / "behind.pth").write_text("\n".join(behind))
    return python


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repeng")
    python = python_with_repeng(folder / "environment")
    chat = make_chat("llama")
    chat.model.save_pretrained(folder / "model")
    vectors = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(1))
    origin = Origin("data_difference", chat.name, None, "", "", {}, {}, "float32")
    direction = Direction(vectors, origin)
    export_direction(direction, folder / "ours.gguf", model_type="llama")
    asked = {"ids": IDS.tolist(), "layers": LAYERS, "width": WIDTH, "coefficient": COEFFICIENT}
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "script.py").write_text(IN_REPENG)
    done = subprocess.run([python, "-E", folder / "script.py", folder], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return Result(folder, json.loads(done.stdout.splitlines()[-1]), direction, chat)


def test_repeng_reads_our_file_to_the_last_bit(result):
    assert result.said["numpy"].startswith("1.")
    assert result.said["hint"] == "llama"
    with np.load(result.folder / "read.npz") as read:
        assert sorted(read.files) == ["1", "2", "3"]
        for layer in range(1, LAYERS):
            assert read[str(layer)].dtype == np.float32
            assert read[str(layer)].tobytes() == result.direction[layer].numpy().tobytes()


def test_repeng_steers_the_block_that_we_steer(result):
    with torch.no_grad():
        bare = result.chat.model(input_ids=IDS).logits
    with np.load(result.folder / "logits.npz") as logits:
        for layer in range(1, LAYERS):
            steering = Steer(result.direction[layer], layer, COEFFICIENT, "all")
            with torch.no_grad(), intervene(result.chat, [steering]):
                ours = result.chat.model(input_ids=IDS).logits
            assert (ours - bare).abs().max() > 0.01
            torch.testing.assert_close(torch.from_numpy(logits[str(layer)]), ours, atol=1e-5, rtol=1e-5)


def test_we_read_the_file_of_repeng(result, caplog):
    read = import_direction(result.folder / "theirs.gguf", model="m", layers=LAYERS)
    expected = np.zeros((LAYERS, WIDTH), np.float32)
    expected[1], expected[2] = np.float32(1.1), np.float32(2.1)
    assert read.vectors.numpy().tobytes() == expected.tobytes()
    assert (read.origin.kind, read.origin.model) == ("imported", "m")
    assert "no vector for layer 0, 3: zero there" in caplog.text
