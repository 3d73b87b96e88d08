//! Leases: one process at a time works on a fingerprint, the others wait for its result.
//!
//! A lease only saves work. Losing one, or a clock or file system that lies, makes two processes
//! do the same work; publishing stays correct.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Cache, CacheError, durable};
use crate::digest::Fingerprint;

/// A live holder renews its lease this often.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// A lease not renewed for this long is up for takeover.
const EXPIRY: Duration = Duration::from_secs(60);

/// Who holds a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    host: String,
    boot: String,
    process: u32,
    /// Start time of the process in clock ticks since boot: tells a reused process number.
    started: u64,
    token: String,
}

/// A held lease; released when dropped.
#[derive(Debug)]
pub struct Lease {
    path: PathBuf,
    holder: Holder,
    stop: Option<Sender<()>>,
    heart: Option<JoinHandle<()>>,
}

/// Outcome of asking for a lease.
#[derive(Debug)]
pub enum Acquired {
    /// It is ours.
    Mine(Lease),
    /// Somebody else works on it: `host (process 123)`.
    Held(String),
}

impl Cache {
    /// Asks once for the lease of a fingerprint.
    ///
    /// # Errors
    /// [`CacheError`] when the disk refuses.
    pub fn lease(&self, fingerprint: Fingerprint) -> Result<Acquired, CacheError> {
        let path = self.root.join("leases").join(fingerprint.to_hex());
        let io = |e| CacheError::io("take", &path, e);
        let holder = Holder::this();
        let text = serde_json::to_vec(&holder).unwrap_or_default();
        for _ in 0..16 {
            let staged = durable::stage_bytes(&self.tmp_dir(), &text).map_err(io)?;
            durable::create_parent(&path).map_err(io)?;
            if durable::rename_exclusive(&staged, &path).map_err(io)? {
                return Ok(Acquired::Mine(Lease::beating(path, holder)));
            }
            let _ = fs::remove_file(&staged);
            match holder_of(&path) {
                Some((other, age)) if other.alive(age) => {
                    let Holder { host, process, .. } = other;
                    return Ok(Acquired::Held(format!("{host} (process {process})")));
                }
                // Gone meanwhile, or left behind: whoever moves it away first asks again.
                _ => {
                    let aside = self.tmp_dir().join(durable::unique_name());
                    if fs::rename(&path, &aside).is_ok() {
                        let _ = fs::remove_file(&aside);
                    }
                }
            }
        }
        Ok(Acquired::Held("another process".to_owned()))
    }
}

impl Lease {
    fn beating(path: PathBuf, holder: Holder) -> Self {
        let (stop, stopped) = channel();
        let beat = path.clone();
        let heart = std::thread::spawn(move || {
            while stopped.recv_timeout(HEARTBEAT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                let now = SystemTime::now();
                let _ =
                    fs::File::options().append(true).open(&beat).and_then(|f| f.set_modified(now));
            }
        });
        Self { path, holder, stop: Some(stop), heart: Some(heart) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(heart) = self.heart.take() {
            let _ = heart.join();
        }
        if holder_of(&self.path).is_some_and(|(holder, _)| holder == self.holder) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Holder {
    fn this() -> Self {
        let process = std::process::id();
        Self {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            boot: boot_id(),
            process,
            started: started(process).unwrap_or(0),
            token: durable::unique_name(),
        }
    }

    /// Whether the holder still works: certain on this host, by heartbeat elsewhere.
    fn alive(&self, age: Duration) -> bool {
        let this = rustix::system::uname().nodename().to_string_lossy() == self.host;
        if this && self.boot == boot_id() {
            return started(self.process) == Some(self.started);
        }
        if this && !self.boot.is_empty() {
            return false;
        }
        age < EXPIRY
    }
}

fn holder_of(path: &Path) -> Option<(Holder, Duration)> {
    let meta = fs::metadata(path).ok()?;
    let age = SystemTime::now().duration_since(meta.modified().ok()?).unwrap_or_default();
    Some((serde_json::from_slice(&fs::read(path).ok()?).ok()?, age))
}

fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// Field 22 of `/proc/PID/stat`, counted after the parenthesised name; none for a process that is
/// gone or a zombie.
fn started(process: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    if fields.first() == Some(&"Z") {
        return None;
    }
    fields.get(19)?.parse().ok()
}
