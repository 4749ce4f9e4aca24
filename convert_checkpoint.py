"""Turn a checkpoint of the original KawaiiDDPM-PyTorch into a Diffusers pipeline, safely: nothing in the file is run.

    python convert_checkpoint.py ddpm-model-45.ckpt anime-faces
    python convert_checkpoint.py ddpm-model-45.ckpt anime-faces --variant fp16
    python convert_checkpoint.py ddpm-model-45.ckpt anime-faces --push_to_hub --hub_model_id user/anime-faces

The checkpoint may hold the original's `DDPM` or its network alone, saved by torch (old or new format) or safetensors.
Exit codes: 0 done, 2 bad input (nothing is written), 3 the pipeline is on disk but the push failed.
"""

import argparse
import sys
from pathlib import Path

from animeface_pipeline.cli import EXIT_PUSH_FAILED, OneLineParser, command
from animeface_pipeline.conversion import convert_checkpoint
from animeface_pipeline.pipeline_animeface import upload_folder_as_pipeline


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="the original's file, e.g. ddpm-model-45.ckpt")
    parser.add_argument("output_dir", type=Path, help="the pipeline's folder, which must not exist yet or be empty")
    parser.add_argument("--variant", choices=["fp16"], help="add float16 weights beside the float32 ones")
    parser.add_argument("--push_to_hub", action="store_true", help="push the pipeline to the Hub afterwards")
    parser.add_argument("--hub_model_id", help="user/name on the Hub (default: the name of OUTPUT_DIR)")
    parser.add_argument("--hub_private_repo", action="store_true", help="make a new repository on the Hub private")
    return parser.parse_args()


@command
def main() -> int | None:
    args = parse_args()
    convert_checkpoint(args.checkpoint, args.output_dir, args.variant)
    return push(args) if args.push_to_hub else None


def push(args: argparse.Namespace) -> int | None:
    repo_id = args.hub_model_id or args.output_dir.resolve().name
    try:
        commit = upload_folder_as_pipeline(args.output_dir, repo_id, private=args.hub_private_repo)
    except Exception as error:  # no token, no network, a refused name, …: the pipeline is on disk, whatever it is
        reason = str(error).strip().partition("\n")[0]
        later = f'python -m animeface_pipeline.hub "{args.output_dir}" --hub_model_id {repo_id}'
        print(f"error: the pipeline is on disk, the push failed: {reason}; push it with: {later}", file=sys.stderr)
        return EXIT_PUSH_FAILED
    print(f"pushed: {commit.repo_url}")
    return None


if __name__ == "__main__":
    main()
