//! What a pass does beside its main line of products: weights are decoded one product ahead, and the
//! gradients of the factors are summed while the next product runs.

use std::cell::Cell;

use crate::CudaError;
use crate::device::{Buffer, Device};
use crate::lane::{Event, Lane};
use crate::weights::Direction::{self, Backward, Forward};

/// A group's operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operand {
    pub(super) layer: usize,
    pub(super) group: usize,
    pub(super) direction: Direction,
}

impl Operand {
    /// The operand that a step of `layers` layers needs after this one.
    pub(super) fn next(self, layers: usize) -> Option<Self> {
        let Self { layer, group, direction } = self;
        match (direction, group) {
            (Forward, 3) if layer + 1 == layers => Some(Self { direction: Backward, ..self }),
            (Forward, 3) => Some(Self { layer: layer + 1, group: 0, ..self }),
            (Forward, _) => Some(Self { group: group + 1, ..self }),
            // Nothing needs the gradient of the embeddings.
            (Backward, 0 | 1) if layer == 0 => None,
            (Backward, 0) => Some(Self { layer: layer - 1, group: 3, ..self }),
            (Backward, _) => Some(Self { group: group - 1, ..self }),
        }
    }
}

/// Lanes of a training step that keeps its activations.
pub(super) struct Ahead {
    decoding: Lane,
    summing: Lane,
    /// Places of operands, in turn.
    slots: [u64; 2],
    _second: Buffer,
    decoded: Event,
    /// The operand under way and its slot.
    pending: Cell<Option<(Operand, usize)>>,
    /// By group: the sums of the newest layer are done.
    summed: [Event; 4],
}

impl Ahead {
    /// Lanes that decode into `first` and a buffer of that size.
    pub(super) fn new(device: &Device, first: &Buffer) -> Result<Self, CudaError> {
        let second = device.alloc(first.bytes())?;
        Ok(Self {
            decoding: Lane::new(device)?,
            summing: Lane::new(device)?,
            slots: [first.ptr(), second.ptr()],
            _second: second,
            decoded: Event::new()?,
            pending: Cell::new(None),
            summed: [Event::new()?, Event::new()?, Event::new()?, Event::new()?],
        })
    }

    /// Address of `wanted` for the next product of the main stream, decoded before or now; the
    /// operand after it is decoded while that product runs.
    pub(super) fn operand(
        &self,
        device: &Device,
        wanted: Operand,
        layers: usize,
        decode: impl Fn(Operand, u64) -> Result<(), CudaError>,
    ) -> Result<u64, CudaError> {
        let slot = match self.settle(device)? {
            Some((ready, slot)) if ready == wanted => slot,
            _ => {
                decode(wanted, self.slots[0])?;
                0
            }
        };
        if let Some(next) = wanted.next(layers) {
            // The product before this one, which the main stream has, was the last to read that slot.
            let other = 1 - slot;
            self.decoding.run(device, &self.decoded, || decode(next, self.slots[other]))?;
            self.pending.set(Some((next, other)));
        }
        Ok(self.slots[slot])
    }

    /// Has the main stream wait for the operand under way, and names it.
    pub(super) fn settle(&self, device: &Device) -> Result<Option<(Operand, usize)>, CudaError> {
        let pending = self.pending.take();
        if pending.is_some() {
            self.decoded.hold(device.cu_stream())?;
        }
        Ok(pending)
    }

    /// Forgets the operand under way: of a recording that was given up nothing runs.
    pub(super) fn forget(&self) {
        self.pending.set(None);
    }

    /// Enqueues the sums of a group beside the main stream.
    pub(super) fn sum(
        &self,
        device: &Device,
        group: usize,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        self.summing.run(device, &self.summed[group], work)
    }

    /// Has the main stream wait for the newest sums of a group, which has some in this pass.
    pub(super) fn wait_for_sums(&self, device: &Device, group: usize) -> Result<(), CudaError> {
        self.summed[group].hold(device.cu_stream())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn operands_come_in_the_order_of_a_step() {
        let mut at = Some(Operand { layer: 0, group: 0, direction: Forward });
        let mut seen = Vec::new();
        while let Some(operand) = at {
            seen.push((operand.direction, operand.layer, operand.group));
            at = operand.next(2);
        }
        let forward = (0..2).flat_map(|l| (0..4).map(move |g| (Forward, l, g)));
        let backward = (0..2).rev().flat_map(|l| (0..4).rev().map(move |g| (Backward, l, g)));
        // The last would be the gradient of the embeddings.
        let expected: Vec<_> = forward.chain(backward.take(7)).collect();
        assert_eq!(seen, expected);
    }
}
