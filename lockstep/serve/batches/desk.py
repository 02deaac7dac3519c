"""The batches of a server: they run one after another for each tenant, in what room live requests leave."""

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from lockstep.batch.journal import Journal
from lockstep.batch.work import Counts, Work, count_lines
from lockstep.new_files import new_file
from lockstep.serve.batches.asking import Asking, NoAnswers
from lockstep.serve.batches.line_reader import LineReader, identity_of, most_line_bytes
from lockstep.serve.batches.records import JOURNAL, Records, new_name
from lockstep.serve.batches.unasked import unasked
from lockstep.serve.batches.uploads import Uploads, full_as_507
from lockstep.serve.errors import ApiError
from lockstep.serve.generation import PRIORITY_KEY
from lockstep.serve.service import Service

LOOK_SECONDS = 0.05
SPARED_PART = 4  # of the sequences that the engine runs at once
TROUBLE_SECONDS = 10.0  # before an engine that does not work is asked again
WINDOW_SECONDS = 24 * 3600
UNDER_WAY = ("validating", "in_progress", "finalizing", "cancelling")
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
log = logging.getLogger("lockstep.batches")


class BatchDesk:
    """Runs the batches of a server, from `start` on. app: answers lines, see `app.inner_app`. folder: where files are
    kept, and batches go on after the server's end; None: for this process."""

    def __init__(self, service: Service, app: ASGIApp, folder: str | None = None) -> None:
        self._service, self._app = service, app
        self.records = Records(folder)
        self.uploads = Uploads(self.records, service.limits)
        self._workers: dict[str, asyncio.Task[None]] = {}

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Lets batches that an earlier server has left go on."""
        for tenant, value in self.records.of_all("batch"):
            if value["status"] in UNDER_WAY:
                self._wake(tenant)

    async def stop(self) -> None:
        """Ends the work; batches stay as they are."""
        for worker in self._workers.values():
            worker.cancel()
        await asyncio.gather(*self._workers.values(), return_exceptions=True)
        self.records.close()

    def _wake(self, tenant: str) -> None:
        worker = self._workers.get(tenant)
        if worker is None or worker.done():
            self._workers[tenant] = asyncio.create_task(self._work(tenant))

    # ------------------------------------------------------------ what clients ask for

    def create(self, tenant: str, input_file_id: str, options: dict[str, Any]) -> dict[str, Any]:
        """A new batch of a tenant's file; returns its object. ApiError 404, 429 or 507."""
        self.records.get(input_file_id, tenant, "file")
        self._make_room(tenant)
        now = int(time.time())
        name = new_name("batch_")
        value: dict[str, Any] = dict(id=name, object="batch", errors=None, input_file_id=input_file_id, **options)
        value |= dict(status="validating", output_file_id=None, error_file_id=None, created_at=now)
        value |= dict(expires_at=now + WINDOW_SECONDS, **{f"{name}_at": None for name in TIMES})
        value["request_counts"] = dict(total=0, completed=0, failed=0)
        with full_as_507():
            self.records.keep(name, tenant, value)
        self._wake(tenant)
        return value

    def _make_room(self, tenant: str) -> None:
        """Forgets a tenant's oldest batch that has ended where there are too many. ApiError 429 if none has ended."""
        batches = self.records.of_tenant(tenant, "batch")
        if len(batches) < self._service.limits.max_batches:
            return
        ended = [value["id"] for value in batches if value["status"] not in UNDER_WAY]
        if not ended:
            raise ApiError(429, f"{len(batches)} batches wait or are under way", code="batches_full", retry_after=60)
        self.records.remove(ended[-1])

    def cancel(self, name: str, tenant: str) -> dict[str, Any]:
        """Cancels a batch; returns its object. ApiError 404, 409 for one that has ended."""
        value = self.records.get(name, tenant, "batch")
        if value["status"] not in UNDER_WAY:
            raise ApiError(409, f"the batch {name} is {value['status']}, and cannot be cancelled", code="batch_ended")
        if value["status"] != "cancelling":
            self._enter(tenant, value, "cancelling")
        return value

    def delete_file(self, name: str, tenant: str) -> dict[str, Any]:
        """Deletes a tenant's file. ApiError 404, 409 for one that a batch needs."""
        self.records.get(name, tenant, "file")
        for value in self.records.of_tenant(tenant, "batch"):
            if value["input_file_id"] == name and value["status"] in UNDER_WAY:
                raise ApiError(409, f"the batch {value['id']} needs this file", code="file_in_use")
        self.records.remove(name)
        return dict(id=name, object="file", deleted=True)

    # ------------------------------------------------------------ the work

    async def _work(self, tenant: str) -> None:
        """Runs a tenant's batches, the oldest first, until none is left."""
        while waiting := [each for each in self.records.of_tenant(tenant, "batch") if each["status"] in UNDER_WAY]:
            value = waiting[-1]
            try:
                with full_as_507():
                    await self._run(tenant, value)
            except NoAnswers:
                if self._service.state != "ready":
                    return  # the next server goes on
                await asyncio.sleep(TROUBLE_SECONDS)
            except Exception as error:
                self._failed(tenant, value, error)

    async def _run(self, tenant: str, value: dict[str, Any]) -> None:
        while not self._can_begin and self._end_of(value) is None:
            await asyncio.sleep(LOOK_SECONDS)
        if not self._can_begin:  # it never began
            return self._enter(tenant, value, self._end_of(value) or "failed")
        source, limits = self.uploads.path(value["input_file_id"]), self._service.limits
        total, _ = await asyncio.to_thread(count_lines, source, most_line_bytes(limits), ())
        if not total:
            raise ApiError(400, "the input has no lines", code="empty_file")
        if value["status"] in ("validating", "finalizing"):
            self._enter(tenant, value, "in_progress")
        identity = identity_of(self._service)
        reader = lambda: LineReader(identity, limits, value["endpoint"])
        with contextlib.closing(Journal(self.records.path(value["id"], JOURNAL))) as journal:
            journal.tell(identity=identity.hex())
            work = Work(source, most_line_bytes(limits), reader, journal)
            work.counts.total = total
            await self._finish(tenant, value, work, await self._ask(tenant, value, work))
            journal.remove()

    @property
    def _can_begin(self) -> bool:
        return self._service.state == "ready" and self._service.fingerprint is not None

    def _end_of(self, value: dict[str, Any]) -> str | None:
        """The status with which a batch has to end before its lines are all answered; None: it may go on."""
        if value["status"] == "cancelling":
            return "cancelled"
        return "expired" if time.time() > value["expires_at"] else None

    async def _ask(self, tenant: str, value: dict[str, Any], work: Work) -> str:
        """Asks the lines of a batch; returns the status with which it ends. NoAnswers where the server ends."""
        asking = Asking(self._app, self._service, tenant, lambda: self._has_room(0))
        task = asyncio.create_task(work.ask(asking, self._has_room, lambda: count(value, work.counts)))
        try:
            while not task.done():
                await asyncio.wait([task], timeout=LOOK_SECONDS)
                if self._must_make_room:
                    asking.make_room()
                if self._service.state != "ready":
                    raise NoAnswers("the server ends")
                if not task.done() and (end := self._end_of(value)) is not None:
                    return end
            task.result()
            return "completed"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _has_room(self, num_running: int) -> bool:
        """Whether one more line may be asked: there are sequences that no request needs."""
        service = self._service
        room = service.loaded.max_requests - self._num_spared
        return service.state == "ready" and max(service.num_sequences, num_running) < room

    @property
    def _num_spared(self) -> int:
        """Sequences that batches leave to others, so that one who asks need not wait."""
        return self._service.loaded.max_requests // SPARED_PART

    @property
    def _must_make_room(self) -> bool:
        """Whether requests of others wait."""
        service = self._service
        has_others = any(not each.scope.get(PRIORITY_KEY) for each in service.generations)
        return has_others and service.num_sequences > service.loaded.max_requests

    # ------------------------------------------------------------ its end

    async def _finish(self, tenant: str, value: dict[str, Any], work: Work, end: str) -> None:
        """Writes the files of a batch that ends: answers in one, errors in the other."""
        if end == "completed":
            self._enter(tenant, value, "finalizing")
        letters = value["id"].removeprefix("batch_")
        names = [f"file-{letters}{letter}" for letter in "ae"]
        paths = [self.uploads.path(name) for name in names]
        counts = await asyncio.to_thread(write, work, paths, end)
        count(value, counts)
        for field, name, path in zip(("output", "error"), names, paths, strict=True):
            if path.stat().st_size:
                self.uploads.tell(tenant, name, f"{value['id']}_{field}.jsonl", "batch_output")
                value[f"{field}_file_id"] = name
            else:
                path.unlink()
        self._enter(tenant, value, end)

    def _failed(self, tenant: str, value: dict[str, Any], error: Exception) -> None:
        """Ends a batch that cannot go on."""
        if not isinstance(error, ApiError):
            log.error("the batch %s failed", value["id"], exc_info=error)
        reason = error if isinstance(error, ApiError) else self._service.explain(error)
        data = [dict(code=reason.code, message=reason.message, param=reason.param, line=None)]
        value["errors"] = dict(object="list", data=data)
        value.update(status="failed", failed_at=int(time.time()))  # also where the disk is full
        with contextlib.suppress(OSError):
            self.records.keep(value["id"], tenant, value)

    def _enter(self, tenant: str, value: dict[str, Any], status: str) -> None:
        """Notes that a batch has come to a status."""
        value.update({"status": status, f"{status}_at": int(time.time())})
        with full_as_507():
            self.records.keep(value["id"], tenant, value)
        log.info("batch %s %s %s", value["id"], status, value["request_counts"])


def count(value: dict[str, Any], counts: Counts) -> None:
    """Puts counts into the object of a batch."""
    completed = counts.done - counts.failed
    value["request_counts"] = dict(total=counts.total, completed=completed, failed=counts.failed)


def write(work: Work, paths: list[Path], end: str) -> Counts:
    """Writes the answers of a batch and its errors. Lines that were not asked are errors that name its end."""
    with full_as_507(), new_file(paths[0]) as answers, new_file(paths[1]) as errors:
        return work.write(answers, errors, None if end == "completed" else unasked(end))
