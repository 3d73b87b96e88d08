//! Kernel sources to machine code through NVRTC, kept on disk by content.

use std::ffi::CString;
use std::path::PathBuf;

use cudarc::nvrtc::{result, sys};

use crate::CudaError;

/// Machine code of `source` for `arch` (such as `sm_90`), compiled or taken from the user's cache.
pub(crate) fn cubin(
    file: &'static str,
    source: &str,
    arch: &str,
    defines: &[String],
) -> Result<Vec<u8>, CudaError> {
    let mut version = (0, 0);
    // SAFETY: two integers to write to.
    let status = unsafe { sys::nvrtcVersion(&raw mut version.0, &raw mut version.1) };
    status.result().map_err(|e| compile_error(file, format!("{e:?}")))?;
    let key = format!("{arch} {version:?} {defines:?}\n{source}");
    let path = folder().map(|f| f.join(format!("{}.cubin", blake3::hash(key.as_bytes()))));
    if let Some(code) = path.as_ref().and_then(|p| std::fs::read(p).ok()).and_then(opened) {
        return Ok(code);
    }
    let code = compile(file, source, arch, defines)?;
    if let Some(path) = path {
        keep(&path, &sealed(&code));
    }
    Ok(code)
}

/// Folder of compiled kernels: `$XDG_CACHE_HOME/pipe/kernels`, or under `~/.cache`.
fn folder() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache")))?;
    Some(base.join("pipe/kernels"))
}

/// A file of the cache: machine code, then its digest. The driver is not told where the code ends, and
/// after a power cut a file may be empty or end early.
fn sealed(code: &[u8]) -> Vec<u8> {
    [code, blake3::hash(code).as_bytes()].concat()
}

/// The code of such a file; `None` where it is damaged, or of a version that wrote no digest.
fn opened(mut file: Vec<u8>) -> Option<Vec<u8>> {
    let (code, digest) = file.split_last_chunk::<{ blake3::OUT_LEN }>()?;
    if blake3::hash(code) != *digest {
        return None;
    }
    file.truncate(file.len() - blake3::OUT_LEN);
    Some(file)
}

/// Best effort: without a cache the next process compiles again.
fn keep(path: &std::path::Path, code: &[u8]) {
    let draft = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&draft, code))
        .and_then(|()| std::fs::rename(&draft, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&draft);
    }
}

fn compile_error(file: &'static str, log: String) -> CudaError {
    CudaError::Compile { file, log }
}

fn compile(
    file: &'static str,
    source: &str,
    arch: &str,
    defines: &[String],
) -> Result<Vec<u8>, CudaError> {
    let wrong = |e: result::NvrtcError| compile_error(file, format!("{e:?}"));
    let source = CString::new(source).map_err(|e| compile_error(file, e.to_string()))?;
    let name = CString::new(file).map_err(|e| compile_error(file, e.to_string()))?;
    let program = result::create_program(&source, Some(&name)).map_err(wrong)?;
    let mut options = vec![
        format!("--gpu-architecture={arch}"),
        "--std=c++17".to_owned(),
        "-default-device".to_owned(),
    ];
    options.extend(defines.iter().cloned());
    // SAFETY: the program was created above and is destroyed below, once.
    unsafe {
        let compiled = result::compile_program(program, &options);
        let code = compiled.and_then(|()| {
            let mut size = 0;
            sys::nvrtcGetCUBINSize(program, &raw mut size).result()?;
            let mut code = vec![0u8; size];
            sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result()?;
            Ok(code)
        });
        let code = code.map_err(|e| {
            let log = result::get_program_log(program).unwrap_or_default();
            let text: Vec<u8> = log.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
            compile_error(file, format!("{e:?}: {}", String::from_utf8_lossy(&text)))
        });
        let _ = result::destroy_program(program);
        code
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_machine_code_is_compiled_again() {
        let code = b"\x7fELF and more".to_vec();
        let file = sealed(&code);
        assert_eq!(opened(file.clone()), Some(code.clone()));
        assert_eq!(opened(Vec::new()), None);
        assert_eq!(opened(file[..file.len() - 1].to_vec()), None);
        assert_eq!(opened(vec![0; file.len()]), None);
        // Without a digest, as older versions wrote it.
        assert_eq!(opened([&code[..], &[1; 64]].concat()), None);
    }
}
