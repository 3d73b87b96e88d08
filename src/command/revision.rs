//! The pipeline as it was at a git revision: its file, its lock file and its local inputs.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use super::{CommandError, Context, Project};
use crate::graph::StageGraph;
use crate::lockfile::Lockfile;
use crate::pipeline::{InputRef, Pipeline};

/// A project at a revision.
pub(super) struct Revision {
    project: Project,
    /// Holds the local inputs.
    _files: Option<Files>,
}

impl Revision {
    pub(super) fn project(&self) -> &Project {
        &self.project
    }
}

/// A folder of our own, gone when the value is dropped.
struct Files(PathBuf);

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Context<'_> {
    /// The project at a revision; none where git knows no such revision.
    pub(super) fn revision(&self, name: &str) -> Result<Option<Revision>, CommandError> {
        let path = self.pipeline_path()?;
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        let commit = format!("{name}^{{commit}}");
        let verify = ["rev-parse", "--verify", "--quiet", "--end-of-options", &commit];
        let Some(hash) = git(&dir, &verify)?.map(|out| text(&out).trim().to_owned()) else {
            return Ok(None);
        };
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(yaml) = git(&dir, &["show", &format!("{hash}:./{file}")])? else {
            return Err(CommandError::usage(
                format!("revision `{name}` has no file {file}"),
                "`-f FILE` names another pipeline file",
            ));
        };
        let (overrides, kinds) = (self.shared.overrides(), self.kinds);
        let mut pipeline = Pipeline::parse(&path, dir.clone(), &text(&yaml), overrides, kinds)?;
        let files = local_inputs(&mut pipeline, &dir, &hash)?;
        let lock_path = path.with_extension("lock");
        let lock_name = lock_path.file_name().unwrap_or_default().to_string_lossy();
        let lock = match git(&dir, &["show", &format!("{hash}:./{lock_name}")])? {
            Some(content) => Lockfile::parse(lock_path, &content)?,
            None => Lockfile::empty(lock_path),
        };
        let graph = StageGraph::new(&pipeline);
        let cache = self.cache_of(&pipeline)?;
        let project = Project { pipeline, graph, cache, lock };
        Ok(Some(Revision { project, _files: files }))
    }
}

/// Points the local inputs at their contents in the commit. What git does not track is taken as
/// it is now: there is no other.
fn local_inputs(
    pipeline: &mut Pipeline,
    dir: &Path,
    hash: &str,
) -> Result<Option<Files>, CommandError> {
    let mut files = None;
    for input in pipeline.stages.iter_mut().flat_map(|s| s.inputs.values_mut()) {
        let InputRef::Local(path) = &mut input.from else { continue };
        let inside =
            path.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
        let Some(shown) = path.to_str().filter(|_| inside) else { continue };
        if git(dir, &["cat-file", "-e", &format!("{hash}:./{shown}")])?.is_none() {
            continue;
        }
        let Files(to) = match &files {
            Some(files) => files,
            None => files.insert(folder()?),
        };
        if !to.join(&*path).exists() {
            export(dir, hash, shown, to)?;
        }
        *path = to.join(&*path);
    }
    Ok(files)
}

fn folder() -> Result<Files, CommandError> {
    let dir = std::env::temp_dir().join(format!("pipe-{}", crate::cache::unique_name()));
    fs::create_dir(&dir).map_err(|e| {
        let message = format!("could not create {}: {e}", dir.display());
        CommandError::usage(message, "TMPDIR names another place")
    })?;
    Ok(Files(dir))
}

/// Unpacks one path of a commit.
fn export(dir: &Path, hash: &str, path: &str, to: &Path) -> Result<(), CommandError> {
    let failed = |what: String| {
        let message = format!("could not read {path} of commit {}: {what}", &hash[..12]);
        CommandError::usage(message, "`git archive` and `tar` must work here")
    };
    let mut archive = Command::new("git")
        .arg("-C")
        .arg(dir)
        .args(["archive", "--format=tar", hash, "--", path])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    let Some(stream) = archive.stdout.take() else { return Err(failed("no output".to_owned())) };
    let mut tar = Command::new("tar");
    let unpacked = tar.arg("-xC").arg(to).stdin(stream).output();
    let archived = archive.wait();
    let unpacked = unpacked.map_err(|e| failed(e.to_string()))?;
    let archived = archived.map_err(|e| failed(e.to_string()))?;
    if !unpacked.status.success() || !archived.success() {
        return Err(failed(text(&unpacked.stderr).trim().to_owned()));
    }
    Ok(())
}

/// What a git command prints; none where it fails.
fn git(dir: &Path, args: &[&str]) -> Result<Option<Vec<u8>>, CommandError> {
    let run = Command::new("git").arg("-C").arg(dir).args(args).stdin(Stdio::null()).output();
    match run {
        Ok(output) => Ok(output.status.success().then_some(output.stdout)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(CommandError::usage(format!("could not start git: {e}"), "is it installed?")),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
