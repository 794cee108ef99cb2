"""The roof: the `lethe` command, the run file and the report. What is named here is Lethe's public Python API.

    from lethe import load_run_file, simulate

    directory = simulate(load_run_file("quickstart", ["privacy.epsilon=3", "name=stricter"]))

Names are imported when first asked for, so that `import lethe` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora.errors import LetheError, nearest

if TYPE_CHECKING:
    from lethe.config import PersonalRun, RunFile, from_mapping, load_personal_run, load_run_file, recipes, to_yaml
    from lethe.personal_run import personalize
    from lethe.remote import Client
    from lethe.report import write_report
    from lethe.run import resume, simulate

__all__ = [
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
]

_HOMES = {
    "Client": "lethe.remote",
    "PersonalRun": "lethe.config",
    "RunFile": "lethe.config",
    "from_mapping": "lethe.config",
    "load_personal_run": "lethe.config",
    "load_run_file": "lethe.config",
    "personalize": "lethe.personal_run",
    "recipes": "lethe.config",
    "resume": "lethe.run",
    "simulate": "lethe.run",
    "to_yaml": "lethe.config",
    "write_report": "lethe.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"lethe has no '{name}'{nearest(name, __all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
