"""Interventions in the weights, against the same ones as hooks."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from misdirection.errors import MisdirectionError
from misdirection.files import MADE, atomic_folder, remove
from misdirection.interventions import bake as baking
from misdirection.interventions.bake import bake
from misdirection.interventions.checkpoint import Checkpoint
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Clamp, ScaleAdapters, Steer
from misdirection.interventions.rounding import LIMIT
from tiny import ALL_ARCHITECTURES, LAYERS, WIDTH, make_tokenizer, run, vector
from weights import IDS, MORE, POST_NORM, as_chat, logits, randomised, saved

# What an architecture computes is not changed by its blocks' return type, and files know nothing of it.
ARCHITECTURES = tuple(one for one in (*ALL_ARCHITECTURES, *MORE) if one != "llama_tuples")
PRE_NORM = tuple(one for one in ARCHITECTURES if one not in POST_NORM)
V, PLANE = vector(3), vector(4, 1.0, 2)
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"


def ablation(vectors=V, strength=1.0):
    return Ablate(5 * vectors, strength=strength, positions="all", at="writes")


def reloaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def hooked(network, *interventions):
    with intervene(as_chat(network), interventions):
        return logits(network)


def stored(folder):
    """All tensors of a folder, by name."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def rewritten(folder, change):
    """The folder with another set of tensors in its one file."""
    tensors = load_file(folder / MODEL)
    save_file({name: value.contiguous() for name, value in change(tensors).items()}, folder / MODEL, {"format": "pt"})
    return folder


def assert_equal_logits(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


# --- the operation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vectors", "strength"), [(V, 1.0), (PLANE, 0.5)])
@pytest.mark.parametrize("architecture", PRE_NORM)
def test_baked_logits_equal_hooked_logits(tmp_path, architecture, vectors, strength):
    network = randomised(architecture)
    one = ablation(vectors, strength)
    report = bake(str(saved(network, tmp_path / "m")), one, tmp_path / "baked")
    expected = hooked(network, one)
    assert_equal_logits(logits(reloaded(tmp_path / "baked")), expected)
    assert (expected - logits(network)).abs().max() > 0.05
    assert report.exact


@pytest.mark.parametrize(("vectors", "strength"), [(PLANE, 1.0), (V, 0.5)])
def test_baked_logits_equal_hooked_logits_for_the_other_pairs(tmp_path, vectors, strength):
    network = randomised("gpt2")
    bake(str(saved(network, tmp_path / "m")), ablation(vectors, strength), tmp_path / "baked")
    assert_equal_logits(logits(reloaded(tmp_path / "baked")), hooked(network, ablation(vectors, strength)))


@pytest.mark.parametrize("vectors", [V, PLANE])
@pytest.mark.parametrize("architecture", POST_NORM)
def test_a_baked_post_norm_model_writes_nothing_along_the_direction(tmp_path, architecture, vectors):
    network = randomised(architecture)
    report = bake(str(saved(network, tmp_path / "m")), ablation(vectors), tmp_path / "baked")
    with torch.no_grad():
        stream, _ = run(as_chat(reloaded(tmp_path / "baked")), IDS, torch.ones_like(IDS))
        before, _ = run(as_chat(network), IDS, torch.ones_like(IDS))
    assert ((stream @ vectors.view(-1, WIDTH).T).abs().amax() / stream.norm(dim=-1).mean()) < 1e-5
    assert ((before @ vectors.view(-1, WIDTH).T).abs().amax() / before.norm(dim=-1).mean()) > 0.05
    assert not report.exact


@pytest.mark.parametrize("architecture", POST_NORM)
def test_a_post_norm_model_is_not_the_hooked_operation(tmp_path, architecture):
    """Or else `exact` would have to be True."""
    network = randomised(architecture)
    bake(str(saved(network, tmp_path / "m")), ablation(), tmp_path / "baked")
    assert (logits(reloaded(tmp_path / "baked")) - hooked(network, ablation())).abs().max() > 1e-2


# Embedding, then attention and MLP of each layer; GPT-2 has a second embedding and, like GPT-NeoX, biases.
CHANGED = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "glm4"), (1 + 2 * LAYERS, 0)
    ),
    "gemma3_vision": (1 + 1 + 2 * LAYERS, 0),
    "granite": (1 + 3 * LAYERS, 0),
    "gpt2": (2 + 4 * LAYERS, 0),
    "gpt_neox": (1 + 4 * LAYERS, 0),
    "mixtral": (1 + (1 + 4) * LAYERS, 4 * LAYERS),
    "qwen3_moe": (1 + (1 + 4) * LAYERS, 4 * LAYERS),
    "gpt_oss": (1 + 4 * LAYERS, 4 * LAYERS),
    "qwen3_next": (1 + (1 + 4 + 1) * LAYERS, 4 * LAYERS),
    # Its first block has a plain MLP.
    "deepseek_v3": (1 + 2 + (1 + 4 + 1) * (LAYERS - 1), 4 * (LAYERS - 1)),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_changed_is_counted_and_nothing_else_changed(tmp_path, architecture):
    folder = saved(randomised(architecture), tmp_path / "m")
    report = bake(str(folder), ablation(), tmp_path / "baked")
    before, after = stored(folder), stored(tmp_path / "baked")
    assert (report.changed, report.experts) == CHANGED[architecture]
    assert sum(not torch.equal(value, after[name]) for name, value in before.items()) == report.changed
    assert set(after) - set(before) == ({"lm_head.weight"} if report.untied else set())
    assert report.before > 0.1
    assert report.after < 1e-6


