"""Checkpoints of a training as adapter folders by step: from a folder, a repository of the Hub, or its revisions."""

import re
from collections import Counter
from pathlib import Path

from misdirection.errors import InputError
from misdirection.models.adapters import local_adapter, local_checkpoints
from misdirection.models.names import ModelName

FEWEST = 3
"""Of fewer checkpoints nothing can be said to turn."""

_STEP = re.compile(r"(?:step|checkpoint)-(\d+)")


def checkpoint_folders(folder: str | Path) -> dict[int, Path]:
    """Adapter folders by step: `step-N` as an organism keeps them, or `checkpoint-N` as trainers write them.

    Raises `InputError` when there are fewer than three.
    """
    folders = {int(match[1]): path for path in Path(folder).glob("*-*/") if (match := _STEP.fullmatch(path.name))}
    if len(folders) < FEWEST:
        raise InputError(
            f"{folder}: {len(folders)} checkpoints: training dynamics need three; train with keep_checkpoints and a "
            "smaller checkpoint_steps"
        )
    return dict(sorted(folders.items()))


def named_checkpoints(text: str) -> dict[int, Path]:
    """Adapter folders by step, fetched from the Hub if need be.

    Args:
        text: a folder of checkpoint folders, or `ID[@REVISION][:FOLDER]` of the Hub for such a one; or the adapters one
            by one, in the order of the training, with commas between: folders, or `ID[@REVISION][:FOLDER]`. The step of
            one is the N of `step-N` or `checkpoint-N` in its revision or folder; where one has none, they are numbered.

    Raises:
        InputError: what is not there, fewer than three, or two of one step.
    """
    listed = [text] if Path(text).expanduser().exists() else text.split(",")
    names = [ModelName.parse(each.strip()) for each in listed]
    if len(names) == 1:
        return checkpoint_folders(local_checkpoints(*names[0]))
    if len(names) < FEWEST:
        raise InputError(f"checkpoints {text}: {len(names)} of them: training dynamics need three: name more")
    steps = _steps(names)
    if twice := [step for step, count in Counter(steps).items() if count > 1]:
        raise InputError(f"checkpoints {text}: two of them are of step {twice[0]}: name each once")
    folders = [local_adapter(*name) for name in names]
    return dict(sorted(zip(steps, folders, strict=True)))


def _steps(names: list[ModelName]) -> list[int]:
    """The steps that all names say, or else their numbers from 1."""
    places = (f"{name.revision or ''}:{name.subfolder or ''}" for name in names)
    said = [
        _STEP.search(Path(name.name).name if place == ":" else place) for name, place in zip(names, places, strict=True)
    ]
    return [int(match[1]) for match in said if match] if all(said) else list(range(1, len(names) + 1))
