//! One GPU: memory, kernels and a stream of its own.

mod kernels;
mod memory;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;

use cudarc::cublaslt::sys as blas;
use cudarc::driver::{CudaContext, CudaStream, result, sys};

use crate::CudaError;
use crate::dtype::Dtype;
use crate::gemm::Plans;
use crate::profile::Profile;
use crate::versions;
pub(crate) use kernels::args;
pub use memory::Buffer;
use memory::Memory;

/// Scratch of cuBLASLt.
pub(crate) const WORKSPACE: u64 = 32 << 20;

/// One GPU.
pub struct Device {
    pub(crate) context: Arc<CudaContext>,
    pub(crate) stream: Arc<CudaStream>,
    pub(crate) dtype: Dtype,
    arch: String,
    /// Compute capability times ten.
    pub(crate) capability: u32,
    /// Macros HEAD_DIM and SOFTCAP of the attention kernels.
    pub(crate) head_dim: Cell<usize>,
    pub(crate) softcaps: Cell<bool>,
    /// Dynamic shared memory that each kernel has been allowed.
    allowed: RefCell<HashMap<&'static str, usize>>,
    modules: RefCell<HashMap<&'static str, sys::CUmodule>>,
    functions: RefCell<HashMap<&'static str, sys::CUfunction>>,
    pub(crate) blas: blas::cublasLtHandle_t,
    pub(crate) plans: Plans,
    /// Stream that work goes to now, and cuBLASLt's scratch for it.
    current: Cell<(sys::CUstream, u64)>,
    memory: Rc<Memory>,
    profile: Profile,
}

impl Device {
    /// Opens a GPU for work in `dtype`.
    ///
    /// # Errors
    /// [`CudaError::Library`] or [`CudaError::Version`] where driver, NVRTC or cuBLASLt are missing or
    /// too old.
    pub fn open(ordinal: usize, dtype: Dtype) -> Result<Self, CudaError> {
        Self::on(Self::find(ordinal)?, dtype)
    }

    /// A GPU that can be looked at; a [`Device`] on it stays for the life of the process.
    pub(crate) fn find(ordinal: usize) -> Result<Arc<CudaContext>, CudaError> {
        versions::check()?;
        Ok(CudaContext::new(ordinal)?)
    }

    /// Opens a GPU that was found.
    pub(crate) fn on(context: Arc<CudaContext>, dtype: Dtype) -> Result<Self, CudaError> {
        let stream = context.new_stream()?;
        let (major, minor) = context.compute_capability()?;
        let device = Self {
            // `a` allows the instructions of Hopper that later chips lack.
            arch: format!("sm_{major}{minor}{}", if (major, minor) == (9, 0) { "a" } else { "" }),
            capability: (major * 10 + minor) as u32,
            blas: cudarc::cublaslt::result::create_handle()?,
            context,
            stream,
            dtype,
            head_dim: Cell::new(64),
            softcaps: Cell::new(false),
            allowed: RefCell::default(),
            modules: RefCell::default(),
            functions: RefCell::default(),
            plans: Plans::default(),
            current: Cell::new((std::ptr::null_mut(), 0)),
            memory: Rc::default(),
            profile: Profile::default(),
        };
        // SAFETY: plain allocation, kept for the life of the process.
        let workspace = unsafe { result::malloc_sync(WORKSPACE as usize)? };
        device.current.set((device.stream.cu_stream(), workspace));
        device.memory.live.set(WORKSPACE);
        Ok(device)
    }

    /// The type that it works in.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Name and architecture, for provenance.
    pub fn name(&self) -> String {
        format!("{} ({})", self.context.name().unwrap_or_default(), self.arch)
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// [`CudaError::Driver`], also for a fault of earlier work.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        Ok(self.stream.synchronize()?)
    }

    /// Waits for all work of all streams, so that what it uses may be dropped.
    ///
    /// # Errors
    /// [`CudaError::Driver`], also for a fault of earlier work.
    pub fn drain(&self) -> Result<(), CudaError> {
        Ok(self.context.synchronize()?)
    }

    /// The stream that work goes to.
    pub(crate) fn cu_stream(&self) -> sys::CUstream {
        self.current.get().0
    }

    /// Scratch of cuBLASLt on that stream.
    pub(crate) fn workspace(&self) -> u64 {
        self.current.get().1
    }

    /// Enqueues `work` on another stream with scratch of its own.
    pub(crate) fn redirected(
        &self,
        stream: sys::CUstream,
        workspace: u64,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let before = self.current.replace((stream, workspace));
        let result = work();
        self.current.set(before);
        result
    }

    /// Starts timing launches by class.
    pub fn start_profile(&self) {
        self.profile.start();
    }

    pub(crate) fn is_profiling(&self) -> bool {
        self.profile.is_on()
    }

    /// Milliseconds and launches by class since [`Device::start_profile`].
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn finish_profile(&self) -> Result<BTreeMap<&'static str, (f64, usize)>, CudaError> {
        self.synchronize()?;
        self.profile.finish()
    }

    pub(crate) fn timed<R>(
        &self,
        class: &'static str,
        work: impl FnOnce() -> Result<R, CudaError>,
    ) -> Result<R, CudaError> {
        self.profile.span(class, self.cu_stream(), work)
    }
}
