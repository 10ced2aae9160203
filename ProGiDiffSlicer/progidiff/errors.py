"""The errors that a user is meant to read.

Every message is one sentence that says what is wrong and what to do about it. The command line prints it and ends with
exit code 2; the worker sends it as an error reply.
"""

from __future__ import annotations


class ProGiDiffError(Exception):
    """Base of all expected errors; ``code`` is stable and machine readable."""

    code = "error"


class InputError(ProGiDiffError):
    """An image that cannot be used as it is."""

    code = "input"


class PromptError(ProGiDiffError):
    """A prompt that names nothing the model knows."""

    code = "prompt"


class ModelError(ProGiDiffError):
    """A model folder that is missing, damaged, foreign or unsafe."""

    code = "model"


class AdapterError(ProGiDiffError):
    """An adapter that is missing, damaged, or made for another base model."""

    code = "adapter"


class WorseAdapterError(AdapterError):
    """An adapter that was worse than its base on the cases held out from its training; usable if the user insists."""

    code = "adapter_worse"


class DatasetError(ProGiDiffError):
    """A training or evaluation data set that cannot be read."""

    code = "dataset"


class OutputError(ProGiDiffError):
    """A result that cannot be written; nothing half-written is left behind."""

    code = "output"


class ProtocolError(ProGiDiffError):
    """A frame that breaks the worker protocol."""

    code = "protocol"


class WorkerError(ProGiDiffError):
    """The worker process failed to start, ended or fell silent."""

    code = "worker"


class CancelledError(ProGiDiffError):
    """The user cancelled the request; not a failure."""

    code = "cancelled"


def why_left_out(name: str, error: Exception) -> str:
    """The sentence for one image of many that ended in an error, whatever was thrown; the work goes on without it.

    What an unexpected error says is not repeated, since it could hold anything of the image.
    """
    if isinstance(error, ProGiDiffError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{name} does not fit into this computer's memory; crop or resample it and try again."
    return f"{name} cannot be used, for a reason that was not foreseen ({type(error).__name__}); try it alone, or remove it."
