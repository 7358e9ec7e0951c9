"""Model cards of explainers, written from their config and from what was measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card_results import CardResults, MeasuredValue, Measurement
from .configuration_aha import AhaConfig
from .markdown import Markdown, as_markdown, clean_text, code_string, escape_markdown, table
from .modeling_aha import AhaExplainer
from .objectives import FaithfulnessObjective
from .training_args import AhaTrainingArguments


LIBRARY = "hf_aha"
PAPER = "https://arxiv.org/abs/2604.05819"
TAGS = ("explainability", "attribution", "saliency", "vision-transformer", "arxiv:2604.05819")
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"

# Settings of a run that say nothing about what was learned.
_HOUSEKEEPING = re.compile(
    r"output_dir|resume_from_checkpoint|dataloader_num_workers|max_unreadable|(log|eval|save|hub|push)_.*"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Licence:
    """A licence as the Hub's metadata has it, and where it comes from.

    Args:
        identifier: an identifier of the Hub such as `"apache-2.0"`, or any other text, which becomes a name.
        name, link: of a licence that has no identifier.
        inherited: it is that of the target model.
    """

    identifier: str
    name: str | None = None
    link: str | None = None
    inherited: bool = False

    def metadata(self) -> dict[str, str | None]:
        """The `license` fields of a card; whatever is no identifier becomes `other` with a name."""
        identifier = clean_text(self.identifier)
        if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", identifier):
            name = None if self.name is None else clean_text(self.name)
        else:
            identifier, name = "other", clean_text(self.name or self.identifier)
        link = None if self.link is None else clean_text(self.link)
        return {"license": identifier, "license_name": name, "license_link": link}


@dataclass(frozen=True)
class Example:
    """One picture of a card: its place beside the card, and the class it explains."""

    file: str
    label: str


class AhaModelCardData(ModelCardData):
    """Metadata of an explainer's card; the fields of `huggingface_hub.ModelCardData` with what all explainers share.

    `library_name` is `hf_aha`, `base_model_relation` is `adapter` where there is a `base_model`, and `tags` begin with
    ours. There is no `pipeline_tag`: none of the Hub's tasks takes a photograph and a class and returns a map.

    Example:
        >>> data = AhaModelCardData(base_model="google/vit-base-patch16-224", license="apache-2.0")
        >>> data.library_name, data.base_model_relation
        ('hf_aha', 'adapter')
    """

    def __init__(self, *, library_name: str | None = LIBRARY, tags: Iterable[str] | None = None, **fields: Any):
        if fields.get("base_model") and not fields.get("base_model_relation"):
            fields["base_model_relation"] = "adapter"
        super().__init__(library_name=library_name, tags=list(dict.fromkeys([*TAGS, *(tags or ())])), **fields)


class AhaModelCard(ModelCard):
    """A card whose metadata are [`AhaModelCardData`]; loaded, saved and validated as any `huggingface_hub.ModelCard`.

    Example:
        `AhaModelCard.load("org/aha-vit-b16").data.base_model`
    """

    card_data_class = AhaModelCardData


def create_model_card(
    explainer: AhaExplainer,
    *,
    repo_id: str,
    results: CardResults | None = None,
    results_file: str = "results.json",
    datasets: Sequence[str] | None = None,
    licence: Licence | str | None = None,
    tags: Iterable[str] | None = None,
    examples: Sequence[Example] = (),
    folder: Path | None = None,
) -> AhaModelCard:
    """Write the card of an explainer.

    Every measured number comes from `results`; the other numbers are those of the explainer's config. A target model
    is named by its Hub id only if its commit is recorded, and otherwise by the last part of its path. Texts that are
    not ours (labels, ids, names in result files) are escaped.

    Args:
        explainer: its classifier need not be attached.
        repo_id: where users load it from: a Hub id, or the name of a bundled explainer.
        results: what was measured.
        results_file: the file of these results beside the card, which the card cites.
        datasets: those it was trained on, Hub ids or names; as the config records it when left out.
        licence: the target's, which its explainer inherits.
        tags: more of them.
        examples: pictures beside the card.
        folder: where the card will lie; it mentions a training log, a plot and code files that are there.

    Example:
        `create_model_card(explainer, repo_id="org/aha-vit-b16").save("README.md")`
    """
    config, results = explainer.config, results or CardResults()
    licence = Licence(licence) if isinstance(licence, str) else licence
    training = config.training if isinstance(config.training, Mapping) else {}
    datasets = list(datasets if datasets is not None else filter(None, [training.get("dataset")]))
    name = clean_text(repo_id).split("/")[-1]
    base_model = _pinned_hub_id(config.base_model_name_or_path, config.base_model_revision)
    data = AhaModelCardData(
        base_model=base_model,
        datasets=[dataset for dataset in datasets if _is_hub_id(dataset)] or None,
        **({} if licence is None else licence.metadata()),
        model_name=name,
        tags=[clean_text(tag) for tag in tags or ()],
        eval_results=_evaluations(results) or None,
    )
    if data.eval_results is None:
        data.model_name = None
    body = (
        _environment()
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            name=name,
            repo_id=repo_id,
            paper=Markdown(PAPER),
            config=config,
            target=_target(config, base_model),
            encoder=_pinned_hub_id(config.encoder_name_or_path, config.encoder_revision)
            or _last_part(config.encoder_name_or_path),
            labels=[config.id2label[index] for index in sorted(config.id2label)],
            decoder_weights=sum(parameter.numel() for parameter in explainer.decoder.parameters()),
            training={**dict.fromkeys(("steps", "images_seen", "train_rows")), **training},
            labels_used=_labels_used(training),
            settings=_settings(training),
            references=training_references(config),
            datasets=[(name, _is_hub_id(name)) for name in map(_last_part_unless_hub_id, datasets)],
            dataset_revision=training.get("dataset_revision"),
            sections=_sections(results.measurements),
            costs=_costs(results),
            validation=results.validation,
            validation_rows=_validation_rows(results),
            results_file=results_file,
            licence=licence,
            licence_fields={} if licence is None else licence.metadata(),
            examples=examples,
            has=_what_lies_in(folder),
        )
    )
    body = re.sub(r"\n{3,}", "\n\n", body.strip())
    return AhaModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def training_references(config: AhaConfig) -> list[str] | None:
    """The references that training removed pixels with, or None when the config does not tell.

    Example:
        >>> training_references(AhaConfig(training={"arguments": {"references": ["blur"]}}))
        ['blur']
    """
    arguments = (config.training or {}).get("arguments")
    if not isinstance(arguments, Mapping):
        return None
    given = arguments.get("references")
    if given is None and arguments.get("preset", "default") in ("default", "paper"):
        given = FaithfulnessObjective.preset(arguments.get("preset", "default")).references
    return list(map(str, given)) if isinstance(given, (list, tuple)) else None


# ------------------------------------------------------------------------------------------------------------- context


def _environment() -> jinja2.Environment:
    # Every value passes through `as_markdown`, so none can be left unescaped by forgetting a filter.
    environment = jinja2.Environment(
        finalize=as_markdown, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = code_string
    environment.filters["count"] = lambda number: Markdown(f"{number:,}") if isinstance(number, int) else number
    environment.filters["escape_all"] = lambda texts: Markdown(", ".join(map(escape_markdown, texts)))
    environment.globals["table"] = table
    return environment


def _target(config: AhaConfig, base_model: str | None) -> dict[str, Any]:
    """How the card names the classifier, and whether loading the explainer finds it."""
    return {
        "name": base_model or _last_part(config.base_model_name_or_path) or "that was built in memory",
        "id": None if base_model is None else Markdown(base_model),
        "revision": config.base_model_revision if base_model is not None else None,
        "included": config.includes_classifier,
        "found": config.includes_classifier or base_model is not None,
    }


def _settings(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings of the trainer that bear on the result, in its order; anything else in the config stays out."""
    arguments = training.get("arguments")
    if not isinstance(arguments, Mapping):
        return []
    names = [field.name for field in dataclasses.fields(AhaTrainingArguments)]
    return [
        (name, ", ".join(map(str, value)) if isinstance(value := arguments[name], (list, tuple)) else str(value))
        for name in names
        if name in arguments and not _HOUSEKEEPING.fullmatch(name)
    ]


