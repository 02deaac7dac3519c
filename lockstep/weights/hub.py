"""Finding a model by its name: the bundled one, a local folder or file, one of Ollama's or LM Studio's, or a download
from the Hugging Face hub."""

import fnmatch
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from lockstep.progress import OnProgress
from lockstep.user_cache import UNWRITABLE, obstacle_of
from lockstep.weights.content import hub_cache as hub_cache_folder
from lockstep.weights.folders.mistral import PARAMS
from lockstep.weights.gguf.file import is_gguf
from lockstep.weights.safetensors import CONVERT, PICKLES
from lockstep.weights.sources import hub_cache, lm_studio, ollama, quants
from lockstep.weights.sources.download_bar import bar_class
from lockstep.weights.sources.found import NotFound, files_below
from lockstep.weights.sources.on_disk import near_names, near_paths

# A name such as org/model, org/model:Q8_0, org/model:file.gguf or org/model@revision.
HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    rf"(?::(?:(?P<file>{quants.GGUF_FILE})|(?P<quant>[A-Za-z0-9][\w-]*)))?(?:@(?P<revision>[\w./-]+))?"
)
HUB_ADDRESS = re.compile(r"(?:https?://)?(?:hf\.co|(?:www\.)?huggingface\.co)/(?P<page>[^?#]*)[?#]?.*", re.IGNORECASE)
# the address of a repository, of its files at a revision, or of one of them
HUB_PAGE = re.compile(r"(?P<repo>[^/]+/[^/]+)(?:/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?:/(?P<file>.+\.gguf))?)?/?")
BUNDLED = "bundled"  # what receipts and `lockstep list` call the bundled model
WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "tokenizer.model.v*")
# Subfolders hold other forms of the same weights, consolidated files Mistral's own form, which is taken if alone.
SUBFOLDERS, NATIVE = "*/*", "consolidated*"
WANTED_OF_SUBFOLDERS = ("additional_chat_templates/*.jinja", "1_Pooling/config.json")


class HubName(NamedTuple):
    """A model on the hub. file, quant: of one GGUF file among several; at most one of the two is given."""

    repo: str
    file: str | None = None
    quant: str | None = None
    revision: str | None = None


def resolve_model(name: str | None, progress: OnProgress | None = None) -> Path:
    """The folder or GGUF file that `name` means: None or BUNDLED is the bundled model, otherwise it is a path, a hub
    name, "ollama:NAME[:TAG]" or "lmstudio:PUBLISHER/REPOSITORY[:QUANT]".

    A hub name (org/model, org/model:QUANT, org/model:file.gguf, org/model@revision, also with hf.co/ or as the address
    of a page) is downloaded into the hub's own cache; its progress is reported as ("downloading", bytes done, bytes in
    all), or without `progress` shown by the hub's client. Raises ValueError that says in one sentence what was tried.
    """
    if not isinstance(name, (str, os.PathLike, type(None))):
        raise ValueError(f"model: expected a name or a path, got {name!r:.80}")
    if name is None or (name == BUNDLED and not os.path.exists(name)):
        return _bundled_folder()
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return path
    if os.path.isfile(path):
        if path.suffix == ".safetensors" or is_gguf(path):
            return path
        raise ValueError(f"{name}: expected a model folder, a .gguf or a .safetensors file")
    for source in (ollama, lm_studio):
        if name.startswith(source.PREFIX):
            try:
                return source.resolve(name)
            except NotFound as error:
                raise ValueError(f"{error}{_near(near_names(name))}") from None
    if path.is_absolute() or name.startswith(".") or (path.suffix in (".gguf", ".safetensors") and ":" not in name):
        raise ValueError(f"{name}: no such folder or file{_near(near_paths(path))}")
    hub_name = parse_hub_name(name)
    if hub_name is None:
        like = near_paths(path) + near_names(name)
        raise ValueError(
            f"{name}: no such folder or file, and not a hub name like org/model or org/model:Q8_0{_near(like)}"
        )
    return _download(name, hub_name, progress)


def parse_hub_name(name: str) -> HubName | None:
    """The parts of a hub name, or of the address of a page of the hub; None for another text."""
    if address := HUB_ADDRESS.fullmatch(name):
        name = address["page"].strip("/")
        if page := HUB_PAGE.fullmatch(name):
            repo, revision, file = (unquote(part) if part else "" for part in page.group("repo", "revision", "file"))
            name = repo + (f":{file}" if file else "") + (f"@{revision}" if revision else "")
    found = HUB_NAME.fullmatch(name)
    return HubName(**found.groupdict()) if found and ".." not in name else None


