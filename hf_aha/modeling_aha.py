"""`AhaExplainer`: a frozen classifier and a light decoder that says which pixels made it decide."""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ModelOutput, cached_file
from transformers.utils.hub import extract_commit_hash

from .classifier_aha import FINGERPRINT_TOLERANCE, FrozenClassifier, fingerprint_distance
from .configuration_aha import AhaConfig
from .contrast_aha import contrast_classes, contrast_scores
from .decoder_aha import AttributionDecoder, GradientDetail, MeanOfChannels
from .encoder_aha import FrozenEncoder, mean_and_std
from .gradients_aha import gradient_maps
from .labels_aha import class_index
from .loading_aha import (
    CLASSIFIER_SUBFOLDER,
    ENCODER_SUBFOLDER,
    check_arguments,
    check_finite_weights,
    check_weights,
    load_encoder,
    load_frozen_parts,
    load_image_processor,
    missing_weights,
    read_config,
    reading_weights,
)
from .loading_aha import load_classifier as load_hub_classifier
from .references_aha import Normalization
from .repository_aha import ExplainerAccessError, ExplainerFilesError, Place, find_weights
from .transfer_aha import settings_from, started_from, taps_from


# What a load of the explainer passes on to the load of its classifier. `revision` is absent on purpose: the
# explainer's commit says nothing about the classifier's, which the config pins by itself.
_HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download")
_MODEL_ARGUMENTS = ("dtype", "device_map", "attn_implementation")


# Where a repository that carries the code keeps the classes, for the auto classes of transformers.
_AUTO_MAP = {"AutoConfig": "configuration_aha.AhaConfig", "AutoModel": "modeling_aha.AhaExplainer"}

# What `from_classifier` passes on to the config.
_DECODER_SETTINGS = (
    "grid_width",
    "grid_depth",
    "quarter_width",
    "half_width",
    "gradient_features",
    "gradient_references",
    "gradient_detail",
)

# Arguments of `save_pretrained(push_to_hub=True)` that are about the upload.
_PUSH_ARGUMENTS = (
    "repo_id",
    "private",
    "token",
    "tags",
    "commit_message",
    "commit_description",
    "revision",
    "create_pr",
)


class ClassifierMismatchError(ValueError):
    """The classifier at hand is not the one the explainer was trained for."""


@dataclass
class AhaOutput(ModelOutput):
    """Output of [`AhaExplainer`].

    Args:
        scores (`torch.FloatTensor` of shape `(batch, height, width)` or `(batch, classes, height, width)`):
            importance of every pixel for `target`, float32, unbounded; higher is more important; only the order
            counts.
        logits (`torch.FloatTensor` of shape `(batch, num_labels)`): the classifier's own, from the same forward.
        target (`torch.LongTensor` of shape `(batch,)` or `(batch, classes)`): the classes explained.
        against (`torch.LongTensor` of the shape of `target`, *optional*): the classes they were compared with.
    """

    scores: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    target: torch.LongTensor | None = None
    against: torch.LongTensor | None = None


