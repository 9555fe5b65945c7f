"""What figures are computed by: versions, and the processor."""

import platform
from collections.abc import Mapping

from misdirection.extras import installed_version

_PACKAGES = (
    "misdirection",
    "torch",
    "transformers",
    "peft",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "pyarrow",
    "safetensors",
)
_ROUNDING = ("python", "machine", "instructions", "threads", "torch", "numpy", "scipy", "pandas", "scikit-learn")
"""What the last digits of a figure may depend on, where no model is run."""


def software() -> dict[str, str]:
    """Versions of this machine's software by name, and what of its processor sums depend on."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        **{name: number for name in _PACKAGES if (number := installed_version(name))},
    }


def differing(theirs: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What rounding may depend on and is not the same, theirs and ours."""
    return {
        name: (theirs.get(name, "none"), ours.get(name, "none"))
        for name in _ROUNDING
        if theirs.get(name) != ours.get(name)
    }
