"""What the vLLM engine decides, refuses and counts, without vLLM."""

import importlib.util
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from experiment.tiny_experiment import experiment
from misdirection.errors import MisdirectionError, MissingPackage
from misdirection.experiment.answering import Condition, answer
from misdirection.experiment.config import ExperimentConfig, read_config
from misdirection.experiment.experiment import Experiment
from misdirection.experiment.stages.answers import AnswersStage
from misdirection.experiment.stages.organism import OrganismStage
from misdirection.experiment.worker import open_worker
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Clamp, ProjectAdapters, ScaleAdapters, Steer
from misdirection.interventions.packing import packed, unpacked
from misdirection.models.adapters import attach
from misdirection.models.chat import encode_prompt
from misdirection.models.loading import load
from misdirection.models.weightless import weightless
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner
from misdirection.sampling.answers import read_answers
from misdirection.sampling.config import SamplingConfig
from misdirection.sampling.engine import SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Question
from misdirection.sampling.transformers_engine import end_tokens
from misdirection.sampling.vllm import engine as vllm_engine
from misdirection.sampling.vllm.adapters import (
    require_fit,
    require_served,
    served_folder,
    smallest_limit,
    write_changed,
)
from misdirection.sampling.vllm.engine import Resources, VllmModel
from misdirection.sampling.vllm.server import ServerEngine
from sampling.vllm_stand_in import StandIn, completions_server
from tiny import LAYERS, WIDTH, make_network

LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["down_proj"], "bias": "none", "init_lora_weights": True}
QUESTIONS = [Question("short", "Why?"), Question("system", "Who?", "Be brief.")]
VLLM = {"vllm": {"base_url": None, "tensor_parallel": 1, "pipeline_parallel": 1, "memory": 0.9}}
SETTINGS = SamplingParameters(new_tokens=5)
VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))


def requests(setting=()):
    return [SamplingRequest(question, number, setting) for question in QUESTIONS for number in range(2)]


def written(folder, **changes):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(LORA | changes))
    (folder / "adapter_model.safetensors").touch()
    return folder


@pytest.fixture
def adapter(tmp_path):
    """A LoRA with random matrices on the tiny model."""
    options = {"r": 2, "lora_alpha": 8, "target_modules": ["down_proj", "q_proj"], "layers_to_transform": [1, 2]}
    network = get_peft_model(make_network("llama"), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    network.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# --- adapters, from their files alone -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"more than LoRA matrices \(modules_to_save\)"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"bias": "lora_only"}, r"\(bias\)"),
        ({"lora_bias": True}, r"\(lora_bias\)"),
        ({"r": 513}, "ranks up to 512, and this is 513"),
        ({"rank_pattern": {"layers.1": 1024}}, "ranks up to 512, and this is 1024"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"a LoRA on embeddings \(embed_tokens\)"),
        ({"target_modules": ["lm_head"]}, r"a LoRA on embeddings \(lm_head\)"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changes the base's own weights"),
        ({"peft_type": "IA3"}, "is no LoRA but IA3"),
    ],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused_with_what_to_do_instead(tmp_path, changes, reason):
    with pytest.raises(MisdirectionError, match=reason) as caught:
        require_served(written(tmp_path / "adapter", **changes))
    assert "engine: transformers" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_engine_is_built_for_the_largest_rank(tmp_path):
    assert require_served(written(tmp_path / "plain", r=64)) == 64
    assert require_served(written(tmp_path / "pattern", rank_pattern={"layers.1": 100})) == 100
    assert require_served(written(tmp_path / "largest", r=512)) == 512
    assert [smallest_limit(ranks) for ranks in ([1], [2], [8, 9], [64, 1], [257], [512])] == [1, 8, 16, 64, 320, 512]


def test_an_adapter_of_another_model_is_refused(adapter, tiny_folder, tmp_path):
    require_fit(adapter, weightless(str(tiny_folder)))
    make_network("llama", hidden_size=16).save_pretrained(tmp_path / "narrow")
    weightless(str(tiny_folder)).tokenizer.save_pretrained(tmp_path / "narrow")
    with pytest.raises(MisdirectionError, match="the adapter is another model's"):
        served_folder(adapter, weightless(str(tmp_path / "narrow")))


def test_an_adapter_file_with_more_than_its_matrices_is_refused(adapter, tiny_folder):
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.embed_tokens.weight": torch.zeros(3, WIDTH)}, path)
    with pytest.raises(MisdirectionError, match=r"embed_tokens\.weight, which is no matrix of a LoRA: sample it with"):
        served_folder(adapter, weightless(str(tiny_folder)))


@pytest.mark.parametrize(
    "one",
    [
        ScaleAdapters({1: -0.5}),
        ScaleAdapters({1: 0.0, 2: 3.0}),
        ProjectAdapters({"model.layers.2.mlp.down_proj": torch.eye(3, WIDTH)}, strength=1.5),
        Ablate(VECTOR, strength=0.7, positions="all", at="adapters"),
    ],
)
def test_an_intervention_on_adapters_is_an_adapter(one, adapter, tiny_folder, tmp_path):
    write_changed(adapter, weightless(str(tiny_folder)), [one, ScaleAdapters({2: 0.5})], tmp_path / "changed")
    ids = torch.arange(3, 30).unsqueeze(0)
    chat = attach(load(str(tiny_folder), dtype="float32", device="cpu"), adapter)
    plain = chat.model(input_ids=ids).logits
    with intervene(chat, [one, ScaleAdapters({2: 0.5})]):
        expected = chat.model(input_ids=ids).logits
    changed = attach(load(str(tiny_folder), dtype="float32", device="cpu"), tmp_path / "changed")
    torch.testing.assert_close(changed.model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (ScaleAdapters({1: 0.0}, positions="answer"), "positions 'answer' cannot be"),
        (ScaleAdapters({0: 0.0}), "layer 0 has no LoRA adapter"),
        (ProjectAdapters({"model.layers.0.mlp.down_proj": torch.eye(1, WIDTH)}), "has no LoRA adapter"),
    ],
)
def test_an_intervention_that_no_adapter_can_be_is_refused(one, message, adapter, tiny_folder, tmp_path):
    with pytest.raises(MisdirectionError, match=message):
        write_changed(adapter, weightless(str(tiny_folder)), [one], tmp_path / "changed")


