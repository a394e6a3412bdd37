"""What goes over a control socket, and who may connect."""

from __future__ import annotations

import pickle
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from autodeploy.distributed.channel import LENGTH, Channel, accept
from autodeploy.distributed.launch import accept_all, connect, listen, own_address
from autodeploy.distributed.messages import Array, Forward, Hello, Shutdown, decode, encode
from autodeploy.errors import EngineDeadError


def test_the_arrays_of_a_step_arrive_as_they_were() -> None:
    mine, theirs = map(Channel, socket.socketpair())
    table = np.arange(24, dtype=np.int64).reshape(4, 6)[:3, :2]  # a view, as batches are
    mine.send(Forward.of({"page_table": table, "seq_lens": np.zeros(0, dtype=np.int32)}))
    batch = theirs.receive().batch
    assert np.array_equal(batch["page_table"], table)
    assert (batch["seq_lens"].shape, batch["seq_lens"].dtype) == ((0,), np.int32)
    batch["page_table"][0, 0] = 7  # torch makes tensors of these only where they can be written to
    mine.close()
    with pytest.raises(ConnectionError):
        theirs.receive()


@pytest.mark.parametrize("content", [b"", b"\x81", pickle.dumps(Shutdown), encode(Shutdown())[:-1]])
def test_what_is_no_message_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a message"):
        decode(content)


def test_arrays_of_objects_are_refused() -> None:
    step = Forward({"page_table": Array("O", (1,), b"12345678")})
    with pytest.raises(ValueError, match="an input of dtype O"):
        _ = decode(encode(step)).batch


def test_only_who_knows_the_token_is_a_rank() -> None:
    with listen(own_address("127.0.0.1", 1), 5) as listener, ThreadPoolExecutor(1) as pool:
        address = listener.getsockname()
        accepted = pool.submit(accept, listener, "secret")
        for content in (b"GET / HTTP/1.1\r\n\r\n", LENGTH.pack(1 << 40), frame(encode(Hello(1, "guess", "")))):
            with socket.create_connection(address) as stranger:
                stranger.sendall(content)
                stranger.settimeout(5)
                with suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""  # turned away
        other = connect(*address, "secret", 1)
        channel, hello = accepted.result()
        assert (hello.rank, address[0]) == (1, "127.0.0.1")
        other.send(Shutdown())
        assert channel.receive() == Shutdown()


def frame(content: bytes) -> bytes:
    return LENGTH.pack(len(content)) + content


def test_a_rank_of_another_version_or_none_at_all() -> None:
    with listen("127.0.0.1", 0.3) as listener:
        other = Channel(socket.create_connection(listener.getsockname()))
        other.send(Hello(1, "secret", "torch 1.0"))
        with pytest.raises(EngineDeadError, match=r"rank 1 has torch 1.0, and rank 0 autodeploy .* Install the same"):
            accept_all(listener, "secret", 2)
        with pytest.raises(EngineDeadError, match=r"ranks \[1\] have not connected in 0.3 s"):
            accept_all(listener, "secret", 2)
