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
    /// No memory left on the host that the device could read.
    #[error("the host has no room for {wanted} bytes of pinned memory")]
    HostMemory {
        /// Bytes asked for.
        wanted: u64,
    },
    /// A library that this program is too new for, or too old.
    #[error("{library} is of CUDA {found}: {wanted} is needed")]
    Version {
        /// As in [`CudaError::Library`].
        library: &'static str,
        /// `major.minor` of what is there.
        found: String,
        /// What would do.
        wanted: String,
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
            Self::Version { library: "cuda", .. } => {
                Some("update NVIDIA's driver, or set `device: cpu`")
            }
            Self::Version { .. } => Some(
                "install the toolkit of the driver's CUDA version or older, or PyPI's nvidia-cublas and \
                 nvidia-cuda-nvrtc (for CUDA 12: nvidia-cublas-cu12 and nvidia-cuda-nvrtc-cu12), and \
                 name their folder in LD_LIBRARY_PATH",
            ),
            Self::HostMemory { .. } => {
                Some("set `activations: recompute`, or free memory of the host")
            }
            Self::Memory { .. } => Some("lower `batch_size`, or set `activations: recompute`"),
            _ => None,
        }
    }
}
