"""What is each setting of recipes/modern.yaml worth? Every lever is set back alone, at equal numbers of pictures seen.

    python benchmarks/ablation.py --reference faces-64 --output_dir ablation --num_pictures 12000
    python benchmarks/ablation.py --reference faces-64 --output_dir ablation --full --num_pictures 184300

All variants are trained on faces-64/train (what prepare_dataset wrote) and measured by `animeface_pipeline.evaluate`,
whose other flags can be given too (drawn with DPM-Solver++ in 25 steps unless they say otherwise). The original's
recipe is trained at equal pictures and at five times as many. The network is a small one unless --full is given. The
same command goes on where a stopped one was; --variants takes some rows only.

Written are ablation.json, ablation.md, ablation.png (the first eight pictures of each variant, in a row), and for each
variant a folder with its recipe, its training run and its evaluation.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hardware import machine
from PIL import Image, ImageDraw

from animeface_pipeline import evaluate
from animeface_pipeline.cli import BadInput, command
from animeface_pipeline.config import load_recipe
from animeface_pipeline.files import write_aside

DRAWN_WITH = ["--scheduler=dpmsolver++", "--num_inference_steps=25"]
UNET = {"block_out_channels": [16, 32, 64, 96], "layers_per_block": 1, "norm_num_groups": 8}
# What a small network wants otherwise than the full one, by recipe: a higher learning rate and smaller batches in
# both, or it learns next to nothing in so short a time. The layout in memory changes its speed only.
SMALL = {
    "modern": {"learning_rate": 5e-4, "lr_warmup_steps": 50, "train_batch_size": 8, "channels_last": False},
    "original": {"learning_rate": 5e-4, "train_batch_size": 16},
}
SHOWN = 8  # pictures of a variant in ablation.png


class Variant(NamedTuple):
    """A recipe, and what is changed in it; "unet" is laid over the recipe's."""

    recipe: str = "modern"
    changes: dict[str, Any] = {}
    learning_rate: float = 1.0  # times the recipe's
    warmup: float = 1.0  # times the recipe's
    batch: int = 1  # times the recipe's
    pictures: int = 1  # times --num_pictures


VARIANTS: dict[str, Variant] = {
    "modern": Variant(),
    "original, 5 times the pictures": Variant("original", pictures=5),
    "original": Variant("original"),
    "original, learning rate 1e-5": Variant("original", {"learning_rate": 1e-5}),
    "modern with another seed": Variant(changes={"seed": 1}),
    "pictures in [0, 1]": Variant(changes={"value_range": [0, 1]}),
    "learning rate a fifth": Variant(learning_rate=0.2),
    "learning rate twice": Variant(learning_rate=2.0),
    "warm-up 4 times as long": Variant(warmup=4.0),
    "constant learning rate": Variant(changes={"lr_scheduler": "constant_with_warmup"}),
    "longer EMA": Variant(changes={"ema_power": 0.85}),  # after n updates, of the last n^0.85 instead of n^0.75
    "without EMA": Variant(changes={"use_ema": False}),
    "predicts the noise": Variant(changes={"prediction_type": "epsilon"}),
    "without min-SNR": Variant(changes={"snr_gamma": None}),
    "predicts the noise, without min-SNR": Variant(changes={"prediction_type": "epsilon", "snr_gamma": None}),
    "batches twice as large": Variant(batch=2),
    "dropout 0.1": Variant(changes={"unet": {"dropout": 0.1}}),
    "no norm before attention": Variant(changes={"unet": {"attention_norm": False}}),
    "without clipping": Variant(changes={"max_grad_norm": None}),
    "float32": Variant(changes={"mixed_precision": "no"}),
}
RECIPES_OWN_RATE = "original, learning rate 1e-5"  # which SMALL raises: with --full it is the variant "original"
ALIKE = ("full", "num_pictures", "reference_sha256", "num_images", "drawn_with")  # in rows of one table
MEASURES = ("colour mean", "colour deviation", "colour histogram", "power spectrum")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="what prepare_dataset wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_pictures", type=int, default=12_000, help="that each variant sees (default: 12000)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="some rows only (default: all)")
    parser.add_argument("--full", action="store_true", help="the full network instead of a small one")
    args, of_evaluate = parser.parse_known_args()
    evaluate.parse_args(evaluation_flags(args, args.output_dir / "model", of_evaluate))  # a wrong one is told now

    written = args.output_dir / "ablation.json"
    results = json.loads(written.read_text(encoding="utf-8"))["rows"] if written.is_file() else {}
    all_of_them = [name for name in VARIANTS if not (args.full and name == RECIPES_OWN_RATE)]
    for name in args.variants or all_of_them:
        print(f"---- {name}", flush=True)
        new = measure(train(name, args), args, of_evaluate) | {"full": args.full, "num_pictures": args.num_pictures}
        kept = {each: row for each, row in results.items() if all(row.get(key) == new[key] for key in ALIKE)}
        kept[name] = new
        results = {each: kept[each] for each in VARIANTS if each in kept}
        write(args, results)  # after every row, so that there is something to look at
    print((args.output_dir / "ablation.md").read_text(encoding="utf-8"))


