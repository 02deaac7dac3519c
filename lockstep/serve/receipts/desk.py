"""Where a server's receipts are made, kept and verified."""

import errno
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.engine.request import Request, SamplingParams
from lockstep.receipts.identity import ModelPart, model_part
from lockstep.receipts.keys import SigningKey
from lockstep.receipts.masks import SERVER_SECONDS
from lockstep.receipts.receipt import Receipt, ReceiptOptions, make_receipt
from lockstep.receipts.verify import Verifier
from lockstep.serve.errors import ApiError

if TYPE_CHECKING:
    from lockstep.serve.service import Service

PRIVATE_FILE = 0o600
Prompts = Sequence[tuple[list[int], SamplingParams]]


class ReceiptDesk:
    """Makes receipts of a server's answers, and verifies receipts.

    key: signs them; None: they are unsigned. path: a file to which the receipt of every answer is added, a line each;
    None: receipts are made where they are asked for. OSError for a file that cannot be written.
    """

    def __init__(self, service: "Service", key: SigningKey | None = None, path: str | None = None) -> None:
        self._service, self.key, self.path = service, key, None if path is None else Path(path)
        self._lock, self._file_lock = threading.Lock(), threading.Lock()
        self._model: ModelPart | None = None
        self._verifier: Verifier | None = None
        self.workers = ThreadPoolExecutor(1, "lockstep verifier")  # grammars of receipts delay no other request
        if self.path is not None:
            _add(self.path, b"\n" if _is_torn(self.path) else b"")

    @property
    def keeps_all(self) -> bool:
        """Whether every answer has a receipt, asked for or not."""
        return self.path is not None

    @property
    def knows_model(self) -> bool:
        """Whether `model` returns at once."""
        return self._model is not None

    def model(self) -> ModelPart:
        """The model that receipts name. The first call waits for its content hash, and may take a second."""
        with self._lock:
            if self._model is None:
                self._model = model_part(self._service.loaded, self._service.model_name)
            return self._model

    def verifier(self) -> Verifier:
        """What verifies receipts; the first call may take a second."""
        model = self.model()
        with self._lock:
            if self._verifier is None:
                chat = self._service.chat
                grammars = None if chat is None else chat.grammars
                self._verifier = Verifier(model, self._service.loaded.engine, lambda: grammars)
                self._verifier.mask_seconds = SERVER_SECONDS
            return self._verifier

    def close(self) -> None:
        """Ends its worker. One that works is not waited for."""
        self.workers.shutdown(wait=False, cancel_futures=True)

    def keep(self, lines: bytes) -> None:
        """Adds receipts to the file, all at once: a server that is killed leaves whole lines. ApiError 500 where they
        cannot be written: there is no answer then whose receipt is not there."""
        assert self.path is not None, "receipts are kept where there is a file"
        try:
            with self._file_lock:
                _add(self.path, lines)
        except OSError as error:
            problem = f"the receipt of this answer cannot be kept: {error.strerror}"
            raise ApiError(500, problem, code="receipt_not_kept") from error


def _add(path: Path, lines: bytes) -> None:
    """Adds lines to a file: all of them, or OSError and none. A new file is its owner's alone, as it has the prompts
    and answers of all clients."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        size = os.fstat(handle).st_size
        if os.write(handle, lines) < len(lines):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


def _is_torn(path: Path) -> bool:
    """Whether a file ends within a line, as a machine that stopped may leave it."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


class Receipts:
    """The receipts of one request's answers. options: what was asked for; None: nothing, they are only kept."""

    def __init__(self, desk: ReceiptDesk, options: ReceiptOptions | None, endpoint: str) -> None:
        self._desk, self.options = desk, options
        self._chosen = options or ReceiptOptions(endpoint=endpoint, key=desk.key)
        self._made: dict[int, Receipt] = {}

    def make(self, number: int, request: Request, prompts: Prompts) -> Receipt:
        """The receipt of sequence `number`, made once. prompts: of the request, as they were submitted."""
        if number not in self._made:
            first = 0
            for _, params in prompts:
                if number < first + params.n:
                    self._made[number] = make_receipt(self._desk.model(), request, params, number - first, self._chosen)
                    break
                first += params.n
        return self._made[number]

    def fields(self, number: int, request: Request, prompts: Prompts) -> dict[str, Any]:
        """The fields of an answer that have its receipt; none where it was not asked for."""
        if self.options is None:
            return {}
        return self.make(number, request, prompts).to_fields()

    def keep(self, requests: Sequence[Request], prompts: Prompts) -> None:
        """Adds the receipts of all sequences to the desk's file, if it keeps them."""
        if self._desk.keeps_all:
            made = [self.make(number, request, prompts) for number, request in enumerate(requests)]
            self._desk.keep(b"".join(each.to_bytes() + b"\n" for each in made))
