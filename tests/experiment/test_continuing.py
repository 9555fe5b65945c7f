"""What cannot go on from another organism; that others do is seen in `test_solutions`."""

import pytest

from experiment.tiny_experiment import experiment
from misdirection.errors import InputError
from misdirection.experiment.check import check_experiment
from misdirection.experiment.config import ExperimentConfig


def continuing(folder, tmp_path, **organisms):
    """A configuration with an organism, and others by name as changes of it."""
    made = experiment(folder, tmp_path)
    first = made["organisms"]["single"]
    for section in ("steering", "ablation"):
        made.pop(section)
    return made | {"organisms": {"first": first, **{name: first | own for name, own in organisms.items()}}}


@pytest.mark.parametrize(
    ("organisms", "words"),
    [
        ({"second": {"continues": "firts"}}, r"organisms\.second\.continues: unknown 'firts'.*first"),
        ({"a": {"continues": "b"}, "b": {"continues": "a"}}, r"continues: goes in a circle by way of 'a'"),
        ({"second": {"continues": "second"}}, r"continues: goes in a circle by way of 'second'"),
        ({"second": {"continues": "first", "recipe": "full"}}, r"organisms\.second\.continues: a whole model"),
    ],
)
def test_what_cannot_go_on_is_refused_with_the_file(tiny_folder, tmp_path, organisms, words):
    with pytest.raises(ValueError, match=words):
        ExperimentConfig(**continuing(tiny_folder, tmp_path, **organisms))


def test_another_adapter_is_refused_before_any_work(tiny_folder, tmp_path):
    values = continuing(tiny_folder, tmp_path, second={"continues": "first", "rank": 2})
    with pytest.raises(InputError, match=r"organisms\.second\.continues: 'first' has its adapter in other modules, or"):
        check_experiment(ExperimentConfig(**values))
