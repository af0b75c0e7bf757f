"""DeepStream's files for a TensorRT plan of a bundle: nvinfer runs it, nvdspreprocess cuts out what the model was
trained to see.

https://docs.nvidia.com/metropolis/deepstream/dev-guide/text/DS_plugin_gst-nvinfer.html
https://docs.nvidia.com/metropolis/deepstream/dev-guide/text/DS_plugin_gst-nvdspreprocess.html
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from mae_deploy.errors import ConfigError
from mae_deploy.files import atomic_path, refuse_to_overwrite
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.progress import notice
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.manifest import CLASS_OUTPUTS, IMAGES, EngineEntry

INFER_FILE = "config_infer.txt"
PREPROCESS_FILE = "config_preprocess.txt"
PLAN_FILE = "model.plan"
LABELS = "labels.txt"

FRAME = (1080, 1920)
"""Height and width of the frames for which the crop is written."""

_COLOUR_FORMATS = {1: 2, 3: 0}
"""Number of channels: GRAY, RGB."""

_FILTERS = {"nearest": 0, "bilinear": 1, "bicubic": 2, "lanczos": 4}

_CUSTOM_LIBRARY = "/opt/nvidia/deepstream/deepstream/lib/gst-plugins/libcustom2d_preprocess.so"

_CENTRE_NOTE = f"""\
# nvinfer alone squeezes the whole frame into the input. The model was trained on the centre of the image: for what it
# saw, put nvdspreprocess with {PREPROCESS_FILE} in front, and set input-tensor-meta=1 on nvinfer.
"""

_WHOLE_NOTE = f"""\
# The model was trained on the whole image ({{crop_mode}}), and nvinfer alone gives it the whole frame.
# nvdspreprocess with {PREPROCESS_FILE} does the same; it is needed for regions of a frame only.
"""

_UNSURE = """\
# nvinfer takes the output for probabilities: where all logits are below 0, it names no class. Export with
# --outputs probs.
"""

_FRAME_NOTE = """\
# What the model was trained to see of frames of {width} x {height} pixels (those that leave nvstreammux):
# left;top;width;height of each source.
"""


def write_deepstream(bundle: Bundle, folder: Path, engine: EngineEntry) -> Path:
    """Write a plan, configurations and labels to a folder, and return it.

    Raises:
        ConfigError: something is there, or DeepStream cannot feed this plan what it was checked on.
        CheckFailed: the plan is not the file that the manifest lists.
    """
    refuse_to_overwrite(folder, option="--deepstream")
    check_bundle(bundle)
    if engine["stripped"]:
        raise _refusal(f"{engine['file']} was built without its weights", hint="build it without --strip")
    if engine["version_compatible"]:
        raise _refusal(
            "nvinfer does not load engines with code for the CPU, as version-compatible ones are",
            hint="build it without --version-compatible",
        )
    if engine["profiles"][0]["B"][0] > 1:
        smallest = engine["profiles"][0]["B"][0]
        raise _refusal(
            f"a stream's last batch is smaller than the engine's smallest, {smallest}",
            hint="build it with a profile that starts at B 1",
        )
    with atomic_path(folder) as aside:
        aside.mkdir()
        shutil.copyfile(bundle.file(engine["file"]), aside / PLAN_FILE)
        (aside / INFER_FILE).write_text(_infer(bundle, engine), encoding="utf-8")
        (aside / PREPROCESS_FILE).write_text(_preprocess(bundle, engine), encoding="utf-8")
        if bundle.class_names and bundle.class_output is not None:
            (aside / LABELS).write_text(";".join(bundle.class_names) + "\n", encoding="utf-8")
    return folder


def check_bundle(bundle: Bundle) -> None:
    """Refuse a bundle of which no plan can be fed; see `check_feeding`.

    Raises:
        ConfigError: why, and what to do.
    """
    check_feeding(bundle.token_mode, bundle.image_dtype, bundle.preprocess, bundle.class_names)


def check_feeding(token_mode: str, images: str, spec: Preprocess, class_names: Sequence[str] | None) -> None:
    """Refuse what nvinfer and nvdspreprocess cannot feed exactly: they write FP32,
    `factor * (pixel - the channel's offset)`, to the only input.

    Args:
        images: type of the graph's images.

    Raises:
        ConfigError: why, and what to do.
    """
    if token_mode != "full":
        raise _refusal(
            f"it feeds images only, and --tokens {token_mode} has other inputs", hint="export with --tokens full"
        )
    if images != "float32":
        raise _refusal(
            f"it writes float32 (B, C, H, W), and the images are {images}", hint="export with --images float32"
        )
    if spec.pixel_max is not None:
        raise _refusal(
            f"its pixels have 8 bits, and the model's are divided by {spec.pixel_max:g}",
            hint="it takes models without --pixel-max",
        )
    if spec.crop_mode == "border":
        raise _refusal(
            "it pads with black, and crop mode border with the mean colour",
            hint="export with --crop-mode letterbox, and check its accuracy",
        )
    if spec.interpolation not in _FILTERS:
        raise _refusal(f"it has no {spec.interpolation} filter", hint=f"its filters are {', '.join(_FILTERS)}")
    if spec.channels not in _COLOUR_FORMATS:
        raise _refusal(f"it has no format of {spec.channels} channels", hint="it takes images of 1 or 3 channels")
    if len(set(spec.std)) > 1:
        deviations = ", ".join(f"{value:g}" for value in spec.std)
        hint = "export with --one-std: the weights take up the difference"
        raise _refusal(f"it has one scale for all channels, and the standard deviations are {deviations}", hint=hint)
    if spoilt := [name for name in class_names or () if set(name) & set(";\n\r")]:
        raise _refusal(
            f"its label files hold no semicolons and no line breaks, and the class {spoilt[0]!r} does",
            hint="rename the class",
        )


def net_scale_factor(preprocess: Preprocess) -> float:
    """What the differences of pixels from 0 to 255 are multiplied with:
    `(x / 255 - mean) / std = (x - 255 mean) / (255 std)`.
    """
    return 1 / (255 * preprocess.std[0])


def offsets(preprocess: Preprocess) -> list[float]:
    """What is subtracted from the pixels of each channel."""
    return [255 * mean for mean in preprocess.mean]


def seen(preprocess: Preprocess, frame: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height in a frame (height, width) of what `Preprocess.crop` keeps of it."""
    if preprocess.crop_mode == "letterbox":
        return 0, 0, frame[1], frame[0]
    covered = [int(side / preprocess.crop_pct) for side in preprocess.image_size]
    scales = [side / there for side, there in zip(covered, frame, strict=True)]
    if preprocess.crop_mode == "center":
        scales = [max(scales)] * 2
    height, width = (
        min(there, round(side / scale)) for there, side, scale in zip(frame, preprocess.image_size, scales, strict=True)
    )
    return (frame[1] - width) // 2, (frame[0] - height) // 2, width, height


