"""The settings of the engine: device, types, memory. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptbatch.pipeline.config.problems import settings_error


class Section(BaseModel):
    """Settings that are checked strictly, and do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def __init__(self, **settings: Any) -> None:
        """Create it from settings by name.

        Raises:
            ConfigError: A setting is wrong. `model_validate` raises pydantic's ValidationError.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise settings_error(error, type(self).__name__, self._known_keys()) from error

    # As in pydantic's own models: validation does not call __init__, only Python code does.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def _known_keys(cls) -> list[str]:
        """Return the config keys of the section by their full names."""
        return list(cls.model_fields)


class EngineConfig(Section):
    """Settings that depend on the machine: device, types, memory."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device to compute on. auto: cuda where PyTorch finds a GPU, else cpu."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of weights and activations. float16 needs cuda."
    )
    cache_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description=(
            "Type of the cached keys and values. auto: the same as dtype. int8: faster with "
            "ragged attention and less precise."
        ),
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=65536,
        description=(
            "Maximum number of rows that run at the same time. Default: 1,024 on a GPU with Triton "
            "kernels, else 32 per CPU thread, between 64 and 512, as far as memory allows."
        ),
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads. Default: the number that PyTorch finds, at most the CPU quota.",
    )
    attention: Literal["auto", "ragged", "padded"] = Field(
        "auto",
        description=(
            "Attention backend. ragged: the paged KV cache with C++ kernels on a CPU, built on "
            "first use, and Triton kernels on a GPU. padded: PyTorch. auto: ragged where the "
            "kernels work, else padded."
        ),
    )
    memory_gib: float | None = Field(
        None, gt=0, le=2**20, description="GiB for the KV cache. Default: half of the free memory."
    )


def unportable_setting(engine: EngineConfig) -> str | None:
    """Return what portable arithmetic needs instead of a setting; None if it may be had."""
    for name, value, needed in (
        ("dtype", engine.dtype, ("float32",)),
        ("device", engine.device, ("cpu", "auto")),
        ("attention", engine.attention, ("ragged", "auto")),
    ):
        if value not in needed:
            return f"engine.{name}: {needed[0]}, not {value}"
    return None
