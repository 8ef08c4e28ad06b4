"""DVC's repository, quietly: waits for its lock, is closed after use, raises our errors, prints nothing."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import DataError, MissingPart, Trouble

if TYPE_CHECKING:
    from dvc.repo import Repo

BELOW_DVC = ("dvc", "dvc_data", "dvc_objects", "scmrepo", "dulwich", "pygit2", "git", "botocore", "aiohttp")


@contextmanager
def opened(root: Path) -> Iterator[Repo]:
    """DVC's Repo of a project; its operations wait for DVC's lock instead of failing after three seconds."""
    quiet()
    from dvc.repo import Repo

    with translated(root):
        repo = Repo(str(root), _wait_for_lock=True)
        try:
            yield repo
        finally:
            repo.close()


@contextmanager
def translated(place: Path) -> Iterator[None]:
    """Raises DVC's own errors as DataError, those of disk and network as Trouble."""
    from dvc.exceptions import DvcException, NotDvcRepoError

    try:
        yield
    except NotDvcRepoError as error:
        raise DataError("no DVC repository here", place=str(place), fix="`dvc init` makes one") from error
    except DvcException as error:
        raise DataError(f"DVC: {_whole_message(error)}", place=str(place)) from error
    except OSError as error:
        what = f"data cannot be read or written: {error.strerror or error}"
        raise Trouble(what, place=str(error.filename or place), fix="free disk space, or check its rights") from error
    except Exception as error:
        # Errors of what DVC is built on reach us bare: dulwich's FileLocked while another git is at work, say.
        if type(error).__module__.split(".")[0] not in BELOW_DVC:
            raise
        raise Trouble(f"DVC: {type(error).__name__}: {error}", place=str(place), fix="try again") from error


def quiet() -> None:
    """No analytics, no progress bars, no log lines: what a person must know comes as an error."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    importlib.import_module("dvc")  # sets the levels of its loggers, so it must come first

    for name in ("dvc", "dvc_data", "dvc_objects", "scmrepo"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def pull_objects(repo: Repo, hashes: list[str]) -> None:
    """Bring objects (md5; a folder's ends in .dir) into DVC's cache, where the default remote has them."""
    from dvc.config import NoRemoteError
    from dvc_data.hashfile.hash_info import HashInfo

    try:
        repo.cloud.pull([HashInfo("md5", each) for each in hashes])
    except NoRemoteError:
        return
    except (FileNotFoundError, AssertionError):  # transfer() asserts that it found the folder's object
        return
    except Exception as error:
        if _is_missing_driver(error):
            raise MissingPart(str(error), fix="install the named part of DVC") from error
        raise


def cached_path(repo: Repo, hash_: str) -> Path:
    """Where DVC's cache keeps an object, be it there or not."""
    return Path(str(repo.cache.local.oid_to_path(hash_)))


def _is_missing_driver(error: Exception) -> bool:
    return type(error).__name__ == "RemoteMissingDepsError"


def _whole_message(error: Any) -> str:
    parts = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        parts.append(str(error))
    return ": ".join(part for part in parts if part)
