"""A stage of another package is counted without a word about its cost."""

from functools import partial

import pytest

from experiment.tiny_experiment import experiment
from misdirection.cost.recording import record_passes
from misdirection.data import probe_pairs
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.cost import estimate_cost
from misdirection.experiment.experiment import STAGES, Stage
from misdirection.likelihood.margin import margin
from tiny import make_chat


class ShortMargin(Stage):
    """The margin of every model on two pairs."""

    name = "short_margin"
    VERSION = 1
    after = ("organism",)

    def tasks(self):
        models = self.experiment.models
        return [self.task(model, {model: {}}, partial(_measure, model)) for model in models]


def _measure(model, worker, folders):
    (folder,) = folders.values()
    (folder / "margin.txt").write_text(str(margin(worker.chat(model), probe_pairs()[:2])))


@pytest.fixture
def registered():
    STAGES.register(ShortMargin.name)(ShortMargin)
    yield
    STAGES.remove(ShortMargin.name)


def test_a_registered_stage_is_counted_by_running_it(registered, tiny_folder, tmp_path):
    config = ExperimentConfig.model_validate(experiment(tiny_folder, tmp_path))
    estimate = estimate_cost(config)
    chat = make_chat("llama")
    with record_passes(chat) as passes:
        margin(chat, probe_pairs()[:2])
    cost = estimate.stages["short_margin"]
    assert cost.tasks == 4
    assert cost.forward_tokens == 4 * sum(each.tokens for each in passes) > 0
    assert estimate.total.flops > cost.flops > 0