def _labels_used(training: Mapping[str, Any]) -> bool | None:
    arguments = training.get("arguments")
    classes = arguments.get("target_classes") if isinstance(arguments, Mapping) else None
    return None if classes is None else classes == "label"


def _validation_rows(results: CardResults) -> list[tuple[object, Markdown]]:
    rows = []
    for name, value in (results.validation.values if results.validation else {}).items():
        reference, *level, curve = name.removeprefix("validation/").split("/")
        unit = "patch cells" if level == ["cells"] else "pixels"
        rows.append((f"{curve}, {unit}, {reference} reference", Markdown(f"{value:.4f}")))
    return rows


def _sections(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Measurements under what they mean: trained on, not trained on, not known."""
    titles = {
        True: "What it was trained on, on photographs it did not see",
        False: "What it was not trained on",
        None: "Measured",
    }
    sections = []
    for trained_on, title in titles.items():
        chosen = [m for m in measurements if m.trained_on is trained_on]
        if chosen:
            blocks = [{"title": _title(m), "facts": _facts(m), "table": _results_table(m)} for m in chosen]
            # What was measured is said once for neighbours that share it.
            for before, block in zip(chosen, blocks[1:], strict=False):
                block["facts"] = None if block["facts"] == _facts(before) else block["facts"]
            sections.append({"title": title, "blocks": blocks})
    return sections


def _title(measurement: Measurement) -> Markdown:
    version = "" if measurement.version is None else f", version {measurement.version}"
    title = f"{measurement.protocol}{version}"
    counts = {value.images for value in measurement.values}
    photographs = f" ({counts.pop():,} photographs)" if len(counts) == 1 else ""
    # The name of a protocol, such as hf_aha/patch/blur, is one to type; everything else is words.
    if "/" not in measurement.protocol:
        title = title[:1].upper() + title[1:].replace("_", " ")
    return Markdown(escape_markdown(title) + photographs)


def _facts(measurement: Measurement) -> Markdown:
    m = measurement
    dataset = escape_markdown(_last_part_unless_hub_id(m.dataset) or "unnamed photographs")
    parts = [
        dataset + (f" at commit `{m.dataset_revision}`" if _COMMIT.fullmatch(m.dataset_revision or "") else ""),
        "" if m.split is None else f"split {escape_markdown(m.split)}",
        "" if m.selection is None else str(escape_markdown(m.selection)),
        "{} x {} px".format(*m.image_size),
    ]
    versions = ", ".join(f"{escape_markdown(name)} {escape_markdown(number)}" for name, number in m.versions.items())
    sources = ", ".join(map(escape_markdown, m.sources))
    return Markdown(
        f"{', '.join(filter(None, parts))}. Brackets: {100 * m.confidence:g} % percentile bootstrap over photographs, "
        f"{m.resamples:,} resamples, seed {m.seed}. Measured with {versions}, from {sources}."
    )


def _results_table(measurement: Measurement) -> Markdown:
    """A method a row, the explainer first; a metric a column, and the paired difference of the last one."""
    values = measurement.values
    metrics = {value.metric: value.higher_is_better for value in values}
    methods = list(dict.fromkeys(v.method for v in sorted(values, key=lambda value: not value.explainer)))
    found = {(value.method, value.metric): value for value in values}
    last = list(metrics)[-1]
    show_counts = len({value.images for value in values}) > 1
    compared = any(value.paired for value in values)
    header: list[object] = ["method"]
    header += [f"{name} ({'higher' if higher else 'lower'} is better)" for name, higher in metrics.items()]
    header += [f"{last}, this explainer minus the method, paired"] if compared else []
    header += ["photographs"] if show_counts else []
    rows = []
    for method in methods:
        mine = [found.get((method, metric)) for metric in metrics]
        some = next(value for value in mine if value is not None)
        row: list[object] = [Markdown(f"**{escape_markdown('this explainer')}**") if some.explainer else method]
        row += [Markdown("-") if value is None else _interval(value) for value in mine]
        if compared:
            paired = None if mine[-1] is None else mine[-1].paired
            row.append(Markdown("-") if paired is None else Markdown(_numbers(*paired, sign="+")))
        rows.append(row + ([Markdown(f"{some.images:,}")] if show_counts else []))
    left_out = {value.left_out for value in values} - {0}
    text = table(header, rows)
    if left_out:
        count = " or ".join(f"{number:,}" for number in sorted(left_out))
        text += f"\n\nLeft out, as not every method gave a number for them: {count} photographs."
    return Markdown(text)


def _interval(value: MeasuredValue) -> Markdown:
    return Markdown(_numbers(value.mean, value.low, value.high))


def _numbers(mean: float, low: float | None, high: float | None, sign: str = "") -> str:
    interval = "one photograph, no interval" if low is None else f"{low:{sign}.3f}, {high:{sign}.3f}"
    return f"{mean:{sign}.3f} ({interval})"


def _costs(results: CardResults) -> dict[str, Any] | None:
    if not results.costs:
        return None
    costs = sorted(results.costs, key=lambda cost: not cost.explainer)
    rows = [
        ["this explainer" if cost.explainer else cost.method, Markdown(f"{cost.median_seconds:.4f}")] for cost in costs
    ]
    return {"table": table(["method", "median seconds of one map"], rows), "machine": costs[0].machine}


def _evaluations(results: CardResults) -> list[EvalResult]:
    """The explainer's own numbers for the `model-index`."""
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Explaining an image classifier",
            dataset_type=dataset if _is_hub_id(dataset) else re.sub(r"[^a-z0-9]+", "-", dataset.casefold()),
            dataset_name=dataset,
            dataset_split=None if m.split is None else clean_text(m.split),
            dataset_revision=m.dataset_revision if _COMMIT.fullmatch(m.dataset_revision or "") else None,
            metric_type=clean_text(value.metric),
            metric_name=f"{clean_text(value.metric)} ({clean_text(m.protocol)})",
            metric_value=round(value.mean, 4),
            metric_args={
                "interval": None if value.low is None else [round(value.low, 4), round(value.high, 4)],
                "photographs": value.images,
            },
        )
        for m in results.measurements
        for dataset in [clean_text(_last_part_unless_hub_id(m.dataset) or "unnamed")]
        for value in m.values
        if value.explainer
    ]


def _what_lies_in(folder: Path | None) -> dict[str, bool]:
    names = {"log": "training/log.jsonl", "plot": "training/training.png"}
    found = {key: folder is not None and (folder / name).is_file() for key, name in names.items()}
    return {**found, "code": folder is not None and any(folder.glob("*.py"))}


# --------------------------------------------------------------------------------------------------------------- names


def _is_hub_id(name: object) -> bool:
    if not isinstance(name, str) or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _pinned_hub_id(name: str | None, revision: str | None) -> str | None:
    """A Hub id whose commit is known. Without one it may as well be a relative folder."""
    return name if name is not None and _COMMIT.fullmatch(revision or "") and _is_hub_id(name) else None


def _last_part(name: str | None) -> str | None:
    """The last part of a path of this or another system, so that no card tells where a machine keeps its files."""
    parts = [part for part in re.split(r"[\\/]+", name or "") if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else None


def _last_part_unless_hub_id(name: str | None) -> str | None:
    return name if _is_hub_id(name) else _last_part(name)


__all__ = ["AhaModelCard", "AhaModelCardData", "Example", "Licence", "create_model_card", "training_references"]
