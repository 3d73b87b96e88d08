//! What the file system of a cache can do, tried rather than guessed.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use super::{Cache, durable, materialise};

/// Threads that race for one name.
const RACERS: usize = 8;
/// Names that they race for.
const RACES: usize = 20;
/// Replacements under the eyes of a reader.
const REPLACEMENTS: usize = 200;
/// How long to wait for the clock of the file system to tick; coarser ones count as this coarse.
const LONGEST_TICK: Duration = Duration::from_millis(2100);

/// What was found.
#[derive(Clone, Debug, Serialize)]
#[allow(clippy::struct_excessive_bools, reason = "one a question")]
pub struct Probe {
    /// The folder where it was tried: in the cache, or where the cache would be made.
    pub folder: PathBuf,
    /// Type, such as `ext4`, or its number in hexadecimal.
    pub file_system: String,
    /// Bytes that are free for this user.
    pub free_bytes: u64,
    /// Copies can share blocks.
    pub reflink: bool,
    /// Files can have several names, and the file system counts them.
    pub hard_link: bool,
    /// Links by path work.
    pub symlink: bool,
    /// Of many who create a name exclusively, one succeeds, every time.
    pub exclusive_create: bool,
    /// A rename onto a taken name is refused by the file system itself; else a hard link does it.
    pub exclusive_rename: bool,
    /// A reader sees the old or the new file at every moment of a replacement.
    pub atomic_replace: bool,
    /// Shortest time between two different file times, in seconds.
    pub tick_seconds: f64,
    /// How far the file system's clock is ahead of this host's, in seconds; its tick is an error
    /// of the measurement.
    pub skew_seconds: f64,
}

impl Cache {
    /// Tries what the cache's file system can do, in a folder that is removed afterwards. A cache
    /// that does not exist yet is tried where it would be, and not made.
    ///
    /// # Errors
    /// What the file system said where nothing can be written there, with the folder.
    pub fn probe(&self) -> Result<Probe, (PathBuf, io::Error)> {
        let there = self.root.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
        let name = format!(".probe-{}", durable::unique_name());
        let parent = if there == self.root { self.tmp_dir() } else { there.to_owned() };
        let made_tmp = !parent.exists();
        let dir = parent.join(name);
        let probed = fs::create_dir_all(&dir).and_then(|()| probe(&dir));
        let _ = fs::remove_dir_all(&dir);
        if made_tmp {
            let _ = fs::remove_dir(&parent);
        }
        probed
            .map(|probe| Probe { folder: there.to_owned(), ..probe })
            .map_err(|e| (there.to_owned(), e))
    }
}

fn probe(dir: &Path) -> io::Result<Probe> {
    let file = dir.join("file");
    let before = SystemTime::now();
    fs::write(&file, "content")?;
    let modified = fs::metadata(&file)?.modified()?;
    let after = SystemTime::now();
    let (ahead, behind) = (seconds_after(modified, after), seconds_after(before, modified));
    let skew_seconds = if ahead > 0.0 { ahead } else { -behind.max(0.0) };
    let space = rustix::fs::statvfs(dir)?;
    Ok(Probe {
        folder: dir.to_owned(),
        file_system: file_system(rustix::fs::statfs(dir)?.f_type as u64),
        free_bytes: space.f_bavail.saturating_mul(space.f_frsize),
        reflink: materialise::reflink(&file, &dir.join("reflink")).is_ok(),
        hard_link: hard_link(&file, &dir.join("hard"))?,
        symlink: symlink(&file, &dir.join("symlink")),
        exclusive_create: exclusive_create(dir),
        exclusive_rename: exclusive_rename(dir)?,
        atomic_replace: atomic_replace(dir)?,
        tick_seconds: tick(&dir.join("tick"))?.as_secs_f64(),
        skew_seconds,
    })
}

/// Seconds by which `late` is after `early`, negative where it is before.
fn seconds_after(late: SystemTime, early: SystemTime) -> f64 {
    match late.duration_since(early) {
        Ok(ahead) => ahead.as_secs_f64(),
        Err(error) => -error.duration().as_secs_f64(),
    }
}

