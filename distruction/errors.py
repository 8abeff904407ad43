"""The errors that a user can cause, each with the value and the remedy in its message."""


class DistructionError(Exception):
    """Base of the library's own errors; the command line prints them without a traceback."""


class UsageError(DistructionError, ValueError):
    """An argument, a data set or a combination of them that cannot work."""


class PosteriorError(DistructionError, ValueError):
    """A posterior, or its file, that is damaged or belongs to another model."""


class NonFiniteError(DistructionError, FloatingPointError):
    """A loss or gradient became NaN or infinite; the weights are those of the last good mean."""


class RankError(DistructionError, RuntimeError):
    """Another process of a distributed run failed or cannot be reached."""


class BackendUnavailable(DistructionError, RuntimeError):
    """An explicitly chosen backend cannot serve the device."""


class MissingPackage(DistructionError, ModuleNotFoundError):
    """A package is not installed that an extra of this library brings."""


class DistructionWarning(UserWarning):
    """Base of the library's own warnings; the command line prints them as notes of one line."""


class PosteriorWarning(DistructionWarning):
    """A posterior came out so wide that it is likely to serve badly."""


class DataWarning(DistructionWarning):
    """A part of a data set was left out, or is missing and not needed."""
