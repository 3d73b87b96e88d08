"""Runs the quickstart with an empty cache, then again, and prints times, memory and the gain.

    python3 benches/quickstart.py PATH_OF_PIPE [more arguments of `pipe run`]
"""
import json
import os
import subprocess
import sys
import tempfile
import time

pipe, more = sys.argv[1], sys.argv[2:]
root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with tempfile.TemporaryDirectory() as folder:
    call = [pipe, "-f", f"{root}/pipelines/quickstart.yaml", "--cache", f"{folder}/cache"]

    def run(*args, **kwargs):
        return subprocess.run([*call, *args], check=True, text=True, **kwargs)

    run("run", "model", "dataset")  # downloads are not timed
    start = time.time()
    run("run", *more)
    print(f"first run, downloads apart: {time.time() - start:.0f} s")
    times = []
    for _ in range(7):
        start = time.time()
        run("run", *more, stderr=subprocess.DEVNULL)
        times.append(time.time() - start)
    print(f"second run: {1000 * sorted(times)[3]:.1f} ms (median of 7)")
    plan = json.loads(run("plan", *more, "--json", stdout=subprocess.PIPE).stdout)
    for stage in plan["stages"]:
        record = stage["record"]
        memory = record["telemetry"].get("peak_memory_bytes") or 0
        rate = record["telemetry"].get("tokens_per_second") or 0
        print(f"{stage['stage']:14} {record['seconds']:7.1f} s {memory / 2**30:5.2f} GiB {rate:7.0f} tok/s")
    run("outputs", "tuned-eval", "--to", f"{folder}/tuned", stdout=subprocess.DEVNULL)
    run("outputs", "baseline-eval", "--to", f"{folder}/base", stdout=subprocess.DEVNULL)
    base, tuned = (json.load(open(f"{folder}/{name}/metrics.json")) for name in ("base", "tuned"))
    print(f"never-call {tuned['never_call_baseline']:.1%}")
    for name in ("decision_accuracy", "strict_accuracy", "lenient_accuracy"):
        paired = next(p for p in tuned["against_baseline"] if p["metric"] == name)
        print(f"{name}: {base[name]['value']:.1%} -> {tuned[name]['value']:.1%}, p = {paired['p_value']:.2g}")
