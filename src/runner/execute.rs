//! One execution of one stage: lease, inputs, process, outputs, record.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::thread::sleep;
use std::time::{Duration, Instant};

use contract::{Fault, Outcome, PROTOCOL, Request, StageError, UpstreamRecord};

use super::publish::{possible, publish, required, store};
use super::{Message, inputs, shared, slots};
use crate::cache::{Acquired, CacheError, Lease, Scratch, WorkDir, unix_seconds};
use crate::fingerprint::Identity;
use crate::pipeline::Stage;
use crate::plan::{Planner, Records};
use crate::process::StageProcess;
use crate::record::Record;
use crate::remote::Remote;

/// How often a waiting execution looks again.
const POLL: Duration = Duration::from_millis(100);

/// A stage whose inputs are known.
pub(super) struct Job<'a> {
    pub(super) stage: &'a Stage,
    pub(super) identity: Identity,
    pub(super) records: Records,
    pub(super) log: PathBuf,
    pub(super) forced: bool,
    /// Asked before the stage runs.
    pub(super) remote: Option<Arc<Remote>>,
    /// Nothing is run, only fetched.
    pub(super) fetch_only: bool,
}

/// Where the artifacts came from.
pub(super) enum Made {
    /// Another process made them meanwhile.
    ByOther(Arc<Record>),
    /// The remote had them; they are in the cache now.
    Fetched(Arc<Record>),
    /// Nowhere: the remote has none, and nothing is to be run.
    Nowhere(String),
    /// Nowhere: what these stages made is not in the cache any more, and it is an input. The
    /// records are those that it was made by.
    Lost(BTreeMap<String, Arc<Record>>),
    /// This execution made them.
    Here {
        record: Arc<Record>,
        /// As the stage's last execution did.
        unchanged: bool,
    },
}

impl From<CacheError> for StageError {
    fn from(error: CacheError) -> Self {
        let fault = match &error {
            CacheError::Unfit(_) | CacheError::Link { .. } => Fault::Internal,
            _ => Fault::Io,
        };
        let help = error.help();
        Self { help, ..Self::new(fault, error.to_string()) }
    }
}

pub(super) fn execute(
    planner: Planner<'_>,
    job: &Job<'_>,
    sender: &Sender<Message>,
    interrupts: &AtomicUsize,
) -> Result<Made, StageError> {
    let fingerprint = job.identity.fingerprint();
    let _lease = lease(planner, job, sender, interrupts)?;
    let found = planner.cache.record_now(&job.stage.kind, fingerprint)?;
    let settled = job.stage.signature.lock_key.is_none() || job.identity.lock.is_some();
    if let Some(found) = &found {
        if !job.forced
            && settled
            && planner.cache.is_whole(found)?
            && required(job.stage, found).is_ok()
        {
            return Ok(Made::ByOther(Arc::new(found.clone())));
        }
        planner.cache.clear_faults(found);
    }
    if let Some(remote) = job.remote.as_ref().filter(|_| settled && !job.forced) {
        match shared::fetch(planner, job, remote, sender, interrupts) {
            shared::Fetched::Record(record) => return Ok(Made::Fetched(record)),
            shared::Fetched::Nothing(why) if job.fetch_only => return Ok(Made::Nowhere(why)),
            shared::Fetched::Nothing(_) => {}
        }
        if interrupts.load(Ordering::SeqCst) > 0 {
            return Err(StageError::new(Fault::Environment, "interrupted while fetching"));
        }
    }
    if job.fetch_only {
        let why = "its source is not pinned in the lock file yet";
        return Ok(Made::Nowhere(why.to_owned()));
    }
    possible(job.stage)?;
    let held = take_slots(job, sender, interrupts)?;
    let gpus = visible_gpus(job, &held);
    let lost = inputs::lost(planner, job)?;
    if !lost.is_empty() {
        return Ok(Made::Lost(lost));
    }
    let scratch = planner.cache.scratch(fingerprint)?;
    let result = attempt(planner, job, sender, &scratch, gpus.as_deref());
    match &result {
        Ok(_) => scratch.clear(),
        Err(_) => scratch.keep(),
    }
    let (mut record, identity) = result?;
    record.fingerprint = identity.fingerprint();
    record.identity = identity;
    publish(planner, job, record)
}

