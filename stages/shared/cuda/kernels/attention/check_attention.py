#!/usr/bin/env python3
"""Checks the attention kernels against float64 and times them against PyTorch, on a GPU.

    python compile.py --out cubins --only 'sm_90|turing|f16'    (any machine)
    python check_attention.py --cubins cubins --architectures sm_90,sm_90a,turing,f16 [--time]

An architecture may name a folder of cubins made with other -D settings: sm_90a@VARIANT reads cubins/VARIANT, and
shapes that the variant was not compiled for are left out of the timing.

The kernels are loaded and launched through the driver, as the product does. The slow twin is `reference`:
the equations in float64 with a mask, its gradients by autograd.
"""
import argparse, ctypes, os, random, sys, time
import torch

driver = ctypes.CDLL("libcuda.so.1")


def call(name, *arguments):
    code = getattr(driver, name)(*arguments)
    if code != 0:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        sys.exit(f"{name}: {code} {text.value.decode() if text.value else ''}")


class Module:
    """A cubin and its launch sizes."""

    def __init__(self, path):
        self.handle = ctypes.c_void_p()
        with open(path, "rb") as file:
            call("cuModuleLoadData", ctypes.byref(self.handle), file.read())
        self.functions = {}

    def sizes(self, kernel):
        address, size, values = ctypes.c_uint64(), ctypes.c_size_t(), (ctypes.c_int * 4)()
        call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(size), self.handle, (kernel + "_launch").encode())
        call("cuMemcpyDtoH_v2", values, address, ctypes.c_size_t(16))
        return list(values)

    def launch(self, kernel, grid, threads, shared, *arguments):
        if kernel not in self.functions:
            function = ctypes.c_void_p()
            call("cuModuleGetFunction", ctypes.byref(function), self.handle, kernel.encode())
            call("cuFuncSetAttribute", function, 8, ctypes.c_int(shared))  # dynamic shared memory
            self.functions[kernel] = function
        values = []
        for a in arguments:
            if isinstance(a, torch.Tensor):
                values.append(ctypes.c_void_p(a.data_ptr()))
            else:
                values.append(ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int(a))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        call("cuLaunchKernel", self.functions[kernel], *grid, threads, 1, 1, shared, stream, pointers, None)


