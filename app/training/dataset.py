"""Training files: JSON Lines, checked line by line.

What comes in: a path and the method it is for. What goes out: examples, or one
`InvalidTrainingFile` that names the lines. The file is read as it is needed, a line at a time.
It must not know: the database, the trainer, tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import Fault, InvalidTrainingFile, LineFault
from app.ops import Message
from app.strict_json import load_object
from app.training.conversations import BadLine, preference, supervised
from app.training.spec import Method

#: Longest line read, in bytes; no model's context is near it.
MAX_LINE_BYTES = 8 << 20
#: Read at once. A reader that lets go of the interpreter only for a moment, but often, keeps every
#: other thread from it: the event loop was held up for 390 ms with the default of 8 KiB.
_READ_BYTES = 1 << 20
#: More faults than these are not collected: a file of another kind has one in each line.
MAX_FAULTS = 20

_FORMS: Mapping[Method, Callable[[Mapping[str, Any]], tuple[Message, ...]]] = {
    "supervised": supervised,
    "dpo": preference,
}
_WHERE = re.compile(r"(?:line 1 )?column (\d+) \(char \d+\)")


@dataclass(frozen=True, slots=True)
class Example:
    """What one line teaches: a conversation, or for `dpo` the preferred one and the other."""

    line: int
    conversations: tuple[Message, ...]


def check(path: Path, method: Method, *, param: str = "training_file") -> int:
    """Read a whole file and count its examples. Blocking: run in a thread.

    Blank lines are passed over, and so is a byte order mark. One example is enough.

    Raises:
        InvalidTrainingFile: with the first lines that are wrong; `param` is the field to blame.
    """
    return sum(1 for _ in examples(path, method, param=param))


def examples(path: Path, method: Method, *, param: str = "training_file") -> Iterator[Example]:
    """The examples of a file, in order. Blocking.

    After a wrong line the reading goes on, only to find more of them.

    Raises:
        InvalidTrainingFile: as `check`, once the file is read or has enough faults.
    """
    form = _FORMS[method]
    faults: list[LineFault] = []
    count = 0
    for number, raw in _lines(path):
        try:
            example = Example(number, form(_parsed(raw)))
        except BadLine as exc:
            faults.append(LineFault(number, str(exc)))
            if len(faults) == MAX_FAULTS:
                break
            continue
        count += 1
        if not faults:
            yield example
    if faults:
        raise invalid(faults, method, param=param)
    if not count:
        raise InvalidTrainingFile("The file has no examples: it is empty.", param=param)


def invalid(faults: list[LineFault], method: Method, *, param: str) -> InvalidTrainingFile:
    """The error that names these lines."""
    more = "at least " if len(faults) >= MAX_FAULTS else ""
    lines = "line" if len(faults) == 1 else "lines"
    return InvalidTrainingFile(
        f"The file cannot be used for the method {method!r}: {more}{len(faults)} {lines} wrong",
        faults,
        param=param,
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers and lines that are not blank; an overlong one is cut, one byte too late."""
    with path.open("rb", _READ_BYTES) as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if raw.strip():
                yield number, raw.rstrip(b"\r\n")
            while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES + 1)


def _parsed(raw: bytes) -> Mapping[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise BadLine(f"longer than {MAX_LINE_BYTES} bytes, which is the most allowed")
    faults: list[Fault] = []
    value = load_object(raw, "line", faults)
    if value is None:
        found = _WHERE.sub(r"column \1", str(faults[0].found))
        raise BadLine(f"{found}; allowed is {faults[0].allowed}")
    return value
