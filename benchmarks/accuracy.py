#!/usr/bin/env python
"""Top-1 accuracy of the classifier that an explainer explains.

python benchmarks/accuracy.py --explainer imagenette-demo --dataset DIR_OR_ID
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

from hf_aha import AhaExplainer
from hf_aha.data import Photographs, ProcessorCrop, collate, load_photographs


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--explainer", default="imagenette-demo")
    parser.add_argument("--classifier", help="default: the one the explainer names")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--label-column", default="label")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    explainer = AhaExplainer.from_pretrained(args.explainer, classifier=args.classifier, dtype=torch.float32)
    rows, column = load_photographs(args.dataset, split=args.split)
    photographs = Photographs(rows, column, ProcessorCrop(explainer.image_processor), args.label_column)
    right = total = unreadable = 0
    for batch in DataLoader(photographs, 50, collate_fn=collate):
        unreadable += len(batch.errors)
        if batch.pixel_values is None:
            continue
        with torch.autocast("cpu", torch.bfloat16):
            predicted = explainer.classifier(batch.pixel_values).logits.argmax(-1)
        right += int((predicted == batch.labels).sum())
        total += len(batch.labels)
    print(f"{right / total:.4f} of {total} photographs of {args.split}, {unreadable} unreadable")
    return right / total


if __name__ == "__main__":
    main()
