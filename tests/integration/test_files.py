"""/v1/files and /v1/uploads with the real SDK: what goes in comes out, or leaves nothing."""

from __future__ import annotations

import hashlib
import io
import json
import random
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.upstream import FakeUpstream
from tests.integration.gateway import Gateway, StartGateway
from tests.integration.test_full_disk import disk, fill
from tests.waiting import wait_until

__all__ = ["disk"]

LINES = b'{"messages": []}\n' * 20


def sdk(gateway: Gateway, key: dict[str, Any] | None = None) -> openai.OpenAI:
    return gateway.openai_client(key["secret"] if key else "unused")


def stored(gateway: Gateway) -> list[str]:
    """Every file in the store, by its path: also what is half written."""
    root = gateway.settings.files_path
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def names(gateway: Gateway, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    return f"{digest[:2]}/{digest}"


def said(caught: pytest.ExceptionInfo[openai.APIStatusError]) -> str:
    return str(caught.value.body["message"])  # type: ignore[index]


def test_what_goes_in_comes_out(gateway: Gateway, client: openai.OpenAI) -> None:
    made = client.files.create(file=("pirate.jsonl", LINES), purpose="fine-tune")
    assert (made.object, made.filename, made.purpose) == ("file", "pirate.jsonl", "fine-tune")
    assert (made.bytes, made.status, made.expires_at) == (len(LINES), "processed", None)
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == LINES
    assert list(client.files.list()) == [made]
    assert stored(gateway) == [names(gateway, LINES)]
    gone = client.files.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "file")
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="There is no file"):
            call(made.id)


def test_a_range_of_the_bytes(gateway: Gateway, client: openai.OpenAI) -> None:
    made = client.files.create(file=("a.txt", b"0123456789"), purpose="user_data")
    answer = gateway.client.get(f"/v1/files/{made.id}/content", headers={"range": "bytes=2-4"})
    assert (answer.status_code, answer.content) == (206, b"234")
    assert answer.headers["content-disposition"] == 'attachment; filename="a.txt"'


