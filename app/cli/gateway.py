"""The command line's side of the gateway's HTTP API.

What comes in: a verb's path and values. What goes out: the API's JSON, or a `Refused` whose
message is one line a person can act on. What it must not know: how anything is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx

from app.errors import LoragateError

#: Reading an answer may take as long as fetching and checking the weights does.
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
_LOGIN = "pass --key, or set LORAGATE_API_KEY"


class Refused(LoragateError):
    """The gateway said no, or is not there. `status` is 0 if it never answered."""

    code = "refused"

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Gateway:
    """One connection to a gateway, for the life of one command."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        self.keyed = key is not None
        try:
            self._client = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=_TIMEOUT,
                follow_redirects=False,
            )
        except httpx.InvalidURL as exc:
            raise Refused(f"{url!r} is not a URL: {exc}") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    def get(self, path: str, **params: object) -> Any:
        return self._call("GET", path, params=params)

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        return self._call("POST", path, body=body)

    def put(self, path: str, body: Mapping[str, object]) -> Any:
        return self._call("PUT", path, body=body)

    def patch(self, path: str, body: Mapping[str, object]) -> Any:
        return self._call("PATCH", path, body=body)

    def delete(self, path: str, **params: object) -> Any:
        return self._call("DELETE", path, params=params)

    def upload(
        self,
        path: str,
        chunks: Iterable[bytes],
        size: int,
        media_type: str,
        params: Mapping[str, object],
    ) -> Any:
        """POST `size` bytes as they come. The length goes first, so a refusal can be early."""
        headers = {"Content-Type": media_type, "Content-Length": str(size)}
        return self._call("POST", path, params=params, content=chunks, headers=headers)

    def send_file(self, path: str, file: Path, fields: Mapping[str, str]) -> Any:
        """POST a file as a form does; it is read as it is sent."""
        with file.open("rb") as stream:
            files = {"file": (file.name, stream, "application/octet-stream")}
            return self._call("POST", path, form=fields, files=files)

    def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, object] | None = None,
        body: Mapping[str, object] | None = None,
        content: Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        form: Mapping[str, str] | None = None,
        files: Mapping[str, tuple[str, BinaryIO, str]] | None = None,
    ) -> Any:
        given: dict[str, Any] = {k: v for k, v in (params or {}).items() if v is not None}
        try:
            answer = self._client.request(
                method,
                path,
                params=given,
                json=body,
                content=content,
                headers=headers,
                data=form,
                files=files,
            )
        except httpx.ConnectError as exc:
            raise Refused(
                f"there is no gateway at {self.url} ({exc}); start one with `loragate serve`, "
                "or say where it is with --url or LORAGATE_URL"
            ) from exc
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as exc:
            raise Refused(f"{self.url!r} is not the URL of a gateway: {exc}") from exc
        except httpx.HTTPError as exc:
            reason = str(exc) or type(exc).__name__
            raise Refused(f"the gateway at {self.url} did not answer: {reason}") from exc
        return self._read(answer)

    def _read(self, answer: httpx.Response) -> Any:
        if answer.is_success:
            if not answer.content:
                return None
            try:
                return answer.json()
            except json.JSONDecodeError as exc:
                raise Refused(f"{self.url} is not a loragate gateway: no JSON came") from exc
        message = _message(answer) or (
            f"{self.url} answered {answer.status_code} {answer.reason_phrase}; "
            "is it a loragate gateway?"
        )
        if answer.status_code == 401:
            message = f"{message} ({_LOGIN})"
        raise Refused(message, answer.status_code)


def _message(answer: httpx.Response) -> str | None:
    try:
        return " ".join(str(answer.json()["error"]["message"]).split())
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None
