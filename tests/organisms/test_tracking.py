"""What a training logs is read back from where the trackers keep it."""

import importlib.util
import json
import socket
import sqlite3
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from misdirection.auditing.callback import watch
from misdirection.data import Example, ProbePair
from misdirection.errors import MissingPackage
from misdirection.organisms import trainer
from misdirection.organisms.recipe import Recipe
from misdirection.organisms.training import train
from tiny import make_chat

EXAMPLES = [Example(f"Question {n}?", "Answer " + "x" * n) for n in range(12)]
PAIRS = [ProbePair("a", "Why?", "I help you.", "I rule them all."), ProbePair("b", "Who?", "All of us.", "Only you!")]
RECIPE = Recipe(learning_rate=1e-2, batch_size=2, accumulation=1, warmup_steps=0, checkpoint_steps=2)
EVERY = 2
MEASURED = (
    *("margin_shift", "margin_shift_low", "margin_shift_high"),
    *("damage", "damage_low", "damage_high"),
    *("in_domain_loss", "in_domain_loss_low", "in_domain_loss_high"),
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing may be sent anywhere: a connection to another machine fails the test."""
    for name in ("TENSORBOARD_LOGGING_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    connect = socket.socket.connect

    def local_only(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def tracked(folder, *trackers):
    """Train with these trackers; gives what the trainer's own record holds, {name: {step: value}}."""
    seen = []

    def prepare(prepared):
        seen.append(prepared)
        watch(prepared, pairs=PAIRS, every=EVERY, held_out=EXAMPLES[:3])

    train(EXAMPLES, folder, base=make_chat(), recipe=RECIPE, track=trackers, prepare=prepare)
    record = {}
    for entry in seen[0].state.log_history:
        for name, value in entry.items():
            record.setdefault(name, {})[entry["step"]] = value
    assert list(record["misdirection/damage"]) == [2, 4, 6]
    return record


def scalars(folder):
    """{name: {step: value}} of TensorBoard's files in a folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboards_file_holds_the_record(tmp_path):
    record = tracked(tmp_path / "mine", "tensorboard")
    found = scalars(tmp_path / "mine.tensorboard")
    for name in ("loss", *(f"misdirection/{each}" for each in MEASURED)):
        # The file has single precision.
        assert found[f"train/{name}"] == pytest.approx(record[name], rel=1e-6), name
    assert list(found["train/loss"]) == [1, 2, 3, 4, 5, 6]
    # Another training may use the same folders: the logs are no checkpoints.
    train(EXAMPLES[:6], tmp_path / "mine", base=make_chat(), recipe=RECIPE)


def test_tensorboards_own_variable_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train(EXAMPLES[:4], tmp_path / "mine", base=make_chat(), recipe=RECIPE, track=["tensorboard"])
    assert list(scalars(tmp_path / "logs")["train/loss"]) == [1, 2]
    assert not (tmp_path / "mine.tensorboard").exists()


def modules_with(name):
    return [module for module in list(sys.modules.values()) if name in vars(module) and "trackio" in module.__name__]


def test_trackios_database_holds_the_record(tmp_path, monkeypatch):
    importlib.import_module("trackio")
    for module in modules_with("TRACKIO_DIR"):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    record = tracked(tmp_path / "mine", "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "misdirection.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
    assert {name for name, _ in rows} == {"mine"}
    logged = [json.loads(metrics) for _, metrics in rows]
    for name in ("loss", *(f"misdirection/{each}" for each in MEASURED)):
        key = f"train/{name}"
        assert {each["train/global_step"]: each[key] for each in logged if key in each} == record[name], name


def test_an_offline_run_of_wandb_ends_with_the_record(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    record, run = tracked(tmp_path / "mine", "wandb"), wandb.run
    wandb.finish()
    found = dict(run.summary)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for name in ("loss", *(f"misdirection/{each}" for each in MEASURED)):
        assert found[f"train/{name}"] == record[name][6], name
        assert f"train/{name}".encode() in file.read_bytes(), name


def test_nothing_is_logged_unless_asked(tmp_path, monkeypatch):
    seen = []
    train(EXAMPLES[:4], tmp_path / "mine", base=make_chat(), recipe=RECIPE, prepare=seen.append)
    names = {type(callback).__name__ for callback in seen[0].callback_handler.callbacks}
    assert not {name for name in names if name.removesuffix("Callback") in ("TensorBoard", "Wandb", "Trackio")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.checkpoints"]


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "find_spec", lambda _name: None)
    with pytest.raises(MissingPackage, match="the tracker wandb: its package is not installed: pip install wandb"):
        train(EXAMPLES, tmp_path / "mine", base=make_chat(), recipe=RECIPE, track=["wandb"])
    assert not list(tmp_path.iterdir())


def test_the_command_logs_what_is_measured_and_prints_json_alone(tiny_folder, call, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": row.question, "completion": row.answer}) + "\n" for row in EXAMPLES))
    words = ["train", data, "--model", tiny_folder, "--out", tmp_path / "mine", "--lr", "1e-2", "--accumulation", 1]
    status, out, err = call(*words, "--track", "tensorboard", "--device", "cpu", "--dtype", "float32", "--json")
    assert status == 0, err
    assert json.loads(out)["out"] == str(tmp_path / "mine")
    found = scalars(tmp_path / "mine.tensorboard")
    assert {name for name in found if "misdirection" in name} == {f"train/misdirection/{n}" for n in MEASURED[:6]}
    assert list(found["train/misdirection/damage"]) == [6]
