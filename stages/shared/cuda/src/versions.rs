//! Whether driver and libraries are of versions that work together.

use cudarc::{cublaslt::sys as blas, driver::sys, nvrtc::sys as nvrtc};

use crate::CudaError;

/// Oldest CUDA that this program is made for.
const OLDEST: (i32, i32) = (12, 4);

/// Looks for the libraries and at their versions: all 12.4 or newer, and NVRTC's machine code and
/// cuBLASLt of no later major version than the driver's.
pub(crate) fn check() -> Result<(), CudaError> {
    // SAFETY: only looks for libraries.
    unsafe {
        for (library, present) in [
            ("cuda", sys::is_culib_present()),
            ("nvrtc", nvrtc::is_culib_present()),
            ("cublasLt", blas::is_culib_present()),
        ] {
            if !present {
                return Err(CudaError::Library { library });
            }
        }
    }
    let (mut driver, mut compiler) = (0, (0, 0));
    // SAFETY: integers to write to; none of the calls needs a context.
    let products = unsafe {
        sys::cuDriverGetVersion(&raw mut driver).result()?;
        // A failure leaves zeros, which are too old.
        let _ = nvrtc::nvrtcVersion(&raw mut compiler.0, &raw mut compiler.1);
        blas::cublasLtGetVersion() as i32
    };
    judge([
        ("cuda", (driver / 1000, driver % 1000 / 10)),
        ("nvrtc", compiler),
        // 12.4.5 is 120405.
        ("cublasLt", (products / 10_000, products / 100 % 100)),
    ])
}

/// Judges `(library, (major, minor))`, the driver first.
fn judge(found: [(&'static str, (i32, i32)); 3]) -> Result<(), CudaError> {
    let (_, driver) = found[0];
    for (library, version) in found {
        let wanted = if version < OLDEST {
            format!("{}.{} or newer", OLDEST.0, OLDEST.1)
        } else if version.0 > driver.0 {
            format!("{}.x, which the driver knows,", driver.0)
        } else {
            continue;
        };
        let found = format!("{}.{}", version.0, version.1);
        return Err(CudaError::Version { library, found, wanted });
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn libraries_go_with_a_driver_of_their_major_version() {
        let judged = |driver, compiler, products| {
            judge([("cuda", driver), ("nvrtc", compiler), ("cublasLt", products)])
                .map_err(|e| e.to_string())
        };
        judged((13, 0), (13, 2), (13, 1)).unwrap();
        judged((12, 4), (12, 8), (12, 4)).unwrap();
        judged((13, 0), (12, 4), (12, 9)).unwrap();
        let old = judged((12, 2), (12, 4), (12, 4)).unwrap_err();
        assert_eq!(old, "cuda is of CUDA 12.2: 12.4 or newer is needed");
        let ahead = judged((12, 4), (13, 0), (12, 4)).unwrap_err();
        assert_eq!(ahead, "nvrtc is of CUDA 13.0: 12.x, which the driver knows, is needed");
    }
}
