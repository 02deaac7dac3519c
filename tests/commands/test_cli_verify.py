"""`lockstep verify`, `generate --receipt`, `receipt key` and `receipt batch` on the command line."""

import base64
import contextlib
import io
import json
import stat

import pytest

from lockstep.cli import main

ASK = ["generate", "-p", "import os\n", "-n", "12", "--temperature", "0.8", "--seed", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a key, a receipt of an answer, and a detached one of another with its answer."""
    made = tmp_path_factory.mktemp("receipts")
    assert main(["receipt", "key", str(made / "key")]) == 0
    assert main([*ASK, "--receipt", str(made / "signed"), "--receipt-key", str(made / "key"), "--nonce", "n"]) == 0
    return made


def verify(capsys, *args):
    """(exit code, what standard output says, what standard error says) of a verification."""
    capsys.readouterr()
    code = main(["verify", *map(str, args), "--threads", "1"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_what_is_said_of_a_receipt_has_a_line_of_its_own(folder):
    both = io.StringIO()
    with contextlib.redirect_stdout(both), contextlib.redirect_stderr(both):
        assert main([*ASK, "--receipt", str(folder / "another")]) == 0
    assert "\nlockstep: receipt " in both.getvalue()


def test_a_true_receipt(folder, capsys):
    code, out, _ = verify(capsys, folder / "signed", "--key", folder / "key.pub")
    words = "true: 12 tokens after a prompt of 3, temperature 0.8, seed 3, ended by length; signed by key "
    assert code == 0 and out.startswith(words)
    code, out, _ = verify(capsys, folder / "signed")
    assert code == 0 and "which was not checked (--key)" in out
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600


def changed(folder, name, **fields):
    """A file with the receipt of `folder`, whose answer says something else."""
    envelope = json.loads((folder / "signed").read_text())
    payload = json.loads(base64.b64decode(envelope["payload"]))
    payload["answer"] |= fields
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (folder / name).write_text(json.dumps(envelope))
    return folder / name


def with_payload(folder, name, payload):
    """A file with the envelope of the receipt of `folder`, whose payload is another."""
    envelope = json.loads((folder / "signed").read_text()) | dict(payload=base64.b64encode(payload).decode())
    (folder / name).write_text(json.dumps(envelope))
    return folder / name


@pytest.mark.parametrize("command", ["verify", "receipt show"])
def test_a_damaged_payload_is_named_with_its_file(command, folder, capsys):
    path = with_payload(folder, "damaged", b"\xff\xfe" if command == "verify" else b"damaged")
    capsys.readouterr()
    assert main([*command.split(), str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lockstep: {path}: the payload in the envelope: expected JSON")


def test_a_damaged_batch_is_named_with_its_file(folder, capsys):
    path = with_payload(folder, "damaged batch", b"{")
    path.write_text(path.read_text().replace("receipt+json", "receipt-batch+json"))
    code, _, err = verify(capsys, path, "--receipts", folder / "signed")
    assert code == 2 and err.startswith(f"lockstep: {path}: the payload in the envelope: expected JSON: ")


def test_a_log_is_no_receipt(folder, capsys):
    (folder / "log").write_text("INFO: started\n" + "INFO: {[(\n" * 40)
    code, _, err = verify(capsys, folder / "log")
    assert (
        code == 2 and err == f"lockstep: {folder / 'log'}: expected JSON: Expecting value: line 1 column 1 (char 0)\n"
    )


def test_false_receipts(folder, capsys):
    code, out, _ = verify(capsys, changed(folder, "a", root="0" * 64))
    assert code == 1 and out.startswith(
        "false: the tokens are the model's, but a log-probability or hidden state is not"
    )
    code, out, _ = verify(capsys, folder / "a", "--key", folder / "key.pub")
    assert code == 1 and out.startswith("false: the receipt is not signed by key ")
    code, out, _ = verify(capsys, changed(folder, "b", finish_reason="stop"))
    assert code == 1 and "ended by 'stop', its tokens say 'length'" in out
    statement = dict(json.loads(base64.b64decode(json.loads((folder / "signed").read_text())["payload"])))
    statement["sampling"]["max_tokens"] += 1
    code, out, _ = verify(capsys, with_payload(folder, "c", json.dumps(statement).encode()))
    assert code == 1 and "ended by 'length', its tokens say that nothing ends it\n" in out
    request = folder / "request.json"
    request.write_text(json.dumps(dict(prompt="import os\n", max_tokens=12, temperature=0.8, seed=4)))
    code, out, _ = verify(capsys, folder / "signed", "--request", request)
    assert code == 1 and out == 'false: the request has no nonce, the receipt the nonce "n"\n'
    body = dict(prompt="import os\n", max_tokens=12, temperature=0.8, seed=4, receipt=dict(nonce="n"))
    request.write_text(json.dumps(body))
    code, out, _ = verify(capsys, folder / "signed", "--request", request)
    assert code == 1 and out == "false: the request has seed 4, the receipt 3\n"
    request.write_text(json.dumps(body | dict(seed=3)))
    assert verify(capsys, folder / "signed", "--request", request)[0] == 0


def test_a_detached_receipt_needs_the_request_and_the_answer(folder, capsys):
    receipt, answer, request = folder / "detached", folder / "answer.json", folder / "asked.json"
    capsys.readouterr()
    options = ["--receipt-detached", "--receipt-hide-prompt", "--receipt-tags", "--json"]
    assert main([*ASK, *options, "--receipt", str(receipt)]) == 0
    said = capsys.readouterr()
    answer.write_text(said.out)
    salt = json.loads(said.out)["receipt_salt"]
    assert f"the prompt's salt, for whoever may verify it: {salt}" in said.err
    assert verify(capsys, answer)[0] == 0  # it has the salt and all tokens beside the receipt
    request.write_text(json.dumps(dict(prompt="import os\n", max_tokens=12, temperature=0.8, seed=3)))
    code, out, _ = verify(capsys, receipt)
    assert code == 2 and out.startswith("not checked: the receipt leaves out the prompt")
    known = [receipt, "--request", request, "--answer", answer]
    assert verify(capsys, *known, "--salt", salt)[0] == 0
    assert verify(capsys, *known, "--salt", "0" * 64)[0] == 1
    assert verify(capsys, *known)[0] == 2


def test_a_batch_signs_many(folder, capsys):
    receipts, batch = folder / "all.jsonl", folder / "batch"
    receipts.write_text((folder / "signed").read_text() * 3)
    assert main(["receipt", "batch", str(receipts), str(batch), "--receipt-key", str(folder / "key")]) == 0
    code, out, _ = verify(capsys, batch, "--receipts", receipts, "--key", folder / "key.pub")
    assert code == 0 and out.startswith("true: the batch of 3 receipts; signed by key ") and out.count("true:") == 4
    receipts.write_text((folder / "signed").read_text() * 2)
    code, out, _ = verify(capsys, batch, "--receipts", receipts)
    assert code == 1 and "false: the batch is of 3 receipts, the file has 2" in out
    code, _, err = verify(capsys, batch)
    assert code == 2 and "this is a batch of 3 receipts: expected --receipts FILE, too" in err


@pytest.mark.parametrize("text, said", [
    ("", "expected a receipt, or an answer with one, got an empty text"),
    (" \n\n", "got an empty text"),
    ("{}", "expected a receipt, or an answer with one, got an object with nothing"),
    ('{"choices":[{"text":"a"}]}', "got an object with choices"),
    ("[1.5]", "expected an object"),
    ('{"payloadType":"x","payload":"","signatures":[]}', "envelope.payloadType"),
])  # fmt: skip
def test_what_is_no_receipt(text, said, tmp_path, capsys):
    (tmp_path / "file").write_text(text)
    code, out, err = verify(capsys, tmp_path / "file")
    assert code == 2 and not out and f"lockstep: {tmp_path / 'file'}: " in err and said in err


def test_options_that_are_refused(folder, tmp_path, capsys):
    assert main([*ASK, "--receipt", str(tmp_path / "no" / "file")]) == 2
    assert main([*ASK, "--receipt", str(tmp_path / "file"), "--receipt-key", str(tmp_path / "none")]) == 2
    assert main([*ASK, "--receipt", str(tmp_path / "file"), "--nonce", "\n"]) == 2
    assert main(["receipt", "key", str(folder / "key")]) == 2
    said = capsys.readouterr().err
    for words in ("No such file", "the key cannot be read", "printable ASCII", "expected a new file for the key"):
        assert words.lower() in said.lower()
    assert main([*ASK, "--receipt", "-"]) == 2 and "--receipt -: expected a file" in capsys.readouterr().err
    code, _, err = verify(capsys, folder / "signed", "--salt", "5")
    assert code == 2 and "salt: expected 64 hexadecimal digits, got '5'" in err
    assert main([*ASK, "--receipt-tags"]) == 0
    assert "--receipt-tags has no effect without --receipt" in capsys.readouterr().err


def answer_of(folder, *choices):
    """A file with an API's answer."""
    receipt = json.loads((folder / "signed").read_text())
    made = [choice | (dict(receipt=receipt) if choice.pop("has", True) else {}) for choice in choices]
    (folder / "api.json").write_text(json.dumps(dict(choices=made, created=1.5)))
    return folder / "api.json"


def test_an_answer_around_a_receipt(folder, capsys):
    capsys.readouterr()
    assert main([*ASK, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    for shown, code in ((text, 0), (f"import os\n{text}", 0), (f"FORGED {text}", 1), (f"{text} FORGED", 1)):
        assert verify(capsys, answer_of(folder, dict(text=shown)))[0] == code
    code, out, _ = verify(capsys, answer_of(folder, dict(message=dict(content="?"))))
    assert code == 0 and "the text around it was not compared with its tokens" in out
    code, _, err = verify(capsys, answer_of(folder, dict(text=text), dict(text="FORGED", has=False)))
    assert code == 2 and "choice 1 has no receipt, others have one" in err


def test_a_receipt_prints_no_lines_of_its_own(folder, capsys):
    envelope = json.loads((folder / "signed").read_text())
    envelope["signatures"][0]["keyid"] = "x\x1b[2K\ntrue: all"
    (folder / "lines").write_text(json.dumps(envelope))
    code, out, _ = verify(capsys, folder / "lines")
    assert code == 0 and "\x1b" not in out and out.count("\n") == 1


def test_a_batch_is_alone_in_its_file(folder, capsys):
    receipts, mixed = folder / "one.jsonl", folder / "mixed"
    receipts.write_text((folder / "signed").read_text())
    assert main(["receipt", "batch", str(receipts), str(mixed)]) == 0
    mixed.write_text(mixed.read_text() + receipts.read_text())
    code, _, err = verify(capsys, mixed, "--receipts", receipts)
    assert code == 2 and "expected a batch alone in its file, got 2 envelopes" in err


def test_a_context_that_cuts_an_answer_is_told(folder, capsys):
    envelope = json.loads((folder / "signed").read_text())
    payload = json.loads(base64.b64decode(envelope["payload"]))
    payload["model"]["context"] = payload["prompt"]["tokens"] + 12
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (folder / "cut").write_text(json.dumps(envelope))
    body = dict(prompt="import os\n", max_tokens=-1, temperature=0.8, seed=3, receipt=dict(nonce="n"))
    (folder / "body").write_text(json.dumps(body))
    code, out, _ = verify(capsys, folder / "cut", "--request", folder / "body")
    assert code == 2 and "who made it chose how many to use" in out


def test_options_that_belong_to_another_file_are_refused(folder, capsys):
    receipts, batch = folder / "two.jsonl", folder / "two.batch"
    receipts.write_text((folder / "signed").read_text() * 2)
    assert main(["receipt", "batch", str(receipts), str(batch)]) == 0
    for path, option, value, said in (
        (receipts, "--receipts", batch, "is no batch, which --receipts belongs to"),
        (folder / "signed", "--receipts", "/nonexistent", "is no batch, which --receipts belongs to"),
        (receipts, "--answer", folder / "signed", "--answer: expected a file with one receipt, got one with 2"),
        (receipts, "--salt", "00" * 32, "--salt: expected one for each of 2 receipts, got 1"),
    ):
        code, out, err = verify(capsys, path, option, value)
        assert code == 2 and not out and said in err
    (folder / "bodies").write_text("{}\n{}\n{}\n")
    code, _, err = verify(capsys, receipts, "--request", folder / "bodies")
    assert code == 2 and "--request: expected one request, or a line for each of 2 receipts, got 3 lines" in err


def test_many_receipts_have_line_numbers_and_a_summary(folder, capsys):
    signed, false = (folder / "signed").read_text(), changed(folder, "c", finish_reason="stop").read_text()
    (folder / "many").write_text(f"{signed}\n{false}\n{{\n{signed[:80]}{{}}\n{signed}")
    code, out, _ = verify(capsys, folder / "many")
    assert code == 1 and "line 1: true: 12 tokens" in out and "line 3: false: the receipt says" in out
    assert "line 4: not checked: expected JSON" in out and out.endswith("5 receipts: 2 true, 1 false, 2 not checked\n")
    body = dict(prompt="import os\n", max_tokens=12, temperature=0.8, seed=3, receipt=dict(nonce="n"))
    lines = [body, body | dict(seed=5)]
    (folder / "two").write_text(signed * 2)
    (folder / "bodies").write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = verify(capsys, folder / "two", "--request", folder / "bodies")
    assert code == 1 and "line 1: true" in out and "line 2: false: the request has seed 5, the receipt 3" in out


def test_one_receipt_of_a_batch(folder, capsys):
    receipts, batch, member = folder / "five.jsonl", folder / "five.batch", folder / "third"
    receipts.write_text((folder / "signed").read_text() * 2 + changed(folder, "d", root="0" * 64).read_text())
    assert main(["receipt", "batch", str(receipts), str(batch), "--receipt-key", str(folder / "key")]) == 0
    assert main(["receipt", "extract", str(batch), str(receipts), "2", str(member)]) == 0
    code, out, _ = verify(capsys, member, "--key", folder / "key.pub")
    assert code == 0 and "number 2 of a batch; signed by key" in out
    made = json.loads(member.read_text())
    other = json.loads(receipts.read_text().splitlines()[2])
    for change, said in (
        (dict(index=2), "false: the receipt is not the one at its place in the batch"),
        (dict(path=made["path"][::-1]), "not the one at its place"),
        (dict(receipt=other), "not the one at its place"),
        (dict(batch=made["batch"] | dict(signatures=[])), "false: the batch is not signed by key"),
    ):
        member.write_text(json.dumps(made | change))
        code, out, _ = verify(capsys, member, "--key", folder / "key.pub")
        assert code == 1 and said in out
    for change, said in ((dict(more=1), "member.more: expected no such field"), (dict(path=["0"]), "member.path")):
        member.write_text(json.dumps(made | change))
        code, _, err = verify(capsys, member)
        assert code == 2 and said in err
    assert main(["receipt", "extract", str(batch), str(receipts), "4", str(member)]) == 2
    assert main(["receipt", "extract", str(batch), str(folder / "signed"), "1", str(member)]) == 2


def test_no_command_overwrites_what_it_reads(folder, capsys):
    receipts, batch = folder / "kept.jsonl", folder / "kept.batch"
    receipts.write_text((folder / "signed").read_text() * 2)
    assert main(["receipt", "batch", str(receipts), str(batch)]) == 0
    assert main(["receipt", "batch", str(receipts), str(receipts)]) == 2
    assert main(["receipt", "extract", str(batch), str(receipts), "1", str(batch)]) == 2
    assert "expected another file" in capsys.readouterr().err
    assert receipts.read_text() == (folder / "signed").read_text() * 2 and "receipt-batch" in batch.read_text()


def test_a_receipt_is_shown(folder, capsys):
    capsys.readouterr()
    for options, ids in (([], "12 ids (--tokens)"), (["--tokens"], 12)):
        assert main(["receipt", "show", str(folder / "signed"), *options]) == 0
        shown = json.loads(capsys.readouterr().out)
        found = shown["payload"]["answer"]["ids"]
        assert found == ids if isinstance(ids, str) else len(found) == ids
    code, out, _ = verify(capsys, folder / "signed")
    assert code == 0 and out.endswith(f"; receipt {shown['digest'][:16]}\n") and len(shown["keyids"]) == 1


def test_names_of_the_model(folder, capsys):
    for model in (["--model", "bundled"], ["bundled"]):
        assert verify(capsys, folder / "signed", *model)[0] == 0
    code, _, err = verify(capsys, folder / "signed", "bundled", "--model", "other")
    assert code == 2 and "expected the model once" in err


def test_a_group_of_commands_alone_lists_them(capsys):
    for args in (["receipt"], ["receipt", "--help"], ["help", "receipt"]):
        main(args)
        out = capsys.readouterr().out
        assert "Usage: lockstep receipt [" in out and "\n  extract  " in out and "generate" not in out


@pytest.mark.parametrize("part, name, value, said", [
    ("", "numerics", 99, "not checked: the arithmetic is version 99"),
    ("model", "content", "0" * 64, "not checked: another model: the content of its files is 000000000000..."),
])  # fmt: skip
def test_another_arithmetic_and_another_model_load_none(part, name, value, said, folder, capsys, monkeypatch):
    envelope = json.loads((folder / "signed").read_text())
    payload = json.loads(base64.b64decode(envelope["payload"]))
    (payload[part] if part else payload)[name] = value
    payload["model"]["weights"] = "q4_0"  # in which it would be packed
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (folder / "later").write_text(json.dumps(envelope))
    monkeypatch.setattr("lockstep.commands.terminal.verification.loaded", None)
    code, out, _ = verify(capsys, folder / "later")
    assert code == 2 and out.startswith(said)


def test_a_nonce_draws_the_seed_as_over_http(folder, capsys):
    asked = ["generate", "-p", "import os\n", "-n", "9", "--temperature", "0.8", "--threads", "1", "--nonce", "once"]
    assert main([*asked, "--receipt", str(folder / "drawn")]) == 0
    body = dict(prompt="import os\n", max_tokens=9, temperature=0.8, receipt=dict(nonce="once"))
    (folder / "body").write_text(json.dumps(body))
    assert verify(capsys, folder / "drawn", "--request", folder / "body")[0] == 0
    assert main([*asked, "--receipt", str(folder / "given"), "--seed", "0"]) == 0
    assert verify(capsys, folder / "given", "--request", folder / "body")[0] == 1


def test_lines_of_a_batch_of_requests(folder, capsys):
    receipt = json.loads((folder / "signed").read_text())
    body = dict(object="text_completion", choices=[dict(index=0, finish_reason="length", receipt=receipt)])
    lines = [
        dict(id="1", custom_id="a", response=dict(status_code=200, body=body), error=None),
        dict(id="2", custom_id="b", response=dict(status_code=400, body=dict(error="no")), error=None),
    ]
    (folder / "output.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = verify(capsys, folder / "output.jsonl")
    assert code == 2 and "line 1: true" in out and "line 2: not checked: expected a receipt, or an answer" in out
