"""Sharing an explainer on the Hub: everything that belongs to it in one commit."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from . import __version__
from .card_files import (
    BUNDLED_PHOTOGRAPHS,
    CARD_FILE,
    EXAMPLES_FOLDER,
    licence_of_card,
    training_log_of,
    write_card,
    write_training_files,
)
from .card_results import CardResults
from .images import ImageSource
from .model_card import Licence
from .modeling_aha import AhaExplainer


COMMIT_MESSAGE = "Upload AhaExplainer"

# Files of an earlier push that would be read, or shown, instead of those of this one.
_WEIGHTS = re.compile(r"(classifier/|encoder/)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def push_explainer(
    explainer: AhaExplainer,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] | str | None = None,
    include_classifier: bool | None = None,
    results: CardResults | None = None,
    datasets: Sequence[str] | None = None,
    licence: Licence | str | None = None,
    photographs: Iterable[ImageSource] | None = None,
    training_log: Path | None = None,
) -> CommitInfo:
    """Upload an explainer, its image processor, its card, and the log and plot of its training, in one commit.

    The card is written anew, since it describes these weights; weights and pictures of an earlier push that are not
    among the new files are deleted in the same commit. Folders of this machine do not travel: a classifier or encoder
    that is no Hub model is named by its last part.

    Args:
        explainer: what to share.
        repo_id: `NAMESPACE/NAME`, or a name in your own namespace; created when missing.
        commit_message, commit_description, private, token, revision, create_pr, max_shard_size, tags: as in
            `transformers.PreTrainedModel.push_to_hub`.
        include_classifier: upload the classifier's weights as well; when left out, as the explainer was loaded.
        results: what was measured, for the card.
        datasets: those it was trained on; as its config records them when left out.
        licence: read from the target model's card when left out.
        photographs: explained in the card; three bundled ones when left out, if the classifier is attached.
        training_log: `log.jsonl` of the run; the one beside the explainer's files when left out.

    Returns:
        the commit, with `oid`, `commit_url` and, for a pull request, `pr_url`.

    Raises:
        HfHubHTTPError: the Hub refused; see [`explain_hub_error`].
        ValueError: `create_pr` together with a branch other than main, or a malformed `repo_id`.

    Example:
        `push_explainer(explainer, "alice/aha-vit-b16", private=True).commit_url`
    """
    api = hub_api(token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if include_classifier is None:
        include_classifier = explainer.config.includes_classifier
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with _without_local_paths(explainer):
            explainer.save_pretrained(
                folder,
                include_classifier=include_classifier,
                # transformers itself sees to the code of a derived class that is registered for the auto classes.
                include_code=type(explainer) is AhaExplainer,
                max_shard_size=max_shard_size,
            )
        add_card(
            explainer,
            folder,
            repo_id=repo_id,
            include_classifier=include_classifier,
            token=token,
            tags=tags,
            results=results,
            datasets=datasets,
            licence=licence,
            photographs=photographs,
            training_log=training_log,
        )
        return commit_files(
            folder,
            [path for path in folder.rglob("*") if path.is_file()],
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def push_saved(
    explainer: AhaExplainer,
    folder: str | os.PathLike[str],
    before: Mapping[Path, tuple[int, int]],
    *,
    include_classifier: bool = False,
    repo_id: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    tags: Sequence[str] | str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Add the card to a folder that `save_pretrained` wrote, and upload what has changed there since `before`.

    Args:
        explainer: the one that was saved.
        folder: where; its name is that of the repository when `repo_id` is left out.
        before: [`file_states`] of the folder before it was written.
        include_classifier: whether the classifier was saved, too.
        repo_id, private, token, tags, commit_message, commit_description, revision, create_pr: as in
            [`push_explainer`].
    """
    folder = Path(folder)
    repo_id = hub_api(token).create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True).repo_id
    add_card(explainer, folder, repo_id=repo_id, include_classifier=include_classifier, token=token, tags=tags)
    changed = [path for path, state in file_states(folder).items() if before.get(path) != state]
    return commit_files(
        folder,
        changed,
        repo_id,
        commit_message=commit_message,
        commit_description=commit_description,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def file_states(folder: str | os.PathLike[str]) -> dict[Path, tuple[int, int]]:
    """Time of the last change, in nanoseconds, and size of every file in a folder, which may be missing."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def add_card(
    explainer: AhaExplainer,
    folder: Path,
    *,
    repo_id: str,
    include_classifier: bool = False,
    token: bool | str | None = None,
    tags: Sequence[str] | str | None = None,
    results: CardResults | None = None,
    datasets: Sequence[str] | None = None,
    licence: Licence | str | None = None,
    photographs: Iterable[ImageSource] | None = None,
    training_log: Path | None = None,
    local_files_only: bool = False,
) -> None:
    """Put the card and what it shows into a folder with a saved explainer.

    Args:
        explainer: the one that was saved.
        folder: where.
        include_classifier: whether the classifier was saved, too.
        local_files_only: do not ask the Hub for the licence of the target model.
        repo_id, token, tags, results, datasets, licence, photographs, training_log: as in [`push_explainer`].
    """
    training_log = training_log or training_log_of(explainer)
    if training_log is not None:
        write_training_files(training_log, folder)
    if photographs is None:
        drawable = explainer.classifier is not None and explainer.image_processor is not None
        photographs = BUNDLED_PHOTOGRAPHS if drawable else ()
    given = [tags] if isinstance(tags, str) else list(tags or ())
    if licence is None:
        licence = inherited_licence(explainer, token, local_files_only=local_files_only)
    with _as_saved(explainer, include_classifier):
        write_card(
            explainer,
            folder,
            repo_id=repo_id,
            results=results,
            datasets=datasets,
            licence=licence,
            tags=[*(explainer.model_tags or ()), *given],
            photographs=photographs,
        )


def commit_files(
    folder: Path,
    files: Sequence[Path],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload files of a folder to an existing repository in one commit; arguments as in [`push_explainer`].

    Not `HfApi.upload_folder`, which may make several commits where hf_xet is installed.
    """
    api = hub_api(token)
    if revision is not None and not revision.startswith("refs/pr"):
        try:
            api.create_branch(repo_id=repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            # Who may not write to a repository may still open a pull request against a branch that is there.
            if not (create_pr and error.response is not None and error.response.status_code == 403):
                raise
    added = {path.relative_to(folder).as_posix(): path for path in sorted(files)}
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in added.items()]
    stale = [name for name in _files_there(api, repo_id, revision) if name not in added and _is_stale(name)]
    return api.create_commit(
        repo_id=repo_id,
        operations=[*operations, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
        commit_message=commit_message or COMMIT_MESSAGE,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def inherited_licence(
    explainer: AhaExplainer, token: bool | str | None = None, *, local_files_only: bool = False
) -> Licence | None:
    """The licence in the target model's card: of its pinned commit on the Hub, or in its folder; None without one."""
    config = explainer.config
    source = config.base_model_name_or_path
    if source is None:
        return None
    try:
        if os.path.isdir(source):
            path = Path(source) / CARD_FILE
            return licence_of_card(ModelCard.load(path, ignore_metadata_errors=True)) if path.is_file() else None
        if config.base_model_revision is None:
            return None
        path = hf_hub_download(
            source,
            CARD_FILE,
            revision=config.base_model_revision,
            token=token,
            local_files_only=local_files_only,
        )
        return licence_of_card(ModelCard.load(path, ignore_metadata_errors=True))
    except (HfHubHTTPError, EntryNotFoundError, HTTPError, OSError, ValueError) as error:
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        # Where there is no card, or the Hub is not to be asked, our card says that it knows of no licence.
        if not absent and not local_files_only:
            reason = _without_token(" ".join(str(error).split()), token)
            warnings.warn(
                f"The card of the target model {source} could not be read, so this card names no licence; name it "
                f"with licence=... or --license. Reason: {reason}",
                stacklevel=2,
            )
        return None


def explain_hub_error(error: Exception, repo_id: str, token: bool | str | None = None) -> str:
    """One sentence on why an upload failed and what to do; no token is in it.

    Example:
        >>> explain_hub_error(OfflineModeIsEnabled(), "alice/demo")
        "The Hub was not asked, because offline mode is on: unset HF_HUB_OFFLINE to share 'alice/demo'."
    """
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return f"The Hub was not asked, because offline mode is on: unset HF_HUB_OFFLINE to share {repo_id!r}."
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return (
            f"The Hub does not know who wants to write to {repo_id!r}: log in with `hf auth login`, or set HF_TOKEN "
            "to a valid token with write access."
        )
    if isinstance(error, GatedRepoError):
        return f"The repository {repo_id!r} is gated: request access on its page on the Hub."
    if status == 403:
        return (
            f"Your token may not write to {repo_id!r}: use one with write access to it, or open a pull request with "
            "create_pr."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"The repository {repo_id!r} has no such revision; give a branch that exists."
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"The repository {repo_id!r} is not there, or your token may not see it."
    if isinstance(status, int) and status >= 500:
        return f"The Hub failed (status {status}) while {repo_id!r} was uploaded; try again later."
    text = " ".join(str(error).split()) or type(error).__name__
    return f"The upload to {repo_id!r} failed: {_without_token(text, token)}"


def _without_token(text: str, token: bool | str | None) -> str:
    if isinstance(token, str) and token:
        text = text.replace(token, "<token>")
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "<token>", text)


def hub_api(token: bool | str | None) -> HfApi:
    """A client that says which library it serves."""
    return HfApi(token=token, library_name="hf_aha", library_version=__version__)


def _files_there(api: HfApi, repo_id: str, revision: str | None) -> list[str]:
    try:
        return api.list_repo_files(repo_id, revision=revision)
    except (RevisionNotFoundError, RepositoryNotFoundError):
        # A pull request on a new branch, or a repository that may be written to but not read.
        return []


def _is_stale(name: str) -> bool:
    return bool(_WEIGHTS.fullmatch(name)) or PurePosixPath(name).parts[0] == EXAMPLES_FOLDER


@contextmanager
def _without_local_paths(explainer: AhaExplainer) -> Iterator[None]:
    """Name classifier and encoder by their last part where they are folders of this machine."""
    config = explainer.config
    revisions = {
        "base_model_name_or_path": config.base_model_revision,
        "encoder_name_or_path": config.encoder_revision,
    }
    before = {name: getattr(config, name) for name in revisions}
    try:
        for name, value in before.items():
            if value is not None and revisions[name] is None and _is_local_path(value):
                setattr(config, name, re.split(r"[\\/]+", value.rstrip("/\\"))[-1])
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _is_local_path(name: str) -> bool:
    return os.path.isdir(name) or name.count("/") > 1 or "\\" in name or name.startswith((".", "/", "~"))


@contextmanager
def _as_saved(explainer: AhaExplainer, include_classifier: bool) -> Iterator[None]:
    """Let the config say what the saved one says, for the card."""
    before, explainer.config.includes_classifier = explainer.config.includes_classifier, include_classifier
    try:
        yield
    finally:
        explainer.config.includes_classifier = before


__all__ = [
    "add_card",
    "commit_files",
    "explain_hub_error",
    "file_states",
    "hub_api",
    "inherited_licence",
    "push_explainer",
    "push_saved",
]
