//! What runs that go on have reused or published, which gc leaves alone: `running/<run>`, a
//! fingerprint a line.
//!
//! A pipeline's roots are written when its run ends, and another run of the same pipeline may have
//! written others by then.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::access::read_or_count;
use super::collect::{GRACE, age, modified};
use super::survey::files_at;
use super::{Cache, CacheError, durable};
use crate::digest::Fingerprint;

/// A run that goes on says this often that it does.
const HEARTBEAT: Duration = Duration::from_secs(10 * 60);

/// The fingerprints that a run needs until it ends. A file holds them from its first execution on:
/// a run that only reuses is over long before [`GRACE`] is.
#[derive(Debug)]
pub(crate) struct InUse {
    path: PathBuf,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Not in the file yet.
    pending: String,
    file: Option<File>,
    beat: Option<Instant>,
}

impl Cache {
    /// Nothing yet.
    pub(crate) fn in_use(&self) -> InUse {
        let path = self.root.join("running").join(durable::unique_name());
        InUse { path, state: RefCell::default() }
    }

    /// What runs use that were alive within [`GRACE`], which is also how long the records of one
    /// that died stay young.
    /// Counts the files that this user may not read.
    pub(super) fn used_by_runs(
        &self,
        hidden: &mut usize,
    ) -> Result<BTreeSet<Fingerprint>, CacheError> {
        let mut used = BTreeSet::new();
        for path in files_at(&self.root.join("running"), 1)? {
            if modified(&path).is_some_and(|beat| age(beat) < GRACE) {
                let text = read_or_count(&path, hidden).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                used.extend(text.lines().filter_map(|line| line.parse::<Fingerprint>().ok()));
            }
        }
        Ok(used)
    }
}

impl InUse {
    /// The run has reused or published it.
    pub(crate) fn add(&self, fingerprint: Fingerprint) {
        let mut state = self.state.borrow_mut();
        state.pending.push_str(&format!("{fingerprint}\n"));
        if state.file.is_some() {
            state.write();
        }
    }

    /// From now on others can see what is used, and that the run goes on.
    pub(crate) fn show(&self) {
        let mut state = self.state.borrow_mut();
        if state.beat.is_some() {
            return;
        }
        state.beat = Some(Instant::now());
        match create(&self.path) {
            Ok(file) => {
                state.file = Some(file);
                state.write();
            }
            // A cache that cannot be written is not collected by this user either.
            Err(error) => tracing::debug!(%error, "could not say what the run uses"),
        }
    }

    /// Says now and then that the run goes on.
    pub(crate) fn beat(&self) {
        let mut state = self.state.borrow_mut();
        if state.beat.is_some_and(|beat| beat.elapsed() > HEARTBEAT) {
            state.beat = Some(Instant::now());
            let _ = durable::touch(&self.path);
        }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if self.state.borrow().file.is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl State {
    fn write(&mut self) {
        let Some(file) = &mut self.file else { return };
        if let Err(error) = file.write_all(self.pending.as_bytes()) {
            tracing::debug!(%error, "could not say what the run uses");
        }
        self.pending.clear();
    }
}

/// Not synced: after a power cut the run is no more.
fn create(path: &Path) -> std::io::Result<File> {
    durable::create_parent(path)?;
    let file = File::options().append(true).create_new(true).open(path)?;
    durable::share(path, 0o060);
    Ok(file)
}
