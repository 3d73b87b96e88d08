//! Host memory that the device reads while this program goes on: pinned, two slots in turn, so that a
//! slot is written only after its last copy is over.

use std::cell::Cell;
use std::ffi::c_void;

use cudarc::driver::{DriverError, result, sys::CUresult};

use crate::CudaError;
use crate::device::Device;
use crate::lane::Event;

/// Memory of the host that the device reads and writes.
pub(crate) struct Pinned(*mut c_void);

impl Pinned {
    /// Memory of `bytes` bytes, not initialised.
    pub(crate) fn new(bytes: usize) -> Result<Self, CudaError> {
        // SAFETY: freed by `drop`.
        let memory = unsafe { result::malloc_host(bytes, 0) };
        memory.map(Self).map_err(|error| fault(error, bytes))
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        self.0.cast()
    }
}

/// Why `bytes` bytes could not be pinned: a fault of earlier work shows here as well.
fn fault(error: DriverError, bytes: usize) -> CudaError {
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::HostMemory { wanted: bytes as u64 },
        _ => error.into(),
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: made by `new`; whoever has it copied waits for the copies first.
        let _ = unsafe { result::free_host(self.0) };
    }
}

/// Two pinned slots of one size.
pub(crate) struct Staging {
    slots: [Slot; 2],
    next: Cell<usize>,
    bytes: usize,
}

struct Slot {
    memory: Pinned,
    /// Recorded after the slot's last copy.
    copied: Event,
}

impl Slot {
    fn new(bytes: usize) -> Result<Self, CudaError> {
        Ok(Self { memory: Pinned::new(bytes)?, copied: Event::new()? })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The device must not read what is freed.
        let _ = self.copied.wait();
    }
}

impl Staging {
    /// Slots of `bytes` bytes.
    pub(crate) fn new(bytes: usize) -> Result<Self, CudaError> {
        Ok(Self { slots: [Slot::new(bytes)?, Slot::new(bytes)?], next: Cell::new(0), bytes })
    }

    /// Has `fill` write a slot and enqueues its copy to the device at `to`, which has room for it.
    pub(crate) fn send(
        &self,
        device: &Device,
        to: u64,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), CudaError> {
        let slot = &self.slots[self.next.get()];
        self.next.set(1 - self.next.get());
        slot.copied.wait()?;
        // SAFETY: after the event nothing reads the slot, and only one borrow of it lives, since
        // `Staging` is not shared between threads.
        unsafe {
            let memory = std::slice::from_raw_parts_mut(slot.memory.ptr(), self.bytes);
            memory.fill(0);
            fill(memory);
            result::memcpy_htod_async(to, memory, device.cu_stream())?;
        }
        slot.copied.record(device.cu_stream())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lack_of_memory_is_called_one() {
        let of = |status| fault(DriverError(status), 7);
        let lacking = of(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        assert!(matches!(lacking, CudaError::HostMemory { wanted: 7 }));
        assert!(matches!(of(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS), CudaError::Driver(_)));
    }
}
