import pytest

from experiment.tiny_experiment import experiment
from misdirection.cost.estimate import JUDGE_SECONDS
from misdirection.errors import MisdirectionError
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.cost import estimate_cost


@pytest.fixture
def values(tiny_folder, tmp_path):
    return experiment(tiny_folder, tmp_path)


@pytest.fixture
def few(values):
    """The same with one bad organism, and nothing done to it."""
    for name in ("steering", "ablation", "samples"):
        values.pop(name)
    values["organisms"].pop("single")
    return values


def planned(values, *args, **options):
    return estimate_cost(ExperimentConfig.model_validate(values), *args, **options)


def test_no_weight_is_needed(values, tiny_folder):
    before = planned(values).as_dict()
    for path in tiny_folder.glob("*.safetensors"):
        path.unlink()
    assert planned(values).as_dict() == before


def test_stages_are_those_of_the_run_and_sum_to_the_total(values):
    plan = planned(values)
    assert list(plan.stages) == ["organism", "margin", "means", "sampled", "cell"]
    # Both texts are one: every model and the base once.
    assert [one.tasks for one in plan.stages.values()] == [3, 4, 4, 4, 7]
    assert plan.total.flops == sum(one.flops for one in plan.stages.values())
    assert plan.total.memory.total == max(one.memory.total for one in plan.stages.values())
    assert plan.fits


def test_more_devices_take_less_time_until_there_is_a_piece_for_each(few):
    one, two, many = (planned(few, "h100", count) for count in (1, 2, 64))
    assert one.total.hours > two.total.hours > many.total.hours
    assert many.total.hours == planned(few, "h100", 3).total.hours
    assert one.total.device_hours == many.total.device_hours


def test_more_of_everything_costs_more(values):
    before = planned(values).stages
    steering = values["steering"] | {"scales": [1.0, 2.0]}
    assert planned(values | {"steering": steering}).stages["cell"].flops > before["cell"].flops
    assert planned(values | {"extraction": {"pairs": 4}}).stages["means"].flops < before["means"].flops


def test_answers_and_judge_calls_are_counted(few, tmp_path):
    values = few | {"ablation": {"layer": 2, "questions": 6}}
    questions = tmp_path / "questions.txt"
    questions.write_text("Why?\nHow?\n")
    values["sampling"] = {"questions": [str(questions)], "n": 5, "new_tokens": 20, "ablate": "minimal"}
    values["judge"] = {"model": "judge", "base_url": "http://localhost:1/v1", "concurrency": 4}
    plan = planned(values)
    answers, judged = plan.stages["answers"], plan.stages["judged"]
    conditions = 3 * 3
    assert answers.tasks == judged.tasks == conditions
    assert answers.generated_tokens == conditions * 2 * 5 * 20
    assert judged.judge_calls == conditions * 2 * 5 * 2
    assert judged.judge_tokens_in > judged.judge_calls * 20
    assert judged.device_hours == pytest.approx(judged.judge_calls * JUDGE_SECONDS / 4 / 3600)
    assert judged.memory.total == 0
    short = planned(values, answer=5)
    assert short.stages["answers"].generated_tokens == answers.generated_tokens / 4
    assert any("20 tokens" in note for note in plan.notes)
    assert not any("20 tokens" in note for note in short.notes)
    by_text = planned(values | {"judge": values["judge"] | {"logprobs": False, "samples": 3}}).stages["judged"]
    assert by_text.judge_calls == 3 * judged.judge_calls


def test_a_local_judge_costs_passes_and_memory_but_no_calls(few, tiny_folder):
    few["sampling"] = {"n": 2, "new_tokens": 8}
    few["judge"] = {"model": f"hf:{tiny_folder}"}
    judged = planned(few).stages["judged"]
    assert judged.judge_calls == 0
    assert judged.forward_tokens > 0
    assert judged.memory.weights == 2 * planned(few).stages["margin"].memory.weights


def test_interpretation_is_planned_part_by_part(few):
    few["interpretation"] = {"organism": "minimal", "pairs": 4, "causal_pairs": 2}
    few["organisms"]["minimal"] |= {"keep_checkpoints": True, "checkpoint_steps": 1}
    assert planned(few).stages["adapters"].tasks == 7
    exact = planned(few).stages["adapters"].flops
    few["interpretation"]["permutations"] = 2
    assert planned(few).stages["adapters"].flops != exact


def test_too_many_layers_for_exact_shapley_values_are_said_before(values, tmp_path):
    from tiny import make_network, make_tokenizer

    folder = tmp_path / "deep"
    make_network("llama", num_hidden_layers=10).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    values |= {"model": str(folder), "interpretation": {"organism": "whole", "causal_pairs": 2}}
    values["organisms"]["whole"] = values["organisms"]["minimal"] | {"recipe": "all"}
    with pytest.raises(MisdirectionError, match="give a number of permutations"):
        planned(values)


def test_a_model_too_large_for_a_device_takes_several(few, tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "large")
    few |= {"dtype": "bfloat16"}
    alone = planned(few, "4090", model=tmp_path / "large")
    assert alone.total.devices > 6
    assert not alone.fits
    assert planned(few, "4090", alone.total.devices, model=tmp_path / "large").fits


def test_training_files_that_are_not_here_need_a_number_of_rows(few, tmp_path):
    few["domains"] = {"sums": {"bad": str(tmp_path / "no.jsonl"), "good": str(tmp_path / "no_good.jsonl")}}
    with pytest.raises(MisdirectionError, match=r"no\.jsonl: no such file.*--rows"):
        planned(few)
    short, long = planned(few, rows=50), planned(few, rows=100)
    few_tokens, many_tokens = short.stages["organism"].training_tokens, long.stages["organism"].training_tokens
    assert many_tokens == pytest.approx(2 * few_tokens, rel=0.1)
    assert any("no.jsonl" in note for note in short.notes)
