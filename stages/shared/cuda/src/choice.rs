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

/// The GPU that the params ask for, `None` for the CPU. Where `auto` finds none the reporter hears why.
///
/// # Errors
/// [`StageError`] where the params insist on what is not there, and where the host shows a GPU that
/// lacks only software.
pub fn open(
    device: DeviceChoice,
    dtype: DtypeChoice,
    reporter: &mut Reporter,
) -> Result<Option<Device>, StageError> {
    let (ordinal, insists) = match device {
        DeviceChoice::Cpu => return Ok(None),
        DeviceChoice::Auto if model::hides_gpus() => {
            reporter.log("CUDA_VISIBLE_DEVICES hides all GPUs: computing on the CPU");
            return Ok(None);
        }
        DeviceChoice::Auto => (0, false),
        // Any that is free is the only one that a stage sees.
        DeviceChoice::Cuda(ordinal) => (ordinal.unwrap_or(0), true),
    };
    match open_in(ordinal, dtype) {
        Ok(gpu) => gpu.map(Some),
        Err(error) if insists => Err(error.into()),
        Err(error) => fall_back(error, model::sees_gpu(), reporter).map(|()| None),
    }
}

/// Leaves `auto` to the CPU, unless the host shows a GPU and somebody can install what it lacks: the
/// stage has taken a GPU then and no other stage that computes is kept waiting, so that all points of a
/// sweep would crowd the CPU at once.
fn fall_back(error: CudaError, sees_gpu: bool, reporter: &mut Reporter) -> Result<(), StageError> {
    match error {
        // A container that shows devices and has no driver was not meant to use them.
        CudaError::Library { library: "cuda" } => {
            reporter.log("no NVIDIA driver: computing on the CPU");
        }
        CudaError::Library { .. } | CudaError::Version { .. } if sees_gpu => {
            let message = format!("the GPU of this host cannot be used: {error}");
            return Err(StageError { message, ..StageError::from(error) });
        }
        error => {
            let help = error.help().unwrap_or("`device: cuda` insists on it");
            reporter.warn(format!("no GPU is used: {error} ({help})"));
        }
    }
    Ok(())
}

/// The GPU in the type asked for. The inner error is a choice that this GPU does not have.
fn open_in(ordinal: usize, choice: DtypeChoice) -> Result<Result<Device, StageError>, CudaError> {
    let context = Device::find(ordinal)?;
    let (major, _) = context.compute_capability()?;
    let Some(dtype) = dtype_on(major, choice) else {
        let name = context.name().unwrap_or_default();
        return Ok(Err(StageError::input(format!("{name} has no bf16"))
            .help("set `dtype: f16`, or `dtype: f32`, which is slower")));
    };
    Device::on(context, dtype).map(Ok)
}

/// The type on a GPU of that major compute capability; `None` where it lacks the one asked for.
fn dtype_on(major: i32, choice: DtypeChoice) -> Option<Dtype> {
    let has_bf16 = major >= 8;
    match choice {
        DtypeChoice::F32 => Some(Dtype::F32),
        DtypeChoice::F16 => Some(Dtype::F16),
        DtypeChoice::Auto => Some(if has_bf16 { Dtype::Bf16 } else { Dtype::F16 }),
        DtypeChoice::Bf16 => has_bf16.then_some(Dtype::Bf16),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn auto_computes_on_the_cpu_unless_a_gpu_lacks_software() {
        let falls_back = |error, sees_gpu| fall_back(error, sees_gpu, &mut Reporter::silent());
        let version = || {
            let (found, wanted) = ("12.2".to_owned(), "12.4 or newer".to_owned());
            CudaError::Version { library: "cuda", found, wanted }
        };
        // Not one of the driver, which alone knows the names of its errors.
        let other = CudaError::Input("no device".to_owned());
        for error in [CudaError::Library { library: "nvrtc" }, version()] {
            let fault = falls_back(error, true).unwrap_err();
            assert!(fault.message.starts_with("the GPU of this host cannot be used"), "{fault}");
            assert!(fault.help.unwrap().ends_with("or set `device: cpu`"));
        }
        falls_back(CudaError::Library { library: "nvrtc" }, false).unwrap();
        falls_back(version(), false).unwrap();
        falls_back(CudaError::Library { library: "cuda" }, true).unwrap();
        falls_back(other, true).unwrap();
    }

    #[test]
    fn cards_before_ampere_work_in_f16_unless_asked_otherwise() {
        assert_eq!(dtype_on(7, DtypeChoice::Auto), Some(Dtype::F16));
        assert_eq!(dtype_on(7, DtypeChoice::Bf16), None);
        assert_eq!(dtype_on(7, DtypeChoice::F32), Some(Dtype::F32));
        assert_eq!(dtype_on(8, DtypeChoice::Auto), Some(Dtype::Bf16));
        assert_eq!(dtype_on(9, DtypeChoice::Bf16), Some(Dtype::Bf16));
        assert_eq!(dtype_on(9, DtypeChoice::F16), Some(Dtype::F16));
    }
}