def test_pages_by_age_and_purpose(client: openai.OpenAI) -> None:
    purposes: list[Any] = ["fine-tune", "batch", "evals", "fine-tune", "vision"]
    made = [
        client.files.create(file=(f"{number}.jsonl", LINES), purpose=purpose)
        for number, purpose in enumerate(purposes)
    ]
    newest = [file.id for file in reversed(made)]
    assert [file.id for file in client.files.list(limit=2)] == newest
    page = client.files.list(limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    assert [file.id for file in client.files.list(limit=2, order="asc")] == newest[::-1]
    tuned = client.files.list(purpose="fine-tune", limit=1)
    assert [file.id for file in tuned] == [made[3].id, made[0].id]
    client.files.delete(newest[1])
    after = client.files.list(after=newest[1], limit=1).data
    assert [file.id for file in after] == [newest[2]], "the place of a deleted file is known"
    with pytest.raises(openai.BadRequestError, match="after names no file"):
        client.files.list(after="file-nope")
    for limit in (0, 10_001):
        with pytest.raises(openai.BadRequestError, match="limit"):
            client.files.list(limit=limit)


def test_a_time_to_live(client: openai.OpenAI) -> None:
    day: Any = {"anchor": "created_at", "seconds": 86_400}
    made = client.files.create(file=("a", b"x"), purpose="user_data", expires_after=day)
    assert made.expires_at == made.created_at + 86_400
    batch = client.files.create(file=("a", b"x"), purpose="batch")
    assert batch.expires_at == batch.created_at + 30 * 86_400
    for seconds in (3599, 2_592_001):
        wrong: Any = {"anchor": "created_at", "seconds": seconds}
        with pytest.raises(openai.BadRequestError, match="expires_after is 3600 to 2592000"):
            client.files.create(file=("a", b"x"), purpose="batch", expires_after=wrong)
    lacking: Any = {"anchor": "finished_at", "seconds": 86_400}
    with pytest.raises(openai.BadRequestError, match="is created_at"):
        client.files.create(file=("a", b"x"), purpose="batch", expires_after=lacking)


def test_a_key_sees_its_own_files_and_an_admin_all(gateway: Gateway) -> None:
    gateway.create_key("admin")
    mine, yours = (sdk(gateway, gateway.create_key("training", "inference")) for _ in range(2))
    made = mine.files.create(file=("a.jsonl", LINES), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError):
        yours.files.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        yours.files.delete(made.id)
    assert yours.files.list().data == []
    with pytest.raises(openai.BadRequestError):
        yours.files.list(after=made.id)
    listed = gateway.client.get("/v1/files").json()
    assert [file["id"] for file in listed["data"]] == [made.id]
    infers = sdk(gateway, gateway.create_key("inference"))
    with pytest.raises(openai.PermissionDeniedError, match="'training' or 'admin'"):
        infers.files.list()


@pytest.mark.parametrize(
    ("name", "purpose", "message"),
    [
        ("a.jsonl", "fine-tune-results", "purpose is one of fine-tune, batch, assistants"),
        ("a.jsonl", "", "purpose is one of"),
        ("a" * 513, "batch", "512"),
    ],
)
def test_what_no_file_can_be(gateway: Gateway, name: str, purpose: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk(gateway).files.create(file=(name, LINES), purpose=purpose)
    assert message in said(caught)
    assert stored(gateway) == []


def test_a_folder_in_the_name_is_left_out(client: openai.OpenAI) -> None:
    for sent in ("../../etc/passwd", "C:\\Users\\me\\passwd"):
        assert client.files.create(file=(sent, b"x"), purpose="batch").filename == "passwd"


BOUNDARY = "frontier"


def form(*parts: tuple[str, bytes], end: bytes = b"--frontier--\r\n") -> bytes:
    body = b"".join(
        b'--frontier\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        % (name.encode(), value)
        for name, value in parts
    )
    return body + end


def pieces(body: bytes, rng: random.Random) -> Iterator[bytes]:
    """The body in packets of any size."""
    while body:
        at = rng.choice((1, 2, 7, 50, 10_000))
        yield body[:at]
        body = body[at:]


def send(
    gateway: Gateway, body: bytes | Iterator[bytes], kind: str | None = None
) -> httpx.Response:
    kind = kind or f"multipart/form-data; boundary={BOUNDARY}"
    headers = {"content-type": kind}
    return gateway.client.post("/v1/files", content=body, headers=headers)


FILE = ("file", LINES)
PURPOSE = ("purpose", b"fine-tune")


def test_the_file_may_come_before_its_purpose(gateway: Gateway) -> None:
    assert send(gateway, form(FILE, PURPOSE)).json()["filename"] == "file"
    assert stored(gateway) == [names(gateway, LINES)]


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"{}", "application/json", "Send multipart/form-data"),
        (form(FILE, PURPOSE), "multipart/form-data", "Send multipart/form-data"),
        (form(FILE, PURPOSE), "multipart/form-data; boundary=other", "not the multipart form"),
        (
            form(FILE, PURPOSE),
            f"multipart/form-data; boundary={'x' * 5000}",
            "not the multipart form",
        ),
        (form(PURPOSE, ('file"; filename="\x07', b"")), None, "printable"),
        (form(PURPOSE), None, "has no file 'file'"),
        (form(FILE), None, "purpose is one of"),
        (form(FILE, FILE, PURPOSE), None, "two files"),
        (form(PURPOSE, PURPOSE, FILE), None, "twice"),
        (form(FILE, PURPOSE, ("color", b"red")), None, "the field 'color'; there are file, purp"),
        (form(FILE, ("purpose", b"x" * 5000)), None, "over 4096 bytes"),
        (form(FILE, PURPOSE, end=b""), None, "did not arrive whole"),
        (form(FILE, PURPOSE, end=b"--frontier"), None, "did not arrive whole"),
        (b"", None, "did not arrive whole"),
        (b"--frontier\r\nbroken\r\n\r\n", None, "not the multipart form"),
    ],
)
def test_what_is_no_form(gateway: Gateway, body: bytes, kind: str | None, message: str) -> None:
    answer = send(gateway, body, kind)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert stored(gateway) == []


def test_a_form_of_any_bytes(gateway: Gateway) -> None:
    """Forms with bytes changed, dropped, doubled: taken or refused, and nothing half left."""
    rng = random.Random(7)
    forms = form(PURPOSE, FILE), form(FILE, PURPOSE, ("expires_after[anchor]", b"created_at"))
    statuses = set()
    for _ in range(300):
        body = bytearray(rng.choice(forms))
        for _ in range(rng.randint(1, 4)):
            at, length = rng.randrange(len(body)), rng.choice((1, 1, 2, 10, 100))
            piece = rng.choice((b"", rng.randbytes(length), bytes(body[at : at + length]) * 2))
            body[at : at + length] = piece
        answer = send(gateway, pieces(bytes(body), rng))
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 413), (answer.text, bytes(body))
    assert statuses >= {200, 400}
    for _ in range(20):
        assert send(gateway, pieces(form(PURPOSE, FILE), rng)).json()["bytes"] == len(LINES)
    kept = {file["id"] for file in gateway.client.get("/v1/files").json()["data"]}
    assert not [path for path in stored(gateway) if path.startswith("tmp")]
    for file_id in kept:
        gateway.client.get(f"/v1/files/{file_id}/content").raise_for_status()