class Attention:
    """One compiled variant."""

    def __init__(self, folder, architecture, dim, cap):
        architecture, _, variant = architecture.partition("@")
        folder = os.path.join(folder, variant)
        tail = f"{architecture}-{dim}" + ("-softcap" if cap else "")
        self.f = Module(os.path.join(folder, f"attention_forward-{tail}.cubin"))
        self.b = Module(os.path.join(folder, f"attention_backward-{tail}.cubin"))
        self.s = Module(os.path.join(folder, f"attention_segments-{architecture}.cubin"))
        self.dim, self.dtype = dim, torch.float16 if architecture in ("turing", "f16") else torch.bfloat16
        self.size = {"attention_forward": self.f.sizes("attention_forward")}
        for name in ("attention_backward_q", "attention_backward_kv"):
            self.size[name] = self.b.sizes(name)

    def plan(self, cu, tokens, window):
        """Bounds and tile orders: once for a micro-batch."""
        bounds = torch.full((tokens, 2), -7, dtype=torch.int32, device="cuda")
        self.s.launch("attention_bounds", ((tokens + 255) // 256, 1, 1), 256, 0, cu, cu.numel() - 1, tokens, bounds)
        orders = {}
        for name, (rows, *_), by_key in ((n, s, n.endswith("kv")) for n, s in self.size.items()):
            tiles = (tokens + rows - 1) // rows
            orders[name] = torch.full((tiles,), -7, dtype=torch.int32, device="cuda")
            self.s.launch("attention_order", (1, 1, 1), 256, 0, bounds, tokens, rows, window, int(by_key), orders[name])
        return bounds, orders

    def run(self, module, name, heads, order, *arguments):
        _, threads, shared, _ = self.size[name]
        module.launch(name, (heads, order.numel(), 1), threads, shared, *arguments)

    def forward(self, q, k, v, o, lse, plan, heads, kv_heads, scale, cap, window):
        bounds, orders = plan
        order = orders["attention_forward"]
        self.run(self.f, "attention_forward", heads, order, q, k, v, o, lse, bounds, order, q.shape[0], heads, kv_heads,
                 q.stride(0), k.stride(0), v.stride(0), o.stride(0), scale, cap, window)

    def backward_q(self, q, k, v, o, do, lse, delta, dq, plan, heads, kv_heads, scale, cap, window):
        bounds, orders = plan
        order = orders["attention_backward_q"]
        self.run(self.b, "attention_backward_q", heads, order, q, k, v, o, do, lse, delta, dq, bounds, order, q.shape[0],
                 heads, kv_heads, *[t.stride(0) for t in (q, k, v, o, do, dq)], scale, cap, window)

    def splits(self, tokens, heads, kv_heads):
        """Parts of a group, so that the blocks fill the device about twice."""
        rows = self.size["attention_backward_kv"][0]
        group, blocks = heads // kv_heads, kv_heads * ((tokens + rows - 1) // rows)
        return next(s for s in range(1, group + 1) if group % s == 0 and (s == group or s * blocks >= 500))

    def backward_kv(self, q, k, v, do, lse, delta, dk, dv, partial, splits, plan, heads, kv_heads, scale, cap, window):
        bounds, orders = plan
        order = orders["attention_backward_kv"]
        names = ["attention_backward_kv"] if self.size["attention_backward_kv"][3] == 1 else ["attention_backward_k", "attention_backward_v"]
        _, threads, shared, _ = self.size["attention_backward_kv"]
        for name in names:
            self.b.launch(name, (kv_heads * splits, order.numel(), 1), threads, shared, q, k, v, do, lse, delta, dk, dv,
                          partial, bounds, order, q.shape[0], heads, kv_heads,
                          *[t.stride(0) for t in (q, k, v, do, dk, dv)], scale, cap, window, splits)
        if splits > 1:
            quads = q.shape[0] * kv_heads * self.dim // 4
            self.b.launch("attention_backward_reduce", ((quads + 255) // 256, 2, 1), 256, 0, partial, dk, dv, q.shape[0],
                          kv_heads, dk.stride(0), dv.stride(0), splits)

    def partial(self, tokens, kv_heads, splits):
        return poison(2 * splits * tokens * kv_heads * self.dim if splits > 1 else 1, dtype=torch.float32)


def reference(q, k, v, cu, heads, kv_heads, scale, cap, window):
    """o and lse in float64; q [n, heads * d], k and v [n, kv_heads * d]."""
    n, d = q.shape[0], q.shape[1] // heads
    spread = lambda t: t.view(n, kv_heads, d).repeat_interleave(heads // kv_heads, 1).transpose(0, 1)
    s = scale * q.view(n, heads, d).transpose(0, 1) @ spread(k).transpose(1, 2)
    if cap:
        s = cap * torch.tanh(s / cap)
    at = torch.arange(n, device=q.device)
    segment = torch.searchsorted(cu.long(), at, right=True)
    allowed = (segment[:, None] == segment[None]) & (at[:, None] >= at[None])
    if window:
        allowed &= at[:, None] - at[None] < window
    s = s.masked_fill(~allowed, float("-inf"))
    lse = torch.logsumexp(s, -1)
    return (torch.exp(s - lse[..., None]) @ spread(v)).transpose(0, 1).reshape(n, heads * d), lse


def poison(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def distance(out, expected):
    """Relative norm; NaN never passes."""
    return ((out.double() - expected).norm() / expected.norm()).item()


def check(attention, lengths, heads, kv_heads, cap, window):
    """Worst relative errors of (o, lse, dq, dk, dv); exits where two runs differ."""
    d, n, dtype = attention.dim, sum(lengths), attention.dtype
    cu = torch.tensor([0] + lengths, device="cuda").cumsum(0).int()
    width = (heads + 2 * kv_heads) * d
    qkv = torch.randn(n, width, device="cuda").to(dtype)  # q, k and v share one buffer
    q, k, v = qkv.split([heads * d, kv_heads * d, kv_heads * d], 1)
    do = torch.randn(n, heads * d, device="cuda").to(dtype)
    scale = d**-0.5 * (4.0 if cap else 1.0)
    shape = (heads, kv_heads, scale, float(cap), window)
    exact = [t.double().detach().contiguous().requires_grad_() for t in (q, k, v)]
    o64, lse64 = reference(*exact, cu, heads, kv_heads, scale, cap, window)
    gradients = torch.autograd.grad(o64, exact, do.double())
    plan, runs = attention.plan(cu, n, window), []
    group = heads // kv_heads
    splits = random.choice([s for s in range(1, group + 1) if group % s == 0])
    for _ in range(2):
        o, lse = poison(n, heads * d, dtype=dtype), poison(heads, n, dtype=torch.float32)
        delta, dqkv = poison(heads, n, dtype=torch.float32), poison(n, width, dtype=dtype)
        dq, dk, dv = dqkv.split([heads * d, kv_heads * d, kv_heads * d], 1)
        attention.forward(q, k, v, o, lse, plan, *shape)
        attention.backward_q(q, k, v, o, do, lse, delta, dq, plan, *shape)
        partial = attention.partial(n, kv_heads, splits)
        attention.backward_kv(q, k, v, do, lse, delta, dk, dv, partial, splits, plan, *shape)
        torch.cuda.synchronize()
        runs.append([o, lse, dq, dk, dv])
    same = all(torch.equal(a, b) for a, b in zip(*runs))
    return [distance(a, b.detach()) for a, b in zip(runs[0], (o64, lse64, *gradients))], same


def cases(dim, cap, seed):
    """Random ragged shapes, and the corners: one token, one long segment, windows, GQA."""
    draw = random.Random(seed)
    yield [1], 2, 1, 0
    yield [1, 1, 2, 127, 128, 129, 1, 64, 63], 4, 2, 0
    yield [700], 2, 2, 0
    yield [700, 3, 200], 4, 1, 100
    for _ in range(3):
        kv_heads = draw.choice([1, 2])
        lengths = [draw.randint(1, draw.choice([5, 80, 400])) for _ in range(draw.randint(1, 12))]
        yield lengths, kv_heads * draw.choice([1, 2, 3, 8]), kv_heads, draw.choice([0, 0, 1, 33, 128])


def verify(folder, architectures, dims):
    worst, failures = {}, 0
    for architecture in architectures:
        for dim in dims:
            for cap in (0, 50):
                attention = Attention(folder, architecture, dim, cap)
                top = [0.0] * 5
                for lengths, heads, kv_heads, window in cases(dim, cap, random.randrange(1 << 30)):
                    errors, same = check(attention, lengths, heads, kv_heads, cap, window)
                    limits = [6e-3, 1e-4, 1e-2, 1e-2, 1e-2]
                    # One token attends to itself: its dq and dk are zero but for rounding.
                    if max(lengths) == 1 or window == 1:
                        limits[2] = limits[3] = float("inf")
                        errors[2:4] = [0.0, 0.0]
                        limits[1] = 1e-3
                    if not same or not all(e < l for e, l in zip(errors, limits)):
                        failures += 1
                        print(f"FAILED {architecture} d{dim} cap{cap} {lengths} h{heads}/{kv_heads} w{window} same={same}",
                              " ".join(f"{e:.1e}" for e in errors))
                    top = [max(a, b) if b == b else b for a, b in zip(top, errors)]
                worst[architecture, dim, cap] = top
    for key, top in worst.items():
        print("worst error of o lse dq dk dv:", *key, " ".join(f"{e:.1e}" for e in top))
    return failures


def median(work, calls=10, repeats=15):
    """Milliseconds of one call: a graph of several calls, so that launching from Python does not show."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            work()
    pairs = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in pairs)[repeats // 2] / calls


def sdpa_times(batch, length, heads, kv_heads, dim):
    import torch.nn.functional as F
    make = lambda h: torch.randn(batch, length, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    q, k, v, do = make(heads), make(kv_heads), make(kv_heads), make(heads).detach()
    run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    with torch.no_grad():
        forward = median(run)
    both = median(lambda: torch.autograd.grad(run(), (q, k, v), do))
    return forward, both - forward


def benchmark(folder, architectures):
    shapes = [("b2 s2048 h16 d128", [2048] * 2, 16, 16, 128), ("b2 s2048 h16/2 d128", [2048] * 2, 16, 2, 128),
              ("packed 16 x 256 h16/2 d128", [256] * 16, 16, 2, 128), ("b2 s2048 h9/3 d64", [2048] * 2, 9, 3, 64),
              ("b2 s2048 h32 d64", [2048] * 2, 32, 32, 64), ("b2 s2048 h8/4 d256", [2048] * 2, 8, 4, 256)]
    rows = []
    for label, lengths, heads, kv_heads, dim in shapes:
        n = sum(lengths)
        flops = 4 * heads * dim * sum(l * (l + 1) / 2 for l in lengths)
        rows.append((label, "torch", *sdpa_times(len(lengths), lengths[0], heads, kv_heads, dim), None, flops))
        for architecture in architectures:
            try:
                a = Attention(folder, architecture, dim, 0)
            except FileNotFoundError:
                continue
            make = lambda h: torch.randn(n, h * dim, device="cuda").to(a.dtype)
            q, k, v, do = make(heads), make(kv_heads), make(kv_heads), make(heads)
            o, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
            lse, delta = torch.empty(heads, n, device="cuda"), torch.empty(heads, n, device="cuda")
            plan = a.plan(torch.tensor([0] + lengths, device="cuda").cumsum(0).int(), n, 0)
            shape = (plan, heads, kv_heads, dim**-0.5, 0.0, 0)
            forward = median(lambda: a.forward(q, k, v, o, lse, *shape))
            by_q = median(lambda: a.backward_q(q, k, v, o, do, lse, delta, dq, *shape))
            splits = a.splits(n, heads, kv_heads)
            partial = a.partial(n, kv_heads, splits)
            by_kv = median(lambda: a.backward_kv(q, k, v, do, lse, delta, dk, dv, partial, splits, *shape))
            rows.append((label, architecture, forward, by_q + by_kv, (by_q, by_kv), flops))
    print(f"{'shape':28} {'path':7} {'forward':>8} {'TFLOP/s':>8} {'backward':>9} {'(q + kv)':>15} {'both ms':>8}")
    for label, path, forward, backward, parts, flops in rows:
        detail = f"{parts[0]:.3f} + {parts[1]:.3f}" if parts else ""
        print(f"{label:28} {path:7} {forward:8.3f} {flops / forward / 1e9:8.0f} {backward:9.3f} {detail:>15} {forward + backward:8.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cubins", required=True)
    parser.add_argument("--architectures", default="sm_90,sm_90a")
    parser.add_argument("--time-only", help="architectures to time (default: the same)")
    parser.add_argument("--dims", default="64,128,256", help="head sizes to check; empty: time only")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--time", action="store_true")
    arguments = parser.parse_args()
    torch.randn(8, 8, device="cuda") @ torch.randn(8, 8, device="cuda")  # makes the context
    torch.backends.cuda.matmul.allow_tf32 = False
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    architectures = arguments.architectures.split(",")
    failures = verify(arguments.cubins, architectures, [int(d) for d in arguments.dims.split(",") if d])
    print(f"seed {arguments.seed}: {failures} failures", flush=True)
    if arguments.time:
        benchmark(arguments.cubins, (arguments.time_only or arguments.architectures).split(","))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
