"""Training editors."""

from emendo.train.config import TrainConfig
from emendo.train.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
