"""What one run of a benchmark is asked, what it found, and how contenders are measured in turn."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil
from pathlib import Path

from benchmarks._ground import Ground
from benchmarks._load import Load

__all__ = [
    "Compare",
    "Contender",
    "Found",
    "Prefill",
    "Run",
    "Sample",
    "Turn",
    "Versus",
    "by_median",
    "by_rate",
    "on_a_file",
]


@dataclass(frozen=True)
class Turn:
    """What a contender is told: which round it is, and for how many seconds to work."""

    round: int
    seconds: float


@dataclass(frozen=True)
class Sample:
    """What one contender did in one turn: how much, in how many seconds, and how long each single one took."""

    count: int
    seconds: float
    latencies: Sequence[float] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.count / self.seconds

    def within(self, part: int) -> float:
        """The seconds within which so many of a hundred were done."""
        return sorted(self.latencies)[len(self.latencies) * part // 100]


Contender = Callable[[Turn], Sample]
Prefill = Callable[[Path, Load], None]
Compare = Callable[[Sample, Sample], float]


def by_rate(ours: Sample, theirs: Sample) -> float:
    """How many times as much a second."""
    return ours.rate / theirs.rate


def by_median(ours: Sample, theirs: Sample) -> float:
    """How many times as soon, in the median."""
    return theirs.within(50) / ours.within(50)


@dataclass(frozen=True)
class Versus:
    """A ratio: one contender compared with another, turn by turn. Above 1 ours is better."""

    name: str
    ours: str
    theirs: str
    compare: Compare = by_rate


@dataclass
class Found:
    """What `--json` prints. `spread` holds the lowest and highest round of each ratio."""

    ratios: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        self.ratios |= other.ratios
        self.figures |= other.figures
        self.settings |= other.settings
        self.spread |= other.spread


@dataclass(frozen=True)
class Run:
    """What was asked on the command line, and where files may lie."""

    ground: Ground
    rounds: int
    seconds: float
    load: Load
    only: str
    say: Callable[[str], None]
    bus: str = ""
    """The address that was named with `--bus`, if any."""

    def wanted(self, ratios: Iterable[Versus]) -> list[Versus]:
        """The ratios that `--only` lets through."""
        return [each for each in ratios if fnmatchcase(each.name, self.only)]

    def race(
        self,
        contenders: Mapping[str, Contender],
        ratios: Sequence[Versus],
        fills: Sequence[str] = ("",),
        also: Sequence[str] = (),
    ) -> Found:
        """Measure whoever the ratios need: in each round one after the other, each round begun by another one.

        A ratio is taken within each round, then the median over the rounds, so that what slows the machine for a while
        slows both. Contenders are named `name`, or `name.fill` once for each fill; then the fill with the least ratio
        counts. Those in `also` run for their figures.
        """
        needed = {
            _named(name, fill, contenders) for each in ratios for name in (each.ours, each.theirs) for fill in fills
        }
        running = [name for name in contenders if name in needed or (ratios and name in also)]
        samples: dict[str, list[Sample]] = {name: [] for name in running}
        for round in range(self.rounds):
            first = round * ceil(len(running) / self.rounds) % max(len(running), 1)
            for name in running[first:] + running[:first]:
                self.say(f"round {round + 1} of {self.rounds}: {name}")
                samples[name].append(_alike(contenders[name], Turn(round, self.seconds)))
        found = Found(figures=_figures(samples))
        for each in ratios:
            pairs = [
                (samples[_named(each.ours, fill, samples)], samples[_named(each.theirs, fill, samples)])
                for fill in fills
            ]
            least = min((_ratios(each.compare, ours, theirs) for ours, theirs in pairs), key=statistics.median)
            found.ratios[each.name], found.spread[each.name] = statistics.median(least), (min(least), max(least))
        return found


def on_a_file(run: Run, full: bool, name: str, prefill: Prefill, work: Callable[..., Sample]) -> Contender:
    """Work on a file: none yet, or a copy, made anew each round, of one that was filled beforehand."""

    def contender(turn: Turn) -> Sample:
        if full:
            base = run.ground.made(name, lambda path: prefill(path, run.load))
            return work(run.ground.copy(base, turn.round), run.load, seconds=turn.seconds)
        return work(run.ground.fresh(f"{name}.empty"), run.load, seconds=turn.seconds)

    return contender


def _named(name: str, fill: str, names: Container[str]) -> str:
    return name if name in names else f"{name}.{fill}"


def _alike(contender: Contender, turn: Turn) -> Sample:
    """Each begins with an empty garbage heap and the collector as Python sets it."""
    gc.collect()
    return contender(turn)


def _ratios(compare: Compare, ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[float]:
    return [compare(mine, other) for mine, other in zip(ours, theirs, strict=True)]


def _figures(samples: Mapping[str, Sequence[Sample]]) -> dict[str, float]:
    """Medians over the rounds: per second, milliseconds, and whatever a contender measured besides."""
    figures: dict[str, float] = {}
    for name, turns in samples.items():
        figures[f"{name}.rate"] = statistics.median(turn.rate for turn in turns)
        if all(turn.latencies for turn in turns):
            for part in (50, 99):
                figures[f"{name}.p{part}_ms"] = 1000 * statistics.median(turn.within(part) for turn in turns)
        for figure in turns[0].figures:
            figures[f"{name}.{figure}"] = statistics.median(turn.figures[figure] for turn in turns)
    return figures