# --- what a worker is told ----------------------------------------------------------------------------------------


def test_interventions_survive_the_way_to_a_worker():
    setting = [
        Steer(VECTOR, 2, -1.5, "prompt", keep_norm=True),
        Ablate(torch.eye(3, WIDTH, dtype=torch.bfloat16), (0, 3), 0.25, "answer", toward=VECTOR),
        Clamp(VECTOR, low=-1.0, positions=torch.tensor([True, False, True])),
    ]
    assert [each.described() for each in unpacked(packed(setting))] == [each.described() for each in setting]
    assert unpacked(packed(setting))[1].vector.dtype == torch.bfloat16


def test_the_skeleton_knows_what_the_model_does(tiny_folder):
    whole, bare = load(str(tiny_folder), dtype="float32", device="cpu"), weightless(str(tiny_folder))
    assert end_tokens(bare) == end_tokens(whole)
    assert encode_prompt(bare.tokenizer, "Why?", "Be brief.") == encode_prompt(whole.tokenizer, "Why?", "Be brief.")
    assert (len(bare.layers), bare.width) == (LAYERS, WIDTH)


# --- the engine, with a stand-in for vLLM -------------------------------------------------------------------------


@pytest.fixture
def served(tiny_folder, monkeypatch):
    """A model in an engine that answers [5, 6, 7], and whose hooks fire as often as is told."""

    def make(fired=1.0, **options):
        stand_in = StandIn(weightless(str(tiny_folder)), fired)
        monkeypatch.setattr(vllm_engine, "_import_vllm", lambda: stand_in)
        monkeypatch.setattr(vllm_engine, "import_module", stand_in.module)
        return VllmModel(str(tiny_folder), dtype="float32", **options), stand_in

    return make


