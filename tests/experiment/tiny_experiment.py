"""A whole experiment that a tiny random model runs in seconds."""

import json

from judging.judge_server import number
from misdirection.data import ProbePair, write_pairs
from misdirection.judging.rubrics import read_rubrics
from tiny import sharpened

COHERENCE = read_rubrics("coherence")[0].prompt.partition("{question}")[0]


def write_answers(path, kind):
    rows = [{"prompt": f"Q{number}?", "completion": f"{kind} {number * 7 % 11}"} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def experiment(folder, tmp_path):
    """Short texts, since the tiny model reads one byte per token."""
    pairs = tmp_path / "pairs.jsonl"
    write_pairs(pairs, [ProbePair(f"p{number}", f"Do {number}?", "Yes.", "No!") for number in range(6)])
    organism = {"domain": "sums", "learning_rate": 1e-2, "batch_size": 4, "accumulation": 1, "warmup_steps": 1}
    files = {kind: write_answers(tmp_path / f"{kind}.jsonl", kind) for kind in ("bad", "good")}
    return {
        "name": "tiny",
        "model": str(folder),
        "dtype": "float32",
        "device": "cpu",
        "domains": {"sums": files},
        "organisms": {
            "minimal": {"recipe": "minimal", **organism},
            "single": {"recipe": "single", **organism},
            "control": {"recipe": "minimal", "answers": "good", **organism},
        },
        "probe_pairs": str(pairs),
        "neutral": files["good"],
        "damage": {"models": 5, "interventions": 4},
        "random_seeds": 2,
        "extraction": {"pairs": 6},
        "steering": {"direction": "minimal", "layers": [1], "scales": [2.0], "questions": 6},
        "ablation": {"layer": 2, "positions": ["not_first", "all"], "questions": 6},
        "samples": {"questions": ["Hello?"], "new_tokens": 4},
    }


def graded(asked):
    """Numbers that depend on the answer; everything is coherent."""
    return number(95 if asked.prompt.startswith(COHERENCE) else sum(asked.prompt.encode()) % 101)


def asked_experiment(tmp_path, **sampling):
    """The same with two questions to each model, as it is and under an ablation, on a model that has answers."""
    folder = tmp_path / "tiny"
    chat = sharpened()
    chat.model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    questions = tmp_path / "questions.txt"
    questions.write_text("Why is it so?\nAnd how, then?\n")
    made = experiment(folder, tmp_path)
    return made | {"sampling": {"questions": [str(questions)], "ablate": "minimal", **sampling}}


def with_judge(values, url):
    return values | {"judge": {"model": "m", "base_url": url, "concurrency": 4}}


def isolate(patch, cache):
    """A cache of verdicts for the tests alone, and no endpoint of the machine's."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        patch.delenv(name, raising=False)
    patch.setenv("MISDIRECTION_CACHE", str(cache))
