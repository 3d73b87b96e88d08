"""What must hold on an NVIDIA GPU, from the parity of single kernels to the whole quickstart.

    cargo build --release --features cuda && cargo build --release -p cuda --examples
    python3 benches/gpu.py target/release CACHE [TRIAL...]

CACHE holds the quickstart's stages up to `tokenize-pack` (`pipe run -f pipelines/quickstart.yaml
--cache CACHE tokenize-pack`). The trials `fixtures` and `sanitizer` want the crate's test
binaries beside the programs (`cargo test --release -p cuda --no-run`). `pressure` wants PyTorch, which takes memory
away. Every trial prints its output; a table of the trials ends it, and the exit code says whether
all were met.
"""
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BIN, CACHE = (os.path.abspath(path) for path in sys.argv[1:3])
SHAPES = ["qwen2.5-3b", "gemma-2-2b", "smollm2-135m"]
MODELS = [f"{ROOT}/tests/fixtures/tiny-models/{name}" for name in ("llama", "qwen2", "gemma2")]


def program(name):
    found = [f"{BIN}/{name}", f"{BIN}/examples/{name}"]
    found += [path for path in sorted(glob.glob(f"{BIN}/deps/{name}-*"), key=os.path.getmtime, reverse=True)
              if not path.endswith(".d")]
    return next(path for path in found if os.path.exists(path))


def run(*call, **env):
    """Runs a program, prints what it said, and returns it; None where it failed."""
    done = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, **env}, cwd=ROOT)
    print(done.stdout, end="", flush=True)
    return done.stdout if done.returncode == 0 else None


def pipe(*args):
    return run(program("pipe"), args[0], "-f", "pipelines/quickstart.yaml", "--cache", CACHE, *args[1:])


def fixtures():
    """The fixtures in f32 within the CPU's tolerances x 5; kept, recomputed and offloaded alike."""
    said = run(program("fixtures"), PIPE_FIXTURES=os.environ.get("PIPE_FIXTURES", f"{ROOT}/tests/fixtures"))
    return said is not None and "skipped:" not in said


def check():
    """The step and the answers of the tiny models beside the CPU's."""
    step, answers = run(program("step"), "check", *MODELS), run(program("generate"), "check", *MODELS)
    if step is None or answers is None or "same bits false" in step:
        return False
    worst = [float(x) for x in re.findall(r"F32 \w+: .*?worst ([\d.e+-]+)", step)]
    return bool(worst) and max(worst) < 1e-4


def same():
    """One digest a shape, whatever is kept, of activations and of weights, and however it is launched."""
    for shape in SHAPES:
        said = run(program("step"), "same", shape)
        if said is None or len(set(re.findall(r": ([0-9a-f]{16}) ", said))) != 1:
            return False
    return True


def speed():
    """Steps of three shapes, in tok/s and bytes of memory."""
    modes = [(shape, mode) for shape in SHAPES for mode in ("keep", "keep-4bit", "recompute", "offload")]
    return all(run(program("step"), "time", shape, mode, "12") is not None for shape, mode in modes)


def generation():
    """Answers of three shapes in batches of 32."""
    return all(run(program("generate"), "time", shape, "32", "400", "64") is not None for shape in SHAPES)