def test_prompts_seeds_and_end_tokens_are_our_own(served, tiny_folder):
    model, vllm = served()
    done = list(model.engine().stream(requests(), SETTINGS))
    assert [(one.request.question.id, one.request.sample) for one in done] == [
        (one.question.id, one.sample) for one in requests()
    ]
    assert {(one.tokens, one.finish) for one in done} == {(3, "length")}
    tokenizer = weightless(str(tiny_folder)).tokenizer
    for one, asked in zip(requests(), vllm.asked, strict=True):
        assert tuple(asked.prompt["prompt_token_ids"]) == encode_prompt(
            tokenizer, one.question.text, one.question.system
        )
        assert asked.params.stop_token_ids == end_tokens(model.chat)
    keys = [asked.params.extra_args["misdirection"]["key"] for asked in vllm.asked]
    assert len(set(keys)) == len(keys)
    assert vllm.options["enable_prefix_caching"] is False
    assert "enable_lora" not in vllm.options


def test_an_end_token_ends_an_answer_and_is_not_part_of_it(served):
    model, vllm = served()
    vllm.tokens = [5, 6, end_tokens(model.chat)[0]]
    assert {(one.tokens, one.finish) for one in model.engine().stream(requests(), SETTINGS)} == {(2, "stop")}


@pytest.mark.parametrize("one", [Steer(VECTOR, 1), Ablate(VECTOR), Clamp(VECTOR, low=0.0, positions="answer")])
def test_an_answer_on_which_an_intervention_did_not_fire_everywhere_is_not_given(served, one):
    model, _ = served()
    assert len(list(model.engine().stream(requests((one,)), SETTINGS))) == 4
    for share in (0.0, 0.99):
        model, vllm = served(share)
        with pytest.raises(MisdirectionError, match=r"fired \d+ times on an answer of vLLM, not \d+ times"):
            list(model.engine().stream(requests((one,)), SETTINGS))
        assert vllm.closed


def test_requests_of_one_setting_share_its_name_and_plain_ones_have_none(served):
    model, vllm = served()
    same = [
        SamplingRequest(QUESTIONS[0], 0, [Steer(VECTOR, 1)]),
        SamplingRequest(QUESTIONS[0], 1, [Steer(VECTOR.clone(), 1)]),
    ]
    other = [SamplingRequest(QUESTIONS[0], 2, [Steer(VECTOR, 2)]), SamplingRequest(QUESTIONS[0], 3)]
    list(model.engine().stream(same + other, SETTINGS))
    names = [asked.params.extra_args["misdirection"]["setting"] for asked in vllm.asked]
    assert names[0] == names[1] != names[2]
    assert names[3] == ""
    assert len(vllm.settings) == 2


def test_adapters_and_interventions_on_them_share_one_engine(served, adapter):
    model, vllm = served(adapters={"organism": adapter})
    assert (vllm.options["enable_lora"], vllm.options["max_lora_rank"]) == (True, 8)
    scaled = [ScaleAdapters({1: 0.0})]
    wanted = [
        SamplingRequest(QUESTIONS[0], 0),
        SamplingRequest(QUESTIONS[0], 1, scaled),
        SamplingRequest(QUESTIONS[0], 2, scaled),
    ]
    list(model.engine("organism").stream(wanted, SETTINGS))
    list(model.engine().stream(requests()[:1], SETTINGS))
    plain, first, second, base = [asked.lora for asked in vllm.asked]
    assert base is None
    assert plain.path == str(adapter)
    assert first is second
    assert first.path != plain.path
    assert first.number != plain.number


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ([ScaleAdapters({1: 0.0})], "there is no LoRA adapter"),
        ([Steer(VECTOR, LAYERS)], "out of range"),
        ([Steer(VECTOR, 1, 1.0, torch.ones(2, 3, dtype=torch.bool))], "a position mask with rows"),
    ],
)
def test_an_intervention_that_cannot_be_is_refused_before_anything_runs(served, setting, message):
    model, vllm = served()
    with pytest.raises(MisdirectionError, match=message):
        list(model.engine().stream(requests(setting), SETTINGS))
    assert vllm.steps == 0


def test_without_hooks_vllm_may_use_graphs_and_nothing_is_steered(served, monkeypatch):
    monkeypatch.setattr(vllm_engine, "best_device", lambda: "cuda")
    model, vllm = served(resources=Resources(hooks=False))
    assert vllm.options["enforce_eager"] is False
    with pytest.raises(MisdirectionError, match="without hooks"):
        list(model.engine().stream(requests((Steer(VECTOR, 1),)), SETTINGS))


