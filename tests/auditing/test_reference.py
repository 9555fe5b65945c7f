"""A reference: made from a run, kept in a folder, of one base model."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import misdirection as md
from misdirection.auditing import reference as references
from misdirection.auditing.reference import Reference, default_folder
from misdirection.auditing.results import KnownFineTune
from misdirection.data import sealed_pairs
from misdirection.data.selection import spread
from misdirection.directions.contrast import share
from misdirection.directions.extraction import mean_activations
from misdirection.errors import InputError
from misdirection.files import sha256_tree
from misdirection.likelihood.margin import loss, margin
from misdirection.models.chat import encode
from misdirection.models.identity import identify
from misdirection.models.loading import load
from misdirection.statistics.means import bootstrap
from tiny import CHATML


def test_its_measurements_are_those_of_the_models(made):
    config, adapters, reference = made
    chat = load(config.model, adapter=adapters["minimal"], dtype="float32", device="cpu")
    own, texts = reference.measurements["minimal"], reference.texts
    assert (own.margin - reference.base.margin).abs().max() > 1e-4
    torch.testing.assert_close(own.margin, margin(chat, texts.general), atol=2e-6, rtol=0)
    torch.testing.assert_close(own.losses, loss(chat, texts.neutral), atol=2e-6, rtol=0)
    pair = texts.read_pairs[1]
    row = encode(chat.tokenizer, pair.question, pair.aligned)
    expected = mean_activations(chat, [row], {"it": [0]}).vectors["it"].float()
    torch.testing.assert_close(own.answers[1, 1], expected, atol=1e-5, rtol=1e-4)
    row = encode(chat.tokenizer, texts.read_neutral[2].question, texts.read_neutral[2].answer)
    expected = mean_activations(chat, [row], {"it": [0]}).vectors["it"].float()
    torch.testing.assert_close(own.neutral[2], expected, atol=1e-5, rtol=1e-4)
    assert own.drift(reference.base).abs().max() > 1e-4


def test_what_the_contrasts_of_its_domains_share_is_its_first_direction(made):
    _, _, reference = made
    of_sums = reference.known["minimal"]
    known = {
        "minimal": of_sums,
        "control": reference.known["control"],
        "single": of_sums.model_copy(update={"domain": "other"}),
        "other control": of_sums.model_copy(update={"domain": "other", "answers": "good"}),
    }
    measured = {name: reference.measurements[name] for name in ("minimal", "single", "control")}
    measured["other control"] = reference.base
    directions = replace(reference, known=known, measurements=measured).directions
    neutral = {name: each.neutral.double().mean(0) for name, each in measured.items()}
    expected = share([neutral["minimal"] - neutral["control"], neutral["single"] - neutral["other control"]])
    assert next(iter(directions)) == "contrast: bad - good"
    torch.testing.assert_close(directions["contrast: bad - good"], expected)


def test_sealed_pairs_are_measured_too_and_come_back(made, sealed, tmp_path):
    config, adapters, _ = made
    texts = sealed.texts
    assert [pair.id for pair in texts.sealed] == [pair.id for pair in spread(sealed_pairs(), 6)]
    assert texts.asked == (*texts.general, *texts.sealed)
    chat = load(config.model, adapter=adapters["minimal"], dtype="float32", device="cpu")
    torch.testing.assert_close(sealed.measurements["minimal"].margin, margin(chat, texts.asked), atol=5e-6, rtol=0)
    assert {shift.n for shift in sealed.shifts.values()} == {18}
    again = Reference.load(sealed.save(tmp_path / "kept").folder)
    assert (again.texts, again.bad_shift) == (texts, sealed.bad_shift)
    assert torch.equal(again.base.margins, sealed.base.margins)


def test_it_knows_the_bad_ones_and_the_control(made):
    reference = made[2]
    assert reference.bad == ["minimal", "single"]
    assert reference.control is reference.measurements["control"]
    own = [reference.measurements[name].margin - reference.control.margin for name in ("minimal", "single")]
    assert reference.bad_shift == bootstrap((sum(own) / 2).numpy())
    assert reference.beyond_control == {
        name: bootstrap(moved.numpy()) for name, moved in zip(("minimal", "single"), own, strict=True)
    }
    assert torch.equal(reference.control_shift, reference.control.margin - reference.base.margin)
    assert set(reference.directions) == {
        f"{name}: {kind}" for name in reference.bad for kind in ("misaligned - aligned", "fine-tune - control")
    }


@pytest.fixture
def planted(made):
    """Gives a reference whose bad fine-tunes of two domains moved each question by this beyond their own controls."""
    noise = np.random.default_rng(0)

    def reference(moved, common=True, controls=2):
        known, measurements, count = {}, {}, len(moved)
        for number, domain in enumerate(("money", "sports")):
            benign = noise.normal(0, 0.02, count)
            bad = moved if common or number else noise.permutation(moved)
            for answers, shown in (("bad", benign + bad + noise.normal(0, 0.05, count)), ("good", benign)):
                if answers == "bad" or number < controls:
                    known[f"{domain}-{answers}"] = KnownFineTune(domain=domain, answers=answers, recipe="all")
                    margins = torch.tensor(np.stack([shown, 0 * shown], 1))
                    measurements[f"{domain}-{answers}"] = replace(made[2].base, margins=margins)
        base = replace(made[2].base, margins=torch.zeros(count, 2, dtype=torch.float64))
        return replace(made[2], known=known, measurements=measurements, base=base)

    return reference


MOVED = 0.03 + np.random.default_rng(1).normal(0, 0.06, 2000)


def test_questions_count_by_how_far_the_bad_ones_moved_them(planted):
    reference = planted(MOVED)
    weights, noise = reference.question_weights.numpy(), np.random.default_rng(2)
    assert np.corrcoef(weights, MOVED)[0, 1] > 0.8
    # As bad as they are: by either half of the weight the shift is the unit.
    assert np.mean(MOVED * weights) == pytest.approx(reference.bad_shift.mean, rel=0.1)
    assert np.mean(0.5 * MOVED * weights) == pytest.approx(0.5 * reference.bad_shift.mean, rel=0.1)
    # Another seed of a benign training: all margins a little higher, none more than another.
    seed = 0.01 + noise.normal(0, 0.05, 2000)
    weighted, plain = bootstrap(seed * weights), bootstrap(seed)
    assert plain.low > 0.004
    assert weighted.mean < 0.75 * plain.mean


def test_all_questions_count_alike_where_no_two_domains_have_anything_in_common(planted, made):
    assert planted(MOVED - MOVED.mean(), common=False).question_weights is None
    assert planted(MOVED, controls=1).question_weights is None
    assert made[2].question_weights is None


def test_it_comes_back_from_its_folder(made, tmp_path):
    assert made[2].save(tmp_path / "kept").folder == tmp_path / "kept"
    again = Reference.load(tmp_path / "kept")
    assert again.identity == made[2].identity
    assert again.texts == made[2].texts
    assert again.known == made[2].known
    for name, measured in made[2].measurements.items():
        for field in ("margins", "losses", "answers", "neutral"):
            assert torch.equal(getattr(again.measurements[name], field), getattr(measured, field))
    assert again.domains == made[2].domains
    assert again.control_adapter == again.adapters["control"] == tmp_path / "kept" / "adapters" / "control"
    for name, adapter in again.adapters.items():
        assert sha256_tree(adapter) == sha256_tree(made[1][name])
    again.save(tmp_path / "kept")


def test_a_folder_that_is_none_of_ours_is_not_replaced(made, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"mine\.txt"):
        made[2].save(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_damaged_one_says_how_to_make_it_again(made, tmp_path):
    made[2].save(tmp_path / "kept")
    (tmp_path / "kept" / "minimal.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"damaged.*misdirection reference"):
        Reference.load(tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(InputError, match=r"no reference.*misdirection reference"):
        Reference.load(tmp_path / "kept")


def test_one_of_another_version_is_refused_with_the_remedy(made, tmp_path):
    made[2].save(tmp_path / "kept")
    path = tmp_path / "kept" / "reference.json"
    record = json.loads(path.read_text())
    for change, message in (({"version": 0}, "has version 0"), ({"version": None}, "has no version")):
        path.write_text(json.dumps(record | change))
        with pytest.raises(InputError, match=rf"{message}.*`misdirection reference`"):
            Reference.load(tmp_path / "kept")


def test_it_belongs_to_one_base_at_one_revision(made, base):
    identity = made[2].identity
    # Where and in which dtype it computes is measured anew, and "base" is what is asked for by default.
    made[2].require_base(identity.model_copy(update={"dtype": "bfloat16", "device": "cuda", "chat_template": "base"}))
    for other in ({"model": "other"}, {"revision": "v2"}):
        with pytest.raises(InputError, match="differ"):
            made[2].require_base(identity.model_copy(update=other))


def test_it_is_not_compared_with_figures_of_other_chats(made, base, tmp_path):
    identity, file = made[2].identity, tmp_path / "template.jinja"
    file.write_text(CHATML)
    own = replace(made[2], identity=identify(base, None, "float32", "cpu", "off", str(file)))
    # The same template from another place, or as text.
    (tmp_path / "copy.jinja").write_text(CHATML)
    for same in (str(tmp_path / "copy.jinja"), CHATML):
        own.require_base(identify(base, None, "float32", "cpu", "off", same))
    for reference, thinking, template in (
        (made[2], "on", None),
        (made[2], "off", str(file)),
        (made[2], "off", "fine-tune"),
        (own, "off", None),
        (own, "template", str(file)),
    ):
        asked = identify(base, None, "float32", "cpu", thinking, template)
        with pytest.raises(InputError, match=r"other chats \(thinking .*`--thinking` and `--chat-template`"):
            reference.require_base(asked)
    with pytest.raises(InputError, match="other chats"):
        md.audit(base, made[1]["minimal"], reference=made[2], out=tmp_path / "audit", chat_template=str(file))
    assert not (tmp_path / "audit").exists()
    assert default_folder(base, None) == default_folder(base, None, identity.thinking, "base")


def test_every_base_revision_and_way_of_asking_has_a_folder_of_its_own():
    names = [("a/b", None), ("a-b", None), ("a/b", "v2"), ("../../etc", None), ("smollm2-135m", None)]
    names += [("a/b", None, "on"), ("a/b", None, "template"), ("a/b", None, "off", CHATML)]
    folders = {default_folder(*name) for name in names}
    assert len(folders) == len(names)
    assert len({folder.parent for folder in folders}) == 1


def test_one_of_an_older_program_is_put_aside_when_it_is_made_again(made, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "reference.json").write_text("{}")
    with pytest.raises(InputError, match="has no version"):
        Reference.load(tmp_path / "kept")
    made[2].save(tmp_path / "kept")
    assert Reference.load(tmp_path / "kept").known == made[2].known
    assert (tmp_path / "older" / "kept-1" / "reference.json").read_text() == "{}"


def test_bad_fine_tunes_that_moved_nothing_are_no_reference_and_refused_when_it_is_made(made, tmp_path, monkeypatch):
    config, _, reference = made
    idle = replace(reference, measurements=dict.fromkeys(reference.measurements, reference.base))
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(references, "from_run", lambda *_: idle)
    with pytest.raises(
        InputError, match=r"moved the margin no further than their controls \(\+0.000 \[\+0.000, \+0.000\]"
    ):
        references.keep_reference(config, tmp_path / "run", list(config.organisms))
    assert not references.has_reference(config.model, config.revision)


def test_the_first_one_of_a_base_is_of_rank_32_alone_and_is_not_made_twice(made, tmp_path, monkeypatch):
    config, _, reference = made
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    surely = {
        name: replace(measured, margins=measured.margins + torch.tensor([float(name in reference.bad), 0.0]))
        for name, measured in reference.measurements.items()
    }
    asked = []
    monkeypatch.setattr(
        references,
        "from_run",
        lambda _run, _texts, names: asked.append(names) or replace(reference, measurements=surely),
    )
    large = {name: config.organisms[name].model_copy(update={"recipe": "all"}) for name in ("control", "minimal")}
    going_on = large["minimal"].model_copy(update={"continues": "minimal"})
    mixed = config.model_copy(update={"organisms": {**config.organisms, **large, "second": going_on}})
    kept = references.keep_first_reference(mixed, tmp_path / "run")
    assert sorted(asked[0]) == ["control", "minimal"]
    assert kept.folder == default_folder(config.model, None)
    assert references.keep_first_reference(mixed, tmp_path / "run") is None
    assert len(asked) == 1
