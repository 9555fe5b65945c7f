"""An experiment with an organism of full weights beside adapters: every stage meets it, in this process and counted."""

import pytest

from experiment.tiny_experiment import experiment
from misdirection.errors import InputError
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.cost import estimate_cost
from misdirection.experiment.runner import run_experiment
from misdirection.models.whole_weights import is_whole
from misdirection.settings import validate
from tiny import make_network, make_tokenizer


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """The tiny experiment with `full` in place of all but one adapter."""
    tmp_path = tmp_path_factory.mktemp("full")
    make_network("llama").save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    made = experiment(tmp_path / "tiny", tmp_path)
    full = made["organisms"]["minimal"] | {"recipe": "full", "learning_rate": 1e-3}
    questions = tmp_path / "questions.txt"
    questions.write_text("Why is it so?\n")
    return made | {
        "organisms": {
            "full": full,
            "minimal": made["organisms"]["minimal"],
        },
        "steering": None,
        "ablation": {"layer": 2, "questions": 4},
        "samples": {},
        "sampling": {"questions": [str(questions)], "n": 1, "new_tokens": 2, "ablate": "full"},
    }


def test_every_stage_takes_it_and_figures_name_the_base(values, tmp_path):
    config = ExperimentConfig.model_validate(values)
    results = run_experiment(config, tmp_path / "run")
    organisms = tmp_path / "run" / "artifacts" / "organism"
    assert is_whole(organisms / "full" / "model") and not is_whole(organisms / "minimal" / "adapter")
    full = results.organisms["full"]
    assert full.trainable_parameters > 100 * results.organisms["minimal"].trainable_parameters
    assert full.margin_shift["general"].mean != 0
    assert results.convergence.cosine["full"]["minimal"]
    assert {row.target for row in results.transfer} == {"base", "full", "minimal"}
    answers = {path.name for path in (tmp_path / "run" / "artifacts" / "answers" / "full").iterdir()}
    assert answers == {"plain", "ablated-full", "ablated-random"}


def test_the_plan_counts_what_its_optimiser_holds(values):
    config = ExperimentConfig.model_validate(values)
    full = estimate_cost(config).stages["organism"]
    alone = values | {"organisms": {"minimal": values["organisms"]["minimal"]}}
    alone["sampling"] = None
    small = estimate_cost(ExperimentConfig.model_validate(alone)).stages["organism"]
    # Weights, gradients and two moments in float32, beside the base.
    weights = full.memory.weights / 4
    assert full.memory.optimiser == 16 * weights
    assert small.memory.optimiser < full.memory.optimiser / 100
    # Three passes' worth of products where an adapter over frozen weights takes two.
    assert full.flops - small.flops > 1.2 * small.flops


def test_a_range_of_layers_costs_less(values):
    def of(layers):
        organisms = {"full": values["organisms"]["full"] | {"layers": layers}}
        changes = {"organisms": organisms, "steering": None, "ablation": None, "sampling": None}
        return estimate_cost(ExperimentConfig.model_validate(values | changes)).stages["organism"]

    two, late = of([1, 2]), of([3])
    assert two.memory.optimiser == 2 * late.memory.optimiser > 0
    assert two.flops > late.flops


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"interpretation": {"organism": "full"}}, "'full' has no adapter to read: name another organism"),
        (
            {"sampling": {"engine": {"vllm": {"base_url": "http://localhost:1/v1"}}}},
            "a server has the base, and 'full' is a model of its own",
        ),
    ],
)
def test_what_needs_an_adapter_is_refused_before_any_work(values, changes, said):
    with pytest.raises(InputError, match=said):
        validate(ExperimentConfig, values | changes, "file")
