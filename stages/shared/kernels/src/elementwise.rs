//! Elementwise steps of a decoder layer, fused so that each reads and writes memory once.

use rayon::prelude::*;

use crate::simd::{exp, max_of, multiversion, tanh};

/// Elements a task takes.
const CHUNK: usize = 16 * 1024;

/// `out = silu(gate) * up`, `silu(x) = x / (1 + e^-x)`.
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    out.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)))
        .for_each(|(out, (gate, up))| swiglu_chunk(gate, up, out));
}

multiversion! {
fn swiglu_chunk(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
        *out = *g / (1.0 + exp(-*g)) * *u;
    }
}
}

/// Gradients of [`swiglu`]: `gate` and `up` are overwritten with their own gradients for `dout`.
/// With `s = 1/(1 + e^-g)`: `dg = dout * u * s * (1 + g * (1 - s))`, `du = dout * g * s`.
pub fn swiglu_backward(gate: &mut [f32], up: &mut [f32], dout: &[f32]) {
    gate.par_chunks_mut(CHUNK)
        .zip(up.par_chunks_mut(CHUNK).zip(dout.par_chunks(CHUNK)))
        .for_each(|(gate, (up, dout))| swiglu_backward_chunk(gate, up, dout));
}

multiversion! {
fn swiglu_backward_chunk(gate: &mut [f32], up: &mut [f32], dout: &[f32]) {
    for ((gate, up), d) in gate.iter_mut().zip(up.iter_mut()).zip(dout) {
        let (g, u) = (*gate, *up);
        let s = 1.0 / (1.0 + exp(-g));
        *gate = *d * u * s * (1.0 + g * (1.0 - s));
        *up = *d * g * s;
    }
}
}

/// `√(2/π)` and the factor of the cube in GELU's approximation.
const GELU: (f32, f32) = (0.797_884_6, 0.044_715);

/// `out = gelu(gate) * up`, `gelu(x) = x/2 * (1 + tanh(√(2/π) * (x + 0.044715 x³)))` (Hendrycks and
/// Gimpel, 2016).
pub fn geglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    out.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)))
        .for_each(|(out, (gate, up))| geglu_chunk(gate, up, out));
}

multiversion! {
fn geglu_chunk(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
        let t = tanh(GELU.0 * (GELU.1 * *g * *g).mul_add(*g, *g));
        *out = 0.5 * *g * (1.0 + t) * *u;
    }
}
}

/// Gradients of [`geglu`]: `gate` and `up` are overwritten with their own gradients for `dout`.
/// With `t` the tanh: `dg = dout * u/2 * (1 + t + g * (1 - t²) * √(2/π) * (1 + 3 * 0.044715 g²))`,
/// `du = dout * g/2 * (1 + t)`.
pub fn geglu_backward(gate: &mut [f32], up: &mut [f32], dout: &[f32]) {
    gate.par_chunks_mut(CHUNK)
        .zip(up.par_chunks_mut(CHUNK).zip(dout.par_chunks(CHUNK)))
        .for_each(|(gate, (up, dout))| geglu_backward_chunk(gate, up, dout));
}

multiversion! {
fn geglu_backward_chunk(gate: &mut [f32], up: &mut [f32], dout: &[f32]) {
    for ((gate, up), d) in gate.iter_mut().zip(up.iter_mut()).zip(dout) {
        let (g, u) = (*gate, *up);
        let t = tanh(GELU.0 * (GELU.1 * g * g).mul_add(g, g));
        let slope = GELU.0 * (3.0 * GELU.1 * g).mul_add(g, 1.0);
        *gate = 0.5 * *d * u * (1.0 + t + g * (1.0 - t * t) * slope);
        *up = 0.5 * *d * g * (1.0 + t);
    }
}
}

/// `x = cap * tanh(x / cap)`.
pub fn softcap(x: &mut [f32], cap: f32) {
    x.par_chunks_mut(CHUNK).for_each(|x| softcap_chunk(x, cap));
}

multiversion! {
fn softcap_chunk(x: &mut [f32], cap: f32) {
    for x in x {
        *x = cap * tanh(*x / cap);
    }
}
}

/// `x += y`.
pub fn add_assign(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(CHUNK).zip(y.par_chunks(CHUNK)).for_each(|(x, y)| add_chunk(x, y));
}

multiversion! {
fn add_chunk(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += *y;
    }
}
}

/// `x *= factor`.
pub fn scale(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|x| *x *= factor);
}

multiversion! {
/// Index of the greatest element, the lowest of equals; NaN is never greatest.
pub fn argmax(x: &[f32]) -> usize {
    let best = max_of(x);
    x.iter().position(|v| *v == best).unwrap_or(0)
}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swiglu_and_its_gradient_equal_f64() {
        let g: Vec<f32> = (-40..41).map(|i| i as f32 / 4.0).collect();
        let u: Vec<f32> = g.iter().map(|v| 1.5 - v / 7.0).collect();
        let mut out = vec![0.0; g.len()];
        swiglu(&g, &u, &mut out);
        let (mut dg, mut du) = (g.clone(), u.clone());
        let dout = vec![0.7; g.len()];
        swiglu_backward(&mut dg, &mut du, &dout);
        for i in 0..g.len() {
            let (gi, ui) = (f64::from(g[i]), f64::from(u[i]));
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let slope = (silu(gi + 1e-5) - silu(gi - 1e-5)) / 2e-5;
            assert!((f64::from(out[i]) - silu(gi) * ui).abs() < 1e-5);
            assert!((f64::from(dg[i]) - 0.7 * ui * slope).abs() < 1e-5);
            assert!((f64::from(du[i]) - 0.7 * silu(gi)).abs() < 1e-5);
        }
    }

    #[test]
    fn geglu_and_its_gradient_equal_f64() {
        let g: Vec<f32> = (-40..41).map(|i| i as f32 / 4.0).collect();
        let u: Vec<f32> = g.iter().map(|v| 1.5 - v / 7.0).collect();
        let mut out = vec![0.0; g.len()];
        geglu(&g, &u, &mut out);
        let (mut dg, mut du) = (g.clone(), u.clone());
        geglu_backward(&mut dg, &mut du, &vec![0.7; g.len()]);
        for i in 0..g.len() {
            let (gi, ui) = (f64::from(g[i]), f64::from(u[i]));
            let gelu = |x: f64| {
                let root = (2.0 / std::f64::consts::PI).sqrt();
                0.5 * x * (1.0 + (root * (x + 0.044_715 * x.powi(3))).tanh())
            };
            let slope = (gelu(gi + 1e-5) - gelu(gi - 1e-5)) / 2e-5;
            assert!((f64::from(out[i]) - gelu(gi) * ui).abs() < 1e-5);
            assert!((f64::from(dg[i]) - 0.7 * ui * slope).abs() < 1e-5);
            assert!((f64::from(du[i]) - 0.7 * gelu(gi)).abs() < 1e-5);
        }
    }

    #[test]
    fn argmax_takes_the_lowest_of_equals() {
        let mut x = vec![0.0; 100];
        x[70] = 3.0;
        x[33] = 3.0;
        assert_eq!(argmax(&x), 33);
    }
}
