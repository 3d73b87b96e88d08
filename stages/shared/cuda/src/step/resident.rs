//! Weights that are decoded once and stay on the device, where there is memory to spare: the operands
//! of all products, in the layout and so with the bits that decoding each anew gives.

use std::cell::Cell;

use crate::CudaError;
use crate::adapter::Lora;
use crate::device::{Buffer, Device};
use crate::weights::{Direction, Frozen};

/// Operands of all layers, forward and, where it is wanted, backward: `[out (+ width), in + width]`.
pub(super) struct Resident {
    groups: Vec<[Buffer; 4]>,
    directions: &'static [Direction],
    /// Of whom the weights are.
    weights: u64,
    /// Of whom the factors are, and which of their changes.
    factors: Cell<Option<(u64, u64)>>,
}

/// What training and answering need.
const BOTH: &[Direction] = &[Direction::Forward, Direction::Backward];
const FORWARD: &[Direction] = &[Direction::Forward];

impl Resident {
    /// Decodes all weights where that takes no more than half of what is free.
    pub(super) fn new(
        device: &Device,
        frozen: &Frozen,
        lora: &Lora,
        trains: bool,
    ) -> Result<Option<Self>, CudaError> {
        let elements = |group: &crate::adapter::Group| {
            let rows = group.outputs + if trains { group.width } else { 0 };
            (group.inputs + group.width) * rows
        };
        let total: usize = lora.groups.iter().flatten().map(elements).sum();
        if total as u64 * device.dtype.size() > device.spare_bytes()? / 2 {
            return Ok(None);
        }
        let mut groups = Vec::with_capacity(lora.groups.len());
        for (layer, of_layer) in lora.groups.iter().enumerate() {
            let [a, b, c, d] = of_layer.each_ref().map(|group| device.elements(elements(group)));
            let buffers = [a?, b?, c?, d?];
            for (index, buffer) in buffers.iter().enumerate() {
                frozen.decode(device, (layer, index), lora, buffer.ptr())?;
            }
            groups.push(buffers);
        }
        let directions = if trains { BOTH } else { FORWARD };
        Ok(Some(Self { groups, directions, weights: frozen.embed.ptr(), factors: Cell::new(None) }))
    }

    /// Puts the factors beside the weights where they are not there yet, or have changed.
    pub(super) fn refresh(
        &self,
        device: &Device,
        frozen: &Frozen,
        lora: &Lora,
    ) -> Result<(), CudaError> {
        let newest = (lora.operand(0), lora.changes());
        if self.weights != frozen.embed.ptr() || self.factors.get() == Some(newest) {
            return Ok(());
        }
        for (layer, buffers) in self.groups.iter().enumerate() {
            for (index, buffer) in buffers.iter().enumerate() {
                for direction in self.directions {
                    lora.put(device, (layer, index), *direction, buffer.ptr())?;
                }
            }
        }
        self.factors.set(Some(newest));
        Ok(())
    }

    /// Address of a group's operand, where it is of these weights.
    pub(super) fn operand(&self, frozen: &Frozen, (layer, group): (usize, usize)) -> Option<u64> {
        (self.weights == frozen.embed.ptr()).then(|| self.groups[layer][group].ptr())
    }
}
