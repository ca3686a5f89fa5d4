"""Probes of the host: CPUs and their quota, instruction sets, memory, GPUs."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from gptbatch.pipeline.doctor.section import Section
from gptbatch.pipeline.system.machine import (
    cores,
    cpu_flags,
    describe_cores,
    free_memory_bytes,
    load_average,
    memory_limit_bytes,
    processor_name,
    total_memory_bytes,
)

# Instruction set -> its name in /proc/cpuinfo, for those that the kernels can use.
INSTRUCTION_SETS = {
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512_BF16": "avx512_bf16",
    "AVX512_VNNI": "avx512_vnni",
    "AMX_BF16": "amx_bf16",
}
# Instruction set -> the compiler flag that uses it.
FLAGS = {
    "AVX2": "-mavx2",
    "AVX512": "-mavx512f",
    "AVX512_BF16": "-mavx512bf16",
    "AVX512_VNNI": "-mavx512vnni",
    "AMX_BF16": "-mamx-bf16",
}
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def probe_cpu() -> Section:
    """Return the CPUs, their quota and load, and the variables that limit threads."""
    found = cores()
    own_threads = os.environ.get("OMP_NUM_THREADS") or None
    shared = describe_cores()
    section = Section(
        facts={
            "name": processor_name(),
            "architecture": platform.machine(),
            "cpus": os.cpu_count(),
            "cpus_allowed": found.cpus,
            "quota": found.quota,
            "load": load_average(),
            "shared": shared or None,
            "OMP_NUM_THREADS": own_threads,
        }
    )
    if own_threads is not None and own_threads.isascii() and own_threads.isdigit():
        if int(own_threads) < found.threads:
            section.warnings.append(
                f"OMP_NUM_THREADS={own_threads} limits a run to {own_threads} of {found.threads} "
                "CPUs; unset it, or give --threads"
            )
        elif int(own_threads) > found.threads:
            section.warnings.append(
                f"OMP_NUM_THREADS={own_threads} is more than the {found.threads} CPUs of this "
                "process; unset it, or give --threads"
            )
    if shared:
        section.warnings.append(f"runs are slower while the cores are shared: {shared}")
    return section


def probe_instruction_sets() -> Section:
    """Compare the instruction sets of the CPU with those that the kernels use."""
    from gptbatch.pipeline.kernels.build import compile_flags

    flags, compiled = cpu_flags(), compile_flags()
    of_cpu = [name for name, flag in INSTRUCTION_SETS.items() if flag in flags]
    used = [name for name, flag in FLAGS.items() if flag in compiled]
    # AVX-512 replaces AVX2.
    not_used = [
        name for name in of_cpu if name not in used and not (name == "AVX2" and "AVX512" in used)
    ]
    section = Section(facts={"cpu": of_cpu, "kernels": used})
    if not_used:
        limit = os.environ.get("ATEN_CPU_CAPABILITY")
        reason = (
            f"ATEN_CPU_CAPABILITY={limit} is set; unset it"
            if limit
            else "torch does not use them; install a newer torch, or update the operating system"
        )
        section.warnings.append(
            f"the CPU has {', '.join(not_used)}, but the kernels do not use them: {reason}"
        )
    return section


def probe_memory() -> Section:
    """Return the memory, what is free of it, and its limits, in bytes."""
    import resource

    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    return Section(
        facts={
            "total_bytes": total_memory_bytes(),
            "free_bytes": free_memory_bytes(),
            "limit_bytes": memory_limit_bytes(),
            "address_space_bytes": None if space == resource.RLIM_INFINITY else space,
        }
    )


def probe_gpu() -> Section:
    """Return the GPUs that torch finds."""
    import torch

    has_driver = NVIDIA_DRIVER.exists()
    section = Section(facts={"driver": has_driver, "cuda": torch.version.cuda, "devices": []})
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            section.facts["devices"].append(
                {
                    "name": properties.name,
                    "memory_bytes": properties.total_memory,
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
    elif has_driver:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = (
            "this torch is built without CUDA; install another build of torch"
            if torch.version.cuda is None
            else f"CUDA_VISIBLE_DEVICES={visible!r} hides it; unset it"
            if visible is not None
            else f"torch is built for CUDA {torch.version.cuda}; update the driver, or install a "
            "torch for its version"
        )
        section.warnings.append(f"there is an NVIDIA driver, but torch finds no GPU: {reason}")
    return section
