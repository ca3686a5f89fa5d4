"""`gptbatch doctor`: checks this machine, and says what to improve."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click

from gptbatch.jobs.limits import check_limits
from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import Command
from gptbatch.pipeline.doctor.examine import Diagnosis, examine_machine
from gptbatch.pipeline.errors import DeviceError, GptbatchError

WIDTH, NAME_WIDTH = 100, 18


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def doctor(as_json: bool) -> None:
    """Check this machine: kernels, batch invariance, limits, packages, settings.

    Builds the C++ kernels if they are not built, runs the batch-invariance self-test on a tiny
    random model, and compares golden digests. Reads no input and writes no output.

    Exits with 0, or with 78 if something makes runs fail. The last lines say what to do.
    """
    try:
        check_limits(computes=True)
        limits_problem = None
    except GptbatchError as error:
        limits_problem = str(error)
    found = examine_machine(limits_problem)
    if as_json:
        echo(json.dumps(found.to_json()))
    else:
        echo("\n".join(_lines(found)))
    if problems := found.problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DeviceError(f"runs fail here{more}: {problems[0]}")


def _lines(found: Diagnosis) -> list[str]:
    state = "runs fail here" if found.problems else "ready"
    notes = [
        f"{len(texts)} {word}{'s' * (len(texts) > 1)}"
        for texts, word in ((found.problems, "problem"), (found.warnings, "warning"))
        if texts
    ]
    lines = [f"gptbatch: {', '.join([state, *notes])} ({found.wall_s:.1f} s)"]
    for name, section in found.sections.items():
        facts = section.facts
        texts = [f"unknown: {facts['error']}"] if "error" in facts else _TEXTS[name](facts)
        for index, text in enumerate(texts):
            lines += _wrapped(name.replace("_", " ") if index == 0 else "", text)
    for word, texts in (("warning", found.warnings), ("problem", found.problems)):
        for text in texts:
            lines += _wrapped(word, text)
    return lines


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        WIDTH,
        initial_indent=name.ljust(NAME_WIDTH),
        subsequent_indent=" " * NAME_WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _versions(facts: dict[str, Any]) -> list[str]:
    return [
        ", ".join(
            f"{name} {'not installed' if value is None else value}" for name, value in facts.items()
        )
    ]


def _torch(facts: dict[str, Any]) -> list[str]:
    return [
        f"{facts['version']}, imported in {facts['import_s']} s, "
        + (f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA")
        + f", oneDNN {_yes(facts['onednn'])}, CPU capability {facts['cpu_capability']}"
    ]


def _cpu(facts: dict[str, Any]) -> list[str]:
    quota = "no quota" if facts["quota"] is None else f"a quota of {facts['quota']:g} CPUs"
    threads = facts["OMP_NUM_THREADS"]
    return [
        f"{facts['name']} ({facts['architecture']}): {facts['cpus']} CPUs, "
        f"{facts['cpus_allowed']} for this process, {quota}, load {facts['load']:.2f}"
        + (f", OMP_NUM_THREADS={threads}" if threads else "")
    ]


def _instruction_sets(facts: dict[str, Any]) -> list[str]:
    return [f"of the CPU: {_list(facts['cpu'])}; of the kernels: {_list(facts['kernels'])}"]


def _memory(facts: dict[str, Any]) -> list[str]:
    limit, space = facts["limit_bytes"], facts["address_space_bytes"]
    return [
        f"{_size(facts['total_bytes'])}, {_size(facts['free_bytes'])} free, "
        + ("no limit" if limit is None else f"limited to {_size(limit)} by the control group")
        + ("" if space is None else f", address space limited to {_size(space)} (ulimit -v)")
    ]


def _gpu(facts: dict[str, Any]) -> list[str]:
    devices = [
        f"{device['name']}, {_size(device['memory_bytes'])}, capability {device['capability']}"
        for device in facts["devices"]
    ]
    return devices or ["none"]


def _compiler(facts: dict[str, Any]) -> list[str]:
    if facts["path"] is None:
        return [f"{facts['command']}: not found; install g++ or clang++, or name one in CXX"]
    return [f"{facts['command']} ({facts['path']}): {facts['version'] or 'prints no version'}"]


def _kernel_cache(facts: dict[str, Any]) -> list[str]:
    return [
        f"{facts['folder']}: "
        + ("" if facts["exists"] else "does not exist yet, ")
        + ("" if facts["writable"] else "cannot be written, ")
        + ("locked by a build, " if facts["locked"] else "")
        + ("" if facts["not_trusted"] is None else "not trusted, ")
        + f"{_size(facts['free_bytes'])} free, {facts['libraries']} libraries of "
        + f"{facts['library_bytes'] / 2**20:.1f} MiB"
    ]


def _kernels(facts: dict[str, Any]) -> list[str]:
    if not facts["available"]:
        return [f"not available: {facts['reason']}"]
    by = f" by {facts['compiler']}" if facts["compiler"] else ""
    took = "" if facts["build_s"] is None else f" in {facts['build_s']:.0f} s"
    kept = facts["library"] or "not kept"
    return [f"built{' now' if facts['built_now'] else ''}{by}{took}: {kept}"]


def _defaults(facts: dict[str, Any]) -> list[str]:
    cache = facts["kv_cache_bytes"]
    advice = (
        "bfloat16 has instructions here: faster, and rounds logits; float32 where the distribution "
        "matters"
        if facts["bfloat16_instructions"]
        else "bfloat16 has no instructions here; use float32"
    )
    return [
        f"device {facts['device']}, attention {facts['attention']}, "
        f"{facts['threads']} thread{'s' * (facts['threads'] != 1)}, "
        f"batch size {facts['batch_size']}, "
        + ("" if cache is None else f"at most {_size(cache)} for the KV cache, ")
        + f"dtype {facts['dtype']}",
        advice,
    ]


def _batch_invariance(facts: dict[str, Any]) -> list[str]:
    return [
        f"{test['device']}, {test['attention']}, {test['dtype']}: {test['batch_invariance']}"
        + (f" ({test['reason']})" if test["reason"] else "")
        + (f" (not portable: {why})" if (why := test.get("why_not_portable")) else "")
        + (
            f", linears {test['linears']}, padding {test['padding_plan']}, {test['seconds']} s"
            if "linears" in test
            else ""
        )
        for test in facts["tests"]
    ]


def _arithmetic(facts: dict[str, Any]) -> list[str]:
    if differing := facts["differing"]:
        return [f"not that of version {facts['version']}: {'; '.join(differing)}"]
    if not facts["portable"]:
        return ["not portable: it needs the C++ kernels"]
    return [f"{facts['version']}: the golden digests and those of the demo model are equal"]


def _extras(facts: dict[str, Any]) -> list[str]:
    installed = [
        f"{name} {extra['version'] or ''}".strip()
        for name, extra in facts.items()
        if extra["installed"]
    ]
    return [
        _list(installed),
        *(
            f"{name} ({extra['for']}): not installed; {extra['install']}"
            for name, extra in facts.items()
            if not extra["installed"]
        ),
    ]


def _hugging_face(facts: dict[str, Any]) -> list[str]:
    variables = ", ".join(f"{name}={value}" for name, value in facts["variables"].items())
    return [
        f"cache {facts['cache']}: {_size(facts['free_bytes'])} free"
        + ("" if facts["writable"] else ", cannot be written")
        + (f"; offline ({variables}): names are found in the cache only" * facts["offline"])
        + ("; HF_TOKEN is set" if facts["token"] else "")
    ]


def _settings(facts: dict[str, Any]) -> list[str]:
    return [f"environment variables: {_list(facts['variables'])}"]


_TEXTS = {
    "versions": _versions,
    "torch": _torch,
    "cpu": _cpu,
    "instruction_sets": _instruction_sets,
    "memory": _memory,
    "gpu": _gpu,
    "compiler": _compiler,
    "kernels": _kernels,
    "kernel_cache": _kernel_cache,
    "defaults": _defaults,
    "batch_invariance": _batch_invariance,
    "arithmetic": _arithmetic,
    "extras": _extras,
    "hugging_face": _hugging_face,
    "settings": _settings,
}


def _list(words: list[str]) -> str:
    return ", ".join(words) or "none"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
