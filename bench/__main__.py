"""All benchmarks, one after the other: what `make bench` runs.

    python bench                          # writes bench/results/*.json; about an hour on two quiet cores
    python bench --short --out build/x    # tiny sizes: does everything run?
    python bench --only evals encode      # some of them
    python bench --only load_zeroshot load_bias load_human --load-seconds 300

What is measured is said in each script. With a CUDA device the towers, a training step and the loss are measured there too (cuda_*.json); without one there are no such files. The exit code is 1 if a script failed.
"""
import argparse
from pathlib import Path
import subprocess
import sys
import time

HERE = Path(__file__).resolve().parent
JOBS = {name: [f"{name}.py"] for name in ("encode", "evals", "audits", "train_step", "loss_memory", "study_load")} | {f"load_{app}": ["app_load.py", HERE.parent / "apps" / f"{app}.py"] for app in ("zeroshot", "bias", "human")}
CUDA = {"cuda_encode": ["encode.py", "--parts", "towers", "--device", "cuda"], "cuda_train_step": ["train_step.py", "--device", "cuda"], "cuda_loss_memory": ["loss_memory.py", "--device", "cuda"]}
TWO = ("train_step", "loss_memory")       # these use all cores


def main() -> int:
    import torch
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="+", choices=[*JOBS, *CUDA], help="some of them")
    parser.add_argument("--load-seconds", type=int, default=60, help="how long fifty people use each app")
    parser.add_argument("--short", action="store_true", help="tiny sizes, one round")
    args = parser.parse_args()
    cuda, failed = torch.cuda.is_available(), []
    if not cuda: print("No CUDA device: the GPU section is left out.")
    for name, (script, *words) in (JOBS | (CUDA if cuda else {})).items():
        if args.only and name not in args.only: continue
        began = time.perf_counter()
        more = (["--seconds", args.load_seconds] if script == "app_load.py" else []) + (["--threads", torch.get_num_threads()] if name in TWO else []) + (["--short"] if args.short else [])
        file = args.out / f"{name}.json"
        positional = [*words, file] if script == "app_load.py" else [file, *words]
        code = subprocess.run([str(w) for w in (sys.executable, HERE / script, *positional, *more)]).returncode
        print(f"{name}: {'done' if code == 0 else f'FAILED with code {code}'} in {time.perf_counter() - began:.0f} s", flush=True)
        if code: failed.append(name)
    if failed: print(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