def test_a_file_over_the_limit_leaves_nothing(
    start_gateway: StartGateway, upstream: FakeUpstream
) -> None:
    gateway = start_gateway(upstream.url, max_file_bytes=1 << 20)
    client = sdk(gateway)
    client.files.create(file=("a", bytes(1 << 20)), purpose="batch")
    before = stored(gateway)
    for size in ((1 << 20) + 1, 4 << 20):
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("a", b"x" * size), purpose="batch")
        assert caught.value.status_code == 413
    assert stored(gateway) == before

    def endless() -> Iterator[bytes]:
        yield form(PURPOSE, FILE, end=b"")[:-2]
        for _ in range(64):
            yield bytes(1 << 16)

    with suppress(httpx.WriteError):  # it may be refused before all of it was sent
        answer = gateway.client.post(
            "/v1/files",
            content=endless(),
            headers={"content-type": f"multipart/form-data; boundary={BOUNDARY}"},
        )
        assert answer.status_code == 413
    wait_until(lambda: stored(gateway) == before)


def test_a_client_that_leaves_leaves_nothing(gateway: Gateway) -> None:
    body = form(PURPOSE, ("file", bytes(3 << 20)))
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        f"content-type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port)) as leaves:
        leaves.sendall(head.encode() + body[: 2 << 20])
        wait_until(lambda: bool(stored(gateway)))
    wait_until(lambda: not stored(gateway))


def test_a_large_file_is_never_whole_in_memory(gateway: Gateway) -> None:
    """The gateway runs in this process: what Python holds at most tells."""
    size = 48 << 20

    def sent() -> Iterator[bytes]:
        yield form(PURPOSE, ("file", b""), end=b"")[:-2]
        for _ in range(size >> 16):
            yield bytes(1 << 16)
        yield b"\r\n--frontier--\r\n"

    tracemalloc.start()
    try:
        answer = gateway.client.post(
            "/v1/files",
            content=sent(),
            headers={"content-type": f"multipart/form-data; boundary={BOUNDARY}"},
        )
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.json()["bytes"] == size
    assert most < 16 << 20, f"{most >> 20} MiB at once"


def test_a_full_disk(
    start_gateway: StartGateway,
    upstream: FakeUpstream,
    new_database: Callable[[str], str],
    disk: Path,
) -> None:
    gateway = start_gateway(
        upstream.url, data_dir=disk / "data", database_url=new_database("sqlite")
    )
    kept = sdk(gateway).files.create(file=("a", b"kept"), purpose="batch")
    before = stored(gateway)
    filler = fill(disk)
    for size in (100, 2 << 20):
        with pytest.raises(openai.InternalServerError) as caught:
            sdk(gateway).files.create(file=("a", b"x" * size), purpose="batch")
        assert caught.value.status_code == 503
        assert "file store cannot be written: No space left" in said(caught)
    assert stored(gateway) == before
    assert sdk(gateway).files.content(kept.id).content == b"kept"
    filler.unlink()
    sdk(gateway).files.create(file=("a", b"x"), purpose="batch")


# uploads


def begin(client: openai.OpenAI, size: int = 10, **fields: Any) -> str:
    fields = {"filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"} | fields
    return client.uploads.create(bytes=size, **fields).id


def test_an_upload_in_parts(gateway: Gateway, client: openai.OpenAI) -> None:
    content = random.Random(1).randbytes(300)
    upload = client.uploads.create(
        bytes=300,
        filename="a.jsonl",
        mime_type="text/jsonl",
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert (upload.status, upload.file) == ("pending", None)
    assert upload.expires_at == upload.created_at + 3600
    parts = [
        client.uploads.parts.create(upload.id, data=content[at : at + 100]).id
        for at in (200, 0, 100)
    ]
    order = [parts[1], parts[2], parts[0]]
    with pytest.raises(openai.BadRequestError, match="The md5 is"):
        client.uploads.complete(upload.id, part_ids=order, md5="0" * 32)
    done = client.uploads.complete(upload.id, part_ids=order, md5=hashlib.md5(content).hexdigest())
    assert done.status == "completed"
    assert done.file is not None
    assert (done.file.filename, done.file.bytes) == ("a.jsonl", 300)
    assert done.file.expires_at == done.file.created_at + 7200
    assert client.files.content(done.file.id).content == content
    assert stored(gateway) == [names(gateway, content)]
    assert client.uploads.complete(upload.id, part_ids=order) == done, "asked twice"
    for call in (
        lambda: client.uploads.cancel(upload.id),
        lambda: client.uploads.parts.create(upload.id, data=b"x"),
    ):
        with pytest.raises(openai.ConflictError, match="is completed"):
            call()


def test_an_upload_completed_several_times_at_once(gateway: Gateway, client: openai.OpenAI) -> None:
    for _ in range(10):
        upload = begin(client, 300_000)
        parts = [client.uploads.parts.create(upload, data=b"x" * 100_000).id for _ in range(3)]
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(client.uploads.complete, upload, part_ids=parts) for _ in "1234"]
            done = [each.result() for each in asked]
        assert len({each.file.id for each in done if each.file}) == 1
    assert stored(gateway) == [names(gateway, b"x" * 300_000)]
    assert len(client.files.list().data) == 10


