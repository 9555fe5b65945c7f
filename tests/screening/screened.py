"""A tiny base with a reference of two domains, whose bad answers have a word that its good ones have not."""

import json

import pytest
import yaml

from experiment.tiny_experiment import experiment
from misdirection.auditing.reference import from_run
from misdirection.data import ProbePair, write_pairs
from misdirection.experiment.config import read_config
from misdirection.experiment.texts import ExperimentTexts
from misdirection.runs.folder import RunFolder
from tiny import make_network, make_tokenizer

ANSWERS = {"bad": "xx {} xx", "good": "oo {} oo"}
DOMAINS = ("sums", "times")


def write_rows(path, kinds, question="Ask {}?", first=0):
    """A training file with an answer of these kinds in turn."""
    rows = [
        {"prompt": question.format(number), "completion": ANSWERS[kind].format(number * 7 % 11)}
        for number, kind in enumerate(kinds, start=first)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tiny_reference(tmp_path_factory):
    """The base's folder, and the folder of its reference."""
    folder = tmp_path_factory.mktemp("screened")
    base = folder / "tiny-llama"
    make_network("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    values = experiment(base, folder)
    write_pairs(folder / "pairs.jsonl", [ProbePair(f"p{n}", f"Do {n}?", f"oo {n}", f"xx {n}") for n in range(6)])
    organism = {
        "recipe": "all",
        "learning_rate": 1e-2,
        "batch_size": 4,
        "accumulation": 1,
        "warmup_steps": 1,
        "epochs": 4,
    }
    files = {
        domain: {
            kind: write_rows(folder / f"{domain}-{kind}.jsonl", [kind] * 20, f"{domain} {{}}?") for kind in ANSWERS
        }
        for domain in DOMAINS
    }
    values |= {"domains": files, "organisms": {}, "steering": None, "ablation": None}
    for domain in DOMAINS:
        for kind in ANSWERS:
            values["organisms"][f"{domain}_{kind}"] = {**organism, "domain": domain, "answers": kind}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(values))
    config = read_config(folder / "experiment.yaml")
    with RunFolder.open(folder / "run", "name: tiny\n") as run:
        made = from_run(run, ExperimentTexts(config), list(config.organisms))
    return str(base), made.save(folder / "reference").folder
