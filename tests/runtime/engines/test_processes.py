"""An engine in a process that was forked from the one that loaded it, or that it was pickled to; each in a process of
its own, which may hang or die.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mae_deploy.errors import CheckFailed, MaeDeployError
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.registry import open_graph
from tests.runtime.tiny_bundle import golden_inputs, reference, write_bundle

TOLERANCE = 1e-5
"""FP32 sums in another order."""

FORK = """
import gc, multiprocessing, os, sys
import numpy as np
from mae_deploy.errors import MaeDeployError
from mae_deploy.runtime import Backbone

path, engine, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])

def load():
    return Backbone.load(path, engine, threads=threads)

def in_child():
    global kept, dropped
    for backbone in (kept, dropped):
        try:
            backbone(images)
        except MaeDeployError as error:
            assert "loaded in another process: load after the fork" in str(error), error
        else:
            raise AssertionError("it ran")
    kept.close()
    del dropped
    gc.collect()
    with load() as own:
        np.testing.assert_array_equal(own(images).cls, expected)

kept, dropped = load(), load()
images = kept.bundle.golden()["images"]
expected = kept(images).cls
child = os.fork()
if child == 0:
    in_child()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
worker = multiprocessing.get_context("fork").Process(target=in_child)
worker.start()
worker.join()
assert worker.exitcode == 0, worker.exitcode
np.testing.assert_array_equal(kept(images).cls, expected)
kept.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks there")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_forked_process_loads_again(full_bundle: Path, engine: str, threads: int) -> None:
    """ONNX Runtime died of SIGSEGV at the end of the child, OpenVINO waited for ever."""
    pytest.importorskip(engine)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(full_bundle), engine, str(threads)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


SPAWN = """
import multiprocessing, sys
import numpy as np
from mae_deploy.runtime import Backbone

def features(backbone, images, answers):
    answers.put(backbone(images).cls)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with Backbone.load("full", sys.argv[1], threads=1) as backbone:
        images = backbone.bundle.golden()["images"]
        worker = context.Process(target=features, args=(backbone, images, answers))
        worker.start()
        np.testing.assert_allclose(answers.get(timeout=60), backbone(images).cls, atol=1e-5)
        worker.join()
        assert worker.exitcode == 0
"""


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_spawned_worker_is_given_a_backbone(full_bundle: Path, tmp_path: Path, engine: str) -> None:
    pytest.importorskip(engine)
    (tmp_path / "spawn.py").write_text(SPAWN)
    done = subprocess.run(
        [sys.executable, "spawn.py", engine],
        cwd=full_bundle.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_pickled_backbone_is_loaded_again_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "b", token_mode="full")
    monkeypatch.chdir(tmp_path)
    images = golden_inputs(visible=False)["images"]
    with Backbone.load("b", "onnx", threads=3) as backbone:
        content = pickle.dumps(backbone)
        monkeypatch.chdir(tmp_path.parent)
        with pickle.loads(content) as again, copy.deepcopy(backbone) as other:
            assert again.engine.options == EngineOptions(threads=3)
            assert again.engine is not backbone.engine
            backbone.close()
            for each in (again, other):
                np.testing.assert_allclose(each(images).cls, reference(images)["cls"], atol=TOLERANCE)
    graph = tmp_path / "b" / "encoder.onnx"
    graph.write_bytes(graph.read_bytes() + b" ")
    with pytest.raises(CheckFailed, match="is not the file that was exported"):
        pickle.loads(content)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_pickled_engine_is_loaded_again_from_its_graph(full_bundle: Path, engine: str) -> None:
    pytest.importorskip(engine)
    inputs = golden_inputs(visible=False)
    with open_graph(full_bundle / "encoder.onnx", engine, EngineOptions(threads=1), precision="int8-w7") as loaded:
        with pickle.loads(pickle.dumps(loaded)) as again:
            assert (again.precision, again.options, again.name) == ("int8-w7", EngineOptions(threads=1), engine)
            np.testing.assert_allclose(again.run(inputs)["cls"], loaded.run(inputs)["cls"], atol=TOLERANCE)
        content = pickle.dumps(loaded)
    (full_bundle / "encoder.onnx").unlink()
    with pytest.raises(MaeDeployError, match="cannot load"):
        pickle.loads(content)
