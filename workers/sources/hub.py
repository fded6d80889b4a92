"""Models and datasets on the hub, through huggingface_hub. ``HF_ENDPOINT`` and ``HF_TOKEN`` are respected."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_url,
    hf_raise_for_status,
    snapshot_download,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils.tqdm import disable_progress_bars

from workers.errors import InfrastructureError, JobError, UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Only flat names of a tame alphabet are looked at; whatever else a repository lists is never asked for.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_MAX_FILES = 10_000

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class HubSnapshot:
    """One commit of a model's repository, whose files are read by range requests."""

    name: str
    commit: str
    files: Mapping[str, int]
    sha256: Mapping[str, str]
    token: str | None
    timeout_seconds: float

    def read(self, path: str, start: int, length: int) -> bytes:
        """A range of a file. Never more than ``length`` bytes are taken, whatever the server sends."""
        if length <= 0:
            return b""
        url = hf_hub_url(self.name, path, revision=self.commit, endpoint=endpoint())
        headers = {
            **build_hf_headers(token=self.token),
            "Range": f"bytes={start}-{start + length - 1}",
            "Accept-Encoding": "identity",
        }
        with (
            hub_errors("model", self.name),
            get_session().stream("GET", url, headers=headers, timeout=self.timeout_seconds) as response,
        ):
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            if response.status_code != 206 and start > 0:
                raise _unreachable("it does not serve ranges of files")
            content = bytearray()
            for piece in response.iter_raw():
                content += piece
                if len(content) >= length:
                    break
            return bytes(content[:length])

    def download(self, names: list[str], destination: Path) -> None:
        """Fetch ``names`` as real files into ``destination``; what the hub tells of their content must be true."""
        disable_progress_bars()
        with hub_errors("model", self.name):
            snapshot_download(
                self.name,
                revision=self.commit,
                local_dir=destination,
                allow_patterns=names,
                token=self.token,
                endpoint=endpoint(),
                etag_timeout=self.timeout_seconds,
            )
            shutil.rmtree(destination / ".cache", ignore_errors=True)
            for name in names:
                with (destination / name).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if self.sha256.get(name, digest) != digest:
                    raise _unreachable(f"{name} did not arrive as the hub describes it")


def open_snapshot(name: str, revision: str | None, *, token: str | None, timeout_seconds: float) -> HubSnapshot:
    """The commit that ``revision`` (default: the main branch) stands for now, and its files.

    Raises UserError ``model_not_found``, ``model_gated`` or ``revision_not_found``; InfrastructureError
    ``hub_unreachable``.
    """
    with hub_errors("model", name):
        api = HfApi(endpoint=endpoint(), token=token)
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=timeout_seconds)
        commit, siblings = _commit(info.sha), info.siblings or []
        if len(siblings) > _MAX_FILES:
            raise _unreachable(f"the repository lists more than {_MAX_FILES} files")
        files: dict[str, int] = {}
        sha256: dict[str, str] = {}
        for sibling in siblings:
            if not _FILE_NAME.fullmatch(sibling.rfilename):
                continue
            size = sibling.size
            if size is None:
                url = hf_hub_url(name, sibling.rfilename, revision=commit, endpoint=endpoint())
                size = get_hf_file_metadata(url, token=token, timeout=timeout_seconds, endpoint=endpoint()).size
            if type(size) is not int or size < 0:
                raise _unreachable("it does not tell the sizes of files")
            files[sibling.rfilename] = size
            if sibling.lfs is not None:
                sha256[sibling.rfilename] = sibling.lfs.sha256
    return HubSnapshot(name, commit, files, sha256, token, timeout_seconds)


def dataset_commit(name: str, *, token: str | None, timeout_seconds: float) -> str:
    """The current commit of a dataset's repository.

    Raises UserError ``dataset_not_found`` or ``dataset_gated``; InfrastructureError ``hub_unreachable``.
    """
    with hub_errors("dataset", name):
        info = HfApi(endpoint=endpoint(), token=token).dataset_info(name, timeout=timeout_seconds)
        return _commit(info.sha)


