"""What rank 0 and the other ranks say to each other: data, never code. Each message is checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import msgspec
import numpy as np
import torch

from autodeploy.specs import BatchMetadata, Mesh


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all."""


class Hello(Message, frozen=True):
    """The first one, of a rank that has been started. token: what only the ranks of this start know, over TCP."""

    rank: int
    token: str
    build: str
    """Versions that have to be those of rank 0."""


class Start(Message, frozen=True):
    """To a rank: what it runs, and how."""

    mesh: tuple[int, int, int]
    device: str
    """cpu or cuda."""
    folder: str
    """Of the checkpoint."""
    program: bytes
    """As `Program.save` writes it."""
    digest: str
    """Of the program as rank 0 has it."""
    initial: bytes
    """The initial values that it reads, as safetensors."""
    modules: list[str]
    """That register providers or attention backends of the program."""
    rendezvous: str
    timeout: float
    graph_size: int
    """Requests of the largest step that is captured; 0 captures none."""


class Ready(Message, frozen=True):
    """Of a rank that has loaded its weights."""

    digest: str
    """Of the program that it runs."""
    weight_bytes: int
    free_bytes: int
    """What can still be allocated on its device."""


class Join(Message, frozen=True):
    """Every rank has its weights: meet in the process group."""


class Allocate(Message, frozen=True):
    num_units: dict[str, int]
    page_size: int


class Capture(Message, frozen=True):
    """Capture the CUDA graphs of all shapes with up to that many pages per request."""

    num_pages: int


class Array(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Forward(Message, frozen=True):
    """One step."""

    arrays: dict[str, Array]

    @classmethod
    def of(cls, batch: BatchMetadata) -> Forward:
        return cls({name: Array(str(array.dtype), array.shape, array.tobytes()) for name, array in batch.items()})

    @property
    def batch(self) -> Mapping[str, np.ndarray]:
        return {name: _array_of(array) for name, array in self.arrays.items()}


class Shutdown(Message, frozen=True):
    """The end."""


class Failed(Message, frozen=True):
    """Of a rank that cannot go on."""

    text: str


AnyMessage = Hello | Start | Ready | Join | Allocate | Capture | Forward | Shutdown | Failed
_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(content: bytes | bytearray) -> Any:
    """Raises ValueError for what is no message."""
    try:
        return _decoder.decode(content)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a message: {error}") from error


def digest_of(program: bytes) -> str:
    return sha256(program).hexdigest()


def mesh_of(start: Start) -> Mesh:
    return Mesh(*start.mesh)


def build() -> str:
    """What has to be alike where one program is to mean the same."""
    return f"autodeploy {version('autodeploy')}, torch {torch.__version__}"


def _array_of(array: Array) -> np.ndarray:
    if array.dtype not in ("int32", "int64"):
        raise ValueError(f"an input of dtype {array.dtype}")
    return np.frombuffer(array.data, array.dtype).reshape(array.shape).copy()  # torch wants to be able to write to it
