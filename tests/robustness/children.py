"""Running something in a process of its own, which may take so much memory and time, and do nothing it must not."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import moekernels

_MOST_SECONDS = 600
#: Of the interpreter's audit events, those that run something, reach out or change files.
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "os.remove",
              "os.rename", "os.rmdir", "os.chmod", "shutil.rmtree", "ctypes.dlopen")  # fmt: skip


class Outcome(NamedTuple):
    """How a child ended.

    Attributes:
        result: what the function returned; None if it did not.
        died: the signal or exit code of a child without result, "CPU time" or "waits for ever".
        memory: bytes of resident memory that it took at most beyond what it began with.
        seconds: of CPU time.
    """

    result: Any
    died: str
    memory: int
    seconds: float


def run(function: Callable[[], Any], *, seconds: float, memory: int, watched: bool = True) -> Outcome:
    """Run a function that returns something JSON can hold in a forked child.

    Args:
        function: what to run.
        seconds: CPU time after which the child is ended. By the clock it has minutes, for machines that are busy.
        memory: bytes of address space that it may map beyond what it begins with.
        watched: end the child when Python is about to run a command, connect, or change a file.
    """
    # What is kept of tensors that are gone counts as resident until the system takes it, perhaps while this measures.
    moekernels.release_memory()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads in the parent: the child needs none
        child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            _limit(seconds, memory)
            if watched:
                sys.addaudithook(_watch)
            result = function()
            answer = {"result": result, "memory": _peak(), "seconds": time.process_time()}
            os.write(writer, json.dumps(answer).encode())
        except BaseException as error:
            os.write(2, f"child: {type(error).__name__}: {error}\n".encode(errors="replace"))
            os._exit(3)
        os._exit(0)
    os.close(writer)
    return _wait(child, reader)


def _wait(child: int, reader: int) -> Outcome:
    deadline = time.monotonic() + _MOST_SECONDS
    died = ""
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            died = "waits for ever"
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.002)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    used = usage.ru_utime + usage.ru_stime
    if status or not data:
        code = os.waitstatus_to_exitcode(status)
        died = died or (signal.Signals(-code).name if code < 0 else f"exit {code}")
        return Outcome(None, "CPU time" if died == "SIGXCPU" else died, 0, used)
    answer = json.loads(data)
    return Outcome(answer["result"], "", answer["memory"], used)


def _limit(seconds: float, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 3))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    Path("/proc/self/clear_refs").write_text("5")
    global _begun
    _begun = _status("VmRSS")


_begun = 0


def _peak() -> int:
    return max(_status("VmHWM") - _begun, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if event in _FORBIDDEN or (writes and arguments[0] not in ("/dev/null",)):
        os.write(2, f"child: {event} {arguments}\n".encode(errors="replace"))
        os._exit(66)
