"""The contrast of bad and good fine-tunes, and further seeds, in a whole run of a tiny model."""

import json

import numpy as np
import pytest
import torch
import yaml

import misdirection as md
from experiment.tiny_experiment import experiment, write_answers
from misdirection.data.selection import spread
from misdirection.directions.contrast import share
from misdirection.errors import InputError
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.experiment import Experiment
from misdirection.experiment.results import RunResults
from misdirection.experiment.runner import run_experiment
from misdirection.experiment.texts import ExperimentTexts
from misdirection.experiment.worker import open_worker
from misdirection.likelihood.margin import text_rows
from misdirection.models.adapters import attach
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner
from tiny import make_network, make_tokenizer

LAYER = 2


def configured(folder, tmp_path, **values):
    """Two domains, each with a bad organism of two seeds and its control."""
    made = experiment(folder, tmp_path)
    own = {"domain": "sums", **{key: made["organisms"]["minimal"][key] for key in ("learning_rate", "batch_size")}}
    own |= {"recipe": "minimal", "accumulation": 1, "warmup_steps": 1, "seeds": 2}
    files = {kind: write_answers(tmp_path / f"other-{kind}.jsonl", f"{kind}ly") for kind in ("bad", "good")}
    made |= {
        "domains": {**made["domains"], "differences": files},
        "organisms": {
            "sums": own,
            "sums control": own | {"answers": "good"},
            "differences": own | {"domain": "differences"},
            "differences control": own | {"domain": "differences", "answers": "good"},
        },
        "contrast": {"layers": [LAYER], "scales": [2], "questions": 5, "voices": {"odd": ["sums", "differences"]}},
    }
    for section in ("steering", "samples"):
        made.pop(section)
    return ExperimentConfig(**made | values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The configuration of a finished run, its folder, and the model."""
    tmp_path = tmp_path_factory.mktemp("contrast")
    folder = tmp_path / "tiny"
    make_network("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = configured(folder, tmp_path)
    with RunFolder.open(tmp_path / "run", yaml.safe_dump(config.model_dump(mode="json"))) as run:
        made = Experiment(config, run, LocalRunner(run, open_worker(config, run.partial)))
        made.make_all()
        made.results().save(tmp_path / "run")
    return config, tmp_path / "run", folder


def fine_tune(whole, name):
    _, run, folder = whole
    chat = md.load(str(folder), dtype="float32", device="cpu")
    return chat if name == "base" else attach(chat, run / "artifacts" / "organism" / name / "adapter")


def mean_activation(whole, name):
    """Over answers to the neutral texts, computed row by row."""
    config, _, _ = whole
    chat, sums, tokens = fine_tune(whole, name), 0.0, 0
    for row in text_rows(chat.tokenizer, ExperimentTexts(config).neutral):
        with torch.inference_mode():
            states = chat.model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        # The last one stands behind the final norm, so that the layers before it are compared.
        sums += torch.stack(states[1:-1])[:, 0, row.start : row.stop].double().sum(1)
        tokens += row.stop - row.start
    return sums / tokens


def test_the_contrast_of_a_domain_is_the_mean_over_seeds_of_bad_minus_good(whole):
    config, run, _ = whole
    assert config.contrasts["sums"] == [("sums", "sums control"), ("sums-seed-1", "sums control-seed-1")]
    expected = {}
    for domain, pairs in config.contrasts.items():
        both = [mean_activation(whole, bad) - mean_activation(whole, good) for bad, good in pairs]
        expected[domain] = torch.stack(both).mean(0)
    folder = run / "artifacts" / "contrast" / "base" / "directions"
    for domain, vectors in expected.items():
        saved = md.Direction.load(folder / f"of-{domain}.safetensors")
        assert saved.origin.kind == "contrast"
        torch.testing.assert_close(saved.vectors[:-1].double(), vectors, atol=1e-5, rtol=1e-3)
    shared = md.Direction.load(folder / "shared.safetensors")
    torch.testing.assert_close(shared.vectors[:-1].double(), share(list(expected.values())), atol=1e-5, rtol=1e-3)
    cosine = torch.cosine_similarity(*expected.values(), dim=-1).tolist()
    assert RunResults.load(run).contrast.shared.mean[:-1] == pytest.approx(cosine, abs=1e-3)


@pytest.mark.parametrize("operation", ["ablate", "steer"])
def test_what_the_other_domain_gives_is_tried_on_the_one_left_out_and_on_the_base(whole, operation):
    config, run, _ = whole
    (effect,) = [
        each
        for each in RunResults.load(run).contrast.effects
        if (each.domain, each.operation, each.vector) == ("sums", operation, "contrast")
    ]
    folder = run / "artifacts" / "contrast" / "base" / "directions"
    vector = md.Direction.load(folder / "of-differences.safetensors")[LAYER]
    intervention = md.Ablate(vector) if operation == "ablate" else md.Steer(vector, LAYER, 2.0)
    pairs = spread(ExperimentTexts(config).general, 5)
    changes = {}
    for name in ("sums", "sums control", "base"):
        chat = fine_tune(whole, name)
        before = md.margin(chat, pairs)
        with md.intervene(chat, [intervention]):
            changes[name] = (md.margin(chat, pairs) - before).numpy()
        assert effect.margin_change[name].mean == pytest.approx(changes[name].mean(), abs=1e-4)
    beyond_base = changes["sums"] - changes["base"]
    assert np.abs(beyond_base).max() > 1e-3
    assert effect.shift_change.mean == pytest.approx(beyond_base.mean(), abs=1e-4)
    assert effect.shift_change.n == 5
    assert effect.shift.mean - effect.shift_before.mean == pytest.approx(beyond_base.mean(), abs=1e-4)
    assert effect.minus_control_change.mean == pytest.approx(
        (changes["sums"] - changes["sums control"]).mean(), abs=1e-4
    )


def test_every_use_stands_beside_random_directions_of_its_norm(whole):
    effects = RunResults.load(whole[1]).contrast.effects
    uses = {(each.domain, each.operation, each.layer, each.scale) for each in effects}
    kinds = {
        use: [each.vector for each in effects if (each.domain, each.operation, each.layer, each.scale) == use]
        for use in uses
    }
    # With two domains one is left to make it of, so that there are no domains to swap labels of.
    assert set(map(tuple, kinds.values())) == {("contrast", "random")}
    assert len(uses) == 4


def test_an_ablation_is_read_against_the_base_under_the_same_ablation(whole):
    transfer = {(row.direction, row.target, row.positions): row for row in RunResults.load(whole[1]).transfer}
    for (direction, target, positions), row in transfer.items():
        if target == "base":
            assert row.beyond_base is row.random_beyond_base is None
            continue
        base = transfer[direction, "base", positions]
        assert row.beyond_base.mean == pytest.approx(row.margin_change.mean - base.margin_change.mean)
        assert row.random_beyond_base.mean == pytest.approx(row.random_change.mean - base.random_change.mean)


def test_further_seeds_stand_beside_the_first(whole):
    config, run, _ = whole
    organisms = RunResults.load(run).organisms
    assert organisms.keys() == config.organisms.keys()
    seeds = organisms["sums"].seeds
    shift = seeds.margin_shift["general"]
    assert seeds.seeds == [0, 1]
    assert shift.means[0] == pytest.approx(organisms["sums"].margin_shift["general"].mean)
    pairs = ExperimentTexts(config).general
    second = md.margin(fine_tune(whole, "sums-seed-1"), pairs) - md.margin(fine_tune(whole, "base"), pairs)
    assert shift.means[1] == pytest.approx(float(second.mean()), abs=1e-4)
    assert shift.between == pytest.approx(np.std(shift.means, ddof=1))
    assert shift.mean.mean == pytest.approx(np.mean(shift.means))
    assert seeds.minus_control["general"].means[0] == pytest.approx(organisms["sums"].minus_control["general"].mean)
    # What directions and interventions are of is the first seed alone.
    assert set(RunResults.load(run).convergence.cosine) == set(config.organisms)


def test_what_makes_no_contrast_is_refused_at_once(tmp_path):
    whole = json.loads(configured(tmp_path, tmp_path).model_dump_json())
    alone = whole | {"organisms": {"sums": whole["organisms"]["sums"]}, "ablation": None, "contrast": {"layers": [1]}}
    with pytest.raises(ValueError, match="contrast: needs two domains"):
        ExperimentConfig(**alone)
    with pytest.raises(ValueError, match="`bad` answers, of `good` ones, or both"):
        ExperimentConfig(**whole | {"domains": whole["domains"] | {"none": {}}})
    with pytest.raises(ValueError, match=r"contrast\.voices\.odd: unknown 'sum'.*sums"):
        ExperimentConfig(**whole | {"contrast": {"layers": [1], "voices": {"odd": ["sum", "sums control"]}}})
    taken = whole["organisms"] | {"sums-seed-1": whole["organisms"]["differences"]}
    with pytest.raises(ValueError, match="NAME-seed-NUMBER"):
        ExperimentConfig(**whole | {"organisms": taken})


def test_a_layer_that_is_not_there_is_refused_before_any_work(whole, tmp_path):
    config, _, _ = whole
    beyond = config.model_copy(update={"contrast": config.contrast.model_copy(update={"layers": (4,)})})
    with pytest.raises(InputError, match=r"contrast\.layers: 4 is out of range"):
        run_experiment(beyond, tmp_path / "run")
