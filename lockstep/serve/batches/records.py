"""What a server keeps of its clients' files and batches: a folder, in which each has a record, a small JSON file.

A record belongs to a tenant (the API key that made it), and others do not see it. It is written whole or not at all,
after what it speaks of; so what has no record was left by a process that was killed, and is removed at the next start.
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lockstep.new_files import MAKING, new_file, process_folder, take_lock
from lockstep.serve.errors import ApiError

RECORD, CONTENT, JOURNAL = ".json", ".jsonl", ".partial"
IDS = re.compile(r"(?:file-|batch_)[0-9a-f]{24,25}")
LOCK = "lock"


class Records:
    """The records of a folder, by id. folder: None for one of this process, which is removed at its end.

    ValueError where another server has the folder, OSError where it cannot be used.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._all: dict[str, dict[str, Any]] = {}
        self._handle: int | None = None
        if self._folder is not None:
            if self._folder.exists() and not self._folder.is_dir():
                raise ValueError(f"{self._folder}: expected a folder to keep files in, this is a file")
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock(self._folder)
            self._read(self._folder)

    def _lock(self, folder: Path) -> None:
        self._handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if take_lock(self._handle) is False:
            self.close()
            raise ValueError(f"{folder}: another server keeps its files there")

    def _read(self, folder: Path) -> None:
        for path in folder.glob(f"*{RECORD}"):
            with contextlib.suppress(ValueError):
                record = json.loads(path.read_bytes())
                if IDS.fullmatch(path.stem) and is_record(record):
                    self._all[path.stem] = record
        self._all = dict(sorted(self._all.items(), key=lambda item: item[1]["value"]["created_at"]))
        for path in folder.iterdir():
            is_left = path.suffix in (CONTENT, JOURNAL) and IDS.fullmatch(path.stem) and path.stem not in self._all
            if is_left or path.name.startswith(MAKING):
                path.unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        """The folder. One of this process is made when it is first needed."""
        if self._folder is None:
            self._folder = process_folder()
        return self._folder

    def path(self, name: str, suffix: str) -> Path:
        """The place of what a record speaks of: CONTENT or JOURNAL."""
        return self.folder / f"{name}{suffix}"

    def close(self) -> None:
        """Gives the folder back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def keep(self, name: str, tenant: str, value: dict[str, Any]) -> None:
        """Keeps a record of a tenant; value: the object as clients see it. OSError."""
        record = dict(tenant=tenant, value=value)
        with new_file(self.path(name, RECORD)) as file:
            file.write(json.dumps(record).encode())
        self._all[name] = record

    def remove(self, name: str) -> None:
        """Removes a record and what it speaks of."""
        self._all.pop(name, None)
        for suffix in (RECORD, CONTENT, JOURNAL):
            self.path(name, suffix).unlink(missing_ok=True)

    def get(self, name: str, tenant: str, kind: str) -> dict[str, Any]:
        """The object of a tenant's record. ApiError 404."""
        record = self._all.get(name)
        if record is None or record["tenant"] != tenant or record["value"]["object"] != kind:
            raise ApiError(404, f"there is no {kind} {name[:100]!r}", code=f"{kind}_not_found")
        return record["value"]

    def of_tenant(self, tenant: str, kind: str) -> list[dict[str, Any]]:
        """A tenant's objects of a kind, the newest first."""
        return [value for owner, value in self.of_all(kind) if owner == tenant][::-1]

    def of_all(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (tenant, object) of all objects of a kind, the oldest first."""
        for record in list(self._all.values()):
            if record["value"]["object"] == kind:
                yield record["tenant"], record["value"]


def is_record(value: Any) -> bool:
    """Whether a JSON value has the form of a record."""
    inner = value.get("value") if isinstance(value, dict) else None
    return isinstance(inner, dict) and {"id", "object", "created_at"} <= set(inner) and "tenant" in value


def new_name(prefix: str) -> str:
    """A new random id: "file-..." or "batch_..."."""
    return f"{prefix}{secrets.token_hex(12)}"


def listed(objects: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A page of objects as OpenAI's list. after: the id of the last object of the page before. ApiError 400 where there
    is none of that id."""
    first = 0
    if after is not None:
        places = [place for place, value in enumerate(objects, 1) if value["id"] == after]
        if not places:
            raise ApiError(400, f"after: there is no {after[:100]!r}", "after", "invalid_value")
        first = places[0]
    page = objects[first : first + limit]
    ends = dict(first_id=page[0]["id"], last_id=page[-1]["id"]) if page else dict(first_id=None, last_id=None)
    return dict(object="list", data=page, **ends, has_more=first + limit < len(objects))