/// Waits until the fingerprint is ours to execute.
fn lease(
    planner: Planner<'_>,
    job: &Job<'_>,
    sender: &Sender<Message>,
    interrupts: &AtomicUsize,
) -> Result<Lease, StageError> {
    let mut told = String::new();
    loop {
        match planner.cache.lease(job.identity.fingerprint())? {
            Acquired::Mine(lease) => return Ok(lease),
            Acquired::Held(holder) => wait(job, sender, interrupts, &mut told, holder)?,
        }
    }
}

fn take_slots(
    job: &Job<'_>,
    sender: &Sender<Message>,
    interrupts: &AtomicUsize,
) -> Result<Vec<slots::Slot>, StageError> {
    let mut told = String::new();
    let wanted = slots::Wanted::of(&job.stage.signature.resources);
    let gpus = slots::gpus();
    if wanted.count() > gpus.len() {
        let message =
            format!("stage `{}` asks for {} GPUs at once", job.stage.name, wanted.count());
        return Err(StageError::new(Fault::Environment, message)
            .help(format!("this host has {}", gpus.len())));
    }
    if let Some(number) = wanted.numbers.iter().find(|number| **number >= gpus.len()) {
        let message = format!("stage `{}` asks for GPU {number}", job.stage.name);
        return Err(StageError::new(Fault::Environment, message)
            .help(format!("this host has {}, counted from 0", gpus.len())));
    }
    let numbered = wanted.numbers.iter().map(|number| &gpus[*number..=*number]);
    let asked: Vec<&[String]> = numbered.chain((0..wanted.any).map(|_| gpus)).collect();
    loop {
        let mut held = Vec::new();
        let holder = loop {
            let Some(choice) = asked.get(held.len()) else { return Ok(held) };
            match slots::take(choice).map_err(StageError::internal)? {
                slots::Taken::Mine(slot) => held.push(slot),
                slots::Taken::By(holder) => break holder,
            }
        };
        // Two runs that hold a part each would wait for ever.
        drop(held);
        wait(job, sender, interrupts, &mut told, format!("the GPU, in use by {holder}"))?;
    }
}

/// What a stage that asked for any GPUs sees of them: those that it holds.
fn visible_gpus(job: &Job<'_>, held: &[slots::Slot]) -> Option<String> {
    let wanted = slots::Wanted::of(&job.stage.signature.resources);
    let names: Vec<&str> = held.iter().map(|slot| slot.gpu.as_str()).collect();
    (wanted.any > 0 && wanted.numbers.is_empty()).then(|| names.join(","))
}

fn wait(
    job: &Job<'_>,
    sender: &Sender<Message>,
    interrupts: &AtomicUsize,
    told: &mut String,
    holder: String,
) -> Result<(), StageError> {
    if interrupts.load(Ordering::SeqCst) > 0 {
        return Err(StageError::new(Fault::Environment, "interrupted while waiting"));
    }
    if *told != holder {
        let stage = job.stage.name.clone();
        let _ = sender.send(Message::Waiting { stage, holder: holder.clone() });
        *told = holder;
    }
    sleep(POLL);
    Ok(())
}

