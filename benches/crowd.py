"""Many processes, of two users where possible, on one cache at the same time.

    python3 benches/crowd.py PIPE [SECONDS] [PROCESSES]

Every process runs the pipeline again and again, with one of a few values that all of them draw from and
that move on, so that most of what one needs another is making. As root half of the processes run as another
user of the cache's group (setpriv). Each fingerprint must have been executed once, by whomever; nothing may
fail; every file must be accessible to the group. Exit code 1 where anything is wrong.
"""

import collections
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PIPELINE = """
name: crowd
params: {value: 0}
stages:
  first:
    kind: command
    pass_env: [EXECUTED]
    params: {run: 'echo first ${value} >> $EXECUTED; sleep 0.05; echo ${value} > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  other:
    kind: command
    pass_env: [EXECUTED]
    params: {run: 'echo other ${value} >> $EXECUTED; echo ${value} > $PIPE_OUTPUT_OUT/x', outputs: {out: {dir: out}}}
  join:
    kind: command
    pass_env: [EXECUTED]
    inputs: {a: first, b: other}
    params: {run: 'echo join ${value} >> $EXECUTED; cat $PIPE_INPUT_A $PIPE_INPUT_B/x > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
"""
GROUP = 64_001
USERS = [64_001, 64_002]


def main():
    pipe = os.path.abspath(sys.argv[1])
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 600.0
    processes = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    two_users = os.geteuid() == 0 and shutil.which("setpriv") is not None
    folder = Path(tempfile.mkdtemp(prefix="crowd-"))
    (folder / "project").mkdir()
    (folder / "project/pipeline.yaml").write_text(PIPELINE)
    binary = shutil.copy(pipe, folder / "pipe")
    for place in ["cache", "homes"]:
        (folder / place).mkdir()
    executed = folder / "executed"
    executed.touch()
    if two_users:
        for path in [folder, folder / "cache", folder / "homes", executed]:
            os.chown(path, USERS[0], GROUP)
            os.chmod(path, 0o2775 if path.is_dir() else 0o664)
    started, runs, faults, lock = time.monotonic(), collections.Counter(), [], threading.Lock()

    def work(number):
        user = USERS[number % 2] if two_users else None
        prefix = []
        if two_users:
            prefix = ["setpriv", f"--reuid={user}", f"--regid={GROUP}", "--clear-groups"]
        environment = dict(os.environ, HOME=str(folder / "homes" / str(user)), EXECUTED=str(executed),
                           PIPE_CACHE_CAP="off", XDG_RUNTIME_DIR="")
        dice = random.Random(number)
        while (passed := time.monotonic() - started) < seconds:
            value = int(passed * 2) + dice.randrange(4)
            command = [*prefix, binary, "--json", "run", "-f", str(folder / "project/pipeline.yaml"),
                       "--cache", str(folder / "cache"), "--set", f"value={value}"]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, umask=0o002)
            with lock:
                runs[user] += 1
                if ran.returncode != 0:
                    faults.append(ran.stderr[-2000:] or ran.stdout[-2000:])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = collections.Counter(executed.read_text().splitlines())
    twice = {name: count for name, count in times.items() if count > 1}
    closed = []
    for root, folders, files in os.walk(folder / "cache"):
        for name in [*folders, *files]:
            mode = os.lstat(os.path.join(root, name)).st_mode
            wanted = 0o070 if stat.S_ISDIR(mode) else 0o040
            if mode & wanted != wanted:
                closed.append(os.path.join(root, name))
    verified = subprocess.run([pipe, "--json", "--cache", str(folder / "cache"), "cache", "verify"],
                              capture_output=True, text=True, env=dict(os.environ, HOME=str(folder / "homes")))
    damage = len(json.loads(verified.stdout)["damage"])
    print("| seconds | processes | users | runs | executions | executed twice | failed | not open to the group | damaged |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(f"| {seconds:.0f} | {processes} | {2 if two_users else 1} | {sum(runs.values())} | {sum(times.values())} "
          f"| {len(twice)} | {len(faults)} | {len(closed)} | {damage} |")
    for fault in faults[:3]:
        print(fault, file=sys.stderr)
    for path in closed[:5]:
        print(path, file=sys.stderr)
    for name in list(twice)[:5]:
        print("twice:", name, twice[name], file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return int(bool(twice or faults or closed or damage))


if __name__ == "__main__":
    sys.exit(main())
