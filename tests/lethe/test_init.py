"""The public API: its names, where they lead, and that naming it costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import lethe

ROOT = Path(__file__).parents[2]
PUBLIC = {
    "Client",
    "LetheError",
    "PersonalRun",
    "RunFile",
    "from_mapping",
    "load_personal_run",
    "load_run_file",
    "personalize",
    "recipes",
    "resume",
    "simulate",
    "to_yaml",
    "write_report",
}


def test_the_public_names_are_these_and_no_others() -> None:
    assert set(lethe.__all__) == PUBLIC
    assert lethe.__all__ == sorted(lethe.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_is_what_its_module_defines(name: str) -> None:
    found = getattr(lethe, name)
    assert found.__name__ == name
    assert getattr(sys.modules[found.__module__], name) is found
    assert name in dir(lethe)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"lethe has no 'simulat'; did you mean 'simulate'\?"):
        _ = lethe.simulat


def test_importing_lethe_imports_nothing_heavy() -> None:
    code = "import sys, lethe; print([m for m in ('torch', 'numpy', 'flwr', 'pydantic', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
