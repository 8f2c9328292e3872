"""Run calls in fresh processes, several at a time."""

import multiprocessing
import traceback
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, Callable, Iterable, Iterator

from espnet_llm_plugin.errors import UserError


def _child(pipe, function: Callable, arguments: tuple) -> None:
    try:
        answer = ("done", function(*arguments))
    except (UserError, OSError) as error:
        answer = ("raise", error)
    except Exception:
        answer = ("failed", traceback.format_exc())
    with suppress(BrokenPipeError):  # the parent has been killed
        pipe.send(answer)


def in_fresh_processes(
    function: Callable, calls: Iterable[tuple], nj: int, preload: str
) -> Iterator[Any]:
    """Call ``function(*call)`` for every call, each in a process of its own, ``nj`` at a time.

    A pool reuses its processes; a library whose output depends on what it did before (espeak-ng)
    then gives other results for another ``nj``.

    Args:
        function: A function of a module (it is pickled).
        calls: Tuples of arguments.
        nj: Number of processes at a time.
        preload: Module to import once for all processes.

    Yields:
        Results, in the order of completion.

    Raises:
        UserError, OSError: A call raised it.
        RuntimeError: A call failed otherwise, or its process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    waiting = iter(calls)
    running = {}

    def start() -> None:
        for call in waiting:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, function, call), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            running[ours] = process
            return

    try:
        for _ in range(nj):
            start()
        while running:
            for pipe in wait(list(running)):
                process = running.pop(pipe)
                try:
                    status, answer = pipe.recv()
                except EOFError:
                    process.join()
                    status, answer = "failed", f"a process died (exit code {process.exitcode})"
                pipe.close()
                process.join()
                if status == "raise":
                    raise answer
                if status == "failed":
                    raise RuntimeError(answer)
                start()
                yield answer
    finally:
        for process in running.values():
            process.terminate()
            process.join()
