"""The files of a repository or folder: found, fetched at one commit, and every failure said in one sentence.

Used on the explainer and on what it was trained for, which may come from anybody: weights are safetensors or nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils.hub import extract_commit_hash


WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


class ExplainerAccessError(OSError):
    """A repository or folder could not be read: it is absent, private or gated, or the Hub could not be reached."""


class ExplainerFilesError(OSError):
    """The files were read, but they are damaged, unsafe, or no explainer."""


@dataclass(frozen=True)
class Place:
    """Where the files of one model lie.

    Attributes:
        name: Hub id or folder.
        title: what it is, as errors begin.
        advice: what else the user can do, as errors end; empty or a clause that starts with "; ".
        revision: branch, tag or commit; the default branch when left out, and of no meaning for a folder.
        subfolder: inside the repository or folder.
        hub: `token`, `cache_dir`, `local_files_only` and `force_download`, as in transformers.
    """

    name: str
    title: str
    advice: str = ""
    revision: str | None = None
    subfolder: str = ""
    hub: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        """Whether the name is a folder of this machine, which comes before any Hub id."""
        return os.path.isdir(self.name)

    def inside(self, subfolder: str) -> Place:
        """The same place, one folder deeper."""
        return replace(self, subfolder="/".join(filter(None, (self.subfolder, subfolder))))

    def arguments(self) -> dict[str, Any]:
        """What transformers has to be given to read the files that were fetched from here."""
        named = {key: value for key, value in self.hub.items() if key != "force_download"}
        if self.revision is not None:
            named["revision"] = self.revision
        if self.subfolder:
            named["subfolder"] = self.subfolder
        return named


def fetch(place: Place, filename: str) -> str | None:
    """The path of one file, downloaded into the cache when need be; `None` when the place has no such file.

    Raises:
        ExplainerAccessError: the place could not be read.
    """
    path = "/".join(filter(None, (place.subfolder, filename)))
    if place.is_folder:
        local = os.path.join(place.name, path)
        return local if os.path.isfile(local) else None
    where = {"cache_dir": place.hub.get("cache_dir"), "revision": place.revision}
    with _access(place, filename):
        # A commit never changes, so its files need no question to the Hub, nor do those it is known to lack.
        if re.fullmatch(r"[0-9a-f]{40}", place.revision or "") and not place.hub.get("force_download"):
            known = try_to_load_from_cache(place.name, path, **where)
            if known is not None:
                return known if isinstance(known, str) else None
        try:
            return hf_hub_download(
                place.name,
                path,
                **where,
                token=place.hub.get("token"),
                local_files_only=place.hub.get("local_files_only") or False,
                force_download=place.hub.get("force_download") or False,
                library_name="hf_aha",
            )
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None


def fetch_optional(place: Place, filename: str) -> str | None:
    """As `fetch`, but without network a file that is not in the cache counts as one that does not exist."""
    try:
        return fetch(place, filename)
    except ExplainerAccessError as error:
        if _is_offline(place) and isinstance(error.__cause__, LocalEntryNotFoundError):
            return None
        raise


def pin(place: Place, path: str) -> Place:
    """The same place at the commit of a file just fetched from it, so that all its files are of one commit."""
    commit = None if place.is_folder else extract_commit_hash(path, None)
    return place if commit is None else replace(place, revision=commit)


def find_weights(place: Place, *, variant: str | None = None, filename: str | None = None) -> list[str]:
    """Paths of the safetensors files of a model, one or several shards.

    Args:
        place: where to look; pinned, so that shards and index belong together.
        variant: as in transformers, `model.<variant>.safetensors`.
        filename: the file the config names instead (`transformers_weights`).

    Raises:
        ExplainerAccessError: the place could not be read.
        ExplainerFilesError: there are none, only pickled ones perhaps, or the index is damaged or names files that lie
            elsewhere.
    """
    single, index = WEIGHTS, WEIGHTS_INDEX
    if variant is not None:
        single, index = f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json"
    if filename is not None:
        single, index = (None, filename) if filename.endswith(".json") else (filename, None)
        _check_filename(place, filename, "config.json", (".safetensors", ".safetensors.index.json"))
    path = single and fetch(place, single)
    if path:
        return [path]
    path = index and fetch(place, index)
    if not path:
        raise ExplainerFilesError(
            f"{place.title} has no {single or index}: pickled weights (.bin, .pt, .ckpt) can run any code and are "
            f"never loaded{place.advice}."
        )
    shards = read_json(place, path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ExplainerFilesError(f"{place.title} has a damaged {index}: it maps no weights to files{place.advice}.")
    paths = []
    for shard in sorted({str(name) for name in shards.values()}):
        _check_filename(place, shard, str(index), (".safetensors",))
        path = fetch(place, shard)
        if path is None:
            raise ExplainerFilesError(f"{place.title} lacks {shard}, which its {index} names{place.advice}.")
        paths.append(path)
    return paths


def _check_filename(place: Place, filename: str, source: str, endings: tuple[str, ...]) -> None:
    if not re.fullmatch(r"[\w.-]+", filename) or filename.startswith(".") or not filename.endswith(endings):
        raise ExplainerFilesError(
            f"{place.title} names {filename!r} in its {source} as a file of weights, which is refused: only "
            f"safetensors files beside it are read{place.advice}."
        )


def read_json(place: Place, path: str) -> dict[str, Any]:
    filename = os.path.basename(path)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ExplainerFilesError(
            f"{place.title} has a damaged {filename}: it is no valid JSON{place.advice}."
        ) from error
    if not isinstance(content, dict):
        raise ExplainerFilesError(f"{place.title} has a damaged {filename}: it holds no JSON object{place.advice}.")
    return content


@contextmanager
def _access(place: Place, filename: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, HTTPError) as error:
        raise ExplainerAccessError(
            f"{place.title} could not be loaded: {access_reason(place, filename, error)}{place.advice}."
        ) from error


def access_reason(place: Place, filename: str, error: BaseException) -> str:
    """Why a file could not be had, as a clause; the errors of huggingface_hub may lie some causes deep."""
    page = f"{constants.ENDPOINT}/{place.name}"
    chain = list(_causes(error))

    def met(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in chain if isinstance(cause, kinds)), None)

    if met(GatedRepoError):
        return f"it is gated, so request access to {place.name} at {page} and pass token=... of an account that has it"
    if met(RevisionNotFoundError):
        return f"it has no revision {place.revision!r}; see its branches, tags and commits at {page}"
    if met(RepositoryNotFoundError):
        return (
            f"no folder and no Hub repository {place.name} is to be seen with this account; check the name, and for "
            "a private one pass token=... or log in with `hf auth login`"
        )
    answer = met(HfHubHTTPError)
    if answer is not None:
        return _statusaccess_reason(answer.response.status_code, page)
    if met(HFValidationError):
        return f"{place.name!r} is neither a folder of this machine nor a Hub id such as 'org/name'"
    if met(OfflineModeIsEnabled) or (met(LocalEntryNotFoundError) and _is_offline(place)):
        return f"its {filename} is not in the cache and the network is off; load it once with network"
    if met(HTTPError, LocalEntryNotFoundError):
        return f"the connection to {constants.ENDPOINT} failed; try again, what has arrived so far is kept"
    if "Consistency check failed" in str(error):
        return f"its {filename} arrived incomplete; try again"
    return first_sentence(place, error)


def _statusaccess_reason(status: int, page: str) -> str:
    if status == 401:
        return "the Hub does not know the token; make one at https://huggingface.co/settings/tokens"
    if status == 403:
        return f"the token is not allowed to read it; see {page}"
    if status == 429:
        return "the Hub has had too many requests from here (429); wait a few minutes, or log in"
    return f"the Hub answers with the error {status}; try again later"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_offline(place: Place) -> bool:
    return bool(place.hub.get("local_files_only")) or constants.HF_HUB_OFFLINE


def first_sentence(place: Place, error: BaseException) -> str:
    """What another library says, cut to its first sentence, without its full stop and without any token."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.split(r"(?<=[^.]\.) (?=[A-Z])", text, maxsplit=1)[0].rstrip(" .:;")
    token = place.hub.get("token")
    if isinstance(token, str):
        text = text.replace(token, "***")
    return re.sub(r"hf_[A-Za-z0-9]{30,}", "***", text)


__all__ = ["ExplainerAccessError", "ExplainerFilesError", "Place"]
