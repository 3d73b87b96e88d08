"""Kills `pipe run`, or one of its stage processes, at random moments of a short quickstart, runs again, and compares
every artifact with an undisturbed run.

    python3 benches/kill_trials.py PATH_OF_PIPE [trials]
"""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

pipe, trials = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20
root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHORT = ["--set", "max_steps=6", "--set", "train.checkpoint_steps=1",
         "--set", "train.batch_size=1", "--set", "train.gradient_accumulation=1", "--set", "baseline-eval.limit=4",
         "--set", "tuned-eval.limit=4", "--set", "baseline-eval.max_new_tokens=16", "--set", "tuned-eval.max_new_tokens=16"]


def call(cache, *args):
    return [pipe, "-f", f"{root}/pipelines/quickstart.yaml", "--cache", cache, *args, *SHORT]


def planned(cache):
    plan = subprocess.run(call(cache, "plan", "--json"), check=True, text=True, capture_output=True).stdout
    return json.loads(plan)["stages"]


def digests(cache):
    return {f"{s['stage']}.{name}": output["digest"] for s in planned(cache)
            for name, output in s["record"]["outputs"].items() if output["class"] == "artifact"}


def finished(cache):
    """When each stage that is cached was finished."""
    return {s["stage"]: s["record"]["finished_at"] for s in planned(cache) if s["decision"] == "reuse"}


def processes(cache):
    """Stage processes of that cache, with their parents."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = open(f"/proc/{pid}/cmdline").read()
            parent = int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if "__stage" in line and cache in line:
            found.append((int(pid), parent))
    return found


def run(cache, **kwargs):
    return subprocess.Popen(call(cache, "run"), stderr=subprocess.PIPE, text=True, **kwargs)


with tempfile.TemporaryDirectory() as folder:
    seed, whole = f"{folder}/seed", f"{folder}/whole"
    subprocess.run(call(seed, "run", "model", "dataset"), check=True, stderr=subprocess.DEVNULL)
    subprocess.run(["cp", "-a", seed, whole], check=True)
    start = time.time()
    assert run(whole).wait() == 0
    expected, length = digests(whole), time.time() - start
    print(f"undisturbed: {length:.0f} s, {len(expected)} artifacts", flush=True)
    rng = random.Random(1)
    resumed = 0
    for trial in range(trials):
        cache = f"{folder}/trial-{trial}"
        subprocess.run(["cp", "-a", seed, cache], check=True)
        child = trial % 2 == 1
        process = run(cache)
        time.sleep(rng.uniform(0.2, length * 0.9))
        victims = [pid for pid, parent in processes(cache) if parent == process.pid] if child else [process.pid]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        process.communicate()
        deadline = time.time() + 5
        while processes(cache) and time.time() < deadline:
            time.sleep(0.05)
        assert not processes(cache), f"trial {trial}: a process survived"
        before = finished(cache)
        again = run(cache)
        text = again.communicate()[1]
        assert again.returncode == 0, text
        assert digests(cache) == expected, f"trial {trial}: other artifacts"
        after = finished(cache)
        redone = [stage for stage, when in before.items() if after[stage] != when]
        assert not redone, f"trial {trial}: finished stages were redone: {redone}"
        train = next(s for s in planned(cache) if s["stage"] == "train")
        resumed += bool(train["record"]["telemetry"].get("resumed_from_step"))
        print(f"trial {trial}: {'child' if child else 'parent'} killed, {text.strip().splitlines()[-1]}", flush=True)
        subprocess.run(["rm", "-rf", cache], check=True)
    print(f"{trials} trials: the same artifacts (the loss log is one) every time, no process left, nothing finished redone, "
          f"training resumed {resumed} times")
