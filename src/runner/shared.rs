//! The remote during a run: asked before a stage runs, offered what was made, and warned about
//! once where it fails. Nothing of it can fail a run.

use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use contract::Progress;

use super::Message;
use super::execute::Job;
use super::publish::required;
use crate::event::Event;
use crate::plan::Planner;
use crate::record::Record;
use crate::remote::{Answer, Offered, Remote, RemoteError, Watch};

/// Progress of a transfer is told at most this often.
const EVERY: Duration = Duration::from_millis(100);
/// Records that a push works on at the same time.
const PUSHERS: usize = 8;

/// A record that is to be offered to the remote.
pub(super) struct Offer {
    pub(super) stage: String,
    pub(super) record: Arc<Record>,
}

/// What the remote had for a stage.
pub(super) enum Fetched {
    /// Its artifacts, which are in the cache now.
    Record(Arc<Record>),
    /// Nothing that can be used, and why not.
    Nothing(String),
}

/// Asks the remote for what a stage would make.
pub(super) fn fetch(
    planner: Planner<'_>,
    job: &Job<'_>,
    remote: &Remote,
    sender: &Sender<Message>,
    interrupts: &AtomicUsize,
) -> Fetched {
    let fingerprint = job.identity.fingerprint();
    let stage = &job.stage.name;
    let refused = |why: &str| {
        let message = format!("the remote's record of {stage} is not used: {why}");
        planner.cache.set_refusal(fingerprint, Some(why));
        warn(sender, message);
        Fetched::Nothing(why.to_owned())
    };
    let record = match remote.ask(&job.stage.kind, fingerprint) {
        Ok(Answer::Found(record)) => *record,
        Ok(Answer::Refused(why)) => return refused(&why),
        Ok(Answer::Absent) => {
            planner.cache.set_refusal(fingerprint, None);
            return Fetched::Nothing("the remote does not have it".to_owned());
        }
        Err(error) => return failed(sender, &error),
    };
    if let Err(error) = required(job.stage, &record) {
        return refused(&error.message);
    }
    let _ = sender.send(Message::Event(Event::StageFetching {
        stage: stage.clone(),
        fingerprint,
        from: remote.settings().shown(),
    }));
    let clock = Instant::now();
    let progress = told(sender, stage, "fetched");
    let watch = Watch { progress: &progress, interrupts };
    let fetched = remote.fetch(planner.cache, &record, watch).and_then(|bytes| {
        let reusable = planner.cache.record(&job.stage.kind, fingerprint)?.is_some_and(|found| {
            planner.cache.check(&found).is_ok() && required(job.stage, &found).is_ok()
        });
        planner.cache.publish(&record, !reusable)?;
        Ok(bytes)
    });
    match fetched {
        Ok(bytes) => {
            planner.cache.set_refusal(fingerprint, None);
            let _ = sender.send(Message::Event(Event::StageFetched {
                stage: stage.clone(),
                fingerprint,
                bytes,
                seconds: clock.elapsed().as_secs_f64(),
            }));
            Fetched::Record(Arc::new(record))
        }
        Err(RemoteError::Damaged(what)) => refused(&what),
        Err(error) => failed(sender, &error),
    }
}

/// Offers records to the remote until no more come; what fails is a warning.
pub(super) fn offer_all(
    planner: Planner<'_>,
    remote: &Remote,
    offers: &Mutex<Receiver<Offer>>,
    verify: bool,
    sender: &Sender<Message>,
    interrupts: &AtomicUsize,
) {
    loop {
        let offer = offers.lock().ok().and_then(|offers| offers.recv().ok());
        let Some(Offer { stage, record }) = offer else { return };
        let clock = Instant::now();
        let progress = told(sender, &stage, "pushed");
        let watch = Watch { progress: &progress, interrupts };
        let _ = sender.send(Message::Event(Event::StagePushing {
            stage: stage.clone(),
            fingerprint: record.fingerprint,
            to: remote.settings().shown(),
        }));
        match remote.offer(planner.cache, &record, verify, watch) {
            Ok(offered) => {
                if offered == Offered::Differs {
                    warn(
                        sender,
                        format!(
                            "the remote keeps another result of {stage} ({}): it is not \
                             deterministic",
                            record.fingerprint.short()
                        ),
                    );
                }
                let _ = sender.send(Message::Event(Event::StagePushed {
                    stage: stage.clone(),
                    fingerprint: record.fingerprint,
                    stored: matches!(offered, Offered::Stored { .. }),
                    seconds: clock.elapsed().as_secs_f64(),
                }));
            }
            Err(error) => drop(failed(sender, &error)),
        }
    }
}

/// Adds records that are in the cache to the remote.
///
/// Returns how many could not be added.
pub fn push(
    planner: Planner<'_>,
    remote: &Remote,
    records: Vec<(String, Arc<Record>)>,
    verify: bool,
    interrupts: &AtomicUsize,
    sink: &mut dyn FnMut(Event),
) -> usize {
    let (sender, receiver) = channel();
    let (offers, queue) = channel();
    let mut left = records.len();
    for (stage, record) in records {
        let _ = offers.send(Offer { stage, record });
    }
    drop(offers);
    let queue = Mutex::new(queue);
    std::thread::scope(|scope| {
        for _ in 0..PUSHERS.min(left) {
            let (sender, queue) = (sender.clone(), &queue);
            scope.spawn(move || offer_all(planner, remote, queue, verify, &sender, interrupts));
        }
        drop(sender);
        for message in receiver {
            match message {
                Message::Event(event) => {
                    left -= usize::from(matches!(event, Event::StagePushed { .. }));
                    sink(event);
                }
                Message::Progress { stage, progress } => {
                    sink(Event::StageProgress { stage, progress });
                }
                _ => {}
            }
        }
    });
    planner.cache.flush();
    left
}

fn failed(sender: &Sender<Message>, error: &RemoteError) -> Fetched {
    match error {
        // It was said before, or the user knows.
        RemoteError::GivenUp { .. } | RemoteError::Interrupted => {}
        RemoteError::Config { message, help } => warn(sender, format!("{message} ({help})")),
        _ => warn(sender, error.to_string()),
    }
    Fetched::Nothing(error.to_string())
}

fn warn(sender: &Sender<Message>, message: String) {
    let _ = sender.send(Message::Event(Event::RemoteWarning { message }));
}

/// Tells the loop how far a transfer is, now and then.
fn told<'a>(
    sender: &Sender<Message>,
    stage: &'a str,
    note: &'static str,
) -> impl Fn(u64, u64) + Sync + use<'a> {
    let last = Mutex::new((Instant::now(), sender.clone()));
    move |done, total| {
        let Ok(mut last) = last.lock() else { return };
        if last.0.elapsed() < EVERY && done < total {
            return;
        }
        last.0 = Instant::now();
        let progress =
            Progress::Advance { done, total, unit: "bytes".to_owned(), note: note.to_owned() };
        let _ = last.1.send(Message::Progress { stage: stage.to_owned(), progress });
    }
}
