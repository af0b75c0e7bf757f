"""A bundle is whole at every moment while an engine is added."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.errors import MaeDeployError
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.tensorrt import add_plan
from mae_deploy.runtime.tensorrt.add_plan import plan_name
from tests.runtime.tensorrt.planned_bundle import ORIN, add


@pytest.fixture
def bundle(visible_bundle: Path) -> Bundle:
    return Bundle.load(visible_bundle)


def test_what_was_added_is_there_with_its_hash(bundle: Bundle) -> None:
    entry = add(bundle, b"a plan")
    name = "engines/10.3.0-orin-fp16.plan"
    assert entry["file"] == plan_name("10.3.0", ORIN, "fp16") == name
    fresh = Bundle.load(bundle.path)
    assert fresh.manifest == bundle.manifest
    assert fresh.manifest["engines"] == [entry]
    assert (entry["profiles"], entry["compute_capability"], entry["latency_ms"]) == (
        [{"B": [1, 8, 32], "K": [1, 4, 21]}],
        [8, 7],
        1.5,
    )
    assert fresh.file(name).read_bytes() == b"a plan"
    assert entry["layers"] is not None
    assert json.loads(fresh.file(entry["layers"]).read_text()) == {"Layers": []}
    fresh.check_files()


def test_an_engine_replaces_that_of_its_name_and_no_other(bundle: Bundle) -> None:
    add(bundle, b"first")
    add(bundle, b"other", precision="int8")
    add(bundle, b"second", layers=None)
    assert [(entry["precision"], entry["layers"]) for entry in bundle.manifest["engines"]] == [
        ("int8", "engines/10.3.0-orin-int8.layers.json"),
        ("fp16", None),
    ]
    assert bundle.file(plan_name("10.3.0", ORIN, "fp16")).read_bytes() == b"second"
    assert "engines/10.3.0-orin-fp16.layers.json" not in bundle.manifest["files"]
    bundle.check_files()


def test_builds_at_the_same_time_lose_nothing(bundle: Bundle) -> None:
    versions = [f"10.{minor}.0" for minor in range(6)]
    others = [Bundle.load(bundle.path) for _ in versions]
    threads = [
        threading.Thread(target=add, args=(other,), kwargs={"version": version})
        for other, version in zip(others, versions, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fresh = Bundle.load(bundle.path)
    assert sorted(entry["tensorrt"] for entry in fresh.manifest["engines"]) == versions
    fresh.check_files()


def test_cut_off_while_an_engine_is_replaced(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    add(bundle, b"first")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(add_plan, "file_entry", stop)
    with pytest.raises(KeyboardInterrupt):
        add(bundle, b"second")
    fresh = Bundle.load(bundle.path)
    assert fresh.manifest["engines"] == [], "no engine is listed with another's hash"
    fresh.check_files()


def test_a_bundle_that_cannot_be_written(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(add_plan, "write_json", read_only)
    with pytest.raises(MaeDeployError, match=r"cannot write to the bundle .*: Permission denied"):
        add(bundle)
    assert Bundle.load(bundle.path).manifest["engines"] == []
