//! A pipeline file: YAML text to [`Pipeline`], every fault located in its source.
//!
//! Loading reads the one file and nothing else; whether local inputs exist is the planner's
//! question.

mod expand;
mod matrix;
mod points;
mod problem;
mod profile;
mod read;
mod variables;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use contract::{OutputSpec, Signature, StageKind};
use serde_json::Value;

pub use points::{PointParams, Points, plain_stage, point_label};
pub(crate) use read::{STAGE_KEYS, TOP_KEYS};

pub use problem::{PipelineError, Problem, Sources, suggest};
pub use profile::Profile;

use crate::yaml::Place;

/// The stage kinds that this binary knows.
#[derive(Clone, Copy)]
pub struct Kinds<'a>(pub &'a [&'a dyn StageKind]);

impl<'a> Kinds<'a> {
    /// The kind called `name`.
    pub fn get(&self, name: &str) -> Option<&'a dyn StageKind> {
        self.0.iter().copied().find(|k| k.name() == name)
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + use<'a> {
        self.0.iter().map(|k| k.name())
    }
}

/// What is changed of a pipeline file when it is loaded.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overrides<'a> {
    /// The profile that is taken.
    pub profile: Option<&'a str>,
    /// `--set` arguments, which come after the profile.
    pub set: &'a [String],
}

impl<'a> From<&'a Vec<String>> for Overrides<'a> {
    fn from(set: &'a Vec<String>) -> Self {
        Self { profile: None, set }
    }
}

/// A validated pipeline.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// The file.
    pub path: PathBuf,
    /// Its folder; local inputs are relative to it.
    pub dir: PathBuf,
    /// `name:`, else the file's stem.
    pub name: String,
    /// Stages in file order.
    pub stages: Vec<Stage>,
    /// Targets by name, each a list of stages or other targets.
    pub targets: BTreeMap<String, Vec<String>>,
    /// Names of the points of its sweeps.
    pub points: Points,
    /// The shared cache that it names.
    pub remote: Option<crate::remote::RemoteConfig>,
    /// The profile that it was loaded with.
    pub profile: Option<Profile>,
    /// Texts, for reports.
    pub sources: Sources,
    /// Position in `stages` by name.
    index: HashMap<String, usize>,
}

/// One stage.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Name.
    pub name: String,
    /// Where the name was written.
    pub place: Place,
    /// Kind.
    pub kind: String,
    /// Version of the kind.
    pub version: String,
    /// What it takes and makes.
    pub signature: Signature,
    /// Wired inputs by name.
    pub inputs: BTreeMap<String, Input>,
    /// Declared environment: part of the fingerprint. `None` takes the caller's value.
    pub env: BTreeMap<String, Option<String>>,
    /// Environment variables passed on and never stored; a trailing `*` matches any rest.
    pub pass_env: Vec<String>,
    /// What the provenance of a reused record must hold.
    pub require: BTreeMap<String, Value>,
    /// For people.
    pub description: Option<String>,
}

/// A wired input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Where it comes from.
    pub from: InputRef,
    /// Where that was written.
    pub place: Place,
}

/// Where an input comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputRef {
    /// An output of another stage.
    Output {
        /// Stage.
        stage: String,
        /// Output.
        output: String,
    },
    /// A file or folder, relative to the pipeline file.
    Local(PathBuf),
    /// One output of every point of a stage, as a folder.
    Gathered(Gathered),
}

/// One output of every point of a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gathered {
    /// The plain stage.
    pub stage: String,
    /// Output.
    pub output: String,
    /// The points, in the order of the matrix; shared by the points of the stage that gathers.
    pub members: Arc<[Member]>,
}

/// One point of a gathered stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Name of the point's stage.
    pub stage: String,
    /// Its swept params, the unchanged ones included.
    pub params: PointParams,
}

impl InputRef {
    /// Every stage that it reads.
    pub fn stages(&self) -> Vec<&str> {
        match self {
            Self::Output { stage, .. } => vec![stage],
            Self::Local(_) => Vec::new(),
            Self::Gathered(gathered) if gathered.members.is_empty() => vec![&gathered.stage],
            Self::Gathered(gathered) => gathered.members.iter().map(|m| &*m.stage).collect(),
        }
    }
}

impl Stage {
    /// Names of the stages whose outputs it reads, each once.
    pub fn needs(&self) -> impl Iterator<Item = &str> {
        let stages = self.inputs.values().flat_map(|input| input.from.stages());
        stages.collect::<BTreeSet<_>>().into_iter()
    }

