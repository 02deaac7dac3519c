"""Where a server's receipts are made, kept and verified."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.engine.request import Request, SamplingParams
from lockstep.receipts.identity import ModelPart, model_part
from lockstep.receipts.keys import SigningKey
from lockstep.receipts.receipt import Receipt, ReceiptOptions, make_receipt
from lockstep.receipts.verify import Verifier

if TYPE_CHECKING:
    from lockstep.serve.service import Service

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
        if self.path is not None:
            with open(self.path, "ab"):
                pass

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
            return self._verifier

    def keep(self, lines: bytes) -> None:
        """Adds receipts to the file, all at once: a server that is killed leaves whole lines."""
        assert self.path is not None, "receipts are kept where there is a file"
        with self._file_lock, open(self.path, "ab", buffering=0) as file:
            file.write(lines)


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
        made = self.make(number, request, prompts)
        salt = {} if made.salt is None else dict(receipt_salt=made.salt.hex())
        return dict(receipt=made.envelope.to_object(), **salt)

    def keep(self, requests: Sequence[Request], prompts: Prompts) -> None:
        """Adds the receipts of all sequences to the desk's file, if it keeps them."""
        if self._desk.keeps_all:
            made = [self.make(number, request, prompts) for number, request in enumerate(requests)]
            self._desk.keep(b"".join(each.to_bytes() + b"\n" for each in made))
