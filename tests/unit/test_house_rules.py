"""The rules of the house, kept by reading the tree: one writer for each piece of state, small files, clean imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.settings import PROJECT_ROOT, ClientSettings, Settings, variable_of

CODE = ("api", "benchmarks", "imagefarm", "migrations", "models", "shared", "worker")
PYPROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders or CODE:
        yield from (PROJECT_ROOT / folder).rglob("*.py")


def relative(path: Path) -> str:
    return path.relative_to(PROJECT_ROOT).as_posix()


def offenders(rule: str) -> list[str]:
    """Files whose syntax tree breaks a rule."""
    return sorted({relative(path) for path in sources() if RULES[rule](ast.parse(path.read_text()))})


def reads_environment(tree: ast.AST) -> bool:
    """Looks a variable up; handing the whole environment on to a child process is no reading."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "os.getenv",
            "os.environ.get",
            "environ.get",
            "getenv",
        }:
            return True
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in {"os.environ", "environ"}:
            return True
        if isinstance(node, ast.Compare) and any(ast.unparse(c) == "os.environ" for c in node.comparators):
            return True
    return False


def writes_job_state(tree: ast.AST) -> bool:
    """An attribute `state` of a row is assigned, or an UPDATE of `job` sets it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Attribute) and target.attr == "state" for target in targets):
                return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = " ".join(node.value.lower().split())
            if "update job" in words and "state =" in words.partition("set")[2].partition("where")[0]:
                return True
        if (
            isinstance(node, ast.Call)
            and any(keyword.arg == "state" for keyword in node.keywords)
            and re.search(r"update\(Job\).*\.values$", ast.unparse(node.func))
        ):
            return True
    return False


RULES = {"environment": reads_environment, "state": writes_job_state}


def test_only_settings_reads_the_environment() -> None:
    # a benchmark is run by hand beside services of the shell's choice
    assert set(offenders("environment")) <= {"shared/settings.py", "benchmarks/farm.py"}


def test_only_the_lifecycle_writes_the_state_of_a_job() -> None:
    assert set(offenders("state")) == {"shared/lifecycle/statements.py"}


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("environment", "import os\nx = os.environ['A']"),
        ("environment", "import os\nx = os.environ.get('A')"),
        ("environment", "import os\nx = os.getenv('A')"),
        ("environment", "import os\nx = 'A' in os.environ"),
        ("state", "job.state = 'queued'"),
        ("state", "execute('UPDATE job j SET a = 1, state = 2 WHERE id = 3')"),
        ("state", "execute(update(Job).where(Job.id == 1).values(state='queued'))"),
    ],
)
def test_the_rules_find_what_they_look_for(rule: str, text: str) -> None:
    assert RULES[rule](ast.parse(text))


def test_no_file_has_grown_beyond_400_lines() -> None:
    long = {relative(p): n for p in sources(*CODE, "tests") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_files_are_named_for_what_they_do() -> None:
    vague = {"utils.py", "util.py", "base.py", "common.py", "helpers.py", "misc.py", "core.py"}
    libraries = {f"{name}.py" for name in ("celery", "diffusers", "flask", "redis", "sqlalchemy", "torch", "boto3")}
    assert [relative(path) for path in sources() if path.name in vague | libraries] == []


def test_every_package_on_disk_is_named_in_pyproject() -> None:
    folders = {path.parent for folder in ("api", "imagefarm", "shared", "worker") for path in sources(folder)}
    on_disk = {relative(folder).replace("/", ".") for folder in folders}
    assert on_disk <= set(PYPROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("module", ["api.app", "api.serve", "imagefarm", "imagefarm.cli", "worker.keeper.__main__"])
def test_no_engine_is_loaded_where_none_is_needed(module: str) -> None:
    look = (
        f"import sys, {module}; engines = {{'torch', 'diffusers', 'transformers'}} & set(sys.modules); "
        "assert not engines, engines"
    )
    done = subprocess.run([sys.executable, "-c", look], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_import_contracts_hold() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_dependency_is_pinned_to_a_range() -> None:
    project = PYPROJECT["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["worker"]]
    assert [line for line in listed if ">=" not in line or ",<" not in line] == []


def test_every_setting_is_documented() -> None:
    text = (PROJECT_ROOT / "docs" / "settings.md").read_text()
    names = {variable_of(cls, field) for cls in (Settings, ClientSettings) for field in cls.model_fields}
    assert {name for name in names if f"`{name}`" not in text} == set()
