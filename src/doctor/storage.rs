//! The file systems of the cache and of temporary files.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Check;
use crate::cache::{Cache, Closed, Probe};
use crate::display::size;

/// Below this nothing can be stored with confidence.
const TOO_LITTLE: u64 = 100 << 20;
/// Below this a model and its checkpoints may not fit.
const LITTLE: u64 = 5 << 30;
/// Clocks further apart than this make leases and file times doubtful.
const SKEW_SECONDS: f64 = 5.0;
/// The stat index trusts a file once it is older than this.
const TICK_SECONDS: f64 = 2.0;
/// What the check of owners and modes is called.
const SHARING: &str = "sharing";
/// 2024-01-01.
const EARLIEST_NOW: u64 = 1_704_067_200;

pub(super) fn checks(cache: &Cache) -> Vec<Check> {
    let mut checks = match cache.probe() {
        Ok(probe) => of_cache(cache, &probe),
        Err((folder, error)) => {
            let found = format!("cannot be written: {error} ({})", folder.display());
            let help = "`--cache DIR` or PIPE_CACHE names another folder; \
                        what is in this one can still be read";
            vec![Check::fail("cache", found, help)]
        }
    };
    checks.push(match cache.closed() {
        Ok(closed) => sharing(cache, &closed),
        Err(error) => {
            let help = error.help().unwrap_or_else(|| "look at that folder".to_owned());
            Check::warn(SHARING, error.to_string(), help)
        }
    });
    let tmp = std::env::temp_dir();
    checks.push(match rustix::fs::statvfs(&tmp) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            free_space("temporary files", free, &tmp.display().to_string())
        }
        Err(error) => {
            let found = format!("{}: {error}", tmp.display());
            Check::warn("temporary files", found, "set TMPDIR to a folder that can be written")
        }
    });
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    if now < EARLIEST_NOW {
        let help = "set the clock: records, leases and certificates depend on it";
        checks.push(Check::fail("clock", "this host believes to be in the past", help));
    }
    checks
}

fn of_cache(cache: &Cache, probe: &Probe) -> Vec<Check> {
    let new = if probe.folder == cache.root() { "" } else { ", not made yet" };
    vec![
        Check::ok("cache", format!("{} on {}{new}", cache.root().display(), probe.file_system)),
        free_space("free space", probe.free_bytes, &probe.folder.display().to_string()),
        links(probe),
        locks(probe),
        replacement(probe),
        times(probe),
    ]
}

/// Folders, and a sample of files, that keep out who shares the cache.
fn sharing(cache: &Cache, closed: &[Closed]) -> Check {
    let Some(first) = closed.iter().find(|c| c.to_us).or(closed.first()) else {
        return Check::ok(SHARING, "nothing that was looked at keeps anybody of its group out");
    };
    let path = first.path.strip_prefix(cache.root()).unwrap_or(&first.path);
    let path = if path.as_os_str().is_empty() { cache.root() } else { path };
    let whom = if first.to_us { "this user" } else { "its group" };
    let mut found = format!("{} is {} and keeps {whom} out", path.display(), first.what);
    if closed.len() > 1 {
        found.push_str(&format!(", and so do {} more that were looked at", closed.len() - 1));
    }
    let root = cache.root().display();
    // Never `g+w` for objects: the inputs of stages are hard links to them.
    let help = format!(
        "the owners can run `chmod -R g+rX {root}; find {root} -type d -exec chmod g+rwxs {{}} +; \
         chmod -R g+rw {root}/records-v1 {root}/leases`: what comes later is open to the group \
         then, whatever the umask"
    );
    Check::warn(SHARING, found, help)
}

fn free_space(name: &'static str, free: u64, place: &str) -> Check {
    let found = format!("{} free in {place}", size(free));
    match free {
        ..TOO_LITTLE => Check::fail(name, found, "free some space, or use another disk"),
        TOO_LITTLE..LITTLE => Check::warn(name, found, "a model and its checkpoints may not fit"),
        _ => Check::ok(name, found),
    }
}

fn links(probe: &Probe) -> Check {
    let all = [
        ("reflinks", probe.reflink),
        ("hard links", probe.hard_link),
        ("symbolic links", probe.symlink),
    ];
    let listed = |wanted: bool| {
        let names = all.iter().filter(|(_, works)| *works == wanted).map(|(name, _)| *name);
        names.collect::<Vec<_>>().join(", ")
    };
    let mut found = listed(true);
    if found.is_empty() {
        "none".clone_into(&mut found);
    }
    if all.iter().any(|(_, works)| !works) {
        found.push_str(&format!("; no {}", listed(false)));
    }
    if probe.reflink || probe.hard_link {
        return Check::ok("links", found);
    }
    let help = "inputs of stages are copied, which costs time and space: \
                a file system with hard links or reflinks avoids it";
    Check::warn("links", found, help)
}

fn locks(probe: &Probe) -> Check {
    if !probe.exclusive_create {
        let found = "an exclusive create let two through";
        let help = "leases mean nothing here and work may be done twice; \
                    use another file system, or mount this one without client-side caching";
        return Check::fail("locks", found, help);
    }
    let rename = if probe.exclusive_rename {
        "exclusive create and rename"
    } else {
        "exclusive create; rename by hard links"
    };
    if !probe.exclusive_rename && !probe.hard_link {
        let help = "nothing can be published safely without one of the two: \
                    use another file system";
        return Check::fail("locks", "no exclusive rename and no hard links", help);
    }
    Check::ok("locks", rename)
}

fn replacement(probe: &Probe) -> Check {
    if probe.atomic_replace {
        return Check::ok("replacement", "a rename replaces a file in one step");
    }
    let help = "readers may miss a record for a moment and run a stage again; \
                use another file system for a cache that several share";
    Check::warn("replacement", "a reader saw a file missing while it was replaced", help)
}

fn times(probe: &Probe) -> Check {
    let tick = probe.tick_seconds;
    let skew = probe.skew_seconds;
    // A time that lies within a tick before now is no skew.
    let apart = if skew < 0.0 { (-skew - tick).max(0.0) } else { skew };
    let shown = if tick < 1.0 { format!("{:.1} ms", tick * 1e3) } else { format!("{tick:.1} s") };
    let mut found = format!("steps of {shown}");
    if apart > SKEW_SECONDS {
        let side = if skew > 0.0 { "ahead of" } else { "behind" };
        found.push_str(&format!(", {apart:.0} s {side} this host"));
        let help = "synchronise the clocks (NTP): a lease may look abandoned while it is held";
        return Check::warn("file times", found, help);
    }
    if tick >= TICK_SECONDS {
        let help = "edits within one step may be missed until the file changes again";
        return Check::warn("file times", found, help);
    }
    Check::ok("file times", format!("{found}, clock agrees"))
}
