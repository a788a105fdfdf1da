"""The client of a worker's training routes, beside servers that answer as they please."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import pytest

from app import errors
from app.db.blobs import AdapterStore
from app.domain import LoraSpec, Trainer, TrainerKind
from app.errors import StorageUnavailable, TrainerError, TrainerUnavailable
from app.ops import (
    MAX_WAIT_S,
    Datum,
    Exchange,
    Failure,
    ForwardBackward,
    Numbered,
    OptimStep,
    Outcome,
    Outcomes,
    Result,
    RunStatus,
    SavedFile,
    Submit,
    Tensor,
)
from app.training.run import Run, TrainerHost
from app.training.trainers import RunClient, TrainerClient

SPEC = LoraSpec(4, 8, ("q_proj",), 1)
STATUS = RunStatus("a", 1, 1, "created", 0)
pack = msgspec.msgpack.encode

Answer = tuple[int, bytes]


class Script:
    """Answers requests in turn, and remembers them. An answer of None breaks the connection."""

    def __init__(self) -> None:
        self.answers: list[Answer | None] = []
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.url = ""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().strip().split("\r\n")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                self.asked.append((method, path, headers, body))
                answer = self.answers.pop(0)
                if answer is None:
                    break
                status, content = answer
                writer.write(
                    b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(content))
                )
                writer.write(content)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


def complaint(status: int, code: str, message: str = "so it is") -> Answer:
    return status, msgspec.json.encode({"error": {"code": code, "message": message}})


@pytest.fixture
async def script() -> AsyncGenerator[Script]:
    made = Script()
    server = await asyncio.start_server(made, "127.0.0.1", 0)
    made.url = "http://{}:{}".format(*server.sockets[0].getsockname())
    yield made
    server.close()
    await server.wait_closed()


def trainer(url: str, key: str | None = None) -> Trainer:
    return Trainer("there", TrainerKind.HF, "tiny", url, api_key=key)


@pytest.fixture
async def client(script: Script) -> AsyncGenerator[TrainerClient]:
    async with TrainerClient(trainer(script.url + "/", "k3y")) as client:
        yield client


@pytest.fixture
def run(client: TrainerClient) -> RunClient:
    return client.run("job:1")


def test_it_is_what_a_driver_needs() -> None:
    host: Callable[[Trainer], TrainerHost] = TrainerClient
    run: Callable[[TrainerClient, str], Run] = RunClient
    assert host is TrainerClient
    assert run is RunClient


async def test_what_is_sent(script: Script, run: RunClient) -> None:
    script.answers = [(200, pack(STATUS)), (202, b""), (200, pack(STATUS)), (204, b""), (204, b"")]
    assert await run.open("tiny", SPEC, 7) == STATUS
    await run.submit(3, OptimStep(0.5), acked=2)
    assert await run.cancel_ops() == STATUS
    await run.unload()
    await run.delete()
    where = "/train/v1/runs/job%3A1"
    assert [(method, path) for method, path, _, _ in script.asked] == [
        ("PUT", where),
        ("PUT", f"{where}/ops/3"),
        ("DELETE", f"{where}/ops?fence=7"),
        ("POST", f"{where}/unload?fence=7"),
        ("DELETE", f"{where}?fence=7"),
    ]
    assert all(headers["authorization"] == "Bearer k3y" for _, _, headers, _ in script.asked)
    sent = msgspec.msgpack.decode(script.asked[1][3], type=Submit)
    assert sent == Submit(OptimStep(0.5), fence=7, acked=2)


async def test_an_outcome_is_asked_for_until_it_is_there(script: Script, run: RunClient) -> None:
    result = Result(metrics={"loss:sum": 1.0})
    script.answers = [(204, b""), (204, b""), (200, pack(Outcome(1, result)))]
    assert await run.outcome(1) == result
    assert [path.partition("?")[2] for _, path, _, _ in script.asked] == ["wait_s=30.0"] * 3


async def test_ops_and_outcomes_go_together(script: Script, run: RunClient) -> None:
    one, other = Outcome(1, Result(metrics={"loss:sum": 1.0})), Outcome(2, Result())
    script.answers = [
        (200, pack(STATUS)),
        (200, pack(Outcomes([]))),
        (200, pack(Outcomes([one, other]))),
        (200, pack(Outcomes([]))),
    ]
    await run.open("tiny", SPEC, 7)
    assert await run.exchange([(3, OptimStep(0.5))], 1, (1, 2)) == [one.result, other.result]
    assert await run.exchange([], 2, None) == []
    sent = [msgspec.msgpack.decode(body, type=Exchange) for *_, body in script.asked[1:]]
    handed = Exchange([Numbered(3, OptimStep(0.5))], 7, 1, (1, 2), MAX_WAIT_S)
    # What was handed over is there: only the question is repeated.
    again = msgspec.structs.replace(handed, ops=[])
    assert sent == [handed, again, Exchange([], 7, 2, None, MAX_WAIT_S)]
    assert {path for _, path, _, _ in script.asked[1:]} == {"/train/v1/runs/job%3A1/ops"}


async def test_a_large_batch_and_a_large_answer(script: Script, run: RunClient) -> None:
    ids = Tensor("int32", (100_000,), bytes(400_000))
    result = Result(outputs=[ids])
    script.answers = [(200, pack(Outcomes([Outcome(1, result)])))]
    op = ForwardBackward([Datum(ids, ids)])
    assert await run.exchange([(1, op)], 0, (1, 1)) == [result]
    sent = msgspec.msgpack.decode(script.asked[0][3], type=Exchange)
    assert sent.ops == [Numbered(1, op)]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("non_finite_loss", errors.NonFiniteLoss),
        ("out_of_memory", errors.OutOfMemory),
        ("invalid_request", errors.InvalidRequest),
        ("training_failed", errors.TrainingFailed),
        ("something_new", errors.TrainingFailed),
    ],
)
async def test_a_failed_op(
    script: Script, run: RunClient, code: str, kind: type[Exception]
) -> None:
    script.answers = [(200, pack(Outcome(1, failure=Failure(code, "so it is"))))]
    with pytest.raises(kind, match=r"^so it is$") as found:
        await run.outcome(1)
    assert type(found.value) is kind


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (complaint(404, "run_lost"), errors.RunLost),
        (complaint(409, "fenced"), errors.Fenced),
        (complaint(409, "conflict"), errors.Conflict),
        (complaint(429, "trainer_busy"), errors.TrainerBusy),
        (complaint(507, "storage_unavailable"), errors.StorageUnavailable),
        (complaint(400, "invalid_request"), errors.InvalidRequest),
        (complaint(413, "body_too_large"), errors.BodyTooLarge),
        (complaint(404, "not_found"), TrainerError),
        (complaint(401, "invalid_api_key"), TrainerError),
        (complaint(500, "internal_error"), TrainerUnavailable),
        ((502, b"<html>a proxy</html>"), TrainerUnavailable),
        ((404, b"<html>another server</html>"), TrainerError),
        ((200, b"nonsense"), TrainerError),
    ],
)
async def test_a_request_that_is_refused(
    script: Script, run: RunClient, answer: Answer, kind: type[Exception]
) -> None:
    script.answers = [answer]
    with pytest.raises(kind) as found:
        await run.open("tiny", SPEC, 1)
    assert type(found.value) is kind


async def test_nothing_is_asked_twice(script: Script, run: RunClient) -> None:
    script.answers = [None]
    with pytest.raises(TrainerUnavailable, match="trainer 'there' cannot be reached"):
        await run.submit(1, OptimStep(0.5))
    assert len(script.asked) == 1


async def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
    async with TrainerClient(trainer(f"http://{host}:{port}")) as client:
        with pytest.raises(TrainerUnavailable):
            await client.info()


@pytest.mark.parametrize("url", ["http://[broken", "http://a:port", "ftp://a", "a:80", ""])
async def test_a_url_that_is_none(url: str) -> None:
    async with TrainerClient(trainer(url)) as client:
        with pytest.raises(TrainerUnavailable, match="its URL is"):
            await client.info()


async def test_https_is_spoken_where_the_url_says_so(script: Script) -> None:
    secure = trainer(script.url.replace("http:", "https:"))
    async with TrainerClient(secure, connect_s=0.1) as client:
        with pytest.raises(TrainerUnavailable, match="cannot be reached"):
            await client.info()
    assert script.asked == []


def saved(data: bytes, name: str = "f") -> SavedFile:
    return SavedFile(name, len(data), hashlib.sha256(data).hexdigest())


async def test_files_are_fetched(script: Script, run: RunClient, tmp_path: Path) -> None:
    large = bytes(range(256)) * 10_000
    script.answers = [(200, large), (200, b"{}")]
    await run.download("ft:x@1", [saved(large, "w"), saved(b"{}", "c.json")], tmp_path)
    assert (tmp_path / "w").read_bytes() == large
    assert (tmp_path / "c.json").read_bytes() == b"{}"
    assert script.asked[0][1].endswith("/files/ft%3Ax%401/w")


async def test_a_file_that_is_another(script: Script, run: RunClient, tmp_path: Path) -> None:
    script.answers = [(200, b"other")]
    with pytest.raises(TrainerError, match="digest differs"):
        await run.download("x", [saved(b"that")], tmp_path)
    assert not (tmp_path / "f").exists()


async def test_a_full_disk_is_nobody_else_s_fault(
    script: Script, run: RunClient, tmp_path: Path
) -> None:
    large = bytes(1 << 20)
    script.answers = [(200, large), (200, b"{}")]
    store = AdapterStore(tmp_path)

    async def fetch() -> None:
        with store.staging() as folder:
            (folder / "w").symlink_to("/dev/full")
            await run.download("x", [saved(large, "w")], folder)

    with pytest.raises(StorageUnavailable, match="No space left"):
        await fetch()
    assert list((tmp_path / "tmp").iterdir()) == []
    await run.download("x", [saved(b"{}", "later")], tmp_path)  # the client is as good as before


@pytest.mark.parametrize("name", ["", "..", "../up", "/etc/passwd", "a\0b"])
async def test_a_file_s_name_is_no_path(
    script: Script, run: RunClient, tmp_path: Path, name: str
) -> None:
    with pytest.raises(TrainerError):
        await run.download("x", [saved(b"", name)], tmp_path)
    assert script.asked == []
