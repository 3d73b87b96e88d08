//! Executes a pipeline: decides on each stage once its inputs are known, runs what must run, side
//! by side where the graph allows, and reports through [`Event`]s.
//!
//! The only module that commits outputs to the cache.

mod critical_path;
mod execute;
mod inputs;
mod messages;
mod publish;
mod shared;
mod slots;
mod start;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use contract::{Progress, StageError};

use crate::cache::InUse;
use crate::digest::Fingerprint;
use crate::event::Event;
use crate::lockfile::Lockfile;
use crate::pipeline::Stage;
use crate::plan::{PlanError, Planner, Records};
use crate::process::Stopper;
use crate::record::Record;
use crate::remote::Remote;
use execute::{Job, Made};
pub use shared::push;

/// How long an interrupted stage may take to stop by itself.
const GRACE: Duration = Duration::from_secs(5);
/// How often the loop looks for an interrupt.
const TICK: Duration = Duration::from_millis(50);
/// Lines of a failed stage's log that are shown.
const TAIL: usize = 12;

/// How to run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Stages that may run at the same time.
    pub jobs: usize,
    /// Go on with stages that do not depend on a failed one.
    pub keep_going: bool,
    /// Count of interrupts by the user: the first stops the stages, the second kills them.
    pub interrupts: Arc<AtomicUsize>,
    /// Asked before a stage runs, where it may be read.
    pub read: Option<Arc<Remote>>,
    /// Offered what was made, where it may be written.
    pub write: Option<Arc<Remote>>,
    /// Fetch what the remote has and run nothing.
    pub fetch_only: bool,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RunSummary {
    /// Stages run.
    pub ran: usize,
    /// Stages reused.
    pub reused: usize,
    /// Those of them that came from the remote.
    pub fetched: usize,
    /// Stages failed.
    pub failed: usize,
    /// Stages skipped or never started.
    pub skipped: usize,
    /// The user interrupted it.
    pub interrupted: bool,
    /// A defect of `pipe` ended a stage; Rust's own hook has said where.
    pub defect: bool,
}

/// What workers tell the loop; a panic is a defect of `pipe`.
enum Message {
    Waiting { stage: String, holder: String },
    Started { stage: String, stopper: Stopper },
    Progress { stage: String, progress: Progress },
    Event(Event),
    Ended { stage: String, result: Result<Made, StageError> },
    Panicked { stage: String, what: String },
}

/// Runs the selected stages and everything upstream of them that is not cached.
///
/// # Errors
/// [`PlanError`] where a stage cannot be decided on before any was started. Once something runs,
/// that is a failure of the stage like any other.
pub fn run(
    planner: Planner<'_>,
    lock: &mut Lockfile,
    selection: &[String],
    options: &RunOptions,
    sink: &mut dyn FnMut(Event),
) -> Result<RunSummary, PlanError> {
    let started = Instant::now();
    let order = planner.graph.with_upstream(selection);
    sink(Event::RunStarted { stages: order.clone() });
    let (sender, receiver) = channel();
    let in_use = planner.cache.in_use();
    let mut run = Run {
        planner,
        options,
        in_use: &in_use,
        sink,
        open: order,
        records: Records::new(),
        running: BTreeMap::new(),
        stopped: BTreeMap::new(),
        summary: RunSummary::default(),
        saved: 0.0,
        fetched: BTreeSet::new(),
        cut_off: BTreeSet::new(),
        took: BTreeMap::new(),
        again: BTreeSet::new(),
        begun: false,
        interrupted_at: None,
        killed: false,
        offers: None,
    };
    let result = std::thread::scope(|scope| {
        let (offers, queue) = channel();
        let uploading = options.write.as_ref().map(|remote| {
            let (sender, queue) = (sender.clone(), Mutex::new(queue));
            run.offers = Some(offers);
            scope.spawn(move || {
                let interrupts = &*options.interrupts;
                shared::offer_all(planner, remote, &queue, false, &sender, interrupts);
            })
        });
        let result = run.drive(lock, &receiver, &|job| {
            in_use.show();
            let sender = sender.clone();
            let interrupts = Arc::clone(&options.interrupts);
            scope.spawn(move || {
                let stage = job.stage.name.clone();
                let work = || execute::execute(planner, &job, &sender, &interrupts);
                let _ = sender.send(messages::of_end(stage, work));
            });
        });
        run.offers = None;
        if let Some(uploading) = uploading {
            run.relay_until(&receiver, &|| uploading.is_finished());
        }
        result
    });
    planner.cache.flush();
    let pipeline = planner.pipeline;
    let stages = pipeline.stages.iter().map(|s| s.name.as_str()).collect();
    planner.cache.register(&pipeline.name, &pipeline.dir, &stages, run.records.fingerprints());
    result?;
    let (summary, finished) = (run.summary, run.finished(started));
    sink(finished);
    Ok(summary)
}