    /// The output called `name`.
    pub fn output(&self, name: &str) -> Option<&OutputSpec> {
        self.signature.outputs.iter().find(|o| o.name == name)
    }
}

impl Pipeline {
    /// Reads and validates a pipeline file.
    ///
    /// # Errors
    /// [`PipelineError`] with every problem found.
    pub fn load<'a>(
        path: &Path,
        overrides: impl Into<Overrides<'a>>,
        kinds: Kinds<'_>,
    ) -> Result<Self, PipelineError> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            let help = (error.kind() == std::io::ErrorKind::NotFound).then(|| {
                "`pipe init` writes a starter pipeline; `-f FILE` names another".to_owned()
            });
            PipelineError::plain(format!("could not read {}: {error}", path.display()), help)
        })?;
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = std::path::absolute(dir)
            .map_err(|e| PipelineError::plain(format!("no current folder: {e}"), None))?;
        Self::parse(path, dir, &text, overrides, kinds)
    }

    /// Validates the text of a pipeline file.
    ///
    /// # Errors
    /// [`PipelineError`] with every problem found.
    pub fn parse<'a>(
        path: &Path,
        dir: PathBuf,
        text: &str,
        overrides: impl Into<Overrides<'a>>,
        kinds: Kinds<'_>,
    ) -> Result<Self, PipelineError> {
        read::pipeline(path, dir, text, overrides.into(), kinds)
    }

    /// The stage called `name`.
    pub fn stage(&self, name: &str) -> Option<&Stage> {
        self.index.get(name).map(|i| &self.stages[*i])
    }

    /// The stages that some names, stages or targets, stand for; without names the target
    /// `default`, else every stage.
    ///
    /// # Errors
    /// [`PipelineError`] for a name that is neither, with a suggestion.
    pub fn select(&self, names: &[String]) -> Result<Vec<String>, PipelineError> {
        let mut selected = Selected::default();
        if !names.is_empty() {
            for name in names {
                self.resolve_name(name, &mut selected)?;
            }
        } else if self.targets.contains_key("default") {
            self.resolve_name("default", &mut selected)?;
        } else {
            return Ok(self.stages.iter().map(|s| s.name.clone()).collect());
        }
        Ok(selected.names)
    }

    fn resolve_name(&self, name: &str, into: &mut Selected) -> Result<(), PipelineError> {
        if name.contains('@') && !self.targets.contains_key(name) {
            self.resolve_points(name)?.into_iter().for_each(|point| into.add(point));
            return Ok(());
        }
        if self.stage(name).is_some() {
            into.add(name.to_owned());
            return Ok(());
        }
        if let Some(members) = self.targets.get(name) {
            return members.iter().try_for_each(|member| self.resolve_name(member, into));
        }
        let known = self.stages.iter().map(|s| s.name.as_str()).filter(|s| !s.contains('@'));
        let help = suggest(name, known.chain(self.targets.keys().map(String::as_str)));
        let message = format!("no stage or target `{name}` in {}", self.path.display());
        Err(PipelineError::plain(message, help))
    }

    /// The stages that the name of a point, or `STAGE@*`, stands for.
    fn resolve_points(&self, name: &str) -> Result<Vec<String>, PipelineError> {
        let found = self.points.resolve(name);
        if !found.is_empty() && found.iter().all(|p| self.stage(p).is_some()) {
            return Ok(found);
        }
        let plain = plain_stage(name);
        let points = self.points.of(plain).iter().map(String::as_str);
        let spelled = found.first().map_or(name, String::as_str);
        let help = match self.stage(plain) {
            Some(_) if points.len() == 0 => Some("no `matrix` reaches that stage".to_owned()),
            Some(_) => suggest(spelled, points),
            None => {
                let names = self.stages.iter().map(|s| s.name.as_str());
                suggest(plain, names.filter(|s| !s.contains('@')))
            }
        };
        let message = format!("no point `{name}` in {}", self.path.display());
        Err(PipelineError::plain(message, help))
    }
}

/// Names in the order in which they were first given.
#[derive(Default)]
struct Selected {
    names: Vec<String>,
    known: HashSet<String>,
}

impl Selected {
    fn add(&mut self, name: String) {
        if self.known.insert(name.clone()) {
            self.names.push(name);
        }
    }
}

#[cfg(test)]
mod tests;
