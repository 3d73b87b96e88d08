//! The remote of a project, for the subcommands that have to do with it.

use std::sync::Arc;

use super::{CommandError, Project};
use crate::display;
use crate::remote::{Remote, RemoteError, Settings};

/// What the pipeline file and the environment say; none where neither names a remote.
pub(super) fn settings(project: &Project) -> Result<Option<Settings>, CommandError> {
    let Project { pipeline, .. } = project;
    Ok(Settings::new(pipeline.remote.as_ref(), &pipeline.dir)?)
}

/// The remote that a run asks or adds to. Where it cannot be opened, the run goes on without.
pub(super) fn of_run(project: &Project) -> Result<Option<Arc<Remote>>, CommandError> {
    let Some(settings) = settings(project)?.filter(|s| s.reads() || s.writes()) else {
        return Ok(None);
    };
    match Remote::open(settings) {
        Ok(remote) => Ok(Some(Arc::new(remote))),
        Err(error) => {
            display::note(&format!("warning: {error}"));
            Ok(None)
        }
    }
}

/// The remote that a command was asked to use.
pub(super) fn wanted(project: &Project) -> Result<Arc<Remote>, CommandError> {
    let settings = settings(project)?.ok_or_else(|| {
        RemoteError::config(
            "no remote is configured",
            "write `remote: {url: …}` into the pipeline file, or set PIPE_REMOTE",
        )
    })?;
    Ok(Arc::new(Remote::open(settings)?))
}
