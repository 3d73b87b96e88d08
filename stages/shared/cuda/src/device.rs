//! One GPU: memory, kernels and a stream of its own.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_void};
use std::rc::Rc;
use std::sync::Arc;

use cudarc::cublaslt::sys as blas;
use cudarc::driver::{CudaContext, CudaStream, result, sys};

use crate::CudaError;
use crate::compile;
use crate::dtype::Dtype;
use crate::gemm::Plans;
use crate::profile::Profile;
use crate::versions;

const SOURCES: [(&str, &str); 6] = [
    ("layer.cu", include_str!("../kernels/layer.cu")),
    ("nf4.cu", include_str!("../kernels/nf4.cu")),
    ("generate.cu", include_str!("../kernels/generate.cu")),
    ("loss.cu", include_str!("../kernels/loss.cu")),
    ("optimizer.cu", include_str!("../kernels/optimizer.cu")),
    ("attention_reference.cu", include_str!("../kernels/attention_reference.cu")),
];
const COMMON: &str = include_str!("../kernels/common.cuh");
const ATTENTION: [(&str, &str); 2] = [
    ("attention_forward.cu", include_str!("../kernels/attention/attention_forward.cu")),
    ("attention_backward.cu", include_str!("../kernels/attention/attention_backward.cu")),
];
const ATTENTION_COMMON: &str = include_str!("../kernels/attention/attention_common.cuh");
const ATTENTION_PARTS: [(&str, &str); 2] = [
    ("attention_mma.cuh", include_str!("../kernels/attention/attention_mma.cuh")),
    ("attention_wgmma.cuh", include_str!("../kernels/attention/attention_wgmma.cuh")),
];
/// Bytes to leave beside our buffers: the driver loads kernels of ours and of cuBLASLt when they are
/// first used, and recorded launches lie on the device.
const RESERVE: u64 = 384 << 20;
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

/// Live and peak bytes of all buffers: the notion of torch's `max_memory_allocated`.
#[derive(Default)]
struct Memory {
    live: Cell<u64>,
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

    /// Four integers that a kernel's file says of itself under `name`.
    pub(crate) fn facts(
        &self,
        file: &'static str,
        name: &'static str,
    ) -> Result<[i32; 4], CudaError> {
        let symbol = CString::new(name).map_err(|e| CudaError::Input(e.to_string()))?;
        // SAFETY: the module stays loaded, and the constant is an array of four.
        let (ptr, _) = unsafe { result::module::get_global(self.module(file)?, symbol)? };
        let mut facts = [0i32; 4];
        // SAFETY: as above; synchronised before the array is read.
        unsafe { result::memcpy_dtoh_async(&mut facts, ptr, self.stream.cu_stream())? };
        self.stream.synchronize()?;
        Ok(facts)
    }

    /// Name and architecture, for provenance.
    pub fn name(&self) -> String {
        format!("{} ({})", self.context.name().unwrap_or_default(), self.arch)
    }

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

    fn module(&self, file: &'static str) -> Result<sys::CUmodule, CudaError> {
        if let Some(module) = self.modules.borrow().get(file) {
            return Ok(*module);
        }
        let find = |list: &[(&str, &'static str)]| {
            list.iter().find(|(name, _)| *name == file).map(|(_, text)| *text)
        };
        let (source, defines) = match find(&ATTENTION) {
            Some(text) => {
                let mut common = ATTENTION_COMMON.to_owned();
                for (name, part) in ATTENTION_PARTS {
                    common = common.replace(&format!("#include \"{name}\""), part);
                }
                let defines = vec![
                    format!("-DHEAD_DIM={}", self.head_dim.get()),
                    format!("-DSOFTCAP={}", u32::from(self.softcaps.get())),
                    format!("-DF16={}", u32::from(self.dtype == Dtype::F16)),
                ];
                (format!("{common}\n#line 1\n{text}"), defines)
            }
            None => {
                let text = find(&SOURCES).unwrap_or_default();
                let defines = vec![format!("-DELEMENT={}", self.dtype.element())];
                (format!("{COMMON}\n#line 1\n{text}"), defines)
            }
        };
        let code = compile::cubin(file, &source, &self.arch, &defines)?;
        // SAFETY: machine code for this device; modules live as long as the process.
        let module = unsafe { result::module::load_data(code.as_ptr().cast())? };
        self.modules.borrow_mut().insert(file, module);
        Ok(module)
    }

    fn function(
        &self,
        file: &'static str,
        name: &'static str,
    ) -> Result<sys::CUfunction, CudaError> {
        if let Some(function) = self.functions.borrow().get(name) {
            return Ok(*function);
        }
        let symbol = CString::new(name).map_err(|e| CudaError::Input(e.to_string()))?;
        // SAFETY: the module is loaded and stays.
        let function = unsafe { result::module::get_function(self.module(file)?, symbol)? };
        self.functions.borrow_mut().insert(name, function);
        Ok(function)
    }

    /// More than 48 KiB of dynamic shared memory must be asked for.
    fn allow_shared(
        &self,
        name: &'static str,
        function: sys::CUfunction,
        bytes: usize,
    ) -> Result<(), CudaError> {
        let mut allowed = self.allowed.borrow_mut();
        let most = allowed.entry(name).or_insert(48 << 10);
        if bytes > *most {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a loaded function.
            unsafe {
                result::function::set_function_attribute(function, attribute, bytes as i32)?;
            }
            *most = bytes;
        }
        Ok(())
    }

    /// Launches a kernel; `args` point to its arguments in order.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and what they point to large enough.
    pub(crate) unsafe fn launch(
        &self,
        (file, name): (&'static str, &'static str),
        grid: [usize; 2],
        block: usize,
        shared: usize,
        args: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        if grid[0] == 0 || grid[1] == 0 {
            return Ok(());
        }
        let function = self.function(file, name)?;
        self.allow_shared(name, function, shared)?;
        let grid = (grid[0] as u32, grid[1] as u32, 1);
        let stream = self.cu_stream();
        self.timed(name, || {
            // SAFETY: the caller's promise.
            unsafe {
                result::launch_kernel(
                    function,
                    grid,
                    (block as u32, 1, 1),
                    shared as u32,
                    stream,
                    args,
                )?;
            }
            Ok(())
        })
    }
}

/// Pointers to arguments, for [`Device::launch`].
macro_rules! args {
    ($($arg:expr),* $(,)?) => {
        &mut [$((&raw const $arg).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(crate) use args;
