"""The names that `import misdirection as md` offers: real types for checkers, and no module in a function's place."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import misdirection


def test_every_name_is_right_after_every_module_is_imported():
    for module in pkgutil.walk_packages(misdirection.__path__, "misdirection."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                # An extra that is not installed here.
                assert not (error.name or "").startswith("misdirection"), module.name
    assert not [name for name in misdirection.__all__ if isinstance(getattr(misdirection, name), ModuleType)]
    assert set(misdirection.__all__) <= set(dir(misdirection))


@pytest.mark.parametrize("name", misdirection.__all__)
def test_every_name_has_a_docstring(name):
    entry = getattr(misdirection, name)
    assert not callable(entry) or (entry.__doc__ or "").strip()


def test_no_room_takes_a_public_name():
    rooms = {module.name for module in pkgutil.iter_modules(misdirection.__path__)}
    assert not rooms & set(misdirection.__all__)


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(misdirection, "non" + "sense")


def test_type_checkers_see_real_types(tmp_path):
    script = tmp_path / "script.py"
    lines = ["import misdirection as md", *(f"reveal_type(md.{name})" for name in ("margin", "ChatModel", "run"))]
    script.write_text("\n".join([*lines, "md.nonsense\n"]))
    # In the repository, whose cache of the libraries' types is warm.
    command = [sys.executable, "-m", "mypy", script]
    said = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    margin, chat, run, nonsense, _ = said.splitlines()
    assert "def (chat: misdirection.models" in margin and "-> torch._tensor.Tensor" in margin
    assert "-> misdirection.models" in chat
    assert "misdirection.experiment.config.ExperimentConfig" in run
    assert 'error: Module has no attribute "nonsense"' in nonsense
