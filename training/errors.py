"""What training raises; `python -m training` prints each as one line and exits with 1."""


class TrainingError(Exception):
    """Something the person at the keyboard can mend; the message says what was found, what was expected, what to do."""


class DataRejected(TrainingError):
    """A data set that is missing, laid out otherwise, or damaged."""


class CheckpointRejected(TrainingError):
    """A checkpoint of another recipe, structure or data set, or a damaged one."""


class SearchFailed(TrainingError):
    """A search that cannot go on: the loss is not finite, or the disk is full."""
