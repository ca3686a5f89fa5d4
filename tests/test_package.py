"""The package: import rules, what an import loads, and what the wheel holds."""

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

from tests.paths import PYTHONPATH, REPOSITORY

FOLDERS = ("jobs", "pipeline", "configs")
SOURCES = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
# modules that a command needs to recognise a complete output, to compare runs or to show its help
LIGHT = (
    "jobs.cli",
    "jobs.doctor",
    "jobs.group",
    "jobs.options",
    "pipeline",
    "pipeline.audit.diff",
    "pipeline.audit.replay",
    "pipeline.audit.verify",
    "pipeline.bench.shapes",
    "pipeline.bench.workloads",
    "pipeline.dry_run",
    "pipeline.engine.scheduler",
    "pipeline.export.run",
    "pipeline.kv_cache.block_pool",
    "pipeline.output.status",
    "pipeline.report.build",
    "pipeline.run",
)
HEAVY = ("torch", "transformers", "datasets", "matplotlib")


def test_import_rules() -> None:
    """The contracts stand in pyproject.toml under tool.importlinter."""
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [command, "--no-cache"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_five_modules_at_most_stand_beside_the_packages() -> None:
    modules = {path.name for path in (REPOSITORY / "pipeline").glob("*.py")} - {"__init__.py"}
    assert len(modules) <= 5, modules


def test_light_modules_load_no_heavy_library() -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(f'gptbatch.{name}')\n"
        f"    heavy = [library for library in {HEAVY!r} if library in sys.modules]\n"
        "    assert not heavy, f'gptbatch.{name} loads {heavy}'\n"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_library_never_prints() -> None:
    for path in SOURCES:
        if "pipeline" in path.parts:
            calls = [
                node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
            ]
            names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
            assert "print" not in names, path


@pytest.mark.slow
def test_the_wheel_works_from_any_folder(tmp_path: Path) -> None:
    """Built, unpacked and run beside folders named jobs, pipeline and configs of a user's own."""
    source = tmp_path / "source"
    source.mkdir()
    for name in (*FOLDERS, "src"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("gptbatch-*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"gptbatch"}
    assert (site / "gptbatch/pipeline/report/templates/report.html").is_file()
    for name in FOLDERS:
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("raise ImportError('a package of the user')")
    program = (
        "import sys, gptbatch.pipeline as pipeline\n"
        "assert pipeline.__file__.startswith(sys.argv[1])\n"
        "from gptbatch.jobs.cli import run_command\n"
        "sys.exit(run_command(sys.argv[2:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, site, "generate", "--config", "demo", "--limit", "20"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 20
    assert (work / "out" / "demo" / "_SUCCESS").is_file()
