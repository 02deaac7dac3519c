"""Fuzz of model files and caches: a command must answer or say what is wrong, in bounded time and memory."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lockstep.new_files import scratch_folder
from lockstep.user_cache import user_cache
from tests.fuzz.bodies import damaged_bytes, damaged_value
from tests.fuzz.client import Fault
from tests.fuzz.templates import program
from tests.fuzz.watch import ROOT
from tests.models import tiny
from tests.models.cases import case
from tests.text.tokenizer.test_small_gguf import CHATML, chatml
from tests.text.tokenizer.test_small_gguf import write as write_gguf
from tests.text.vocabularies import byte_fallback, byte_level, words_metadata, write_folder
from tests.weights.fuzz import mutant

CONFIG = case("qwen3", head_dim=32, vocab_size=512, num_hidden_layers=2)
HEAD_BYTES = 30_000  # of a GGUF file, within which most of its metadata lies
# of one command, which may have to compile kernels of an op that no earlier model had
CPU_SECONDS, SECONDS, NUM_BYTES = 120, 300, 1536 << 20
MOST_BYTES = 1 << 30  # resident memory; the models have a few hundred kilobytes
ESCAPED = 70  # the same as in file_child.py
NO_MEMORY = "not enough memory"


class Files:
    """The fuzz of files. folder: an empty one, private to this user, for models and caches."""

    def __init__(self, folder: Path):
        self._cache, self._work = folder / "cache", folder / "work"
        self._cache.mkdir(mode=0o700)
        self._models = {"folder": _folder(folder / "folder"), "other folder": _other_folder(folder / "other")}
        for name, metadata in (("bytes.gguf", chatml()), ("words.gguf", words_metadata())):
            self._models[name] = write_gguf(folder / name, metadata)
        self._child = _child(user_cache())  # where kernels are compiled, so that the next run has them
        self._expected = {name: self._whole(path) for name, path in self._models.items()}
        self.close()
        shutil.copytree(user_cache() / "kernels", self._cache / "kernels")
        self._child = _child(self._cache)
        assert {name: self._whole(path) for name, path in self._models.items()} == self._expected

    def _whole(self, path: Path) -> str:
        """The answer of an undamaged model; also compiles its kernels and packs its weights."""
        found = self._run(["generate", str(path), "-p", "the cat", "-n", "3"])
        assert found["code"] == 0 and found["out"], found
        return found["out"]

    def play(self, rng: random.Random) -> str:
        """Runs a command on a damaged model or cache; returns the outcome. Raises Fault."""
        name = rng.choice(list(self._models))
        if rng.random() < 0.25:
            return self._play_cache(rng, name)
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        source, path = self._models[name], self._work / "model"
        if source.is_file():
            path = path.with_suffix(".gguf")
            path.write_bytes(mutant(source.read_bytes(), rng, rng.choice([None, 200, HEAD_BYTES, HEAD_BYTES])))
            return f"gguf {self._judge(self._run(self._command(rng, path), CACHE_OFF), path)}"
        shutil.copytree(source, path)
        damaged = rng.choice(sorted(path.iterdir()))
        damaged.write_bytes(damage_of(damaged.name)(rng, damaged.read_bytes()))
        return f"{damaged.name} {self._judge(self._run(self._command(rng, path), CACHE_OFF), path)}"

    def _command(self, rng: random.Random, path: Path) -> list[str]:
        return rng.choice(
            [
                ["generate", str(path), "-p", "the cat", "-n", "3"],
                ["chat", str(path), "-n", "3"],
                ["inspect", str(path)],
                ["parity", str(path), "--length", "20"] if rng.random() < 0.2 else ["inspect", str(path), "--json"],
            ]
        )

    def _play_cache(self, rng: random.Random, name: str) -> str:
        """Damages packed weights or the prefix cache on disk, which must change no answer."""
        files = [file for part in ("packed", "hashes") for file in (self._cache / part).rglob("*") if file.is_file()]
        for file in rng.sample(files, min(len(files), rng.choice([1, 3, 30]))):
            file.write_bytes(_cache_damage(rng, file.read_bytes()))
        found = self._run(["generate", str(self._models[name]), "-p", "the cat", "-n", "3"])
        outcome = self._judge(found, self._cache)
        if found["out"] != self._expected[name]:
            raise Fault(f"a damaged cache changed the answer: {found}", self._archive(self._cache), ".tar")
        return f"cache {outcome}"

    def _run(self, args: list[str], environment: dict[str, str] | None = None) -> dict:
        order = dict(
            args=[*args, "--threads", "1"] if args[0] not in ("inspect",) else args,
            stdin="hello\n/exit\n",
            environment=environment or {},
            cpu_seconds=CPU_SECONDS,
            seconds=SECONDS,
            num_bytes=NUM_BYTES,
        )
        self._child.stdin.write(json.dumps(order) + "\n")
        self._child.stdin.flush()
        return json.loads(self._child.stdout.readline()) | dict(args=args)

    def _judge(self, found: dict, path: Path) -> str:
        """The outcome in a word. Raises Fault for a signal, a traceback, too much memory, or a refusal that is too
        long."""
        code, said = found["code"], found["err"].strip().splitlines()
        wrong = None
        if code < 0:
            wrong = f"ended by signal {-code} after {found['seconds']:.0f} s"
        elif code == ESCAPED or "Traceback" in found["err"]:
            wrong = "a traceback"
        elif code not in (0, 2):
            wrong = f"exit code {code}"
        elif code == 2 and not (said and said[-1].startswith("lockstep: ")):
            wrong = "a refusal of no sentence"
        elif (code == 2 and NO_MEMORY in said[-1]) or found["peak_bytes"] > MOST_BYTES:
            wrong = f"{found['peak_bytes'] >> 20} MB"
        if wrong is not None:
            raise Fault(f"{wrong}: lockstep {found['args']}: {found['err'][-1500:]}", self._archive(path), ".tar")
        return "refused" if code else "works"

    def _archive(self, path: Path) -> bytes:
        """An archive of the damaged files, to replay the fault."""
        with scratch_folder() as folder:
            command = ["tar", "-cf", f"{folder}/x.tar", "--exclude=kernels", "-C", str(path.parent), path.name]
            subprocess.run(command, check=True)
            return (folder / "x.tar").read_bytes()

    def close(self) -> None:
        """Ends the process."""
        self._child.stdin.close()
        self._child.wait(60)
        self._child.stdout.close()


def _child(cache: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LOCKSTEP_CACHE": str(cache), "COLUMNS": "200"}
    command = [sys.executable, "-m", "tests.fuzz.file_child"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


CACHE_OFF = {"LOCKSTEP_CACHE_GB": "0"}  # packed weights of models that exist for one command are not kept


def _folder(path: Path) -> Path:
    """Writes a Hugging Face folder with every kind of file that it may have."""
    tiny.write(path, CONFIG, tiny.tensors(CONFIG, 5))
    write_folder(path, byte_level(), eos_token="<|end|>", bos_token="<|begin|>", chat_template=CHATML)
    (path / "chat_template.jinja").write_text(CHATML)
    asked = dict(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, eos_token_id=[0, 2], suppress_tokens=[7])
    (path / "generation_config.json").write_text(json.dumps(asked))
    return path


def _other_folder(path: Path) -> Path:
    """Writes a Hugging Face folder with bf16 weights in an indexed file, and a SentencePiece tokenizer."""
    tiny.write(path, CONFIG, tiny.tensors(CONFIG, 6), "BF16")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    index = {name: "model-00001-of-00001.safetensors" for name in tiny.shapes(CONFIG)}
    (path / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    write_folder(path, byte_fallback(), eos_token="</s>", bos_token="<s>", add_bos_token=True)
    return path


def damage_of(name: str) -> Callable[[random.Random, bytes], bytes]:
    """The function that damages a file of a model's folder. name: of the file."""
    if name.endswith(".safetensors"):
        return _safetensors_damage
    return _template_damage if name.endswith(".jinja") else _json_damage


def _json_damage(rng: random.Random, raw: bytes) -> bytes:
    if rng.random() < 0.3:
        return damaged_bytes(rng, raw)
    value = json.loads(raw)
    for _ in range(rng.choice([1, 1, 2, 5])):
        value = damaged_value(rng, value)
    return json.dumps(value).encode()


def _safetensors_damage(rng: random.Random, raw: bytes) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.4:
        return mutant(raw, rng, rng.choice([None, 8, 8 + size]))
    header = json.dumps(damaged_value(rng, json.loads(raw[8 : 8 + size]))).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


def _template_damage(rng: random.Random, raw: bytes) -> bytes:
    return program(rng).encode() if rng.random() < 0.7 else damaged_bytes(rng, raw)


def _cache_damage(rng: random.Random, raw: bytes) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return b""
    if kind == 1:
        return raw[: rng.randrange(len(raw) + 1)]
    return mutant(raw or b"\0", rng, rng.choice([None, 200]))