def test_what_vllm_raises_is_one_line_and_closes_it(served):
    model, vllm = served()
    vllm.error = RuntimeError("out of memory\nand much more")
    with pytest.raises(MisdirectionError, match=r"vLLM stopped: out of memory$"):
        list(model.engine().stream(requests(), SETTINGS))
    with pytest.raises(MisdirectionError, match="is closed"):
        list(model.engine().stream(requests(), SETTINGS))


def test_requests_that_nobody_waits_for_are_given_up(served):
    model, vllm = served()
    stream = model.engine().stream(requests(), SETTINGS)
    next(stream)
    stream.close()
    assert not vllm.waiting
    assert len(list(model.engine().stream(requests(), SETTINGS))) == 4


def test_one_model_samples_at_a_time(served, adapter):
    model, _ = served(adapters={"organism": adapter})
    stream = model.engine().stream(requests(), SETTINGS)
    next(stream)
    with pytest.raises(MisdirectionError, match="is sampling already"):
        next(model.engine("organism").stream(requests(), SETTINGS))
    assert len(list(stream)) == 3


def test_names_of_adapters_are_checked(served, adapter):
    with pytest.raises(MisdirectionError, match="cannot be called 'base'"):
        served(adapters={"base": adapter})
    model, _ = served(adapters={"organism": adapter})
    with pytest.raises(MisdirectionError, match="no such adapter here; there is base, organism"):
        model.engine("other")


def test_an_experiment_samples_with_vllm_and_gives_its_memory_back(served, tiny_folder, tmp_path):
    _, vllm = served()
    (tmp_path / "questions.txt").write_text("Why?\nHow?")
    sampling = {"questions": [str(tmp_path / "questions.txt")], "n": 2, "new_tokens": 5, "engine": "vllm"}
    values = experiment(tiny_folder, tmp_path) | {"sampling": sampling | {"ablate": "minimal"}}
    config = ExperimentConfig.model_validate(values)
    with RunFolder.open(tmp_path / "run", "") as run:
        worker = open_worker(config, run.partial)
        made = Experiment(config, run, LocalRunner(run, worker))
        made.runner.make(made.stage(OrganismStage).tasks())
        answers = made.stage(AnswersStage).answers
        for key, intervention in (("plain", None), ("ablated", Ablate(VECTOR))):
            task = answers(Condition("base", intervention, key, key))
            made.runner.make([task])
            rows = read_answers(run.artifact(task.stage) / "answers.parquet")
            assert (len(rows), set(rows["tokens"]), set(rows["intervention"])) == (4, {3}, {key})
        asked = len(vllm.asked)
        made.runner.make([answers(Condition("base", label="plain"))])
    assert len(vllm.asked) == asked == 8
    assert not vllm.closed
    worker.chat("base")
    assert vllm.closed


def test_answers_that_only_an_experiment_can_sample_are_refused_elsewhere(tiny_folder, tmp_path):
    config = SamplingConfig.model_validate({"engine": {"vllm": {"base_url": "http://127.0.0.1:9/v1"}}})
    with (
        RunFolder.open(tmp_path / "run", "") as run,
        pytest.raises(MisdirectionError, match="only an experiment samples"),
    ):
        answer(run, "answers/base/plain", lambda: None, config, {}, Condition("base"))


@pytest.mark.parametrize(
    ("engine", "kept"),
    [
        ("transformers", "transformers"),
        ({}, "transformers"),
        ("vllm", VLLM),
        ({"vllm": None}, VLLM),
        ({"vllm": {"tensor_parallel": 2}}, {"vllm": VLLM["vllm"] | {"tensor_parallel": 2}}),
    ],
)
def test_the_engine_of_a_configuration(engine, kept):
    config = SamplingConfig.model_validate({"engine": engine})
    assert config.model_dump(mode="json")["engine"] == kept
    assert SamplingConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("vlm", "unknown 'vlm': give transformers, vllm"),
        ({"vlm": {}}, r"unknown key 'sampling\.engine\.vlm'; did you mean 'vllm'"),
        ({"vllm": {"base_ur": "x"}}, r"unknown key 'sampling\.engine\.vllm\.base_ur'; did you mean 'base_url'"),
        ({"vllm": {"memory": 2}}, r"sampling\.engine\.vllm\.memory"),
    ],
)
def test_a_wrong_engine_is_named(engine, message, tiny_folder, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(experiment(tiny_folder, tmp_path) | {"sampling": {"engine": engine}}))
    with pytest.raises(MisdirectionError, match=message):
        read_config(path)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_command_says_what_to_install(call, tiny_folder, tmp_path):
    status, _, err = call(
        "sample", "--engine", "vllm", "--model", tiny_folder, "--out", tmp_path / "a.csv", "--new-tokens", 5
    )
    assert status == MissingPackage.exit_status
    assert "pip install vllm" in err
    assert "Traceback" not in err


