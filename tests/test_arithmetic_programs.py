"""Equal bits of the kernels on x86-64 and aarch64: tests/kernels_program.cpp, without torch.

aarch64 needs a cross compiler and an emulator (Debian: `g++-aarch64-linux-gnu`, `qemu-user`).
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gptbatch.pipeline.kernels import build
from gptbatch.pipeline.kernels.compiler import compiler_command
from gptbatch.pipeline.kernels.constants import LAYOUT
from tests.paths import REPOSITORY
from tests.processes import LIMIT_S
from tests.test_arithmetic import capabilities

pytestmark = pytest.mark.slow

PROGRAM = REPOSITORY / "tests" / "kernels_program.cpp"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MIN_CASES = 79


def build_program(folder: Path, compiler: list[str], flags: tuple[str, ...]) -> Path:
    """Compile the program and the files of the kernels that need no torch."""
    sources = [
        path
        for unit in build.KERNELS.units
        if unit.name != "ops"
        for path in (build.KERNELS.folder / name for name in unit.sources)
    ]
    program = folder / "program"
    whole = folder / "whole.cpp"
    whole.write_text("".join(f'#include "{path}"\n' for path in (*sources, PROGRAM)))
    command = [
        *compiler,
        "-O3",
        *build.COMMON_FLAGS,
        *flags,
        *(f"-DGPTBATCH_{name}={value}" for name, value in LAYOUT.items()),
        f"-I{build.KERNELS.folder}",
        str(whole),
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return program


def lines(*command: str | Path) -> list[str]:
    """Return the lines that the program prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    found = done.stdout.splitlines()
    assert len(found) >= MIN_CASES
    assert len({line.split()[-1] for line in found}) == len(found), (
        "cases that are alike show little"
    )
    return found


@functools.cache
def native_compiler() -> list[str]:
    """Return the compiler of this machine; skip the test if there is none."""
    compiler = compiler_command()
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    return compiler


def native_flags(capability: str) -> tuple[str, ...]:
    """Return the flags of a capability of this CPU; skip the test if it does not have it."""
    if capability not in capabilities():
        pytest.skip(f"this CPU does not have {capability}")
    flags = build.CAPABILITY_FLAGS.get(capability.upper(), ())
    has_vnni = capability == "avx512" and torch.cpu._is_vnni_supported()
    return (*flags, "-mavx512vnni") if has_vnni else flags


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the lines without vector instructions."""
    folder = tmp_path_factory.mktemp("default")
    return lines(build_program(folder, native_compiler(), ()))


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_a_program_without_torch_computes_equal_bits(
    expected: list[str], tmp_path: Path, capability: str
) -> None:
    flags = native_flags(capability)
    assert lines(build_program(tmp_path, native_compiler(), flags)) == expected


@pytest.mark.parametrize("contraction", ["off", "fast"])
def test_aarch64_computes_equal_bits(expected: list[str], tmp_path: Path, contraction: str) -> None:
    """GCC contracts by default there, which changes results."""
    if shutil.which(CROSS_COMPILER) is None or shutil.which(EMULATOR) is None:
        pytest.skip(f"no {CROSS_COMPILER} or no {EMULATOR}")
    flags = ("-static", f"-ffp-contract={contraction}")
    program = build_program(tmp_path, [CROSS_COMPILER], flags)
    found = lines(EMULATOR, program)
    assert (found == expected) == (contraction == "off")
    if contraction == "fast":
        changed = {a.rsplit(maxsplit=1)[0] for a, b in zip(found, expected, strict=True) if a != b}
        assert {"layer_norm 768", "activation gelu_tanh"} <= changed
        assert "linear 768 100" not in changed
