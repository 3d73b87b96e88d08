//! Which GPU a stage computes on, and errors as stages report them.

use contract::{Fault, Reporter, StageError};
use model::{DeviceChoice, DtypeChoice};

use crate::{CudaError, Device, Dtype};

impl From<CudaError> for StageError {
    fn from(error: CudaError) -> Self {
        let fault = match &error {
            CudaError::Library { .. } | CudaError::Version { .. } => Fault::Environment,
            CudaError::Memory { .. } | CudaError::HostMemory { .. } => Fault::Memory,
            CudaError::Input(_) => Fault::Input,
            _ => Fault::Internal,
        };
        let plain = Self::new(fault, error.to_string());
        match error.help() {
            Some(help) => plain.help(help),
            None => plain,
        }
    }
}

/// The GPU that the params ask for, `None` for the CPU. Where a GPU would be taken and cannot be used
/// the reporter hears why.
///
/// # Errors
/// [`StageError`] where the params insist on what is not there.
pub fn open(
    device: DeviceChoice,
    dtype: DtypeChoice,
    reporter: &mut Reporter,
) -> Result<Option<Device>, StageError> {
    let (ordinal, insists) = match device {
        DeviceChoice::Cpu => return Ok(None),
        DeviceChoice::Auto => (0, false),
        DeviceChoice::Cuda(ordinal) => (ordinal, true),
    };
    let wanted = match dtype {
        DtypeChoice::F32 => Dtype::F32,
        DtypeChoice::F16 => Dtype::F16,
        DtypeChoice::Auto | DtypeChoice::Bf16 => Dtype::Bf16,
    };
    let gpu = match Device::open(ordinal, wanted) {
        Ok(gpu) => gpu,
        Err(error) if insists => return Err(error.into()),
        Err(CudaError::Library { library: "cuda" }) => {
            reporter.log("no NVIDIA driver: computing on the CPU");
            return Ok(None);
        }
        Err(error) => {
            let help = error.help().unwrap_or("`device: cuda` insists on it");
            reporter.warn(format!("no GPU is used: {error} ({help})"));
            return Ok(None);
        }
    };
    if wanted != Dtype::Bf16 || gpu.has_bf16() {
        return Ok(Some(gpu));
    }
    if dtype == DtypeChoice::Bf16 {
        return Err(StageError::input(format!("{} has no bf16", gpu.name()))
            .help("set `dtype: f16`, or `dtype: f32`, which is slower"));
    }
    Ok(Some(Device::open(ordinal, Dtype::F16)?))
}
