"""`AhaTrainingArguments`: every setting of a training run, from YAML, command line or Python."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .mosaics import MOSAICS
from .objectives import FaithfulnessObjective
from .perturbation import REFERENCES
from .training_classes import FIRST_CLASSES, SECOND_CLASSES


_COUNTS = (
    "max_steps",
    "per_device_batch_size",
    "gradient_accumulation_steps",
    "log_steps",
    "eval_steps",
    "eval_images",
    "save_steps",
    "save_total_limit",
    "max_nonfinite_steps",
)

TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "comet_ml": "comet-ml",
    "clearml": "clearml",
    "aim": "aim",
    "dvclive": "dvclive",
}
"""Trackers of Accelerate, and the packages that they come in."""

MAY_CHANGE_ON_RESUME = (
    "output_dir",
    "max_steps",  # with a warning
    "dataloader_num_workers",
    "max_unreadable",
    "max_nonfinite_steps",
    "log_steps",
    "eval_steps",
    "eval_images",
    "eval_references",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "gradient_checkpointing",  # the same numbers
    "auto_find_batch_size",  # what it finds must be the same
    "report_to",
    "run_name",
    "tracking_project",
    "disable_tqdm",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_token",
)
"""Settings that do not change the weights after a given number of steps; a run goes on only if all others are kept."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class AhaTrainingArguments:
    """Settings of [`AhaTrainer`]; names follow `transformers.TrainingArguments` where both have the setting.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> AhaTrainingArguments(output_dir="run", max_steps=10).objective().ranker
        'quantile'
    """

    output_dir: str = field(metadata=_help("Folder of the run: log, plot, checkpoints and the final explainer."))
    max_steps: int = field(default=1000, metadata=_help("Optimiser steps."))
    per_device_batch_size: int = field(default=16, metadata=_help("Images a step and process."))
    gradient_accumulation_steps: int = field(default=1, metadata=_help("Batches an optimiser step."))
    learning_rate: float = field(default=2e-3, metadata=_help("Peak learning rate of AdamW."))
    weight_decay: float = field(default=0.01, metadata=_help("Decay of weight matrices; norms and biases have none."))
    warmup_share: float = field(default=0.06, metadata=_help("Share of the steps that warm up; then a cosine to 0."))
    max_grad_norm: float = field(default=1.0, metadata=_help("Gradients are clipped to this norm."))
    ema_decay: float = field(
        default=0.998, metadata=_help("Decay of the averaged weights that are saved; 0 for none.")
    )
    mixed_precision: str = field(default="bf16", metadata=_help("no, bf16 or fp16; ranking stays in float32."))
    seed: int = field(default=0, metadata=_help("Seeds the order, crops, references, points and noise."))
    dataloader_num_workers: int = field(default=1, metadata=_help("Processes that decode images."))
    crop_scale: list[float] = field(
        default_factory=lambda: [0.35, 1.0], metadata=_help("Range of a training crop's share of the image area.")
    )
    image_size: int | None = field(
        default=None,
        metadata=_help("Train at this side in pixels instead of the classifier's own; cheaper when less."),
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata=_help(
            "Compute activations of classifier and decoder again instead of keeping them: slower, smaller."
        ),
    )
    torch_compile: bool = field(default=False, metadata=_help("Compile the classifier's passes on perturbed images."))
    torch_compile_backend: str | None = field(
        default=None, metadata=_help("Backend of torch.compile; inductor if left out.")
    )
    auto_find_batch_size: bool = field(
        default=False,
        metadata=_help(
            "Halve per_device_batch_size until a batch fits into memory, and accumulate as many more batches."
        ),
    )
    max_nonfinite_steps: int = field(
        default=20,
        metadata=_help("Steps with NaN or infinity are left out; stop at this many in a row."),
    )
    max_unreadable: int = field(default=100, metadata=_help("Stop when more rows than this cannot be read."))

    preset: str = field(default="default", metadata=_help("Objective settings to start from: default or paper."))
    target_classes: str = field(
        default="predicted",
        metadata=_help(
            "Class explained in training: predicted, label, sampled from the predicted probabilities, or alone, "
            "predicted for the photograph without what is pasted beside it."
        ),
    )
    second_class: str = field(
        default="none",
        metadata=_help(
            "Another class explained on every image of a step: none, rival (the most probable other one), or label "
            "(the rival where the label is the first class)."
        ),
    )
    mosaic_share: float = field(
        default=0.0, metadata=_help("Share of images pasted together from photographs, so that classes compete.")
    )
    mosaic_layout: str = field(
        default="halves",
        metadata=_help(
            "How they are: halves of two, or quarters, four shrunk to 2 x 2 cells; batches of 4, 8, 12 ..."
        ),
    )
    pointing_weight: float = field(
        default=0.0,
        metadata=_help(
            "Weight of the loss that draws a class's map into its own photographs of a pasted image; the grid "
            "pointing game is then no independent test."
        ),
    )
    tau_start: float = field(default=1.0, metadata=_help("Ranking temperature at the first step."))
    tau_end: float = field(default=0.3, metadata=_help("Ranking temperature at the last step, reached geometrically."))
    ranker: str | None = field(default=None, metadata=_help("Override of the preset: transport, sinkhorn, quantile."))
    num_bins: int | None = field(default=None, metadata=_help("Override: steps of a curve."))
    curve_points: int | None = field(default=None, metadata=_help("Override: points a curve and image; 0 for all."))
    straight_through: bool | None = field(default=None, metadata=_help("Override: hard masks forward."))
    noise: float | None = field(default=None, metadata=_help("Override: scale of the Gumbel noise."))
    pixel_share: float | None = field(default=None, metadata=_help("Override: share of steps that rank pixels."))
    grid_range: list[int] | None = field(default=None, metadata=_help("Override: cells a side of random grids."))
    references: list[str] | None = field(default=None, metadata=_help("Override: black, mean, blur, noise."))
    blur_sigma: float | None = field(default=None, metadata=_help("Override: blur, as a share of the side."))
    mask_smoothing: float | None = field(default=None, metadata=_help("Override: Gaussian on the masks, in pixels."))
    peak_weight: float | None = field(default=None, metadata=_help("Override: weight of the peak penalty."))
    tv_weight: float | None = field(
        default=None, metadata=_help("Override: weight of the total variation of the standardised scores.")
    )
    deletion_weight: float | None = field(
        default=None, metadata=_help("Override: weight of deletion against insertion; 1 treats both alike.")
    )
    score: str | None = field(default=None, metadata=_help("Override: probability or log_odds."))

    log_steps: int = field(default=10, metadata=_help("Steps between log lines."))
    eval_steps: int = field(default=200, metadata=_help("Steps between validations with hard curves."))
    eval_images: int = field(default=32, metadata=_help("Validation images."))
    eval_references: list[str] = field(
        default_factory=lambda: ["blur", "mean"], metadata=_help("References of the validation curves.")
    )
    report_to: list[str] | None = field(
        default=None, metadata=_help(f"Trackers that get settings and log: {', '.join(TRACKERS)}.")
    )
    run_name: str | None = field(
        default=None, metadata=_help("Name of the run in the trackers; that of the repository or folder if left out.")
    )
    tracking_project: str = field(default="hf-aha", metadata=_help("Project of the run in the trackers."))
    disable_tqdm: bool = field(default=False, metadata=_help("Show no progress line."))
    save_steps: int = field(default=200, metadata=_help("Steps between checkpoints."))
    save_total_limit: int = field(default=2, metadata=_help("Checkpoints kept."))
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            **_help("A checkpoint folder, or `auto` for the newest whole one in output_dir."),
            "aliases": ["--resume"],
        },
    )

    push_to_hub: bool = field(
        default=False, metadata=_help("Upload the trained explainer with its card, log and plot to the Hub.")
    )
    hub_model_id: str | None = field(
        default=None, metadata=_help("Repository to upload to; the name of output_dir in your namespace if left out.")
    )
    hub_strategy: str = field(
        default="end", metadata=_help("Upload at the end, or at every_save: also, in the background, at checkpoints.")
    )
    hub_private_repo: bool | None = field(
        default=None, metadata=_help("Make a new repository private; as your namespace has it if left out.")
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata=_help("Token with write access; that of `hf auth login` or HF_TOKEN if left out. Never stored."),
    )

    def __post_init__(self):
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}.")
        if self.pointing_weight > 0 and self.mosaic_share == 0:
            raise ValueError(
                f"pointing_weight is {self.pointing_weight}, but no image is pasted together; give a mosaic_share."
            )
        for name in ("pointing_weight", "weight_decay", "dataloader_num_workers", "max_unreadable", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but it is {getattr(self, name)}.")
        if self.target_classes not in FIRST_CLASSES:
            raise ValueError(
                f"target_classes must be predicted, label, sampled or alone, but it is {self.target_classes!r}."
            )
        if self.second_class not in SECOND_CLASSES:
            raise ValueError(f"second_class must be none, rival or label, but it is {self.second_class!r}.")
        if self.mosaic_layout not in MOSAICS:
            raise ValueError(f"mosaic_layout must be {' or '.join(MOSAICS)}, but it is {self.mosaic_layout!r}.")
        for name in ("tau_start", "tau_end", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, but it is {getattr(self, name)}.")
        for name in ("warmup_share", "mosaic_share", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], but it is {getattr(self, name)}.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16, but it is {self.mixed_precision!r}.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two rising shares in (0, 1], but it is {self.crop_scale}.")
        if not self.eval_references or not set(self.eval_references) <= set(REFERENCES):
            raise ValueError(
                f"eval_references must be some of {', '.join(REFERENCES)}, but they are {self.eval_references}."
            )
        if self.hub_strategy not in ("end", "every_save"):
            raise ValueError(f"hub_strategy must be end or every_save, but it is {self.hub_strategy!r}.")
        if self.torch_compile_backend is not None and not self.torch_compile:
            raise ValueError(
                f"torch_compile_backend is {self.torch_compile_backend!r}, but torch_compile is false; set it to true."
            )
        for name in self.report_to or ():
            if name not in TRACKERS:
                near = difflib.get_close_matches(name, TRACKERS, n=1)
                advice = f"did you mean {near[0]!r}?" if near else f"known trackers are {', '.join(TRACKERS)}."
                raise ValueError(f"report_to has an unknown tracker {name!r}; {advice}")
        if self.push_to_hub:
            try:
                validate_repo_id(self.repository_name())
            except HFValidationError as error:
                raise ValueError(
                    f"The explainer cannot be uploaded to {self.repository_name()!r}: give hub_model_id as NAME or "
                    "NAMESPACE/NAME, of letters, digits, '-', '_' and '.'."
                ) from error
        self.objective()

    def repository_name(self) -> str:
        """Where the run is uploaded to: `hub_model_id`, or the name of `output_dir`."""
        return self.hub_model_id or Path(self.output_dir).resolve().name

    def to_dict(self) -> dict[str, object]:
        """Every setting but the token, to be written down."""
        return {name: value for name, value in asdict(self).items() if name != "hub_token"}

    def objective(self) -> FaithfulnessObjective:
        """The preset with this run's overrides.

        Raises:
            ValueError: unknown preset, or a value out of range.
        """
        given = {f.name: getattr(self, f.name) for f in fields(FaithfulnessObjective)}
        overrides = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }
        return replace(FaithfulnessObjective.preset(self.preset), **overrides)

    def tau(self, step: int) -> float:
        """Ranking temperature at `step`, 0..max_steps: geometric from `tau_start` to `tau_end`."""
        share = min(step / max(1, self.max_steps - 1), 1.0)
        return self.tau_start * (self.tau_end / self.tau_start) ** share
