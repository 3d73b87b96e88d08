//! What can go wrong on a GPU.

use cudarc::cublaslt::result::CublasError;
use cudarc::driver::DriverError;

/// A GPU cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A library of the driver or the toolkit is missing or too old.
    #[error("{library} cannot be opened")]
    Library {
        /// Name without prefix and version, such as `cublasLt`.
        library: &'static str,
    },
    /// No memory left on the device.
    #[error("the GPU has no room for {wanted} bytes more ({free} are free)")]
    Memory {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes free.
        free: u64,
    },
    /// The driver refused.
    #[error("CUDA driver: {0}")]
    Driver(#[from] DriverError),
    /// cuBLASLt refused.
    #[error("cuBLASLt: {0:?}")]
    Blas(CublasError),
    /// A kernel does not compile: a defect of this program or a toolkit it does not know.
    #[error("NVRTC could not compile `{file}`: {log}")]
    Compile {
        /// Source file.
        file: &'static str,
        /// What the compiler said.
        log: String,
    },
    /// An input that does not fit.
    #[error("{0}")]
    Input(String),
}

impl From<CublasError> for CudaError {
    fn from(error: CublasError) -> Self {
        Self::Blas(error)
    }
}

impl CudaError {
    /// What the user can do about it.
    pub fn help(&self) -> Option<&'static str> {
        match self {
            Self::Library { library: "cuda" } => {
                Some("install NVIDIA's driver, or set `device: cpu`")
            }
            Self::Library { .. } => Some(
                "install the CUDA toolkit 12.4 or newer, or PyPI's nvidia-cublas and nvidia-cuda-nvrtc, \
                 and name their folder in LD_LIBRARY_PATH",
            ),
            Self::Memory { .. } => Some("lower `batch_size`, or set `activations: recompute`"),
            _ => None,
        }
    }
}