/// Runs the process and stores what it made; the identity has the source it resolved.
fn attempt(
    planner: Planner<'_>,
    job: &Job<'_>,
    sender: &Sender<Message>,
    scratch: &Scratch,
    gpus: Option<&str>,
) -> Result<(Record, Identity), StageError> {
    let work = planner.cache.work_dir()?;
    let inputs = inputs::lay_out(planner, job, &work)?;
    let request = request(planner, job, &inputs, &work, scratch)?;
    let request_path = work.path().join("request.json");
    let text = serde_json::to_vec_pretty(&request).map_err(StageError::internal)?;
    fs::write(&request_path, text).map_err(|e| StageError::io("write", &request_path, &e))?;

    let (started_at, clock) = (unix_seconds(), Instant::now());
    let process = StageProcess::start(job.stage, &request_path, &job.log, gpus)?;
    let name = &job.stage.name;
    let _ = sender.send(Message::Started { stage: name.clone(), stopper: process.stopper() });
    if let Some(days) = planner.cache.missed(job.identity.fingerprint()) {
        let message = format!(
            "gc removed what this made {days} days ago, and it is needed again: raise the cap \
             (`--cache-cap`, PIPE_CACHE_CAP), or pin it"
        );
        let progress = contract::Progress::Warning { message };
        let _ = sender.send(Message::Progress { stage: name.clone(), progress });
    }
    let outcome = process.wait(&request, |progress| {
        let _ = sender.send(Message::Progress { stage: name.clone(), progress });
    })?;
    let seconds = clock.elapsed().as_secs_f64();

    inputs::check_unchanged(planner, job, &inputs)?;
    inputs::keep_listings(planner, job);
    let outputs = store(planner, job, &request, &work)?;
    let mut identity = job.identity.clone();
    if job.stage.signature.lock_key.is_some() {
        identity.lock = outcome.lock.clone().or(identity.lock);
    }
    let Outcome { telemetry, mut provenance, lock, warnings } = outcome;
    provenance.insert("pipe".to_owned(), env!("CARGO_PKG_VERSION").into());
    let record = Record {
        fingerprint: identity.fingerprint(),
        identity: identity.clone(),
        stage: name.clone(),
        params: job.stage.signature.params.clone(),
        outputs,
        seconds,
        started_at,
        finished_at: unix_seconds(),
        telemetry,
        provenance,
        warnings,
        lock,
    };
    Ok((record, identity))
}

fn request(
    planner: Planner<'_>,
    job: &Job<'_>,
    inputs: &inputs::Inputs<'_>,
    work: &WorkDir,
    scratch: &Scratch,
) -> Result<Request, StageError> {
    let stage = job.stage;
    let mut outputs = BTreeMap::new();
    for spec in &stage.signature.outputs {
        let dir = work.path().join("out").join(&spec.name);
        fs::create_dir_all(&dir).map_err(|e| StageError::io("create", &dir, &e))?;
        outputs.insert(spec.name.clone(), dir.join(&spec.file_name));
    }
    Ok(Request {
        protocol: PROTOCOL,
        stage: stage.name.clone(),
        kind: stage.kind.clone(),
        params: stage.signature.params.clone(),
        inputs: inputs.paths.clone(),
        outputs,
        scratch: scratch.own().to_owned(),
        earlier_scratch: scratch.earlier().to_owned(),
        pipeline_dir: planner.pipeline.dir.clone(),
        lock: job.identity.lock.clone(),
        upstream: if stage.signature.reads_records { upstream(planner, job) } else { Vec::new() },
        threads: std::thread::available_parallelism().map_or(1, usize::from),
    })
}

fn upstream(planner: Planner<'_>, job: &Job<'_>) -> Vec<UpstreamRecord> {
    let names = planner.graph.with_upstream(std::slice::from_ref(&job.stage.name));
    let record = |name: &String| {
        let (record, stage) = (job.records.get(name)?, planner.pipeline.stage(name)?);
        Some(UpstreamRecord {
            stage: name.clone(),
            kind: stage.kind.clone(),
            fingerprint: record.fingerprint.to_hex(),
            params: record.params.clone(),
            needs: stage.needs().map(str::to_owned).collect(),
            seconds: record.seconds,
            finished_at: record.finished_at,
            telemetry: record.telemetry.clone(),
            provenance: record.provenance.clone(),
            output_bytes: record.outputs.iter().map(|(n, o)| (n.clone(), o.bytes)).collect(),
        })
    };
    names.iter().filter(|n| **n != job.stage.name).filter_map(record).collect()
}
