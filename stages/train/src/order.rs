//! Which packed rows each optimiser step sees: a function of seed and step alone.
//!
//! Epoch `e` visits the rows in the order of PyTorch's `randperm` seeded with `seed + e`, cut into
//! micro-batches and steps as transformers' `Trainer` does with `drop_last=False`: the last
//! micro-batch of an epoch may have fewer rows, and its last step fewer micro-batches.

/// The order of one training run.
#[derive(Clone, Debug)]
pub(crate) struct DataOrder {
    rows: usize,
    batch_size: usize,
    accumulation: usize,
    seed: u64,
    /// The permutation asked for last, by epoch.
    cached: Option<(u64, Vec<usize>)>,
}

/// The rows of one optimiser step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepRows {
    /// Rows of each micro-batch.
    pub(crate) micro_batches: Vec<Vec<usize>>,
    /// Micro-batches before this step since the start of training.
    pub(crate) first_micro_batch: u64,
}

impl DataOrder {
    /// The order over `rows` packed rows (at least one), `batch_size` of them a micro-batch and
    /// `accumulation` micro-batches a step.
    pub(crate) fn new(rows: usize, batch_size: usize, accumulation: usize, seed: u64) -> Self {
        Self { rows, batch_size, accumulation, seed, cached: None }
    }

    fn micro_batches_per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.batch_size) as u64
    }

    /// Optimiser steps of one pass over the rows.
    pub(crate) fn steps_per_epoch(&self) -> u64 {
        self.micro_batches_per_epoch().div_ceil(self.accumulation as u64)
    }

    /// Passes over the rows after `steps` steps.
    pub(crate) fn epochs_after(&self, steps: u64) -> f64 {
        let whole = steps / self.steps_per_epoch();
        let rest = (steps % self.steps_per_epoch()) * self.accumulation as u64;
        whole as f64 + rest as f64 / self.micro_batches_per_epoch() as f64
    }

    /// The rows of step `step`, counted from 0.
    pub(crate) fn step(&mut self, step: u64) -> StepRows {
        let (epoch, within) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let per_step = self.batch_size * self.accumulation;
        let batch_size = self.batch_size;
        let first_micro_batch =
            epoch * self.micro_batches_per_epoch() + within * self.accumulation as u64;
        let order = self.epoch(epoch);
        let first = within as usize * per_step;
        let rows = &order[first..order.len().min(first + per_step)];
        let micro_batches = rows.chunks(batch_size).map(<[usize]>::to_vec).collect();
        StepRows { micro_batches, first_micro_batch }
    }

    fn epoch(&mut self, epoch: u64) -> &[usize] {
        if self.cached.as_ref().is_none_or(|(e, _)| *e != epoch) {
            self.cached = Some((epoch, randperm(self.rows, self.seed.wrapping_add(epoch))));
        }
        &self.cached.as_ref().expect("invariant: filled in above").1
    }
}

/// `torch.randperm(n, generator=torch.Generator().manual_seed(seed))` on a CPU, for n < 2³²/20.
fn randperm(n: usize, seed: u64) -> Vec<usize> {
    let mut random = Mt19937::new(seed as u32);
    let mut order: Vec<usize> = (0..n).collect();
    for i in 0..n.saturating_sub(1) {
        let ahead = random.draw() as usize % (n - i);
        order.swap(i, i + ahead);
    }
    order
}

/// The Mersenne twister of Matsumoto and Nishimura (1998), 32-bit.
struct Mt19937 {
    state: [u32; 624],
    at: usize,
}

impl Mt19937 {
    fn new(seed: u32) -> Self {
        let mut state = [0u32; 624];
        state[0] = seed;
        for i in 1..624 {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Self { state, at: 624 }
    }

    fn draw(&mut self) -> u32 {
        if self.at == 624 {
            self.twist();
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..624 {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % 624] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + 397) % 624] ^ (y >> 1) ^ odd;
        }
        self.at = 0;
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "equal bits are the claim")]
mod tests {
    use super::*;

    #[test]
    fn permutations_equal_torch() {
        assert_eq!(randperm(10, 42), [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]);
        assert_eq!(randperm(10, 0), [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]);
        assert_eq!(randperm(10, 1), [5, 6, 1, 2, 0, 8, 9, 3, 7, 4]);
        // torch.randperm(2000, generator=torch.Generator().manual_seed(7))[-5:]
        assert_eq!(randperm(2000, 7)[1995..], [709, 520, 848, 1640, 1571]);
    }

    #[test]
    fn an_epoch_ends_with_a_short_micro_batch_and_a_short_step() {
        let mut order = DataOrder::new(11, 2, 4, 42);
        assert_eq!(order.steps_per_epoch(), 2);
        let sizes = |s: &StepRows| s.micro_batches.iter().map(Vec::len).collect::<Vec<_>>();
        let steps: Vec<StepRows> = (0..4).map(|s| order.step(s)).collect();
        assert_eq!(sizes(&steps[0]), [2, 2, 2, 2]);
        assert_eq!(sizes(&steps[1]), [2, 1]);
        assert_eq!(steps.iter().map(|s| s.first_micro_batch).collect::<Vec<_>>(), [0, 4, 6, 10]);
        let mut seen: Vec<usize> =
            steps[..2].iter().flat_map(|s| s.micro_batches.concat()).collect();
        assert_eq!(seen, randperm(11, 42));
        seen.sort_unstable();
        assert_eq!(seen, (0..11).collect::<Vec<_>>());
        let second: Vec<usize> = steps[2..].iter().flat_map(|s| s.micro_batches.concat()).collect();
        assert_eq!(second, randperm(11, 43));
        let epochs: Vec<f64> = (0..5).map(|s| order.epochs_after(s)).collect();
        assert_eq!(epochs, [0.0, 4.0 / 6.0, 1.0, 1.0 + 4.0 / 6.0, 2.0]);
    }
}
