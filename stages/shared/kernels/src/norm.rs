//! RMSNorm: `y = w * x / sqrt(mean(x²) + eps)` (Zhang and Sennrich, 2019), forward and backward.

use rayon::prelude::*;

use crate::simd::{multiversion, sum_by};

/// Rows a task takes.
const ROWS: usize = 32;

/// Normalises every row of `x [rows, width]` into `out`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let step = ROWS * weight.len();
    out.par_chunks_mut(step).zip(x.par_chunks(step)).for_each(|(out, x)| rows(x, weight, eps, out));
}

multiversion! {
fn rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let inverse = inverse_rms(x, eps);
        for i in 0..width {
            out[i] = weight[i] * (x[i] * inverse);
        }
    }
}
}

/// Adds to `dx` the gradient of [`rms_norm`] at `x` for `dy`, all `[rows, width]`:
/// with `r = 1/rms` and `g = w * dy`, `dx += r * g - x * r³/width * sum(g * x)`.
pub fn rms_norm_backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let step = ROWS * weight.len();
    dx.par_chunks_mut(step)
        .zip(x.par_chunks(step).zip(dy.par_chunks(step)))
        .for_each(|(dx, (x, dy))| rows_backward(x, weight, eps, dy, dx));
}

multiversion! {
fn rows_backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let width = weight.len();
    let mut g = vec![0.0f32; width];
    for (dx, (x, dy)) in
        dx.chunks_exact_mut(width).zip(x.chunks_exact(width).zip(dy.chunks_exact(width)))
    {
        for i in 0..width {
            g[i] = weight[i] * dy[i];
        }
        let r = inverse_rms(x, eps);
        let dot = sum_by(&g, x, f32::mul_add);
        let factor = r * r * r * dot / width as f32;
        for i in 0..width {
            dx[i] += r * g[i] - x[i] * factor;
        }
    }
}
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_by(x, x, f32::mul_add) / x.len() as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backward_equals_the_difference_quotient() {
        let width = 37;
        let x: Vec<f32> = (0..width).map(|i| ((i * 7) % 11) as f32 / 5.0 - 1.0).collect();
        let w: Vec<f32> = (0..width).map(|i| 0.5 + (i % 3) as f32).collect();
        let dy: Vec<f32> = (0..width).map(|i| ((i * 5) % 7) as f32 / 3.0 - 1.0).collect();
        let mut dx = vec![0.0; width];
        rms_norm_backward(&x, &w, 1e-5, &dy, &mut dx);
        let value = |x: &[f64]| -> f64 {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / width as f64 + 1e-5;
            (0..width).map(|i| f64::from(w[i]) * x[i] / mean.sqrt() * f64::from(dy[i])).sum()
        };
        for i in 0..width {
            let mut up: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
            let mut down = up.clone();
            up[i] += 1e-4;
            down[i] -= 1e-4;
            let slope = (value(&up) - value(&down)) / 2e-4;
            assert!((slope - f64::from(dx[i])).abs() < 1e-4, "{i}: {slope} {}", dx[i]);
        }
    }
}
