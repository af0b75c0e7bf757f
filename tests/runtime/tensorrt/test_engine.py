"""How TensorRT is driven: slots, contexts, graphs, shapes, types, threads, and what is given back; on the stub driver
and a module that stands for TensorRT.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency
from mae_deploy.runtime.cuda.driver import CudaError, CudaGraph
from mae_deploy.runtime.engines.base import EngineOptions, run_in_chunks
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from mae_deploy.runtime.tensorrt import engine as tensorrt_engine
from mae_deploy.runtime.tensorrt import runner as tensorrt_runner
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine, TensorRtRtxEngine
from tests.runtime.cuda.stub_driver import NAME, StubMemory, calls, compile_stub
from tests.runtime.tensorrt.fake_tensorrt import C, H, W, make_tensorrt, plan, reference
from tests.runtime.tensorrt.planned_bundle import RTX4090

Load = Callable[..., TensorRtEngine]


@pytest.fixture
def load(stub_driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load an engine from a plan, on a version of the stand-in for TensorRT."""

    def load_engine(
        content: bytes | None = None,
        *,
        version: str = "10.3.0",
        shared_profiles: bool = True,
        graphs: bool = True,
        **more: Any,
    ) -> TensorRtEngine:
        monkeypatch.setattr(tensorrt_api, "_loaded", {})
        monkeypatch.setitem(
            sys.modules, "tensorrt", make_tensorrt(stub_driver, version=version, shared_profiles=shared_profiles)
        )
        monkeypatch.setattr(tensorrt_engine, "open_memory", lambda backend, index: StubMemory(stub_driver))
        (tmp_path / "a.plan").write_bytes(plan() if content is None else content)
        return TensorRtEngine(tmp_path / "a.plan", EngineOptions(cuda_graphs=graphs), precision="fp16", **more)

    return load_engine


def inputs(batch: int = 2, keep: int = 3, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "images": rng.normal(size=(batch, C, H, W)).astype(np.float32),
        "ids_keep": rng.integers(0, 99, (batch, keep)),
    }


def check(found: dict[str, Any], given: dict[str, Any]) -> None:
    expected = reference(**given)
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])


@pytest.mark.parametrize("version", ["8.6.0", "10.0.1", "11.4.0"])
@pytest.mark.parametrize("graphs", [True, False])
def test_runs(load: Load, version: str, graphs: bool) -> None:
    with load(version=version, graphs=graphs) as engine:
        assert (engine.name, engine.device, engine.version, engine.precision) == ("tensorrt", "cuda", version, "fp16")
        assert (engine.input_names, engine.output_names) == (("images", "ids_keep"), ("cls", "tokens"))
        for seed in range(4):
            for batch, keep in ((2, 3), (1, 7), (4, 1)):
                given = inputs(batch, keep, seed)
                found = engine.run(given)
                check(found, given)
                assert list(found) == ["cls", "tokens"]
                assert list(engine.run(given, ["tokens"])) == ["tokens"]