def _padding(preprocess: Preprocess) -> dict[str, object]:
    """How a frame of another form than the input's is fitted."""
    letterbox = preprocess.crop_mode == "letterbox"
    return {"maintain-aspect-ratio": int(letterbox), **({"symmetric-padding": 1} if letterbox else {})}


def _refusal(why: str, *, hint: str) -> ConfigError:
    return ConfigError(f"DeepStream cannot feed this model: {why}", hint=hint)


def _infer(bundle: Bundle, engine: EngineEntry) -> str:
    """nvinfer reads classes from FP32 probabilities or logits where they are the only output; anything else is left to
    the application, as tensors. Of logits it takes the largest only if that is above 0.
    """
    spec = bundle.preprocess
    outputs = bundle.manifest["graph"]["outputs"]
    classifier = (
        bundle.class_names is not None
        and len(outputs) == 1
        and outputs[0]["name"] in CLASS_OUTPUTS
        and outputs[0]["dtype"] == "float32"
    )
    unsure = _UNSURE if classifier and outputs[0]["name"] == "logits" else ""
    if unsure:
        notice("labels:", "nvinfer names no class where all logits are below 0; export with --outputs probs")
    height, width = spec.image_size
    values: dict[str, object] = {
        "gie-unique-id": 1,
        "process-mode": 1,
        "model-engine-file": PLAN_FILE,
        "batch-size": engine["profiles"][0]["B"][2],
        "infer-dims": f"{spec.channels};{height};{width}",
        "network-input-order": 0,
        "model-color-format": _COLOUR_FORMATS[spec.channels],
        "net-scale-factor": repr(net_scale_factor(spec)),
        "offsets": _list(offsets(spec)),
        **_padding(spec),
        "scaling-filter": _FILTERS[spec.interpolation],
        **(
            {"network-type": 1, "labelfile-path": LABELS, "classifier-threshold": 0}
            if classifier
            else {"network-type": 100}
        ),
        "output-tensor-meta": 1,
    }
    whole = seen(spec, FRAME) == (0, 0, FRAME[1], FRAME[0])
    note = _WHOLE_NOTE.format(crop_mode=spec.crop_mode) if whole else _CENTRE_NOTE
    return note + unsure + _group("property", values)


def _preprocess(bundle: Bundle, engine: EngineEntry) -> str:
    spec = bundle.preprocess
    height, width = spec.image_size
    values: dict[str, object] = {
        "enable": 1,
        "unique-id": 5,
        "target-unique-ids": 1,
        "process-on-frame": 1,
        "network-input-order": 0,
        "network-input-shape": f"{engine['profiles'][0]['B'][2]};{spec.channels};{height};{width}",
        "processing-width": width,
        "processing-height": height,
        "network-color-format": _COLOUR_FORMATS[spec.channels],
        "tensor-data-type": 0,
        "tensor-name": IMAGES,
        **_padding(spec),
        "scaling-filter": _FILTERS[spec.interpolation],
        "scaling-buf-pool-size": 6,
        "tensor-buf-pool-size": 6,
        "scaling-pool-memory-type": 0,
        "scaling-pool-compute-hw": 0,
        "custom-lib-path": _CUSTOM_LIBRARY,
        "custom-tensor-preparation-function": "CustomTensorPreparation",
    }
    normalisation = {"pixel-normalization-factor": repr(net_scale_factor(spec)), "offsets": _list(offsets(spec))}
    group: dict[str, object] = {
        "src-ids": 0,
        "custom-input-transformation-function": "CustomAsyncTransformation",
        "process-on-roi": 1,
        "roi-params-src-0": ";".join(map(str, seen(spec, FRAME))),
    }
    note = _FRAME_NOTE.format(width=FRAME[1], height=FRAME[0])
    return (
        _group("property", values)
        + "\n"
        + _group("user-configs", normalisation)
        + "\n"
        + note
        + _group("group-0", group)
    )


def _group(name: str, values: Mapping[str, object]) -> str:
    return f"[{name}]\n" + "".join(f"{key}={value}\n" for key, value in values.items())


def _list(values: list[float]) -> str:
    return ";".join(f"{value:.9g}" for value in values)
