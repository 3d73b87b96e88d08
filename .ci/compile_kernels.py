"""Compiles every CUDA kernel with NVRTC, which needs no GPU: for Turing, Ampere and Hopper, in f32, bf16 and f16.

    python3 .ci/compile_kernels.py          needs PyPI's nvidia-cuda-nvrtc, or a toolkit
"""
import ctypes
import glob
import importlib.util
import os
import sys

root = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "stages/shared/cuda/kernels")
ARCHITECTURES = ["sm_75", "sm_80", "sm_90"]


def library():
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations) if spec else []
    found = [f for base in folders for f in glob.glob(f"{base}/*/lib/libnvrtc.so.*")]
    return ctypes.CDLL((sorted(found) or ["libnvrtc.so"])[0])


nvrtc = library()


def compile(name, source, arch, element):
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", f"-DELEMENT={element}"]
    array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log.value.decode().strip()


common = open(f"{root}/common.cuh").read()
failed = count = 0
for path in sorted(glob.glob(f"{root}/*.cu")):
    for arch in ARCHITECTURES:
        for element in range(3):
            name = os.path.basename(path)
            status, log = compile(name, f"{common}\n#line 1\n{open(path).read()}", arch, element)
            count += 1
            if status != 0 or log:
                failed += status != 0
                print(f"{name} {arch} ELEMENT={element}: {log}")
print(f"{count - failed} of {count} compiled")
sys.exit(failed > 0)
