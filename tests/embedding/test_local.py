"""A process of a job that has died is named, whenever that was."""

from __future__ import annotations

import socket
import struct
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from mae_deploy.embedding.local import _give, _received
from mae_deploy.errors import MaeDeployError


def reset() -> Connection:
    """A pipe whose other end was closed with something unread, as a kill leaves it."""
    server = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(server.getsockname())
    theirs, _ = server.accept()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    server.close()
    return Connection(ours.detach())


def test_a_process_that_died_is_named_by_who_waits_for_it() -> None:
    ours, theirs = Pipe()
    theirs.close()
    for pipe in (ours, reset()):
        assert "has died: out of memory?" in str(_received(pipe))
        pipe.close()


def test_a_process_that_died_is_named_by_who_gives_it_work() -> None:
    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(MaeDeployError, match="has died"):
        _give(ours, 3)
    _give(ours, None)  # it has nothing more to do
    ours.close()
