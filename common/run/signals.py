"""Stop signals: asked once, a run stops at the next step that all ranks agree on."""

import os
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequests:
    """While active, notes stop signals instead of dying of them; a second SIGINT quits at once. A
    SIGHUP that is ignored, as nohup has it, stays so.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.before: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = signal.Signals(number)


def run_child(line: Sequence[str]) -> int:
    """Runs a command to its end and returns its exit code. At Ctrl-C it is asked to stop and waited
    for, so that a run saves (`subprocess.run` kills it after a quarter second); a second Ctrl-C
    ends it at once.
    """
    process, end = subprocess.Popen(line), signal.SIGTERM
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(end)
            end = signal.SIGKILL
