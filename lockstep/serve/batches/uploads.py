"""Files of clients: what is uploaded for a batch, and what batches put out, within bounds for each tenant."""

import asyncio
import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lockstep.new_files import new_file
from lockstep.serve.batches.records import CONTENT, Records, new_name
from lockstep.serve.errors import ApiError
from lockstep.serve.limits import Limits

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_NAME = 255


class Uploads:
    """The files of all tenants."""

    def __init__(self, records: Records, limits: Limits) -> None:
        self._records, self._limits, self._num_running = records, limits, 0

    @contextlib.contextmanager
    def taking(self, tenant: str, num_bytes: int) -> Iterator[None]:
        """A context in which a tenant sends a file. num_bytes: of the request, as far as it says. ApiError 507 where
        the tenant's files are too many already, 429 where too many are being sent."""
        self.check_space(tenant, num_bytes)
        if self._num_running >= self._limits.max_uploads:
            raise ApiError(429, f"{self._num_running} files are being sent", code="uploads_busy", retry_after=1)
        self._num_running += 1
        try:
            with full_as_507():
                yield
        finally:
            self._num_running -= 1

    def check_space(self, tenant: str, num_bytes: int) -> None:
        """ApiError 507 where a tenant's files would be too many, or too large together, with one more."""
        files = self._records.of_tenant(tenant, "file")
        if len(files) >= self._limits.max_files:
            problem = f"there are {len(files)} files, and no more are kept: delete some"
            raise ApiError(507, problem, code="files_full")
        used, most = sum(file["bytes"] for file in files), self._limits.max_files_bytes
        if used + num_bytes > most:
            problem = f"the files have {used} bytes of at most {most}, which leaves no room for this one: delete some"
            raise ApiError(507, problem, code="files_full")

    async def add(self, tenant: str, name: str, file: IO[bytes]) -> dict[str, Any]:
        """Keeps a file for a batch; returns its object. ApiError 413 or 507."""
        size = file.seek(0, os.SEEK_END)
        if size > self._limits.max_file_bytes:
            limit = self._limits.max_file_bytes
            raise ApiError(413, f"the file is larger than {limit} bytes", "file", "file_too_large")
        self.check_space(tenant, size)
        file.seek(0)
        made = new_name("file-")
        await asyncio.to_thread(self._copy, file, self.path(made))
        return self.tell(tenant, made, name[:MAX_NAME], "batch")

    def _copy(self, source: IO[bytes], goal: Path) -> None:
        with new_file(goal) as file:
            shutil.copyfileobj(source, file, 1 << 20)

    def tell(self, tenant: str, name: str, filename: str, purpose: str) -> dict[str, Any]:
        """Makes the record of a file that is written; returns its object."""
        size, now = self.path(name).stat().st_size, int(time.time())
        kind = dict(id=name, object="file", bytes=size, created_at=now, expires_at=None)
        value = kind | dict(filename=filename, purpose=purpose, status="processed", status_details=None)
        self._records.keep(name, tenant, value)
        return value

    def path(self, name: str) -> Path:
        """The place of a file's content."""
        return self._records.path(name, CONTENT)


@contextlib.contextmanager
def full_as_507() -> Iterator[None]:
    """A context in which a full disk is ApiError 507."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ApiError(507, "the server's disk is full", code="disk_full") from None
