"""Which server is under load when: runs that are compared are neighbours, and the order turns round."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

from bench.speed.server import Server
from bench.speed.traffic import Scenario


class Turn(NamedTuple):
    repeat: int
    scenario: Scenario
    name: str  # of the server


def schedule(names: Sequence[str], scenarios: Sequence[Scenario], repeats: int, both_live: bool) -> list[Turn]:
    """All turns. Every repeat runs all servers, in the opposite order of the repeat before, so that both see a slow
    phase of the machine. Where only one server lives at a time, it runs all scenarios of a repeat, and goes first in
    the next one, which saves every second start."""
    turns = []
    for repeat in range(repeats):
        order = names[:: -1 if repeat % 2 else 1]
        if both_live:
            turns += [Turn(repeat, scenario, name) for scenario in scenarios for name in order]
        else:
            turns += [Turn(repeat, scenario, name) for name in order for scenario in scenarios]
    return turns


class Servers:
    """Servers by name, started when they are first asked for; where only one may live, it ends for the next.

    A context manager; none lives after it.
    """

    def __init__(self, start: Callable[[str], AbstractContextManager[Server]], both_live: bool) -> None:
        self._start, self._both_live = start, both_live
        self._live: dict[str, Server] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def ensure(self, name: str) -> Server:
        """The server, started if it does not live."""
        if name not in self._live:
            if not self._both_live:
                self._live.clear()
                self._stack.close()
            self._live[name] = self._stack.enter_context(self._start(name))
        return self._live[name]
