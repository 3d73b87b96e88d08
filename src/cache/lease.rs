//! Leases: one process at a time works on a fingerprint, the others wait for its result.
//!
//! A lease only saves work. Losing one, or a clock or file system that lies, makes two processes
//! do the same work; publishing stays correct.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, getuid, test_kill_process};
use serde::{Deserialize, Serialize};

use super::{Cache, CacheError, access, durable};
use crate::digest::Fingerprint;

/// A live holder renews its lease this often.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// A lease on another host that is not seen to be renewed for this long is up for takeover.
const EXPIRY: Duration = Duration::from_secs(60);
/// Nobody waits to see whether one this old is renewed: no clocks differ so much.
const LONG_DEAD: Duration = Duration::from_secs(24 * 3600);

/// Who holds a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    /// Only shown.
    #[serde(default)]
    user: String,
    host: String,
    /// `/etc/machine-id`: hosts that share a name differ in it. Empty where it is not known.
    #[serde(default)]
    machine: String,
    boot: String,
    /// Namespace that the process number belongs to; containers of one host have their own.
    #[serde(default)]
    processes: String,
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
    /// Somebody else works on it: `anna on host (process 123)`.
    Held(String),
}

/// When this process first saw the heartbeats of leases on other hosts. Clocks of hosts differ, and
/// whether a heart beats can be seen without them.
#[derive(Debug, Default)]
pub(super) struct Watched(Mutex<HashMap<String, (SystemTime, Instant)>>);

impl Watched {
    /// Whether a lease has been renewed within [`EXPIRY`] as far as can be known.
    pub(super) fn beats(&self, token: &str, beat: SystemTime, now: Instant) -> bool {
        if SystemTime::now().duration_since(beat).is_ok_and(|age| age > LONG_DEAD) {
            return false;
        }
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, since) = seen.entry(token.to_owned()).or_insert((beat, now));
        if *last != beat {
            (*last, *since) = (beat, now);
        }
        now.duration_since(*since) < EXPIRY
    }
}

/// What lies where a lease is looked for.
enum Found {
    Nothing,
    /// A lease, and when it was last renewed.
    Held(Holder, SystemTime),
    /// A lease that this user may not read: whose it is, and when it was last renewed.
    Hidden {
        owner: String,
        token: String,
        beat: SystemTime,
    },
    /// Something else.
    Litter,
}

impl Found {
    fn at(path: &Path) -> Self {
        let read = || {
            // What an opened file says is what the server of a network file system says.
            let mut file = fs::File::open(path)?;
            let mut text = Vec::new();
            file.read_to_end(&mut text)?;
            Ok::<_, io::Error>((text, file.metadata()?.modified()?))
        };
        match durable::again(read) {
            Ok((text, beat)) => match serde_json::from_slice(&text) {
                Ok(holder) => Self::Held(holder, beat),
                Err(_) => Self::Litter,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::Nothing,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Self::hidden(path),
            Err(_) => Self::Litter,
        }
    }

    fn hidden(path: &Path) -> Self {
        let Ok(meta) = fs::symlink_metadata(path) else { return Self::Nothing };
        let beat = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let token = format!("{}:{}:{beat:?}", meta.dev(), meta.ino());
        Self::Hidden { owner: access::owner(&meta), token, beat }
    }

    fn token(&self) -> Option<&str> {
        match self {
            Self::Held(Holder { token, .. }, _) | Self::Hidden { token, .. } => Some(token),
            _ => None,
        }
    }
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
            match Found::at(&path) {
                Found::Nothing => {}
                Found::Held(other, beat) if self.is_alive(&other, beat) => {
                    return Ok(Acquired::Held(other.to_string()));
                }
                // Whose process it is cannot be known; whether its heart beats can.
                Found::Hidden { owner, token, beat }
                    if self.watched.beats(&token, beat, Instant::now()) =>
                {
                    return Ok(Acquired::Held(format!("another user (the lease is {owner})")));
                }
                left_behind => self.take_away(&path, &left_behind),
            }
            let staged = durable::stage_bytes(&self.tmp_dir(), &text).map_err(io)?;
            durable::create_parent(&path).map_err(io)?;
            match durable::rename_exclusive(&staged, &path) {
                Ok(true) => return Ok(Acquired::Mine(Lease::beating(path, holder))),
                Ok(false) => {}
                // Without exclusive renames and hard links: it had arrived, was replaced, and what
                // replaced it has been released.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io(error)),
            }
            let _ = fs::remove_file(&staged);
            durable::look_again(path.parent().unwrap_or(&self.root));
        }
        Ok(Acquired::Held("another process".to_owned()))
    }

    /// Whether the holder still works: certain where its process can be looked at, by heartbeat
    /// elsewhere.
    fn is_alive(&self, holder: &Holder, beat: SystemTime) -> bool {
        let this = Holder::this();
        if holder.died_with_an_earlier_boot_of(&this) {
            return false;
        }
        if this.boot == holder.boot
            && this.host == holder.host
            && this.processes == holder.processes
        {
            return lives(holder.process, holder.started);
        }
        self.watched.beats(&holder.token, beat, Instant::now())
    }

    /// Moves a lease that was left behind out of the way, unless somebody has just done so and put
    /// a new one there.
    fn take_away(&self, path: &Path, judged: &Found) {
        let aside = self.tmp_dir().join(durable::unique_name());
        if durable::create_parent(&aside).and_then(|()| durable::rename(path, &aside)).is_err() {
            return;
        }
        if Found::at(&aside).token() == judged.token()
            || !durable::rename_exclusive(&aside, path).unwrap_or(true)
        {
            let _ = fs::remove_file(&aside);
        }
    }
}

