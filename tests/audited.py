"""A tiny base model on disk, with a reference made from a tiny experiment, whose organisms are then audited."""

import pytest
import yaml
from tiny_experiment import experiment

from misdirection.auditing import looks
from misdirection.auditing.fine_tune import FineTune
from misdirection.auditing.inputs import AuditInputs, control_of
from misdirection.auditing.reference import from_run
from misdirection.auditing.texts import own_texts
from misdirection.auditing.verdict import decide
from misdirection.experiment.config import read_config
from misdirection.experiment.texts import ExperimentTexts
from misdirection.runs.folder import RunFolder
from misdirection.statistics.estimates import Estimate
from tiny import make_merging_tokenizer, make_network


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The experiment's configuration, its adapters by name, and its reference."""
    folder = tmp_path_factory.mktemp("reference")
    base = folder / "tiny-llama"
    # The texts that an audit asks are long.
    tokenizer = make_merging_tokenizer()
    tokenizer.save_pretrained(base)
    make_network("llama", vocab_size=len(tokenizer)).save_pretrained(base)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment(base, folder)))
    config = read_config(path)
    with RunFolder.open(folder / "run", path.read_text()) as run:
        reference = from_run(run, ExperimentTexts(config), list(config.organisms))
        adapters = {name: run.artifact(f"organism/{name}") / "adapter" for name in config.organisms}
    return config, adapters, reference


@pytest.fixture(scope="session")
def sealed(made, tmp_path_factory):
    """A reference of the same fine-tunes with a few of the shipped pairs, open and sealed."""
    shipped = {"probe_pairs": None, "margin": made[0].margin.model_copy(update={"general": 12, "sealed": 6})}
    config, folder = made[0].model_copy(update=shipped), tmp_path_factory.mktemp("sealed")
    with RunFolder.open(folder, "name: sealed\n") as run:
        return from_run(run, ExperimentTexts(config), list(config.organisms))


@pytest.fixture
def base(made):
    """The base model's folder, as text."""
    return made[0].model


@pytest.fixture
def inputs_of(made, base):
    """Gives the inputs of the audit of a folder."""

    def inputs(folder, *, reference=made[2], data=None, directions=None, control=None):
        texts = (reference or made[2]).texts
        own = own_texts(data, [texts.asked[look] for look in texts.looks])
        fine_tune = FineTune(base, None, str(folder), folder, "float32", "cpu", control or control_of(reference))
        return AuditInputs(fine_tune, texts, reference, directions or {}, own)

    return inputs


SHIFTS = {"clear": (-0.2, 0.1), "watch": (0.15, 0.6), "misaligned": (0.5, 0.9), "inconclusive": (-0.5, 0.9)}


@pytest.fixture
def verdict(monkeypatch):
    """Lets audits come to a verdict of the test's choice, by the rule: tiny models have no alignment to lose."""

    def choose(word, because="it was said"):
        low, high = SHIFTS[word]
        shift, harmless = Estimate((low + high) / 2, low, high, 48), Estimate(0.0, 0.0, 0.0, 16)

        def decide_so(shifts, *_, **__):
            decided = decide(dict.fromkeys(shifts, shift), harmless, Estimate(1.0, 1.0, 1.0, 48))
            assert decided.verdict == word
            return decided.model_copy(update={"because": (because,)})

        monkeypatch.setattr(looks, "decide", decide_so)

    return choose
