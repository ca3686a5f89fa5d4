"""The connection of this process to a Ray cluster."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gptbatch.pipeline.errors import DeviceError

CONNECT_S = 10.0


def check_reachable(address: str) -> None:
    """Connect to HOST:PORT once. Ray itself tries for many minutes.

    Raises:
        DeviceError: No process listens there.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "//" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise DeviceError(
            f"the Ray cluster {address} cannot be reached ({error.strerror or error})"
        ) from error


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster, unless this process is connected; disconnect at the end.

    Args:
        address: "auto", or HOST:PORT. None starts one on this machine.

    Raises:
        DeviceError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise DeviceError("ray is not installed: pip install 'gptbatch[ray]'", keys=()) from error
    if ray.is_initialized():
        yield
        return
    if address is not None:
        check_reachable(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DeviceError(f"the Ray cluster {address} cannot be reached ({error})") from error
    # Ray replaces it in the main thread, by one that exits at once.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()