@pytest.mark.parametrize("graphs", [True, False])
def test_tensorrt_for_rtx_keeps_the_kernels_that_it_compiled(
    stub_driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """Before a graph is captured: the stand-in insists on kernels for a context's own shapes."""
    monkeypatch.setenv("MAE_DEPLOY_CACHE", str(tmp_path / "cache"))
    module: Any = make_tensorrt(stub_driver, version="1.7.1.116")
    monkeypatch.setattr(TensorRtRtxEngine, "_load_library", staticmethod(lambda index: Api(module, RTX4090)))
    monkeypatch.setattr(tensorrt_engine, "open_memory", lambda backend, index: StubMemory(stub_driver))
    (tmp_path / "a.plan").write_bytes(plan())
    for process in range(2):
        engine = TensorRtRtxEngine(tmp_path / "a.plan", EngineOptions(cuda_graphs=graphs), precision="fp16")
        assert (engine.name, engine.version, engine.gpu) == ("tensorrt-rtx", "1.7.1.116", RTX4090)
        for batch, keep in ((2, 3), (2, 3), (1, 7)):
            check(engine.run(inputs(batch, keep)), inputs(batch, keep))
        if process == 0:
            kept = list((tmp_path / "cache").rglob("*-kernels"))
            assert [path.read_bytes() for path in kept] == ([b"kernel"] if graphs else []), (
                "a killed service keeps them"
            )
        engine.close()
        assert len(list((tmp_path / "cache").rglob("*-kernels"))) == 1
    assert module.kernels == ["compiled"], "by the first process alone"


def test_an_output_is_the_callers_own(load: Load) -> None:
    with load() as engine:
        first = engine.run(inputs(seed=0))
        second = engine.run(inputs(seed=1))
        check(first, inputs(seed=0))
        check(second, inputs(seed=1))


def test_a_graph_is_captured_after_the_first_run_and_launched_from_then_on(
    load: Load, stub_driver: ctypes.CDLL
) -> None:
    with load() as engine:
        calls(stub_driver)
        copies, results = ["in", "in", "wait"], ["record", "out", "out", "synchronize"]
        engine.run(inputs())
        assert calls(stub_driver) == ["wait", "profile", *copies, "synchronize", "capture", *results]
        for _ in range(3):
            engine.run(inputs())
            assert calls(stub_driver) == [*copies, "launch", *results], "and nothing is allocated"
        engine.run(inputs(), "cls")
        assert calls(stub_driver) == [*copies, "launch", "record", "out", "synchronize"]
        engine.run(inputs(keep=5))
        assert "capture" in calls(stub_driver), "another shape is another graph"


def test_without_graphs_every_run_is_enqueued(load: Load, stub_driver: ctypes.CDLL) -> None:
    with load(graphs=False) as engine:
        engine.run(inputs())
        calls(stub_driver)
        for _ in range(3):
            engine.run(inputs())
            assert calls(stub_driver) == ["in", "in", "wait", "record", "out", "out", "synchronize"]


def test_shapes_beyond_those_that_get_a_graph(
    load: Load, stub_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_runner, "MOST_CONTEXTS", 2)
    with load() as engine:
        for _ in range(2):
            for keep in range(1, 8):
                check(engine.run(inputs(keep=keep)), inputs(keep=keep))
        assert calls(stub_driver).count("capture") == 2, "what comes back after many others takes no one's place"
        made = stub_driver.stub_made()
        for keep in (5, 1, 4, 2):
            check(engine.run(inputs(keep=keep)), inputs(keep=keep))
        assert stub_driver.stub_made() == made
        assert calls(stub_driver).count("launch") == 2


def test_a_shape_that_comes_back_takes_the_place_of_what_was_not_used_for_longest(
    load: Load, stub_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_runner, "MOST_CONTEXTS", 2)

    def replays(engine: TensorRtEngine, keep: int) -> bool:
        calls(stub_driver)
        check(engine.run(inputs(keep=keep)), inputs(keep=keep))
        return "launch" in calls(stub_driver)

    with load() as engine:
        for keep in (1, 2, 1):
            engine.run(inputs(keep=keep))
        live = stub_driver.stub_live()
        assert [replays(engine, 5) for _ in range(4)] == [False, False, True, True], "shared, then captured"
        assert stub_driver.stub_live() == live, "a graph for a graph"
        assert (replays(engine, 1), replays(engine, 2)) == (True, False)


def test_what_cannot_be_captured_runs_without_a_graph(
    load: Load, stub_driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(stream: int, enqueue: Callable[[], None]) -> None:
        raise CudaError("not this one")

    monkeypatch.setattr(CudaGraph, "capture", refuse)
    with load() as engine, caplog.at_level(logging.WARNING):
        for _ in range(3):
            check(engine.run(inputs()), inputs())
    assert [record.getMessage() for record in caplog.records] == ["TensorRT runs without a CUDA graph: not this one"]
    assert "launch" not in calls(stub_driver)


# --- shapes and types ------------------------------------------------------------------------------------------------


TWO_PROFILES = ({"B": (1, 8, 32), "K": (20, 49, 196)}, {"B": (1, 1, 1), "K": (49, 49, 49)})


@pytest.mark.parametrize(("batch", "keep", "index"), [(1, 49, 1), (1, 48, 0), (2, 49, 0), (32, 196, 0)])
def test_the_smallest_profile_that_fits_is_chosen(load: Load, batch: int, keep: int, index: int) -> None:
    with load(plan(*TWO_PROFILES)) as engine:
        engine.run(inputs(batch, keep))
        (context,) = [weak.context for weak in engine._runner._api.module.contexts if weak.context is not None]
        assert context.profile == index


def test_a_shape_that_no_profile_covers(load: Load, stub_driver: ctypes.CDLL) -> None:
    with load(plan(*TWO_PROFILES)) as engine:
        with pytest.raises(ConfigError) as caught:
            engine.run(inputs(33, 49))
        assert (
            str(caught.value)
            == "this engine takes no images (33, 3, 2, 5), ids_keep (33, 49); it takes images (1, 3, 2, 5) to (32, 3,"
            " 2, 5), ids_keep (1, 20) to (32, 196); or images (1, 3, 2, 5), ids_keep (1, 49)"
        )
        assert "--profile" in (caught.value.hint or "")
        check(engine.run(inputs(32, 49)), inputs(32, 49))
        with pytest.raises(ConfigError, match="this engine takes no images"):
            engine.run({**inputs(2, 49), "images": np.zeros((2, C, H), np.float32)})
    assert stub_driver.stub_depth() == 0


def test_a_plan_of_fixed_shapes(load: Load) -> None:
    with load(plan({"B": (2, 2, 2), "K": (3, 3, 3)}, batch=2, keep=3)) as engine:
        check(engine.run(inputs()), inputs())
        assert (
            engine._runner.profiles[0].least
            == engine._runner.profiles[0].most
            == {"images": (2, C, H, W), "ids_keep": (2, 3)}
        )
        with pytest.raises(ConfigError, match=r"it takes images \(2, 3, 2, 5\), ids_keep \(2, 3\)$"):
            engine.run(inputs(1))


@pytest.mark.parametrize(
    ("value", "fits"), [(2**31 - 1, True), (-(2**31), True), (2**31, False), (-(2**31) - 1, False)]
)
def test_int64_indices_for_an_engine_that_takes_int32(load: Load, value: int, fits: bool) -> None:
    given = inputs()
    given["ids_keep"][1, 2] = value
    with load(plan(ids="INT32"), version="8.6.0") as engine:
        if fits:
            check(engine.run(given), given)
        else:
            with pytest.raises(
                ConfigError, match=rf"the input ids_keep has numbers from .*{value}.*, the engine takes int32"
            ):
                engine.run(given)


def test_another_type(load: Load) -> None:
    with load() as engine:
        with pytest.raises(ConfigError, match="the input images is float64, the engine takes float32"):
            engine.run({**inputs(), "images": inputs()["images"].astype(np.float64)})
        with pytest.raises(ConfigError, match="the input ids_keep is float64, the engine takes int64"):
            engine.run({**inputs(), "ids_keep": np.zeros((2, 3))})
        given = {**inputs(), "ids_keep": inputs()["ids_keep"].astype(np.uint8)}
        check(engine.run(given), given)
        given = {**inputs(), "images": inputs()["images"].transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2)}
        check(engine.run(given), given)
        with pytest.raises(ConfigError, match="the graph takes the inputs images, ids_keep, not images"):
            engine.submit({"images": inputs()["images"]})
        with pytest.raises(ConfigError, match="no output 'logits'"):
            engine.run_on_device(inputs(), ["logits"])


def test_bf16_comes_as_float32(load: Load) -> None:
    with load(plan(tokens="BF16")) as engine:
        found, expected = engine.run(inputs())["tokens"], reference(**inputs())["tokens"]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=2**-7)  # eight bits of mantissa, cut off
        assert np.abs(found - expected).max() > 0
        with pytest.raises(ConfigError, match="BF16 cannot stay on the GPU"):
            engine.run_on_device(inputs())
        assert list(engine.run_on_device(inputs(), ["cls"])) == ["cls"]


