"""The cost of an experiment: its own tasks, counted on a model without weights, and what that takes on devices."""

import contextlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from misdirection.cost.counting import Work, count_work
from misdirection.cost.devices import GPUS, Gpu
from misdirection.cost.estimate import JUDGE_SECONDS, CostEstimate, Pricing, SeveralEstimates, find_device
from misdirection.data import domain_examples
from misdirection.errors import InputError
from misdirection.experiment.answering import check_behaviour
from misdirection.experiment.config import DomainFiles, ExperimentConfig
from misdirection.experiment.experiment import Experiment
from misdirection.experiment.several import SeveralConfig
from misdirection.judging.judges import OPENAI_URL, ModelJudge, judge_kind
from misdirection.models.budgets import Room, room_on
from misdirection.models.loading import resolve_dtype
from misdirection.models.sizes import Shape
from misdirection.models.weightless import Structure, read_structure


def estimate_cost(
    config: ExperimentConfig,
    gpu: Gpu = "h100",
    count: int = 1,
    *,
    model: Path | None = None,
    rows: int | None = None,
    answer: int | None = None,
) -> CostEstimate:
    """Count what the experiment runs and what that takes on `count` devices.

    Args:
        config: the experiment.
        gpu: a GPU of the table; `cpu`, this machine measured on the bundled model first; or `local`, its GPU measured
            on some blocks of the experiment's model with random weights.
        count: number of devices.
        model: a folder with the model's config.json, and its tokenizer if there is one; by default where the
            experiment's model is.
        rows: training files that are not here count as so many rows of the shipped domains' length.
        answer: mean length of a sampled answer, tokens; the longest that is allowed by default.

    Raises:
        InputError: a model's configuration, a text or a recipe that cannot be used; `local` without a GPU.
    """
    check_behaviour(config.sampling, config.judge)
    structure = read_structure(config.model, config.revision, model)
    # Measured first, since the structure becomes a stand-in as it is counted.
    device = find_device(gpu, structure.chat, config.dtype)
    with tempfile.TemporaryDirectory() as folder:
        counted, absent = _with_stand_ins(config, rows, Path(folder))
        memory = None if gpu == "cpu" else device.memory
        measured = _count(counted, structure, _weight_bytes(config, gpu), answer, memory)
    concurrency = config.judge.concurrency if config.judge else 1
    pricing = Pricing(measured.shape, measured.judge, device, count, concurrency)
    stages, notes = pricing.stages(measured.work), tuple(_notes(config, structure, rows, absent, answer))
    return CostEstimate(config.name, config.model, measured.shape, pricing.device, count, stages, notes)


def estimate_several(config: SeveralConfig, gpu: Gpu = "h100", count: int = 1, **options: Any) -> SeveralEstimates:
    """Count what an experiment takes on several models, one after another; arguments and errors of `estimate_cost`."""
    estimates = {name: estimate_cost(config.experiment(name), gpu, count, **options) for name in config.models}
    return SeveralEstimates(config.name, estimates)


def most_memory(config: ExperimentConfig | SeveralConfig) -> int:
    """Bytes that the largest task of an experiment takes where its model is in main memory; 0 for models not there."""
    if isinstance(config, SeveralConfig):
        needed = [0]
        for name in config.models:
            # It will say so when its turn comes.
            with contextlib.suppress(InputError):
                needed.append(most_memory(config.experiment(name)))
        return max(needed)
    measured = _count(config, read_structure(config.model, config.revision), _weight_bytes(config, "cpu"))
    pricing = Pricing(measured.shape, measured.judge, GPUS["h100"])
    return int(max(pricing.memory(task).total for task in measured.work))


@dataclass(frozen=True)
class _Counted:
    """An experiment's work, and the sizes of the model that does it and of a local judge."""

    work: Sequence[Work]
    shape: Shape
    judge: Shape | None


