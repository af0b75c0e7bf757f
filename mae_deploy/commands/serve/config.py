"""Settings of `mae-deploy serve`. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mae_deploy.config import Settings, section, setting
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of
from mae_deploy.file_kinds import read_whole
from mae_deploy.hub import Address, is_address
from mae_deploy.text import as_seconds, decode_text
from mae_deploy.training.config import Device


def _time(name: str, value: str) -> Iterator[MaeDeployError]:
    if as_seconds(value) is None:
        yield ConfigError(f"--{name} {value} is no time", hint="such as 5ms, 30s or 2min")


def read_keys(path: Path | None) -> list[str]:
    """The keys of `--api-keys`; none where nobody needs one.

    Raises:
        ConfigError: a file that cannot be read, or has none.
    """
    if path is None:
        return []
    try:
        lines = [line.strip() for line in decode_text(read_whole(path)).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-keys {path} has no key", hint="a key a line")
    return keys


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions(Settings, resume="never"):
    """Batches."""

    max_batch: int = setting(32, at_least=1, basic=True)
    """Images that are computed at once; fewer where the bundle was checked for fewer."""
    max_delay: str = setting("5ms", metavar="TIME", basic=True)
    """How long an image waits for others to be computed with."""
    max_queue: int = setting(512, at_least=1, basic=True)
    """Images that wait for each bundle; more are answered with 503."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from _time("max-delay", self.max_delay)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits(Settings, resume="never"):
    """Requests."""

    max_bytes: int = setting(20_000_000, at_least=1, basic=True)
    """Bytes of a request; more are answered with 413, while they come."""
    max_pixels: int = setting(50_000_000, at_least=1, basic=True)
    """Pixels of an image, width times height; more are answered with 413, before they are decoded."""
    max_images: int = setting(64, at_least=1)
    """Images of a request; more are answered with 413."""
    max_held: int = setting(1_000_000_000, at_least=1)
    """Bytes of all requests that are being received or decoded; beyond it, new ones are answered with 503."""
    timeout: str = setting("30s", metavar="TIME", basic=True)
    """Within this time a request has to arrive (else 408), and then to be answered (else 503); so long are those under
    way waited for when the server stops."""
    api_keys: Path | None = setting(None, basic=True)
    """A file with a key a line: requests need one, as 'Authorization: Bearer KEY'; default: anybody may ask."""
    images: Path | None = None
    """A folder whose images requests may name by their path below it; default: none."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from _time("timeout", self.timeout)
        if self.max_held < self.max_bytes:
            yield ConfigError(f"--max-held {self.max_held} is less than --max-bytes {self.max_bytes}")
        if self.images is not None and not self.images.is_dir():
            yield ConfigError(f"--images {self.images} is no folder")
        yield from errors_of(lambda: read_keys(self.api_keys))


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig(Settings, resume="never"):
    """Settings of `mae-deploy serve`."""

    bundles: tuple[str, ...] = setting(argument=True, metavar="NAME=FOLDER")
    """Bundle folders, or hf://ORG/NAME on a model hub; as NAME=FOLDER where requests are to call one by another name
    than its folder's."""
    host: str = setting("127.0.0.1", basic=True)
    """Address to listen on; 0.0.0.0: all of this machine's."""
    port: int = setting(8000, at_least=0, at_most=65535, basic=True)
    """Port to listen on; 0: any that is free."""
    batches: BatchOptions = section(BatchOptions)
    requests: RequestLimits = section(RequestLimits)
    reload: str = setting("2s", metavar="TIME")
    """How often bundle folders are looked at: a bundle that was replaced serves once it is verified; 0: never."""
    engine: str = setting("auto", metavar="ENGINE", basic=True)
    """onnxruntime (onnx), openvino (ov), tensorrt (trt) or tensorrt-rtx (trt-rtx); auto: TensorRT where the bundle has
    an engine for this machine, else the one on which the bundle was checked, where it is installed, else
    onnxruntime."""
    threads: int | None = setting(None, at_least=1, at_most=4096)
    """CPU threads of the engine; default: one for each granted core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that the engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = 0
    """Not used: a request says the seed of its patches."""
    device: Device = "cpu"
    """Where to compute; auto takes the GPU where there is one."""

    @property
    def named(self) -> dict[str, str]:
        """Each bundle's folder or address by its name."""
        return dict(map(_name, self.bundles))

    def faults(self) -> Iterator[MaeDeployError]:
        yield from _time("reload", self.reload)
        for name, count in Counter(name for name, _ in map(_name, self.bundles)).items():
            if count > 1:
                yield ConfigError(f"{count} bundles are called {name}", hint="give each a name: NAME=BUNDLE")
            if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
                yield ConfigError(
                    f"'{name}' cannot be part of an address", hint="letters, digits, - _ . only: NAME=BUNDLE"
                )


def _name(text: str) -> tuple[str, str]:
    """The name and the folder or address of what was typed."""
    name, equals, path = text.partition("=")
    if equals and "/" not in name:
        return name, path
    if is_address(text):
        address = Address.read(text)
        return (address.path or address.repo).rpartition("/")[2], text
    return Path(text).resolve().name, text
