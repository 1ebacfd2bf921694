"""What goes wrong at the URL of an object store or a web server, in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from atlas_store.errors import AtlasStoreError, StoreUnreachableError

_CLIENTS = frozenset({"botocore", "aiobotocore", "aiohttp"})
"""Libraries whose own errors are about the network, credentials or a server."""


@contextmanager
def reaching(url: str, kind: type[Exception] = StoreUnreachableError) -> Iterator[None]:
    """Say in one sentence why a URL cannot be read or written; errors about paths pass.

    Parameters
    ----------
    url : str
        URL, or a path.
    kind : type
        Class of the error.

    Raises
    ------
    kind
        If there is no network, no server, no bucket, no right to it, or no library for it.
    """
    if "://" not in url:
        yield
        return
    try:
        yield
    except (kind, AtlasStoreError, FileExistsError):
        raise
    except ImportError as error:
        raise kind(
            f"{url} cannot be reached without a library ({error}); for s3:// install kpt-dask[s3]."
        ) from error
    except FileNotFoundError as error:
        if _code(error) != "NoSuchBucket":
            raise
        raise kind(
            f"{url} cannot be reached, as there is no such bucket; create it, or correct the name."
        ) from error
    except PermissionError as error:
        raise kind(
            f"{url} is refused by its server ({_said(error)}); check your credentials and what they"
            " allow."
        ) from error
    except ValueError as error:
        if "Protocol not known" in str(error):
            raise kind(
                f"{url} has a scheme that is not known; give a path, or a URL such as s3://."
            ) from error
        if "endpoint" not in str(error):
            raise
        raise kind(
            f"{url} cannot be reached ({_said(error)}); the address in AWS_ENDPOINT_URL must begin"
            " with http:// or https://."
        ) from error
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library not in _CLIENTS and not isinstance(error, OSError):
            raise
        raise kind(
            f"{url} cannot be reached ({_said(error)}); check the network, the name, and your"
            " credentials."
        ) from error


def _code(error: BaseException) -> str | None:
    """Code of an object store's answer, which s3fs keeps in the cause of its error."""
    answer: Any = getattr(error.__cause__, "response", None) or {}
    code = answer.get("Error", {}).get("Code")
    return code if isinstance(code, str) else None


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