# --- tied embeddings ------------------------------------------------------------------------------------------------


def tied(tmp_path, **options):
    network = randomised("llama", tie_word_embeddings=True)
    return network, saved(network, tmp_path / "m", **options)


def keep_both(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize("change", [lambda tensors: tensors, keep_both], ids=["stored once", "stored twice"])
def test_a_tied_model_is_untied_so_that_its_head_stays(tmp_path, change):
    network, folder = tied(tmp_path)
    rewritten(folder, change)
    report = bake(str(folder), ablation(), tmp_path / "baked")
    after = stored(tmp_path / "baked")
    assert torch.equal(after["lm_head.weight"], network.model.embed_tokens.weight)
    assert (after["model.embed_tokens.weight"] @ V).abs().max() < 1e-6
    assert json.loads((tmp_path / "baked" / "config.json").read_text())["tie_word_embeddings"] is False
    assert report.untied
    assert_equal_logits(logits(reloaded(tmp_path / "baked")), hooked(network, ablation()))


def test_an_embedding_that_is_stored_as_the_head_only_is_refused(tmp_path):
    _, folder = tied(tmp_path)
    rewritten(folder, lambda tensors: {"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors})
    refused(folder, ablation(), tmp_path / "baked", "no token embedding")


def test_an_untied_head_is_never_projected(tmp_path):
    network = randomised("llama")
    report = bake(str(saved(network, tmp_path / "m")), ablation(), tmp_path / "baked")
    assert not report.untied
    assert torch.equal(stored(tmp_path / "baked")["lm_head.weight"], network.lm_head.weight)


def test_steering_leaves_tied_embeddings_tied(tmp_path):
    network = randomised("gpt2")
    report = bake(str(saved(network, tmp_path / "m")), Steer(V, 1, positions="all"), tmp_path / "baked")
    assert not report.untied
    assert reloaded(tmp_path / "baked").config.tie_word_embeddings
    assert "lm_head.weight" not in stored(tmp_path / "baked")


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
def test_a_sharded_checkpoint_keeps_its_shards_and_gets_a_right_index(tmp_path, tie):
    network = randomised("llama", tie_word_embeddings=tie)
    folder = saved(network, tmp_path / "m", max_shard_size="40KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    bake(str(folder), ablation(), tmp_path / "baked")
    out = tmp_path / "baked"
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    index = json.loads((out / INDEX).read_text())
    where = {name: path.name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == where
    tensors = stored(out)
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(one.numel() for one in tensors.values())
    assert set(tensors) == set(network.state_dict())
    assert_equal_logits(logits(reloaded(out)), hooked(network, ablation()))


def test_one_shard_at_a_time_is_in_memory(tmp_path, monkeypatch):
    folder = saved(randomised("llama"), tmp_path / "m", max_shard_size="40KB")
    alive, most = weakref.WeakSet(), []
    read = Checkpoint.tensors

    def tensors(self, shard):
        most.append(len(alive))
        for name, tensor in read(self, shard):
            alive.add(tensor)
            yield name, tensor

    monkeypatch.setattr(Checkpoint, "tensors", tensors)
    bake(str(folder), ablation(), tmp_path / "baked")
    assert len(most) > 3
    assert max(most) <= 1, "but for the generator's own last one"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_keeps_its_dtype_and_what_that_leaves_is_reported(tmp_path, dtype):
    folder = saved(randomised("llama").to(dtype), tmp_path / "m")
    report = bake(str(folder), ablation(), tmp_path / "baked")
    after = stored(tmp_path / "baked")
    assert {one.dtype for one in after.values()} == {dtype}
    before = {name: one.float() for name, one in stored(folder).items()}
    writing = [name for name in after if name.endswith(("o_proj.weight", "down_proj.weight"))]
    left = max(float((V @ after[name].float()).norm() / before[name].norm()) for name in writing)
    assert left <= 1.0001 * report.after
    assert 1e-6 < report.after < torch.finfo(dtype).eps < report.before
    for name in writing:
        exact = before[name] - torch.outer(V, V @ before[name])
        assert (after[name].float() - exact).abs().max() < torch.finfo(dtype).eps * exact.abs().max(), "rounded once"


def test_everything_beside_the_weights_comes_along(tmp_path):
    folder = saved(randomised("llama"), tmp_path / "m")
    make_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    bake(str(folder), ablation(), tmp_path / "baked")
    names = {path.name for path in folder.iterdir()} - {"pytorch_model.bin", "pytorch_model.bin.index.json"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert {path.name for path in (tmp_path / "baked").iterdir()} == names | {"baked.json", MADE}
    for name in names - {MODEL}:
        assert (tmp_path / "baked" / name).read_bytes() == (folder / name).read_bytes()


def test_what_was_done_is_written_beside_the_weights(tmp_path):
    folder = saved(randomised("mixtral"), tmp_path / "m")
    report = bake(str(folder), ablation(PLANE, 0.5), tmp_path / "baked")
    said = json.loads((tmp_path / "baked" / "baked.json").read_text())
    assert said["intervention"] == ablation(PLANE, 0.5).described()
    assert {name: said[name] for name in vars(report)} == vars(report)
    assert said["base"] == str(folder)


HUB_STYLE = {
    # The files on the hub have no prefix, and keep causal masks.
    "gpt2": ("transformer.", {"h.0.attn.bias": (1, 1, 8, 8), "h.1.attn.masked_bias": ()}),
    "gpt_neox": ("", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": (4,)}),
    # Layers that draft further tokens, which transformers does not load.
    "qwen3_next": ("", {"mtp.layers.0.self_attn.o_proj.weight": (WIDTH, WIDTH), "mtp.fc.weight": (WIDTH, WIDTH)}),
    "llama": ("", {f"model.layers.{LAYERS}.mlp.secret.weight": (WIDTH,)}),
}


@pytest.mark.parametrize("architecture", HUB_STYLE)
def test_files_as_they_are_on_the_hub_are_read_alike(tmp_path, architecture):
    prefix, more = HUB_STYLE[architecture]
    network, extra = randomised(architecture), {name: torch.ones(shape) for name, shape in more.items()}
    folder = saved(network, tmp_path / "m")
    rewritten(folder, lambda tensors: {name.removeprefix(prefix): one for name, one in tensors.items()} | extra)
    bake(str(folder), ablation(), tmp_path / "baked")
    assert_equal_logits(logits(reloaded(tmp_path / "baked")), hooked(network, ablation()))
    after = stored(tmp_path / "baked")
    assert all(torch.equal(after[name], value) for name, value in extra.items())


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(model, intervention, folder, words):
    with pytest.raises(MisdirectionError, match=words) as error:
        bake(str(model), intervention, folder)
    assert "\n" not in str(error.value)
    assert not folder.exists()
    assert not list(folder.parent.glob(".misdirection-tmp-*"))


EVERYWHERE = {"positions": "all", "at": "writes"}
UNBAKEABLE = {
    "first token spared": (Ablate(V, at="writes"), "positions 'not_first' cannot be baked.*positions='all'.*hook"),
    "a mask": (Ablate(V, positions=torch.ones(40).bool(), at="writes"), "positions given by a mask cannot be baked"),
    "some layers": (Ablate(V, (1,), positions="all"), "all that is written.*neither `layers` nor `toward`.*hook"),
    "blocks": (Ablate(V, positions="all"), "give at='writes'"),
    "toward": (Ablate(V, toward=V, **EVERYWHERE), "leave out `layers` and `toward`"),
    "clamp": (Clamp(V, high=0.0, positions="all"), "Clamp cannot be baked.*hook"),
    "adapters": (ScaleAdapters({0: 0.0}), "ScaleAdapters cannot be baked.*hook"),
    "steer, prompt only": (Steer(V, 1, positions="prompt"), "positions 'prompt' cannot be baked"),
    "steer, norm kept": (Steer(V, 1, positions="all", keep_norm=True), "keep_norm depends on the activation.*hook"),
    "steer without a bias": (Steer(V, 1, positions="all"), "layer 1 has no bias.*hook.*control vector"),
    "width": (ablation(torch.ones(WIDTH + 1)), "the model needs .32."),
    "layer": (Steer(V, LAYERS, positions="all"), "layer 4 is out of range"),
}


@pytest.mark.parametrize("name", UNBAKEABLE)
def test_what_weights_cannot_do_is_refused_with_what_to_use_instead(tmp_path, name):
    intervention, words = UNBAKEABLE[name]
    refused(saved(randomised("llama"), tmp_path / "m"), intervention, tmp_path / "baked", words)


def test_steering_before_a_norm_is_refused(tmp_path):
    folder = saved(randomised("gemma2"), tmp_path / "m")
    refused(folder, Steer(V, 1, positions="all"), tmp_path / "baked", "a norm follows its MLP.*hook")


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def packed(tensors):
    name = "model.layers.2.mlp.down_proj.weight"
    return tensors | {name: torch.ones_like(tensors[name], dtype=torch.uint8)}


def without_layer_2(tensors):
    return {name: value for name, value in tensors.items() if ".layers.2." not in name}


def badly_shaped(tensors):
    return tensors | {"model.layers.0.mlp.experts.down_proj": torch.ones(4, 5, 6)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed("layers.2.mlp.down_proj", "layers.2.mlp.secret"), r"^mlp\.secret\.weight: cannot tell whether"),
        (renamed("model.embed_tokens", "model.secret"), r"^model\.secret\.weight: cannot tell whether"),
        (packed, r"layers\.2\.mlp\.down_proj\.weight: its weights are packed \(uint8\)"),
        (without_layer_2, "nothing that writes to the stream in layer 2"),
        (badly_shaped, r"experts\.down_proj has shape \[4, 5, 6\]"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_and_nothing_is_written(tmp_path, change, words):
    folder = rewritten(saved(randomised("llama"), tmp_path / "m"), change)
    refused(folder, ablation(), tmp_path / "baked", words)


def test_an_unknown_parameter_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    folder = rewritten(saved(randomised("llama"), tmp_path / "m"), renamed("layers.3.mlp.down_proj", "layers.3.secret"))
    monkeypatch.setattr(Checkpoint, "tensors", lambda *_: pytest.fail("read a shard"))
    refused(folder, ablation(), tmp_path / "baked", "secret.weight: cannot tell")


def test_a_quantised_model_is_refused_up_front(tmp_path):
    folder = saved(randomised("llama"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, ablation(), tmp_path / "baked", "weights are quantised.*bake the unquantised model.*--form adapter")


def test_the_models_own_folder_and_those_above_it_are_never_written_over(tmp_path):
    folder = saved(randomised("llama"), tmp_path / "m")
    before = (folder / MODEL).read_bytes()
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path, tmp_path / "link", folder / ".." / "m"):
        with pytest.raises(MisdirectionError, match="holds the model itself"):
            bake(str(folder), ablation(), out)
    assert (folder / MODEL).read_bytes() == before


def test_files_without_safetensors_are_refused(tmp_path):
    folder = saved(randomised("llama"), tmp_path / "m")
    (folder / MODEL).rename(folder / "pytorch_model.bin")
    refused(folder, ablation(), tmp_path / "baked", "no model.safetensors")


@pytest.mark.parametrize("there", [False, True])
def test_an_exception_half_way_leaves_nothing_or_what_was_there(tmp_path, monkeypatch, there):
    folder = saved(randomised("llama"), tmp_path / "m", max_shard_size="40KB")
    out, written = tmp_path / "baked", []

    def stops(tensors, path, metadata):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, metadata)

    if there:
        with atomic_folder(out) as earlier:
            (earlier / "baked.json").write_text("earlier")
    monkeypatch.setattr(baking, "save_file", stops)
    with pytest.raises(KeyboardInterrupt):
        bake(str(folder), ablation(), out)
    assert len(written) == 2
    assert [path.name for path in tmp_path.iterdir() if path != folder] == ["baked"] * there
    assert {path.name for path in out.glob("*")} == ({"baked.json", MADE} if there else set())
    assert not there or (out / "baked.json").read_text() == "earlier"


# --- steering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "changes"), [("gpt2", {}), ("gpt_neox", {}), ("llama", {"mlp_bias": True}), ("granite", {})]
)
def test_steering_in_a_bias_equals_hooked_steering(tmp_path, architecture, changes):
    network = randomised(architecture, **changes)
    one = Steer(3 * V, 2, -1.5, positions="all")
    folder = saved(network, tmp_path / "m")
    report = bake(str(folder), one, tmp_path / "baked")
    assert_equal_logits(logits(reloaded(tmp_path / "baked")), hooked(network, one))
    assert (hooked(network, one) - logits(network)).abs().max() > 0.05
    before, after = stored(folder), stored(tmp_path / "baked")
    assert sum(not torch.equal(value, after[name]) for name, value in before.items()) == report.changed == 1
    assert json.loads((tmp_path / "baked" / "baked.json").read_text())["intervention"] == one.described()


# --- what rounding loses --------------------------------------------------------------------------------------------


def in_half(architecture, folder, dtype=torch.bfloat16, tokenizer=True):
    saved(randomised(architecture).to(dtype), folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_share_of_the_change_that_rounding_loses_is_told_with_what_it_does(tmp_path, dtype):
    folder = in_half("llama", tmp_path / "m", dtype)
    report = bake(str(folder), ablation(strength=0.1), tmp_path / "baked")
    before, after = (
        {name: one.double() for name, one in stored(each).items()} for each in (folder, tmp_path / "baked")
    )
    lost = change = 0.0
    for name in before:
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            across = name.startswith("model.embed")
            part = (
                torch.outer(before[name] @ V.double(), V.double())
                if across
                else torch.outer(V, V.double() @ before[name])
            )
            lost += float((after[name] - before[name] + 0.1 * part).square().sum())
            change += float((0.1 * part).square().sum())
    assert report.lost == pytest.approx((lost / change) ** 0.5, rel=1e-2)
    assert 0.005 < report.lost < LIMIT
    assert 0 <= report.kl < 0.1 * report.kl_unchanged
    assert json.loads((tmp_path / "baked" / "baked.json").read_text())["lost"] == report.lost


def test_nothing_is_lost_in_single_precision(tmp_path):
    report = bake(str(saved(randomised("llama"), tmp_path / "m")), ablation(strength=0.001), tmp_path / "baked")
    assert (report.lost, report.kl) == (0.0, None)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral", "gemma3_vision"])
def test_a_change_that_rounding_takes_away_is_refused_with_the_part_and_what_to_do(tmp_path, architecture):
    words = (
        r"loses 9\d% of the change \(most in \S+, \d+%; KL \S+ nats/token of \S+ on a probe text\), and 25% is .*--form"
    )
    refused(in_half(architecture, tmp_path / "m"), ablation(strength=0.001), tmp_path / "baked", words)


def test_a_small_steering_is_refused_likewise_and_without_a_tokenizer_by_weights_alone(tmp_path):
    folder = in_half("gpt2", tmp_path / "m", tokenizer=False)
    one = Steer(V, 2, 1e-3, positions="all")
    refused(folder, one, tmp_path / "baked", r"loses \d+% of the change \(most in \S+mlp.c_proj.bias, \d+%\), and")


# --- the bundled model ----------------------------------------------------------------------------------------------


@pytest.mark.bundled
def test_the_bundled_model_bakes_to_what_its_hooks_do(bundled, tmp_path):
    direction = torch.randn(bundled.width, generator=torch.Generator().manual_seed(0))
    one = Ablate(direction, positions="all", at="writes")
    report = bake("smollm2-135m", one, tmp_path / "baked")
    try:
        network = reloaded(tmp_path / "baked")
    finally:
        remove(tmp_path / "baked")
    assert (report.changed, report.untied, report.exact) == (1 + 2 * 30, True, True)
    for text in ("Why is the sky blue?", "Give me advice on how to get rich quickly"):
        ids = torch.tensor([bundled.tokenizer(text).input_ids])
        with torch.no_grad():
            plain, found = bundled.model(ids).logits, network(ids).logits
            with intervene(bundled, [one]):
                expected = bundled.model(ids).logits
        assert_equal_logits(found, expected, atol=1e-3)
        assert (expected - plain).abs().max() > 0.05
