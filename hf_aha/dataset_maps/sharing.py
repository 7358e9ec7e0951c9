"""Uploading a finished dataset of maps to the Hub, file by file as it lies on the disk."""

from __future__ import annotations

from huggingface_hub import CommitInfo

from ..hub import hub_api
from .folder import CARD_FILE, RUN_FILE, UNREADABLE_FILE, MapsFolder


def push_maps(
    folder: MapsFolder,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Upload the card, the record and all parquet files; files of an earlier upload that are no longer there go away.

    The files travel as they are, so that `datasets.load_dataset(repo_id)` and [`load_maps`] read there what lies here.

    Args:
        folder: of a finished run.
        repo_id: `NAMESPACE/NAME`, or a name in your own namespace; the dataset is created when missing.
        private: of a new repository.
        token: as everywhere in huggingface_hub; it is written nowhere.
        commit_message: of the commit.

    Returns:
        the commit, with `commit_url`.

    Raises:
        MapsError: the run is not finished.
        HfHubHTTPError, ValueError: the Hub refused, or the name is malformed; see `hf_aha.hub.explain_hub_error`.

    Example:
        `push_maps(MapsFolder.existing("maps"), "alice/maps", private=True).commit_url`
    """
    folder.summary()
    api = hub_api(token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=folder.folder,
        allow_patterns=[CARD_FILE, RUN_FILE, UNREADABLE_FILE, "data/*.parquet"],
        ignore_patterns=["data/.*"],
        delete_patterns=["data/*.parquet", UNREADABLE_FILE],
        commit_message=commit_message or "Upload attribution maps",
    )


__all__ = ["push_maps"]
