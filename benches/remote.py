#!/usr/bin/env python3
"""The remote against a real S3 server on loopback: behaviour first, then speed beside rclone.

    python3 benches/remote.py PIPE [--small 10000] [--large 10] [--large-mib 64] [--rounds 3]
    python3 benches/remote.py PIPE --trials-only

Needs `s3s-fs` (cargo install s3s-fs --version 0.14.1 --locked --features binary) in PATH or named
by $S3S_FS, and for the speed `rclone`. The server refuses unsigned requests and honours
conditional puts. Both programs move the same objects, as many at a time, in turns. A pull of `pipe`
ends with everything flushed to the disk; rclone's is also timed with `sync -f` after it.
"""

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KEY, SECRET, BUCKET = "trial-key", "trial-secret", "bucket"
TOGETHER = "32"
# Small objects, large ones and their bytes, which are enough for a multipart upload.
TRIAL = 50, 2, 70 << 20

PIPELINE = """\
remote: {{url: "s3://{bucket}/{prefix}", write: always}}
stages:
  small:
    kind: command
    params:
      run: cd $PIPE_OUTPUT_OUT && head -c {small_bytes} /dev/urandom | split -b 4096 -a 5 - f
      outputs: {{out: {{dir: small}}}}
  large:
    kind: command
    params:
      run: cd $PIPE_OUTPUT_OUT && for i in $(seq {large}); do head -c {large_bytes} /dev/urandom > f$i; done
      outputs: {{out: {{dir: large}}}}
"""


