//! Stage processes: the running image executed again, one process a stage.
//!
//! The child is the leader of a process group of its own. Its standard input is a control pipe
//! whose end means that the parent is gone: then the child kills its whole group, so that nothing
//! survives even `kill -9` of the parent. Its standard output, moved out of the way first, carries
//! events; what stages and their children print goes to the log.

mod child;
mod environment;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};

use contract::{Fault, Outcome, Progress, Request, StageError};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};

pub use child::stage_main;

use crate::pipeline::Stage;

/// Hidden subcommand that a stage process is started with.
pub const SUBCOMMAND: &str = "__stage";

/// The last line of a stage process on its event descriptor. Not a file, so that a full disk can be
/// reported too.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// It succeeded.
    Done(Outcome),
    /// It failed.
    Failed(StageError),
}

/// A running stage process.
#[derive(Debug)]
pub struct StageProcess {
    child: Child,
    group: Option<Pid>,
    /// Its end tells the child that this process is gone.
    _control: Option<ChildStdin>,
}

/// Handle to stop a stage process from another thread.
#[derive(Clone, Copy, Debug)]
pub struct Stopper(Option<Pid>);

impl Stopper {
    /// Asks the process group to stop.
    pub fn terminate(self) {
        self.signal(Signal::TERM);
    }

    /// Stops the process group.
    pub fn kill(self) {
        self.signal(Signal::KILL);
    }

    fn signal(self, signal: Signal) {
        if let Some(group) = self.0 {
            let _ = kill_process_group(group, signal);
        }
    }
}

impl StageProcess {
    /// Starts the process for a request written at `request_path`; `log` takes what it prints.
    ///
    /// # Errors
    /// [`StageError`] where no process can be started.
    pub fn start(
        stage: &Stage,
        request_path: &Path,
        log: &Path,
        gpus: Option<&str>,
    ) -> Result<Self, StageError> {
        let io = |doing, e| StageError::io(doing, log, &e);
        let stderr = File::options().append(true).open(log).map_err(|e| io("open", e))?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("pipe")
            .arg(SUBCOMMAND)
            .arg(request_path)
            .env_clear()
            .envs(environment::of(stage, gpus))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .process_group(0);
        let mut child = command.spawn().map_err(|e| {
            StageError::new(Fault::Environment, format!("could not start a stage process: {e}"))
        })?;
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let control = child.stdin.take();
        Ok(Self { child, group, _control: control })
    }

    /// Handle to stop it.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.group)
    }

    /// Hands every event to `sink` until the process ends; leaves nothing of its group behind.
    ///
    /// # Errors
    /// [`StageError`] as the stage reported it, or about the way it ended.
    pub fn wait(
        mut self,
        request: &Request,
        mut sink: impl FnMut(Progress),
    ) -> Result<Outcome, StageError> {
        let mut answer = None;
        if let Some(events) = self.child.stdout.take() {
            for line in BufReader::new(events).lines() {
                let Ok(line) = line else { break };
                match serde_json::from_str(&line) {
                    Ok(progress) => sink(progress),
                    Err(_) => answer = serde_json::from_str::<Answer>(&line).ok(),
                }
            }
        }
        let status = self.child.wait().map_err(StageError::internal)?;
        // Whatever the stage started and left behind.
        self.stopper().kill();
        match answer {
            Some(Answer::Done(outcome)) if status.success() => Ok(outcome),
            Some(Answer::Failed(error)) => Err(error),
            _ => Err(ended(request, status)),
        }
    }
}

/// The process ended without an answer.
fn ended(request: &Request, status: ExitStatus) -> StageError {
    let stage = &request.stage;
    match status.signal() {
        Some(9) => StageError::new(
            Fault::Memory,
            format!("the process of stage `{stage}` was killed (signal 9)"),
        )
        .help("the kernel does this when memory runs out; run again to go on from its last checkpoint"),
        Some(signal) => StageError::new(
            Fault::Internal,
            format!("the process of stage `{stage}` was ended by signal {signal}"),
        ),
        None => StageError::new(
            Fault::Internal,
            format!("the process of stage `{stage}` ended with {status} and no answer"),
        ),
    }
}
