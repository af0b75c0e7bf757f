"""Bundles on a model hub, `hf://ORG/NAME[@REVISION][/PATH]`: fetched once, and read from the hub's cache from then on.

The one place that knows the hub; everything else is given a folder. Nothing is imported before an address is met.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, import_optional, reason
from mae_deploy.files import is_inside, read_json

MANIFEST_FILE = "manifest.json"
CARD = "README.md"
SIGNATURE = "model.sig"
"""What `mae-deploy sign` leaves in a bundle; the name is OpenSSF's."""

_ADDRESS = re.compile(
    r"hf:/+(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/[\w.-]+/[\w.-]+|[^/@]+))?(?:/(?P<path>[^@]*))?"
    r"(?:@(?P<after>[^@]+))?"
)
"""A path that was an address has one slash. The revision stands behind the name, or at the end."""

_FORM = "write it as hf://ORG/NAME, hf://ORG/NAME/FOLDER or hf://ORG/NAME@REVISION"


@dataclass(frozen=True, slots=True)
class Address:
    """A folder of a repository."""

    repo: str
    path: str = ""
    """POSIX, below the repository's root."""
    revision: str | None = None
    """A branch, a tag or a commit; None: the main branch."""

    @classmethod
    def read(cls, text: str | os.PathLike[str]) -> Address:
        """What was typed.

        Raises:
            ConfigError: it is no address.
        """
        match = _ADDRESS.fullmatch(os.fspath(text))
        revisions = [] if match is None else [found for found in (match["revision"], match["after"]) if found]
        path = "" if match is None else (match["path"] or "").strip("/")
        if match is None or len(revisions) > 1 or ".." in path.split("/"):
            raise ConfigError(f"{_shown(text)} is no address of a model hub", hint=_FORM)
        return cls(match["repo"], path, revisions[0] if revisions else None)

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision is not None else ""
        return f"hf://{self.repo}{at}{f'/{self.path}' if self.path else ''}"

    def name(self, file: str) -> str:
        """A file of the folder as the repository names it."""
        return str(PurePosixPath(self.path) / file)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a model hub."""
    return os.fspath(path).startswith("hf:/")


def local(path: str | os.PathLike[str]) -> Path:
    """The folder of a bundle: the path itself, or, of an address, the one in the hub's cache, where the files that the
    manifest lists are fetched to first. Their hashes are checked where they are read.

    Raises:
        MissingDependency: huggingface_hub is not installed.
        ConfigError: there is no such repository, revision or bundle, or it may not be read.
        MaeDeployError: the hub cannot be reached, and the bundle is not in the cache.
    """
    if not is_address(path):
        return Path(path)
    from mae_deploy.progress import notice  # a device that reads folders needs no rich

    address = Address.read(path)
    manifest = _fetch(address, MANIFEST_FILE, address.revision)
    commit = manifest.parents[len(PurePosixPath(address.path).parts)].name
    files = read_json(manifest).get("files")
    for name in files if isinstance(files, Mapping) else ():  # what else is wrong is said when the manifest is read
        if not is_inside(name):
            raise CheckFailed(f"{address}: its manifest lists '{name}', which is outside of the bundle")
        _fetch(address, name, commit)
    with suppress(MaeDeployError):  # most bundles have none; `verify --signature` says so
        _fetch(address, SIGNATURE, commit)
        _fetch(address, CARD, commit)  # which is signed, too
    notice("hub:", f"{address} at {commit[:8]}")
    return manifest.parent


def check_own(path: str | os.PathLike[str], name: str) -> None:
    """Whether a bundle that is changed is a folder of the user's.

    Raises:
        ConfigError: it is an address.
    """
    if is_address(path):
        address = Address.read(path)
        raise ConfigError(
            f"{name} {address} must be a folder of your own",
            hint=f"hf download {address.repo} --local-dir {address.repo.partition('/')[2]}",
        )


def create(address: Address, *, private: bool) -> None:
    """Make the repository, if it is not there yet.

    Raises:
        MissingDependency: huggingface_hub is not installed.
        ConfigError: it may not be made.
        MaeDeployError: the hub cannot be reached.
    """
    _, api = _hub()
    with _explained(address):
        api.create_repo(address.repo, private=private, exist_ok=True)


def card_of(address: Address) -> str | None:
    """The model card that is there; None without."""
    try:
        return _fetch(address, CARD, address.revision).read_text(encoding="utf-8", errors="replace")
    except _NotThere:
        return None


def upload(address: Address, files: Mapping[str, Path | bytes], *, message: str) -> str:
    """Put files into the address's folder in one commit; returns the commit.

    Raises:
        MissingDependency: huggingface_hub is not installed.
        ConfigError: the repository is not there, may not be written, or has no such branch.
        MaeDeployError: the hub cannot be reached.
    """
    hub, api = _hub()
    operations = [
        hub.CommitOperationAdd(
            path_in_repo=address.name(name), path_or_fileobj=content if isinstance(content, bytes) else str(content)
        )
        for name, content in files.items()
    ]
    with _explained(address):
        commit = api.create_commit(address.repo, operations, commit_message=message, revision=address.revision)
    return str(commit.oid)


class _NotThere(ConfigError):
    """The repository has no such file."""


def _fetch(address: Address, name: str, revision: str | None) -> Path:
    _, api = _hub()
    with _explained(address, name):
        return Path(api.hf_hub_download(address.repo, address.name(name), revision=revision))


def _hub() -> tuple[Any, Any]:
    """The library, and the hub that the environment names now."""
    from mae_deploy.progress import draws

    hub = import_optional("huggingface_hub", extra="hub")
    if not draws():
        import_optional("huggingface_hub.utils", extra="hub").disable_progress_bars()
    return hub, hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


@contextmanager
def _explained(address: Address, name: str = "") -> Iterator[None]:
    """What the library and its HTTP client raise, in one line."""
    errors = import_optional("huggingface_hub.errors", extra="hub")
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{address}: there is no revision '{address.revision or 'main'}'", hint=_FORM) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{address}: there is no such repository, or it may not be read without a token",
            hint="check the name; for a private one: hf auth login, or HF_TOKEN",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise MaeDeployError(
            f"{address}: the hub cannot be reached, and {name or 'it'} is not in the cache",
            hint="check the network, HF_ENDPOINT and HF_HUB_OFFLINE; what was fetched once is read without a network",
        ) from error
    except errors.EntryNotFoundError as error:
        hint = "name the folder of the bundle: hf://ORG/NAME/FOLDER" if name == MANIFEST_FILE else None
        raise _NotThere(f"{address}: there is no {name}", hint=hint) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{address} is no address of a model hub: {reason(error)}", hint=_FORM) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ConfigError(
                f"{address}: the hub refuses it ({status})", hint="hf auth login, or HF_TOKEN with the right to write"
            ) from error
        raise MaeDeployError(f"{address}: {reason(error)}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENTS and not isinstance(error, OSError):
            raise
        raise MaeDeployError(
            f"{address}: the hub cannot be reached: {reason(error)}", hint="check the network and HF_ENDPOINT"
        ) from error


_CLIENTS: Sequence[str] = ("httpx", "httpcore", "requests", "urllib3")
"""What huggingface_hub's versions speak HTTP with."""


def _shown(text: str | os.PathLike[str]) -> str:
    """An address as it was typed, with the slash that a path has lost."""
    return re.sub("^hf:/+", "hf://", os.fspath(text))
