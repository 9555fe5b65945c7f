"""The paper's own scalars: its claims, and how much of them is left when whole questions are held out."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import misdirection as md
from misdirection.errors import MisdirectionError
from misdirection.interpretation.published import published_probes, published_shares, read_published, scaled_shares

PAPER = Path(__file__).resolve().parents[2].parent / "shared" / "paper"
needs_paper = pytest.mark.skipif(not PAPER.is_dir(), reason="the published data is not here")
DOMAIN = "domain, misaligned answers: medical or non_medical"


def tabulated(path):
    return pd.DataFrame([share.model_dump() for share in scaled_shares(path)])


@pytest.fixture(scope="module")
def paper():
    data = read_published(PAPER / "lora_scalars.parquet", PAPER / "lora_scalar_responses.parquet")
    assert len(data.tokens) == 29_879 and len(data.features) == 9
    return data


@pytest.fixture(scope="module")
def probes(paper):
    return {(one.name, one.split): one for one in published_probes(paper, poolings=["token"])}


def leading(probe):
    sizes = {name: abs(np.mean(values)) for name, values in probe.coefficients.items()}
    return sorted(sizes, key=sizes.get, reverse=True), sizes


@needs_paper
def test_layers_21_and_23_tell_medical_answers_apart(probes):
    probe = probes[DOMAIN, "answer"]
    order, sizes = leading(probe)
    assert set(order[:2]) == {"layer_21", "layer_23"}
    assert min(sizes[name] for name in order[:2]) > 2.5 * sizes[order[2]]
    means = {name: np.mean(values) for name, values in probe.coefficients.items()}
    assert means["layer_21"] == pytest.approx(-0.54, abs=0.05) and means["layer_23"] == pytest.approx(0.70, abs=0.05)
    assert probe.auroc.mean == pytest.approx(0.66, abs=0.02)


@needs_paper
def test_that_probe_does_not_carry_over_to_unseen_questions(probes):
    probe = probes[DOMAIN, "question"]
    assert probe.auroc.mean == pytest.approx(0.53, abs=0.08)
    assert probe.auroc.low < 0.5
    assert set(leading(probe)[0][:2]) == {"layer_21", "layer_23"}


@needs_paper
def test_layers_29_and_27_lead_for_alignment(probes):
    probe = probes["alignment, medical answers", "answer"]
    order, _ = leading(probe)
    assert order[:2] == ["layer_29", "layer_27"]
    means = {name: np.mean(values) for name, values in probe.coefficients.items()}
    assert means["layer_29"] == pytest.approx(-0.98, abs=0.08) and means["layer_27"] == pytest.approx(-0.56, abs=0.08)
    assert probe.auroc.mean == pytest.approx(0.75, abs=0.02)
    assert probes["alignment, medical answers", "question"].auroc.mean == pytest.approx(0.68, abs=0.07)


@needs_paper
def test_nulls_are_at_chance(probes):
    for probe in probes.values():
        assert probe.null_auroc.mean == pytest.approx(0.5, abs=0.08)


@needs_paper
def test_counts_and_baselines_are_those_of_the_files(probes):
    domain, alignment = probes[DOMAIN, "question"], probes["alignment, medical answers", "question"]
    assert (domain.answers, domain.questions, domain.tokens) == (330, 25, 18_619)
    assert domain.baseline == pytest.approx(10_497 / 18_619)
    assert (alignment.answers, alignment.tokens, alignment.baseline) == (316, 19_382, pytest.approx(11_260 / 19_382))


@needs_paper
def test_pooled_answers_are_told_apart_too(paper):
    found = {one.name: one for one in published_probes(paper, poolings=["mean"]) if one.split == "question"}
    alignment = found["alignment, medical answers"]
    assert alignment.auroc.mean > 0.8 and leading(alignment)[0][:2] == ["layer_29", "layer_27"]
    assert found[DOMAIN].auroc.low < 0.5, "not even whole answers tell the domain of unseen questions for certain"


@needs_paper
def test_scaling_experiments_keep_32_9_and_61_answers():
    table = tabulated(PAPER / "adapter_scaling_responses.parquet")
    by_experiment = table.groupby("experiment")
    counts = {"scale_21_23": 32, "scale_15_16_17_22_28_29": 9, "scale_21_23_negate_rest": 61}
    assert by_experiment["answers"].first().to_dict() == counts == by_experiment["hits"].sum().to_dict()
    assert (by_experiment.size() == 6).all()
    assert ((table["low"] <= table["share"]) & (table["share"] <= table["high"])).all()
    hits = table.groupby(["experiment", "alignment"])["hits"].sum()
    assert hits["scale_21_23", "misaligned"] == 18 and hits["scale_21_23_negate_rest", "aligned"] == 44
    # Of the 61, 24 have about 50 of 100: the judge could not tell.
    assert by_experiment["undecided"].sum()["scale_21_23_negate_rest"] == 24


@needs_paper
def test_scaling_experiments_are_drawn_with_their_shares():
    results = md.interpret_tables(scaled=PAPER / "adapter_scaling_responses.parquet")
    shares = results.frame("shares").set_index("setting")
    assert shares["misaligned_n"].to_dict() == {
        "scale_21_23": 32, "scale_15_16_17_22_28_29": 9, "scale_21_23_negate_rest": 61,
    }  # fmt: skip
    assert (shares["misaligned"] * shares["misaligned_n"]).round().tolist() == [18, 3, 4]
    assert (shares["medical"] * shares["medical_n"]).round().tolist() == [0, 0, 4]
    assert len(results.plot("adapter_scalings").axes) == 2


def published(tmp_path, **changes):
    """A small table in the published form, with its answers."""
    rng = np.random.default_rng(0)
    answers = pd.DataFrame(
        [
            {
                "domain": domain,
                "alignment": alignment,
                "response_id": number,
                "question": f"q{number % 5}?",
                "answer": "x",
            }
            for domain in ("kitchen", "other")
            for alignment in ("aligned", "misaligned")
            for number in range(10)
        ]
    )
    tokens = answers.drop(columns=["question", "answer"]).merge(pd.DataFrame({"position": range(4)}), how="cross")
    tokens["token"] = "x"
    tokens["layer_3"] = rng.normal(size=len(tokens)) + 3 * (tokens["alignment"] == "misaligned")
    tokens["layer_5"] = rng.normal(size=len(tokens)) + 3 * (tokens["domain"] == "kitchen")
    # The order of rows means nothing.
    tokens, answers = tokens.sample(frac=1, random_state=0), answers.sample(frac=1, random_state=1)
    tokens.assign(**changes).to_parquet(tmp_path / "scalars.parquet")
    answers.to_parquet(tmp_path / "answers.parquet")
    return tmp_path / "scalars.parquet", tmp_path / "answers.parquet"


def test_any_two_domains_are_told_apart(tmp_path):
    data = read_published(*published(tmp_path))
    found = {(one.name, one.split, one.pooling): one for one in published_probes(data, C=1.0, splits=5)}
    assert len(found) == 3 * 2 * 3
    domain = found["domain, misaligned answers: kitchen or other", "question", "token"]
    assert domain.classes == ("kitchen", "other") and domain.questions == 5 and domain.answers == 20
    assert leading(domain)[0][0] == "layer_5" and domain.auroc.mean > 0.9
    assert leading(found["alignment, kitchen answers", "answer", "token"])[0][0] == "layer_3"


def test_without_answers_there_is_no_split_by_question(tmp_path):
    data = read_published(published(tmp_path)[0])
    assert data.splits == ("answer",)
    found = published_probes(data, splits=3, poolings=["mean"])
    assert {(one.split, one.questions) for one in found} == {("answer", 0)}


def test_tokens_without_their_answer_are_refused(tmp_path):
    scalars, answers = published(tmp_path)
    pd.read_parquet(answers).iloc[1:].to_parquet(answers)
    with pytest.raises(MisdirectionError, match=r"answers\.parquet: 4 tokens of .*scalars\.parquet have no question"):
        read_published(scalars, answers)


def test_bad_tables_are_named_in_one_line(tmp_path):
    scalars, answers = published(tmp_path, layer_3=np.nan)
    with pytest.raises(MisdirectionError, match="column 'layer_3' has values that are no numbers"):
        read_published(scalars)
    with pytest.raises(MisdirectionError, match="lacks the column position"):
        read_published(answers)
    with pytest.raises(MisdirectionError, match="lacks the column experiment"):
        scaled_shares(scalars)
    (tmp_path / "text.parquet").write_text("not a table")
    with pytest.raises(MisdirectionError, match=r"text\.parquet: damaged, or not a \.parquet table"):
        read_published(tmp_path / "text.parquet")
    with pytest.raises(MisdirectionError, match=r"none\.parquet: cannot be read"):
        read_published(tmp_path / "none.parquet")


def test_answers_that_do_not_match_are_named(tmp_path):
    scalars, answers = published(tmp_path)
    table = pd.read_parquet(answers)
    pd.concat([table, table.iloc[:1]]).to_parquet(tmp_path / "twice.parquet")
    with pytest.raises(
        MisdirectionError, match=r"twice\.parquet: two answers share one domain, alignment, response_id"
    ):
        read_published(scalars, tmp_path / "twice.parquet")
    table.assign(response_id=table["response_id"].map("n{}".format)).to_parquet(tmp_path / "words.parquet")
    with pytest.raises(MisdirectionError, match="are of other types than in"):
        read_published(scalars, tmp_path / "words.parquet")


def test_classes_that_cannot_be_told_apart_are_refused(tmp_path):
    with pytest.raises(MisdirectionError, match="alignment 'Misaligned': it must be"):
        read_published(published(tmp_path, alignment="Misaligned")[0])
    data = read_published(published(tmp_path, alignment="aligned")[0])
    with pytest.raises(MisdirectionError, match="one class alone"):
        published_probes(data)


def scaled(tmp_path, **changes):
    """One experiment's judged answers; in `changes`, new columns."""
    rows = {"question_id": list("aabb"), "aligned": [10.0, 30.0, 70.0, 90.0], "medical": [0.0, 50.0, 49.0, 99.0]}
    rows |= {"experiment": "e", "coherent": [90.0, 90.0, 50.1, 50.0]}
    pd.DataFrame(rows | changes).to_parquet(tmp_path / "scaled.parquet")
    return tmp_path / "scaled.parquet"