fn hard_link(file: &Path, link: &Path) -> io::Result<bool> {
    if fs::hard_link(file, link).is_err() {
        return Ok(false);
    }
    let identity = |meta: &Metadata| (meta.dev(), meta.ino(), meta.nlink());
    let (one, two) = (fs::metadata(file)?, fs::metadata(link)?);
    fs::remove_file(link)?;
    let left = fs::metadata(file)?.nlink();
    Ok(identity(&one) == identity(&two) && one.nlink() == 2 && left == 1)
}

fn symlink(file: &Path, link: &Path) -> bool {
    let made = std::os::unix::fs::symlink(file, link);
    made.is_ok() && fs::read_link(link).is_ok_and(|to| to == file) && fs::read(link).is_ok()
}

fn exclusive_create(dir: &Path) -> bool {
    (0..RACES).all(|race| {
        let path = dir.join(format!("race-{race}"));
        let create = || File::options().write(true).create_new(true).open(&path).is_ok();
        let winners: usize = thread::scope(|scope| {
            let racers: Vec<_> = (0..RACERS).map(|_| scope.spawn(create)).collect();
            racers.into_iter().map(|racer| usize::from(racer.join().unwrap_or(false))).sum()
        });
        winners == 1
    })
}

/// Whether the file system refuses by itself; that the fallback refuses is checked as well.
fn exclusive_rename(dir: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let (from, taken) = (dir.join("from"), dir.join("taken"));
    fs::write(&from, "from")?;
    fs::write(&taken, "taken")?;
    if durable::rename_exclusive(&from, &taken)? || fs::read(&taken)? != b"taken" {
        return Err(io::Error::other("an exclusive rename replaced a file"));
    }
    let refused = renameat_with(CWD, &from, CWD, &taken, RenameFlags::NOREPLACE);
    Ok(refused == Err(rustix::io::Errno::EXIST))
}

fn atomic_replace(dir: &Path) -> io::Result<bool> {
    let (path, over) = (dir.join("replaced"), AtomicBool::new(false));
    let contents = ["one".repeat(500), "two".repeat(500)];
    fs::write(&path, &contents[0])?;
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut whole = true;
            while whole && !over.load(Ordering::Relaxed) {
                // A stale handle is how a network file system says that the file was replaced.
                whole = match fs::read_to_string(&path) {
                    Ok(text) => contents.contains(&text),
                    Err(error) => error.kind() == ErrorKind::StaleNetworkFileHandle,
                };
            }
            whole
        });
        let replaced = (0..REPLACEMENTS).try_for_each(|i| {
            let next = dir.join("next");
            fs::write(&next, &contents[i % 2])?;
            fs::rename(&next, &path)
        });
        over.store(true, Ordering::Relaxed);
        let whole = reader.join().unwrap_or(false);
        replaced.map(|()| whole)
    })
}

/// The shortest of a few steps between file times.
fn tick(path: &Path) -> io::Result<Duration> {
    let started = Instant::now();
    let mut shortest = LONGEST_TICK;
    let mut last: Option<SystemTime> = None;
    let mut steps = 0;
    while steps < 4 && started.elapsed() < LONGEST_TICK {
        File::create(path)?.write_all(b"tick")?;
        let now = fs::metadata(path)?.modified()?;
        if let Some(step) = last.and_then(|last| now.duration_since(last).ok())
            && !step.is_zero()
        {
            shortest = shortest.min(step);
            steps += 1;
        }
        last = Some(now);
    }
    Ok(shortest)
}

/// Names of `statfs(2)`.
fn file_system(magic: u64) -> String {
    let known = match magic & 0xffff_ffff {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x2fc1_2fc1 => "zfs",
        0x0102_1994 => "tmpfs",
        0x794c_7630 => "overlay",
        0x6969 => "nfs",
        0x6573_5546 => "fuse",
        0xff53_4d42 | 0xfe53_4d42 => "smb",
        0x0bd0_0bd0 => "lustre",
        0x4750_4653 => "gpfs",
        0x00c3_6400 => "ceph",
        0x0102_1997 => "9p",
        other => return format!("{other:#x}"),
    };
    known.to_owned()
}
