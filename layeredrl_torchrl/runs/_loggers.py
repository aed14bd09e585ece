"""TorchRL's loggers in the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl.record.loggers import Logger, get_logger

from layeredrl_torchrl.runs._files import write_whole
from layeredrl_torchrl.runs.options import RunError

__all__ = ["open_logger"]


def open_logger(kind: str, folder: Path, settings: Mapping[str, Any], steps: int) -> Logger | None:
    """Open the log of a run, or go on in the one that a resumed run has; ``None`` for "csv".

    Args:
        kind: The option ``logger``.
        folder: Folder of the run.
        settings: Options of the run.
        steps: Real steps taken so far; TensorBoard's entries of later steps are removed.

    Raises:
        RunError: W&B cannot be reached, or there is no login.
    """
    if kind == "csv":
        return None
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        if (folder / kind).is_dir():
            SummaryWriter(str(folder / kind), purge_step=steps + 1).close()
        return get_logger(kind, str(folder), kind)
    import wandb

    name = folder / "wandb_id"
    # Not where the run begins anew: its rows would stand behind those of the one before.
    known = {"id": name.read_text()} if steps and name.exists() else {}
    try:
        logger = get_logger(kind, str(folder), str(folder), wandb_kwargs=known)
    except wandb.Error as error:
        raise RunError(f"--logger wandb: {str(error).splitlines()[0]}") from error
    write_whole(name, logger.experiment.id)
    logger.log_hparams(dict(settings))
    return logger
