//! What NVIDIA's management library says of a GPU's memory: beside our own count of live bytes it
//! holds the driver's context, kernels and recorded graphs.

use cudarc::driver::sys;
use nvml_wrapper::{Nvml, enums::device::UsedGpuMemory};

use crate::Device;

impl Device {
    /// Bytes of device memory in use by this process, or by all processes where the library does not
    /// tell them apart (as in a container); `None` without the library.
    pub fn nvml_bytes(&self) -> Option<u64> {
        let mut id = [0u8; 32];
        // SAFETY: as many bytes as are named; the driver ends them with a zero.
        let found = unsafe {
            let text = id.as_mut_ptr().cast();
            sys::cuDeviceGetPCIBusId(text, id.len() as i32, self.context.cu_device()).result()
        };
        found.ok()?;
        let id = std::ffi::CStr::from_bytes_until_nul(&id).ok()?.to_str().ok()?;
        let library = Nvml::init().ok()?;
        let device = library.device_by_pci_bus_id(id).ok()?;
        let processes = device.running_compute_processes().unwrap_or_default();
        let own = processes.iter().find(|p| p.pid == std::process::id());
        match own.map(|p| &p.used_gpu_memory) {
            Some(UsedGpuMemory::Used(bytes)) => Some(*bytes),
            _ => Some(device.memory_info().ok()?.used),
        }
    }
}