def test_a_type_that_numpy_has_not(load: Load, stub_driver: ctypes.CDLL) -> None:
    before = stub_driver.stub_live()
    with pytest.raises(MaeDeployError, match="NumPy has no type for TensorRT's FP8"):
        load(plan(tokens="FP8"))
    assert stub_driver.stub_live() == before


# --- two in flight ---------------------------------------------------------------------------------------------------


def test_two_runs_in_flight_and_a_third_that_waits_for_the_first(load: Load, stub_driver: ctypes.CDLL) -> None:
    with load() as engine:
        for ticket in [engine.submit(inputs()) for _ in range(2)]:
            ticket.result()
        calls(stub_driver)
        tickets = [engine.submit(inputs(seed=seed)) for seed in range(2)]
        assert "synchronize" not in calls(stub_driver)
        tickets.append(engine.submit(inputs(seed=2)))
        assert calls(stub_driver).count("synchronize") == 1
        for seed in (2, 0, 1, 0):
            check(tickets[seed].result(), inputs(seed=seed))
            assert tickets[seed].result() is tickets[seed].result()


def test_of_many_images_two_parts_are_in_flight(load: Load, stub_driver: ctypes.CDLL) -> None:
    with load(profiles=[{"B": (1, 2, 4), "K": (1, 3, 7)}]) as engine:
        given = inputs(12)
        for _ in range(2):  # both slots have their graph then
            check(run_in_chunks(engine, given, batch=None), given)
        calls(stub_driver)
        check(run_in_chunks(engine, given, batch=None), given)
        order = [call for call in calls(stub_driver) if call in ("launch", "synchronize")]
        assert order == ["launch", "launch", "synchronize", "launch", "synchronize", "synchronize"]


