"""Finding a model: the bundled one, a local folder or file, or a download from the Hugging Face hub."""

import os
import re
from pathlib import Path

# A name such as org/model, org/model:file.gguf or org/model@revision.
HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>[\w./-]+\.gguf))?(?:@(?P<revision>[\w./-]+))?"
)
SPLIT_FILE = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
MAX_PARTS = 1000
WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
# Subfolders hold other forms of the same weights, consolidated files a vendor's own form.
UNWANTED = ("*/*", "consolidated*")
WANTED_OF_SUBFOLDERS = ("additional_chat_templates/*.jinja", "1_Pooling/config.json")


def resolve_model(name: str | None) -> Path:
    """The folder or .gguf file that `name` means: None is the bundled model, otherwise a path or a hub name.

    A hub name (org/model, org/model:file.gguf, org/model@revision) is downloaded, with progress, into the
    hub's own cache. Raises ValueError that says in one sentence what was tried.
    """
    if name is None:
        return _bundled_folder()
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return path
    if os.path.isfile(path):
        if path.suffix in (".gguf", ".safetensors"):
            return path
        raise ValueError(f"{name}: expected a model folder, a .gguf or a .safetensors file")
    if path.is_absolute() or name.startswith(".") or (path.suffix in (".gguf", ".safetensors") and ":" not in name):
        raise ValueError(f"{name}: no such folder or file")
    hub_name = HUB_NAME.fullmatch(name)
    if hub_name is None or ".." in name:
        raise ValueError(f"{name}: no such folder or file, and not a hub name like org/model or org/model:file.gguf")
    return _download(name, hub_name["repo"], hub_name["file"], hub_name["revision"])


def _bundled_folder() -> Path:
    folder = Path(__file__).resolve().parent.parent / "bundled"
    if not (folder / "config.json").is_file():
        raise ValueError("no model is bundled with this installation: name a folder, a .gguf file or a hub model")
    return folder


def _download(name: str, repo: str, file: str | None, revision: str | None) -> Path:
    if file is not None:
        parts = _parts(file)
        path = _ask_hub(name, repo, revision, parts, []) / parts[0]
        if not path.is_file():
            raise ValueError(f"{name}: the hub repository {repo} has no file {parts[0]}")
        return path
    folder = _ask_hub(name, repo, revision, list(WANTED), list(UNWANTED))
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{name}: the hub repository has no .safetensors file{_gguf_hint(repo, revision)}")
    # The folder is named after its commit, so that the files of subfolders are taken from the same commit.
    _ask_hub(name, repo, folder.name, list(WANTED_OF_SUBFOLDERS), [])
    return folder


def _parts(file: str) -> list[str]:
    """The names of all parts of a split GGUF file, in order; of another file its own name."""
    split = SPLIT_FILE.fullmatch(file)
    if split is None:
        return [file]
    num_parts = int(split[2])
    if not 0 < num_parts <= MAX_PARTS:
        raise ValueError(f"{file}: expected 1 to {MAX_PARTS} parts")
    return [f"{split[1]}-{number:05d}-of-{num_parts:05d}.gguf" for number in range(1, num_parts + 1)]


def _gguf_hint(repo: str, revision: str | None) -> str:
    from huggingface_hub import list_repo_files

    try:
        files = [file for file in list_repo_files(repo, revision=revision) if file.endswith(".gguf")]
    except Exception:  # only a hint: the missing files are the error
        return ""
    return f"; name one of its GGUF files, like {repo}:{files[0]}" if files else ""


def _ask_hub(name: str, repo: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> Path:
    """The folder in the hub's cache with the wanted files, downloaded as needed."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # network, authentication and cache errors share no base class
        raise ValueError(
            f"{name}: no folder or file of that name here, and fetching {repo} from the Hugging Face hub failed: "
            f"{_reason(error)}"
        ) from None


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: the network's own error, without those that wrap it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first_line[:200]