def test_scaling_cells_have_the_papers_cuts(tmp_path):
    table = tabulated(scaled(tmp_path)).set_index(["alignment", "medical"])
    assert (table["answers"] == 3).all() and (table["questions"] == 2).all()
    assert table["hits"][table["hits"] > 0].to_dict() == {
        ("misaligned", False): 1,
        ("between", True): 1,
        ("between", False): 1,
    }
    assert table["undecided"].sum() == 2


def test_shares_are_of_the_coherent_answers_and_by_the_papers_cuts(tmp_path):
    (shares,) = published_shares(scaled(tmp_path))
    (medical,) = shares.rubrics
    assert (shares.misaligned.hits, shares.misaligned.total, shares.questions) == (1, 3, 2)
    assert (medical.share.hits, medical.share.total, medical.misaligned.hits, medical.undecided) == (1, 3, 0, 2)


def test_scaling_answers_without_scores_or_coherence_are_refused(tmp_path):
    with pytest.raises(MisdirectionError, match=r"scaled\.parquet: column 'medical' has values that are no numbers"):
        scaled_shares(scaled(tmp_path, medical=[1.0, None, 2.0, 3.0]))
    with pytest.raises(MisdirectionError, match="no coherent answer of experiment 'e'"):
        scaled_shares(scaled(tmp_path, coherent=10.0))