def test_one_caller_stays_in_one_slot(load: Load, stub_driver: ctypes.CDLL) -> None:
    with load() as engine:
        for _ in range(3):
            engine.run(inputs())
        assert calls(stub_driver).count("capture") == 1


def test_what_computes_waits_for_the_other_slot(load: Load, stub_driver: ctypes.CDLL) -> None:
    with load() as engine:
        first = [engine.submit(inputs(seed=seed)) for seed in range(2)]
        calls(stub_driver)
        second = [engine.submit(inputs(seed=seed)) for seed in range(2)]
        asked = calls(stub_driver)
        assert asked.count("wait") == asked.count("launch") == asked.count("record") == 2
        assert [call for call in asked if call in ("wait", "launch", "record")] == ["wait", "launch", "record"] * 2
        for ticket in (*first, *second):
            ticket.result()


def test_threads(load: Load) -> None:
    with load() as engine:
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for step in range(20):
                    given = inputs(1 + seed % 4, 1 + (seed + step) % 7, 100 * seed + step)
                    check(engine.run(given), given)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


def test_a_run_that_fails_on_the_gpu_fails_where_its_result_is_taken(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load() as engine:
        engine.run(inputs())
        ticket = engine.submit(inputs())
        slot = ticket._slot

        def fail() -> None:
            raise CudaError("an illegal address")

        with monkeypatch.context() as patch:
            patch.setattr(slot.stream, "synchronize", fail)
            others = [engine.submit(inputs(seed=seed)) for seed in (1, 2)]
        with pytest.raises(CudaError, match="an illegal address"):
            ticket.result()
        for seed, other in enumerate(others, 1):
            check(other.result(), inputs(seed=seed))


def test_a_run_that_tensorrt_refuses(load: Load) -> None:
    with load(graphs=False) as engine:
        engine.run(inputs())
        (context,) = [weak.context for weak in engine._runner._api.module.contexts if weak.context is not None]
        context.fails = True
        engine._runner._api.said.add("ERROR", "a kernel is missing")
        with pytest.raises(MaeDeployError, match=r"TensorRT 10\.3\.0 cannot run this engine: a kernel is missing"):
            engine.run(inputs())
        context.fails = False
        check(engine.run(inputs()), inputs())


def test_shapes_that_tensorrt_cannot_infer(load: Load) -> None:
    with load() as engine:
        engine._runner._api.module.infer_error = "infer_shapes failed"
        with pytest.raises(MaeDeployError, match=r"cannot tell the shapes of the outputs for images \(2, 3, 2, 5\)"):
            engine.run(inputs())
        engine._runner._api.module.infer_error = None
        check(engine.run(inputs()), inputs())


def test_a_profile_is_chosen_after_the_run_in_the_other_slot(load: Load, stub_driver: ctypes.CDLL) -> None:
    """All contexts have the same memory, into which the choice may copy."""
    with load() as engine:
        first = engine.submit(inputs())
        calls(stub_driver)
        second = engine.submit(inputs(keep=5))
        asked = calls(stub_driver)
        assert asked.index("wait") < asked.index("profile") < asked.index("in")
        check(first.result(), inputs())
        check(second.result(), inputs(keep=5))


def test_profiles_that_contexts_cannot_share(load: Load) -> None:
    with load(version="8.6.0", shared_profiles=False) as engine:
        engine.run(inputs())
        with pytest.raises(MaeDeployError, match="cannot use profile 0 in another context") as caught:
            engine.run(inputs(keep=4))
        assert "build-engine" in (caught.value.hint or "")


# --- its speed --------------------------------------------------------------------------------------------------------


def test_a_timer_replays_what_lies_on_the_gpu(load: Load, stub_driver: ctypes.CDLL) -> None:
    with load(plan(microseconds=700)) as engine:
        timer = engine.timer(inputs(), replays=3)
        calls(stub_driver)
        stub_driver.stub_copies_take(9000)
        assert timer() == pytest.approx(700e-6)  # the driver gives milliseconds as FP32
        assert calls(stub_driver) == ["record", "launch", "launch", "launch", "record", "synchronize"], "nothing copied"
        stub_driver.stub_copies_take(0)
        check(engine.run(inputs(seed=1)), inputs(seed=1))
    with pytest.raises(MaeDeployError, match="this engine is closed"):
        timer()
    with load(graphs=False) as engine:
        timer = engine.timer(inputs(), replays=2)
        calls(stub_driver)
        timer()
        assert "launch" not in calls(stub_driver)
        with pytest.raises(ConfigError, match="the graph takes the inputs images, ids_keep, not images"):
            engine.timer({"images": inputs()["images"]}, replays=2)


# --- on the GPU ------------------------------------------------------------------------------------------------------


class OnDevice:
    """An array on the stub's GPU, which is the host, as another library shows it."""

    def __init__(self, array: Any, **more: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "version": 3,
            **more,
        }


def read(array: Any) -> Any:
    interface = array.__cuda_array_interface__
    assert interface["strides"] is None
    size = int(np.prod(interface["shape"])) * np.dtype(interface["typestr"]).itemsize
    return (
        np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(interface["data"][0]))
        .view(interface["typestr"])
        .reshape(interface["shape"])
    )


