//! The kernels of a device: compiled when they are first used, launched by name.

use std::ffi::{CString, c_void};

use cudarc::driver::{result, sys};

use super::Device;
use crate::CudaError;
use crate::compile;
use crate::dtype::Dtype;

const SOURCES: [(&str, &str); 6] = [
    ("layer.cu", include_str!("../../kernels/layer.cu")),
    ("nf4.cu", include_str!("../../kernels/nf4.cu")),
    ("generate.cu", include_str!("../../kernels/generate.cu")),
    ("loss.cu", include_str!("../../kernels/loss.cu")),
    ("optimizer.cu", include_str!("../../kernels/optimizer.cu")),
    ("attention_reference.cu", include_str!("../../kernels/attention_reference.cu")),
];
const COMMON: &str = include_str!("../../kernels/common.cuh");
const ATTENTION: [(&str, &str); 2] = [
    ("attention_forward.cu", include_str!("../../kernels/attention/attention_forward.cu")),
    ("attention_backward.cu", include_str!("../../kernels/attention/attention_backward.cu")),
];
const ATTENTION_COMMON: &str = include_str!("../../kernels/attention/attention_common.cuh");
const ATTENTION_PARTS: [(&str, &str); 2] = [
    ("attention_mma.cuh", include_str!("../../kernels/attention/attention_mma.cuh")),
    ("attention_wgmma.cuh", include_str!("../../kernels/attention/attention_wgmma.cuh")),
];
impl Device {
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
