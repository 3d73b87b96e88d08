//! Cross-entropy of a linear head, in chunks of rows, so that the logits never exist at once.

use rayon::prelude::*;

use crate::gemm::{Into, View, gemm};
use crate::simd::{exp, max_of, multiversion, sum_by, tanh};

/// Rows whose logits exist at once: the head is read and packed anew for every such chunk.
const ROWS: usize = 384;

/// Sum over rows of `-log softmax(hidden · headᵀ)[target]` in nats, for `hidden [rows, width]` and
/// `head [vocabulary, width]`; with `softcap = c`, of the logits `c * tanh(logit / c)`. With `gradient = (scale, dhidden)`, overwrites `dhidden` with the
/// gradient of `scale` times that sum.
///
/// # Panics
/// Where a target is outside the vocabulary.
pub fn linear_cross_entropy(
    hidden: &[f32],
    head: &[f32],
    width: usize,
    targets: &[u32],
    softcap: Option<f32>,
    gradient: Option<(f32, &mut [f32])>,
) -> f64 {
    let vocabulary = head.len() / width;
    let mut logits = vec![0.0f32; ROWS.min(targets.len()) * vocabulary];
    let (scale, mut dhidden) = match gradient {
        Some((scale, dhidden)) => (Some(scale), dhidden),
        None => (None, &mut [][..]),
    };
    let mut sum = 0.0f64;
    for (targets, hidden) in targets.chunks(ROWS).zip(hidden.chunks(ROWS * width)) {
        let rows = targets.len();
        let logits = &mut logits[..rows * vocabulary];
        let (h, w) = (View::rows(hidden, width), View::transposed(head, width));
        gemm(rows, vocabulary, width, h, w, logits, vocabulary, Into::Overwrite);
        let losses: Vec<f64> = logits
            .par_chunks_mut(vocabulary)
            .zip(targets)
            .map(|(row, target)| match softcap {
                Some(cap) => capped_row_loss(row, *target as usize, cap, scale),
                None => row_loss(row, *target as usize, scale),
            })
            .collect();
        sum = losses.iter().fold(sum, |sum, loss| sum + loss);
        if scale.is_some() {
            let (out, rest) = std::mem::take(&mut dhidden).split_at_mut(rows * width);
            let (d, w) = (View::rows(logits, vocabulary), View::rows(head, width));
            gemm(rows, width, vocabulary, d, w, out, width, Into::Overwrite);
            dhidden = rest;
        }
    }
    sum
}

/// As [`row_loss`] of capped logits, whose gradient is that of the caps times `1 - tanh²`.
fn capped_row_loss(row: &mut [f32], target: usize, cap: f32, scale: Option<f32>) -> f64 {
    let mut slopes = vec![0.0; if scale.is_some() { row.len() } else { 0 }];
    cap_row(row, cap, &mut slopes);
    let loss = row_loss(row, target, scale);
    for (x, slope) in row.iter_mut().zip(&slopes) {
        *x *= slope;
    }
    loss
}

multiversion! {
/// Caps the logits of a row and leaves the derivatives in `slopes`, where that is not empty.
fn cap_row(row: &mut [f32], cap: f32, slopes: &mut [f32]) {
    for x in row.iter_mut() {
        *x = tanh(*x / cap);
    }
    for (slope, t) in slopes.iter_mut().zip(row.iter()) {
        *slope = 1.0 - *t * *t;
    }
    for x in row {
        *x *= cap;
    }
}
}

multiversion! {
/// Loss of one row; with `scale`, turns its logits into their gradient.
fn row_loss(row: &mut [f32], target: usize, scale: Option<f32>) -> f64 {
    let max = max_of(row);
    let logit = row[target] - max;
    for x in row.iter_mut() {
        *x = exp(*x - max);
    }
    let sum = sum_by(row, row, |a, _, acc| acc + a);
    if let Some(scale) = scale {
        let factor = scale / sum;
        for x in row.iter_mut() {
            *x *= factor;
        }
        row[target] -= scale;
    }
    f64::from(sum).ln() - f64::from(logit)
}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Difference from f64 of loss and gradient, with logits up to 5 / 2 of the cap.
    fn check(softcap: Option<f32>) {
        let (rows, width, vocabulary) = (400, 5, 40);
        let number = |i: usize, s: u64| {
            (crate::dropout::mix(s ^ ((i as u64) << 8)) >> 40) as f32 / 8_388_608.0 - 1.0
        };
        let hidden: Vec<f32> = (0..rows * width).map(|i| number(i, 1)).collect();
        let head: Vec<f32> = (0..vocabulary * width).map(|i| number(i, 2)).collect();
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7 % vocabulary) as u32).collect();
        let mut dhidden = vec![0.0; hidden.len()];
        let gradient = Some((0.5, &mut dhidden[..]));
        let sum = linear_cross_entropy(&hidden, &head, width, &targets, softcap, gradient);
        let plain = linear_cross_entropy(&hidden, &head, width, &targets, softcap, None);
        assert_eq!(sum.to_bits(), plain.to_bits());
        let mut expected = 0.0;
        for r in 0..rows {
            let dots: Vec<f64> = (0..vocabulary)
                .map(|v| {
                    (0..width)
                        .map(|c| f64::from(hidden[r * width + c]) * f64::from(head[v * width + c]))
                        .sum()
                })
                .collect();
            let cap = softcap.map(f64::from);
            let capped = |l: &f64| cap.map_or(*l, |cap| cap * (l / cap).tanh());
            let slope = |l: f64| cap.map_or(1.0, |cap| 1.0 - (l / cap).tanh().powi(2));
            let logits: Vec<f64> = dots.iter().map(capped).collect();
            let total: f64 = logits.iter().map(|l| l.exp()).sum();
            expected += total.ln() - logits[targets[r] as usize];
            for c in 0..width {
                let g: f64 = (0..vocabulary)
                    .map(|v| {
                        let hit = f64::from(u8::from(v == targets[r] as usize));
                        let dlogit = (logits[v].exp() / total - hit) * slope(dots[v]);
                        dlogit * f64::from(head[v * width + c])
                    })
                    .sum();
                assert!((0.5 * g - f64::from(dhidden[r * width + c])).abs() < 1e-5);
            }
        }
        assert!((sum - expected).abs() < 1e-4, "{sum} {expected}");
    }

    #[test]
    fn loss_and_gradient_equal_f64() {
        check(None);
    }

    #[test]
    fn loss_and_gradient_of_capped_logits_equal_f64() {
        check(Some(2.0));
    }
}
