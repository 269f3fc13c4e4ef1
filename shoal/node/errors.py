"""From the typed errors of the folders below to the one error a person sees: code, message, fix."""

from __future__ import annotations

import errno

from shoal.monitoring.exporter import ExporterError
from shoal.node.exit_codes import ExitCode, ShoalError
from shoal.protocol.events import REASON_HELP, Reason
from shoal.protocol.identity import IdentityError
from shoal.protocol.invite import InviteError
from shoal.protocol.manifest import ManifestError
from shoal.protocol.p2p import (
    BootstrapUnreachable,
    IdentityTaken,
    IdentityUnreadable,
    ListenFailed,
    PortInUse,
    TransportError,
)
from shoal.protocol.store import StoreError, StoreFault
from shoal.protocol.transport import CallError

_STORE_CODES = {
    StoreFault.NO_SPACE: ExitCode.NO_SPACE,
    StoreFault.READ_ONLY: ExitCode.DIRECTORY_UNWRITABLE,
    StoreFault.NO_PERMISSION: ExitCode.DIRECTORY_UNWRITABLE,
    StoreFault.LOCKED: ExitCode.DIRECTORY_LOCKED,
    StoreFault.IO: ExitCode.DIRECTORY_UNWRITABLE,
}
_TRANSPORT_CODES: tuple[tuple[type[TransportError], ExitCode], ...] = (
    (PortInUse, ExitCode.PORT_IN_USE),
    (ListenFailed, ExitCode.USAGE),
    (BootstrapUnreachable, ExitCode.BOOTSTRAP_UNREACHABLE),
    (IdentityTaken, ExitCode.IDENTITY_BROKEN),
    (IdentityUnreadable, ExitCode.IDENTITY_BROKEN),
    (TransportError, ExitCode.DAEMON_DIED),
)
REFUSED_MANIFEST = frozenset({Reason.BAD_SIGNATURE, Reason.MALFORMED, Reason.TOO_LARGE, Reason.WRONG_RUN})


_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})


def explain(error: BaseException) -> ShoalError | None:
    """The error as a person should see it; None for one that nobody foresaw (a bug: let it show its traceback)."""
    for cause in _causes(error):
        found = _explain_one(cause)
        if found is not None:
            return found
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """The error itself, and what is inside if it is a group."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for inner in error.exceptions for cause in _causes(inner)]
    return [error]


def _of(error: OSError) -> str:
    return f" for {error.filename}" if error.filename is not None else ""


def _full(cause: BaseException | None) -> bool:
    """Did the disk run full? safetensors tells it in the text of an exception type of its own."""
    return (isinstance(cause, OSError) and cause.errno in _NO_SPACE) or f"os error {errno.ENOSPC}" in str(cause)


def _explain_one(error: BaseException) -> ShoalError | None:
    # data, split and export live in swarm; importing them loads torch, so their errors are told by name
    swarm_errors = {
        "DataError": ExitCode.DATA_UNREADABLE,
        "ExportError": ExitCode.EXPORT_REFUSED,
        "UnsupportedModel": ExitCode.BAD_MANIFEST,
        "OptimizerError": ExitCode.BAD_MANIFEST,
    }
    match error:
        case ShoalError():
            return error
        case StoreError():
            return ShoalError(_STORE_CODES.get(error.fault, ExitCode.INTERNAL), error.what, error.fix)
        case TransportError():
            code = next(code for kind, code in _TRANSPORT_CODES if isinstance(error, kind))
            return ShoalError(code, error.detail, error.fix)
        case IdentityError():
            return ShoalError(ExitCode.IDENTITY_BROKEN, error.what, error.fix)
        case InviteError():
            return ShoalError(ExitCode.BAD_INVITE, str(error))
        case ManifestError():
            return ShoalError(ExitCode.BAD_MANIFEST, str(error))
        case ExporterError():
            return ShoalError(ExitCode.PORT_IN_USE, str(error))
        case CallError():
            return ShoalError(ExitCode.INTERNAL, f"{error} ({REASON_HELP[error.reason]})")
        case OSError() if error.errno in _NO_SPACE:
            return ShoalError(ExitCode.NO_SPACE, f"no space left{_of(error)}")
        case OSError() if error.errno in _NOT_WRITABLE and error.filename is not None:
            return ShoalError(ExitCode.DIRECTORY_UNWRITABLE, f"{error.filename}: {error.strerror}")
        case _ if type(error).__name__ == "ExportError" and _full(error.__context__):
            return ShoalError(
                ExitCode.NO_SPACE,
                f"{str(error).split(': ')[0]}: no space left for the export; nothing was left there",
                "free some space or name a directory on another disk",
            )
        case _ if type(error).__name__ in swarm_errors and type(error).__module__.startswith("shoal.swarm"):
            return ShoalError(swarm_errors[type(error).__name__], str(error))
    return None
