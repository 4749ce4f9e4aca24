"""Turn a checkpoint of the original KawaiiDDPM-PyTorch into a Diffusers pipeline, safely: nothing in the file is run.

    python convert_checkpoint.py ddpm-model-45.ckpt anime-faces
    python convert_checkpoint.py ddpm-model-45.ckpt anime-faces --variant fp16
    python convert_checkpoint.py ddpm-model-45.ckpt anime-faces --push_to_hub --hub_model_id user/anime-faces

The checkpoint may hold the original's `DDPM` or its network alone, saved by torch (new or old format) or safetensors.
Exit codes: 0 done, 2 bad input (nothing is written), 3 the pipeline is on disk but the push failed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from animeface_pipeline.cli import EXIT_DONE, OneLineParser, command
from animeface_pipeline.conversion import convert_checkpoint
from animeface_pipeline.hub import check_repo_id, push_or_explain


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="the original's file, e.g. ddpm-model-45.ckpt")
    parser.add_argument("output_dir", type=Path, help="the pipeline's folder; it must not exist yet, or be empty")
    parser.add_argument("--variant", choices=["fp16"], help="add float16 weights beside the float32 ones")
    parser.add_argument("--push_to_hub", action="store_true", help="push the pipeline to the Hub afterwards")
    parser.add_argument("--hub_model_id", metavar="USER/NAME", help="default: the name of OUTPUT_DIR")
    parser.add_argument("--hub_private_repo", action="store_true", help="make a new repository private")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    repo_id = args.hub_model_id or args.output_dir.resolve().name
    if args.push_to_hub:
        check_repo_id(repo_id)
    convert_checkpoint(args.checkpoint, args.output_dir, args.variant)
    return push_or_explain(args.output_dir, repo_id, private=args.hub_private_repo) if args.push_to_hub else EXIT_DONE


if __name__ == "__main__":
    main()
