"""Train the demo text-to-image model from nothing and write it as a Stable Diffusion pipeline folder.

One command, seeded, on CPUs or one CUDA GPU:

    python models/training/train_diffusion.py
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from data_parallel import Member, run
from train_decoder import train_decoder
from train_denoiser import train_denoiser
from train_together import train_together
from train_vae import train_vae

HERE = Path(__file__).resolve().parent


class LossLog:
    """Appends stage,step,loss,img_per_s rows to a CSV file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, stage: str, step: int, loss: float, rate: float) -> None:
        new = not self.path.exists()
        with self.path.open("a") as file:
            file.write("stage,step,loss,img_per_s\n" * new + f"{stage},{step},{loss:.5f},{rate:.1f}\n")


def thin_log(path: Path, to: Path, most: int = 2000) -> None:
    """Copy a loss log, keeping the last row of each (stage, step) and at most `most` rows, evenly spread."""
    head, *rows = path.read_text().splitlines()
    latest = {tuple(row.split(",")[:2]): row for row in rows}
    kept = list(latest.values())[:: max(1, -(-len(latest) // most))]
    to.write_text("\n".join([head, *kept]) + "\n")


def stages(member: Member, options: argparse.Namespace) -> None:
    """Every stage in order, in one member; finished stages are skipped."""
    log = LossLog(Path(options.work) / "loss.csv")
    todo = options.stages.split(",")
    if "vae" in todo:
        train_vae(member, options, log)
    if "decoder" in todo:
        train_decoder(member, options, log)
    if "denoiser" in todo:
        train_denoiser(member, options, log)
    if "together" in todo:
        member.wait()
        train_together(member, options, log)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", default=str(HERE.parent / "demo-diffusion"), help="pipeline folder to write")
    parser.add_argument("--loss-csv", default=str(HERE / "demo-diffusion.loss.csv"), help="thinned loss log to write")
    parser.add_argument("--work", default=".cache/train-diffusion", help="folder for checkpoints and cached latents")
    parser.add_argument("--stages", default="vae,decoder,denoiser,together", help="stages to run, in this order")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --work")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--processes", type=int, default=1 if cuda else os.cpu_count(), help="training processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--vae-steps", type=int, default=4300)
    parser.add_argument("--vae-batch", type=int, default=64, help="crops a step; whole scenes are a third of that")
    parser.add_argument("--decoder-steps", type=int, default=4000)
    parser.add_argument("--scenes", type=int, default=100_000, help="scenes whose latents are cached")
    parser.add_argument("--steps", type=int, default=8_000, help="steps of the second stage")
    parser.add_argument("--together-steps", type=int, default=7_500, help="steps of the last stage")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3, help="top learning rate of the second stage")
    parser.add_argument("--ema", type=float, default=0.9993, help="decay of the weights' moving average")
    parser.add_argument("--export-every", type=int, default=500, help="steps between checkpoints and exports")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    if not options.resume and options.stages.startswith("vae"):
        (work / "loss.csv").unlink(missing_ok=True)
    run(stages, options, options.processes, options.threads, options.device)
    thin_log(work / "loss.csv", Path(options.loss_csv))


if __name__ == "__main__":
    main()
