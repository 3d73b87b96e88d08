//! Resources of the host, such as GPUs, shared by every run on it: one lock file a slot.

use std::fs::{self, File};
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

/// A held slot; free again when dropped, also by a killed process.
#[derive(Debug)]
pub(super) struct Slot {
    _file: File,
}

/// Tries to take one slot of a resource. `Ok(None)` where all are taken.
pub(super) fn take(resource: &str) -> std::io::Result<Option<Slot>> {
    let dir = folder();
    fs::create_dir_all(&dir)?;
    for index in 0..count(resource) {
        let path = dir.join(format!("{resource}-{index}"));
        let file = File::options().create(true).append(true).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(Slot { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// One slot a GPU; one of anything else.
fn count(resource: &str) -> usize {
    if resource != "gpu" {
        return 1;
    }
    let device = |name: &str| {
        name.strip_prefix("nvidia")
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    let devices = fs::read_dir("/dev").map(|entries| {
        entries.flatten().filter(|e| e.file_name().to_str().is_some_and(device)).count()
    });
    devices.unwrap_or(0).max(1)
}

/// Local to the host and, where the system offers it, to the user.
fn folder() -> PathBuf {
    if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        return PathBuf::from(dir).join("pipe");
    }
    let user = rustix::process::getuid().as_raw();
    std::env::temp_dir().join(format!("pipe-{user}"))
}
