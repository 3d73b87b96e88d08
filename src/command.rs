//! The command line: one file a subcommand, and what they share.

mod cache;
mod completions;
mod doctor;
mod graph;
mod init;
mod keys;
mod kinds;
mod lock;
mod logs;
mod metrics;
mod outputs;
mod params;
mod plan;
mod predictions;
mod pull;
mod push;
mod remote;
mod revision;
mod run;
mod runs;
mod schema;
mod selection;
mod side;
mod watch;
mod why;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use contract::StageKind;
use miette::Diagnostic;

use crate::cache::{Cache, CacheError};
use crate::graph::StageGraph;
use crate::lockfile::{LockError, Lockfile};
use crate::pipeline::{Kinds, Overrides, Pipeline, PipelineError};
use crate::plan::{PlanError, PlanOptions, Planner};
use crate::remote::RemoteError;
use crate::{display, exit_code, process};

/// Default name of the pipeline file.
const PIPELINE_FILE: &str = "pipeline.yaml";

/// Reproduces a whole LLM fine-tuning experiment from one YAML file and reruns only what changed.
#[derive(Debug, Parser)]
#[command(name = "pipe", version, max_term_width = 100, disable_help_subcommand = true)]
#[command(after_help = "Exit codes: 0 done, 1 defect of pipe, 2 wrong usage, 3 wrong pipeline, \
    4 a stage failed, 5 cache unusable, 6 `plan --check` found work, \
    7 remote unusable, 130 interrupted")]
struct Cli {
    #[command(flatten)]
    shared: Shared,
    #[command(subcommand)]
    command: Command,
}

/// Options of every subcommand.
#[derive(Clone, Debug, clap::Args)]
struct Shared {
    /// Pipeline file [default: the nearest `pipeline.yaml` at or above the current folder]
    #[arg(short = 'f', long = "file", global = true, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Cache folder [default: `cache` at the root of the project]
    #[arg(long, global = true, value_name = "DIR", env = "PIPE_CACHE")]
    cache: Option<PathBuf>,
    /// Take the changes of a profile of the pipeline file
    #[arg(long, global = true, value_name = "NAME", env = "PIPE_PROFILE")]
    profile: Option<String>,
    /// Set a variable of the pipeline, or a param as `STAGE.PARAM=VALUE`; may be repeated
    #[arg(long = "set", global = true, value_name = "PATH=VALUE")]
    set: Vec<String>,
    /// Show the stages' log lines; twice: what the engine does
    #[arg(short = 'v', long = "verbose", global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Append what the engine does to a file, as JSON lines
    #[arg(long, global = true, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Print JSON for programs
    #[arg(long, global = true)]
    json: bool,
}

impl Shared {
    /// What `--profile` and `--set` say; an empty PIPE_PROFILE is none.
    fn overrides(&self) -> Overrides<'_> {
        let profile = self.profile.as_deref().filter(|name| !name.is_empty());
        Overrides { profile, set: &self.set }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run stages or targets, and whatever they need that is not cached
    Run(run::Args),
    /// Run again whenever an input file or the pipeline file changes
    Watch(watch::Args),
    /// Show what would run and why
    Plan(plan::Args),
    /// Explain why a stage would run, or what it would reuse
    Why(why::Args),
    /// List the cached outputs of a stage, or copy them out
    Outputs(outputs::Args),
    /// Draw the pipeline
    Graph(graph::Args),
    /// Print the log of a stage: of what it would reuse, else the newest
    Logs(logs::Args),
    /// Show or compare what stages measured
    #[command(subcommand)]
    Metrics(metrics::Args),
    /// Compare params
    #[command(subcommand)]
    Params(params::Args),
    /// Compare predictions row by row
    #[command(subcommand)]
    Predictions(predictions::Args),
    /// List, show or compare runs
    #[command(subcommand)]
    Runs(runs::Args),
    /// Write a commented starter pipeline
    Init(init::Args),
    /// Add what is cached to the remote
    Push(push::Args),
    /// Fetch what the remote has, and run nothing
    Pull(pull::Args),
    /// Make a key that signs records, or show its public half
    Keys(keys::Args),
    /// Verify, repair, list, measure, pin or collect what the cache holds
    #[command(subcommand)]
    Cache(cache::Args),
    /// List the stage kinds, or the params, inputs and outputs of one
    Kinds(kinds::Args),
    /// Check what the host and the cache's file system can do
    Doctor(doctor::Args),
    /// Print the completions for a shell
    Completions(completions::Args),
    /// Merge lock files
    #[command(subcommand)]
    Lock(lock::Args),
    /// Print the JSON Schema of the pipeline file, for editors
    Schema(schema::Args),
}

