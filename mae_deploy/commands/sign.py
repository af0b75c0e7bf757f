"""`mae-deploy sign`, and what `verify --signature` checks: OpenSSF's model signing, with a pair of keys and no network;
torch-free.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mae_deploy.commands.config import SignConfig
from mae_deploy.errors import CheckFailed, ConfigError, import_optional, reason
from mae_deploy.file_kinds import read_whole
from mae_deploy.files import atomic_path
from mae_deploy.hub import SIGNATURE
from mae_deploy.reporting.command_line import next_command
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.runtime.bundle import Bundle

PASSWORD = "MAE_DEPLOY_KEY_PASSWORD"
"""The environment's variable with the password of an encrypted private key."""

_MAKE = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem; openssl ec -in key.pem -pubout -out key.pub"


def run_sign(config: SignConfig) -> Result:
    """Check every file of the bundle, then sign all that is in its folder; an older signature is replaced.

    Raises:
        ConfigError: no bundle, or no private key that signs.
        CheckFailed: a file is not the one that was exported.
        MissingDependency: model-signing is not installed.
    """
    signing = _library("signing")
    bundle = Bundle.load(config.bundle)
    bundle.check_files()
    password = os.environ.get(PASSWORD)
    try:
        read_whole(config.key)  # the library would wait for a pipe
        signer = signing.Config().use_elliptic_key_signer(
            private_key=config.key, password=password.encode() if password is not None else None
        )
    except Exception as error:  # whatever the library makes of the file
        encrypted = isinstance(error, TypeError) or password is not None
        hint = f"the password of an encrypted key stands in {PASSWORD}" if encrypted else f"make one: {_MAKE}"
        raise ConfigError(f"--key {config.key} is no private key that signs: {reason(error)}", hint=hint) from error
    files = _files(bundle.path)
    with atomic_path(bundle.path / SIGNATURE) as aside:
        try:
            signer.set_hashing_config(_hashing()).sign(bundle.path, aside)
        except ValueError as error:  # names that are not UTF-8
            raise ConfigError(f"{bundle.path} cannot be signed: {reason(error)}", hint="rename it") from error
    data = {"bundle": str(bundle.path), "signature": str(bundle.path / SIGNATURE), "files": len(files)}
    return Result(data, facts_table("", data), then=next_command("verify", bundle.path, signature="PUBLIC_KEY"))


def check_signature(folder: Path, key: Path) -> None:
    """Whether everything in a bundle's folder is as the holder of the key has signed it, and nothing else is there.

    Args:
        key: the public one, PEM.

    Raises:
        ConfigError: no public key.
        CheckFailed: there is no signature, another key's, or a file was changed, added or removed.
        MissingDependency: model-signing is not installed.
    """
    verifying = _library("verifying")
    if not (folder / SIGNATURE).is_file():
        raise CheckFailed(
            f"{folder} is not signed: there is no {SIGNATURE}", hint="'mae-deploy sign' signs a bundle that you trust"
        )
    try:
        read_whole(key)  # the library would wait for a pipe
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:  # whatever the library makes of the file
        raise ConfigError(f"--signature {key} is no public key: {reason(error)}", hint=f"make one: {_MAKE}") from error
    _files(folder)
    try:
        verifier.set_hashing_config(_hashing()).verify(folder, folder / SIGNATURE)
    except Exception as error:  # whatever a file of a stranger makes the library raise
        raise CheckFailed(f"the signature of {folder} does not hold for {key}: {reason(error)}") from error


def _library(part: str) -> Any:
    import_optional("OpenSSL", extra="sign")  # model-signing imports it, and does not ask for it
    return import_optional(f"model_signing.{part}", extra="sign")


def _files(folder: Path) -> list[Path]:
    """What a signature covers.

    Raises:
        CheckFailed: a folder is a link, into which the library does not look.
    """
    found = [path for path in folder.rglob("*") if path.name != SIGNATURE]
    if links := [path for path in found if path.is_dir() and path.is_symlink()]:
        raise CheckFailed(f"{links[0]} is a link to a folder, which no signature covers", hint="put the folder there")
    return [path for path in found if path.is_file()]


def _hashing() -> Any:
    """All files but the signature, hidden ones too; the links of a hub's cache by their content."""
    config = import_optional("model_signing.hashing", extra="sign").Config()
    config = config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    return config.set_allow_symlinks(True)
