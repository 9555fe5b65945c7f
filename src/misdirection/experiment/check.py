"""What of an experiment can be told to be impossible before any of its work."""

from misdirection.errors import InputError
from misdirection.experiment.answering import check_behaviour
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.texts import ExperimentTexts
from misdirection.models.weightless import read_structure
from misdirection.organisms.trainee import check_recipe


def check_experiment(config: ExperimentConfig) -> None:
    """Raises `InputError` for a text that cannot be used, a recipe that does not fit the model, and a layer that it has
    not; nothing is loaded but the model's structure."""
    check_behaviour(config.sampling, config.judge)
    ExperimentTexts(config).require_all()
    chat = read_structure(config.model, config.revision).chat
    for name, organism in config.organisms.items():
        try:
            check_recipe(organism.training, chat)
        except InputError as error:
            raise InputError(f"organisms.{name}: {error}") from error
    asked = {"steering.layers": config.steering.layers if config.steering else ()}
    asked["ablation.layer"] = (config.ablation.layer,) if config.ablation else ()
    for key, layers in asked.items():
        if wrong := [layer for layer in layers if layer >= len(chat.layers)]:
            raise InputError(f"{key}: {wrong[0]} is out of range: this model has layers 0 to {len(chat.layers) - 1}")
