//! A micro-batch on its way to the device.

use model::MicroBatch;

use super::Step;
use crate::CudaError;
use crate::attention::check_longest;
use crate::device::Device;

/// Rows that reach the head are filled up to a multiple of this, so that shapes repeat.
const TARGET_ROWS: usize = 256;
/// Columns of [`Step::integers`].
pub(crate) const COLUMNS: usize = 12;

/// A micro-batch on the device.
pub(crate) struct Batch {
    pub(crate) n: usize,
    pub(crate) targets: usize,
    pub(super) longest: usize,
    pub(super) tokens: u64,
    pub(crate) positions: u64,
    pub(super) start: u64,
    pub(super) stop: u64,
    /// Rows that have a target, and these.
    pub(crate) rows: u64,
    pub(crate) labels: u64,
    pub(super) bounds: u64,
    pub(super) orders: [u64; 3],
    /// Address of the loss's scale.
    pub(super) scale: u64,
}

impl Step {
    pub(super) fn upload(
        &self,
        device: &Device,
        batch: MicroBatch<'_>,
        scale: f32,
    ) -> Result<Batch, CudaError> {
        self.upload_with(device, batch, |columns| {
            let rows = columns[4].len().next_multiple_of(TARGET_ROWS).min(self.capacity);
            columns[4].resize(rows, -1);
            columns[5].resize(rows, -1);
            columns[11] = vec![scale.to_bits().cast_signed()];
        })
    }

    /// Puts a batch on the device after `change` has seen the columns of [`Step::integers`].
    pub(crate) fn upload_with(
        &self,
        device: &Device,
        batch: MicroBatch<'_>,
        change: impl FnOnce(&mut [Vec<i32>; COLUMNS]),
    ) -> Result<Batch, CudaError> {
        let n = batch.tokens.len();
        if n > self.capacity || n != batch.targets.len() || n == 0 {
            let message = format!("a batch of {n} tokens where {} fit", self.capacity);
            return Err(CudaError::Input(message));
        }
        let mut columns: [Vec<i32>; COLUMNS] = Default::default();
        columns[0].extend(batch.tokens);
        let mut longest = 0;
        for bounds in batch.cu_seqlens.windows(2) {
            longest = longest.max(bounds[1] - bounds[0]);
            for row in bounds[0]..bounds[1] {
                columns[1].push(row - bounds[0]);
                columns[2].push(bounds[0]);
                columns[3].push(bounds[1]);
            }
        }
        if longest as usize > self.positions {
            let message =
                format!("a sequence of {longest} tokens where {} positions fit", self.positions);
            return Err(CudaError::Input(message));
        }
        if self.attention.is_none() {
            check_longest(longest as usize, self.shared_bytes, self.trains, device.dtype)?;
        }
        for (row, target) in batch.targets.iter().enumerate().filter(|(_, t)| **t != -100) {
            columns[4].push(row as i32);
            columns[5].push(*target);
        }
        // A column and the next: pairs.
        let pairs: Vec<i32> =
            columns[2].iter().zip(&columns[3]).flat_map(|(a, b)| [*a, *b]).collect();
        let (low, high) = pairs.split_at(pairs.len().min(self.capacity));
        (columns[6], columns[7]) = (low.to_vec(), high.to_vec());
        if let Some(plan) = &self.attention {
            [columns[8], columns[9], columns[10]] = plan.orders(&columns[2], &columns[3]);
        }
        change(&mut columns);
        let targets = columns[4].len();
        self.staging.send(device, self.integers.ptr(), |bytes| {
            for (column, to) in columns.iter().zip(bytes.chunks_exact_mut(self.capacity * 4)) {
                for (value, to) in column.iter().zip(to.chunks_exact_mut(4)) {
                    to.copy_from_slice(&value.to_le_bytes());
                }
            }
        })?;
        let column = |index: usize| self.integers.ptr() + (index * self.capacity * 4) as u64;
        Ok(Batch {
            n,
            targets,
            longest: longest as usize,
            tokens: column(0),
            positions: column(1),
            start: column(2),
            stop: column(3),
            rows: column(4),
            labels: column(5),
            bounds: column(6),
            orders: [column(8), column(9), column(10)],
            scale: column(11),
        })
    }
}
