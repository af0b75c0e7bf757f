"""`mae-deploy push`: a bundle to a model hub, with a card; needs no PyTorch."""

from __future__ import annotations

from pathlib import Path

from mae_deploy.checkpoint import OWN_LICENCE, UNKNOWN_LICENCE
from mae_deploy.commands.config import PushConfig
from mae_deploy.errors import ConfigError
from mae_deploy.hub import CARD, MANIFEST_FILE, SIGNATURE, Address, card_of, create, upload
from mae_deploy.progress import notice
from mae_deploy.reporting.bundles import run_command
from mae_deploy.reporting.card import MARK, bundle_card
from mae_deploy.reporting.licence import say_licence
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.text import as_size


def run_push(config: PushConfig) -> Result:
    """Check every file of the bundle, then send those that its manifest lists, in one commit.

    Raises:
        ConfigError: no bundle, another licence than that of the weights it derives from, or a repository that may not
            be written.
        CheckFailed: a file is not the one that was exported.
        MaeDeployError: the hub cannot be reached.
    """
    address, bundle = Address.read(config.to), Bundle.load(config.bundle)
    licence = _licence(bundle, config.license)
    bundle.check_files()
    say_licence(licence, "what is made with them")
    if licence == OWN_LICENCE:
        notice("licence:", "own weights: the card leaves open what others may do with them; --license says it")
    files: dict[str, Path | bytes] = {name: bundle.path / name for name in (MANIFEST_FILE, *bundle.manifest["files"])}
    create(address, private=config.private)
    there = card_of(address) if config.keep_card else None
    if there is not None and MARK not in there:
        notice("card:", f"{CARD} of {address} is not ours, and stays as it is; --no-keep-card writes it anew")
    elif not (bundle.path / SIGNATURE).is_file():
        files[CARD] = bundle_card(bundle, str(address), licence).encode()
    if (bundle.path / SIGNATURE).is_file():  # the card as it was signed with the rest, without a hub's front matter
        files |= {name: bundle.path / name for name in (SIGNATURE, CARD) if (bundle.path / name).is_file()}
    message = config.message or f"{bundle.model['name']}, {bundle.token_mode} tokens, {bundle.precision}"
    commit = upload(address, files, message=message)
    size = sum(entry["size"] for entry in bundle.manifest["files"].values())
    data = {"address": str(address), "commit": commit, "files": list(files), "size": size, "licence": licence}
    facts = {**data, "files": len(files), "size": as_size(size)}
    return Result(data, facts_table("", facts), then=run_command(bundle, address))


def _licence(bundle: Bundle, asked: str | None) -> str:
    """What the card says.

    Raises:
        ConfigError: the weights derive from others, whose licence stays theirs.
    """
    if asked is None or asked == bundle.licence:
        return bundle.licence
    if bundle.licence not in (OWN_LICENCE, UNKNOWN_LICENCE):
        raise ConfigError(
            f"--license {asked} is not that of the weights, which derive from others under {bundle.licence}",
            hint="leave it out",
        )
    return asked
