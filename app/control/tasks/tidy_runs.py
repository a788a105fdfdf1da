"""Deletes runs that training workers keep for jobs that have ended.

What comes in: what each worker says it has, in memory and on disk. What goes out: the deletion of
runs whose fine-tune job is over, and of those that were removed. A job's handler does the same at
its end; this is for the times when the worker did not answer then, or the gateway was lost just
before. Runs that nothing here knows are left alone: they are someone else's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import select

from app.db.engine import Database
from app.db.job_tables import JobRow, TrainingRunRow
from app.domain import JobKind, JobStatus, Trainer
from app.errors import TrainerError
from app.training.run import ConnectTrainer

PERIOD_S = 60.0
_BATCH = 500


class TidyRuns:
    """Compares workers' runs with the queue."""

    def __init__(
        self, db: Database, trainers: Mapping[str, Trainer], connect: ConnectTrainer
    ) -> None:
        self._db = db
        self._trainers = trainers
        self._connect = connect

    async def activate(self) -> dict[str, object]:
        """Delete what is left over on every worker that answers."""
        deleted: list[str] = []
        away: list[str] = []
        for trainer in self._trainers.values():
            try:
                deleted += await self._tidy(trainer)
            except TrainerError:
                away.append(trainer.name)
        return {"trainers": len(self._trainers), "away": away, "deleted": deleted}

    async def _tidy(self, trainer: Trainer) -> list[str]:
        async with self._connect(trainer) as host:
            info = await host.info()
            ended = await self._ended([run.run for run in info.runs])
            for run_id in ended:
                await host.run(run_id).delete()
        return ended

    async def _ended(self, run_ids: Sequence[str]) -> list[str]:
        found: list[str] = []
        terminal = [status.value for status in JobStatus if status.terminal]
        for at in range(0, len(run_ids), _BATCH):
            query = select(JobRow.id).where(
                JobRow.id.in_(run_ids[at : at + _BATCH]),
                JobRow.kind == JobKind.FINE_TUNE.value,
                JobRow.status.in_(terminal),
            )
            removed = select(TrainingRunRow.id).where(
                TrainingRunRow.id.in_(run_ids[at : at + _BATCH]),
                TrainingRunRow.removed_at.is_not(None),
            )
            async with self._db.read() as session:
                found += await session.scalars(query.order_by(JobRow.number))
                found += await session.scalars(removed.order_by(TrainingRunRow.id))
        return found
