"""Threads for plain handlers, which may hang: neither other services nor the end of the process wait for them."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

__all__ = ["Threads", "Work", "at_work", "in_thread"]

P = ParamSpec("P")
T = TypeVar("T")
Job = tuple[Future[Any], Callable[[], Any]]


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run it in a thread. Who gives up waiting waits until the thread is done: a connection serves one at a time."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()
        raise


class Work:
    """A function of a user in one of these threads: who gives up waiting for it can still tell what it does.

    Parameters:
        name: by which `at_work` tells of it.

    Attributes:
        begun: whether a thread has taken it up.
        is_over: whether it has come to an end.
        ended: called in its thread then.
    """

    __slots__ = ("_thread", "begun", "ended", "is_over", "name")

    def __init__(self, name: str) -> None:
        self.name, self.begun, self.is_over = name, False, False
        self.ended: Callable[[], None] | None = None
        self._thread = 0

    def __call__(self, call: Callable[[], T]) -> T:
        worker = threading.current_thread()
        assert isinstance(worker, _Worker)
        worker.at_work, self._thread, self.begun = self.name, threading.get_ident(), True
        try:
            return call()
        finally:
            worker.at_work, self.is_over = "", True
            if self.ended is not None:
                self.ended()

    def stack(self) -> str:
        """Where it is now, as lines of text; empty if it does not run."""
        frame = sys._current_frames().get(self._thread) if self.begun and not self.is_over else None
        if frame is None:
            return ""
        frames = traceback.extract_stack(frame)
        ours = max((n for n, each in enumerate(frames) if each.filename == __file__), default=-1)
        return "".join(traceback.format_list(frames[ours + 1 :]))


class Threads(Executor):
    """Daemon threads, started when they are needed; `ThreadPoolExecutor` would be joined at the end of the process.

    Parameters:
        most: how many functions run at once; what comes beyond waits.
    """

    def __init__(self, most: int = 32) -> None:
        self._most = most
        self._jobs = SimpleQueue[Job | None]()
        self._idle = threading.Semaphore(0)
        self._starting = threading.Lock()
        self._workers: list[_Worker] = []
        self._closed = False

    async def run(self, name: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What the function returns, called in a thread with the context of the caller.

        Parameters:
            name: by which `at_work` tells of it.
        """
        return await self.do(Work(name), functools.partial(function, *arguments, **named))

    async def do(self, work: Work, function: Callable[[], T]) -> T:
        """The same, of which can be told afterwards. Who gives up waiting leaves it to its thread."""
        call = functools.partial(contextvars.copy_context().run, function)
        return await asyncio.get_running_loop().run_in_executor(self, work, call)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future = Future[T]()
        with self._starting:
            if self._closed:
                raise RuntimeError("these threads are closed")
            self._jobs.put((future, functools.partial(fn, *args, **kwargs)))
            if not self._idle.acquire(blocking=False) and len(self._workers) < self._most:
                worker = _Worker(self._jobs, self._idle)
                self._workers.append(worker)
                worker.start()
        return future

    @property
    def at_work(self) -> list[str]:
        """The names of what runs in these threads now."""
        return sorted(worker.at_work for worker in self._workers if worker.at_work)

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """Let each thread end when it has nothing to do; waits for none."""
        with self._starting:
            self._closed = True
            for _ in self._workers:
                self._jobs.put(None)


def at_work() -> list[str]:
    """The names of what runs in any such thread of this process now."""
    return sorted(each.at_work for each in threading.enumerate() if isinstance(each, _Worker) and each.at_work)


class _Worker(threading.Thread):
    def __init__(self, jobs: SimpleQueue[Job | None], idle: threading.Semaphore) -> None:
        super().__init__(name="cauce handler", daemon=True)
        self._jobs, self._free = jobs, idle
        self.at_work = ""

    def run(self) -> None:
        while (job := self._next()) is not None:
            future, call = job
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            # What an idle thread remembers would live as long as it.
            del job, future, call

    def _next(self) -> Job | None:
        try:
            return self._jobs.get_nowait()
        except Empty:
            self._free.release()
            return self._jobs.get()