impl Lease {
    fn beating(path: PathBuf, holder: Holder) -> Self {
        let (stop, stopped) = channel();
        let beat = path.clone();
        let heart = std::thread::spawn(move || {
            while stopped.recv_timeout(HEARTBEAT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                let _ = durable::touch(&beat);
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
        if Found::at(&self.path).token() == Some(&self.holder.token) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Holder {
    fn this() -> Self {
        let process = std::process::id();
        let user = std::env::var("USER").unwrap_or_default();
        let user = if user.is_empty() { getuid().as_raw().to_string() } else { user };
        Self {
            user,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            machine: machine_id(),
            boot: boot_id(),
            processes: process_namespace(),
            process,
            started: started(process).unwrap_or(0),
            token: durable::unique_name(),
        }
    }
}

impl Holder {
    /// Whether it was a process of this very machine before it was started anew. Two machines can
    /// have one name (`localhost`, copies of a virtual machine before their first start).
    fn died_with_an_earlier_boot_of(&self, this: &Self) -> bool {
        let known = |own: &str, other: &str| !own.is_empty() && !other.is_empty();
        self.host == this.host
            && known(&self.machine, &this.machine)
            && self.machine == this.machine
            && known(&self.boot, &this.boot)
            && self.boot != this.boot
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { user, host, process, .. } = self;
        if user.is_empty() {
            write!(f, "{host} (process {process})")
        } else {
            write!(f, "{user} on {host} (process {process})")
        }
    }
}

/// This process as others see it: `anna on host (process 123)`.
pub(crate) fn this_process() -> String {
    Holder::this().to_string()
}

pub(super) fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

fn machine_id() -> String {
    let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let id = id.trim();
    // What an image says of itself before its first start.
    if id == "uninitialized" { String::new() } else { id.to_owned() }
}

fn process_namespace() -> String {
    let link = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    link.to_string_lossy().into_owned()
}

/// Whether a process of this host is still the one that started then.
fn lives(process: u32, started_at: u64) -> bool {
    if Path::new(&format!("/proc/{process}")).exists() {
        return started(process) == Some(started_at);
    }
    // Other users' processes can be hidden; they cannot be signalled then, which tells that they
    // are there.
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) == Err(rustix::io::Errno::PERM))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(host: &str, machine: &str, boot: &str) -> Holder {
        let (host, machine, boot) = (host.to_owned(), machine.to_owned(), boot.to_owned());
        Holder { host, machine, boot, ..Holder::this() }
    }

    #[test]
    fn only_another_boot_of_the_same_machine_is_dead_for_certain() {
        let this = holder("localhost", "m1", "b1");
        assert!(holder("localhost", "m1", "b0").died_with_an_earlier_boot_of(&this));
        for (host, machine, boot) in [
            ("localhost", "m2", "b0"),
            ("localhost", "", "b0"),
            ("elsewhere", "m1", "b0"),
            ("localhost", "m1", "b1"),
            ("localhost", "m1", ""),
        ] {
            let other = holder(host, machine, boot);
            assert!(!other.died_with_an_earlier_boot_of(&this), "{other:?}");
        }
        let unknown = holder("localhost", "", "b1");
        assert!(!holder("localhost", "", "b0").died_with_an_earlier_boot_of(&unknown));
    }
}
