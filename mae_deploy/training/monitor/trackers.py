"""TensorBoard always, Weights & Biases and MLflow where asked for, through Accelerate's trackers; a resumed run goes on
with its records.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from mae_deploy.files import read_json, write_json

_PROJECT = "mae-deploy"
_IDS = "trackers.json"


class Trackers:
    """Where the metrics go beside `metrics.jsonl`; only the main process logs."""

    def __init__(self, accelerator: Accelerator, names: tuple[str, ...], run: Path, *, step: int) -> None:
        self.accelerator = accelerator
        ids = read_json(run / _IDS) if (run / _IDS).is_file() else {}
        # TensorBoard forgets steps that the checkpoint has not seen.
        found: list[GeneralTracker] = [TensorBoardTracker("tensorboard", run, purge_step=step + 1)]
        if "wandb" in names:
            ids.setdefault("wandb", uuid.uuid4().hex)
            found.append(WandBTracker(_PROJECT, name=run.name, id=ids["wandb"], resume="allow", dir=str(run)))
        if "mlflow" in names:
            found.append(MLflowTracker(_PROJECT, run_name=run.name, run_id=ids.get("mlflow")))
        engine: Any = accelerator  # what its annotations say of these is narrower than what it takes and gives
        engine.log_with = found
        self._run = run
        with self._named():
            accelerator.init_trackers(_PROJECT)
        if accelerator.is_main_process and names:
            if "mlflow" in names:
                ids["mlflow"] = engine.get_tracker("mlflow", unwrap=True).info.run_id
            write_json(run / _IDS, ids)

    def log(self, values: dict[str, Any], step: int) -> None:
        """One step's numbers, without those that are none."""
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        with self._named():
            self.accelerator.log(finite, step=step)

    def close(self) -> None:
        """Flush and finish."""
        with self._named():
            self.accelerator.end_training()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A full disk says which file it is of only where that is opened."""
        try:
            yield
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(self._run / "tensorboard")
            raise
