"""Arguments that name an explainer and say where it runs, and the loading itself; shared by the commands."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError


if TYPE_CHECKING:
    from ..modeling_aha import AhaExplainer

DEFAULT_EXPLAINER = "imagenette-demo"
BUNDLED = Path(__file__).parents[1] / "bundled"
DTYPES = ("float32", "bfloat16", "float16")


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--explainer`, `--classifier`, `--revision`, `--local-files-only`, `--device` and `--dtype`."""
    group = parser.add_argument_group("explainer")
    group.add_argument(
        "--explainer",
        metavar="ID",
        default=DEFAULT_EXPLAINER,
        help="Hub id, folder, or name of a bundled explainer (default: %(default)s)",
    )
    group.add_argument(
        "--classifier",
        metavar="ID_OR_DIR",
        help="load the explained classifier from here instead of where the explainer says it is",
    )
    group.add_argument("--revision", metavar="REV", help="commit, tag or branch of the explainer on the Hub")
    group.add_argument("--local-files-only", action="store_true", help="use only files that are here; no network")
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: cuda if there is one, else cpu)"
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")


def load_explainer(arguments: argparse.Namespace, *, load_classifier: bool = True) -> AhaExplainer:
    """Load the explainer that `arguments` name, with its classifier if wished, in eval mode on the wanted device.

    Raises:
        CommandError: there is no such device, or the explainer or its classifier cannot be loaded.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from huggingface_hub.utils import logging as hub_logging
    from safetensors import SafetensorError
    from transformers.utils import logging

    from .. import AhaExplainer

    if not arguments.debug:
        # Progress bars of loading, retries and notes for developers would drown the answer.
        hub_logging.set_verbosity_error()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    device = _find_device(arguments.device)
    # The Hub's message about such a name would speak of repository ids.
    if arguments.explainer.startswith((".", "/", "~")) and not Path(arguments.explainer).is_dir():
        raise CommandError(f"there is no folder {arguments.explainer!r} to load an explainer from.")
    try:
        explainer = AhaExplainer.from_pretrained(
            arguments.explainer,
            classifier=arguments.classifier,
            load_classifier=load_classifier,
            revision=arguments.revision or "main",
            local_files_only=arguments.local_files_only,
            dtype=getattr(torch, arguments.dtype),
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        bundled = [path.parent.name for path in sorted(BUNDLED.glob("*/config.json"))]
        near = difflib.get_close_matches(arguments.explainer, bundled, n=1)
        hint = f" (did you mean the bundled {near[0]!r}?)" if near and near[0] != arguments.explainer else ""
        raise CommandError(
            f"the explainer {arguments.explainer!r}{hint} cannot be loaded: {_first_line(error)}"
        ) from error
    return explainer.to(device).eval()


def describe_explainer(explainer: AhaExplainer, arguments: argparse.Namespace) -> dict[str, Any]:
    """What has to be known to load the same explainer and classifier again, ready for JSON. No network is used."""
    from ..modeling_aha import _commit_of

    config = explainer.config
    if arguments.classifier is None:
        classifier, classifier_revision = config.base_model_name_or_path, config.base_model_revision
    else:
        classifier, classifier_revision = arguments.classifier, _commit_of(arguments.classifier, None, None)
    return {
        "explainer": {
            "id": arguments.explainer,
            "revision": _commit_of(arguments.explainer, arguments.revision, None) or arguments.revision,
        },
        "classifier": {
            "id": classifier,
            "revision": classifier_revision,
            "fingerprint": config.base_model_fingerprint,
        },
        "device": str(explainer.device),
        "dtype": arguments.dtype,
    }


def _find_device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises, by kind of device
        raise CommandError(f"the device {name!r} cannot be used here: {_first_line(error)}") from error
    return device


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
