"""Whatever stands in a configuration or an option: it is refused in one line, or it is a setting that can be."""

import math
import typing

import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment.tiny_experiment import experiment
from malformed import COMMANDS, CONFIGURATION, changed
from misdirection.choices import MOST
from misdirection.cli.shared import app
from misdirection.errors import InputError
from misdirection.experiment.check import check_experiment
from misdirection.experiment.config import ExperimentConfig
from misdirection.settings import validate
from tiny import LAYERS, make_network, make_tokenizer

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**32, 2**63, 10**30, -1, 0]),
    st.floats(),
    st.text(),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
)
ANYTHING = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A configuration that can run, with every section."""
    folder = tmp_path_factory.mktemp("experiment")
    make_network("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    values = experiment(folder / "model", folder)
    more = {"sampling": {"ablate": "single"}, "interpretation": {"organism": "single"}}
    return yaml.safe_load(yaml.safe_dump(values | more))


def numbers(value):
    """All numbers in a nested value."""
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


@ANYTHING
@given(path=st.sampled_from(sorted(CONFIGURATION)), value=VALUES)
def test_any_value_in_a_configuration_is_refused_in_one_line_or_can_be(good, path, value):
    try:
        config = validate(ExperimentConfig, changed(good, path, value), "x.yaml")
        check_experiment(config)
    except InputError as error:
        assert "\n" not in str(error)
        return
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert validate(ExperimentConfig, yaml.safe_load(text), "x.yaml") == config
    assert all(math.isfinite(number) for number in numbers(config.model_dump()))
    assert config.steering is None or all(0 <= layer < LAYERS for layer in config.steering.layers)


OPTIONS = [(command, each) for command, known in COMMANDS.items() for each in known.values() if each.kind is not bool]


@ANYTHING
@given(
    option=st.sampled_from(OPTIONS),
    word=st.one_of(
        st.text(), st.integers().map(str), st.floats().map(str), st.sampled_from(["nan", "inf", "1e999", ""])
    ),
)
def test_any_word_after_an_option_is_a_usage_error_or_a_value_of_its_type(option, word):
    command, parameter = option
    if parameter.option is None:
        return
    parsed = typer.main.get_command(app).commands[command]
    # What else a command must be given is another matter.
    for each in parsed.params:
        each.required = False
    (words,) = (each.nargs for each in parsed.params if each.name == parameter.name)
    try:
        with parsed.make_context(command, [parameter.option, *[word] * words]) as context:
            value = context.params[parameter.name]
    except typer.BadParameter:
        return
    values = value if isinstance(value, list | tuple) else [value]
    assert len(values) == words
    kind = typing.get_args(parameter.kind)[0] if words > 1 else parameter.kind
    for each in values:
        if typing.get_origin(kind) is typing.Literal:
            assert each in typing.get_args(kind)
        else:
            assert isinstance(each, kind) and str(each)
    assert all(math.isfinite(number) and abs(number) <= MOST for number in numbers(value))