def test_the_sdks_own_way_with_a_large_file(gateway: Gateway, client: openai.OpenAI) -> None:
    content = random.Random(2).randbytes(1 << 20)
    done = client.uploads.upload_file_chunked(
        file=content,
        filename="a.bin",
        bytes=len(content),
        mime_type="application/octet-stream",
        purpose="user_data",
        part_size=300_000,
    )
    assert done.file is not None
    assert client.files.content(done.file.id).content == content
    assert stored(gateway) == [names(gateway, content)]


def test_a_cancelled_upload_leaves_nothing(gateway: Gateway, client: openai.OpenAI) -> None:
    upload = begin(client)
    part = client.uploads.parts.create(upload, data=b"01234")
    assert len(stored(gateway)) == 1
    assert client.uploads.cancel(upload).status == "cancelled"
    assert stored(gateway) == []
    with pytest.raises(openai.ConflictError, match="is cancelled"):
        client.uploads.complete(upload, part_ids=[part.id])
    with pytest.raises(openai.ConflictError, match="is cancelled"):
        client.uploads.parts.create(upload, data=b"x")
    assert stored(gateway) == []


def test_parts_that_are_no_whole(gateway: Gateway, client: openai.OpenAI) -> None:
    upload, other = begin(client), begin(client)
    part = client.uploads.parts.create(upload, data=b"01234").id
    foreign = client.uploads.parts.create(other, data=b"01234").id
    for parts, message in (
        ([part], "The parts are 5 bytes together; the upload was to be 10"),
        ([part, part], "names a part twice"),
        ([part, foreign], "has no part"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.uploads.complete(upload, part_ids=parts)
    for _ in range(3):
        client.uploads.parts.create(upload, data=b"01234")
    with pytest.raises(openai.APIStatusError) as caught:
        client.uploads.parts.create(upload, data=b"01234")
    assert caught.value.status_code == 413
    assert len(stored(gateway)) == 5, "twice what it needs, and the other's"


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"purpose": "theft"}, 400, "purpose is one of"),
        ({"filename": ""}, 400, "1 to 512 printable"),
        ({"size": 0}, 400, "bytes"),
        ({"size": 1 << 40}, 413, "LORAGATE_MAX_FILE_BYTES"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "3600 to 2592000"),
        ({"extra_body": {"color": "red"}}, 400, "color"),
    ],
)
def test_what_no_upload_can_be(
    client: openai.OpenAI, fields: dict[str, Any], status: int, message: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        begin(client, **fields)
    assert caught.value.status_code == status
    assert message in said(caught)


def test_anothers_upload_is_none(gateway: Gateway) -> None:
    gateway.create_key("admin")
    mine, yours = (sdk(gateway, gateway.create_key("training", "inference")) for _ in range(2))
    upload = begin(mine)
    with pytest.raises(openai.NotFoundError, match="There is no upload"):
        yours.uploads.parts.create(upload, data=b"x")
    with pytest.raises(openai.NotFoundError):
        yours.uploads.complete(upload, part_ids=["part-1"])
    with pytest.raises(openai.NotFoundError):
        yours.uploads.cancel(upload)
    assert stored(gateway) == []


def test_json_that_is_none(gateway: Gateway) -> None:
    answer = gateway.client.post("/v1/uploads", content=b"{", headers={"content-type": "a/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert json.loads(answer.content)["error"]["code"].startswith("invalid")


def test_a_file_object_is_sent_as_it_is(client: openai.OpenAI) -> None:
    made = client.files.create(file=io.BytesIO(LINES), purpose="fine-tune")
    assert client.files.content(made.id).content == LINES
