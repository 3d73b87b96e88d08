//! Progress in bytes over all files of a download.

use std::time::{Duration, Instant};

use contract::Reporter;

/// Shortest time between two progress events.
const PACE: Duration = Duration::from_millis(100);

/// Counts bytes and tells the engine, not too often.
pub(crate) struct Meter<'a> {
    reporter: &'a mut Reporter,
    /// Bytes of the files before the current one.
    before: u64,
    /// Bytes in all, 0 where unknown.
    total: u64,
    note: String,
    last: Option<Instant>,
    /// Bytes that came over the network.
    pub(crate) fetched: u64,
    /// Bytes of files that were already on this machine.
    pub(crate) linked: u64,
    /// Bytes that an earlier attempt had received.
    pub(crate) resumed: u64,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(reporter: &'a mut Reporter) -> Self {
        Self {
            reporter,
            before: 0,
            total: 0,
            note: String::new(),
            last: None,
            fetched: 0,
            linked: 0,
            resumed: 0,
        }
    }

    /// Sets the bytes of all files together, 0 where unknown.
    pub(crate) fn expect(&mut self, total: u64) {
        self.total = total;
    }

    /// A file begins.
    pub(crate) fn start(&mut self, name: &str) {
        name.clone_into(&mut self.note);
        self.at(0);
    }

    /// The current file has `done` bytes.
    pub(crate) fn at(&mut self, done: u64) {
        if self.last.is_none_or(|last| last.elapsed() >= PACE) {
            self.last = Some(Instant::now());
            self.reporter.advance(self.before + done, self.total, "bytes", self.note.clone());
        }
    }

    /// The current file is complete.
    pub(crate) fn finish(&mut self, size: u64) {
        self.before += size;
        self.last = Some(Instant::now());
        self.reporter.advance(self.before, self.total, "bytes", self.note.clone());
    }

    pub(crate) fn log(&mut self, message: impl Into<String>) {
        self.reporter.log(message);
    }

    pub(crate) fn warn(&mut self, message: impl Into<String>) {
        self.reporter.warn(message);
    }
}
