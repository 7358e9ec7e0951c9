#!/usr/bin/env python
"""Pack a trained explainer and its classifier to ship with the package: half-precision safetensors, loaded in float32.

    python recipes/bundle.py --explainer runs/imagenette-demo/explainer/final \\
        --classifier runs/imagenette-demo/target --name imagenette-demo
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_aha import AhaExplainer, AhaTrainingArguments


BUNDLED = Path(__file__).parent.parent / "hf_aha" / "bundled"
LIMIT_BYTES = 24_000_000


def bundle(
    explainer: str,
    classifier: str,
    name: str,
    *,
    classifier_name: str | None = None,
    include_classifier: bool = True,
    gradient_detail: bool = False,
    output: Path = BUNDLED,
) -> Path:
    """Write OUTPUT/NAME and return it.

    Raises:
        SystemExit: everything bundled together would exceed 24 MB.
    """
    loaded = AhaExplainer.from_pretrained(explainer, classifier=classifier, dtype=torch.float32)
    if gradient_detail:
        loaded = with_gradient_detail(loaded)
    # A folder of one machine means nothing on another: the classifier travels along, or is given with classifier=...
    loaded.config.base_model_name_or_path = classifier_name or name
    folder = output / name
    loaded.to(torch.float16).save_pretrained(folder, include_classifier=include_classifier)
    for config in folder.rglob("config.json"):
        facts = json.loads(config.read_text())
        # Stored in half precision for size only: CPUs compute float32 faster and the target was trained in it.
        facts["dtype"] = "float32"
        facts.pop("_name_or_path", None)
        # Settings of the recipe itself may hold folders of this machine.
        settings = (facts.get("training") or {}).get("arguments", {})
        for name in settings.keys() - {field.name for field in dataclasses.fields(AhaTrainingArguments)}:
            del settings[name]
        config.write_text(json.dumps(facts, indent=2) + "\n")
    size = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    if size > LIMIT_BYTES:
        raise SystemExit(f"The bundled weights have {size:,} bytes, more than the limit of {LIMIT_BYTES:,}.")
    print(f"{folder}: {size:,} bytes of weights")
    return folder


def with_gradient_detail(explainer: AhaExplainer) -> AhaExplainer:
    """The same explainer with the gradient's detail of single pixels, which needs no training."""
    detailed = AhaExplainer.from_classifier(
        explainer.classifier.model,
        image_processor=explainer.image_processor,
        init_from=explainer,
        taps=explainer.config.taps,
        gradient_layers=explainer.config.gradient_layers,
        gradient_detail=True,
    )
    for name in ("base_model_name_or_path", "base_model_revision", "base_model_fingerprint", "init_from", "training"):
        setattr(detailed.config, name, getattr(explainer.config, name))
    return detailed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--explainer", required=True)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--classifier-name", help="what the config calls the classifier (default: --name)")
    parser.add_argument("--without-classifier", action="store_true", help="bundle the decoder alone")
    parser.add_argument("--gradient-detail", action="store_true", help="add it to an explainer trained without")
    parser.add_argument("--output", type=Path, default=BUNDLED)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    bundle(
        args.explainer,
        args.classifier,
        args.name,
        classifier_name=args.classifier_name,
        include_classifier=not args.without_classifier,
        gradient_detail=args.gradient_detail,
        output=args.output,
    )


if __name__ == "__main__":
    main()