def quickstart():
    """The quickstart from its tokens on: the time of each stage, the gain, the same bytes twice."""
    begin = time.time()
    devices = ["--set", "train.device=cuda", "--set", "tuned-eval.device=cuda"]
    if pipe("run", *devices) is None:
        return False
    print(f"all of it: {time.time() - begin:.1f} s")
    plan = subprocess.run([program("pipe"), "plan", "-f", "pipelines/quickstart.yaml", "--cache", CACHE, "--json", *devices],
                          stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    for stage in json.loads(plan.stdout)["stages"]:
        record = stage["record"]
        print(f"{stage['stage']:14} {record['seconds']:7.1f} s", {k: v for k, v in record["telemetry"].items() if "bytes" in k})
    pipe("metrics", *devices, "diff", "baseline-eval", "tuned-eval")
    again = pipe("run", "train", "--only", "--force", "train", "--set", "train.device=cuda")
    return again is not None and "same as last time" in again


def resume():
    """Training killed twice and resumed, against the same without a break, in every type and optimiser."""
    for dtype, optim in (("bf16", "adamw_8bit"), ("f16", "adamw_8bit"), ("bf16", "adamw")):
        settings = (f"train.device=cuda train.dtype={dtype} train.optimizer={optim} train.checkpoint_steps=1 max_steps=40")
        train = ["run", "train", "--only"] + [part for pair in settings.split() for part in ("--set", pair)]
        for least in (5, 20):
            process = subprocess.Popen([program("pipe"), train[0], "-f", "pipelines/quickstart.yaml", "--cache", CACHE,
                                        *train[1:]], cwd=ROOT, stderr=subprocess.DEVNULL)
            while process.poll() is None and newest_checkpoint() < least:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            print(f"{dtype} {optim}: killed with the checkpoint of step {newest_checkpoint()}, {process.wait()}", flush=True)
        if pipe(*train) is None or "resumed after step" not in (pipe("logs", "train") or ""):
            return False
        again = pipe(*train, "--force", "train")
        if again is None or "same as last time" not in again:
            return False
    return True


def newest_checkpoint():
    found = glob.glob(f"{CACHE}/scratch/*/*/checkpoint-*.bin")
    return max((int(path.rsplit("/", 1)[1].split("-")[1]) for path in found), default=0)


def steady():
    """Memory of the device in the last third of 1,000 steps: by then every shape has its kernels and graph."""
    done = subprocess.Popen([program("pipe"), "run", "-f", "pipelines/quickstart.yaml", "--cache", CACHE, "train", "--only",
                             "--set", "train.device=cuda", "--set", "max_steps=1000"], cwd=ROOT)
    used = []
    while done.poll() is None:
        said = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"],
                              stdout=subprocess.PIPE, text=True).stdout
        used.append(int(said or 0))
        time.sleep(0.2)
    last = used[len(used) * 2 // 3:-2]
    print(f"{len(used)} looks: {used[len(used) // 3]} MiB after a third, {last[0]} after two, {max(last)} at most from there on")
    # One kernel that is loaded late takes 2 MiB.
    return done.returncode == 0 and max(last) <= last[0] + 4


HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
taken = torch.empty(max(0, free - int(float(sys.argv[1]) * 2**30)), dtype=torch.uint8, device="cuda")
print("taken", flush=True)
sys.stdin.read()
"""


def pressure():
    """Training where ever less memory is free: the way it takes, or an error that says what to lower."""
    fine = True
    for gib in (8.0, 3.0, 2.0, 1.5, 1.25, 1.0, 0.75, 0.5):
        hog = subprocess.Popen([sys.executable, "-c", HOG, str(gib)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
        hog.stdout.readline()
        said = pipe("run", "train", "--only", "--force", "train", "--set", "max_steps=3",
                    "--set", "train.device=cuda", "--set", "train.batch_size=8") or ""
        pipe("logs", "train")
        hog.communicate("")
        fine &= "internal" not in said and "panicked" not in said
    return fine


def sweep():
    """Points of a sweep side by side: as many at once as there are GPUs, each on its own."""
    count = len(glob.glob("/dev/nvidia[0-9]*"))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(f"{ROOT}/pipelines", f"{folder}/pipelines")
        path = f"{folder}/pipelines/quickstart.yaml"
        text = open(path).read()
        train = text.index("  train:\n") + len("  train:\n")
        text = text[:train] + "    matrix: {single: {max_steps: [20, 21, 22, 23]}}\n" + text[train:]
        open(path, "w").write(text)
        trace = f"{folder}/trace.json"
        done = run(program("pipe"), "run", "-f", path, "--cache", CACHE, "--jobs", "4", "--trace", trace,
                   "--set", "train.device=cuda", "train@*")
        if done is None:
            return False
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in json.load(open(trace))["traceEvents"]
                 if e.get("ph") == "X" and e["name"].startswith("train")]
    most = max(sum(a <= at < b for a, b in spans) for at, _ in spans)
    print(f"{count} GPUs, {len(spans)} trainings, at most {most} at once")
    return most <= count and (count == 1 or most > 1)


def sanitizer():
    """Kernels under memcheck: those of the fixtures, of the crate's tests, of `generate check` and of a timed step."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    call = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    clean = run(*call, program("fixtures"), PIPE_FIXTURES=f"{ROOT}/tests/fixtures") is not None
    clean &= run(*call, program("cuda")) is not None
    clean &= run(*call, program("generate"), "check", MODELS[2]) is not None
    return clean and run(*call, program("step"), "time", "smollm2-135m", "keep", "4") is not None


TRIALS = [fixtures, check, same, quickstart, resume, steady, pressure, sweep, speed, generation, sanitizer]
wanted = sys.argv[3:] or [trial.__name__ for trial in TRIALS]
met = {}
for trial in TRIALS:
    if trial.__name__ in wanted:
        print(f"== {trial.__name__}: {trial.__doc__}", flush=True)
        begin = time.time()
        try:
            fine = trial()
        except (OSError, StopIteration, subprocess.SubprocessError) as error:
            print(f"{type(error).__name__}: {error}")
            fine = False
        met[trial.__name__] = fine, time.time() - begin
print("\n".join(f"{name:12} {'met' if fine else 'NOT MET':8} {seconds:6.0f} s" for name, (fine, seconds) in met.items()))
sys.exit(not all(fine for fine, _ in met.values()))
