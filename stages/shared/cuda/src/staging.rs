//! Host memory that the device reads while this program goes on: pinned, two slots in turn, so that a
//! slot is written only after its last copy is over.

use std::cell::Cell;
use std::ffi::c_void;

use cudarc::driver::{
    result::{self, event},
    sys,
};

use crate::CudaError;
use crate::device::Device;

/// Two pinned slots of one size.
pub(crate) struct Staging {
    slots: [Slot; 2],
    next: Cell<usize>,
    bytes: usize,
}

struct Slot {
    memory: *mut c_void,
    /// Recorded after the slot's last copy.
    copied: sys::CUevent,
}

impl Slot {
    fn new(bytes: usize) -> Result<Self, CudaError> {
        let copied = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: freed by `drop`.
        let memory = unsafe { result::malloc_host(bytes, 0)? };
        Ok(Self { memory, copied })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: made by `new`; the device must not read what is freed.
        unsafe {
            let _ = event::synchronize(self.copied);
            let _ = result::free_host(self.memory);
            let _ = event::destroy(self.copied);
        }
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
        // SAFETY: after the event nothing reads the slot, and only one borrow of it lives, since
        // `Staging` is not shared between threads.
        unsafe {
            event::synchronize(slot.copied)?;
            let memory = std::slice::from_raw_parts_mut(slot.memory.cast::<u8>(), self.bytes);
            memory.fill(0);
            fill(memory);
            result::memcpy_htod_async(to, memory, device.cu_stream())?;
            event::record(slot.copied, device.cu_stream())?;
        }
        Ok(())
    }
}
