"""The card of a dataset of maps: what was explained with what, what the columns hold, how exact they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from ..files import write_atomically
from ..markdown import Markdown, clean_text, code_string, escape_markdown, table
from .engine import MapsSummary
from .folder import CARD_FILE, COLUMNS, CONTRAST_COLUMNS, RUN_FILE, UNREADABLE_FILE
from .ranks import QUANTISATIONS


_LISTED = 10


def write_maps_card(summary: MapsSummary, *, repo_id: str | None = None, command: str | None = None) -> list[Path]:
    """Write `README.md` and `unreadable.jsonl` into the folder of a finished run.

    Args:
        summary: of the run.
        repo_id: where the dataset will be, for the example; the folder's name when left out.
        command: how it was made.

    Returns:
        the files written; `unreadable.jsonl` only where a photograph has no map.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = summary.folder.folder
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    text = maps_card(summary, run["identity"], name=repo_id or folder.resolve().name, command=command)
    card = write_atomically(folder / CARD_FILE, lambda file: file.write_text(text, encoding="utf-8"))
    listed = folder / UNREADABLE_FILE
    if not summary.unreadable:
        return [card]
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in summary.unreadable)
    return [card, write_atomically(listed, lambda file: file.write_text(lines, encoding="utf-8"))]


def maps_card(summary: MapsSummary, identity: Mapping[str, Any], *, name: str, command: str | None = None) -> str:
    """The card as text; see [`write_maps_card`].

    Args:
        summary: of the run.
        identity: of the run, as `run.json` keeps it.
        name: what an example loads.
        command: how it was made.
    """
    dataset, explainer, classifier = (identity[key] for key in ("dataset", "explainer", "classifier"))
    quantisation = QUANTISATIONS[identity["quantisation"]]
    data = DatasetCardData(
        pretty_name=clean_text(f"Attribution maps of {explainer.get('id')} for {dataset.get('id')}"),
        tags=["hf_aha", "explainability", "attribution"],
        task_categories=["image-classification"],
        source_datasets=[dataset["id"]] if dataset.get("on_hub") else None,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": summary.folder.split, "path": "data/*.parquet"}],
            }
        ],
    )
    target = identity["target"]
    if isinstance(target, Mapping):
        asked = f"the class in the column {target['label_column']}"
    elif target == "predicted":
        asked = "the predicted class" if identity["top_k"] == 1 else f"the {identity['top_k']} most probable classes"
    else:
        asked = f"class {target}"
    against, columns = identity.get("against"), COLUMNS
    if against is not None:
        asked = f"the most probable class other than {against}" if target == "predicted" else asked
        asked, columns = f"{asked}, rather than class {against}", {**COLUMNS, **CONTRAST_COLUMNS}
    size = identity["map_size"]
    facts = [
        ("photographs", f"{summary.photographs:,} of {_named(dataset)}, split {dataset.get('split')}"),
        ("maps", f"{summary.maps:,}, {_bytes(summary.bytes)} ({_bytes(summary.bytes / max(summary.maps, 1))} a map)"),
        ("without a map", f"{len(summary.unreadable):,}" + (f", see {UNREADABLE_FILE}" if summary.unreadable else "")),
        ("explainer", f"{_named(explainer)}, weights {explainer['weights']}"),
        ("classifier", _named(classifier)),
        ("class asked about", asked),
        ("map size", "the classifier's input" if size is None else f"{size[0]} x {size[1]}, averaged before ranking"),
        ("precision of the passes", identity["precision"]),
    ]
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# Which pixels mattered: maps for {escape_markdown(_last(dataset.get('id')))}\n",
        "Learned pixel attribution by [hf_aha](https://arxiv.org/abs/2604.05819): for every photograph, the order in "
        f"which its pixels speak for a class{'' if against is None else ' rather than another'}, as a grey picture of "
        "ranks. The photographs themselves are not included; they come under their own terms, and so do maps made "
        "from them.\n",
        table(["", ""], facts) + "\n",
        "## How to read it\n",
        "```python\n"
        "from hf_aha.dataset_maps import StoredMap, load_maps\n\n"
        f"maps = load_maps({code_string(name)})  # or datasets.load_dataset\n"
        "one = StoredMap.from_row(maps[0])\n"
        "one.label, one.ranks.shape  # ranks (H, W) in the photograph's own pixels, 1 = most important\n"
        'one.explanation("photo.jpg").overlay().save("overlay.png")\n'
        "```\n",
        "## Columns\n",
        table(["column", "holds"], [(Markdown(f"`{name}`"), Markdown(text)) for name, text in columns.items()]) + "\n",
        "## How exact the ranks are\n",
        "The pixel of hard rank k (0 = most important; equal scores in index order) among the N pixels of its map has "
        f"the rank (N - 1 - k) / (N - 1), which is rounded to one of {quantisation.levels + 1:,} levels "
        f"({quantisation.name}). A rank read back is off by at most {quantisation.error_bound:.2g}. "
        + (
            "Maps of up to 65,536 pixels keep their whole order.\n"
            if quantisation.name == "uint16"
            else "About N / 256 pixels share a level; their order among each other is not kept.\n"
        ),
        "Only the order of the pixels says something. In the photograph's own pixels the ranks are interpolated; "
        "pixels outside the classifier's crop are NaN.\n",
    ]
    if summary.unreadable:
        rows = [(one["row"], one["image_id"], one["error"]) for one in summary.unreadable[:_LISTED]]
        more = len(summary.unreadable) - len(rows)
        parts += ["## Photographs without a map\n", table(["row", "image_id", "reason"], rows) + "\n"]
        parts += [f"{more:,} more are in `{UNREADABLE_FILE}`.\n"] if more else []
    if command is not None:
        parts += ["## How it was made\n", f"```\n{clean_text(command, 2000).replace('`', '')}\n```\n"]
    return "\n".join(parts)


def _named(one: Mapping[str, Any]) -> str:
    revision = one.get("revision")
    config = one.get("config")
    return f"{one.get('id')}{f' ({config})' if config else ''}{f' at {revision}' if revision else ''}"


def _last(name: object) -> Markdown | str:
    return str(name).rstrip("/").rpartition("/")[2]


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


__all__ = ["maps_card", "write_maps_card"]
