"""Fetches an adapter's two files, and a probe if it has one, from a Hugging Face endpoint.

What comes in: a repository id and a revision. What goes out: the files, and the commit they are
from. Speaks the two routes this takes (the revision's info, a file's content) by itself, because
that way the size is limited while bytes arrive, nothing but these files is asked for, and a
cancelled registration ends the transfer.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx

from app.control.inspect_probe import PROBE_FILE
from app.db.blobs import FILES
from app.errors import (
    AdapterRejected,
    Fault,
    InvalidRequest,
    LoragateError,
    NotFound,
    SourceUnavailable,
)
from app.settings import Settings
from app.strict_json import shown

DEFAULT_ENDPOINT = "https://huggingface.co"
MAX_INFO_BYTES = 8 << 20
_CHUNK = 1 << 20
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)

_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_REVISION = re.compile(r"[\w./-]{1,200}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


async def fetch_adapter(repo: str, revision: str | None, into: Path, settings: Settings) -> str:
    """Put the files into `into`; the answer is the commit they are from.

    Raises:
        InvalidRequest: that is no repository id, or no revision.
        NotFound: the endpoint shows no such repository or revision to this gateway.
        AdapterRejected: the repository holds no adapter, or too large a one.
        SourceUnavailable: the endpoint did not answer, or not as it should.
    """
    revision = revision or "main"
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise InvalidRequest(f"{shown(repo)} is not a repo id.", param="source.hf_repo")
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise InvalidRequest(f"{shown(revision)} is not a revision.", param="source.revision")
    hub = _Hub(repo, settings)
    async with hub.opened():
        commit = await hub.commit_of(revision)
        left = settings.max_adapter_bytes
        with suppress(_Absent):
            left = await hub.download(PROBE_FILE, commit, into / PROBE_FILE, left)
        for name in FILES:
            left = await hub.download(name, commit, into / name, left)
    return commit


class _Absent(AdapterRejected):
    """The repository has no such file."""


class _Hub:
    """One repository on one endpoint, for the length of one registration."""

    def __init__(self, repo: str, settings: Settings) -> None:
        self._repo = repo
        self._endpoint = (settings.hub_endpoint or DEFAULT_ENDPOINT).rstrip("/")
        self._most = settings.max_adapter_bytes
        # Sent to the endpoint only: httpx drops it when a redirect leads to another host.
        token = settings.hub_token
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "loragate"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token.get_secret_value()}"

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        try:
            async with httpx.AsyncClient(
                headers=self._headers, timeout=_TIMEOUT, follow_redirects=True, max_redirects=5
            ) as self._client:
                yield
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            detail = str(exc) or type(exc).__name__
            raise self._unavailable(detail) from exc

    async def commit_of(self, revision: str) -> str:
        quoted = revision.replace("/", "%2F")
        url = f"{self._endpoint}/api/models/{self._repo}/revision/{quoted}"
        missing = NotFound(
            f"{self._endpoint} shows this gateway no repository {self._repo} "
            f"with a revision {revision}.",
            param="source.hf_repo",
        )
        raw = bytearray()
        async with self._get(url, missing) as response:
            async for chunk in response.aiter_raw(_CHUNK):
                raw += chunk
                if len(raw) > MAX_INFO_BYTES:
                    raise self._unavailable("its answer is too long")
        try:
            commit = json.loads(raw)["sha"]
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise self._unavailable("its answer names no commit") from exc
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise self._unavailable("its answer names no commit")
        return commit

    async def download(self, name: str, commit: str, to: Path, left: int) -> int:
        """Write one file; the answer is how many bytes the rest may have."""
        url = f"{self._endpoint}/{self._repo}/resolve/{commit}/{name}"
        missing = _Absent([Fault(name, "missing", f"a file of {self._repo}")])
        declared: str | None = None
        received = 0
        async with self._get(url, missing) as response:
            declared = response.headers.get("content-length")
            with to.open("xb") as file:
                async for chunk in response.aiter_raw(_CHUNK):
                    received += len(chunk)
                    if received > left:
                        found, allowed = f"over {self._most} bytes", f"at most {self._most} bytes"
                        raise AdapterRejected([Fault("size", found, allowed)])
                    await asyncio.to_thread(file.write, chunk)
        if declared is not None and declared != str(received):
            raise self._unavailable(f"{name} ended early")
        return left - received

    @asynccontextmanager
    async def _get(self, url: str, missing: LoragateError) -> AsyncIterator[httpx.Response]:
        async with self._client.stream("GET", url) as response:
            # A repository one may not see answers like one that is not there, or 401.
            if response.status_code in (401, 403, 404):
                raise missing
            if response.status_code != 200:
                raise self._unavailable(f"it answered {response.status_code}")
            yield response

    def _unavailable(self, detail: object) -> SourceUnavailable:
        return SourceUnavailable(
            f"{self._repo} could not be fetched from {self._endpoint}: {detail}."
        )
