//! Resources of the host, such as GPUs, shared by every run on it: one lock file a slot.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// One folder for all users: their runs share the devices. Not below `TMPDIR`, which differs.
const FOLDER: &str = "/tmp/pipe-slots";

/// A held slot; free again when dropped, also by a killed process.
#[derive(Debug)]
pub(super) struct Slot {
    _file: File,
}

/// Outcome of asking for a slot.
pub(super) enum Taken {
    /// It is ours.
    Mine(Slot),
    /// All are taken, the last of them by this process.
    By(String),
}

/// Asks once for a slot of a resource.
pub(super) fn take(resource: &str) -> io::Result<Taken> {
    take_in(&folder()?, resource, count(resource))
}

fn take_in(dir: &Path, resource: &str, count: usize) -> io::Result<Taken> {
    let mut holder = String::new();
    for index in 0..count {
        let mut file = open(&dir.join(format!("{resource}-{index}")))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                let this = crate::cache::this_process();
                // Only shown to those who wait.
                let _ = file.set_len(0).and_then(|()| file.write_all(this.as_bytes()));
                return Ok(Taken::Mine(Slot { _file: file }));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                if Read::by_ref(&mut file).take(200).read_to_string(&mut text).is_ok() {
                    holder = text.chars().filter(|c| !c.is_control()).collect();
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Taken::By(if holder.is_empty() { "another run".to_owned() } else { holder }))
}

/// Opens the lock file of a slot, whoever made it.
fn open(path: &Path) -> io::Result<File> {
    let open = || File::options().read(true).write(true).open(path);
    match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match File::options().read(true).write(true).create_new(true).open(path) {
                Ok(file) => {
                    file.set_permissions(fs::Permissions::from_mode(0o666))?;
                    Ok(file)
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open(),
                Err(error) => Err(error),
            }
        }
        other => other,
    }
}

/// One slot a GPU; one of anything else.
pub(super) fn count(resource: &str) -> usize {
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

/// The folder of all users, else one of this user alone.
fn folder() -> io::Result<PathBuf> {
    if let Some(dir) = shared(Path::new(FOLDER)) {
        return Ok(dir);
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty());
    let own = runtime.map_or_else(
        || std::env::temp_dir().join(format!("pipe-{}", rustix::process::getuid().as_raw())),
        |dir| PathBuf::from(dir).join("pipe"),
    );
    fs::create_dir_all(&own)?;
    Ok(own)
}

/// A folder in which everybody may make files and nobody remove those of others.
fn shared(dir: &Path) -> Option<PathBuf> {
    const OPEN: u32 = 0o1777;
    if fs::create_dir(dir).is_ok() {
        fs::set_permissions(dir, fs::Permissions::from_mode(OPEN)).ok()?;
    }
    let meta = fs::symlink_metadata(dir).ok()?;
    (meta.is_dir() && meta.mode() & 0o7777 == OPEN).then(|| dir.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn slots_run_out_and_whoever_waits_is_told_for_whom() {
        let dir = tempfile::tempdir().unwrap();
        let folder = shared(&dir.path().join("slots")).unwrap();
        let take = || take_in(&folder, "gpu", 2).unwrap();
        let (Taken::Mine(first), Taken::Mine(_second)) = (take(), take()) else {
            panic!("two slots")
        };
        let Taken::By(holder) = take() else { panic!("a third slot") };
        assert!(holder.contains(&format!("process {}", std::process::id())), "{holder}");
        drop(first);
        assert!(matches!(take(), Taken::Mine(_)));
        for slot in fs::read_dir(&folder).unwrap() {
            assert_eq!(slot.unwrap().metadata().unwrap().mode() & 0o777, 0o666);
        }
    }
}
