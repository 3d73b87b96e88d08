"""Damages every object and record of a cache in turn, and looks whether the next run notices and repairs.

    python3 benches/damage.py PIPE [BITS]

A pipeline of files, folders and a stage that never makes the same twice is run. Then each object in turn has
one of BITS random bits flipped, is cut short at a random place, emptied, lengthened, replaced by another object, and
removed, and each record is cut short, has a bit flipped, and is removed. After each `plan --check` must not say
that all is well, and one `run` must leave everything as it was: the same bytes in every object (of the stage
that never makes the same: others, used downstream), and `cache verify` content. Exit code 1 where anything is not.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

PIPELINE = """
name: damage
stages:
  file:
    kind: command
    params: {run: 'head -c 20000 /dev/zero | tr "\\\\0" x > $PIPE_OUTPUT_OUT; echo file >> $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  empty:
    kind: command
    params: {run: ': > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  folder:
    kind: command
    inputs: {a: file}
    params: {run: 'cd $PIPE_OUTPUT_OUT; mkdir -p a/b; for i in 1 2 3; do echo $i > a/b/$i; done; cp $PIPE_INPUT_A same; cp a/b/1 one; chmod +x one', outputs: {out: {dir: out}}}
  two:
    kind: command
    inputs: {a: folder, b: empty}
    params: {run: 'cat $PIPE_INPUT_A/a/b/* > $PIPE_OUTPUT_OUT; cat $PIPE_INPUT_B > $PIPE_OUTPUT_MORE; echo more >> $PIPE_OUTPUT_MORE', outputs: {out: {file: out}, more: {file: more}}}
  never:
    kind: command
    inputs: {a: two.more}
    params: {run: 'head -c 30 /dev/urandom | od -x > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  last:
    kind: command
    inputs: {a: never, b: two.out}
    params: {run: 'cat $PIPE_INPUT_A $PIPE_INPUT_B > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
"""
STAGES = ["file", "empty", "folder", "two", "never", "last"]


class Trials:
    def __init__(self, pipe, folder, bits):
        self.pipe, self.folder, self.bits = pipe, folder, bits
        self.cache, self.dice, self.counts = folder / "cache", random.Random(1), Counter()
        (folder / "pipeline.yaml").write_text(PIPELINE)
        self.environment = dict(os.environ, HOME=str(folder), PIPE_CACHE_CAP="off", XDG_CACHE_HOME="")

    def call(self, *arguments):
        return subprocess.run([self.pipe, "--json", *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def objects(self):
        return sorted(p for p in self.cache.glob("objects-v1/*/*"))

    def record(self, stage):
        """The record that a stage last ran as or reused."""
        last = json.loads(next(self.cache.glob(f"last/damage/*/{stage}.json")).read_text())
        return self.cache / "records-v1/command" / f"{last['fingerprint']}.json"

    def digests(self):
        """What each stage made, as its record says."""
        outputs = {stage: json.loads(self.record(stage).read_text())["outputs"] for stage in STAGES}
        return {stage: {name: o["digest"] for name, o in made.items()} for stage, made in outputs.items()}

    def ways(self):
        return ["bit flipped"] * self.bits + ["truncated", "emptied", "lengthened", "removed"]

    def spoiled(self, what, whole):
        """The bytes of a damaged file, or none; the same where it cannot be damaged so."""
        if what == "removed":
            return None
        if what == "lengthened":
            return whole + b"\0"
        if not whole or what == "emptied":
            return b""
        if what == "truncated":
            return whole[:self.dice.randrange(len(whole))]
        flipped, bit = bytearray(whole), self.dice.randrange(len(whole) * 8)
        flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)

    def damage(self, path, content):
        mode = path.stat().st_mode
        path.chmod(0o644)
        if content is None:
            path.unlink()
        else:
            # In place, as a disk does it: the inode stays.
            with open(path, "r+b") as file:
                file.write(content)
                file.truncate()
            path.chmod(mode & 0o777)

    def trial(self, kind, way, path):
        what, before, whole = f"{kind} {way}", self.digests(), path.read_bytes()
        content = self.spoiled(way, whole)
        if content == whole or (kind == "record" and way == "bit flipped" and self.means_the_same(whole, content)):
            return
        self.damage(path, content)
        planned = self.call("plan", "--check").returncode
        ran = self.call("run")
        self.counts[what] += 1
        if planned != 6:
            self.wrong("not detected", what, path, f"plan --check: {planned}")
        if ran.returncode:
            self.wrong("not repaired", what, path, ran.stderr)
            return
        after = self.digests()
        deterministic = [s for s in STAGES if s not in ("never", "last")]
        if any(before[s] != after[s] for s in deterministic):
            self.wrong("other bytes", what, path, "")
        verified = self.call("cache", "verify")
        if verified.returncode or self.call("plan", "--check").returncode:
            self.wrong("not repaired", what, path, verified.stdout)

    def means_the_same(self, one, other):
        """A flip in the checksum's own line leaves a record what it was."""
        try:
            one, other = json.loads(one), json.loads(other)
        except ValueError:
            return False
        return all(one[key] == other.get(key) for key in one if key != "sum")

    def wrong(self, kind, what, path, text):
        self.counts[kind] += 1
        print(f"{kind}: {what} {path.relative_to(self.cache)}\n{text}", file=sys.stderr)

    def used(self):
        """Objects that records name, each once; others are nobody's loss."""
        known = {}
        for path in self.objects():
            known[path.parent.name + path.name] = path
        wanted = set()
        for outputs in self.digests().values():
            wanted |= set(outputs.values())
        for digest in list(wanted):
            try:
                entries = json.loads(known[digest].read_bytes())
                wanted |= {entry["digest"] for entry in entries}
            except (ValueError, TypeError):
                pass
        return wanted


def main():
    pipe, bits = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20
    with tempfile.TemporaryDirectory(prefix="damage-") as folder:
        run = Trials(pipe, Path(folder), bits)
        assert run.call("run").returncode == 0
        begun, objects = time.monotonic(), run.used()
        done = set()
        # What the stage that never makes the same makes anew gets its turn, too, a few times.
        while (left := run.used() - done) and len(done) < len(objects) + 6:
            digest = min(left)
            path = run.cache / "objects-v1" / digest[:2] / digest[2:]
            for way in run.ways():
                if digest not in run.used():
                    break
                run.trial("object", way, path)
            done.add(digest)
        for stage in STAGES:
            for way in run.ways():
                run.trial("record", way, run.record(stage))
        seconds = time.monotonic() - begun
    wrong = ["not detected", "not repaired", "other bytes"]
    kinds = [name for name in run.counts if name not in wrong]
    print(f"| {' | '.join(kinds)} | {' | '.join(wrong)} | ms a trial |")
    print(f"|{'---|' * (len(kinds) + len(wrong) + 1)}")
    total = sum(run.counts[k] for k in kinds)
    print(f"| {' | '.join(str(run.counts[k]) for k in kinds + wrong)} | {seconds / total * 1e3:.0f} |")
    print(f"{len(objects)} objects, {len(STAGES)} records, {total} trials")
    return int(any(run.counts[name] for name in wrong))


if __name__ == "__main__":
    sys.exit(main())
