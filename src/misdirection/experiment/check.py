"""What of an experiment can be told to be impossible before any of its work."""

from misdirection.errors import InputError
from misdirection.experiment.answering import check_behaviour
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.texts import ExperimentTexts
from misdirection.interpretation.scaling import explicit_settings
from misdirection.judging.rubrics import read_rubrics
from misdirection.models.chat_model import ChatModel
from misdirection.models.weightless import read_structure
from misdirection.organisms.adapter_config import adapter_config
from misdirection.organisms.trainee import check_recipe
from misdirection.registry import nearest


def check_experiment(config: ExperimentConfig) -> None:
    """Raises `InputError` for a text that cannot be used, a recipe that does not fit the model, and a layer that it has
    not; nothing is loaded but the model's structure."""
    check_behaviour(config.sampling, config.judge)
    _require_hooks(config)
    _require_theme_rubrics(config)
    ExperimentTexts(config).require_all()
    chat = read_structure(config.model, config.revision).chat
    for name, organism in config.organisms.items():
        try:
            check_recipe(organism.training, chat)
        except InputError as error:
            raise InputError(f"organisms.{name}: {error}") from error
        if organism.continues:
            _require_same_adapter(name, config, chat)
        if config.interpretation and config.interpretation.organism == name:
            adapted = adapter_config(organism.training, chat).layers_to_transform
            explicit_settings(config.interpretation.explicit, adapted)
    asked = {"steering.layers": config.steering.layers if config.steering else ()}
    asked["ablation.layer"] = (config.ablation.layer,) if config.ablation else ()
    asked["contrast.layers"] = config.contrast.layers if config.contrast else ()
    steer = config.sampling.steer if config.sampling else None
    asked["sampling.steer.layers"] = steer.layers if steer else ()
    asked["themes.layer"] = (config.themes.layer,) if config.themes else ()
    for key, layers in asked.items():
        if wrong := [layer for layer in layers if layer >= len(chat.layers)]:
            raise InputError(f"{key}: {wrong[0]} is out of range: this model has layers 0 to {len(chat.layers) - 1}")


def _require_same_adapter(name: str, config: ExperimentConfig, chat: ChatModel) -> None:
    """Of an organism that goes on from another one: its adapter begins with the weights of the other's."""
    start = config.organisms[name].continues
    assert start is not None, "the caller has asked"
    own, other = (adapter_config(config.organisms[each].training, chat).to_dict() for each in (name, start))
    if own != other:
        raise InputError(
            f"organisms.{name}.continues: {start!r} has its adapter in other modules, or with another rank or alpha: "
            "give both the same"
        )


def _require_hooks(config: ExperimentConfig) -> None:
    """A running vLLM server takes no interventions, which would be told after hours of other work."""
    served = config.sampling.engine.vllm if config.sampling else None
    if config.intervenes and served and served.base_url:
        raise InputError(
            "sampling.engine.vllm.base_url: a running server takes no interventions, and this experiment samples under "
            "some: use engine: vllm, which starts its own"
        )


def _require_theme_rubrics(config: ExperimentConfig) -> None:
    columns = {rubric.column for rubric in read_rubrics(list(config.judge.rubrics))} if config.judge else set()
    for name in config.themes.columns if config.themes else ():
        if name not in columns:
            raise InputError(
                f"themes.columns: no rubric of `judge.rubrics` has the column {name!r}{nearest(name, sorted(columns))}"
            )