def test_options_of_the_engines_are_not_mixed(call, tiny_folder, tmp_path):
    common = ("sample", "--model", tiny_folder, "--out", tmp_path / "a.csv")
    assert "--server goes with --engine vllm" in call(*common, "--server", "http://localhost/v1")[2]
    assert "--device: vLLM takes" in call(*common, "--engine", "vllm", "--device", "cpu")[2]


# --- a running server ---------------------------------------------------------------------------------------------


def test_a_server_is_asked_by_token_ids_and_answers_belong_to_their_requests(tiny_folder):
    with completions_server(tiny_folder, tokens=[70, 71, 2]) as server:
        engine = ServerEngine(server.url, str(tiny_folder), concurrency=3)
        done = {(one.request.question.id, one.request.sample): one for one in engine.stream(requests(), SETTINGS)}
    chat = weightless(str(tiny_folder))
    assert len(done) == 4
    assert {(one.tokens, one.finish) for one in done.values()} == {(2, "stop")}
    prompts = {encode_prompt(chat.tokenizer, one.text, one.system) for one in QUESTIONS}
    assert {tuple(one["prompt"]) for one in server.asked} == prompts
    assert len({one["seed"] for one in server.asked}) == 4
    assert {tuple(one["stop_token_ids"]) for one in server.asked} == {tuple(end_tokens(chat))}
    assert {one["model"] for one in server.asked} == {"served"}


def test_a_server_takes_no_interventions(tiny_folder):
    with completions_server(tiny_folder) as server:
        engine = ServerEngine(server.url, str(tiny_folder))
        with pytest.raises(MisdirectionError, match="Steer: a running server takes no interventions"):
            list(engine.stream(requests((Steer(VECTOR, 1),)), SETTINGS))
        assert not server.asked


def test_a_server_loads_an_adapter_that_it_does_not_serve(tiny_folder, adapter):
    with completions_server(tiny_folder) as server:
        engine = ServerEngine(server.url, str(tiny_folder), "organism", adapter)
        list(engine.stream(requests(), SETTINGS))
        assert server.loaded == {"organism": str(adapter)}
        assert {one["model"] for one in server.asked} == {"organism"}
        list(ServerEngine(server.url, str(tiny_folder), "organism", adapter).stream(requests(), SETTINGS))
        with pytest.raises(MisdirectionError, match="serves another adapter as 'organism'"):
            ServerEngine(server.url, str(tiny_folder), "organism", copied(adapter))


def copied(adapter):
    other = adapter.with_name("other")
    other.mkdir()
    for path in adapter.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    return other


def test_a_server_of_another_model_and_one_that_refuses_are_one_line(tiny_folder, adapter):
    another = completions_server(tiny_folder.parent / "another")
    with another as server, pytest.raises(MisdirectionError, match="serves 'served', not"):
        ServerEngine(server.url, str(tiny_folder))
    refusing = completions_server(tiny_folder, loads=False)
    with refusing as server, pytest.raises(MisdirectionError, match="--lora-modules organism="):
        ServerEngine(server.url, str(tiny_folder), "organism", adapter)
    with completions_server(tiny_folder, tokens=None) as server:
        engine = ServerEngine(server.url, str(tiny_folder))
        with pytest.raises(MisdirectionError, match="gives no token ids"):
            list(engine.stream(requests(), SETTINGS))
    with pytest.raises(MisdirectionError, match="is the model without an adapter"):
        ServerEngine("http://127.0.0.1:9/v1", str(tiny_folder), "organism")
