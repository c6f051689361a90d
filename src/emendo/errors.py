"""Every error that emendo raises on purpose, as one tree.

::

    EmendoError
    ├── RequestError        the request: an empty prompt, a target that does not fit the context
    ├── DataError           a record file: missing, empty, or a malformed line (file, line, field)
    ├── ModelError          the model: no blocks, no such sites, an output that cannot be scored
    ├── MismatchError       an edit or an editor that belongs to another model
    ├── StorageError        a file: damaged, not writable, or a folder that already holds a run
    ├── ConflictError       a step of the ledger that no longer fits, because another process took one in between
    └── TrainingError       a run that cannot continue: non-finite losses, nothing to train on
        └── LostProcessError   another process of the run has ended

    EmendoWarning
    ├── FramingWarning        prompts in another form than the editor was trained on
    └── UnusedWeightsWarning  a checkpoint with tensors that were not loaded

A message names the given value, the allowed ones and the next step. Each class also derives from the
built-in exception a caller would expect (``ValueError``, ``OSError``, ``RuntimeError``).
"""


class EmendoError(Exception):
    """Base of every error that emendo raises on purpose."""


class RequestError(EmendoError, ValueError):
    """The request cannot be carried out: an empty prompt or target, or a text that is too long."""


class DataError(EmendoError, ValueError):
    """A record file is missing, empty or malformed."""


class ModelError(EmendoError, ValueError):
    """The model cannot be loaded, or it lacks blocks, the requested sites, or an output that can be scored."""


class MismatchError(EmendoError, ValueError):
    """An edit or an editor was made for another model."""


class StorageError(EmendoError, OSError):
    """A file or folder is damaged, cannot be written, or already holds something."""


class ConflictError(EmendoError, RuntimeError):
    """Another process changed the ledger in the meantime."""


class TrainingError(EmendoError, RuntimeError):
    """Training cannot continue."""


class LostProcessError(TrainingError):
    """Another process that shares the work has ended, or does not answer."""


class EmendoWarning(UserWarning):
    """Base of every warning that emendo issues."""


class FramingWarning(EmendoWarning):
    """An editor was trained on prompts in a chat template and is used on plain ones, or the other way round."""


class UnusedWeightsWarning(EmendoWarning):
    """A checkpoint holds tensors that are not part of the loaded model, and an export will not have them."""
