"""Time and memory of loading an NF4 checkpoint: `pipe` and transformers on this machine.

    cargo build --release -p model --example load
    python benches/make_nf4_checkpoint.py FOLDER               # 2.05 GB; --layers 4 for a trial
    python benches/load.py TARGET/release/examples/load FOLDER

Each is a process of its own, watched from outside: peak private memory (`RssAnon`) and peak memory
with mapped files (`VmHWM`). Repeated three times in turn; the medians are printed, and whether
private memory stays within the stored model and 256 MiB. Needs torch, transformers, bitsandbytes;
where they are missing, only ours is measured.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 3
MARGIN = 256 << 20
TRANSFORMERS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", device_map="cpu")
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def memory(pid):
    """`(RssAnon, VmHWM)` in bytes; zeros once the process has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    kib = lambda name: int(fields.get(name, "0 kB").split()[0]) * 1024
    return kib("RssAnon"), kib("VmHWM")


def measure(command):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    private = total = 0
    while process.poll() is None:
        anon, peak = memory(process.pid)
        private, total = max(private, anon), max(total, peak)
        time.sleep(0.002)
    output = process.stdout.read()
    if process.returncode != 0:
        raise SystemExit(f"{command[0]} failed with {process.returncode}")
    seconds = json.loads(output.strip().splitlines()[-1])["seconds"]
    return {"seconds": seconds, "private": private, "total": total}


def main(program, folder):
    stored = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    sides = {"pipe": [program, folder]}
    probe = [sys.executable, "-c", "import bitsandbytes, torch, transformers"]
    if subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0:
        sides["transformers"] = [sys.executable, "-c", TRANSFORMERS, folder]
    runs = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, command in sides.items():
            runs[side].append(measure(command))
    print(f"stored: {stored / 1e6:.0f} MB")
    for side, measured in runs.items():
        median = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        print(
            f"{side}: {median['seconds']:.2f} s, {median['private'] / 1e6:.0f} MB private, "
            f"{median['total'] / 1e6:.0f} MB with mapped files"
        )
    worst = max(run["private"] for run in runs["pipe"])
    within = worst <= stored + MARGIN
    print(f"within the stored model and 256 MiB: {'yes' if within else 'no'}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
