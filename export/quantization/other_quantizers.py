"""The quantisers of others, on our FP32 graph and our calibration images: ONNX Runtime's, NNCF's and NVIDIA's ModelOpt.
They quantise the same Linears as ours does, in their own way, and what they give goes through the same checks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from mae_deploy.errors import import_optional
from mae_deploy.export.graph.builder import INLINE_LIMIT, GraphBuilder
from mae_deploy.export.job import ExportJob
from mae_deploy.export.trials import Arrays
from mae_deploy.files import temporary_folder
from mae_deploy.runtime.manifest import TensorEntry

_METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
"""ONNX Runtime's names of `--calib-method`."""

_PRODUCTS = ("Gemm", "MatMul")

_PACKAGES = {"modelopt": "nvidia-modelopt"}
"""Those that are called otherwise than what they are imported as."""


@dataclass(frozen=True)
class OtherGraph:
    """What a `GraphBuilder` would save, had it quantised like that."""

    model: onnx.ModelProto
    builder: GraphBuilder
    """Of the FP32 graph, which has the same inputs and outputs."""

    @property
    def opset(self) -> int:
        """Of ONNX's own operators."""
        return int(next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")))

    def inputs(self) -> list[TensorEntry]:
        """The inputs as a manifest records them."""
        return self.builder.inputs()

    def outputs(self) -> list[TensorEntry]:
        """The outputs as a manifest records them."""
        return self.builder.outputs()

    def save(self, path: Path) -> list[Path]:
        """Write the graph; returns the files written (the graph, and its weights where they are large)."""
        large = self.model.ByteSize() > INLINE_LIMIT
        data = path.with_name(f"{path.name}.data")
        onnx.save_model(
            onnx.ModelProto.FromString(self.model.SerializeToString()) if large else self.model,
            path,
            save_as_external_data=large,
            location=data.name,
        )
        return [path, data] if large else [path]


def quantize_elsewhere(job: ExportJob, names: list[str]) -> OtherGraph:
    """The Linears of these names in INT8.

    Raises:
        MissingDependency: the quantiser's package is absent.
        ConfigError: too few calibration images that can be read.
    """
    builder = job.in_precision("fp32").graph()
    with temporary_folder() as folder, _quiet():
        graph = folder / "fp32.onnx"
        builder.save(graph)
        quantize = {"onnxruntime": _onnxruntime, "nncf": _nncf, "modelopt": _modelopt}[job.config.int8.quantizer]
        return OtherGraph(quantize(job, graph, names), builder)


def input_scales(graph: OtherGraph, names: list[str]) -> dict[str, float | None]:
    """For each Linear that was quantised the scale of its input; None for a range found at run time."""
    model = graph.model.graph
    constants = {tensor.name: tensor for tensor in model.initializer}
    makers = {output: node for node in model.node for output in node.output}
    found: dict[str, float | None] = {}
    for node in model.node:
        name = node.name.rpartition("/")[0]
        if name not in names or name in found:
            continue
        maker = makers.get(node.input[0]) if node.op_type in _PRODUCTS else None
        if maker is not None and maker.op_type == "DequantizeLinear":
            found[name] = float(np.max(numpy_helper.to_array(constants[maker.input[1]])))
        elif node.op_type == "MatMulInteger":
            found[name] = None
    return {name: found[name] for name in names if name in found}


def facts_of(job: ExportJob) -> dict[str, Any]:
    """Who quantised and how, for the manifest."""
    int8, images = job.config.int8, job.calib_images
    facts: dict[str, Any] = {
        "quantizer": int8.quantizer,
        "quantizer_version": version(_PACKAGES.get(int8.quantizer, int8.quantizer)),
        "policy": job.config.policy,
        "smooth_alpha": int8.smooth_alpha if int8.quantizer == "nncf" and int8.smooth_quant else None,
        "weight_bits": int8.weight_bits,
    }
    if job.config.policy == "static" and images is not None:
        facts["calibration"] = {"method": _method(job), "num_images": len(images), "images_sha256": images.sha256}
    return facts


def _onnxruntime(job: ExportJob, graph: Path, names: list[str]) -> onnx.ModelProto:
    quantization = import_optional("onnxruntime.quantization", extra="train")
    int8, out = job.config.int8, graph.with_name("int8.onnx")
    nodes = _products(graph, names)
    common: dict[str, Any] = {"per_channel": True, "reduce_range": int8.weight_bits == 7}
    options = {"WeightSymmetric": True, "MatMulConstBOnly": True}
    if job.config.policy == "dynamic":  # it turns a Gemm into a MatMul of this name first
        nodes += [f"{node}_MatMul" for node in nodes]
        quantization.quantize_dynamic(graph, out, nodes_to_quantize=nodes, extra_options=options, **common)
        return onnx.load(out)

    quantization.quantize_static(
        graph,
        out,
        _reader(job),
        nodes_to_quantize=nodes,
        calibrate_method=quantization.CalibrationMethod[_METHODS[_method(job)]],
        extra_options={
            **options,
            "ActivationSymmetric": True,
            "OpTypesToExcludeOutputQuantization": list(_PRODUCTS),
            **({"CalibPercentile": int8.calib_percentile} if _method(job) == "percentile" else {}),
        },
        **common,
    )
    return onnx.load(out)


def _nncf(job: ExportJob, graph: Path, names: list[str]) -> onnx.ModelProto:
    nncf = import_optional("nncf", extra="nncf")
    ranges, int8 = import_optional("nncf.quantization.range_estimator", extra="nncf"), job.config.int8
    nncf.set_log_level(logging.ERROR)
    model = onnx.load(graph)
    ours = set(_products(graph, names))
    batches = list(_batches(job))
    quantized: onnx.ModelProto = nncf.quantize(
        model,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.PERFORMANCE,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=ranges.RangeEstimatorParametersSet.MINMAX,
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(
                matmul=int8.smooth_alpha if int8.smooth_quant else -1
            ),
        ),
        ignored_scope=nncf.IgnoredScope(names=[node.name for node in model.graph.node if node.name not in ours]),
    )
    # By (1, D) OpenVINO 2026.4 multiplies all channels with the first one's scale where its passes for low precision
    # are off, as on a CPU without VNNI: 13 dB where by (D,) there are 48.
    for tensor in quantized.graph.initializer:
        if tensor.name.endswith("nncf_smooth_quant_scale"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).ravel(), tensor.name))
    return quantized


