"""How questions and answers lie in a stream of bytes: a length, and so many bytes."""

from __future__ import annotations

import struct
from typing import NamedTuple

from cauce.errors import Refused

__all__ = [
    "ALL",
    "ANSWER",
    "FAILED",
    "MOST",
    "NOT_SERVED",
    "QUESTION",
    "Answer",
    "Broken",
    "Frames",
    "Question",
    "answer",
    "question",
    "read_answer",
    "read_question",
]

MOST = 4 << 20
"""Bytes of the longest frame."""

QUESTION, ANSWER, NOT_SERVED, FAILED = 1, 2, 3, 4

ALL = 0
"""The id of no question: `NOT_SERVED` then tells of all that were not answered before it."""

_LENGTH = struct.Struct("!I")
_ANSWER = struct.Struct("!BQ")
_ANSWER_FRAME = struct.Struct("!IBQ")
_QUESTION = struct.Struct("!BQdqH")
_QUESTION_FRAME = struct.Struct("!IBQdqH")


class Broken(Exception):
    """The bytes are no frames of ours: close the connection they came by."""


class Question(NamedTuple):
    """`seconds` were left to answer it when it was `sent`, in microseconds of a time that is never set."""

    id: int
    seconds: float
    sent: int
    address: str
    payload: bytes


class Answer(NamedTuple):
    """An answer, or, by its kind, that there is none; then the payload says why."""

    kind: int
    id: int
    payload: bytes


def question(id: int, seconds: float, sent: int, address: str, payload: bytes) -> bytes:
    """The frame of a question. Raises `Refused` if it is too long."""
    name = address.encode()
    length = _QUESTION.size + len(name) + len(payload)
    if length > MOST:
        raise Refused(f"a question to {address} has {length} bytes: at most {MOST} can be asked")
    return _QUESTION_FRAME.pack(length, QUESTION, id, seconds, sent, len(name)) + name + payload


def answer(kind: int, id: int, payload: bytes) -> bytes:
    """The frame of an answer. Raises `Refused` if it is too long."""
    length = _ANSWER.size + len(payload)
    if length > MOST:
        raise Refused(f"the answer has {length} bytes: at most {MOST} can be given")
    return _ANSWER_FRAME.pack(length, kind, id) + payload


def read_question(frame: bytes) -> Question:
    """Raises `Broken` for what is none."""
    try:
        kind, id, seconds, sent, size = _QUESTION.unpack_from(frame)
        end = _QUESTION.size + size
        if kind != QUESTION or end > len(frame):
            raise Broken(f"no question: kind {kind}, {len(frame)} bytes")
        return Question(id, seconds, sent, frame[_QUESTION.size : end].decode(), frame[end:])
    except (struct.error, UnicodeDecodeError) as error:
        raise Broken(f"no question: {error}") from None


def read_answer(frame: bytes) -> Answer:
    """Raises `Broken` for what is none."""
    kind, id = _ANSWER.unpack_from(frame)
    if kind not in (ANSWER, NOT_SERVED, FAILED):
        raise Broken(f"no answer: kind {kind}")
    return Answer(kind, id, frame[_ANSWER.size :])


class Frames:
    """Cuts what arrives into frames. It holds what has arrived, and never more because a length promises it."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._wanted = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that are complete by now, without their length. Raises `Broken` for a length that cannot be."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        found, at, end = list[bytes](), 0, len(data)
        self._wanted = _LENGTH.size
        while end - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            if not _ANSWER.size <= length <= MOST:
                raise Broken(f"a frame of {length} bytes")
            begin = at + _LENGTH.size
            if end - begin < length:
                self._wanted = _LENGTH.size + length
                break
            at = begin + length
            found.append(data[begin:at])
        if at < end:
            self._rest += data[at:]
        return found
