"""Kills runs of a small fast pipeline at random moments, and looks at what is left.

    python3 benches/kill_storm.py PIPE [TRIALS [SECONDS]]

Each trial runs five stages of kind `command` with an input of its own, sends SIGKILL to the parent, to a
stage process, or to the whole group after a random time, and runs again without one. Then every stage's
artifact must hold what it should, every record that was there after the kill must have been reused, and
nobody has removed a lock. At the end `pipe cache verify` reads the whole cache. One cache serves all
trials; after SECONDS no further trial begins. Exit code 1 where anything is wrong.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PIPELINE = """
name: storm
params: {value: 0}
stages:
  first:
    kind: command
    params: {run: 'echo first ${value} > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  wide:
    kind: command
    inputs: {a: first}
    params: {run: 'for i in 1 2 3; do echo $i $(cat $PIPE_INPUT_A) > $PIPE_OUTPUT_OUT/$i; done', outputs: {out: {dir: out}}}
  other:
    kind: command
    params: {run: 'echo other ${value} > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  join:
    kind: command
    inputs: {a: wide, b: other}
    params: {run: 'cat $PIPE_INPUT_A/* $PIPE_INPUT_B > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  last:
    kind: command
    inputs: {a: join}
    params: {run: 'wc -l < $PIPE_INPUT_A > $PIPE_OUTPUT_OUT; cat $PIPE_INPUT_A >> $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
"""


def children(process):
    """Process numbers of the stage processes of a parent."""
    try:
        return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def object_of(cache, stage):
    """The file that a stage last made or reused."""
    last = json.loads(next(cache.glob(f"last/storm/*/{stage}.json")).read_text())
    record = json.loads((cache / "records-v1/command" / f"{last['fingerprint']}.json").read_text())
    digest = record["outputs"]["out"]["digest"]
    return cache / "objects-v1" / digest[:2] / digest[2:]


def main():
    pipe, trials = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    limit = float(sys.argv[3]) if len(sys.argv) > 3 else float("inf")
    random.seed(1)
    counts = dict.fromkeys(["killed while running", "had finished", "records reused", "corrupt",
                            "lost", "failed", "left processes"], 0)
    with tempfile.TemporaryDirectory(prefix="kill-storm-") as folder:
        folder = Path(folder)
        (folder / "pipeline.yaml").write_text(PIPELINE)
        cache = folder / "cache"
        records = cache / "records-v1/command"
        quiet = dict(cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        environment = dict(os.environ, HOME=str(folder), PIPE_CACHE_CAP="off")
        start = time.monotonic()
        subprocess.run([pipe, "run", "--set", "value=-1"], env=environment, check=True, **quiet)
        longest, known = time.monotonic() - start, len(os.listdir(records))
        start = time.monotonic()
        for trial in range(trials):
            if time.monotonic() - start > limit:
                trials = trial
                break
            command = [pipe, "--json", "run", "--set", f"value={trial}"]
            run = subprocess.Popen(command, start_new_session=True, env=environment, **quiet)
            time.sleep(random.uniform(0, longest))
            stages = children(run.pid)
            finished = run.poll() is not None
            victim = random.choice(["parent", "stage", "group"])
            try:
                if victim == "stage" and stages:
                    os.kill(random.choice(stages), signal.SIGKILL)
                elif victim == "group":
                    os.killpg(run.pid, signal.SIGKILL)
                else:
                    run.kill()
            except ProcessLookupError:
                pass
            run.wait()
            counts["had finished" if finished else "killed while running"] += 1
            # Nine in ten die at work, however fast the machine is just now.
            longest *= 0.9 if finished else 1.01
            made = len(os.listdir(records)) - known if records.exists() else 0
            again = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            ended = [json.loads(line) for line in again.stdout.splitlines() if '"run-finished"' in line]
            if again.returncode != 0 or not ended:
                counts["failed"] += 1
                print(f"trial {trial}: exit {again.returncode}\n{again.stderr}", file=sys.stderr)
                continue
            counts["records reused"] += ended[0]["reused"]
            counts["lost"] += max(0, made - ended[0]["reused"])
            wide = "".join(f"{i} first {trial}\n" for i in (1, 2, 3))
            joined = f"{wide}other {trial}\n"
            wanted = {"join": joined, "last": f"4\n{joined}"}
            if any(object_of(cache, stage).read_text() != text for stage, text in wanted.items()):
                counts["corrupt"] += 1
            known = len(os.listdir(records))
        seconds = time.monotonic() - start
        verified = subprocess.run([pipe, "--cache", str(cache), "cache", "verify"], cwd=folder,
                                  env=environment, capture_output=True, text=True)
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                counts["left processes"] += str(folder) in os.readlink(f"/proc/{entry}/cwd")
            except OSError:
                pass
    print(f"| trials | {' | '.join(counts)} | ms a trial |")
    print(f"|---{'|---' * (len(counts) + 1)}|")
    print(f"| {trials} | {' | '.join(map(str, counts.values()))} | {seconds / trials * 1e3:.0f} |")
    print(verified.stdout.strip().splitlines()[-1])
    wrong = ["corrupt", "lost", "failed", "left processes"]
    return int(any(counts[name] for name in wrong) or verified.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