class Trial:
    def __init__(self, args, root):
        self.pipe, self.root, self.args = os.path.abspath(args.pipe), root, args
        self.data = root / "s3"
        (self.data / BUCKET).mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.server = None
        self.start()
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PIPE_"))},
            "HOME": str(root), "CI": "true",
            "AWS_ENDPOINT": f"http://127.0.0.1:{self.port}", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        self.project = root / "project"
        self.project.mkdir()

    def start(self):
        binary = os.environ.get("S3S_FS") or shutil.which("s3s-fs")
        if not binary:
            sys.exit("s3s-fs is missing: cargo install s3s-fs --version 0.14.1 --locked --features binary")
        command = [binary, "--host", "127.0.0.1", "--port", str(self.port),
                   "--access-key", KEY, "--secret-key", SECRET, str(self.data)]
        self.server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        sys.exit("the S3 server does not come up")

    def stop(self):
        self.server.kill()
        self.server.wait()

    def write(self, prefix, small, large, large_bytes):
        text = PIPELINE.format(bucket=BUCKET, prefix=prefix, small_bytes=small * 4096,
                               large=large, large_bytes=large_bytes)
        (self.project / "pipeline.yaml").write_text(text)

    def run(self, *args, cache="cache", ok=(0,), **env):
        command = [self.pipe, *args, "--cache", str(self.root / cache)]
        done = subprocess.run(command, cwd=self.project, env={**self.env, **env}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode not in ok:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stderr + done.stdout

    def drop(self, cache):
        shutil.rmtree(self.root / cache, ignore_errors=True)

    def stored(self, prefix):
        """Files of the bucket, without what the server keeps for itself."""
        return sorted(p for p in (self.data / BUCKET / prefix).rglob("*") if p.is_file())


def check(what, holds):
    print(f"{'ok' if holds else 'FAILED'}  {what}", flush=True)
    if not holds:
        sys.exit(1)


def trials(t):
    off = {"PIPE_REMOTE": "none"}
    t.write("trials", *TRIAL)
    t.run("run", **off)
    text = t.run("push")
    check("push stores both stages", "2 pushed, 0 there already" in text)
    records = {p: p.read_bytes() for p in t.stored("trials/records-v1")}
    check("a second push finds both", "0 pushed, 2 there already" in t.run("push"))
    t.drop("other")
    check("pull into an empty cache", "2 reused, 2 of them fetched" in t.run("pull", cache="other"))
    t.run("plan", "--check", cache="other")
    check("a run of somebody else fetches", True)

    t.drop("forced")
    t.run("run", cache="forced", **off)
    text = t.run("push", cache="forced")
    check("a record that is there stays", "keeps another result" in text
          and all(p.read_bytes() == b for p, b in records.items()))
    lost = next(p for p in t.stored("trials/objects-v1") if p.stat().st_size == 4096)
    lost.unlink()
    text = t.run("push", "--verify", cache="forced")
    check("an incomplete one is superseded",
          sum(p.read_bytes() != b for p, b in records.items()) == 1)
    t.run("push", "--verify")

    t.drop("wrong")
    text = t.run("run", cache="wrong", PIPE_REMOTE_WRITE="never", AWS_SECRET_ACCESS_KEY="wrong")
    check("wrong credentials cost one warning", text.count("warning") == 1)
    t.drop("wrong")
    text = t.run("run", cache="wrong", PIPE_REMOTE_WRITE="never", AWS_SKIP_SIGNATURE="true")
    check("an unsigned request is refused", text.count("warning") == 1)

    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        t.drop("mute")
        clock = time.monotonic()
        text = t.run("run", cache="mute", AWS_ENDPOINT=f"http://127.0.0.1:{mute.getsockname()[1]}")
        check(f"a server that says nothing costs one warning ({time.monotonic() - clock:.1f} s with the run)",
              text.count("warning") == 1 and "2 run" in text)
    t.stop()
    t.drop("down")
    clock = time.monotonic()
    text = t.run("run", cache="down")
    check(f"a server that is down costs one warning ({time.monotonic() - clock:.1f} s with the run)",
          text.count("warning") == 1 and "2 run" in text)
    t.start()
    t.run("push")
    t.drop("dying")
    clock = time.monotonic()
    killed, code, text = server_dies(t, "dying")
    check(f"a server killed in the middle of a run costs one warning ({time.monotonic() - clock:.1f} s with the run)",
          killed and code == 0 and text.count("warning") == 1 and " failed" not in text)
    t.run("plan", "--check", cache="dying")

    cut = cut_off(t, ["push"], "cache", "cut", lambda: any(t.data.glob(".upload_id-*.part-*")))
    left = [p for p in t.data.glob(".upload_id-*.part-*")]
    text = t.run("push")
    check("a push killed at a big object is taken up", cut and "failed" not in text)
    # A second upload would leave the parts of the first behind.
    check("in the upload that it began", left and not any(p.exists() for p in left))
    cut = cut_off(t, ["pull"], "resumed", "cut",
                  lambda: any(m.stat().st_size for m in (t.root / "resumed/tmp").glob("*.marks")))
    text = t.run("pull", cache="resumed")
    check("so is a pull", cut and "of them fetched" in text)
    t.run("plan", "--check", cache="resumed")


def cut_off(t, args, cache, prefix, begun):
    """Kills a transfer as soon as `begun` says that some of it has arrived."""
    t.write(prefix, *TRIAL)
    command = [t.pipe, *args, "--cache", str(t.root / cache)]
    child = subprocess.Popen(command, cwd=t.project, env=t.env, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    while child.poll() is None and not begun():
        time.sleep(0.002)
    killed = child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    return killed


def server_dies(t, cache):
    """A run that fetches until the server is killed, which is started again."""
    command = [t.pipe, "run", "--cache", str(t.root / cache)]
    child = subprocess.Popen(command, cwd=t.project, env=t.env, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    begun = lambda: any(m.stat().st_size for m in (t.root / cache / "tmp").glob("*.marks"))
    while child.poll() is None and not begun():
        time.sleep(0.002)
    killed = child.poll() is None
    t.stop()
    _, text = child.communicate()
    t.start()
    return killed, child.returncode, text


def rclone(t, source, target):
    env = {**t.env, "RCLONE_CONFIG_S3_TYPE": "s3", "RCLONE_CONFIG_S3_PROVIDER": "Minio",
           "RCLONE_CONFIG_S3_ENDPOINT": t.env["AWS_ENDPOINT"],
           "RCLONE_CONFIG_S3_ACCESS_KEY_ID": KEY, "RCLONE_CONFIG_S3_SECRET_ACCESS_KEY": SECRET}
    command = ["rclone", "copy", "--transfers", TOGETHER, "--checkers", TOGETHER,
               "--s3-no-check-bucket", "--retries", "1", "--quiet", str(source), str(target)]
    clock = time.monotonic()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - clock


def timed(t, *args, cache):
    clock = time.monotonic()
    t.run(*args, cache=cache)
    return time.monotonic() - clock


def speed(t):
    a = t.args
    times = {}
    for what, small, large in (("small", a.small, 1), ("large", 1, a.large)):
        size = (a.large_mib << 20) if what == "large" else 1
        t.write("none", small, large, size)
        t.drop(what)
        t.run("run", what, cache=what, PIPE_REMOTE="none")
        objects = t.root / what / "objects-v1"
        for turn in range(a.rounds):
            prefix = f"{what}-{turn}"
            t.write(prefix, small, large, size)

            def by_pipe(prefix=prefix):
                yield "push", timed(t, "push", what, cache=what)
                t.drop("pulled")
                pulled = timed(t, "pull", what, cache="pulled")
                yield "pull", pulled
                yield "pull, flushed", pulled

            def by_rclone(prefix=prefix):
                # The slash says that it is a folder; asked for that, the server answers 500.
                there = f"s3:{BUCKET}/rclone-{prefix}/"
                yield "push", rclone(t, objects, there)
                t.drop("copied")
                copied = rclone(t, there, t.root / "copied")
                yield "pull", copied
                # What `pipe` has done by the end of a pull.
                clock = time.monotonic()
                subprocess.run(["sync", "-f", str(t.root / "copied")], check=True)
                yield "pull, flushed", copied + time.monotonic() - clock

            order = [("pipe", by_pipe), ("rclone", by_rclone)]
            for name, moves in order if turn % 2 == 0 else order[::-1]:
                for move, seconds in moves():
                    times.setdefault((what, move, name), []).append(seconds)
            for leftover in (t.data / BUCKET).iterdir():
                shutil.rmtree(leftover, ignore_errors=True)
    print(f"\n{a.small} objects of 4 KiB; {a.large} of {a.large_mib} MiB; {a.rounds} rounds; medians")
    print(f"{'objects':8} {'move':13} {'pipe s':>8} {'rclone s':>9} {'rate of rclone':>15}")
    for what in ("small", "large"):
        for move in ("push", "pull", "pull, flushed"):
            ours, theirs = (statistics.median(times[what, move, n]) for n in ("pipe", "rclone"))
            print(f"{what:8} {move:13} {ours:8.2f} {theirs:9.2f} {theirs / ours:14.0%}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("pipe")
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=10)
    parser.add_argument("--large-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials-only", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        t = Trial(args, Path(folder))
        try:
            trials(t)
            if not args.trials_only:
                speed(t)
        finally:
            t.stop()


if __name__ == "__main__":
    main()
