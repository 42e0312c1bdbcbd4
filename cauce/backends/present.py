"""What a process says of itself in a registry, readable across versions of this code."""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from cauce.wire import Instance, State

__all__ = ["Present", "instances_of", "read"]

_STATES = frozenset(get_args(State))


class Present(msgspec.Struct, frozen=True):
    """What a process says of itself. `owner` is its `identity`."""

    owner: str
    addresses: tuple[str, ...] = ()
    instances: tuple[Instance, ...] = ()

    def answers_in(self, domain: str) -> bool:
        """Whether it serves, or will soon, or did until now, something in a domain."""
        said = (self.addresses, *(instance.addresses for instance in self.instances))
        return any(address.partition("/")[0] == domain for addresses in said for address in addresses)

    def is_running(self, domain: str) -> bool:
        """Whether no instance in it that answers in a domain says that it is anything but running."""
        return all(
            instance.state == "running"
            for instance in self.instances
            if any(address.partition("/")[0] == domain for address in instance.addresses)
        )


class _Told(msgspec.Struct, frozen=True):
    """As much of it as every version writes in the same way."""

    owner: str
    addresses: tuple[str, ...] = ()
    instances: tuple[Any, ...] = ()


_decode = msgspec.json.Decoder(Present).decode
_decode_told = msgspec.json.Decoder(_Told).decode
_decode_instances = msgspec.json.Decoder(tuple[Instance, ...]).decode
_decode_any = msgspec.json.Decoder(tuple[Any, ...]).decode


def read(data: bytes) -> Present:
    """What a process has written, of this version, an older or a newer one.

    Fields that are not known are passed over, and those that are missing have their defaults. Raises `MsgspecError`
    for what is nothing of ours.
    """
    try:
        return _decode(data)
    except msgspec.ValidationError:
        told = _decode_told(data)
        return Present(told.owner, told.addresses, _readable(told.instances))


def instances_of(data: bytes) -> tuple[Instance, ...]:
    """The same of instances alone; none of what is nothing of ours."""
    try:
        return _decode_instances(data)
    except msgspec.ValidationError:
        try:
            return _readable(_decode_any(data))
        except msgspec.MsgspecError:
            return ()
    except msgspec.MsgspecError:
        return ()


def _readable(told: tuple[Any, ...]) -> tuple[Instance, ...]:
    found = list[Instance]()
    for each in told:
        if isinstance(each, dict) and each.get("state", "running") not in _STATES:
            each["state"] = "unknown"
        try:
            found.append(msgspec.convert(each, Instance))
        except msgspec.ValidationError:
            continue
    return tuple(found)
