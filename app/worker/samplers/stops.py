"""The text of one sequence, and the stop strings that may end it.

What comes in: pieces of text. What goes out: text that is safe to show, and which stop string
was met. It must not know: tokens, streams.
"""

from __future__ import annotations


class OutputText:
    """Grows by pieces; shows a piece only once no stop string can begin in it."""

    def __init__(self, stops: tuple[str, ...], *, include_stop: bool) -> None:
        self.text = ""
        self._stops = stops
        self._include_stop = include_stop
        self._taken = 0

    def push(self, piece: str, *, check: bool = True) -> str | None:
        """Append; return the stop string that is now complete, the text cut accordingly."""
        searched = len(self.text)
        self.text += piece
        if not (piece and check and self._stops):
            return None
        found = self._first_stop(searched)
        if found is None:
            return None
        begin, stop = found
        self.text = self.text[: begin + len(stop) if self._include_stop else begin]
        return stop

    def take(self, *, finished: bool) -> str:
        """What was not shown yet and may be."""
        end = len(self.text) if finished or self._include_stop else self._safe_end()
        taken, self._taken = self.text[self._taken : end], max(self._taken, end)
        return taken

    def _first_stop(self, searched: int) -> tuple[int, str] | None:
        """The stop string that ends first; between equals, the one listed first."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            begin = self.text.find(stop, max(0, searched - len(stop) + 1))
            if begin < 0:
                continue
            if best is None or begin + len(stop) < best[0] + len(best[1]):
                best = begin, stop
        return best

    def _safe_end(self) -> int:
        """Where the longest tail begins that could still become a stop string."""
        begins = [_overlap(self.text, stop, self._taken) for stop in self._stops]
        return min(begins, default=len(self.text))


def _overlap(text: str, stop: str, since: int) -> int:
    for begin in range(max(since, len(text) - len(stop) + 1), len(text)):
        if stop.startswith(text[begin:]):
            return begin
    return len(text)
