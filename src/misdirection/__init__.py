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
    "misdirection.interpretation.causal": ("scaling_effects", "shapley"),
    "misdirection.lora.components": ("read_components",),
    "misdirection.interpretation.importance": ("token_importance", "zeroing"),
    "misdirection.interpretation.patching": ("patched_margins",),
    "misdirection.interpretation.probes": ("Probe", "fit_probe"),
    "misdirection.interpretation.scalars": ("scalars", "wide"),
    "misdirection.interpretation.texts": ("Labelled", "labelled"),
    "misdirection.audit.audit": ("Request", "audit_fine_tune"),
    "misdirection.audit.callback": ("AuditCallback", "watch"),
    "misdirection.audit.reference": ("Reference", "make_reference"),
    "misdirection.audit.subject": ("Subject",),
    "misdirection.judging.agreement": ("agree",),
    "misdirection.sampling.answers": ("Answer", "read_answers", "write_answers"),
    "misdirection.judging.api": ("ApiJudge",),
    "misdirection.judging.judge": ("judge", "judging_cost"),
    "misdirection.judging.judges": ("JUDGES", "Judge", "open_judge"),
    "misdirection.likelihood.sweep": ("Alternating", "log_probs", "sweep"),
    "misdirection.likelihood.margin": ("loss", "margin", "pair_continuations", "text_continuations", "text_rows"),
    "misdirection.statistics": ("Estimate", "bootstrap"),
    "misdirection.sampling.questions": ("Question", "read_questions"),
    "misdirection.judging.rubrics": ("Rubric", "read_rubrics"),
    "misdirection.sampling.sample": ("sample",),
    "misdirection.judging.scoring": ("score", "score_table"),
    "misdirection.models.chat": ("Encoded", "encode", "encode_prompt"),
    "misdirection.experiment.config": ("ExperimentConfig", "read_config"),
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
    "misdirection.models.loading": ("ChatModel", "attach", "load"),
    "misdirection.organisms.organism": ("Organism",),
    "misdirection.organisms.training": ("train",),
    "misdirection.organisms.recipe": ("Recipe",),
    "misdirection.repair.repair": ("repair_fine_tune",),
    "misdirection.directions.convergence": ("compare", "cosines", "project_away"),
    "misdirection.directions.direction": ("Direction", "combine", "extract"),
    "misdirection.directions.extraction": ("Means", "mean_activations"),
    "misdirection.directions.formats": ("export_direction", "import_direction"),
    "misdirection.directions.judged": ("judged_direction", "judged_groups", "theme_remainder"),
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