def test_arrays_on_the_gpu(load: Load, stub_driver: ctypes.CDLL) -> None:
    given = inputs()
    with load() as engine:
        on_device = {name: OnDevice(array) for name, array in given.items()}
        check(engine.run(on_device), given)
        check(engine.run({**given, "images": on_device["images"]}), given)
        calls(stub_driver)
        found = engine.run_on_device(on_device)
        assert calls(stub_driver) == ["device", "device", "wait", "launch", "record", "synchronize"]
        check({name: read(array) for name, array in found.items()}, given)
        assert [
            (array.shape, array.dtype.str, array.nbytes, array.__dlpack_device__()) for array in found.values()
        ] == [
            ((2, C), "<f4", 8 * C, (2, 0)),
            ((2, 3, C), "<f4", 24 * C, (2, 0)),
        ]


@pytest.mark.parametrize(("stream", "waits"), [({}, 0), ({"stream": None}, 0), ({"stream": 1}, 1), ({"version": 2}, 1)])
def test_what_fills_an_input_is_waited_for(
    load: Load, stub_driver: ctypes.CDLL, stream: dict[str, Any], waits: int
) -> None:
    with load() as engine:
        engine.run(inputs())
        calls(stub_driver)
        engine.run({**inputs(), "images": OnDevice(inputs()["images"], **stream)})
        assert calls(stub_driver).count("wait") == 1 + waits