/// Whatever a subcommand can fail with.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error("{message}")]
    Usage { message: String, help: Option<String> },
    #[error("stage `{stage}` is not in the cache and `--only` keeps it from running")]
    NotCached { stage: String },
}

impl CommandError {
    fn usage(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), help: Some(help.into()) }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Pipeline(_) | Self::Lock(LockError::Content { .. }) => exit_code::BAD_PIPELINE,
            Self::Cache(_) | Self::Lock(LockError::Io { .. }) => exit_code::CACHE,
            Self::Remote(RemoteError::Config { .. })
            | Self::Usage { .. }
            | Self::NotCached { .. } => exit_code::USAGE,
            Self::Remote(_) => exit_code::REMOTE,
        }
    }
}

impl Diagnostic for CommandError {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        let help = match self {
            Self::Cache(error) => error.help(),
            Self::Usage { help, .. } => help.clone(),
            Self::Remote(RemoteError::Config { help, .. }) => Some(help.clone()),
            Self::NotCached { .. } => Some("run it first, or leave `--only` out".to_owned()),
            _ => None,
        };
        help.map(|h| Box::new(h) as Box<dyn fmt::Display>)
    }
}

impl From<PlanError> for CommandError {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Pipeline(error) => Self::Pipeline(error),
            PlanError::Cache(error) => Self::Cache(error),
            PlanError::NotCached { stage } => Self::NotCached { stage },
        }
    }
}

/// What a subcommand works with.
struct Context<'a> {
    shared: Shared,
    kinds: Kinds<'a>,
}

/// A loaded pipeline with its graph and cache.
struct Project {
    pipeline: Pipeline,
    graph: StageGraph,
    cache: Cache,
    lock: Lockfile,
}

impl Project {
    fn planner<'a>(&'a self, options: &'a PlanOptions) -> Planner<'a> {
        let Self { pipeline, graph, cache, .. } = self;
        Planner { pipeline, graph, cache, options }
    }

    /// The stage called `name`.
    fn stage(&self, name: &str) -> Result<&crate::pipeline::Stage, CommandError> {
        let stages = self.pipeline.points.resolve(name);
        let canonical = match stages.as_slice() {
            [one] => one.as_str(),
            _ => name,
        };
        self.pipeline.stage(canonical).ok_or_else(|| {
            let names = self.pipeline.stages.iter().map(|s| s.name.as_str());
            let points = names.filter(|s| s.contains('@') == name.contains('@'));
            let help = crate::pipeline::suggest(name, points);
            let message = match stages.len() {
                0 | 1 => format!("no stage `{name}`"),
                several => format!("`{name}` is {several} stages: name one"),
            };
            CommandError::Usage { message, help }
        })
    }
}

impl Context<'_> {
    fn project(&self) -> Result<Project, CommandError> {
        let path = self.pipeline_path()?;
        let pipeline = Pipeline::load(&path, self.shared.overrides(), self.kinds)?;
        let graph = StageGraph::new(&pipeline);
        let cache = self.cache_of(&pipeline)?;
        let lock = Lockfile::beside(&path)?;
        Ok(Project { pipeline, graph, cache, lock })
    }

    fn pipeline_path(&self) -> Result<PathBuf, CommandError> {
        if let Some(file) = &self.shared.file {
            return Ok(file.clone());
        }
        let here = current_dir()?;
        here.ancestors()
            .map(|dir| dir.join(PIPELINE_FILE))
            .find(|path| path.is_file())
            .map(|path| path.strip_prefix(&here).map(Path::to_owned).unwrap_or(path))
            .ok_or_else(|| {
                CommandError::usage(
                    format!("no `{PIPELINE_FILE}` in this folder or above it"),
                    "`pipe init` writes a starter pipeline; `-f FILE` names another",
                )
            })
    }

    /// The cache of a pipeline: `--cache`, else its profile's, else [`Context::cache`].
    fn cache_of(&self, pipeline: &Pipeline) -> Result<Cache, CommandError> {
        let profile = pipeline.profile.as_ref().filter(|_| self.shared.cache.is_none());
        let cache = match profile.and_then(|p| p.cache.as_ref()) {
            Some(dir) => Cache::open(&pipeline.dir.join(dir))?,
            None => self.cache(&pipeline.dir)?,
        };
        Ok(cache.of_project(&pipeline.name, &pipeline.dir))
    }

    /// The cache for a pipeline in `dir`: `--cache`, else `cache` in the nearest folder at or
    /// above it that holds `.git` or a `pipeline.yaml`.
    fn cache(&self, dir: &Path) -> Result<Cache, CommandError> {
        if let Some(root) = &self.shared.cache {
            return Ok(Cache::open(root)?);
        }
        let is_root = |d: &&Path| d.join(".git").exists() || d.join(PIPELINE_FILE).is_file();
        let root = dir.ancestors().find(is_root).unwrap_or(dir);
        Ok(Cache::open(&root.join("cache"))?)
    }
}

