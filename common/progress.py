"""How far a long loop is: a bar on a terminal, a line every so often in a log."""

import sys
import time

from tqdm import tqdm

SECONDS = 60.0  # between two lines


def on_terminal() -> bool:
    """Tells whether a bar can be drawn. Both streams must be a terminal: behind `| tee log` the
    lines come late and would meet a bar that is drawn already, so that it stands there twice.
    """
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


class Progress:
    """Counts the units of a loop. On a terminal it draws a bar; elsewhere it says a line every
    minute. With `every` it says one after so many units instead, beside the bar too, or none if
    that is 0. `silent` is for ranks that say nothing.
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str = "step",
        initial: int = 0,
        leave: bool = False,
        silent: bool = False,
        every: int | None = None,
    ):
        self.total, self.what, self.unit, self.every = total, what, unit, every
        draws = on_terminal() and not silent
        self.bar = tqdm(
            total=total,
            initial=initial,
            unit=unit,
            desc=what,
            dynamic_ncols=True,
            leave=leave,
            disable=not draws,
        )
        self.says = not silent and every != 0 and (every is not None or not draws)
        self.done = self.first = self.said = initial
        self.started = self.said_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Tells whether it is time for a line."""
        if not self.says:
            return False
        if self.every:
            return self.done // self.every > self.said // self.every
        return time.monotonic() - self.said_at >= SECONDS

    def advance(self, units: int = 1) -> None:
        """Counts, and moves the bar."""
        self.done += units
        self.bar.update(units)

    def update(self, units: int = 1) -> None:
        """Counts, and says a line if one is due."""
        self.advance(units)
        if self.due:
            self.say(self.line())

    def say(self, line: str) -> None:
        """Says a line, without harm to the bar; the next one is due after it."""
        tqdm.write(line)
        sys.stdout.flush()  # a log is read while it is written
        self.said, self.said_at = self.done, time.monotonic()

    def line(self) -> str:
        """Returns the line: "features: 12,800 of 50,000 images, 1 min 4 s left"."""
        seconds = (time.monotonic() - self.started) / max(1, self.done - self.first)
        unit = self.unit + "s" * (self.total != 1)
        text = f"{self.what.strip()}: {self.done:,} of {self.total:,} {unit}"
        return f"{text}, {duration(seconds * max(0, self.total - self.done))} left"

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Returns a time in words: 90 -> '1 min 30 s'."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"
