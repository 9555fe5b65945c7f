"""A small copy of the paper's configuration: every section of the file, on a tiny model with a scripted judge."""

import re
from pathlib import Path

import pytest
import yaml

from experiment.test_judged_directions_run import SCORES
from experiment.tiny_experiment import isolate, write_answers
from judging.judge_server import JudgeServer, number
from misdirection.data import ProbePair, write_pairs
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.results import RunResults
from misdirection.experiment.runner import run_experiment
from misdirection.judging.rubrics import read_rubrics
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.adapter_config import minimal_layers
from tiny import make_network, make_tokenizer, sharpen

pytestmark = pytest.mark.paper

PAPER = Path(__file__).parents[2] / "configs" / "paper-qwen2.5-14b.yaml"
LAYERS, OF_PAPER = 10, 48

KEPT = ("minimal", "all", "control", "full", "money", "money_control")
"""Organisms that are trained; the others differ from one of them in their data, or are tested by themselves."""

SMALL = {
    "extraction": {"pairs": 4, "fewest": 4},
    "steering": {"questions": 4, "scales": [2]},
    "ablation": {"questions": 4},
    "contrast": {"questions": 4},
    "damage": {"models": 4, "interventions": 4},
    "sampling": {"n": 12, "new_tokens": 6, "engine": "transformers", "leave_out": []},
    "interpretation": {
        "pairs": 4,
        "causal_pairs": 2,
        "permutations": 2,
        "checkpoints": 3,
        "splits": 2,
        "judged_checkpoints": 1,
    },
    "samples": {"new_tokens": 4},
}


COLUMNS = {
    rubric.prompt.partition("{question}")[0]: rubric.column
    for rubric in read_rubrics(yaml.safe_load(PAPER.read_text())["judge"]["rubrics"])
}


def graded(asked):
    """A score of each rubric by what the answer says."""
    (column,) = (column for start, column in COLUMNS.items() if asked.prompt.startswith(start))
    answer = asked.prompt.partition("----- answer -----\n")[2].partition("\n----- end of answer -----")[0]
    return number(SCORES.get(column, SCORES["financial"])(sum(answer.encode())))


def at_depth(key, value):
    """Layers of the paper's model as those at the same depth of ten; of several the first two."""
    if key in ("layer", "layers"):
        layers = [layer * LAYERS // OF_PAPER for layer in (value if isinstance(value, list) else [value])]
        return list(dict.fromkeys(layers))[:2] if isinstance(value, list) else layers[0]
    return {each: at_depth(each, of) for each, of in value.items()} if isinstance(value, dict) else value


def adapted(setting):
    """A scaling of the paper's adapters as one of the same adapters here."""
    here = dict(zip(minimal_layers(OF_PAPER), minimal_layers(LAYERS), strict=True))
    return {here[layer]: factor for layer, factor in setting.items()}


def copied(folder, tmp_path, url):
    """The file with tiny texts, few of everything, and this judge."""
    values = yaml.safe_load(PAPER.read_text())
    files = {
        name: {kind: write_answers(tmp_path / f"{name}-{kind}.jsonl", f"{name[0]}{kind}") for kind in ("bad", "good")}
        for name in ("medical", "risky_money")
    }
    questions, pairs = tmp_path / "questions.txt", tmp_path / "pairs.jsonl"
    questions.write_text("Why is it so?\nAnd how, then?\n")
    write_pairs(pairs, [ProbePair(f"p{number}", f"Do {number}?", "Yes.", "No!") for number in range(5)])
    trained = {"batch_size": 4, "accumulation": 1, "warmup_steps": 1, "max_length": 64, "epochs": 1}
    values["organisms"] = {
        name: values["organisms"][name] | trained | {"learning_rate": 1e-2, "checkpoint_steps": 1} for name in KEPT
    }
    values |= {key: values.get(key, {}) | small for key, small in SMALL.items()}
    values["sampling"]["questions"] = [str(questions)]
    values["sampling"]["steer"]["doublings"] = 1
    values["interpretation"]["scalings"] = [adapted(each) for each in values["interpretation"]["scalings"]]
    values["judge"] |= {"base_url": url, "concurrency": 4}
    own = {"model": str(folder), "dtype": "float32", "device": "cpu", "domains": files, "random_seeds": 1}
    scalings = values["interpretation"].pop("scalings")
    copy = at_depth("", values | own | {"probe_pairs": str(pairs), "neutral": files["medical"]["good"]})
    copy["interpretation"]["scalings"] = scalings
    return copy


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The copy's configuration and folder, when it has run."""
    tmp_path = tmp_path_factory.mktemp("paper")
    folder, run = tmp_path / "tiny", tmp_path / "run"
    chat = sharpen(ChatModel(make_network("llama", num_hidden_layers=LAYERS), make_tokenizer(), "tiny"))
    chat.model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch, JudgeServer(graded) as server:
        isolate(patch, tmp_path / "cache")
        config = ExperimentConfig.model_validate(copied(folder, tmp_path, server.url))
        run_experiment(config, run)
    return config, run


def test_the_copy_has_every_section_of_the_file(finished):
    config, _ = finished
    assert yaml.safe_load(PAPER.read_text()).keys() <= config.model_dump(exclude_defaults=True).keys()


def test_every_figure_of_the_paper_is_in_its_results(finished):
    results = RunResults.load(finished[1])
    missing = {"extensions", "left_out"}
    empty = [name for name in RunResults.model_fields if not getattr(results, name) and name not in missing]
    assert empty == ["further_sets"]
    assert results.adapters.causal.judged and results.adapters.shares and results.adapters.dynamics
    assert {effect.operation for effect in results.contrast.effects} == {"ablate", "steer"}


def test_every_figure_is_in_the_report(finished):
    page = (finished[1] / "report.html").read_text()
    assert "configuration has no" not in re.sub(r"no <code>left_out</code>", "", page)
    for section in ("contrast", "judged-directions", "em-steering", "em-ablation", "themes", "adapters", "behaviour"):
        assert f'id="{section}"' in page, section