struct Running {
    stopper: Option<Stopper>,
    resources: BTreeMap<String, u32>,
    log: std::path::PathBuf,
    fingerprint: Fingerprint,
    reasons: Vec<String>,
}

struct Run<'a> {
    planner: Planner<'a>,
    options: &'a RunOptions,
    /// Keeps what is reused and made from gc until the run ends.
    in_use: &'a InUse,
    sink: &'a mut dyn FnMut(Event),
    /// Stages not yet decided, producers first.
    open: Vec<String>,
    records: Records,
    running: BTreeMap<String, Running>,
    /// Failed and skipped stages, with the failed stage that is the cause.
    stopped: BTreeMap<String, String>,
    summary: RunSummary,
    saved: f64,
    /// Stages reused that came from the remote.
    fetched: BTreeSet<String>,
    /// Stages reused although stages that feed them ran.
    cut_off: BTreeSet<String>,
    /// Seconds of the stages that ran.
    took: BTreeMap<String, f64>,
    /// Stages that ran or run again because what they had made was lost.
    again: BTreeSet<String>,
    /// A stage was started.
    begun: bool,
    interrupted_at: Option<Instant>,
    killed: bool,
    /// Takes what is to be uploaded.
    offers: Option<Sender<shared::Offer>>,
}

impl<'a> Run<'a> {
    /// The last event of a run.
    fn finished(&self, started: Instant) -> Event {
        let RunSummary { ran, reused, fetched, failed, skipped, .. } = self.summary;
        Event::RunFinished {
            ran,
            reused,
            fetched,
            failed,
            skipped,
            seconds: started.elapsed().as_secs_f64(),
            saved_seconds: self.saved,
            cut_off: self.cut_off.len(),
            critical_path: critical_path::of(self.planner, &self.took),
        }
    }

    fn drive(
        &mut self,
        lock: &mut Lockfile,
        receiver: &Receiver<Message>,
        spawn: &dyn Fn(Job<'a>),
    ) -> Result<(), PlanError> {
        loop {
            self.start_ready(lock, spawn)?;
            if self.running.is_empty() {
                self.summary.skipped += self.open.len();
                return Ok(());
            }
            match receiver.recv_timeout(TICK) {
                Ok(message) => self.handle(message, lock),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            self.in_use.beat();
            self.look_for_interrupt();
        }
    }

    /// Passes on what is said until `over`, for work that goes on after the last stage.
    fn relay_until(&mut self, receiver: &Receiver<Message>, over: &dyn Fn() -> bool) {
        loop {
            let finished = over();
            while let Ok(message) = receiver.try_recv() {
                match message {
                    Message::Event(event) => (self.sink)(event),
                    Message::Progress { stage, progress } => {
                        (self.sink)(Event::StageProgress { stage, progress });
                    }
                    _ => {}
                }
            }
            if finished {
                return;
            }
            self.in_use.beat();
            self.look_for_interrupt();
            std::thread::sleep(TICK);
        }
    }

    fn reuse(&mut self, stage: &Stage, record: Arc<Record>) {
        let pipeline = &self.planner.pipeline.name;
        self.planner.cache.set_last(pipeline, &stage.name, &stage.kind, record.fingerprint);
        self.in_use.add(record.fingerprint);
        self.saved += record.seconds;
        self.summary.reused += 1;
        let mut cut_off_by = Vec::new();
        if !self.took.is_empty() {
            let ran = stage.needs().filter(|name| self.took.contains_key(*name));
            cut_off_by.extend(ran.map(str::to_owned));
        }
        if !cut_off_by.is_empty() {
            self.cut_off.insert(stage.name.clone());
        }
        (self.sink)(Event::StageReused {
            stage: stage.name.clone(),
            fingerprint: record.fingerprint,
            saved_seconds: record.seconds,
            cut_off_by,
        });
        self.records.insert(stage.name.clone(), record);
    }

    fn skip(&mut self, name: &str, cause: String) {
        self.summary.skipped += 1;
        if self.options.fetch_only {
            let why = format!("it needs what {cause} makes, which is not there");
            (self.sink)(Event::StageNotFound { stage: name.to_owned(), why });
            self.stopped.insert(name.to_owned(), cause);
            return;
        }
        (self.sink)(Event::StageSkipped { stage: name.to_owned(), because_of: cause.clone() });
        self.stopped.insert(name.to_owned(), cause);
    }
}
