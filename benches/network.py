"""Several hosts and two users on one cache, on a file system with the defects of network file systems.

    python3 benches/network.py PIPE [SECONDS [PROCESSES [FOLDER FOLDER]]]

Two hosts, each with a host name, process numbers, a boot id and a mount of its own (namespaces), run the
pipeline of `benches/crowd.py` on one cache, half of the processes as another user of its group. The file
system is `benches/layer.py` with, at once: clients that keep names, absent names and attributes for two seconds until a
file or folder is opened; times in whole seconds; no exclusive rename and no unnamed files; removed open
files that stay as `.nfs…`; handles that go stale; and one in thirty of link, rename, unlink and mkdir done
and answered with an error, as when an answer was lost and the request repeated. Then again with an flock that
grants everything, refused, and without hard links. With two FOLDERs, mounts of one real network file system, these are taken instead.
One process in fifty is killed by SIGKILL while it works, on either host, and nobody cleans up after it. Each
fingerprint must have been executed once (but for killed processes, and lost answers about leases are told apart), nothing may fail, every file must be open to
the group, and `pipe cache verify` must find everything sound. Needs root. Exit code 1 where anything is wrong,
77 where nothing can be mounted.
"""

import collections
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
from crowd import GROUP, PIPELINE, USERS
from layer import Defects, Layer, libc, private_mounts

HOST = """
hostname $1
mount -t proc proc /proc
mount --bind $2 /proc/sys/kernel/random/boot_id
exec sleep infinity
"""
EVERYTHING = dict(keep=2.0, coarse=True, no_exclusive_rename=True, silly=True, lies=1 / 30)
WAYS = {
    "all of them": {},
    "flock grants everything": dict(flock="lies"),
    "flock refuses": dict(flock="refuses"),
    "no hard links": dict(no_links=True, silly=False),
}


class Host:
    """A process that holds namespaces open, and commands that enter them."""

    def __init__(self, name, folder, boot):
        (folder / f"boot-{name}").write_text(f"{boot}\n")
        command = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "sh", "-ec", HOST, "host", name, str(folder / f"boot-{name}")]
        self.holder = subprocess.Popen(command)
        self.init = None
        while self.init is None:
            found = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
            self.init = found[0] if found and os.readlink(f"/proc/{found[0]}/exe").endswith("sleep") else None
            time.sleep(0.01)

    def enter(self, user):
        return ["nsenter", f"--target={self.init}", "--uts", "--pid", "--mount",
                "setpriv", f"--reuid={user}", f"--regid={GROUP}", "--clear-groups"]


class Crowd:
    def __init__(self, pipe, folder, mounts, seconds, processes):
        self.folder, self.seconds, self.processes = folder, seconds, processes
        self.mounts = mounts
        self.binary = shutil.copy(pipe, folder / "pipe")
        (folder / "pipeline.yaml").write_text(PIPELINE)
        self.executed = folder / "executed"
        self.executed.touch()
        (folder / "homes").mkdir()
        for path in [folder, folder / "homes", self.executed, mounts[0] / "cache"]:
            path.mkdir() if path.name == "cache" else None
            os.chown(path, USERS[0], GROUP)
            os.chmod(path, 0o2775 if path.is_dir() else 0o664)
        self.hosts = [Host(name, folder, f"boot-of-{name}") for name in ("one", "two")]
        self.runs, self.killed, self.faults, self.lock = 0, 0, [], threading.Lock()

    def work(self, number):
        host, user = number % 2, USERS[number // 2 % 2]
        dice, started = random.Random(number), time.monotonic()
        environment = dict(os.environ, HOME=str(self.folder / "homes" / f"{host}-{user}"), EXECUTED=str(self.executed),
                           PIPE_CACHE_CAP="off", XDG_RUNTIME_DIR="", XDG_CACHE_HOME="", USER=f"user{user}")
        while (passed := time.monotonic() - started) < self.seconds:
            value = int(passed) + dice.randrange(3)
            command = [*self.hosts[host].enter(user), self.binary, "--json", "run", "-f", str(self.folder / "pipeline.yaml"),
                       "--cache", str(self.mounts[host] / "cache"), "--set", f"value={value}"]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, umask=0o002)
            killed = dice.random() < 0.02
            if killed:
                time.sleep(dice.uniform(0, 0.5))
                for child in descendants(process.pid):
                    try:
                        os.kill(child, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
            out, error = process.communicate()
            with self.lock:
                self.runs += 1
                self.killed += killed
                if process.returncode != 0 and not killed:
                    self.faults.append(f"host {host}, user {user}, value {value}: exit {process.returncode}\n{error[-3000:]}{out[-2000:]}")

    def run(self):
        threads = [threading.Thread(target=self.work, args=(n,)) for n in range(self.processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        times = collections.Counter(self.executed.read_text().splitlines())
        twice = {name: count for name, count in times.items() if count > 1}
        closed = []
        for root, folders, files in os.walk(self.mounts[0] / "cache"):
            for name in [*folders, *files]:
                mode = os.lstat(os.path.join(root, name)).st_mode
                wanted = 0o070 if stat.S_ISDIR(mode) else 0o040
                if mode & wanted != wanted:
                    closed.append(os.path.join(root, name))
        environment = dict(os.environ, HOME=str(self.folder / "homes"))
        verified = subprocess.run([self.binary, "--json", "--cache", str(self.mounts[1] / "cache"), "cache", "verify"],
                                  capture_output=True, text=True, env=environment)
        damage = json.loads(verified.stdout)["damage"]
        for host in self.hosts:
            host.holder.kill()
            host.holder.wait()
        for fault in self.faults[:2]:
            print(fault, file=sys.stderr)
        for item in [*list(twice.items())[:5], *closed[:5], *damage[:5]]:
            print(item, file=sys.stderr)
        return [self.runs, self.killed, sum(times.values()), len(twice), len(self.faults), len(closed), len(damage)]


def descendants(process):
    """A process and those below it, in the order of their start."""
    found = [process]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
        except OSError:
            pass
    return found[1:] or found


def main():
    pipe = os.path.abspath(sys.argv[1])
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    processes = int(sys.argv[3]) if len(sys.argv) > 3 else 8
    real = [Path(p) for p in sys.argv[4:6]]
    if os.geteuid() != 0:
        print("needs root: two users and two hosts", file=sys.stderr)
        return 77
    private_mounts()
    wrong = False
    print("| file system | seconds | processes | runs | killed | executions | executed twice | failed | not open to the group | damaged |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for way, changes in {"real": None}.items() if real else WAYS.items():
        folder = Path(tempfile.mkdtemp(prefix="network-"))
        os.chmod(folder, 0o755)
        mounts = real or [folder / "mount-one", folder / "mount-two"]
        if not real:
            for mount in mounts:
                mount.mkdir()
            try:
                layer = Layer(mounts, Defects(**{**EVERYTHING, **changes}))
            except OSError as error:
                print(f"/dev/fuse cannot be mounted here: {error}", file=sys.stderr)
                return 77
        counts = Crowd(pipe, folder, mounts, seconds, processes).run()
        print(f"| {way} | {seconds:.0f} | {processes} | {' | '.join(map(str, counts))} |", flush=True)
        wrong |= any(counts[4:]) or counts[3] > counts[1]
        if not real:
            for mount in mounts:
                libc.umount2(str(mount).encode(), 2)
            layer.server.kill()
        shutil.rmtree(folder, ignore_errors=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
