//! Rotary position embedding (Su et al., 2021) in the half-split layout of transformers: element i
//! of a head turns with element i + d/2.

use rayon::prelude::*;

use crate::simd::multiversion;

/// Cosines and sines of every position and frequency.
#[derive(Clone, Debug)]
pub struct RopeTable {
    half: usize,
    /// `[positions, 2, head_dim / 2]`: cosines, then sines.
    values: Vec<f32>,
}

impl RopeTable {
    /// Frequencies `theta^(-2i/head_dim)`; angles are formed in f32, as transformers does.
    pub fn new(positions: usize, head_dim: usize, theta: f32) -> Self {
        let half = head_dim / 2;
        let mut values = Vec::with_capacity(positions * head_dim);
        let frequency: Vec<f32> =
            (0..half).map(|i| 1.0 / theta.powf(2.0 * i as f32 / head_dim as f32)).collect();
        for position in 0..positions {
            let angle = |f: &f32| f64::from(position as f32 * f);
            values.extend(frequency.iter().map(|f| angle(f).cos() as f32));
            values.extend(frequency.iter().map(|f| angle(f).sin() as f32));
        }
        Self { half, values }
    }

    /// Positions in the table.
    pub fn positions(&self) -> usize {
        self.values.len() / (2 * self.half)
    }

    /// Turns every head of `x [rows, heads * head_dim]` by the angle of its row's position, or back
    /// (`inverse`, which is also the gradient).
    ///
    /// # Panics
    /// Where a position is beyond the table.
    pub fn rotate(&self, x: &mut [f32], positions: &[u32], inverse: bool) {
        if positions.is_empty() {
            return;
        }
        let width = x.len() / positions.len();
        let rows = 32;
        x.par_chunks_mut(rows * width).zip(positions.par_chunks(rows)).for_each(
            |(x, positions)| {
                turn(x, positions, &self.values, self.half, if inverse { -1.0 } else { 1.0 });
            },
        );
    }
}

multiversion! {
fn turn(x: &mut [f32], positions: &[u32], table: &[f32], half: usize, sign: f32) {
    let width = x.len() / positions.len();
    for (row, position) in x.chunks_exact_mut(width).zip(positions) {
        let entry = &table[*position as usize * 2 * half..][..2 * half];
        let (cos, sin) = entry.split_at(half);
        for head in row.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b, s) = (low[i], high[i], sign * sin[i]);
                low[i] = a * cos[i] - b * s;
                high[i] = b * cos[i] + a * s;
            }
        }
    }
}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_back_restores_and_angles_grow_with_position() {
        let table = RopeTable::new(8, 4, 100.0);
        let x = vec![1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0];
        let mut y = x.clone();
        table.rotate(&mut y, &[0, 3], false);
        assert_eq!(&y[..4], &x[..4]);
        let (c, s) = (3.0f32.cos(), 3.0f32.sin());
        assert!((y[4] - (1.0 * c - 3.0 * s)).abs() < 1e-6);
        assert!((y[6] - (3.0 * c + 1.0 * s)).abs() < 1e-6);
        table.rotate(&mut y, &[0, 3], true);
        assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
