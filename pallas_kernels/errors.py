"""Errors of the kernels. Imports nothing."""


class KernelUnavailableError(NotImplementedError):
    """A kernel that was asked for by name cannot run here; the message says what is missing."""
