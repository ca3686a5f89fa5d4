"""What a job says about a Ray cluster that is not there, or too small. Needs no Ray."""

from __future__ import annotations

import socket

import pytest

from gptbatch.pipeline.cluster.connection import check_reachable
from gptbatch.pipeline.cluster.pending import describe_pending
from gptbatch.pipeline.errors import DeviceError


def test_the_message_names_what_is_requested_and_what_is_there() -> None:
    nodes = [{"CPU": 16.0, "GPU": 8.0, "memory": 1e9}, {"CPU": 16.0, "GPU": 8.0}, {"memory": 1e9}]
    assert describe_pending("3 of 19 workers", cpus=1, gpus=1, nodes=nodes) == (
        "3 of 19 workers are pending: each requests 1 CPUs and 1 GPUs; the nodes of the cluster: "
        "2 with 16 CPUs and 8 GPUs, 1 with 0 CPUs and 0 GPUs; they wait for more nodes, and the "
        "others go on; --workers sets the number"
    )
    message = describe_pending("2 of 2 workers", cpus=17, gpus=0.5, nodes=nodes)
    assert "each requests 17 CPUs and 0.5 GPUs" in message
    assert message.endswith(
        "no node has them; --worker-cpus and --worker-gpus set what a worker requests"
    )
    assert "the nodes of the cluster: none" in describe_pending("all", cpus=1, gpus=0, nodes=[])


def test_an_address_without_a_listener_is_refused_at_once() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(DeviceError, match=f"{address} cannot be reached .Connection refused"):
            check_reachable(address)
        listener.listen()
        check_reachable(address)
    check_reachable("auto")
