"""What a failed S3 request means.

Servers word the same thing differently: the HTTP status decides, and the code where it says more.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Any


class WrongBytesError(Exception):
    """What is stored is not what was sent, although the server said that all was well."""


class Trouble(Enum):
    """Why a request failed."""

    TAKEN = auto()
    """412: put-if-absent found the name taken."""
    CONFLICT = auto()
    """409: two requests met; neither is known to have won."""
    BUSY = auto()
    """5xx or 429: the server is overloaded or broken for now."""
    LOST = auto()
    """The connection broke or timed out; the request may have been carried out."""
    GARBLED = auto()
    """The bytes that came, or went, are not those that the checksum beside them was made of."""
    UNREACHABLE = auto()
    """No connection came about; the request was not carried out."""
    ABSENT = auto()
    NO_BUCKET = auto()
    DENIED = auto()
    REFUSED = auto()
    """Credentials were sent, and the server does not accept them."""
    NO_CREDENTIALS = auto()
    ELSEWHERE = auto()
    """The bucket is in another region."""
    BEYOND = auto()
    """416: the object ends before what was asked of it."""
    FULL = auto()
    SETTINGS = auto()
    """botocore refuses what the environment or its config file says."""
    OTHER = auto()

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed a moment later."""
        return self in (Trouble.CONFLICT, Trouble.BUSY, Trouble.LOST, Trouble.GARBLED, Trouble.UNREACHABLE)

    def explain(self, *, endpoint: str, bucket: str, error: Exception | None) -> tuple[str, str]:
        """What is wrong, and what to do, without any text of the server's: it may quote what was sent."""
        again = "Run the command again: it goes on from what is committed."
        status, code = _reply(error)
        said = ", ".join(filter(None, [f"HTTP {status}" if status else "", code])) or type(error).__name__
        return {
            Trouble.TAKEN: (f"the name is taken ({said})", again),
            Trouble.CONFLICT: (f"other writers keep getting in the way ({said})", again),
            Trouble.BUSY: (f"{endpoint} keeps failing ({said})", again),
            Trouble.LOST: (f"the connection to {endpoint} keeps breaking ({said})", again),
            Trouble.GARBLED: (
                f"wrong bytes arrive from {endpoint}, or at it ({said})",
                "Nothing wrong is used. Check network and server; if it stays, restore the file from a copy, or make it again.",
            ),
            Trouble.UNREACHABLE: (
                f"{endpoint} cannot be reached",
                "Check AWS_ENDPOINT_URL (and AWS_DEFAULT_REGION on AWS), the network and its proxies.",
            ),
            Trouble.NO_BUCKET: (f"there is no bucket {bucket!r} on {endpoint}", "Make the bucket, or correct `store`."),
            Trouble.DENIED: (
                f"access denied ({said})",
                "The credentials need s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket on this bucket.",
            ),
            Trouble.REFUSED: (
                f"{endpoint} does not accept the credentials ({said})",
                "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, their expiry and this machine's clock.",
            ),
            Trouble.NO_CREDENTIALS: (
                "no credentials were found",
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where an instance role is attached.",
            ),
            Trouble.ELSEWHERE: (f"bucket {bucket!r} is in another region ({said})", "Set AWS_DEFAULT_REGION to its region."),
            Trouble.BEYOND: (f"it ends before what is looked for ({said})", "Restore the file from a copy, or make it again."),
            Trouble.FULL: (
                f"no space left on {endpoint} ({said})",
                "Free some space there, or use another.",
            ),
            Trouble.SETTINGS: (
                f"the S3 settings are not usable ({said})",
                "Check AWS_ENDPOINT_URL (http:// or https://, host and port), AWS_DEFAULT_REGION and AWS_PROFILE.",
            ),
            Trouble.ABSENT: (f"it is not there ({said})", again),
            Trouble.OTHER: (f"{endpoint} answered {said}", "See what the server's log says about it."),
        }[self]


_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
            "RequestTimeTooSkewed", "InvalidSecurity", "InvalidClientTokenId"}  # fmt: skip
_ELSEWHERE = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "Redirect"}
_BUSY = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "IncompleteBody", "Throttling",
         "ThrottlingException", "TooManyRequests"}  # fmt: skip
_GARBLED = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}


def understand(error: BaseException) -> Trouble:
    """Reads a request's failure, however s3fs, aiobotocore and aiohttp wrapped it."""
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from fsspec.exceptions import FSTimeoutError

    status, code = _reply(error)
    if status:
        return _of_reply(status, code)
    for cause in _causes(error):
        if isinstance(
            cause,
            boto.NoCredentialsError
            | boto.PartialCredentialsError
            | boto.CredentialRetrievalError
            | boto.ProfileNotFound
            | boto.UnauthorizedSSOTokenError
            | boto.TokenRetrievalError
            | boto.SSOTokenLoadError,
        ):
            return Trouble.NO_CREDENTIALS
        if isinstance(cause, boto.ChecksumError | boto.FlexibleChecksumError | WrongBytesError):
            return Trouble.GARBLED
        if isinstance(cause, boto.EndpointConnectionError | boto.ConnectTimeoutError | aiohttp.ClientConnectorError):
            return Trouble.UNREACHABLE
        if isinstance(
            cause,
            boto.HTTPClientError
            | boto.ConnectionError
            | ResponseParserError
            | boto.IncompleteReadError
            | aiohttp.ClientError
            | FSTimeoutError
            | TimeoutError
            | ConnectionError,
        ):
            return Trouble.LOST
        if isinstance(cause, FileExistsError):
            return Trouble.TAKEN
        if isinstance(cause, FileNotFoundError):
            return Trouble.ABSENT
        if isinstance(cause, PermissionError):
            return Trouble.DENIED
        if isinstance(cause, boto.BotoCoreError) or (isinstance(cause, ValueError) and "ndpoint" in str(cause)):
            return Trouble.SETTINGS
    return Trouble.OTHER


def _of_reply(status: int, code: str) -> Trouble:
    if code in _REFUSED:
        return Trouble.REFUSED
    if code in _ELSEWHERE or status in (301, 307):
        return Trouble.ELSEWHERE
    if status == 507 or code in ("QuotaExceeded", "XMinioStorageFull", "EntityTooLarge"):
        return Trouble.FULL
    if code in _GARBLED:
        return Trouble.GARBLED
    if code in _BUSY or (status >= 500 and status != 501) or status == 429:
        return Trouble.BUSY
    if code == "NoSuchBucket":
        return Trouble.NO_BUCKET
    by_status = {
        401: Trouble.REFUSED, 403: Trouble.DENIED, 404: Trouble.ABSENT, 409: Trouble.CONFLICT, 412: Trouble.TAKEN,
        416: Trouble.BEYOND,
    }  # fmt: skip
    return by_status.get(status, Trouble.OTHER)


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _reply(error: BaseException | None) -> tuple[int, str]:
    """HTTP status and S3 error code of the server's reply; (0, "") when there was none."""
    for cause in _causes(error):
        reply: Any = getattr(cause, "response", None)
        if isinstance(reply, dict):
            status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(reply.get("Error", {}).get("Code", ""))
    return 0, ""