def test_a_stream_waits_for_a_run_in_the_callers_place(load: Load, stub_driver: ctypes.CDLL) -> None:
    with StubMemory(stub_driver) as mine, load() as engine, mine.active():
        stream, other = mine.stream().handle, mine.stream().handle
        for _ in range(2):
            engine.run_on_device(inputs(), stream=stream)
        found = []
        for seed in range(2):
            calls(stub_driver)
            found.append(engine.run_on_device(inputs(seed=seed), ["cls"], stream=stream)["cls"])
            after, between, before = ["record", "wait"], ["in", "in", "wait", "launch", "record"], ["record", "wait"]
            assert calls(stub_driver) == ["synchronize", *after, *between, *before], "only for the run before the last"
        for seed, array in enumerate(found):
            assert array.__cuda_array_interface__["stream"] == stream
            np.testing.assert_array_equal(read(array), reference(**inputs(seed=seed))["cls"])
        calls(stub_driver)
        found[1].__dlpack__(stream=stream)
        found[1].__dlpack__(stream=-1)
        assert calls(stub_driver) == []
        for waiting in (other, None):
            found[1].__dlpack__(stream=waiting)
            assert calls(stub_driver) == ["record", "wait"]
        engine.run_on_device(inputs(), stream=stream)
        with pytest.raises(MaeDeployError, match="this output is gone"):
            _ = found[0].pointer
        check(engine.run(inputs(seed=3)), inputs(seed=3))


def test_inputs_of_a_run_that_a_stream_waits_for_are_kept_until_it_is_done(
    load: Load, stub_driver: ctypes.CDLL
) -> None:
    with StubMemory(stub_driver) as mine, load() as engine, mine.active():
        given = {name: OnDevice(array) for name, array in inputs().items()}
        alive = weakref.ref(given["images"])
        output = engine.run_on_device(given, stream=mine.stream().handle)["cls"]
        del given
        assert alive() is not None
        for _ in range(2):
            engine.run_on_device(inputs(), stream=mine.stream().handle)
        assert alive() is None
        with pytest.raises(MaeDeployError, match="this output is gone"):
            _ = output.pointer


def test_an_output_on_the_gpu_outlives_the_next_run(load: Load) -> None:
    with load() as engine:
        first = engine.run_on_device(inputs(seed=1))["cls"]
        second = engine.run_on_device(inputs(seed=2))["cls"]
        np.testing.assert_array_equal(read(first), reference(**inputs(seed=1))["cls"])
        np.testing.assert_array_equal(read(second), reference(**inputs(seed=2))["cls"])
        engine.run(inputs())
        with pytest.raises(MaeDeployError, match="this output is gone: a later run has used its memory"):
            _ = first.__cuda_array_interface__
        assert second.pointer
    with pytest.raises(MaeDeployError, match="or the engine is closed"):
        second.__dlpack__()


def test_an_output_on_the_gpu_outlives_runs_that_leave_it_alone(load: Load) -> None:
    with load() as engine:
        first = engine.run_on_device(inputs(seed=1))["cls"]
        for _ in range(5):
            engine.run(inputs())
        np.testing.assert_array_equal(read(first), reference(**inputs(seed=1))["cls"])
        tickets = [engine.submit(inputs()) for _ in range(2)]
        with pytest.raises(MaeDeployError, match="this output is gone"):
            _ = first.pointer
        for ticket in tickets:
            check(ticket.result(), inputs())


def test_an_output_on_the_gpu_keeps_the_engine(load: Load, stub_driver: ctypes.CDLL) -> None:
    before = stub_driver.stub_live()
    engine = load()
    output = engine.run_on_device(inputs())["cls"]
    del engine
    np.testing.assert_array_equal(read(output), reference(**inputs())["cls"])
    del output
    assert stub_driver.stub_live() == before


def test_arrays_on_the_gpu_that_cannot_be_taken(load: Load) -> None:
    with load(plan(ids="INT32")) as engine:
        with pytest.raises(ConfigError, match="the input ids_keep on the GPU is int64, the engine takes int32"):
            engine.run({**inputs(), "ids_keep": OnDevice(inputs()["ids_keep"])})
        images = inputs()["images"]
        with pytest.raises(ConfigError, match=r"the input images of shape \(2, 3, 2, 5\) lies on the GPU with strides"):
            engine.run({**inputs(), "images": OnDevice(images, strides=(240, 40, 20, 4))})


# --- loading and closing ---------------------------------------------------------------------------------------------


