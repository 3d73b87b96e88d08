//! The child's side of a stage process.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::ExitCode;

use contract::{Fault, Outcome, PROTOCOL, Reporter, Request, StageError};
use rustix::process::{Signal, getpid, kill_process_group};

use super::Answer;
use crate::pipeline::Kinds;

/// Runs the stage that `request_path` describes, as the hidden subcommand [`super::SUBCOMMAND`].
/// The answer is the last line on the event descriptor.
pub fn stage_main(kinds: Kinds<'_>, request_path: &Path) -> ExitCode {
    let descriptors = take_descriptors().map_err(std::io::Error::from);
    let (events, mut last) = match descriptors.and_then(|e| Ok((e.try_clone()?, e))) {
        Ok(events) => events,
        Err(error) => {
            tracing::error!(%error, "no descriptors");
            return ExitCode::FAILURE;
        }
    };
    let answer = match answer(kinds, request_path, events) {
        Ok(outcome) => Answer::Done(outcome),
        Err(error) => Answer::Failed(error),
    };
    let mut line = serde_json::to_vec(&answer).unwrap_or_default();
    line.push(b'\n');
    if last.write_all(&line).is_ok() && matches!(answer, Answer::Done(_)) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Moves the control pipe and the event pipe to descriptors that children of this process do not
/// inherit, and points standard input and output elsewhere.
fn take_descriptors() -> rustix::io::Result<File> {
    let control = File::from(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?);
    let events = File::from(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?);
    if let Ok(nothing) = File::open("/dev/null") {
        rustix::stdio::dup2_stdin(&nothing)?;
    }
    rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
    std::thread::spawn(move || watch(control));
    Ok(events)
}

/// Ends the whole process group when the parent is gone.
fn watch(mut control: File) {
    let mut byte = [0];
    loop {
        match control.read(&mut byte) {
            Ok(0) => break,
            Err(e) if e.kind() != std::io::ErrorKind::Interrupted => break,
            _ => {}
        }
    }
    let _ = kill_process_group(getpid(), Signal::KILL);
    std::process::abort();
}

fn answer(kinds: Kinds<'_>, path: &Path, events: File) -> Result<Outcome, StageError> {
    let text = fs::read(path).map_err(|e| StageError::io("read", path, &e))?;
    let request: Request = serde_json::from_slice(&text).map_err(StageError::internal)?;
    if request.protocol != PROTOCOL {
        return Err(StageError::internal("the request was written by another version of pipe"));
    }
    let kind = kinds
        .get(&request.kind)
        .ok_or_else(|| StageError::internal(format!("no stage kind `{}`", request.kind)))?;
    let mut reporter = Reporter::new(Box::new(events)).with_log(Box::new(std::io::stderr()));
    let run = AssertUnwindSafe(|| kind.run(&request, &mut reporter));
    std::panic::catch_unwind(run).unwrap_or_else(|panic| {
        let said = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(StageError::new(Fault::Internal, format!("stage `{}` panicked: {said}", request.stage))
            .help("this is a defect of pipe; the log has the place"))
    })
}