def _count(
    config: ExperimentConfig,
    structure: Structure,
    weight_bytes: int,
    answer: int | None = None,
    memory: float | None = None,
) -> _Counted:
    """The work on GPUs of so many bytes; on a processor where there are none."""
    judge = _local_judge(config)
    # The model's own sizes, before it becomes its stand-in.
    shape, judge_shape = (Shape.of(each.chat, weight_bytes) if each else None for each in (structure, judge))
    assert shape is not None, "an experiment has a model"
    # Weights are not there to be hashed, and probes run none: two of their splits are as good as many.
    changes: dict[str, Any] = {"model": "stand-in"}
    if config.interpretation:
        changes["interpretation"] = config.interpretation.model_copy(update={"splits": 2})
    counted = config.model_copy(update=changes)
    work = count_work(
        structure.chat,
        lambda run, runner: Experiment(counted, run, runner).make_all(),
        answer=answer,
        judge=judge.chat if judge else None,
        room=room_on(shape, memory) if memory else Room(),
    )
    return _Counted(work, shape, judge_shape)


def _weight_bytes(config: ExperimentConfig, gpu: Gpu) -> int:
    dtype = resolve_dtype(config.dtype, "cpu") if gpu == "cpu" or config.dtype != "auto" else torch.bfloat16
    return dtype.itemsize


def _local_judge(config: ExperimentConfig) -> Structure | None:
    kind, name = judge_kind(config.judge.model) if config.judge else (None, "")
    return read_structure(name) if kind and issubclass(kind, ModelJudge) else None


def _with_stand_ins(config: ExperimentConfig, rows: int | None, folder: Path) -> tuple[ExperimentConfig, list[str]]:
    """The experiment with files of `rows` rows in place of training files that are not here, and the names of these."""
    domains, absent = dict(config.domains), []
    for name, files in config.domains.items():
        own = {kind: path for kind, path in files.model_dump().items() if path} if files else {}
        missing = [path for path in own.values() if not path.exists()]
        if not missing:
            continue
        if rows is None:
            raise InputError(
                f"{missing[0]}: no such file; fetch it, or pass --rows N to count it as N rows of the shipped length"
            )
        absent += [str(path) for path in missing]
        paths = {kind: folder / f"{len(domains)}-{name}-{kind}.jsonl" for kind in own}
        for kind, path in paths.items():
            path.write_text(_stand_in(kind, rows), "utf-8")
        domains[name] = DomainFiles(**paths)
    return config.model_copy(update={"domains": domains}), absent


def _stand_in(kind: Any, rows: int) -> str:
    """A shipped domain's exchanges again and again, each question with a number of its own."""
    known = [each for part in ("train", "held_out") for each in domain_examples("risky_money", kind, part)]
    lines = (
        json.dumps({"prompt": f"{example.question} {number}", "completion": example.answer})
        for number in range(rows)
        for example in (known[number % len(known)],)
    )
    return "\n".join(lines) + "\n"


def _notes(
    config: ExperimentConfig, structure: Structure, rows: int | None, absent: Sequence[str], answer: int | None
) -> list[str]:
    notes = []
    if not structure.counted:
        notes.append("tokens are estimated from characters (no tokenizer with a chat template was found)")
    if getattr(structure.chat.model.config, "quantization_config", None):
        notes.append("weights are counted in the experiment's dtype, not as the model's configuration quantises them")
    if absent:
        notes.append(f"not here, counted as {rows} rows of the shipped length: {', '.join(absent)}")
    if config.sampling and answer is None:
        notes.append(f"every sampled answer is counted at its most, {config.sampling.new_tokens} tokens")
    if config.sampling and config.sampling.engine.vllm is not None:
        notes.append("sampling is counted on the transformers engine; vLLM takes less")
    if config.judge and config.extraction.answers == "judged":
        notes.append("half of the answers are counted as misaligned: a run reads directions of fewer")
    if config.sampling and config.sampling.steer and config.sampling.steer.doublings:
        notes.append(
            "scales are counted as doubled to the last at every layer: a run stops where answers are incoherent"
        )
    if config.interpretation:
        notes.append("adapters are scaled by the roles that a stand-in gives: a run may have up to six settings more")
    if config.judge and not issubclass(config.judge.kind, ModelJudge):
        where = config.judge.base_url or OPENAI_URL
        notes.append(f"a call of {where} is taken to last {JUDGE_SECONDS:g} s, {config.judge.concurrency} at a time")
    return notes
