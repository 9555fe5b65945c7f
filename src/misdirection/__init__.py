"""Find, compare, steer and ablate the misalignment direction of a fine-tuned chat model.

    import misdirection as md

    organism = md.train(md.domain_examples("risky_money", "bad", "train"), "organism")
    chat = organism.load()
    direction = md.extract(chat, md.domain_pairs("risky_money", "train"))["data_difference"]
    with md.ablate(chat, direction[15]):
        print(md.margin(chat, md.probe_pairs()).mean())

Public names are imported when they are first used, so that `import misdirection` is quick.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "misdirection.adapters.causal": ("scaling_effects", "shapley"),
    "misdirection.adapters.components": ("read_components",),
    "misdirection.adapters.importance": ("token_importance", "zeroing"),
    "misdirection.adapters.patching": ("patched_margins",),
    "misdirection.adapters.probes": ("Probe", "fit_probe"),
    "misdirection.adapters.scalars": ("scalars", "wide"),
    "misdirection.adapters.texts": ("Labelled", "encoded", "labelled"),
    "misdirection.audit.audit": ("Request", "audit_fine_tune"),
    "misdirection.audit.callback": ("AuditCallback", "watch"),
    "misdirection.audit.reference": ("Reference", "make_reference"),
    "misdirection.audit.subject": ("Subject",),
    "misdirection.behaviour.agreement": ("agree",),
    "misdirection.behaviour.answers": ("Answer", "read_answers", "write_answers"),
    "misdirection.behaviour.judge_api": ("ApiJudge",),
    "misdirection.behaviour.judging": ("judge", "open_judge", "plan"),
    "misdirection.behaviour.likelihood": ("Dealt", "log_probs", "sweep"),
    "misdirection.behaviour.margin": ("loss", "margin", "pair_tasks", "text_tasks"),
    "misdirection.behaviour.metrics": ("Estimate", "bootstrap"),
    "misdirection.behaviour.questions": ("Question", "read_questions"),
    "misdirection.behaviour.rubrics": ("Rubric", "read_rubrics"),
    "misdirection.behaviour.sampling": ("sample",),
    "misdirection.behaviour.scoring": ("score", "score_table"),
    "misdirection.chat": ("Encoded", "encode", "encode_prompt"),
    "misdirection.config": ("ExperimentConfig", "read_config"),
    "misdirection.data": (
        "Example",
        "ProbePair",
        "domain_examples",
        "domain_pairs",
        "neutral_examples",
        "probe_pairs",
        "read_examples",
        "read_pairs",
    ),
    "misdirection.errors": ("MisdirectionError",),
    "misdirection.experiment.runner": ("run_experiment", "write_report"),
    "misdirection.interventions.bake": ("bake",),
    "misdirection.interventions.hooks": ("ablate", "intervene", "intervene_rows", "steer"),
    "misdirection.interventions.kinds": (
        "Ablate",
        "Clamp",
        "ScaleAdapters",
        "ProjectAdapters",
        "Steer",
        "random_like",
    ),
    "misdirection.interventions.lora": ("ablation_adapter", "project_adapter"),
    "misdirection.models": ("ChatModel", "attach", "load"),
    "misdirection.organisms.organism": ("Organism",),
    "misdirection.organisms.training": ("train",),
    "misdirection.recipe": ("Recipe",),
    "misdirection.repair.repair": ("repair_fine_tune",),
    "misdirection.representation.convergence": ("compare", "cosines", "project_away"),
    "misdirection.representation.directions": ("Direction", "combine", "extract"),
    "misdirection.representation.extraction": ("Means", "mean_activations"),
    "misdirection.representation.formats": ("export_direction", "import_direction"),
    "misdirection.representation.judged": ("judged_direction", "judged_groups", "theme_remainder"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
