"""The other ranks as rank 0 sees them: told what to do, watched, and ended, all of them, when one of them or a step fails.

A collective has every rank in it or none, so nothing can go on without one of them. One thread watches: a rank that is gone is
known by its socket at once, and one that hangs by a step that takes too long. It starts the ranks too, because they die with
the thread that has started them.
"""

from __future__ import annotations

import atexit
import faulthandler
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from autodeploy.distributed.channel import Channel
from autodeploy.distributed.messages import Failed, Message, Ready, Shutdown, encode
from autodeploy.errors import EngineDeadError

TICK = 0.25
"""Seconds between two looks at the step under way."""
PATIENCE = 5.0
"""Seconds that ranks have to end by themselves."""
SHORT = 0.3
"""Seconds: for stacks to be written, and for the cause of a failure to show itself beside what follows from it."""


def is_stopped(process: int) -> bool:
    """By SIGSTOP, not by a debugger."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


@dataclass
class Peer:
    """Another rank. kill: ends it, whatever it does; nothing happens when it has ended."""

    rank: int
    channel: Channel
    kill: Callable[[], object]
    process: subprocess.Popen[bytes] | None = None
    """One of this machine that this process has started."""
    is_gone: bool = False
    stopped: float = 0.0
    """Seconds for which it has been stopped."""

    def fate(self) -> str:
        """What became of it, where that is known."""
        code = None if self.process is None else self.process.poll()
        if code is None:
            return ""
        return (
            f"rank {self.rank} was killed by {signal.Signals(-code).name}" if code < 0 else f"rank {self.rank} ended with {code}"
        )


class Stopwatch:
    """How long what is done under it (`with`) has taken so far, for another thread that looks from time to time.

    longest: seconds that count at most between two looks, because this process may have been stopped itself. Each thread writes
    to fields of its own.
    """

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._turn = self._seen = 0
        """Odd while something is done."""
        self._seconds, self._last = 0.0, time.monotonic()

    def __enter__(self) -> None:
        self._turn += 1

    def __exit__(self, *error: object) -> None:
        self._turn += 1

    def look(self) -> float:
        """Seconds; 0 when nothing is done. By one thread only."""
        now, turn = time.monotonic(), self._turn
        goes_on = turn == self._seen and turn % 2 == 1
        self._seconds = self._seconds + min(now - self._last, self.longest) if goes_on else 0.0
        self._seen, self._last = turn, now
        return self._seconds


class Ranks:
    """start: starts the others and returns them, connected. timeout: seconds that a step may take."""

    def __init__(self, start: Callable[[], Sequence[Peer]], timeout: float) -> None:
        self.timeout, self.peers = timeout, list[Peer]()
        self.ready: dict[int, Ready] = {}
        self._fail: Callable[[EngineDeadError], None] = lambda error: None
        self.death = ""
        """Why nothing can go on."""
        self._texts: list[str] = []
        self._changed, self._killing = threading.Condition(), threading.Lock()
        self._is_closing = False
        self._stopwatch = Stopwatch(2 * TICK)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(start,), name="ad-ranks", daemon=True)
        atexit.register(self.shutdown)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self.peers or self._failure)
        if self._failure is not None:
            raise self._failure

    # Called by rank 0

    def send(self, message: Message, peers: Sequence[Peer] | None = None) -> None:
        """To all, or to some. Raises EngineDeadError."""
        content = encode(message)
        try:
            for peer in self.peers if peers is None else peers:
                peer.channel.send_encoded(content)
        except OSError as error:
            raise self.cause_of(error) from error

    def wait_ready(self) -> None:
        """Until every rank has its weights. Raises EngineDeadError."""
        with self._changed:
            self._changed.wait_for(lambda: self.death or len(self.ready) == len(self.peers))
        if self.death:
            raise EngineDeadError(self.death)

    def tell(self, fail: Callable[[EngineDeadError], None]) -> None:
        """Whom to tell that nothing can go on; at once where it is so already."""
        self._fail = fail
        if self.death:
            fail(EngineDeadError(self.death))

    @contextmanager
    def step(self) -> Iterator[None]:
        """While every rank works on the same. Whatever fails is the end: raises EngineDeadError."""
        try:
            with self._stopwatch:
                yield
        except EngineDeadError:
            raise
        except Exception as error:
            raise self.cause_of(error) from error

    def cause_of(self, error: Exception) -> EngineDeadError:
        """What has failed here may follow from another rank's end, which the watching thread is about to see."""
        with self._changed:
            self._changed.wait_for(lambda: self.death, 3 * SHORT)
        self.die(f"rank 0 failed: {type(error).__name__}: {error}")
        return EngineDeadError(self.death)

    def die(self, reason: str, *, hangs: bool = False) -> None:
        """End every rank. Only the first reason counts. hangs: write down first where all threads are."""
        with self._killing:
            if self.death:
                return
            if hangs:
                self._dump_stacks()
            for peer in self.peers:
                peer.kill()
            with self._changed:
                self.death = f"{reason}. No rank can go on without the others; make a new LLM"
                self._changed.notify_all()
        self._fail(EngineDeadError(self.death))

    def shutdown(self) -> None:
        """End every rank, in peace where that is possible. No harm when called again."""
        atexit.unregister(self.shutdown)
        self._is_closing = True
        if not self.death:
            for peer in self.peers:
                with suppress(OSError):
                    peer.channel.send(Shutdown())
        self._thread.join(PATIENCE)
        for peer in self.peers:
            if not peer.is_gone:
                peer.kill()
            if peer.process is not None:
                peer.process.wait()
            peer.channel.close()

    # Called by the thread that watches

    def _run(self, start: Callable[[], Sequence[Peer]]) -> None:
        try:
            peers = list(start())
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
            return
        with self._changed:
            self.peers = peers
            self._changed.notify_all()
        self._watch()

    def _watch(self) -> None:
        """Until all are gone."""
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer.channel, selectors.EVENT_READ, peer)
            while selector.get_map():
                for key, _ in selector.select(TICK):
                    self._listen(key.data)
                    if key.data.is_gone:
                        selector.unregister(key.fileobj)
                if self._texts and not self._is_closing:
                    self.die(self._reason())
                self._find_hanging()

    def _listen(self, peer: Peer) -> None:
        try:
            message = peer.channel.receive()
        except (OSError, ValueError) as error:
            peer.is_gone = True
            with suppress(subprocess.TimeoutExpired):
                if peer.process is not None:
                    peer.process.wait(PATIENCE if self._is_closing else SHORT)
            self._texts.append(peer.fate() or f"rank {peer.rank} is gone: {error}")
            return
        if isinstance(message, Failed):
            self._texts.append(f"rank {peer.rank} failed: {message.text}")
        elif isinstance(message, Ready):
            with self._changed:
                self.ready[peer.rank] = message
                self._changed.notify_all()

    def _find_hanging(self) -> None:
        why = f"longer than {self.timeout:g} s (distributed_timeout)"
        for peer in self.peers:
            peer.stopped = peer.stopped + TICK if peer.process is not None and is_stopped(peer.process.pid) else 0.0
            if peer.stopped > self.timeout:
                self.die(f"rank {peer.rank} has been stopped for {why}", hangs=True)
        if self._stopwatch.look() > self.timeout:
            self.die(f"a step took {why}, so a rank hangs", hangs=True)

    def _reason(self) -> str:
        """A rank that was killed is why others fail, and may be known a moment later."""
        time.sleep(SHORT)
        killed = [fate for peer in self.peers if "killed" in (fate := peer.fate())]
        return (killed or self._texts)[0]

    def _dump_stacks(self) -> None:
        """To stderr, of all ranks of this machine that can still write."""
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(file=2)
        for peer in self.peers:
            if peer.process is not None:
                peer.process.send_signal(signal.SIGUSR1)
        time.sleep(SHORT)
