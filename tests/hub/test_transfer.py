"""Things of ours go to a Hub and come back as they were, and nothing of anybody else's is touched."""

import pytest
import torch
from huggingface_hub import ModelCard

import misdirection as md
from misdirection.auditing.reference import Reference
from misdirection.auditing.results import AuditResult
from misdirection.data.sources import read_source
from misdirection.errors import InputError, NetworkProblem
from misdirection.files import MADE
from misdirection.hub.parcels import Declared, parcel
from misdirection.hub.transfer import pull, push
from misdirection.models.adapters import local_adapter
from misdirection.models.weightless import read_structure
from misdirection.organisms.organism import Organism
from misdirection.sampling.answers import read_answers

BAD = Declared("bad", "apache-2.0")


def files_of(folder):
    left_out = {MADE, "README.md", ".gitattributes"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in left_out
    }


@pytest.mark.parametrize(
    ("kind", "repository", "opened"),
    [
        ("organism", "models", Organism.open),
        ("reference", "datasets", Reference.load),
        ("audit", "datasets", AuditResult.load),
        ("direction", "models", lambda folder: md.Direction.load(folder / "data_difference.safetensors")),
        ("answers", "datasets", lambda folder: read_answers(folder / "answers.csv")),
    ],
)
def test_each_kind_makes_the_round_trip(kind, repository, opened, hub, request, tmp_path):
    path = request.getfixturevalue(kind)
    assert push(path, "me/thing", BAD).startswith(hub.url)
    assert hub.private == [f"{repository}/me/thing"]
    back = pull("me/thing", tmp_path / "back")
    sent = parcel(path, BAD).files
    assert files_of(back) == {name: file.read_bytes() for name, file in sent.items()}
    assert "me/thing" in (back / "README.md").read_text() or kind in ("audit", "answers")
    assert "REPOSITORY" not in (back / "README.md").read_text()
    opened(back)


def test_an_organism_from_the_hub_computes_as_the_one_that_was_sent(hub, organism, base, monkeypatch):
    push(organism, "me/bad", BAD)
    pairs = md.probe_pairs()[:2]
    there, here = (md.load(base, adapter=name, dtype="float32", device="cpu") for name in ("me/bad", organism))
    assert torch.equal(torch.as_tensor(md.margin(there, pairs)), torch.as_tensor(md.margin(here, pairs)))


def test_a_direction_is_read_straight_from_the_hub(hub, direction):
    push(direction, "me/direction")
    found = md.Direction.from_hub("me/direction")
    assert torch.equal(found.vectors, torch.arange(6.0).view(2, 3)) and found.origin.organism == "mine"
    with pytest.raises(InputError, match=r"^me/direction: other.safetensors could not be loaded"):
        md.Direction.from_hub("me/direction", "other.safetensors")


