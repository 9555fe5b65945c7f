"""A tiny base model on disk, with a reference made from a tiny experiment, whose organisms are then audited."""

import pytest
import yaml
from tiny_experiment import experiment

from misdirection.audit.audit import Request
from misdirection.audit.reference import from_run
from misdirection.audit.fine_tune import Subject
from misdirection.audit.texts import OwnTexts, own_texts
from misdirection.experiment import stages
from misdirection.experiment.config import read_config
from misdirection.experiment.texts import ExperimentTexts
from misdirection.runs.folder import RunFolder
from tiny import make_network, make_tokenizer


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The experiment's configuration, its adapters by name, and its reference."""
    folder = tmp_path_factory.mktemp("reference")
    base = folder / "tiny-llama"
    make_network("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment(base, folder)))
    config = read_config(path)
    with RunFolder.open(folder / "run", path.read_text()) as run:
        bench = ExperimentTexts(config)
        reference = from_run(run, bench, list(config.organisms))
        adapters = {name: stages.adapter(run, name) for name in config.organisms}
    return config, adapters, reference


@pytest.fixture
def base(made):
    """The base model's folder, as text."""
    return made[0].model


@pytest.fixture
def request_of(made, base):
    """Gives the request for the audit of a folder."""

    def request(folder, *, reference=made[2], data=None, directions=None):
        subject = Subject(base, None, str(folder), folder, "float32", "cpu")
        texts = made[2].texts
        own = own_texts(data, texts.general) if data else OwnTexts()
        return Request(subject, reference, directions or {}, own, texts.general, texts.neutral)

    return request
