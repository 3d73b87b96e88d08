#!/usr/bin/env python3
"""Compiles every attention kernel for every architecture with NVRTC; no GPU is needed.

    pip install nvidia-cuda-nvrtc
    python compile.py [--out FOLDER] [--only sm_90a-128] [-D NAME=VALUE ...]

Prints registers and spills of each kernel and exits with 1 where one does not compile. With --out the cubins
are kept as FOLDER/KERNEL-sm_XX-HEADDIM[-softcap].cubin.
"""
import argparse, ctypes, glob, os, re, site, sys

HERE = os.path.dirname(os.path.abspath(__file__))
# Name -> NVRTC's architecture and settings. sm_75 has no bf16; sm_86 has less shared memory than sm_80; plain
# sm_90 is the mma.sync path on Hopper. `turing` is the code of sm_75 for a Hopper card, to run it there, and
# `f16` the wgmma path in f16.
ARCHITECTURES = {
    "sm_75": ("sm_75", ["F16=1"]), "sm_80": ("sm_80", []), "sm_86": ("sm_86", []), "sm_90": ("sm_90", []),
    "sm_90a": ("sm_90a", []), "turing": ("sm_90", ["F16=1", "ARCH=750"]), "f16": ("sm_90a", ["F16=1"]),
}
FILES = ["attention_forward", "attention_backward"]


def packages():
    """Folders of PyPI's nvidia packages, newest layout first."""
    roots = site.getsitepackages() + [site.getusersitepackages()] + sys.path
    return [d for r in roots for d in sorted(glob.glob(os.path.join(r, "nvidia", "*")), reverse=True)]


def find(pattern, fallback):
    for folder in packages():
        for path in sorted(glob.glob(os.path.join(folder, pattern))):
            if "builtins" not in path and ".alt." not in path:
                return path
    return fallback


class Nvrtc:
    def __init__(self):
        path = find("lib/libnvrtc.so*", "libnvrtc.so")
        try:
            self.nvrtc = ctypes.CDLL(path)
        except OSError as error:
            sys.exit(f"NVRTC cannot be opened ({error}): pip install nvidia-cuda-nvrtc")

    def text(self, kind, program):
        size = ctypes.c_size_t()
        getattr(self.nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(max(size.value, 1))
        getattr(self.nvrtc, f"nvrtcGet{kind}")(program, buffer)
        return buffer.raw[: size.value]

    def compile(self, file, architecture, defines):
        """(cubin or None, log)"""
        with open(os.path.join(HERE, file + ".cu"), "rb") as source:
            text = source.read()
        program = ctypes.c_void_p()
        self.nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, (file + ".cu").encode(), 0, None, None)
        options = [f"--gpu-architecture={architecture}", "--std=c++17", f"-I{HERE}",
                   "--ptxas-options=-v"] + [f"-D{d}" for d in defines]
        array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
        code = self.nvrtc.nvrtcCompileProgram(program, len(options), array)
        log = self.text("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
        cubin = self.text("CUBIN", program) if code == 0 else None
        self.nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        return cubin, log


def variants(only=None):
    yield_all = [(f, a, d, c) for a in ARCHITECTURES for f in FILES for d in (64, 128, 256) for c in (0, 1)]
    yield_all += [("attention_segments", a, 0, 0) for a in ARCHITECTURES]
    for file, architecture, dim, cap in yield_all:
        name = f"{file}-{architecture}" + (f"-{dim}" if dim else "") + ("-softcap" if cap else "")
        if only is None or re.search(only, name):
            yield name, file, architecture, ([f"HEAD_DIM={dim}", f"SOFTCAP={cap}"] if dim else [])


def report(log):
    """Lines `kernel: registers, spills` of ptxas's verbose log."""
    rows, kernel, spill = [], "?", ""
    for line in log.splitlines():
        if m := re.search(r"entry function '(\w+)'", line):
            kernel = m[1]
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spill = f"stack {m[1]} spill {m[2]}/{m[3]} B" if any(int(x) for x in m.groups()) else "no spills"
        elif m := re.search(r"Used (\d+) registers", line):
            rows.append(f"{kernel} {m[1]} registers, {spill}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--only", help="a pattern of variant names")
    parser.add_argument("-D", action="append", default=[], dest="defines")
    arguments = parser.parse_args()
    nvrtc, failed = Nvrtc(), 0
    if arguments.out:
        os.makedirs(arguments.out, exist_ok=True)
    for name, file, architecture, defines in variants(arguments.only):
        target, settings = ARCHITECTURES[architecture]
        cubin, log = nvrtc.compile(file, target, settings + defines + arguments.defines)
        if cubin is None:
            failed += 1
            print(f"{name}: does not compile\n{log}")
            continue
        print(f"{name}: " + "; ".join(report(log)))
        for line in log.splitlines():
            if "warning" in line.lower() or "C75" in line:
                print("   ", line.strip())
        if arguments.out:
            with open(os.path.join(arguments.out, name + ".cubin"), "wb") as out:
                out.write(cubin)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