fn current_dir() -> Result<PathBuf, CommandError> {
    std::env::current_dir().map_err(|e| {
        CommandError::usage(format!("no current folder: {e}"), "change to a folder that exists")
    })
}

/// The whole program, with the stage kinds that the binary knows.
pub fn main(kinds: &[&dyn StageKind]) -> ExitCode {
    let kinds = Kinds(kinds);
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|first| first == process::SUBCOMMAND)
        && let Some(request) = args.next()
    {
        return process::stage_main(kinds, Path::new(&request));
    }
    ExitCode::from(exit_code::of(|| command_line(kinds), display::defect))
}

/// What the command line asks for; its exit code.
fn command_line(kinds: Kinds<'_>) -> u8 {
    let cli = match Cli::try_parse_from(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are data; clap prints them where they belong.
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(exit_code::USAGE);
        }
    };
    if let Err(error) = trace(&cli.shared) {
        return report(&error);
    }
    let context = Context { shared: cli.shared, kinds };
    let result = match cli.command {
        Command::Run(args) => run::run(&context, &args),
        Command::Watch(args) => watch::run(&context, &args),
        Command::Plan(args) => plan::run(&context, &args),
        Command::Why(args) => why::run(&context, &args),
        Command::Outputs(args) => outputs::run(&context, &args),
        Command::Graph(args) => graph::run(&context, &args),
        Command::Logs(args) => logs::run(&context, &args),
        Command::Metrics(args) => metrics::run(&context, &args),
        Command::Params(args) => params::run(&context, &args),
        Command::Predictions(args) => predictions::run(&context, &args),
        Command::Runs(args) => runs::run(&context, &args),
        Command::Init(args) => init::run(&context, &args),
        Command::Push(args) => push::run(&context, &args),
        Command::Pull(args) => pull::run(&context, &args),
        Command::Keys(args) => keys::run(&context, &args),
        Command::Cache(args) => cache::run(&context, &args),
        Command::Kinds(args) => kinds::run(&context, &args),
        Command::Doctor(args) => doctor::run(&context, &args),
        Command::Completions(args) => Ok(completions::run(&args)),
        Command::Lock(args) => lock::run(&args),
        Command::Schema(args) => Ok(schema::run(&context, &args)),
    };
    result.unwrap_or_else(|error| report(&error))
}

/// Shows an error; the exit code that it is worth.
fn report(error: &CommandError) -> u8 {
    if let CommandError::Pipeline(error) = error {
        error.problems().iter().for_each(|problem| display::report(problem));
        return exit_code::BAD_PIPELINE;
    }
    display::report(error);
    error.exit_code()
}

/// Sends what the engine does to standard error (`PIPE_LOG`, `-vv`) or to a file (`--log-file`).
fn trace(shared: &Shared) -> Result<(), CommandError> {
    use tracing_subscriber::{EnvFilter, fmt, prelude::*};

    let filter = std::env::var_os("PIPE_LOG").and_then(|v| v.into_string().ok());
    if filter.is_none() && shared.verbose < 2 && shared.log_file.is_none() {
        return Ok(());
    }
    let filter = || {
        let text = filter.clone().unwrap_or_else(|| "pipe=debug".to_owned());
        EnvFilter::try_new(&text).map_err(|e| {
            CommandError::usage(
                format!("PIPE_LOG `{text}` is no filter: {e}"),
                "for example `pipe=debug`",
            )
        })
    };
    let file = match &shared.log_file {
        None => None,
        Some(path) => {
            let file = std::fs::File::options().append(true).create(true).open(path);
            let file = file.map_err(|e| {
                let message = format!("could not open {}: {e}", path.display());
                CommandError::usage(message, "`--log-file` takes a file that can be written")
            })?;
            Some(
                fmt::layer().json().with_writer(std::sync::Mutex::new(file)).with_filter(filter()?),
            )
        }
    };
    let people = if std::env::var_os("PIPE_LOG").is_some() || shared.verbose >= 2 {
        Some(fmt::layer().with_writer(std::io::stderr).with_filter(filter()?))
    } else {
        None
    };
    let _ = tracing_subscriber::registry().with(file).with(people).try_init();
    Ok(())
}