def _near(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _bundled_folder() -> Path:
    folder = Path(__file__).resolve().parent.parent / "bundled"
    if not (folder / "config.json").is_file():
        raise ValueError("no model is bundled with this installation: name a folder, a .gguf file or a hub model")
    return folder


class Repository(NamedTuple):
    """What is in a repository. folder: where these files lie in the hub's cache, if the hub could not be asked, and
    reason: why not."""

    files: list[str]
    folder: Path | None = None
    reason: str | None = None


def _download(name: str, wanted: HubName, progress: OnProgress | None) -> Path:
    there = _repository(name, wanted)
    try:
        return _chosen(name, wanted, there, progress)
    except ValueError as error:
        if there.folder is None:
            raise
        raise ValueError(f"{error}; this is what its cache has, the hub cannot be asked: {there.reason}") from None


def _chosen(name: str, wanted: HubName, there: Repository, progress: OnProgress | None) -> Path:
    """The folder or GGUF file of a name, downloaded as needed. ValueError if the repository does not have it."""
    if wanted.file is None and wanted.quant is None and (files := _of_safetensors(there.files)):
        return fetched(name, wanted, there, files, progress)
    file = wanted.file or _gguf_file(name, wanted, there.files)
    parts = quants.parts_of(file)
    if missing := [part for part in parts if part not in there.files]:
        raise ValueError(f"{name}: the hub repository {wanted.repo} has no file {missing[0]}")
    return fetched(name, wanted, there, parts, progress) / parts[0]


def _of_safetensors(files: list[str]) -> list[str]:
    """The files of a model in safetensors, without other forms of it; empty where there is none."""
    wanted = [file for file in files if _is_like(file, WANTED) and not _is_like(file, [SUBFOLDERS])]
    beside = [file for file in files if _is_like(file, WANTED_OF_SUBFOLDERS)]
    usual = [file for file in wanted if not _is_like(file, [NATIVE])]
    forms = (usual, wanted if PARAMS in wanted else [])
    return next((form + beside for form in forms if any(file.endswith(".safetensors") for file in form)), [])


def _is_like(file: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _gguf_file(name: str, wanted: HubName, files: list[str]) -> str:
    """The GGUF file of a quant; where the name has none, the only one or the one that is usually meant."""
    if quants.gguf_models(files):
        return quants.choose(files, wanted.quant, wanted.repo)
    kinds = "GGUF file" if wanted.quant else ".safetensors and no GGUF file"
    like = f"; {wanted.repo} without :{wanted.quant} has .safetensors, which --weights q8_0 can quantize"
    like = like if wanted.quant and _of_safetensors(files) else ""
    if pickles := [file for file in files if _is_like(file, PICKLES)]:
        like += f", but {pickles[0]}: {CONVERT}"
    raise ValueError(f"{name}: the hub repository {wanted.repo} has no {kinds}{like}")


def _repository(name: str, wanted: HubName) -> Repository:
    """What is in a repository: as the hub says, or where it cannot be asked, what is in the cache."""
    from huggingface_hub import model_info

    try:  # where there is no network this fails at once; other requests are tried again for half a minute
        siblings = model_info(wanted.repo, revision=wanted.revision).siblings or ()
        return Repository([file.rfilename for file in siblings])
    except Exception as error:  # network, authentication and cache errors share no base class
        folder = hub_cache.snapshot(wanted.repo, wanted.revision)
        if folder is not None and (files := files_below(folder)):
            return Repository(files, folder, _reason(error))
        raise _not_fetched(name, wanted.repo, error) from None


def fetched(
    name: str, wanted: HubName, there: Repository, files: list[str], progress: OnProgress | None = None
) -> Path:
    """The folder in the hub's cache with the files, downloaded as needed."""
    from huggingface_hub import snapshot_download

    if there.folder is not None:
        return there.folder
    try:
        patterns = [re.sub(r"[][*?]", "[\\g<0>]", file) for file in files]  # file names, not patterns
        shown: Any = dict(tqdm_class=bar_class(progress)) if progress is not None else {}
        return Path(snapshot_download(wanted.repo, revision=wanted.revision, allow_patterns=patterns, **shown))
    except Exception as error:
        raise _not_fetched(name, wanted.repo, error) from None


def _not_fetched(name: str, repo: str, error: BaseException) -> ValueError:
    return ValueError(
        f"{name}: no folder or file of that name here, and fetching {repo} from the Hugging Face hub failed: "
        f"{_reason(error)}{_near(near_names(name))}"
    )


def _reason(error: BaseException) -> str:
    """What is wrong with a name on the hub, or else the innermost cause in one line: the network's own error, without
    those that wrap it."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its makers ask for consent on its page, and then for a login: hf auth login, or HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private and needs a login: hf auth login, or HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    while cause := error.__cause__ or error.__context__:
        error = cause
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        folder = hub_cache_folder()
        return f"{folder} cannot be written: {obstacle_of(error, folder, 'HF_HOME')[:-1]}"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first_line[:200]
