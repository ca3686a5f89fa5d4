"""The house keeps its rules: who may import whom, and what the wheel holds."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

# a room -> what it may import of ours; a longer name wins
MAY_IMPORT = {
    "pipeline/errors.py": set[str](),
    "pipeline/types.py": set[str](),
    "pipeline/system/redact.py": set[str](),
    "pipeline/system/machine.py": set[str](),
    "pipeline/system/paths.py": set[str](),
    "pipeline/config.py": {
        "gptbatch.pipeline.system.bundled",
        "gptbatch.pipeline.system.yaml_reader",
        "gptbatch.pipeline.errors",
        "gptbatch.pipeline.system.paths",
        "gptbatch.pipeline.types",
        "gptbatch.pipeline.system.redact",
    },
    "pipeline/gpt/": {"gptbatch.pipeline.errors", "gptbatch.pipeline.types", "pipeline.gpt"},
    "pipeline/generation/": {
        "gptbatch.pipeline.errors",
        "gptbatch.pipeline.types",
        "pipeline.gpt",
        "pipeline.generation",
    },
    "pipeline/data/": {
        "gptbatch.pipeline.errors",
        "gptbatch.pipeline.types",
        "gptbatch.pipeline.system.redact",
        "pipeline.data",
    },
    "pipeline/": {"pipeline"},
    "jobs/": {"pipeline", "jobs"},
    "configs/": set[str](),
}
NO_TORCH = (
    "pipeline/data/",
    "pipeline/config.py",
    "pipeline/types.py",
    "pipeline/errors.py",
    "pipeline/model/config.py",
    "pipeline/kv_cache/block_pool.py",
    "pipeline/engine/scheduler.py",
    "pipeline/bench/shapes.py",
    "pipeline/bench/workloads.py",
    "pipeline/run.py",
    "pipeline/output/part_runner.py",
    "pipeline/output/summary.py",
    "pipeline/output/resume.py",
    "pipeline/output/status.py",
    "pipeline/input/tokenize.py",
    "pipeline/model/loading.py",
    "pipeline/audit/reopen.py",
    "pipeline/audit/verify.py",
    "pipeline/audit/replay.py",
    "pipeline/audit/diff.py",
)
SOURCES = [
    path
    for folder in ("jobs", "pipeline", "configs")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


def imports(path: Path) -> set[tuple[str, bool]]:
    """(module, whether it is imported when the file is)."""
    found: set[tuple[str, bool]] = set()

    def visit(node: ast.AST, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = at_import and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                inside = False
            if isinstance(child, ast.Import):
                found.update((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.add((child.module, at_import))
            visit(child, inside)

    visit(ast.parse(path.read_text()), True)
    return found


def is_below(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_each_floor_imports_only_floors_below(path: Path) -> None:
    name = str(path.relative_to(REPOSITORY))
    room = max((room for room in MAY_IMPORT if name.startswith(room)), key=len)
    for module, at_import in imports(path):
        if module.split(".")[0] in ("jobs", "pipeline", "configs", "tests"):
            assert is_below(module, MAY_IMPORT[room]), f"{name} imports {module}"
        if name.startswith(NO_TORCH) and at_import:
            assert module.split(".")[0] not in ("torch", "transformers", "datasets"), (
                f"{name} imports {module}"
            )
        if name.startswith("pipeline/"):
            assert module.split(".")[0] not in ("click", "tqdm"), f"{name} imports {module}"


def test_the_library_never_prints() -> None:
    for path in SOURCES:
        if "pipeline" in path.parts:
            calls = [
                node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
            ]
            assert not [
                call
                for call in calls
                if isinstance(call.func, ast.Name) and call.func.id == "print"
            ], path


@pytest.mark.slow
def test_the_wheel_works_from_any_folder(tmp_path: Path) -> None:
    """Built, unpacked alone in front of the path, and run from an empty folder: configs, prompts and model come along."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("jobs", "pipeline", "configs"):
        shutil.copytree(REPOSITORY / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
    ]
    subprocess.run([*build, str(source)], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("gptbatch-*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import sys, jobs, pipeline, configs; assert all(m.__file__.startswith(sys.argv[1]) for m in (jobs, pipeline, configs)); "
        "from gptbatch.jobs.cli import run_command; sys.exit(run_command(sys.argv[2:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(site), "generate", "--config", "demo", "--limit", "20"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 20
    assert (work / "out" / "demo" / "_SUCCESS").is_file()
