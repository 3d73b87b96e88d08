//! GPUs of the host, shared by every run on it: one lock file each.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{FlockOperation, flock};

/// What NVIDIA's driver says of each GPU, in a folder named by its place on the bus.
const DRIVER: &str = "/proc/driver/nvidia/gpus";
/// One folder for all users: their runs share the devices. Not below `TMPDIR`, which differs.
const FOLDER: &str = "/tmp/pipe-slots";

/// A held slot; free again when dropped, also by a killed process.
#[derive(Debug)]
pub(super) struct Slot {
    /// The GPU, as `CUDA_VISIBLE_DEVICES` names it.
    pub(super) gpu: String,
    _file: File,
}

/// Outcome of asking for a slot.
pub(super) enum Taken {
    /// It is ours.
    Mine(Slot),
    /// All are taken, the last of them by this process.
    By(String),
}

/// GPUs that a stage asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// How many, whichever they are: resource `gpu`.
    pub(super) any: usize,
    /// Those of certain numbers: resources `gpu:N`.
    pub(super) numbers: Vec<usize>,
}

impl Wanted {
    pub(super) fn of(resources: &BTreeMap<String, u32>) -> Self {
        let numbers = resources.keys().filter_map(|name| name.strip_prefix("gpu:")?.parse().ok());
        Self {
            any: resources.get("gpu").copied().unwrap_or(0) as usize,
            numbers: numbers.collect(),
        }
    }

    /// How many at once.
    pub(super) fn count(&self) -> usize {
        self.any + self.numbers.len()
    }
}

/// Asks once for the slot of one of `gpus`.
pub(super) fn take(gpus: &[String]) -> io::Result<Taken> {
    static DEVICES: OnceLock<Vec<String>> = OnceLock::new();
    take_in(&folder()?, gpus, DEVICES.get_or_init(|| device_ids(Path::new(DRIVER))))
}

fn take_in(dir: &Path, gpus: &[String], devices: &[String]) -> io::Result<Taken> {
    let mut holder = String::new();
    for gpu in gpus {
        let mut file = open(&dir.join(lock_name(gpu, devices)))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                let this = crate::cache::this_process();
                // Only shown to those who wait.
                let _ = file.set_len(0).and_then(|()| file.write_all(this.as_bytes()));
                return Ok(Taken::Mine(Slot { gpu: gpu.clone(), _file: file }));
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

/// The lock file of a GPU: one name, whether it is called by its number or by (the beginning of) its
/// UUID. What is neither, a part of a GPU for example, has its own.
fn lock_name(gpu: &str, devices: &[String]) -> String {
    let mut called = devices.iter().enumerate().filter(|(_, id)| id.starts_with(gpu));
    let name = match (called.next(), called.next()) {
        (Some((number, _)), None) if gpu.starts_with("GPU-") => number.to_string(),
        _ => gpu.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', "_"),
    };
    format!("gpu-{name}")
}

/// UUIDs of the GPUs, in the order of the bus, by which they are numbered.
fn device_ids(driver: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(driver) else { return Vec::new() };
    let mut folders: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    folders.sort();
    let id = |folder: &PathBuf| {
        let text = fs::read_to_string(folder.join("information")).unwrap_or_default();
        let id = text.lines().find_map(|line| line.strip_prefix("GPU UUID:"));
        id.unwrap_or_default().trim().to_owned()
    };
    folders.iter().map(id).collect()
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

/// The GPUs that a run may use, as `CUDA_VISIBLE_DEVICES` names them: those of that variable, else
/// all there are, and one where none can be told.
pub(super) fn gpus() -> &'static [String] {
    static GPUS: OnceLock<Vec<String>> = OnceLock::new();
    GPUS.get_or_init(|| match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(names) => visible(&names),
        Err(_) => (0..devices().max(1)).map(|number| number.to_string()).collect(),
    })
}

/// CUDA ignores what comes after a name that is none.
fn visible(names: &str) -> Vec<String> {
    let names = names.split(',').map(str::trim);
    names.take_while(|name| !name.is_empty() && *name != "-1").map(str::to_owned).collect()
}

fn devices() -> usize {
    let device = |name: &str| {
        name.strip_prefix("nvidia")
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    let entries = fs::read_dir("/dev").map(|entries| {
        entries.flatten().filter(|e| e.file_name().to_str().is_some_and(device)).count()
    });
    entries.unwrap_or(0)
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
        let gpus = visible("3, GPU-5c/x,,7");
        assert_eq!(gpus, ["3", "GPU-5c/x"]);
        let take = || take_in(&folder, &gpus, &[]).unwrap();
        let (Taken::Mine(first), Taken::Mine(second)) = (take(), take()) else {
            panic!("two slots")
        };
        assert_eq!((first.gpu.as_str(), second.gpu.as_str()), ("3", "GPU-5c/x"));
        let Taken::By(holder) = take() else { panic!("a third slot") };
        assert!(holder.contains(&format!("process {}", std::process::id())), "{holder}");
        drop(first);
        assert!(matches!(take(), Taken::Mine(_)));
        for slot in fs::read_dir(&folder).unwrap() {
            assert_eq!(slot.unwrap().metadata().unwrap().mode() & 0o777, 0o666);
        }
    }

    #[test]
    fn asked_for_by_count_or_by_number() {
        let resources = [("cpu", 1), ("gpu", 2), ("gpu:3", 1)].map(|(n, c)| (n.to_owned(), c));
        let wanted = Wanted::of(&resources.into());
        assert_eq!(wanted, Wanted { any: 2, numbers: vec![3] });
        assert!(visible("").is_empty() && visible("-1").is_empty());
    }

    #[test]
    fn gpu_has_one_slot_by_whichever_name_it_is_called() {
        let dir = tempfile::tempdir().unwrap();
        for (bus, id) in [("0000:41:00.0", "GPU-7a11"), ("0000:01:00.0", "GPU-5c22")] {
            let folder = dir.path().join("gpus").join(bus);
            fs::create_dir_all(&folder).unwrap();
            let text = format!("Model: \t NVIDIA\nGPU UUID: \t {id}\nDevice Minor: \t 0\n");
            fs::write(folder.join("information"), text).unwrap();
        }
        let devices = device_ids(&dir.path().join("gpus"));
        assert_eq!(devices, ["GPU-5c22", "GPU-7a11"]);
        let name = |gpu| lock_name(gpu, &devices);
        assert_eq!([name("1"), name("GPU-7a11"), name("GPU-7")], ["gpu-1"; 3]);
        assert_eq!(name("GPU-"), "gpu-GPU-", "which of the two cannot be told");
        assert_eq!(name("MIG-7a11"), "gpu-MIG-7a11");
        assert_eq!(lock_name("GPU-7a11", &[]), "gpu-GPU-7a11");
        let folder = shared(&dir.path().join("slots")).unwrap();
        let take = |gpu: &str| take_in(&folder, &[gpu.to_owned()], &devices).unwrap();
        let Taken::Mine(slot) = take("GPU-5c") else { panic!("it is free") };
        assert_eq!(slot.gpu, "GPU-5c");
        assert!(matches!(take("0"), Taken::By(_)));
    }
}
