//! What stages say while they run and become when they end, and the interrupt that stops them.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use contract::StageError;

use super::execute::Made;
use super::{GRACE, Message, Run, TAIL, shared};
use crate::event::Event;
use crate::lockfile::Lockfile;
use crate::pipeline::Stage;
use crate::process::Stopper;
use crate::record::Record;

/// The last word of a worker. One that panicked has one too: the loop would wait for it for ever.
pub(super) fn of_end(stage: String, work: impl FnOnce() -> Result<Made, StageError>) -> Message {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => Message::Ended { stage, result },
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            Message::Panicked { stage, what: text.unwrap_or_else(|| "it panicked".to_owned()) }
        }
    }
}

impl Run<'_> {
    pub(super) fn handle(&mut self, message: Message, lock: &mut Lockfile) {
        match message {
            Message::Waiting { stage, holder } => {
                (self.sink)(Event::StageWaiting { stage, holder });
            }
            Message::Started { stage, stopper } => {
                if self.interrupted_at.is_some() {
                    stopper.terminate();
                }
                if let Some(running) = self.running.get_mut(&stage) {
                    running.stopper = Some(stopper);
                    let (fingerprint, log) = (running.fingerprint, running.log.clone());
                    let reasons = std::mem::take(&mut running.reasons);
                    (self.sink)(Event::StageStarted { stage, fingerprint, reasons, log });
                }
            }
            Message::Progress { stage, progress } => {
                (self.sink)(Event::StageProgress { stage, progress });
            }
            Message::Event(event) => (self.sink)(event),
            Message::Ended { stage, result } => self.ended(&stage, result, lock),
            Message::Panicked { stage, what } => {
                self.summary.defect = true;
                let log = self.running.remove(&stage).map(|r| r.log);
                let error = StageError::internal(format!("a defect of pipe: {what}"));
                self.fail(&stage, error.help("the lines above say where; please report them"), log);
            }
        }
    }

    fn ended(&mut self, name: &str, result: Result<Made, StageError>, lock: &mut Lockfile) {
        let log = self.running.remove(name).map(|r| r.log);
        let Some(stage) = self.planner.pipeline.stage(name) else { return };
        match result {
            Ok(Made::ByOther(record)) => self.reuse(stage, record),
            Ok(Made::Fetched(record)) => {
                self.summary.fetched += 1;
                self.fetched.insert(name.to_owned());
                self.reuse(stage, record);
            }
            Ok(Made::Nowhere(why)) => {
                self.summary.skipped += 1;
                (self.sink)(Event::StageNotFound { stage: name.to_owned(), why });
                self.stopped.insert(name.to_owned(), name.to_owned());
            }
            Ok(Made::Lost(makers)) => self.make_again(name, makers, log),
            Ok(Made::Here { record, unchanged }) => {
                let pinned = match (&stage.signature.lock_key, &record.lock) {
                    (Some(key), Some(value)) => lock.set(key, value.clone()),
                    _ => Ok(()),
                };
                match pinned {
                    Ok(()) => self.made(stage, record, unchanged, log),
                    Err(error) => {
                        let failed = StageError::new(contract::Fault::Io, error.to_string());
                        let help = "what it made is in the cache; make that file writable, and \
                                    run again to pin where it came from";
                        self.fail(name, failed.help(help), log);
                    }
                }
            }
            // Stages that the user stopped did not fail.
            Err(_) if self.interrupted_at.is_some() => {
                self.summary.skipped += 1;
                self.stopped.insert(name.to_owned(), name.to_owned());
            }
            Err(error) => self.fail(name, error, log),
        }
    }

    /// An execution is published.
    fn made(
        &mut self,
        stage: &Stage,
        record: Arc<Record>,
        unchanged: bool,
        log: Option<std::path::PathBuf>,
    ) {
        let (name, pipeline) = (&stage.name, &self.planner.pipeline.name);
        self.planner.cache.set_last(pipeline, name, &stage.kind, record.fingerprint);
        self.in_use.add(record.fingerprint);
        self.summary.ran += 1;
        self.took.insert(name.to_owned(), record.seconds);
        if let Some(log) = &log {
            self.planner.cache.keep_log(record.fingerprint, log);
        }
        (self.sink)(Event::StageFinished {
            stage: name.to_owned(),
            fingerprint: record.fingerprint,
            seconds: record.seconds,
            unchanged,
            warnings: record.warnings.clone(),
        });
        if let Some(offers) = &self.offers {
            let record = Arc::clone(&record);
            let _ = offers.send(shared::Offer { stage: name.to_owned(), record });
        }
        self.records.insert(name.to_owned(), record);
    }

    /// What a stage was to read is lost: its makers are decided on again, and then the stage is.
    fn make_again(
        &mut self,
        name: &str,
        makers: BTreeMap<String, Arc<Record>>,
        log: Option<std::path::PathBuf>,
    ) {
        // Another stage that reads it may have said so before, and been heard.
        let is_known = |(maker, record): &(String, Arc<Record>)| {
            self.records.get(maker).is_some_and(|now| Arc::ptr_eq(now, record))
        };
        let lost: BTreeSet<String> = makers.into_iter().filter(is_known).map(|(m, _)| m).collect();
        if let Some(maker) = lost.iter().find(|maker| self.again.contains(*maker)) {
            let message = format!("what `{maker}` made was lost twice in this run");
            let help = "something changes or removes objects of the cache; stop it and run again";
            self.fail(name, StageError::input(message).help(help), log);
            return;
        }
        for maker in &lost {
            self.take_back(maker);
        }
        self.open.splice(0..0, lost.iter().cloned().chain([name.to_owned()]));
        self.again.extend(lost);
    }

    /// A stage that ran or was reused counts as neither until it is decided on again.
    fn take_back(&mut self, name: &str) {
        let Some(record) = self.records.remove(name) else { return };
        if self.took.remove(name).is_some() {
            self.summary.ran -= 1;
            return;
        }
        self.summary.reused -= 1;
        self.saved -= record.seconds;
        self.summary.fetched -= usize::from(self.fetched.remove(name));
        self.cut_off.remove(name);
    }

    pub(super) fn fail(&mut self, name: &str, error: StageError, log: Option<std::path::PathBuf>) {
        self.summary.failed += 1;
        self.stopped.insert(name.to_owned(), name.to_owned());
        let text = log.as_ref().and_then(|l| std::fs::read(l).ok()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(TAIL)..];
        (self.sink)(Event::StageFailed {
            stage: name.to_owned(),
            message: error.message,
            help: error.help,
            log,
            log_tail: tail.iter().map(|l| (*l).to_owned()).collect(),
        });
    }

    pub(super) fn look_for_interrupt(&mut self) {
        let count = self.options.interrupts.load(Ordering::SeqCst);
        if count == 0 {
            return;
        }
        let since = if let Some(since) = self.interrupted_at {
            since
        } else {
            (self.sink)(Event::Interrupted);
            self.summary.interrupted = true;
            self.stop_all(Stopper::terminate);
            *self.interrupted_at.insert(Instant::now())
        };
        if !self.killed && (count > 1 || since.elapsed() > GRACE) {
            self.killed = true;
            self.stop_all(Stopper::kill);
        }
    }

    pub(super) fn stop_all(&self, how: impl Fn(Stopper)) {
        self.running.values().filter_map(|r| r.stopper).for_each(how);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_that_panics_says_so_instead_of_nothing() {
        for (work, said) in [
            ((|| panic!("a {}", "defect")) as fn() -> Result<Made, StageError>, "a defect"),
            (|| panic!("plain"), "plain"),
            (|| std::panic::panic_any(7), "it panicked"),
        ] {
            let Message::Panicked { stage, what } = of_end("s".to_owned(), work) else {
                panic!("no word of it")
            };
            assert_eq!((stage.as_str(), what.as_str()), ("s", said));
        }
        let nowhere = of_end("s".to_owned(), || Ok(Made::Nowhere(String::new())));
        assert!(matches!(nowhere, Message::Ended { result: Ok(Made::Nowhere(_)), .. }));
    }
}
