//! The residual stream in memory of the host: copied there while the layers run forward, and back
//! while they run backward, on a stream of its own.
//!
//! Two slots on the device take turns: layer `l` reads slot `l % 2` and writes the other. Forward, a
//! slot is written only after the copy of what it held; backward, the input of layer `l - 1` arrives
//! in the slot that layer `l + 1` has left, while layer `l` runs.

use std::sync::Arc;

use cudarc::driver::{
    CudaStream,
    result::{self, stream},
};

use crate::CudaError;
use crate::device::{Buffer, Device};
use crate::lane::Event;
use crate::staging::Pinned;

/// Pinned memory for the inputs of all layers but the last, whose input stays on the device.
pub(crate) struct Offload {
    memory: Pinned,
    /// Bytes of a layer's input.
    bytes: usize,
    layers: usize,
    copies: Arc<CudaStream>,
    /// On the stream of the layers: what a copy must wait for.
    reached: Event,
    /// By slot, on the stream of the copies: the slot's newest copy is over.
    copied: [Event; 2],
}

impl Drop for Offload {
    fn drop(&mut self) {
        // SAFETY: the stream lives. Nothing copies any more when the memory goes.
        let _ = unsafe { stream::synchronize(self.copies.cu_stream()) };
    }
}

impl Offload {
    /// Room for the inputs of `layers` layers of `bytes` bytes.
    pub(super) fn new(device: &Device, layers: usize, bytes: u64) -> Result<Self, CudaError> {
        let bytes = bytes as usize;
        let memory = Pinned::new(bytes * layers.saturating_sub(1).max(1))?;
        let copies = device.context.new_stream()?;
        let copied = [Event::new()?, Event::new()?];
        Ok(Self { memory, bytes, layers, copies, reached: Event::new()?, copied })
    }

    /// Before `layer` runs forward: copies its input to the host, and has the layer wait for the copy
    /// of what its output replaces.
    pub(super) fn store(
        &self,
        device: &Device,
        layer: usize,
        slots: &[Buffer],
    ) -> Result<(), CudaError> {
        let copies = self.copies.cu_stream();
        if layer + 1 < self.layers {
            self.reached.record(device.cu_stream())?;
            self.reached.hold(copies)?;
            // SAFETY: a layer's place in the pinned memory; the slot is not written before the copy.
            unsafe {
                let to = std::slice::from_raw_parts_mut(self.place(layer), self.bytes);
                result::memcpy_dtoh_async(to, slots[layer % 2].ptr(), copies)?;
            }
            self.copied[layer % 2].record(copies)?;
        }
        if layer > 0 {
            self.copied[(layer + 1) % 2].hold(device.cu_stream())?;
        }
        Ok(())
    }

    /// Before `layer` runs backward: has it wait for its input, and brings that of the layer below.
    pub(super) fn fetch_before(
        &self,
        device: &Device,
        layer: usize,
        slots: &[Buffer],
    ) -> Result<(), CudaError> {
        let copies = self.copies.cu_stream();
        if layer + 1 < self.layers {
            self.copied[layer % 2].hold(device.cu_stream())?;
        }
        let Some(below) = layer.checked_sub(1) else { return Ok(()) };
        self.reached.record(device.cu_stream())?;
        self.reached.hold(copies)?;
        // SAFETY: what `store` copied; the layer above has left the slot.
        unsafe {
            let from = std::slice::from_raw_parts(self.place(below), self.bytes);
            result::memcpy_htod_async(slots[below % 2].ptr(), from, copies)?;
        }
        self.copied[below % 2].record(copies)
    }

    /// Where the input of `layer` is kept.
    fn place(&self, layer: usize) -> *mut u8 {
        self.memory.ptr().wrapping_add(layer * self.bytes)
    }
}