def test_everything_is_given_back(load: Load, stub_driver: ctypes.CDLL) -> None:
    before = stub_driver.stub_live()
    engine = load()
    for keep in (1, 2):
        tickets = [engine.submit(inputs(keep=keep, seed=seed)) for seed in range(2)]
    contexts = engine._runner._api.module.contexts
    assert stub_driver.stub_live() > before
    engine.close()
    engine.close()
    assert stub_driver.stub_live() == before
    assert all(weak.context is None for weak in contexts)
    check(tickets[1].result(), inputs(keep=2, seed=1))
    with pytest.raises(MaeDeployError, match="this engine is closed"):
        engine.run(inputs())
    assert stub_driver.stub_depth() == 0


def test_an_engine_that_is_forgotten_is_closed(load: Load, stub_driver: ctypes.CDLL) -> None:
    before = stub_driver.stub_live()
    engine = load()
    ticket = engine.submit(inputs())
    del engine
    check(ticket.result(), inputs())
    assert stub_driver.stub_live() > before, "who holds a ticket keeps the engine"
    del ticket
    assert stub_driver.stub_live() == before


@pytest.mark.skipif(sys.platform == "win32", reason="nothing forks there")
def test_a_forked_process_leaves_the_gpu_alone(load: Load, stub_driver: ctypes.CDLL) -> None:
    """Its end included, where what is left open is closed."""
    engine = load()
    calls(stub_driver)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            engine.close()
            with pytest.raises(MaeDeployError, match="loaded in another process: load after the fork"):
                engine.run(inputs())
            assert not engine._closer.alive
            assert calls(stub_driver) == []
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    check(engine.run(inputs()), inputs())
    engine.close()


def test_a_plan_that_tensorrt_refuses(load: Load, stub_driver: ctypes.CDLL) -> None:
    before = stub_driver.stub_live()
    with pytest.raises(
        MaeDeployError, match=r"TensorRT 10\.3\.0 cannot load this engine: the plan is not one of ours"
    ) as caught:
        load(b"no plan")
    assert "build-engine" in (caught.value.hint or "")
    assert (stub_driver.stub_live(), stub_driver.stub_depth()) == (before, 0)


def test_too_little_memory(load: Load, stub_driver: ctypes.CDLL) -> None:
    before = stub_driver.stub_live()
    stub_driver.stub_limit(900)
    with pytest.raises(CudaError):
        load()
    assert (stub_driver.stub_live(), stub_driver.stub_depth()) == (before, 0)


def test_taps_are_outputs_of_the_plan(load: Load, stub_driver: ctypes.CDLL) -> None:
    before = stub_driver.stub_live()
    with load(taps=["tokens"]) as engine:
        assert engine.output_names == ("cls", "tokens")
    with pytest.raises(MaeDeployError, match="has no output block_3"):
        load(taps=["block_3"])
    assert stub_driver.stub_live() == before


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x"])
def test_an_unknown_device(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown device '{device}'"):
        TensorRtEngine(tmp_path / "a.plan", EngineOptions(device=device))


@pytest.mark.usefixtures("stub_driver")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="there is no GPU 3"):
        TensorRtEngine(tmp_path / "a.plan", EngineOptions(device="cuda:3"))


LEFT_OPEN = """
import atexit, ctypes, sys, threading
from pathlib import Path
driver = ctypes.CDLL("libcuda.so.1")
atexit.register(lambda: print(driver.stub_live(), driver.stub_depth()))
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.engine import TensorRtEngine, TensorRtRtxEngine
from tests.runtime.tensorrt.fake_tensorrt import make_tensorrt
from tests.runtime.tensorrt.test_engine import check, inputs
sys.modules["tensorrt"] = make_tensorrt(driver)
engine = TensorRtEngine(Path(sys.argv[1]), EngineOptions(cuda_memory=sys.argv[2]))
def work(seed):
    for step in range(9):
        given = inputs(1 + seed, 1 + step % 3, step)
        check(engine.run(given), given)
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
ticket, output = engine.submit(inputs()), engine.run_on_device(inputs())["cls"]
print(driver.stub_live() > 20, driver.stub_depth())
"""


def test_an_engine_left_open_is_closed_before_the_interpreter_ends(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    compile_stub(tmp_path, soname=NAME)
    (tmp_path / "a.plan").write_bytes(plan())
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "CUDA_STUB_DEVICES": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    command = [sys.executable, "-c", LEFT_OPEN, str(tmp_path / "a.plan"), "cuda-bindings"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True 0\n0 0\n", "")