def recipe_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All settings of a variant that differ from the original's."""
    variant = VARIANTS[name]
    recipe = load_recipe(variant.recipe) | ({} if args.full else SMALL[variant.recipe])
    unet = recipe["unet"] | ({} if args.full else UNET) | variant.changes.get("unet", {})
    recipe |= variant.changes | {"unet": unet}
    recipe["learning_rate"] *= variant.learning_rate
    recipe["train_batch_size"] *= variant.batch
    recipe["lr_warmup_steps"] = round(recipe["lr_warmup_steps"] * variant.warmup)
    steps = variant.pictures * args.num_pictures // recipe["train_batch_size"]
    grid = {"eval_scheduler": "dpmsolver++", "ddpm_num_inference_steps": 25, "save_images_epochs": 10_000}
    return recipe | grid | {"max_train_steps": steps, "checkpointing_steps": max(steps // 4, 1)}


def train(name: str, args: argparse.Namespace) -> Path:
    """Train one variant, or go on; the folder with its pipeline."""
    folder = args.output_dir / name.replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    recipe, model = folder / "recipe.yaml", folder / "model"
    text = f"# for {args.reference}\n{yaml.safe_dump(recipe_of(name, args), allow_unicode=True)}"
    if recipe.is_file() and recipe.read_text(encoding="utf-8") != text:
        raise BadInput(f"{recipe}: is of another command; choose another --output_dir")
    recipe.write_text(text, encoding="utf-8")
    if not (model / "model_index.json").is_file():
        trainer = Path(__file__).parent.parent / "train_accelerate.py"
        flags = [f"--config={recipe}", f"--train_data_dir={args.reference}", f"--output_dir={model}"]
        subprocess.run([sys.executable, trainer, *flags, "--resume_from_checkpoint=latest"], check=True)
    return model


def evaluation_flags(args: argparse.Namespace, model: Path, of_evaluate: list[str]) -> list[str]:
    output = model.parent / "evaluation"
    return [str(model), f"--reference={args.reference}", f"--output_dir={output}", *DRAWN_WITH, *of_evaluate]


def measure(model: Path, args: argparse.Namespace, of_evaluate: list[str]) -> dict[str, Any]:
    """Draw, or go on, and measure."""
    output = model.parent / "evaluation"
    try:
        evaluate.main(evaluation_flags(args, model, of_evaluate))
    except SystemExit as done:
        if done.code:
            raise
    result = json.loads((output / evaluate.RESULT_FILE).read_text(encoding="utf-8"))
    log = (model / "log.jsonl").read_text(encoding="utf-8").splitlines()
    recipe = yaml.safe_load((model.parent / "recipe.yaml").read_text(encoding="utf-8"))
    return {
        "in_domain": result["in_domain"],
        "statistics": result["statistics"],
        "num_images": result["num_images"],
        "reference_sha256": result["reference"]["sha256"],
        "drawn_with": f"{result['model']['scheduler']}, {result['model']['num_inference_steps']} steps",
        "first_pictures": [str(file) for file in sorted(output.glob("seed-*.png"))[:SHOWN]],
        "updates": json.loads(log[-1])["step"],
        "pictures_seen": recipe["max_train_steps"] * recipe["train_batch_size"],
    }


def write(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    line = shlex.join(["python", *sys.argv])
    first = next(iter(results.values()))
    drawn = f"{first['num_images']:,} pictures of each variant, {first['drawn_with']}:"
    text = f"{drawn}\n\n{markdown(results)}\n\n```\n{line}\n```\n"
    write_aside(args.output_dir / "ablation.md", text.encode())
    everything = {"command": line, **machine("animeface-pipeline", "torch", "diffusers"), "rows": results}
    write_aside(args.output_dir / "ablation.json", (json.dumps(everything, indent=2) + "\n").encode())
    draw_rows(results).save(args.output_dir / "ablation.png")


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """A row for each variant, in the order of VARIANTS; ✗ where a statistic is outside its limit."""
    first = next(iter(results.values()))
    units = [first["statistics"][name]["unit"] for name in MEASURES]
    head = ["", "pictures seen", "updates", "in-domain Fréchet distance"]
    rows = [[*head, *(f"{name} ({unit})" for name, unit in zip(MEASURES, units))], ["---"] * (len(head) + 4)]
    for name, result in results.items():
        cells = [
            f"{result['pictures_seen']:,}",
            f"{result['updates']:,}",
            f"{result['in_domain']['frechet_distance']:.3f}",
        ]
        for measure in MEASURES:
            own = result["statistics"][measure]
            cells.append(f"{own['value']:.2f}{'' if own['passes'] else ' ✗'}")
        rows.append([name, *cells])
    limits = [f"*{first['statistics'][name]['limit']:.2f}*" for name in MEASURES]
    own = first["in_domain"]
    rows.append(["*real pictures, limit*", "", "", f"*{own['floor']:.3f} ± {own['floor_std']:.3f}*", *limits])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_rows(results: dict[str, dict[str, Any]]) -> Image.Image:
    """The first pictures of each variant beside its name, from the same seeds."""
    opened = {name: [Image.open(file) for file in result["first_pictures"]] for name, result in results.items()}
    side, text = next(iter(opened.values()))[0].width, 200
    sheet = Image.new("RGB", (text + SHOWN * (side + 2), len(opened) * (side + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(opened.items()):
        draw.text((4, row * (side + 2) + side // 2), name, fill="black", anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (text + column * (side + 2), row * (side + 2)))
    return sheet


if __name__ == "__main__":
    main()
