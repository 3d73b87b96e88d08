//! Prints the rate of the GEMM on the shapes of SmolLM2-135M.
#![allow(clippy::print_stdout, reason = "an example prints")]
use std::time::Instant;

use kernels::gemm::{Into, PackedMatrix, View, gemm, gemm_packed};

fn main() {
    for (m, k, n) in [
        (660, 576, 1536),
        (660, 1536, 576),
        (2640, 576, 576),
        (256, 576, 49152),
        (16, 576, 1536),
        (16, 576, 49152),
        (660, 576, 16),
    ] {
        let (x, w) = (vec![0.5f32; m * k], vec![0.25f32; n * k]);
        let mut y = vec![0.0f32; m * n];
        let packed = PackedMatrix::new(k, n, View::transposed(&w, k));
        let flop = 2.0 * (m * n * k) as f64;
        let rate = |f: &mut dyn FnMut()| {
            f();
            let mut best = f64::MAX;
            for _ in 0..9 {
                let start = Instant::now();
                f();
                best = best.min(start.elapsed().as_secs_f64());
            }
            flop / best / 1e9
        };
        let nt = rate(&mut || {
            gemm(m, n, k, View::rows(&x, k), View::transposed(&w, k), &mut y, n, Into::Overwrite)
        });
        let nn = rate(&mut || {
            gemm(m, n, k, View::rows(&x, k), View::rows(&w, n), &mut y, n, Into::Overwrite)
        });
        let pk =
            rate(&mut || gemm_packed(m, View::rows(&x, k), &packed, &mut y, n, Into::Overwrite));
        println!("{m:5} x {k:5} x {n:5}: NT {nt:6.1}  NN {nn:6.1}  packed {pk:6.1} GFLOP/s");
    }
}