class AhaExplainer(PreTrainedModel):
    """Explains an image classifier of the Hub with one dense score map in one forward pass.

    Example:
        >>> from hf_aha import AhaExplainer
        >>> explainer = AhaExplainer.from_pretrained("imagenette-demo")  # doctest: +SKIP
        >>> explanation = explainer.explain("photo.jpg")  # doctest: +SKIP
        >>> explanation.label, explanation.scores.shape  # doctest: +SKIP
        ('tench', (480, 640))
        >>> explanation.overlay().save("overlay.png")  # doctest: +SKIP

    Reference: "Learn to Rank: Visual Attribution by Learning Importance Ranking" (https://arxiv.org/abs/2604.05819).
    """

    config: AhaConfig
    config_class = AhaConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["AttributionDecoder"]
    # The decoder has no attention; what is possible is up to the classifier and the encoder.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: AhaConfig):
        super().__init__(config)
        # transformers fills in a default, which would look like a wish for the classifier when this config is loaded
        # with; the decoder has no attention.
        config._attn_implementation = None
        self.decoder = AttributionDecoder(
            config.token_size,
            len(config.taps),
            config.class_vector_size,
            grid_width=config.grid_width,
            grid_depth=config.grid_depth,
            quarter_width=config.quarter_width,
            half_width=config.half_width,
            num_gradient_maps=config.num_gradient_maps,
            num_gradient_token_maps=config.num_gradient_token_maps,
            gradient_detail=config.gradient_detail,
        )
        self.classifier: FrozenClassifier | None = None
        self.encoder: FrozenEncoder | None = None
        self.image_processor: BaseImageProcessor | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MeanOfChannels):
            init.copy_(module.weight, module.start_weight())
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, GradientDetail):
            init.ones_(module.weight)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    # ------------------------------------------------------------------------------------------ building and loading

    @classmethod
    def from_classifier(
        cls,
        classifier: PreTrainedModel | str | os.PathLike[str],
        *,
        init_from: AhaExplainer | str | os.PathLike[str] | None = None,
        image_processor: BaseImageProcessor | None = None,
        encoder: str | os.PathLike[str] | None = None,
        taps: Sequence[int] | None = None,
        gradient_layers: Sequence[int] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | str = torch.float32,
        attn_implementation: str | None = None,
        **decoder_settings: Any,
    ) -> AhaExplainer:
        """Build an untrained explainer for a classifier; every shape is derived from the classifier.

        Args:
            classifier: a loaded image classifier, a Hub id, or a folder. A loaded one is frozen and set to eval mode,
                but never moved or cast.
            init_from: an explainer of another classifier, or its Hub id, folder or bundled name. The decoder starts
                with every part of its decoder that fits, and takes its settings where none are given; what was copied
                is noted in `config.init_from`. Needs less training than a decoder from scratch, but is no trained
                explainer yet.
            image_processor: the classifier's; loaded from the same place when left out.
            encoder: a separate frozen backbone for the tokens (the paper's choice); that of `init_from`, or the
                classifier itself, when left out.
            taps: layers to read, from 1; a quarter, half, three quarters and all of them when left out, or those of
                `init_from` where it reads a model of the same depth.
            gradient_layers: layers of the classifier whose tokens' attributions are read, for `gradient_features` of
                2 and more; five spread over the depth when left out.
            revision, token, cache_dir, local_files_only: as in transformers, for the classifier given by id.
            dtype, attn_implementation: of the classifier given by id, and of the encoder.
            **decoder_settings: `grid_width`, `grid_depth`, `quarter_width`, `half_width`,
                `gradient_features`, `gradient_references` and `gradient_detail` of [`AhaConfig`].

        Raises:
            UnsupportedClassifierError: the model is no classifier of a supported family.
            ExplainerAccessError: the classifier or the encoder is not found, private, gated, or not reached.
            ExplainerFilesError: its weights are pickled or damaged, or it is no image classifier of transformers.
            ValueError: the classifier has no image processor and none is given; a tap does not exist; nothing of
                `init_from` fits.
            TypeError: unknown name among the decoder's settings; `init_from` is no explainer.
        """
        unknown = set(decoder_settings) - set(_DECODER_SETTINGS)
        if unknown:
            raise TypeError(f"from_classifier() has no argument {sorted(unknown)[0]!r}.")
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        check_arguments("from_classifier", hub)
        start = None if init_from is None else cls._to_start_from(init_from, hub)
        if start is not None:
            decoder_settings = settings_from(start.config, _DECODER_SETTINGS, decoder_settings)
        model_arguments = {"dtype": dtype} | (
            {"attn_implementation": attn_implementation} if attn_implementation else {}
        )
        if isinstance(classifier, nn.Module):
            source = getattr(classifier, "name_or_path", None) or None
            commit = _commit_of(source, revision, cache_dir)
            place = (
                None if source is None else Place(source, f"The classifier {source}", "", commit or revision, hub=hub)
            )
        else:
            source = str(classifier)
            advice = "; or load it yourself and give the model"
            place = Place(source, f"The classifier {source}", advice, revision, hub=hub)
            place, classifier = load_hub_classifier(place, model_arguments)
            commit = None if place.is_folder else place.revision
        frozen = FrozenClassifier(classifier)
        if image_processor is None and place:
            image_processor = load_image_processor(place)
        if image_processor is None:
            where = "was built in memory" if not place else f"{source} has no preprocessor_config.json"
            raise ValueError(f"The classifier {where}, so give its image_processor as well.")
        frozen_encoder = encoder_commit = None
        encoder_revision = None
        if encoder is None and start is not None:
            encoder, encoder_revision = start.config.encoder_name_or_path, start.config.encoder_revision
        if encoder is not None:
            place = Place(str(encoder), f"The encoder {encoder}", revision=encoder_revision, hub=hub)
            place, frozen_encoder = load_encoder(place, model_arguments)
            encoder_commit = None if place.is_folder else place.revision
        tokens_of = frozen if frozen_encoder is None else frozen_encoder
        if taps is None:
            taps = None if start is None else taps_from(start.config, tokens_of.num_layers)
            taps = taps or _default_taps(tokens_of.num_layers)
        if gradient_layers is None:
            without = start is not None and start.config.gradient_features > 1 and not start.config.gradient_layers
            wanted = decoder_settings.get("gradient_features", 0) > 1 and not without
            gradient_layers = _default_gradient_layers(frozen.num_layers) if wanted else []
        mean, std = mean_and_std(image_processor)
        config = AhaConfig(
            base_model_name_or_path=source,
            base_model_revision=commit,
            base_model_fingerprint=frozen.fingerprint(),
            base_model_type=frozen.model_type,
            image_size=list(_input_size(image_processor) or frozen.image_size),
            patch_size=list(frozen.patch_size),
            image_mean=mean,
            image_std=std,
            token_size=tokens_of.hidden_size,
            class_vector_size=frozen.class_vector_size,
            taps=list(taps),
            gradient_layers=list(gradient_layers),
            encoder_name_or_path=None if encoder is None else str(encoder),
            encoder_revision=encoder_commit,
            id2label=dict(frozen.id2label),
            label2id={label: index for index, label in frozen.id2label.items()},
            **decoder_settings,
        )
        explainer = cls(config)
        explainer.attach(frozen, encoder=frozen_encoder, image_processor=image_processor, check_fingerprint=False)
        if start is not None:
            name = start.name_or_path or "in memory" if init_from is start else init_from
            config.init_from = started_from(explainer.decoder, config, start.decoder, start.config, name)
        return explainer

    @classmethod
    def _to_start_from(cls, init_from: AhaExplainer | str | os.PathLike[str], hub: dict[str, Any]) -> AhaExplainer:
        if isinstance(init_from, (str, os.PathLike)):
            given = {name: value for name, value in hub.items() if value is not None}
            return cls.from_pretrained(init_from, load_classifier=False, **given)
        # By its config, because an explainer loaded as custom code of the Hub is of another class.
        if getattr(getattr(init_from, "config", None), "model_type", None) != AhaConfig.model_type:
            raise TypeError(
                f"init_from must be an explainer, or its Hub id or folder, but it is {type(init_from).__name__}."
            )
        return init_from

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        classifier: PreTrainedModel | str | os.PathLike[str] | None = None,
        load_classifier: bool = True,
        allow_classifier_mismatch: bool = False,
        **kwargs: Any,
    ) -> AhaExplainer:
        """Load an explainer and the classifier it explains.

        Args:
            pretrained_model_name_or_path: Hub id, folder, or the name of a bundled explainer (`"imagenette-demo"`); a
                folder of that name comes first.
            classifier: use this classifier instead of the one the config names (a loaded model, id or folder).
            load_classifier: with `False` only the decoder is loaded; call `attach` before use.
            allow_classifier_mismatch: warn instead of raise when the classifier behaves differently from the one the
                explainer was trained for.
            **kwargs: as for every transformers model. `token`, `cache_dir`, `local_files_only`, `force_download`,
                `dtype`, `device_map` and `attn_implementation` reach the classifier too; `revision` is the explainer's
                alone.

        Raises:
            ClassifierMismatchError: the classifier is not the one the explainer was trained for.
            ExplainerAccessError: a repository or folder is not found, private, gated, or not reached; an `OSError`.
            ExplainerFilesError: the files are damaged, pickled, or no explainer; an `OSError`.
            TypeError, ValueError: an argument is unknown, or a token cannot be one.
        """
        check_arguments("from_pretrained", kwargs)
        name = _bundled_path(pretrained_model_name_or_path)
        attention = kwargs.pop("attn_implementation", None)
        with_info = kwargs.pop("output_loading_info", False)
        place = Place(
            name,
            title=f"The explainer {name}",
            revision=kwargs.get("revision"),
            subfolder=kwargs.get("subfolder") or "",
            hub={key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs},
        )
        if "torch_dtype" in kwargs:
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        place, config = read_config(place, kwargs)
        if config._attn_implementation is not None:
            # The auto classes put the argument into the config, but the decoder has no attention to choose.
            attention, config = config._attn_implementation, copy.deepcopy(config)
            config._attn_implementation = None
        weights = find_weights(place, variant=kwargs.get("variant"))
        with torch.device("meta"):
            expected = cls(config).state_dict()
        if not kwargs.get("key_mapping"):
            check_weights(place, weights, expected)
        # The files are in the cache by now, so transformers finds them there, whatever `force_download` says.
        loading = kwargs | place.arguments() | {"force_download": False, "use_safetensors": True}
        with reading_weights(place):
            explainer, info = super().from_pretrained(
                name, *model_args, config=config, output_loading_info=True, **loading
            )
        if info["missing_keys"]:
            # transformers has filled them in at random.
            raise missing_weights(place, info["missing_keys"])
        check_finite_weights(place, explainer)
        if load_classifier:
            model_arguments = {key: kwargs[key] for key in _MODEL_ARGUMENTS if key in kwargs}
            if attention is not None:
                model_arguments["attn_implementation"] = attention
            if classifier is None:
                classifier = _bundled_classifier(name, config)
            classifier, encoder, processor = load_frozen_parts(place, config, classifier, model_arguments)
            explainer.attach(
                classifier, encoder=encoder, image_processor=processor, allow_mismatch=allow_classifier_mismatch
            )
        return (explainer, info) if with_info else explainer

    def attach(
        self,
        classifier: FrozenClassifier | PreTrainedModel,
        *,
        encoder: FrozenEncoder | None = None,
        image_processor: BaseImageProcessor | None = None,
        check_fingerprint: bool = True,
        allow_mismatch: bool = False,
    ) -> AhaExplainer:
        """Set the classifier to explain: it is frozen and put in eval mode, but never moved, cast or saved by default.

        Args:
            classifier: the classifier the explainer was trained for.
            encoder: the separate backbone, when the config names one.
            image_processor: of the classifier; needed by `explain`.
            check_fingerprint: compare the classifier's behaviour with the one recorded at training.
            allow_mismatch: warn instead of raise when it differs.

        Raises:
            ClassifierMismatchError: its sizes, number of classes or behaviour are not those of the config, or the
                encoder is not.
        """
        frozen = classifier if isinstance(classifier, FrozenClassifier) else FrozenClassifier(classifier)
        config = self.config
        facts = {
            "class_vector_size": frozen.class_vector_size,
            "patch_size": list(frozen.patch_size),
            "num_labels": frozen.num_labels,
        }
        if (encoder is None) != (config.encoder_name_or_path is None):
            raise ClassifierMismatchError(
                f"The explainer reads tokens of the encoder {config.encoder_name_or_path}: give it with "
                "encoder=FrozenEncoder.from_pretrained(...)."
                if encoder is None
                else "The explainer reads the classifier's own tokens: attach it without encoder=..."
            )
        name, tokens_of = ("classifier", frozen) if encoder is None else ("encoder", encoder)
        if max(config.gradient_layers, default=0) > frozen.num_layers:
            raise ClassifierMismatchError(
                f"The explainer reads the attributions of layer {max(config.gradient_layers)}, but the classifier has "
                f"{frozen.num_layers} layers."
            )
        if max(config.taps) > tokens_of.num_layers:
            raise ClassifierMismatchError(
                f"The explainer reads layer {max(config.taps)}, but the {name} has {tokens_of.num_layers} layers."
            )
        if tokens_of.hidden_size != config.token_size:
            raise ClassifierMismatchError(
                f"The explainer reads tokens of width {config.token_size}, but the {name}'s are "
                f"{tokens_of.hidden_size} wide."
            )
        for fact, value in facts.items():
            if value != getattr(config, fact):
                raise ClassifierMismatchError(
                    f"The explainer was trained for a classifier with {fact} {getattr(config, fact)} "
                    f"({config.base_model_name_or_path}), but this one has {value}."
                )
        if check_fingerprint and config.base_model_fingerprint is not None:
            distance = fingerprint_distance(config.base_model_fingerprint, frozen.fingerprint())
            if not distance <= FINGERPRINT_TOLERANCE:
                message = (
                    f"This classifier does not behave like {config.base_model_name_or_path}, which the explainer was "
                    f"trained for (fingerprint distance {distance:.3f}, tolerance {FINGERPRINT_TOLERANCE}); "
                    "load that one, or accept it with allow_classifier_mismatch=True."
                )
                if not allow_mismatch:
                    raise ClassifierMismatchError(message)
                warnings.warn(message, UserWarning, stacklevel=2)
        self.classifier, self.encoder = frozen.eval(), None if encoder is None else encoder.eval()
        if image_processor is not None:
            self.image_processor = image_processor
        # transformers matches these names exactly.
        self._keys_to_ignore_on_save = {
            f"{prefix}.{name}"
            for prefix, module in (("classifier", frozen), ("encoder", encoder))
            if module is not None
            for name in module.state_dict()
        }
        return self

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        include_classifier: bool = False,
        include_code: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the decoder, the config and the image processor; no network is used without `push_to_hub`.

        Args:
            save_directory: a folder, made when missing.
            include_classifier: also save the classifier's weights, under `classifier/`, for machines without network;
                those of a separate encoder too, under `encoder/`.
            include_code: also copy the few Python files this class consists of, so that
                `AutoModel.from_pretrained(..., trust_remote_code=True)` loads the explainer on machines without the
                package. An upload always carries them, and so does an explainer that was itself loaded that way.
            push_to_hub: add the model card and upload what was written, in one commit, with the arguments of
                `push_to_hub` (`repo_id`, which is the name of the folder when left out, and so on).
            *args, **kwargs: as in transformers.

        Raises:
            ValueError: `include_code` for a class derived from this one, whose own code would be left behind.
        """
        check_arguments("save_pretrained", kwargs)
        if len(args) > 2:  # its place in transformers
            args, push_to_hub = (*args[:2], False, *args[3:]), args[2]
        with_code = self._carries_code(include_code, push_to_hub)
        main_process = args[0] if args else kwargs.get("is_main_process", True)
        hub = None
        if push_to_hub and main_process:
            hub = _import_package_module("hub", "push_to_hub")
            push_arguments = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs}
            before = hub.file_states(save_directory)
        if include_classifier:
            self._require_classifier().model.save_pretrained(Path(save_directory) / CLASSIFIER_SUBFOLDER)
            if self.encoder is not None:
                self.encoder.save_pretrained(Path(save_directory) / ENCODER_SUBFOLDER)
        # Before the rest, which may go on to upload the folder.
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory)
        previous, self.config.includes_classifier = self.config.includes_classifier, include_classifier
        # Where the config was loaded from says nothing about the code beside the files written now.
        auto_map = self.config.__dict__.pop("auto_map", None)
        try:
            if with_code:
                self.config.auto_map = dict(_AUTO_MAP)
                if main_process:
                    _copy_code(save_directory)
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.includes_classifier = previous
            self.config.__dict__.pop("auto_map", None)
            if auto_map is not None:
                self.config.auto_map = auto_map
        if hub is not None:
            hub.push_saved(self, save_directory, before, include_classifier=include_classifier, **push_arguments)

    def _carries_code(self, asked: bool, uploaded: bool) -> bool:
        if type(self) is AhaExplainer:
            return asked or uploaded or self.is_remote_code()
        if asked and not self.is_remote_code():
            name = type(self).__name__
            raise ValueError(
                f"The code of {name} itself would be left behind: call {name}.register_for_auto_class('AutoModel'), "
                "which makes transformers save it, or leave include_code out."
            )
        return False

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """Upload the explainer, its image processor, its card, and the log and plot of its training, in one commit.

        Arguments as in transformers; `hf_aha.hub.push_explainer` has more, such as the results for the card. The
        classifier's weights travel along if the explainer was loaded together with them.

        Returns:
            the `huggingface_hub.CommitInfo`, whose `pr_url` leads to a pull request. (`Any` in the signature, because
            this file must not import the package.)

        Raises:
            HfHubHTTPError: the Hub refused.
            ImportError: this file runs as custom code, without the package.
        """
        return _import_package_module("hub", "push_to_hub").push_explainer(
            self,
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size="50GB" if max_shard_size is None else max_shard_size,
            tags=tags,
        )

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Choose how the classifier, and the encoder if there is one, compute attention; as in transformers."""
        frozen_parts = [self._require_classifier(), *([] if self.encoder is None else [self.encoder])]
        for frozen in frozen_parts:
            frozen.model.set_attn_implementation(attn_implementation, allow_all_kernels)

    def train(self, mode: bool = True) -> AhaExplainer:
        """Set the decoder's mode; the classifier and the encoder stay in eval mode."""
        super().train(mode)
        for frozen in (self.classifier, self.encoder):
            if frozen is not None:
                frozen.eval()
        return self

    # -------------------------------------------------------------------------------------------------- explaining

    def forward(
        self,
        pixel_values: torch.Tensor,
        target: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        *,
        against: torch.Tensor | int | None = None,
    ) -> AhaOutput | tuple[torch.Tensor, ...]:
        """Score every pixel for one or several classes an image, in one forward of the classifier.

        Args:
            pixel_values: (B, 3, H, W) pixels as the classifier's image processor makes them.
            target: class index for all images, (B,) one an image, or (B, M) several; the predicted class when left
                out.
            return_dict: `False` returns the tuple (scores, logits, target), and `against` where it was given.
            against: class, (B,) or as many as the target: explains why the target rather than this one. High scores
                then speak for the target and low ones for `against`. Without a target, the most probable class other
                than `against` is asked about.

        Returns:
            [`AhaOutput`] with scores (B, H, W), or (B, M, H, W) for a target of shape (B, M).

        Raises:
            ValueError: NaN or infinite pixels, a class out of range, a target of the wrong length, or a class compared
                with itself.
            RuntimeError: no classifier is attached.
        """
        self._require_classifier()
        _check_finite(pixel_values)
        tokens, logits = self.features(pixel_values)
        if against is not None:
            output = self._explain_contrast(tokens, logits, pixel_values, target, against)
            return output.to_tuple() if return_dict is False else output
        target = logits.argmax(dim=-1) if target is None else self._check_target(target, pixel_values)
        output = self._explain_features(tokens, logits, pixel_values, target)
        return (output.scores, output.logits, output.target) if return_dict is False else output

    def explain_top(self, pixel_values: torch.Tensor, k: int) -> AhaOutput:
        """Score every pixel for the `k` most probable classes: scores (B, k, H, W), target (B, k), still one forward.

        Raises:
            ValueError: as in `forward`, or `k` is not in 1 .. `num_labels`.
        """
        self._require_classifier()
        if not 1 <= k <= self.config.num_labels:
            raise ValueError(f"k must lie in 1..{self.config.num_labels}, the number of classes, but it is {k}.")
        _check_finite(pixel_values)
        tokens, logits = self.features(pixel_values)
        return self._explain_features(tokens, logits, pixel_values, logits.topk(k, dim=-1).indices)

    def _explain_features(
        self, tokens: Sequence[torch.Tensor], logits: torch.Tensor, pixel_values: torch.Tensor, target: torch.Tensor
    ) -> AhaOutput:
        parts = [slice(None)]
        if pixel_values.device.type == "cpu" and not torch.compiler.is_compiling():
            # A few images at a time: the fine maps of a whole batch fall out of the cache, and take memory.
            parts = [slice(start, start + 4) for start in range(0, max(len(pixel_values), 1), 4)]
        scores = []
        for rows in parts:
            features = self.decoder.encode([layer[rows] for layer in tokens], pixel_values[rows])
            if target.ndim == 2:
                features = features.repeat(target.shape[1])
            class_vectors = self.classifier.class_vectors(target[rows].flatten())
            gradients = self.gradients(pixel_values[rows], target[rows])
            scores.append(self.decoder.decode(features, class_vectors, gradients))
        return AhaOutput(scores=torch.cat(scores).unflatten(0, target.shape), logits=logits, target=target)

    def _explain_contrast(
        self,
        tokens: Sequence[torch.Tensor],
        logits: torch.Tensor,
        pixel_values: torch.Tensor,
        target: torch.Tensor | int | None,
        against: torch.Tensor | int,
    ) -> AhaOutput:
        target, against = self._check_contrast(logits, pixel_values, target, against)
        pairs = torch.stack([target, against], dim=-1).flatten(1)
        maps = self._explain_features(tokens, logits, pixel_values, pairs).scores.unflatten(1, (-1, 2))
        scores = contrast_scores(maps[:, :, 0], maps[:, :, 1]).view(*target.shape, *maps.shape[-2:])
        return AhaOutput(scores=scores, logits=logits, target=target, against=against)

    def _check_contrast(
        self,
        logits: torch.Tensor,
        pixel_values: torch.Tensor,
        target: torch.Tensor | int | None,
        against: torch.Tensor | int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        target = None if target is None else self._check_target(target, pixel_values)
        return contrast_classes(logits, target, self._check_target(against, pixel_values, "against"))

    def features(self, pixel_values: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """What the frozen parts give: the tapped tokens, one (B, gh, gw, D) a layer, and logits (B, num_labels)."""
        classifier = self._require_classifier()
        if self.encoder is None:
            features = classifier(pixel_values, layers=self.config.taps)
            return features.tokens, features.logits
        tokens = self.encoder(pixel_values, self.config.taps, self.config.image_mean, self.config.image_std)
        return tokens, classifier(pixel_values).logits

    def gradients(self, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
        """Gradient maps that the decoder reads beside the features; `None` for the single-pass explainer.

        Args:
            pixel_values: (B, 3, H, W).
            target: (B,) classes, or (B, M) several an image.

        Returns:
            (B, num_gradient_maps + num_gradient_token_maps, H, W), or (B * M, ...) image by image.
        """
        if not self.config.gradient_features:
            return None
        if target.ndim == 2:
            # Every class has a backward pass of its own.
            pixel_values, target = pixel_values.repeat_interleave(target.shape[1], dim=0), target.flatten()
        return gradient_maps(
            self._require_classifier(),
            pixel_values,
            target,
            Normalization(self.config.image_mean, self.config.image_std),
            references=self.config.gradient_references,
            points=self.config.gradient_features,
            layers=self.config.gradient_layers,
        )

    def explain(
        self,
        images: Any,
        target: int | str | Sequence[int | str] | torch.Tensor | None = None,
        *,
        against: int | str | Sequence[int | str] | torch.Tensor | None = None,
        top_k: int = 1,
        batch_size: int = 8,
        refine: int = 0,
        adaptive: bool = False,
    ) -> Any:
        """Explain photographs as they are: read, processed, scored, and mapped back to their own pixels.

        Args:
            images: a PIL image, path, http(s) URL, encoded bytes or array, or a list of them.
            target: class index or label for all images, or one an image; the predicted class when left out.
            against: class index or label for all images, or one an image: explains why the target rather than this
                one. Without a target, the most probable class other than this one is asked about.
            top_k: explain this many of the most probable classes instead; not together with `target` or `against`.
            batch_size: images a forward pass.
            refine: steps of test-time refinement on each map, as `refine` does by default; many more passes.
            adaptive: with `refine`: spend these passes where they bring most, as `refine(adaptive=True)` does.

        Returns:
            an [`Explanation`] for one image, a list of them for a list; with `top_k` > 1 a list of them an image.
            (`Any` in the signature, because this file must not import the package.)

        Raises:
            ImageReadError: an image cannot be read.
            ValueError: an unknown label (near ones are suggested), a class out of range or compared with itself, or a
                list of the wrong length.
        """
        module = _import_package_module("explanation", "explain")
        return module.explain(
            self,
            images,
            target,
            against=against,
            top_k=top_k,
            batch_size=batch_size,
            refine=refine,
            adaptive=adaptive,
        )

    def refine(
        self,
        pixel_values: torch.Tensor,
        target: torch.Tensor | int | None = None,
        *,
        against: torch.Tensor | int | None = None,
        steps: int = 10,
        reference: str = "blur",
        scope: str = "scores",
        learning_rate: float | None = None,
        curve_points: int = 9,
        adaptive: bool = False,
        tolerance: float | None = None,
        max_passes: int | None = None,
        seed: int = 0,
        max_batch: int = 40,
    ) -> Any:
        """Improve the maps of single images on their own deletion and insertion curves; never worse than `forward`.

        Arguments, errors and the returned `RefinementOutput` are described at `hf_aha.refinement.refine`. (`Any` in
        the signature, because this file must not import the package.)
        """
        return _import_package_module("refinement", "refine").refine(
            self,
            pixel_values,
            target,
            against=against,
            steps=steps,
            reference=reference,
            scope=scope,
            learning_rate=learning_rate,
            curve_points=curve_points,
            adaptive=adaptive,
            tolerance=tolerance,
            max_passes=max_passes,
            seed=seed,
            max_batch=max_batch,
        )

    def class_index(self, target: int | str) -> int:
        """The index of a class given by index or label; labels match without regard to case.

        Raises:
            ValueError: no such class; near labels are suggested.
        """
        return class_index(target, self.config.id2label)

    def _check_target(
        self, target: torch.Tensor | int, pixel_values: torch.Tensor, name: str = "target"
    ) -> torch.Tensor:
        batch, device = pixel_values.shape[0], pixel_values.device
        if not isinstance(target, torch.Tensor):
            target = torch.as_tensor(target, device=device)
        target = target.to(device)
        if target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(f"{name} must hold class indices as integers, but its dtype is {target.dtype}.")
        if target.ndim == 0:
            target = target.expand(batch)
        if target.ndim > 2 or target.shape[0] != batch:
            raise ValueError(
                f"{name} has shape {tuple(target.shape)} for {batch} images; "
                f"give one class, ({batch},) or ({batch}, M)."
            )
        if not torch.compiler.is_compiling():
            wrong = target[(target < 0) | (target >= self.config.num_labels)]
            if wrong.numel():
                raise ValueError(
                    f"The class index {int(wrong[0])} is out of range: "
                    f"the classifier has the classes 0..{self.config.num_labels - 1}."
                )
        return target.long()

    def _require_classifier(self) -> FrozenClassifier:
        if self.classifier is None:
            raise RuntimeError(
                "No classifier is attached: call attach(classifier), or load with load_classifier=True."
            )
        return self.classifier


def _import_package_module(name: str, method: str) -> Any:
    # By name and on use: as custom code of a Hub repository this file runs without the package.
    try:
        return importlib.import_module(f"hf_aha.{name}")
    except ImportError as error:
        raise ImportError(f"{method}() needs the hf_aha package: pip install hf-aha.") from error


def _check_finite(pixel_values: torch.Tensor) -> None:
    # One pass over the pixels: NaN and infinity survive a sum, and float32 does not overflow on real pixels.
    if torch.compiler.is_compiling() or torch.isfinite(pixel_values.sum(dtype=torch.float32)):
        return
    wrong = (~torch.isfinite(pixel_values)).flatten(1).any(1).nonzero()
    if len(wrong):
        raise ValueError(
            f"pixel_values of image {int(wrong[0])} hold NaN or infinite pixels; check the image and its processing."
        )


def _default_taps(num_layers: int) -> list[int]:
    return sorted({max(1, round(num_layers * share)) for share in (0.25, 0.5, 0.75, 1.0)})


def _default_gradient_layers(num_layers: int) -> list[int]:
    # Not the last: where the head reads one token, the others of the last layer have no gradient.
    return sorted({max(1, round(num_layers * share / 6)) for share in range(1, 6)})


def _input_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    if getattr(processor, "do_center_crop", False):
        size = processor.crop_size
    elif getattr(processor, "do_resize", False):
        size = processor.size
    else:
        return None
    height, width = (
        getattr(size, key, None) if not isinstance(size, dict) else size.get(key) for key in ("height", "width")
    )
    return (height, width) if height and width else None


def _commit_of(source: str | None, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> str | None:
    """The 40-hex commit of a Hub model that has just been loaded, read from the cache's path: no network is used."""
    if source is None or os.path.isdir(source):
        return None
    path = cached_file(
        source,
        "config.json",
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else extract_commit_hash(path, None)


def _bundled_path(name: str | os.PathLike[str]) -> str:
    if not os.path.isdir(name):
        bundled = Path(__file__).parent / "bundled" / str(name)
        if os.sep not in str(name) and (bundled / "config.json").is_file():
            return str(bundled)
    return str(name)


def _bundled_classifier(folder: str, config: AhaConfig) -> str | None:
    """The classifier that a bundled explainer shares with another one, which holds it."""
    bundled = Path(__file__).parent / "bundled"
    if Path(folder).parent != bundled or config.includes_classifier:
        return None
    shared = bundled / str(config.base_model_name_or_path) / CLASSIFIER_SUBFOLDER
    return str(shared) if (shared / "config.json").is_file() else None


def _copy_code(folder: str | os.PathLike[str]) -> None:
    """Copy this file and its siblings, to run as custom code of a Hub repository."""
    os.makedirs(folder, exist_ok=True)
    for path in {__file__, *get_relative_import_files(__file__)}:
        shutil.copyfile(path, Path(folder) / Path(path).name)


# As custom code this file registers nothing: the next repository's code would be ignored for this one's.
if not __name__.startswith("transformers_modules."):
    # `exist_ok`, because the module may be reloaded.
    AutoConfig.register("aha", AhaConfig, exist_ok=True)
    AutoModel.register(AhaConfig, AhaExplainer, exist_ok=True)

__all__ = ["AhaExplainer", "AhaOutput", "ClassifierMismatchError", "ExplainerAccessError", "ExplainerFilesError"]
