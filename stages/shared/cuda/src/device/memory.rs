//! Memory of a device, and how much of it there is.

use std::cell::Cell;
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::Device;
use crate::CudaError;
use crate::dtype::Dtype;

/// Bytes to leave beside our buffers: the driver loads kernels of ours and of cuBLASLt when they are
/// first used, and recorded launches lie on the device.
const RESERVE: u64 = 384 << 20;
/// Live and peak bytes of all buffers: the notion of torch's `max_memory_allocated`.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) live: Cell<u64>,
    peak: Cell<u64>,
}

/// Device memory, freed when dropped.
pub struct Buffer {
    ptr: u64,
    bytes: u64,
    memory: Rc<Memory>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.memory.live.set(self.memory.live.get() - self.bytes);
        // SAFETY: allocated by `Device::alloc`, freed once; the driver waits for work that uses it.
        let _ = unsafe { result::free_sync(self.ptr) };
    }
}

impl Buffer {
    /// Address on the device.
    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Device {
    /// Memory of `bytes` bytes, not initialised.
    ///
    /// # Errors
    /// [`CudaError::Memory`] where there is no room.
    pub fn alloc(&self, bytes: u64) -> Result<Buffer, CudaError> {
        let bytes = bytes.max(16);
        // SAFETY: plain allocation; `Buffer` frees it.
        let ptr = unsafe { result::malloc_sync(bytes as usize) }.map_err(|e| {
            if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                let free = self.context.mem_get_info().map_or(0, |(free, _)| free as u64);
                CudaError::Memory { what: format!("{bytes} bytes more ({free} are free)") }
            } else {
                e.into()
            }
        })?;
        let memory = Rc::clone(&self.memory);
        memory.live.set(memory.live.get() + bytes);
        memory.peak.set(memory.peak.get().max(memory.live.get()));
        Ok(Buffer { ptr, bytes, memory })
    }

    /// Memory of `count` elements of the device's type.
    pub(crate) fn elements(&self, count: usize) -> Result<Buffer, CudaError> {
        self.alloc(count as u64 * self.dtype.size())
    }

    /// Memory of `count` elements of the residual stream.
    pub(crate) fn residual_elements(&self, count: usize) -> Result<Buffer, CudaError> {
        self.alloc(count as u64 * self.dtype.residual().size())
    }

    /// Memory holding zeros.
    pub(crate) fn zeros(&self, bytes: u64) -> Result<Buffer, CudaError> {
        let buffer = self.alloc(bytes)?;
        self.clear(buffer.ptr(), buffer.bytes())?;
        Ok(buffer)
    }

    /// Memory holding `data`.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn upload(&self, data: &[u8]) -> Result<Buffer, CudaError> {
        let buffer = self.alloc(data.len() as u64)?;
        self.write(buffer.ptr(), data)?;
        Ok(buffer)
    }

    /// Memory holding `values` in f32.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn upload_f32(&self, values: &[f32]) -> Result<Buffer, CudaError> {
        self.upload(&Dtype::F32.encode(values))
    }

    /// Copies bytes to the device; returns when they have been read.
    pub(crate) fn write(&self, to: u64, data: &[u8]) -> Result<(), CudaError> {
        // SAFETY: the caller's range lies inside a buffer; the copy is over when this returns.
        unsafe {
            result::memcpy_htod_async(to, data, self.stream.cu_stream())?;
        }
        Ok(self.stream.synchronize()?)
    }

    /// Copies bytes from the device, after all work so far.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn read(&self, from: &Buffer, bytes: usize) -> Result<Vec<u8>, CudaError> {
        self.read_at(from.ptr(), bytes.min(from.bytes as usize))
    }

    /// Copies bytes from a place on the device, after all work so far.
    pub(crate) fn read_at(&self, from: u64, bytes: usize) -> Result<Vec<u8>, CudaError> {
        let mut data = vec![0u8; bytes];
        // SAFETY: the caller's range lies inside a buffer; synchronised before the vector is used.
        unsafe {
            result::memcpy_dtoh_async(&mut data, from, self.stream.cu_stream())?;
        }
        self.stream.synchronize()?;
        Ok(data)
    }

    /// Floats from the device.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn read_f32(&self, from: &Buffer, count: usize) -> Result<Vec<f32>, CudaError> {
        Ok(Dtype::F32.decode(&self.read(from, count * 4)?))
    }

    /// Fills with zero bytes.
    pub(crate) fn clear(&self, ptr: u64, bytes: u64) -> Result<(), CudaError> {
        // SAFETY: the caller's range lies inside a buffer.
        unsafe { result::memset_d8_async(ptr, 0, bytes as usize, self.cu_stream())? };
        Ok(())
    }

    /// Bytes of memory that nothing uses.
    pub(crate) fn free_bytes(&self) -> Result<u64, CudaError> {
        Ok(self.context.mem_get_info()?.0 as u64)
    }

    /// Bytes of memory that the device has.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn total_bytes(&self) -> Result<u64, CudaError> {
        Ok(self.context.mem_get_info()?.1 as u64)
    }

    /// Bytes of shared memory that a block can ask for.
    pub(crate) fn shared_bytes(&self) -> Result<usize, CudaError> {
        let attribute =
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        Ok(self.context.attribute(attribute)? as usize)
    }

    /// Refuses to go on where so little memory is left that kernels may not find room.
    ///
    /// # Errors
    /// [`CudaError::Memory`].
    pub fn check_reserve(&self) -> Result<(), CudaError> {
        let free = self.free_bytes()?;
        if free >= RESERVE {
            return Ok(());
        }
        let what = format!("kernels beside all buffers ({free} bytes are free)");
        Err(CudaError::Memory { what })
    }

    /// Bytes of memory that buffers may take.
    pub(crate) fn spare_bytes(&self) -> Result<u64, CudaError> {
        Ok(self.free_bytes()?.saturating_sub(RESERVE))
    }

    /// Peak of the bytes in buffers, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.memory.peak.get()
    }

    /// Starts the peak anew from what there is, so that an attempt that fails does not count.
    pub fn reset_peak(&self) {
        self.memory.peak.set(self.memory.live.get());
    }
}