def dataset_rows(
    name: str, commit: str, first: str | None, second: str | None, *, token: str | None
) -> Iterator[dict[str, Any]]:
    """Rows of a dataset, streamed. ``first`` is the configuration, or the split where there is no ``second``.

    Raises UserError ``dataset_not_found``, ``dataset_gated`` or ``invalid_dataset``.
    """
    # Without this, datasets imports torch for its iterable datasets.
    os.environ.setdefault("USE_TORCH", "0")
    import datasets

    with tempfile.TemporaryDirectory(prefix="attar-datasets-") as cache, hub_errors("dataset", name):
        config, split = first, second
        if first is not None and second is None:
            configs = datasets.get_dataset_config_names(name, revision=commit, token=token)
            config, split = (first, None) if first in configs else (None, first)
        builder = datasets.load_dataset_builder(name, config, revision=commit, token=token, cache_dir=cache)
        _check_data_files(builder.config.data_files, name)
        splits = builder.as_streaming_dataset()
        wanted = split or ("train" if "train" in splits else next(iter(splits), "train"))
        if wanted not in splits:
            raise UserError(
                "invalid_dataset",
                f"The dataset has no split {wanted!r}.",
                param="dataset",
                hint=f"Its splits are: {', '.join(map(str, splits))[:400]}.",
            )
        yield from splits[wanted]


def endpoint() -> str:
    """The hub's address, as the environment says now."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


@contextmanager
def hub_errors(kind: Kind, name: str) -> Iterator[None]:
    """Translate what huggingface_hub and its HTTP client raise into the errors of a job."""
    param = "model.id" if kind == "model" else "dataset"
    try:
        yield
    except JobError:
        raise
    except GatedRepoError:
        raise UserError(
            f"{kind}_gated",
            f"The {kind} {name} is gated and the service has no access to it.",
            param=param,
            hint="Accept its terms on the hub and give the service a token of that account as HF_TOKEN.",
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            "revision_not_found",
            f"The {kind} {name} has no such revision.",
            param="model.revision" if kind == "model" else param,
            hint="Use a branch, a tag or a full commit of the repository.",
        ) from None
    except (RepositoryNotFoundError, DisabledRepoError, HFValidationError):
        raise _not_on_hub(kind, name, param) from None
    except LocalEntryNotFoundError as error:
        # How a download says that the hub could not be asked, and that there is no copy in a cache either.
        raise _unreachable(type(error.__cause__ or error).__name__) from None
    except EntryNotFoundError:
        raise UserError(
            f"{kind}_not_found", f"A file of {name} is not there.", param=param, hint="Try another revision."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in {401, 403, 404}:
            raise _not_on_hub(kind, name, param) from None
        raise _unreachable(f"status {status}") from None
    except httpx2.InvalidURL:
        raise _unreachable("its address is not a URL") from None
    except (httpx2.HTTPError, OSError) as error:
        if type(error).__name__ in {"DatasetNotFoundError", "DataFilesNotFoundError", "EmptyDatasetError"}:
            raise _not_on_hub(kind, name, param) from None
        raise _unreachable(type(error).__name__) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if kind == "dataset":
            raise UserError(
                "invalid_dataset",
                f"The dataset {name} cannot be read: {str(error)[:300]}",
                param=param,
                hint="Name a configuration and a split: hub:NAME:CONFIG:SPLIT.",
            ) from None
        raise _unreachable(f"its answer is not a hub's ({type(error).__name__})") from None


def _check_data_files(data_files: Mapping[str, list[str]] | None, name: str) -> None:
    """A repository's own metadata may name files of this machine or of elsewhere; only its own are read."""
    paths = [path for split in (data_files or {}).values() for path in split]
    if not paths or not all(path.startswith(f"hf://datasets/{name}@") and ".." not in path for path in paths):
        raise UserError(
            "invalid_dataset",
            f"The dataset {name} does not consist of files of its own repository.",
            param="dataset",
            hint="Use a dataset that stores its data, for example as Parquet or JSON lines.",
        )


def _commit(sha: object) -> str:
    if not isinstance(sha, str) or not _COMMIT.fullmatch(sha):
        raise _unreachable("it does not tell the commit")
    return sha


def _not_on_hub(kind: Kind, name: str, param: str) -> UserError:
    return UserError(
        f"{kind}_not_found",
        f"The hub has no {kind} {name}, or does not show it to this service.",
        param=param,
        hint="Check the spelling; a private repository needs a token with access, as HF_TOKEN.",
    )


def _unreachable(problem: str) -> InfrastructureError:
    return InfrastructureError(
        "hub_unreachable",
        f"The hub at {urlsplit(endpoint()).hostname} did not answer as it should: {problem}.",
        hint="Try again later. A model or a text that the service has in its own folders is file:NAME, an earlier "
        "result job:ID; HF_ENDPOINT, where the service runs, names another hub.",
    )
