"""The demo of one explainer as a Space on the Hub: its files, and their upload in one commit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .configuration_aha import AhaConfig
from .hub import hub_api
from .markdown import clean_text, escape_markdown


TEMPLATES = Path(__file__).parent / "templates" / "space"
BUNDLED = Path(__file__).parent / "bundled"

GRADIO_VERSION = "6.31.0"
"""The version of Gradio that a Space runs: the one the demo is tested with."""

PYTHON_VERSION = "3.11"
PACKAGE = "hf-aha"
COMMIT_MESSAGE = "Upload the demo of an AHA explainer"
_LONGEST_DESCRIPTION = 60  # of a short description on the Hub


@dataclass(frozen=True)
class SpaceContents:
    """What the files of a Space depend on.

    Attributes:
        explainer: Hub id, or the name of a bundled explainer.
        classifier: Hub id to load the classifier from, where the explainer does not say it.
        target: id or name of the explained classifier, for the page's text.
        num_labels: classes it tells apart; None when unknown.
        datasets: Hub ids of what the explainer was trained on.
        title: of the Space.
        licence: of the page, an id of the Hub.
        package: what pip installs in the Space.
    """

    explainer: str
    classifier: str | None = None
    target: str | None = None
    num_labels: int | None = None
    datasets: tuple[str, ...] = ()
    title: str = "AHA: which pixels?"
    licence: str = "apache-2.0"
    package: str = PACKAGE


def space_contents(
    explainer: str,
    config: AhaConfig,
    *,
    classifier: str | None = None,
    title: str | None = None,
    licence: str | None = None,
    package: str | None = None,
) -> SpaceContents:
    """Gather what the files say, and refuse an explainer that a Space could not load.

    Args:
        explainer: Hub id, or the name of a bundled explainer.
        config: of that explainer.
        classifier: Hub id to load the classifier from.
        title, licence, package: as in [`SpaceContents`]; the defaults there when left out.

    Raises:
        ValueError: the explainer or the classifier is on this machine only.
    """
    if not _is_bundled(explainer) and not _is_hub_id(explainer):
        raise ValueError(
            f"A Space cannot load {explainer!r} from this machine: upload it with `hf-aha push` and give its Hub id."
        )
    if classifier is not None and not _is_hub_id(classifier):
        raise ValueError(f"A Space cannot load the classifier {classifier!r} from this machine: give its Hub id.")
    if classifier is None and not config.includes_classifier and config.base_model_revision is None:
        raise ValueError(
            f"The explainer {explainer!r} does not say where on the Hub its classifier "
            f"{config.base_model_name_or_path!r} is: give its Hub id with --classifier."
        )
    training = config.training if isinstance(config.training, dict) else {}
    datasets = tuple(name for name in [training.get("dataset")] if name and _is_hub_id(name))
    given = {"title": title, "licence": licence, "package": package}
    target = classifier or config.base_model_name_or_path
    return SpaceContents(
        explainer,
        classifier,
        target if target is None or _is_hub_id(target) else Path(target).name,
        config.num_labels,
        datasets,
        **{name: clean_text(value) for name, value in given.items() if value},
    )


def space_files(contents: SpaceContents) -> dict[str, str]:
    """The files of a Space, text by name: `README.md` with the Space's front matter, `app.py`, `requirements.txt`.

    Example:
        >>> sorted(space_files(SpaceContents("imagenette-demo", target="imagenette-demo")))
        ['README.md', 'app.py', 'requirements.txt']
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    # Valid Python whatever the text holds.
    environment.filters |= {"python": json.dumps, "markdown": escape_markdown, "linked": _linked}
    values = {
        "explainer": contents.explainer,
        "classifier": contents.classifier,
        "target": contents.target,
        "classes": contents.num_labels,
        "title": contents.title,
        "package": contents.package,
        "private_hint": not _is_bundled(contents.explainer),
        "front_matter": yaml.safe_dump(_front_matter(contents), sort_keys=False, allow_unicode=True, width=1000),
    }
    names = (path.name.removesuffix(".jinja") for path in TEMPLATES.glob("*.jinja"))
    return {name: environment.get_template(f"{name}.jinja").render(values) for name in sorted(names)}


def push_space(
    contents: SpaceContents,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Make a Space, if it is not there, and upload its files in one commit; files of other names there stay.

    Args:
        contents: of `space_contents`.
        repo_id: `NAMESPACE/NAME`, or a name in your own namespace.
        private: make a new Space private.
        token, commit_message: as in `huggingface_hub.HfApi.create_commit`.

    Returns:
        the commit.

    Raises:
        HfHubHTTPError: the Hub refused; see [`hf_aha.hub.explain_hub_error`].
        ValueError: a malformed `repo_id`.

    Example:
        `push_space(SpaceContents("alice/aha-vit-b16"), "alice/aha-demo").commit_url`
    """
    files = space_files(contents)
    api = hub_api(token)
    repo_id = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True).repo_id
    return api.create_commit(
        repo_id=repo_id,
        repo_type="space",
        operations=[CommitOperationAdd(name, text.encode("utf-8")) for name, text in files.items()],
        commit_message=commit_message or COMMIT_MESSAGE,
    )


def _front_matter(contents: SpaceContents) -> dict[str, object]:
    models = [name for name in (contents.explainer, contents.target) if name and _is_hub_id(name)]
    description = f"Which pixels made {contents.target or 'a classifier'} say so?"
    matter = {
        "title": contents.title,
        "emoji": "\N{RIGHT-POINTING MAGNIFYING GLASS}",
        "colorFrom": "blue",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "python_version": PYTHON_VERSION,
        "app_file": "app.py",
        "pinned": False,
        "license": contents.licence,
        "short_description": description if len(description) <= _LONGEST_DESCRIPTION else "Which pixels count?",
        "models": list(dict.fromkeys(models)),
        "datasets": list(contents.datasets),
        "tags": ["hf_aha", "visual-attribution", "explainability", "image-classification"],
    }
    return {name: value for name, value in matter.items() if value != []}


def _is_bundled(name: str) -> bool:
    return "/" not in name and (BUNDLED / name / "config.json").is_file()


def _is_hub_id(name: str) -> bool:
    """NAMESPACE/NAME, and no folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).is_dir()


def _linked(name: str | None) -> str:
    if name is None:
        return "not named"
    return f"[{name}](https://huggingface.co/{name})" if _is_hub_id(name) else escape_markdown(name)


__all__ = ["SpaceContents", "push_space", "space_contents", "space_files"]