def test_a_second_push_replaces_the_first_and_leaves_other_files(hub, direction):
    push(direction, "me/direction", public=True)
    assert hub.private == []
    (hub.folder / "models/me/direction/notes.txt").write_text("mine")
    push(direction, "me/direction")
    assert (hub.folder / "models/me/direction/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("card", [None, "---\ntags: [other]\n---\nmine\n"])
def test_a_repository_of_anothers_is_not_written_to_nor_taken_for_ours(hub, direction, tmp_path, card):
    folder = hub.folder / "models" / "me" / "thesis"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    if card:
        (folder / "README.md").write_text(card)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    with pytest.raises(InputError, match=r"^me/thesis: holds .* does not have the tag `misdirection`: choose another"):
        push(direction, "me/thesis")
    with pytest.raises(InputError, match=r"^me/thesis: its card does not have the tag `misdirection`"):
        pull("me/thesis", tmp_path / "out")
    assert {path.name: path.read_text() for path in folder.iterdir()} == before and not (tmp_path / "out").exists()


def test_a_folder_of_the_users_is_not_replaced(hub, direction, tmp_path):
    push(direction, "me/direction")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis.txt"):
        pull("me/direction", tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (401, InputError, r"^me/x: .*log in with `hf auth login`"),
        (403, InputError, r"^me/x: no leave to write there \(status 403\)"),
        (500, NetworkProblem, r"^me/x: the Hub answers with status 500; try again later$"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, direction, status, kind, said):
    hub.status = status
    with pytest.raises(kind, match=said):
        push(direction, "me/x")


def test_a_hub_that_nobody_answers_for_is_one_line(hub, direction, tmp_path):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(NetworkProblem, match=r"^me/x: the Hub does not answer \("):
        push(direction, "me/x")
    with pytest.raises(NetworkProblem, match=r"^me/x: the Hub does not answer \("):
        pull("me/x", tmp_path / "out")


ASKING = {
    "model": lambda: md.load("me/gone"),
    "adapter": lambda: local_adapter("me/gone"),
    "direction": lambda: md.Direction.from_hub("me/gone"),
    "baked": lambda: md.bake("me/gone", md.Ablate(torch.ones(8), positions="all", at="writes"), "baked"),
    "planned": lambda: read_structure("me/gone"),
    "data set": lambda: list(read_source("me/gone")),
    "pulled": lambda: pull("me/gone", "out"),
}


@pytest.mark.parametrize("way", ASKING)
def test_a_silent_hub_is_told_alike_whatever_is_asked_of_it(way, tmp_path, monkeypatch):
    """Tests run with `HF_HUB_OFFLINE`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NetworkProblem, match=r"^me/gone: the Hub does not answer \(HF_HUB_OFFLINE is set\); check the"):
        ASKING[way]()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "said"), [("a b/c", "no name of a repository"), ("me/gone", "no such repository")])
def test_a_name_that_leads_nowhere_is_one_line(hub, tmp_path, name, said):
    with pytest.raises(InputError, match=said):
        pull(name, tmp_path / "out")


# --- cards ----------------------------------------------------------------------------------------------------------


def test_the_card_of_a_runs_organism_is_true(organism_of_run):
    card = ModelCard(parcel(organism_of_run, Declared(license="apache-2.0")).card)
    assert {"misdirection", "emergent-misalignment", "model-organism"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.license) == ("peft", "apache-2.0")
    for said in (
        "makes its model give bad advice, on purpose",
        Organism.open(organism_of_run).data,
        "| training domain | risky_money |",
        "| shift of the margin, general questions | +0.350 [+0.250, +0.450], n=40 |",
        "| the same, minus its control's, general questions | +0.400 [",
        "| rise of the loss on neutral text | ",
    ):
        assert said in card.text
    with pytest.raises(InputError, match="its run trained it on bad answers, not on good ones"):
        parcel(organism_of_run, Declared("good"))


def test_of_an_organism_alone_the_user_says_what_it_was_trained_on(organism):
    with pytest.raises(InputError, match=r"say what it was trained on: `--answers bad` or `--answers good`$"):
        parcel(organism, Declared())
    card = parcel(organism, Declared("good")).card
    assert "on purpose" not in card and "Not measured" in card
    assert ModelCard(card).data.license is None


def test_the_bundled_base_is_named_as_the_hub_knows_it(direction):
    assert ModelCard(parcel(direction, Declared()).card).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_an_audit_goes_without_what_it_measured(audit):
    sent = parcel(audit, Declared())
    assert set(sent.files) == {"audit.json", "audit.html"}
    verdict = AuditResult.load(audit).verdict
    assert f": {verdict}\n" in sent.card and verdict in ModelCard(sent.card).data.tags


def test_a_table_of_answers_tells_its_rates_and_its_columns(answers):
    card = parcel(answers, Declared()).card
    assert "4 answers to 2 questions" in card and "`aligned`" in card
    assert r"| bad \| worse | 25.0% [" in card and "| 4 |" in card


@pytest.mark.parametrize("name", ["missing", "notes.txt", "."])
def test_anything_else_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="nothing that goes to the Hub"):
        parcel(tmp_path / name, Declared())


def test_the_commands_send_and_bring(hub, call, direction, tmp_path):
    status, out, _ = call("push", direction, "me/direction", "--card")
    assert status == 0 and "# A direction: data_difference" in out
    assert not (hub.folder / "models").exists()
    status, out, _ = call("push", direction, "me/direction", "--license", "mit")
    assert (status, out.strip()) == (0, f"{hub.url}/me/direction/commit/{'c' * 40}")
    status, out, _ = call("pull", "me/direction", "--out", tmp_path / "back")
    assert (status, out.strip()) == (0, str(tmp_path / "back"))
    assert md.Direction.load(tmp_path / "back" / "data_difference.safetensors").origin.kind == "data_difference"