def _modelopt(job: ExportJob, graph: Path, names: list[str]) -> onnx.ModelProto:
    quantization, out = import_optional("modelopt.onnx.quantization", extra="modelopt"), graph.with_name("int8.onnx")
    quantization.quantize(
        str(graph),
        quantize_mode="int8",
        calibration_data_reader=_reader(job),
        calibration_method="entropy" if _method(job) == "entropy" else "max",
        calibration_eps=["cpu"],
        nodes_to_quantize=[f"^{re.escape(name)}$" for name in _products(graph, names)],
        output_path=str(out),
        log_level="ERROR",
        high_precision_dtype="fp32",
    )
    return onnx.load(out)


def _method(job: ExportJob) -> str:
    """How ranges are chosen: mse is ours, others take the largest magnitude in its place."""
    return "minmax" if job.config.int8.calib_method == "mse" else job.config.int8.calib_method


def _products(graph: Path, names: list[str]) -> list[str]:
    """The nodes in which these Linears are multiplied."""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    return [node.name for node in nodes if node.op_type in _PRODUCTS and node.name.rpartition("/")[0] in names]


def _reader(job: ExportJob) -> Any:
    """The calibration images as ONNX Runtime's quantiser, and ModelOpt's, which is made of it, ask for them."""
    base: Any = import_optional("onnxruntime.quantization", extra="train").CalibrationDataReader

    class Reader(base):  # type: ignore[misc]
        """One batch at a time."""

        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self._batches = _batches(job)

        def get_first(self) -> Arrays:
            return next(_batches(job))

        def get_next(self) -> Arrays | None:
            return next(self._batches, None)

    return Reader()


def _batches(job: ExportJob) -> Iterator[Arrays]:
    """The calibration images as the graph takes them, with the patches of the samples."""
    assert job.calib_images is not None
    for _, pixels in job.calib_images.batches():
        size = job.config.fixed_batch or len(pixels)
        for first in range(0, len(pixels), size):
            yield job.graph_inputs(pixels[np.arange(first, first + size) % len(pixels)])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries say of themselves on the way, and without the handler that they leave behind."""
    before, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):  # NNCF draws its progress where --json prints
            yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers
