"""Whom a question may be sent to, by what a registry knows: one that is silent only if nobody else will be there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cauce.backends.present import Present
from cauce.backends.spread import Spread

__all__ = ["Known", "answers_in", "candidates"]


class Known(Protocol):
    """What a registry knows of the processes on a bus, by their tokens."""

    @property
    def present(self) -> Mapping[str, Present]:
        """What each says of itself."""
        ...

    def is_alive(self, token: str) -> bool:
        """Whether it may be asked: what is looked at here may be struck off."""
        ...

    def is_quiet(self, token: str) -> bool:
        """Whether it has given no sign of life for so long that its loop stands still, or it is stopped."""
        ...


def candidates(
    known: Known, spread: Spread, serving: Sequence[str], here: Callable[[], Present], domain: str, *, late: bool
) -> list[str]:
    """Of those who serve an address in a domain who is asked, in this order.

    Parameters:
        here: tells what this process says of itself; most need not know.
        late: nobody else will be there in time.
    """
    well = [token for token in serving if not known.is_quiet(token)]
    if serving and not well and (late or not _will_answer(known, here, domain, serving)):
        # It may only be slow; and if it is stopped, nobody has taken its place.
        well = list(serving)
    if len(well) < 2:
        return well
    present = known.present
    running = [token for token in well if token in present and present[token].is_running(domain)]
    return spread.order(running) + [token for token in well if token not in running]


def answers_in(known: Known, here: Callable[[], Present], domain: str, *, but: str) -> bool:
    """Whether somebody who is alive answers in a domain, here or elsewhere but in one process."""
    return here().answers_in(domain) or any(
        present.answers_in(domain) and known.is_alive(token)
        for token, present in list(known.present.items())
        if token != but
    )


def _will_answer(known: Known, here: Callable[[], Present], domain: str, quiet: Sequence[str]) -> bool:
    """Whether another instance is well, which may be taking over just now."""
    return here().answers_in(domain) or any(
        present.answers_in(domain) and not known.is_quiet(token)
        for token, present in list(known.present.items())
        if token not in quiet
    )
