"""Errors that the person who uses the library can mend; each message says how."""


class UserError(Exception):
    """Something that the person who asked for it can mend; the message says how."""


class DatasetError(UserError):
    """A data set is missing, damaged or not what it should be; the message says what to do."""


class CheckpointError(UserError):
    """A checkpoint is of no use; the message says which and why."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was saved: a digest or the storage format shows it."""


class StructureError(CheckpointError):
    """A checkpoint is whole, but of other arrays than are asked for; the message names one."""


class DivergedError(UserError):
    """A loss or a weight is not a finite number; the message names it, and the step."""


class ProcessesError(UserError):
    """Several processes could not connect, or one was lost; the message says what to do."""


class TorchFileError(UserError):
    """A PyTorch file cannot be read; the message says why."""
