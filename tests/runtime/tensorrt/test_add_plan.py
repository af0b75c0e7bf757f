"""A bundle is whole at every moment while an engine is added."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.errors import MaeDeployError
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.tensorrt import add_plan
from mae_deploy.runtime.tensorrt.add_plan import plan_names
from tests.runtime.tensorrt.planned_bundle import ORIN, add


@pytest.fixture
def bundle(visible_bundle: Path) -> Bundle:
    return Bundle.load(visible_bundle)


def _plans(bundle: Bundle) -> list[str]:
    return sorted(path.name for path in (bundle.path / "engines").glob("*.plan"))


def test_what_was_added_is_there_with_its_hash(bundle: Bundle) -> None:
    entry = add(bundle, b"a plan")
    name = "engines/10.3.0-orin-fp16.plan"
    assert entry["file"] == plan_names("10.3.0", ORIN, "fp16")[0] == name
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
    assert bundle.file(plan_names("10.3.0", ORIN, "fp16")[1]).read_bytes() == b"second"
    assert {name for name in bundle.manifest["files"] if "fp16" in name} == {"engines/10.3.0-orin-fp16-2.plan"}
    bundle.check_files()
    add(bundle, b"third")
    assert _plans(bundle) == ["10.3.0-orin-fp16.plan", "10.3.0-orin-int8.plan"]
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
    add(bundle, b"first", layers=None)
    replace, found = os.replace, []
    for change in itertools.count():
        left = iter(range(change))

        def stopping(source: Path, target: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stopping)
        try:
            add(bundle, b"second")
            break
        except KeyboardInterrupt:
            fresh = Bundle.load(bundle.path)
            (entry,) = fresh.manifest["engines"]
            found.append(fresh.file(entry["file"]).read_bytes())
            fresh.check_files()
            assert _plans(bundle) == [Path(entry["file"]).name], "what the manifest does not list goes"
    assert found == [b"first"] * 3, "the plan, its layers and the manifest"
    assert bundle.file(bundle.manifest["engines"][0]["file"]).read_bytes() == b"second"


def test_what_a_kill_has_left_of_a_plan_goes(bundle: Bundle) -> None:
    add(bundle, b"first")
    (bundle.path / plan_names("10.3.0", ORIN, "fp16")[1]).write_bytes(b"of a process that was killed")
    add(bundle, b"second")
    add(bundle, b"third")
    assert _plans(bundle) == ["10.3.0-orin-fp16.plan"]
    bundle.check_files()


def test_a_bundle_that_cannot_be_written(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(add_plan, "write_json", read_only)
    with pytest.raises(MaeDeployError, match=r"cannot write to the bundle .*: Permission denied"):
        add(bundle)
    assert Bundle.load(bundle.path).manifest["engines"] == []
