"""Times the engine on pipelines of kind `command`, beside DVC, Snakemake, Turborepo and moon, and prints Markdown.

    python3 benches/engine.py PATH_OF_PIPE [no-op] [plan] [folder] [store] [--dir DIR] [--peers DIR] [--gib N]

PATH_OF_PIPE is a release build of the engine: `cargo build --release --no-default-features --bin pipe --example
fill_cache`; the example spares running thousands of stages to have them cached. Without names all parts are run. DIR
(default: a temporary folder) is on the disk that is measured; the part `store` needs twice N GiB there (default 4).
The peers come from PyPI and npm into `--peers` (default: a temporary folder), and are left out where they cannot be
installed. Calls of a table are timed in turns; median and best are given.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
# Eight stages wired like the fine-tuning experiment.
STAGES = {
    "download": [], "subsample": ["download"], "template": ["subsample"], "pack": ["template"],
    "baseline": ["template"], "train": ["pack"], "tuned": ["template", "train"], "report": ["baseline", "tuned", "train"],
}


def timed(command, cwd=None, env=None):
    """Seconds of one call that must succeed."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, **QUIET)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {' '.join(map(str, command))} (in {cwd})")
    return seconds


def in_turns(calls, rounds):
    """Seconds by name of calls that are run in turns."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(call())
    return seconds


def ms(seconds):
    return f"{statistics.median(seconds) * 1e3:.1f} | {min(seconds) * 1e3:.1f}"


def table(title, columns, rows):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    sys.stdout.flush()


def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)


class Pipe:
    """`pipe` on one pipeline file, with a cache and an index of its own."""

    def __init__(self, binary, folder, pipeline):
        self.binary, self.folder = binary, folder
        write(f"{folder}/pipeline.yaml", pipeline)
        self.env = {**os.environ, "XDG_CACHE_HOME": f"{folder}/home", "PIPE_CACHE": f"{folder}/cache"}

    def __call__(self, *args):
        return timed([self.binary, *args], self.folder, self.env)

    def decisions(self):
        plan = subprocess.run([self.binary, "plan", "--json"], cwd=self.folder, env=self.env, capture_output=True)
        return {stage["decision"] for stage in json.loads(plan.stdout)["stages"]}

    def fill(self, stages):
        """Runs everything once, or pretends to where `fill_cache` is built, and lets file times settle."""
        filler = f"{os.path.dirname(self.binary)}/examples/fill_cache"
        if stages > 100 and os.path.exists(filler):
            timed([filler, f"{self.folder}/pipeline.yaml", f"{self.folder}/cache"], self.folder, self.env)
        else:
            self("run", "-j", "8")
        if self.decisions() != {"reuse"}:
            sys.exit(f"the pipeline in {self.folder} is not cached after a run")
        time.sleep(2.5)
        self("run")


def stage(name, inputs, run, extra=""):
    wired = ", ".join(f"{n}: {source}" for n, source in inputs.items())
    return (f"  {name}:\n    kind: command\n    inputs: {{{wired}}}\n{extra}"
            f"    params: {{run: '{run}', outputs: {{out: {{file: out.txt}}}}}}\n")


def eight_stages():
    text = "stages:\n"
    for name, needs in STAGES.items():
        inputs = {n: f"{n}.out" for n in needs} or {"source": "{path: source.txt}"}
        files = " ".join(f'"$PIPE_INPUT_{n.upper()}"' for n in inputs)
        text += stage(name, inputs, f'cat {files} > "$PIPE_OUTPUT_OUT"')
    return text


# The peers


def git(folder):
    timed(["git", "init", "-q"], folder)
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    timed(["git", "add", "-A"], folder)
    timed(["git", *identity, "commit", "-q", "-m", "bench"], folder)


def command(name):
    sources = " ".join(f"{n}.txt" for n in STAGES[name]) or "source.txt"
    return sources.split(), f"cat {sources} > {name}.txt"


def dvc(peers, folder):
    timed([f"{peers}/py/bin/dvc", "init", "-q"], folder)
    text = "stages:\n"
    for name in STAGES:
        deps, cmd = command(name)
        text += f"  {name}:\n    cmd: {cmd}\n    deps: [{', '.join(deps)}]\n    outs: [{name}.txt]\n"
    write(f"{folder}/dvc.yaml", text)
    return [f"{peers}/py/bin/dvc", "repro", "-q"]


def snakemake(peers, folder):
    text = 'rule all:\n    input: "report.txt"\n'
    for name in STAGES:
        deps, cmd = command(name)
        text += f"rule {name}:\n    input: {json.dumps(deps)[1:-1]}\n    output: \"{name}.txt\"\n    shell: \"{cmd}\"\n"
    write(f"{folder}/Snakefile", text)
    return [f"{peers}/py/bin/snakemake", "-c1", "-q", "all"]


def turbo(peers, folder):
    for name, needs in STAGES.items():
        cmd = "cat " + (" ".join(f"../{n}/out.txt" for n in needs) or "source.txt") + " > out.txt"
        package = {"name": name, "version": "1.0.0", "scripts": {"build": cmd},
                   "dependencies": {need: "*" for need in needs}}
        write(f"{folder}/packages/{name}/package.json", json.dumps(package))
    shutil.copy(f"{folder}/source.txt", f"{folder}/packages/download/source.txt")
    root = {"name": "bench", "private": True, "packageManager": "npm@10.0.0", "workspaces": ["packages/*"]}
    write(f"{folder}/package.json", json.dumps(root))
    tasks = {"build": {"dependsOn": ["^build"], "outputs": ["out.txt"]}}
    write(f"{folder}/turbo.json", json.dumps({"$schema": "https://turborepo.com/schema.json", "tasks": tasks}))
    write(f"{folder}/.gitignore", "out.txt\n.turbo\nnode_modules\n")
    timed(["npm", "install", "--silent", "--no-audit", "--no-fund"], folder)
    native = [f"{peers}/node_modules/@turbo/{p}/bin/turbo" for p in os.listdir(f"{peers}/node_modules/@turbo")]
    return [native[0], "run", "build"]


def moon(peers, folder):
    write(f"{folder}/.moon/workspace.yml", "projects:\n  bench: .\n")
    tasks = {}
    for name, needs in STAGES.items():
        deps, cmd = command(name)
        tasks[name] = {"script": cmd, "inputs": deps, "outputs": [f"{name}.txt"], "deps": [f"~:{n}" for n in needs]}
    write(f"{folder}/moon.yml", json.dumps({"tasks": tasks}))
    write(f"{folder}/.gitignore", ".moon/cache\n" + "".join(f"{name}.txt\n" for name in STAGES))
    packages = f"{peers}/node_modules/@moonrepo"
    native = [f"{packages}/{p}/moon" for p in os.listdir(packages) if p.startswith("core-")]
    return [native[0], "run", "bench:report"]


def install(peers):
    """Installs what is missing; False where it cannot be had."""
    try:
        if not os.path.exists(f"{peers}/py/bin/snakemake"):
            subprocess.run([sys.executable, "-m", "venv", f"{peers}/py"], check=True, **QUIET)
            subprocess.run([f"{peers}/py/bin/pip", "install", "-q", "dvc", "snakemake"], check=True, **QUIET)
        if not os.path.exists(f"{peers}/node_modules/@moonrepo"):
            write(f"{peers}/package.json", "{}")
            subprocess.run(["npm", "install", "--silent", "turbo", "@moonrepo/cli"], cwd=peers, check=True, **QUIET)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the peers are left out: {error}", file=sys.stderr)
        return False
    return True


def versions(peers):
    """Version by peer."""
    pip = subprocess.run([f"{peers}/py/bin/pip", "list", "--format=json"], capture_output=True, text=True).stdout
    found = {p["name"].lower(): p["version"] for p in json.loads(pip)}
    npm = {n: json.load(open(f"{peers}/node_modules/{p}/package.json"))["version"]
           for n, p in {"turbo": "turbo", "moon": "@moonrepo/cli"}.items()}
    return {**{n: found[n] for n in ("dvc", "snakemake")}, **npm}


def no_op(args, folder):
    pipe = Pipe(args.pipe, f"{folder}/pipe", eight_stages())
    write(f"{folder}/pipe/source.txt", "source\n")
    pipe.fill(len(STAGES))
    calls = {"`/bin/true` (what starting a process costs)": lambda: timed(["/bin/true"]),
             "`pipe --version`": lambda: pipe("--version"), "`pipe run`": lambda: pipe("run"),
             "`pipe plan`": lambda: pipe("plan")}
    slow = {}
    if install(args.peers):
        env = {**os.environ, "HOME": folder, "TURBO_TELEMETRY_DISABLED": "1", "DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1",
               "MOON_TOOLCHAIN_FORCE_GLOBALS": "true", "XDG_CACHE_HOME": f"{folder}/peers-home", "CI": ""}
        found = versions(args.peers)
        for peer in (dvc, snakemake, turbo, moon):
            name = peer.__name__
            there = f"{folder}/{name}"
            write(f"{there}/source.txt", "source\n")
            timed(["git", "init", "-q"], there)
            run = peer(args.peers, there)
            git(there)
            timed(run, there, env)
            timed(run, there, env)
            label = f"{name} {found[name]}, `{os.path.basename(run[0])} {' '.join(run[1:])}`"
            (calls if name == "turbo" else slow)[label] = lambda run=run, there=there: timed(run, there, env)
    seconds = in_turns(calls, 40) | in_turns(slow, 5)
    table("Nothing to do, eight stages", ["", "median ms", "best ms"], [(name, ms(times)) for name, times in seconds.items()])


def cached_stages(args, folder):
    rows = []
    for count in args.stages:
        # A hundred chains.
        text = "stages:\n"
        for i in range(count):
            inputs = {"last": f"s{i - 100}.out"} if i >= 100 else {}
            text += stage(f"s{i}", inputs, f'echo {i} > "$PIPE_OUTPUT_OUT"')
        pipe = Pipe(args.pipe, f"{folder}/plan-{count}", text)
        pipe.fill(count)
        seconds = in_turns({"plan": lambda: pipe("plan"), "run": lambda: pipe("run")}, 7)
        rows += [(f"{count:,} stages, `pipe {name}`", ms(times)) for name, times in seconds.items()]
    for side in args.fan_in:
        matrix = "    matrix: {product: {i: [%s]}}\n" % ", ".join(map(str, range(side)))
        made = stage("make", {}, 'echo ${i} > "$PIPE_OUTPUT_OUT"', matrix)
        taken = stage("take", {"all": "{gather: make.out}"}, 'echo ${j} > "$PIPE_OUTPUT_OUT"', matrix.replace("i:", "j:"))
        pipe = Pipe(args.pipe, f"{folder}/fan-in-{side}", f"params: {{i: -1, j: -1}}\nstages:\n{made}{taken}")
        pipe.fill(2 * side)
        seconds = in_turns({"plan": lambda: pipe("plan"), "run": lambda: pipe("run")}, 5)
        rows += [(f"{side:,} stages that each read all of {side:,}, `pipe {name}`", ms(times)) for name, times in seconds.items()]
    table("Everything cached", ["", "median ms", "best ms"], rows)


def input_folder(args, folder):
    rows = []
    for count in args.files:
        there = f"{folder}/files-{count}"
        pipe = Pipe(args.pipe, there, "stages:\n" + stage("list", {"data": "{path: data}"}, 'ls -R "$PIPE_INPUT_DATA" > "$PIPE_OUTPUT_OUT"'))
        for i in range(count):
            if i % 1000 == 0:
                os.makedirs(f"{there}/data/{i // 1000}")
            with open(f"{there}/data/{i // 1000}/{i}.txt", "w") as file:
                file.write(f"file {i}\n")
        time.sleep(2.5)
        pipe.fill(1)
        seconds = in_turns({"unchanged, `pipe plan`": lambda: pipe("plan"), "unchanged, `pipe run`": lambda: pipe("run")}, 7)
        write(f"{there}/data/0/0.txt", "changed\n")
        seconds["one file changed, `pipe plan`"] = [pipe("plan") for _ in range(5)]
        if pipe.decisions() != {"run"}:
            sys.exit("a changed file is not seen")
        opened = subprocess.run(["strace", "-f", "-e", "trace=open,openat", args.pipe, "plan"], cwd=there, env=pipe.env,
                                capture_output=True, text=True).stderr if shutil.which("strace") else ""
        read = len({line.split('"')[1] for line in opened.splitlines() if "/data/" in line and ".txt" in line})
        note = f"; files read: {read}" if opened else ""
        rows += [(f"{count:,} files, {name}{note if name.startswith('one') else ''}", ms(times))
                 for name, times in seconds.items()]
        shutil.rmtree(there)
    table("An input folder", ["", "median ms", "best ms"], rows)


def store(args, folder):
    size = args.gib << 30
    source = f"{folder}/source.bin"
    with open(source, "wb") as file:
        for _ in range(size >> 26):
            file.write(os.urandom(1 << 26))
        os.fsync(file.fileno())
    rates = {"`cp`, then `sync`": [], "`pipe run` of `cp`": []}

    def copied():
        start = time.perf_counter()
        timed(["cp", "--reflink=never", source, f"{folder}/copy.bin"])
        timed(["sync", f"{folder}/copy.bin"])
        return time.perf_counter() - start

    def stored(i):
        run = f'cp --reflink=never {source} "$PIPE_OUTPUT_OUT" # {i}'
        pipe = Pipe(args.pipe, f"{folder}/store", "stages:\n" + stage("copy", {}, run))
        return pipe("run")

    for i in range(args.rounds):
        for name, call in zip(rates, (copied, lambda i=i: stored(i)), strict=True):
            subprocess.run(["sync"])
            rates[name].append(size / call() / 1e6)
            shutil.rmtree(f"{folder}/store", ignore_errors=True)
            if os.path.exists(f"{folder}/copy.bin"):
                os.remove(f"{folder}/copy.bin")
    peer = statistics.median(rates["`cp`, then `sync`"])
    table(f"Storing a file of {args.gib} GiB, in turns", ["", "MB/s, each round", "median", "of `cp` and `sync`"],
          [(name, ", ".join(f"{r:.0f}" for r in found), f"{statistics.median(found):.0f}",
            f"{statistics.median(found) / peer:.0%}") for name, found in rates.items()])


PARTS = {"no-op": no_op, "plan": cached_stages, "folder": input_folder, "store": store}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    parser.add_argument("pipe", type=os.path.abspath)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--dir")
    parser.add_argument("--peers", type=os.path.abspath)
    parser.add_argument("--gib", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=numbers, default=[1000, 10000, 100000])
    parser.add_argument("--fan-in", type=numbers, default=[1000, 3000])
    parser.add_argument("--files", type=numbers, default=[1000, 10000, 100000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        args.peers = args.peers or f"{folder}/peers"
        os.makedirs(args.peers, exist_ok=True)
        for name in args.parts or PARTS:
            PARTS[name](args, folder)


if __name__ == "__main__":
    main()
