"""What an audit refuses. Every message says where, what was found and what was expected."""

from typing import ClassVar

from model_store.errors import TombolaError


class AuditError(TombolaError):
    """An audit that cannot run. status: what the admin plane answers with."""

    status: ClassVar[int] = 400


class AuditRejected(AuditError):
    """A request for an audit that asks for something unknown or out of range."""


class DataRejected(AuditError):
    """Labelled images that are damaged, too large, unlabelled, or of other classes than the library."""


class CostRejected(AuditError):
    """An audit beyond the limit on cost, known before it starts."""


class AuditUnknown(AuditError):
    """No audit, report or data set of that name."""

    status = 404


class AuditConflict(AuditError):
    """The audit is not in a state that allows this."""

    status = 409


class QueueFull(AuditError):
    """As many audits wait as may."""

    status = 429


class OracleFailed(AuditError):
    """The service under attack did not answer as it should."""

    status = 502


class BudgetSpent(AuditError):
    """An endpoint may be asked about no more images. What was measured before is kept."""


class ModelFailed(AuditError, ValueError):
    """A model that gave no usable answer while it was attacked. What was measured before is kept."""

    status = 422
