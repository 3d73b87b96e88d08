//! Prints the rate of every product of a LoRA training step on SmolLM2-135M with 1,024 tokens, in
//! GFLOP per second of processor time, which a busy machine hardly changes (Linux only):
//! `cargo run --release -p kernels --example lora_rate`.
#![allow(clippy::print_stdout, reason = "an example prints")]

use kernels::gemm::{Into, View, gemm};

/// Processor time spent on one product.
const SECONDS: f64 = 0.6;
const TOKENS: usize = 1024;
const LAYERS: f64 = 30.0;

/// A matrix as the product reads it: by rows, or transposed, with its stride.
enum Operand {
    Rows(usize),
    Transposed(usize),
}

struct Product {
    name: &'static str,
    m: usize,
    n: usize,
    k: usize,
    a: Operand,
    b: Operand,
    into: Into,
    /// How often a layer has it.
    times: f64,
}

impl Operand {
    fn len(&self, rows: usize, cols: usize) -> usize {
        match self {
            Self::Rows(stride) => rows * stride,
            Self::Transposed(stride) => cols * stride,
        }
    }

    fn view<'a>(&self, data: &'a [f32]) -> View<'a> {
        match self {
            Self::Rows(stride) => View::rows(data, *stride),
            Self::Transposed(stride) => View::transposed(data, *stride),
        }
    }
}

fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    fields.iter().skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Seconds of one run.
fn time(p: &Product) -> f64 {
    let (a, b) = (vec![0.5f32; p.a.len(p.m, p.k)], vec![0.25f32; p.b.len(p.k, p.n)]);
    let mut c = vec![0.0f32; p.m * p.n];
    let mut run = || gemm(p.m, p.n, p.k, p.a.view(&a), p.b.view(&b), &mut c, p.n, p.into);
    run();
    let (start, mut runs) = (processor_seconds(), 0);
    while processor_seconds() - start < SECONDS {
        run();
        runs += 1;
    }
    (processor_seconds() - start) / f64::from(runs)
}

fn main() {
    use Operand::{Rows, Transposed};
    let forward = |name, n, k, times| {
        let into = Into::Overwrite;
        Product { name, m: TOKENS, n, k, a: Rows(k), b: Transposed(k), into, times }
    };
    let backward = |name, n, k, times| {
        let into = Into::Accumulate;
        Product { name, m: TOKENS, n, k, a: Rows(k), b: Rows(n), into, times }
    };
    let factor = |name, m, n, times| {
        let into = Into::Accumulate;
        Product { name, m, n, k: TOKENS, a: Transposed(m), b: Rows(n), into, times }
    };
    let head = |name, n, k, b| {
        let (m, times) = (384, TOKENS as f64 / 384.0 / LAYERS);
        Product { name, m, n, k, a: Rows(k), b, into: Into::Overwrite, times }
    };
    let products = [
        forward("q, o", 576, 576, 2.0),
        forward("k, v", 192, 576, 2.0),
        forward("gate, up", 1536, 576, 2.0),
        forward("down", 576, 1536, 1.0),
        backward("q, o backward", 576, 576, 2.0),
        backward("k, v backward", 576, 192, 2.0),
        backward("gate, up backward", 576, 1536, 2.0),
        backward("down backward", 1536, 576, 1.0),
        forward("x A of q, k, v", 48, 576, 1.0),
        forward("x A of down", 16, 1536, 1.0),
        factor("gradient of B, 576", 576, 16, 3.0),
        factor("gradient of B, 1536", 1536, 16, 2.0),
        factor("gradient of A, q k v", 48, 576, 1.0),
        factor("gradient of A, down", 16, 1536, 1.0),
        backward("dy B, 576", 16, 576, 3.0),
        backward("dy B, 1536", 16, 1536, 2.0),
        head("head", 49152, 576, Transposed(576)),
        head("head backward", 576, 49152, Rows(576)),
    ];
    let mut total = 0.0;
    for p in &products {
        let seconds = time(p);
        total += seconds * p.times;
        let rate = 2.0 * (p.m * p.n * p.k) as f64 / seconds / 1e9;
        println!("{:20} {:5} x {:5} x {:5}: {rate:5.1} GFLOP/s", p.name, p.m, p.k, p.n);
    }
    let rate = TOKENS as f64 / total / LAYERS;
    println!("these alone: {rate:.0} tokens per processor second");
}
