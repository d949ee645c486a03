"""The main job on a real model: compress it at four rates, judge it, train it at two bits, report.

Every number printed and drawn is measured in this run. `--quick` does the same on a small budget.
"""

import argparse
import copy
import datetime
import shlex
import sys
import time
from pathlib import Path

import novels
import torch

import reality_stone as rs
from reality_stone import checkpoint, report, show
from reality_stone.generation import continue_text, tokens_per_second

PROMPT = "It was a dark evening in November, and the old house"
START = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of what is written")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2.5, 2])
    parser.add_argument("--quick", action="store_true", help="less of everything")
    args = parser.parse_args()
    # Tokens to judge, calibration windows, training windows, tokens to generate.
    judge, calibrate, train, generate = (8192, 16, 16, 16) if args.quick else (65_536, 128, 256, 64)

    tokenizer, valid = novels.tokenizer(), novels.validation(judge)
    windows = novels.calibration(calibrate)
    models, results, done = {"dense": novels.model()}, {}, {}
    dense = models["dense"]
    results["dense"] = rs.evaluate(dense, valid)
    say(f"dense: perplexity {results['dense'].perplexity:.3f}")
    for bits in args.bits:
        name = f"{bits:g} bits"
        models[name] = copy.deepcopy(dense)
        done[name] = {"compression": rs.compress(models[name], bits, windows)}
        results[name] = rs.evaluate(models[name], valid, reference=dense)
        say(f"{name}: perplexity {results[name].perplexity:.3f}, KL {results[name].kl:.5f}")
    lowest = f"{min(args.bits):g} bits"
    trained = f"{lowest}, tables trained"
    models[trained] = copy.deepcopy(models[lowest])
    batches = novels.training(train)
    done[trained] = {"training": rs.finetune(models[trained], batches, teacher=dense)}
    results[trained] = rs.evaluate(models[trained], valid, reference=dense)
    say(f"{trained}: perplexity {results[trained].perplexity:.3f}, KL {results[trained].kl:.5f}")

    start = torch.tensor([tokenizer.encode(PROMPT, add_special_tokens=False)])
    speed = tokens_per_second(models, start, generate)
    weights = sum(m.weight.numel() for m in layers(models[lowest]))
    trials = []
    for name, model in models.items():
        folder = novels.MODEL
        if name != "dense":
            folder = args.out / name.replace(", ", "_").replace(" ", "_")
            rs.save(model, folder, source=novels.MODEL, dense_dtype=torch.float16)
        stored = sum(m.packed.bits for m in layers(model)) or 16 * weights
        size = (folder / checkpoint.WEIGHTS).stat().st_size
        shown = name in ("dense", lowest, trained)
        text = continue_text(model, tokenizer, PROMPT) if shown else ""
        sizes = stored / weights, stored // 8, size
        measured = results[name], speed[name], text
        trials.append(report.Trial(name, *sizes, *measured, **done.get(name, {})))

    print("\n" + show.table(report.COLUMNS, report.trial_rows(trials)) + "\n")
    print("\n".join(f"{t.name}: {PROMPT}{t.text}\n" for t in trials if t.text))
    details = {
        "Date": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "Command": shlex.join(["python", *sys.argv]),
        "Model": f"novels_lm, {weights:,} weights in {len(layers(models[lowest]))} matrices",
        "Calibration": f"{windows.numel():,} tokens of the training text",
        "Time in all": f"{(time.perf_counter() - START) / 60:.1f} minutes",
    }
    title = "A language model in few bits"
    page = report.model_report(args.out / "report.html", title, trials, PROMPT, details)
    say(f"{page} written")


def layers(model: torch.nn.Module) -> list[rs.nn.RBELinear]:
    return [m for m in model.modules() if isinstance(m, rs.nn.RBELinear)]


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:4.0f} s] {text}", flush=True)


if __name__ == "__main__":
    main()
