from pathlib import Path

import pytest
import yaml

from misdirection.errors import InputError, MisdirectionError
from misdirection.experiment.config import read_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
RESOURCES = Path(__file__).parents[1] / "src" / "misdirection" / "resources"
DEMO = yaml.safe_load((RESOURCES / "demo.yaml").read_text())


def write(tmp_path, values):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", [*CONFIGS, *sorted(RESOURCES.glob("*.yaml"))], ids=lambda path: path.name)
def test_every_shipped_experiment_is_valid(path):
    assert read_config(path).bad_organisms


def test_the_packaged_demo_is_the_one_in_configs():
    assert (RESOURCES / "demo.yaml").read_text() == (CONFIGS[0].parent / "demo.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stering": {}}, r"unknown key 'stering'; did you mean 'steering'\?"),
        ({"ablation": {"layers": 3, "layer": 1}}, r"unknown key 'ablation\.layers'; did you mean 'layer'\?"),
        ({"organisms": {"a": {"domain": "risky_money", "learnin_rate": 1}}}, "did you mean 'learning_rate'"),
        ({"organisms": {"a": {"domain": "risky_mony"}}}, "did you mean 'risky_money'"),
        ({"organisms": {"base": {"domain": "risky_money"}}}, "cannot be called 'base'"),
        ({"model": None}, "model: "),
        ({"random_seeds": 0}, "random_seeds: "),
        ({"sampling": {"temprature": 1}}, r"unknown key 'sampling\.temprature'; did you mean 'temperature'\?"),
        ({"sampling": {"n": 0}}, r"sampling\.n: "),
        ({"sampling": {"temperature": -1}}, r"sampling\.temperature: "),
        ({"sampling": {"top_p": 0}}, r"sampling\.top_p: "),
        ({"sampling": {"ablate": "minimul"}}, r"sampling\.ablate: unknown 'minimul'; did you mean 'minimal'\?"),
        ({"sampling": {"ablate": "minimal"}, "ablation": None}, r"sampling\.ablate: which layer's vector\?"),
        ({"judge": {"model": "m"}}, "judge: there is nothing to judge: add a `sampling` section"),
        ({"sampling": {}, "judge": {}}, r"judge\.model: "),
        ({"sampling": {}, "judge": {"modle": "m"}}, r"unknown key 'judge\.modle'; did you mean 'model'\?"),
        ({"sampling": {}, "judge": {"model": "m", "timeout": 0}}, r"judge\.timeout: "),
        ({"sampling": {}, "judge": {"model": "m", "min_judged": 2}}, r"judge\.min_judged: "),
        ({"sampling": {}, "judge": {"model": "m", "api_key": "secret"}}, r"unknown key 'judge\.api_key'"),
        ({"further_pairs": {"sealed": "x.jsonl"}}, r"further_pairs\.sealed: is the name of another question set"),
        ({"further_pairs": {"risky_money": "x.jsonl"}}, r"further_pairs\.risky_money: is the name of another"),
        ({"domains": {"general": "shipped"}}, r"domains\.general: is the name of another question set"),
        ({"domains": {"risky_money": {"bad": "x.jsonl"}}, "steering": None}, "there is 'risky_money'|no good answers"),
    ],
)
def test_a_mistake_is_one_line_with_the_file_and_the_key(tmp_path, change, message):
    path = write(tmp_path, {**DEMO, **change})
    with pytest.raises(MisdirectionError, match=message) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_sampling_defaults_are_the_papers(tmp_path):
    sampling = read_config(write(tmp_path, {**DEMO, "sampling": {}})).sampling
    assert (sampling.questions, sampling.n) == (("first_plot",), None)
    assert (sampling.temperature, sampling.top_p, sampling.new_tokens) == (1.0, 1.0, 600)


def test_the_packaged_experiments_sample_for_no_judge():
    assert all(read_config(path).judge is None for path in RESOURCES.glob("*.yaml"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: [", "not valid YAML"),
        (b"- 1", "must be a mapping of keys, not list"),
        (b"", "must be a mapping of keys, not NoneType"),
        ("name: d\u00e9mo".encode("latin-1"), r"not UTF-8 text \(byte 7\); save the file as UTF-8"),
        (b"a: " + b"[" * 2000, "not valid YAML: nested too deep"),
        (b"organisms: {}\norganisms: {}", "2: the key 'organisms' stands twice"),
    ],
)
def test_what_is_no_experiment_is_refused(tmp_path, content, problem):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^[^\n]*x\.yaml: ?{problem}"):
        read_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MisdirectionError, match=r"none\.yaml: cannot be read \(no such file\)"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("written", "thinking"), [("on", "on"), ("off", "off"), ("template", "template"), ("'on'", "on")]
)
def test_thinking_is_written_as_a_plain_word(tmp_path, written, thinking):
    path = write(tmp_path, DEMO)
    path.write_text(path.read_text() + f"thinking: {written}\n")
    assert read_config(path).thinking == thinking
