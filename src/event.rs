//! The only words the runner says to the outside; `display` turns them into a terminal, JSON lines
//! or a log.

use std::path::PathBuf;

use contract::Progress;
use serde::Serialize;

use crate::digest::Fingerprint;

/// One thing that happened during a run.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The run starts; `stages` in topological order.
    RunStarted {
        /// Names of all stages the run covers.
        stages: Vec<String>,
    },
    /// A stage's artifacts are taken from the cache.
    StageReused {
        /// Stage.
        stage: String,
        /// Fingerprint.
        fingerprint: Fingerprint,
        /// Seconds that the run which made the artifacts took: time saved.
        saved_seconds: f64,
        /// Early cutoff: stages that feed it ran in this run and made what they had made before.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        cut_off_by: Vec<String>,
    },
    /// Another process is running the same fingerprint, or has the GPU; this run waits for it.
    StageWaiting {
        /// Stage.
        stage: String,
        /// Who holds the lease, as `host (process 123)`, or the GPU, as `the GPU, in use by …`.
        holder: String,
    },
    /// A stage process was started.
    StageStarted {
        /// Stage.
        stage: String,
        /// Fingerprint.
        fingerprint: Fingerprint,
        /// Why, one reason a line.
        reasons: Vec<String>,
        /// Log file.
        log: PathBuf,
    },
    /// A stage's artifacts come from the remote.
    StageFetching {
        /// Stage.
        stage: String,
        /// Fingerprint.
        fingerprint: Fingerprint,
        /// URL of the remote.
        from: String,
    },
    /// They are in the cache now; the stage counts as reused.
    StageFetched {
        /// Stage.
        stage: String,
        /// Fingerprint.
        fingerprint: Fingerprint,
        /// Bytes that had to come.
        bytes: u64,
        /// Wall time in seconds.
        seconds: f64,
    },
    /// `pull` found no artifacts of a stage.
    StageNotFound {
        /// Stage.
        stage: String,
        /// Why.
        why: String,
    },
    /// A stage's artifacts go to the remote.
    StagePushing {
        /// Stage.
        stage: String,
        /// Fingerprint.
        fingerprint: Fingerprint,
        /// URL of the remote.
        to: String,
    },
    /// The remote has a stage's artifacts now.
    StagePushed {
        /// Stage.
        stage: String,
        /// Fingerprint.
        fingerprint: Fingerprint,
        /// It did not have them before.
        stored: bool,
        /// Wall time in seconds.
        seconds: f64,
    },
    /// The remote could not be used, or has something that is not to be used.
    RemoteWarning {
        /// What went wrong.
        message: String,
    },
    /// A running stage said something.
    StageProgress {
        /// Stage.
        stage: String,
        /// What it said.
        progress: Progress,
    },
    /// A stage's outputs were published.
    StageFinished {
        /// Stage.
        stage: String,
        /// Fingerprint.
        fingerprint: Fingerprint,
        /// Wall time in seconds.
        seconds: f64,
        /// Every output has the digest that the previous run of this stage had, so stages
        /// downstream are not touched.
        unchanged: bool,
        /// Warnings.
        warnings: Vec<String>,
    },
    /// A stage failed; nothing was published.
    StageFailed {
        /// Stage.
        stage: String,
        /// What went wrong.
        message: String,
        /// What to do about it.
        help: Option<String>,
        /// Log file.
        log: Option<PathBuf>,
        /// Last lines of the log.
        log_tail: Vec<String>,
    },
    /// A stage was not run because one upstream of it failed.
    StageSkipped {
        /// Stage.
        stage: String,
        /// The failed stage.
        because_of: String,
    },
    /// The user interrupted the run.
    Interrupted,
    /// A push is over.
    PushFinished {
        /// Stages that the remote has now.
        stored: usize,
        /// Stages that it had before.
        there: usize,
        /// Stages that could not be pushed.
        failed: usize,
        /// Stages that are not in the cache.
        not_cached: usize,
        /// Wall time in seconds.
        seconds: f64,
    },
    /// The run is over.
    RunFinished {
        /// Stages run.
        ran: usize,
        /// Stages reused.
        reused: usize,
        /// Those of them that came from the remote.
        fetched: usize,
        /// Stages failed.
        failed: usize,
        /// Stages skipped.
        skipped: usize,
        /// Wall time in seconds.
        seconds: f64,
        /// Sum of what the reused stages once took.
        saved_seconds: f64,
        /// Stages reused by early cutoff, among the reused ones.
        cut_off: usize,
        /// The chain of stages, producers first, that the run had to wait for: no number of jobs
        /// makes it shorter.
        critical_path: Vec<PathStep>,
    },
}

/// One stage of a critical path.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PathStep {
    /// Stage.
    pub stage: String,
    /// Wall time in seconds.
    pub seconds: f64,
}
