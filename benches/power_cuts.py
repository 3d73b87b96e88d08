"""Cuts the power under runs of a small fast pipeline, and looks at what the disk still has.

    python3 benches/power_cuts.py PIPE [TRIALS [SECONDS [SEED]]]

The cache lies on a file system in memory (`benches/layer.py`, through /dev/fuse) that keeps nothing but what
was synced: bytes of files by fsync of the file, names by fsync of the folder. At a random change of the disk
everything stops: the change and all later ones fail, every process is killed, and of what was not synced any
part is lost (`benches/volatile.py` has the ways). Then the pipeline runs again on what is left. It must end
well by itself, with the right bytes, and must reuse every stage that the first run said was finished. Trials
share one cache; a third begin with a damaged object, a forced rerun or a garbage collection. At the end
`pipe cache verify` reads the whole cache. Exit code 1 where anything is wrong, 77 where nothing can be mounted.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.dont_write_bytecode = True
from kill_storm import PIPELINE, children, object_of
from layer import Layer, libc, private_mounts

PR_SET_CHILD_SUBREAPER = 36
WRONG = ["corrupt", "finished and lost", "failed", "locked out", "damaged"]


class Trials:
    """A project on a disk that is safe, and its cache on one that is not."""

    def __init__(self, pipe, folder, seed):
        self.pipe, self.folder, self.disk = pipe, folder, folder / "disk"
        self.cache, self.dice, self.counts, self.ways = self.disk / "cache", random.Random(seed), Counter(), Counter()
        self.disk.mkdir()
        (folder / "pipeline.yaml").write_text(PIPELINE)
        self.layer, self.usual, self.value = Layer([self.disk]), 400, 0

    def start(self, *arguments, home):
        """A `pipe` process in a session of its own."""
        environment = dict(os.environ, HOME=str(home), PIPE_CACHE_CAP="off", XDG_CACHE_HOME="")
        command = [self.pipe, "--json", "--cache", str(self.cache), *arguments]
        return subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ended(self, *arguments, home):
        process = self.start(*arguments, home=home)
        out, error = process.communicate()
        return process.returncode, out, error

    def until_cut(self, process):
        """What a process has said until the power goes, or it ends; nothing of it is left afterwards."""
        while process.poll() is None and not self.layer("frozen"):
            time.sleep(0.01)
        cut = self.layer("frozen")
        if cut:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        out, _ = process.communicate()
        # Stage processes end with their parent; they are children of this process then.
        while left := set(children(os.getpid())) - {self.layer.server.pid}:
            for child in left:
                os.waitpid(child, 0)
        return cut, out

    def before(self, home):
        """What the power goes at: arguments of `pipe`."""
        kind = self.dice.choice(["run"] * 6 + ["forced", "damaged", "collected"])
        if kind == "run" or not self.value:
            self.value += 1
            return "run", ["run", "--set", f"value={self.value}"]
        if kind == "forced":
            return kind, ["run", "--force", "--set", f"value={self.value}"]
        if kind == "damaged":
            damaged = object_of(self.cache, self.dice.choice(["first", "wide", "other", "join", "last"]))
            damaged.chmod(0o644)
            damaged.write_bytes(damaged.read_bytes()[1:] + b"!")
            self.layer("sync")
            return kind, ["run", "--set", f"value={self.value}"]
        old = time.time() - 7 * 3600
        for path in self.cache.glob("*-v1/*/*"):
            os.utime(path, (old, old))
        self.layer("sync")
        return kind, ["cache", "gc", "--older-than", "2h"]

    def trial(self):
        # The index of file times is lost with the rest, or is all that is left.
        home = self.disk / "home" if self.dice.random() < 0.5 else self.folder / "home"
        home.mkdir(exist_ok=True)
        kind, arguments = self.before(home)
        self.layer("arm", self.dice.randrange(int(self.usual * 1.05)))
        cut, said = self.until_cut(self.start(*arguments, home=home))
        changes = self.layer("changes")
        if not cut and kind == "run":
            self.usual = max(10, changes)
        self.counts["cut while running" if cut else "had finished"] += 1
        way, lost = self.layer("cut", self.dice.randrange(2**32))
        self.ways[way] += 1
        self.counts["changes lost"] += lost
        finished = {event["stage"] for event in events(said) if event["event"] in ("stage-finished", "stage-reused")}
        home.mkdir(exist_ok=True)
        try:
            self.after(kind, way, finished, home)
        except subprocess.TimeoutExpired:
            self.wrong("locked out", way, "the second run did not end")

    def after(self, kind, way, finished, home):
        code, out, error = self.ended("run", "--set", f"value={self.value}", home=home)
        if code:
            self.wrong("failed", way, f"{kind}: exit {code}\n{error}\n{out}")
            return
        reused = {event["stage"] for event in events(out) if event["event"] == "stage-reused"}
        if kind == "forced":
            finished = {"first", "wide", "other", "join", "last"}
        lost = finished - reused if kind != "collected" else set()
        if lost and kind != "damaged":
            self.wrong("finished and lost", way, f"{kind}: {sorted(lost)}\n{out}")
        self.counts["stages reused"] += len(reused)
        wide = "".join(f"{i} first {self.value}\n" for i in (1, 2, 3))
        joined = f"{wide}other {self.value}\n"
        for stage, wanted in [("join", joined), ("last", f"4\n{joined}")]:
            if object_of(self.cache, stage).read_text() != wanted:
                self.wrong("corrupt", way, f"{kind}: {stage}")
        if self.dice.random() < 0.5:
            self.layer("sync")

    def wrong(self, what, way, text):
        self.counts[what] += 1
        if self.counts[what] <= 3:
            print(f"{what} ({way}): {text[:3000]}", file=sys.stderr)


def events(text):
    """Whole lines of `--json` that are events."""
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def main():
    pipe, trials = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 500
    limit, seed = float(sys.argv[3]) if len(sys.argv) > 3 else float("inf"), int(sys.argv[4]) if len(sys.argv) > 4 else 1
    try:
        private_mounts()
    except OSError as error:
        print(f"no mount namespace here: {error}", file=sys.stderr)
        return 77
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="power-cuts-") as folder:
        try:
            run = Trials(pipe, Path(folder), seed)
        except OSError as error:
            print(f"/dev/fuse cannot be mounted here: {error}", file=sys.stderr)
            return 77
        begun, done = time.monotonic(), 0
        try:
            while done < trials and time.monotonic() - begun < limit:
                run.trial()
                done += 1
            seconds = time.monotonic() - begun
            code, out, _ = run.ended("cache", "verify", home=run.folder / "home")
            verified = json.loads(out)
            run.counts["damaged"] = len(verified["damage"])
            print(verified["damage"][:5], file=sys.stderr) if code else None
        finally:
            libc.umount2(str(run.disk).encode(), 2)
    names = ["cut while running", "had finished", "changes lost", "stages reused", *WRONG]
    print(f"| trials | {' | '.join(names)} | ms a trial |")
    print(f"|---{'|---' * (len(names) + 1)}|")
    print(f"| {done} | {' | '.join(str(run.counts[n]) for n in names)} | {seconds / max(1, done) * 1e3:.0f} |")
    print(f"{verified['records']} records, {verified['objects']} objects read at the end; "
          + ", ".join(f"{way} {count}" for way, count in run.ways.most_common()))
    return int(any(run.counts[name] for name in WRONG) or code != 0)


if __name__ == "__main__":
    sys.exit(main())
