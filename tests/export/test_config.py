"""What `export` accepts on its command line, and what it makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.export.config import ExportConfig


def settings(**more: Any) -> ExportConfig:
    return ExportConfig(checkpoint=Path("checkpoint"), out=Path("bundle"), **more)


@pytest.mark.parametrize(
    ("tokens", "mode", "keep"),
    [("full", "full", None), ("visible", "visible", None), ("visible:1", "visible", 1), ("visible:49", "visible", 49), ("visible:049", "visible", 49)],
)
def test_tokens(tokens: str, mode: str, keep: int | None) -> None:
    config = settings(tokens=tokens)
    assert (config.token_mode, config.keep) == (mode, keep)


@pytest.mark.parametrize(
    "tokens", ["", "bogus", "Full", "full:", "full:49", "visible:", "visible:0", "visible:-3", "visible:3.0", "visible:x", "visible:²", "visible:4:9"]
)
def test_tokens_that_mean_nothing(tokens: str) -> None:
    with pytest.raises(ConfigError, match=f"--tokens {tokens}") as caught:
        settings(tokens=tokens)
    assert caught.value.hint == "write full, visible, or visible:K such as visible:49"


@pytest.mark.parametrize(("batch", "fixed"), [("dynamic", None), ("1", 1), ("17", 17)])
def test_batch(batch: str, fixed: int | None) -> None:
    assert settings(batch=batch).fixed_batch == fixed


@pytest.mark.parametrize("batch", ["0", "-1", "1.5", "many", "", "²"])
def test_batches_that_mean_nothing(batch: str) -> None:
    with pytest.raises(ConfigError, match=f"--batch {batch}"):
        settings(batch=batch)


def test_an_output_named_twice() -> None:
    with pytest.raises(ConfigError, match="--outputs cls,pooled,cls names an output twice"):
        settings(outputs=("cls", "pooled", "cls"))


def test_no_samples_at_all() -> None:
    with pytest.raises(ConfigError, match="--num-samples 0 must be at least 1"):
        settings(num_samples=0)
