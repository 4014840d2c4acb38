"""What training raises. Every message says what was found, what was expected and what to do."""

from typing import ClassVar

from model_store.errors import TombolaError


class TrainingError(TombolaError):
    """Training that cannot begin or go on."""


class DataRejected(TrainingError):
    """A data set that is missing, laid out otherwise, or damaged."""


class CheckpointRejected(TrainingError):
    """A checkpoint of another recipe, structure or data set, or a damaged one."""


class SearchFailed(TrainingError):
    """A search that cannot go on: the loss is not finite, or the disk is full."""


class JobsUnfinished(TrainingError):
    """Some jobs failed, or run elsewhere: the others are done, and the same command goes on."""

    exit_code: ClassVar[int] = 1
