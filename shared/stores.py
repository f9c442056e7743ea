"""How an object store is reached, with how much patience, and what its errors mean in one line.

Credentials, endpoint and region are facts of the machine and come from where the vendors' tools take them
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, AWS_REGION, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, ...); they are never written anywhere.
"""

import datetime
import functools
import os
import re
from typing import Any

from shared.errors import ConfigError, DataError, StillroomError, one_line

SCHEMES = ("s3", "gs", "az")
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
PROBE_ATTEMPTS = 2
"""A wrong endpoint is told at once."""
PATIENT_ATTEMPTS = 6
"""A store that answered before may rest for some seconds: a run goes on."""

_REFUSED = re.compile(
    r"ACCESS_DENIED|AccessKeyId|SIGNATURE|privileges|Forbidden|Unauthorized|credential|access token", re.I
)
_UNREACHED = re.compile(r"NETWORK_CONNECTION|curlCode|timed? ?out|error sending request|new connection", re.I)
_ELSEWHERE = re.compile(r"HTTP status 30[17]|PermanentRedirect|AuthorizationHeaderMalformed", re.I)
_KEYS_OF_SCHEME = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def file_system(scheme: str, max_attempts: int | None = None) -> Any:
    """pyarrow's file system of a scheme, as the environment says now. Raises ConfigError where that is too little."""
    return _file_system(scheme, max_attempts or PATIENT_ATTEMPTS, _facts())


def delta_options(scheme: str) -> dict[str, str]:
    """What deltalake must be told besides what it takes from the environment itself."""
    options = {
        "connect_timeout": f"{CONNECT_TIMEOUT_S:.0f}s",
        "timeout": f"{REQUEST_TIMEOUT_S:.0f}s",
        "max_retries": str(PATIENT_ATTEMPTS - 1),
        "retry_timeout": "60s",
    }
    if scheme == "s3":
        # A commit is a put that fails where another came first: without it two workers could both make one version.
        options["aws_conditional_put"] = "etag"
        if (endpoint := _s3_endpoint()) is not None:
            options["aws_endpoint_url"] = endpoint
            options["allow_http"] = str(endpoint.startswith("http://")).lower()
    return options


def is_store_error(error: BaseException) -> bool:
    """Whether reading failed because of the store or the way to it, so that nothing is said of the bytes."""
    text = str(error)
    return "AWS Error" in text or "Azure" in text or "google::cloud" in text


def explained(error: BaseException, where: str, scheme: str) -> StillroomError:
    """The error of a store as one line for the user, without anything that was sent to it."""
    text = one_line(error)
    if _UNREACHED.search(text):
        reason = text.rpartition("Details: ")[2].rpartition("operation: ")[2]
        return StillroomError(f"{where}: {endpoint_of(scheme)} cannot be reached: {reason[:200]}")
    if _ELSEWHERE.search(text):
        return DataError(f"{where}: the bucket lies in another region: set AWS_REGION to it")
    if _REFUSED.search(text):
        keys = _KEYS_OF_SCHEME[scheme]
        return DataError(f"{where}: {endpoint_of(scheme)} refuses access: check the key in the environment ({keys})")
    return StillroomError(f"{where}: the store failed: {text.rpartition('operation: ')[2][:200]}")


def endpoint_of(scheme: str) -> str:
    """What to call the store in a message, without a password that its URL might hold."""
    if scheme != "s3":
        return {"gs": "Google Cloud Storage", "az": "Azure"}[scheme]
    endpoint = _s3_endpoint()
    return "AWS (AWS_ENDPOINT_URL names another store)" if endpoint is None else re.sub("//[^/@]*@", "//", endpoint)


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _facts() -> tuple[str | None, ...]:
    """Of the environment, what the constructors below are told by us."""
    names = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN")
    return (_s3_endpoint(), *(os.environ.get(name) for name in names))


@functools.cache
def _file_system(scheme: str, max_attempts: int, facts: tuple[str | None, ...]) -> Any:
    """pyarrow's file system of the scheme; `facts` tells apart what the environment said when it was made."""
    from pyarrow import fs

    if scheme == "s3":
        return fs.S3FileSystem(
            endpoint_override=facts[0],
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=REQUEST_TIMEOUT_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=max_attempts),
        )
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=CONNECT_TIMEOUT_S * max_attempts))
    account, key, token = facts[1:]
    if account is None:
        raise ConfigError("az:// needs AZURE_STORAGE_ACCOUNT_NAME in the environment")
    return fs.AzureFileSystem(account, account_key=key, sas_token=token)
