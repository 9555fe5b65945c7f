import json

import pytest
import yaml

from experiment.tiny_experiment import experiment
from misdirection.errors import EXIT_STATUS


@pytest.fixture
def config(tiny_folder, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(experiment(tiny_folder, tmp_path)))
    return path


def test_a_table_of_the_stages(call, config):
    status, out, _ = call("plan", config, "--count", 2)
    assert status == 0
    assert all(name in out for name in ("organism", "margin", "means", "cell", "sampled", "total", "2 x h100"))
    assert max(map(len, out.splitlines())) <= 80


def test_one_object_for_programs(call, config):
    prices = ("--hour-price", 2.5, "--judge-price", 2, 8)
    status, out, _ = call("plan", config, "--gpu", "4090", "--count", 3, *prices, "--json")
    assert status == 0
    found = json.loads(out)
    # All three devices are paid for until the last task is done; nobody judges.
    assert found["dollars"] == {"devices": pytest.approx(found["total"]["hours"] * 3 * 2.5), "judge": 0.0}
    assert found["device"]["name"] == "4090"
    assert found["fits"] is True
    margin = found["stages"]["margin"]
    assert margin["forward_tokens"] > 0
    assert margin["memory"]["total"] > margin["memory"]["weights"] > 0
    assert found["total"]["hours"] > 0


def test_estimated_tokens_are_said(call, config, tiny_folder):
    for path in tiny_folder.glob("tokenizer*"):
        path.unlink()
    (tiny_folder / "chat_template.jinja").unlink(missing_ok=True)
    status, _, err = call("plan", config)
    assert status == 0
    assert "tokens are estimated from characters" in err


def test_bad_input_is_one_line(call, config, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"model": "no-such/model"}))
    absent = tmp_path / "absent.yaml"
    absent.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"domains": {"sums": {"bad": "no.jsonl"}}}))
    cases = [
        ((tmp_path / "none.yaml",), "none.yaml: cannot be read", 2),
        ((config, "--model", bare), "no config.json", 2),
        ((elsewhere,), "no-such/model: the Hub does not answer", EXIT_STATUS["NetworkProblem"]),
        ((config, "--gpu", "tpu"), "--gpu", 2),
        ((config, "--count", 0), "--count", 2),
    ]
    for words, message, expected in cases:
        status, out, err = call("plan", *words)
        assert status == expected, words
        assert message in err, words
        assert "Traceback" not in err
        assert out == ""
