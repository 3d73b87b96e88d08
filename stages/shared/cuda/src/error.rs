//! What can go wrong on a GPU.

use cudarc::cublaslt::{result::CublasError, sys::cublasStatus_t};
use cudarc::driver::{DriverError, sys::CUresult};

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
    #[error("the GPU has no room for {what}")]
    Memory {
        /// What was to lie there.
        what: String,
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
    Driver(#[source] DriverError),
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

impl From<DriverError> for CudaError {
    fn from(error: DriverError) -> Self {
        if error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            // Kernels are loaded when they are first used, and recorded launches are uploaded.
            return Self::Memory { what: "the driver's kernels, streams and graphs".to_owned() };
        }
        Self::Driver(error)
    }
}

impl From<CublasError> for CudaError {
    fn from(error: CublasError) -> Self {
        if error.0 == cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED {
            return Self::Memory { what: "what cuBLASLt needs".to_owned() };
        }
        Self::Blas(error)
    }
}

impl CudaError {
    /// Whether memory is short, so that less work at once may do.
    pub fn is_memory(&self) -> bool {
        matches!(self, Self::Memory { .. } | Self::HostMemory { .. })
    }

    /// What the user can do about it.
    pub fn help(&self) -> Option<&'static str> {
        match self {
            Self::Library { library: "cuda" } => {
                Some("install NVIDIA's driver, or set `device: cpu`")
            }
            Self::Library { .. } => Some(
                "install the CUDA toolkit 12.4 or newer, or PyPI's nvidia-cublas and nvidia-cuda-nvrtc \
                 with their folder in LD_LIBRARY_PATH, or set `device: cpu`",
            ),
            Self::Version { library: "cuda", .. } => {
                Some("update NVIDIA's driver, or set `device: cpu`")
            }
            Self::Version { .. } => Some(
                "install the toolkit of the driver's CUDA version or older, or PyPI's nvidia-cublas and \
                 nvidia-cuda-nvrtc (for CUDA 12: nvidia-cublas-cu12 and nvidia-cuda-nvrtc-cu12) \
                 with their folder in LD_LIBRARY_PATH, or set `device: cpu`",
            ),
            // Weights may be what does not fit, and stages try less work at once by themselves.
            Self::HostMemory { .. } => Some("free memory of the host"),
            Self::Memory { .. } => Some("free memory of the GPU, or use one that has more"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_lacks_memory_says_so() {
        let driver = |status| CudaError::from(DriverError(status));
        assert!(driver(CUresult::CUDA_ERROR_OUT_OF_MEMORY).is_memory());
        assert!(matches!(driver(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS), CudaError::Driver(_)));
        let blas = |status| CudaError::from(CublasError(status));
        assert!(blas(cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED).is_memory());
        assert!(!blas(cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED).is_memory());
        let host = CudaError::HostMemory { wanted: 1 };
        assert!(host.is_memory());
        for (error, whose) in [(driver(CUresult::CUDA_ERROR_OUT_OF_MEMORY), "GPU"), (host, "host")]
        {
            let help = error.help().unwrap_or_default();
            assert!(help.starts_with(&format!("free memory of the {whose}")), "{help}");
        }
    }
}
