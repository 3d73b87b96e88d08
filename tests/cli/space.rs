//! A folder with a pipeline, a cache and a count of how often each stage really ran.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub(crate) struct Space {
    dir: tempfile::TempDir,
    project: PathBuf,
}

/// Two sources, a join, and a stage after it. Each stage adds a line to `$RUNS/<stage>`.
pub(crate) const DIAMOND: &str = r"
params: {left: one, right: two}
stages:
  left:
    kind: command
    pass_env: [RUNS]
    params: {run: 'echo x >> $RUNS/left; echo ${left} > $PIPE_OUTPUT_OUT', outputs: {out: {file: left.txt}}}
  right:
    kind: command
    pass_env: [RUNS]
    params: {run: 'echo x >> $RUNS/right; echo ${right} > $PIPE_OUTPUT_OUT', outputs: {out: {file: right.txt}}}
  join:
    kind: command
    pass_env: [RUNS]
    inputs: {a: left, b: right.out}
    params: {run: 'echo x >> $RUNS/join; cat $PIPE_INPUT_A $PIPE_INPUT_B > $PIPE_OUTPUT_OUT', outputs: {out: {file: join.txt}}}
  last:
    kind: command
    pass_env: [RUNS]
    inputs: {joined: join}
    params: {run: 'echo x >> $RUNS/last; wc -c < $PIPE_INPUT_JOINED > $PIPE_OUTPUT_OUT', outputs: {out: {file: last.txt}}}
";

/// What a run printed and how it ended.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    #[track_caller]
    pub(crate) fn code(self, expected: i32) -> Self {
        assert_eq!(self.code, Some(expected), "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }
}

impl Space {
    pub(crate) fn new(pipeline: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let project = dir.path().join("project");
        fs::create_dir_all(&project).unwrap();
        fs::create_dir_all(dir.path().join("runs")).unwrap();
        let space = Self { dir, project };
        space.write("pipeline.yaml", pipeline);
        space
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.project.join(name)
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.project.join("cache")
    }

    pub(crate) fn outside(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn replace(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.path("pipeline.yaml")).unwrap();
        assert!(text.contains(from), "{from}");
        self.write("pipeline.yaml", &text.replace(from, to));
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipe"));
        command
            .args(args)
            .current_dir(&self.project)
            .env("HOME", self.dir.path())
            .env("RUNS", self.dir.path().join("runs"))
            .env_remove("XDG_CACHE_HOME")
            .env_remove("PIPE_CACHE")
            .env_remove("PIPE_PROFILE")
            .env_remove("PIPE_LOG");
        command
    }

    pub(crate) fn pipe(&self, args: &[&str]) -> Ran {
        ran(&self.command(args).output().unwrap())
    }

    /// How often a stage really ran.
    pub(crate) fn runs(&self, stage: &str) -> usize {
        let path = self.dir.path().join("runs").join(stage);
        fs::read_to_string(path).map_or(0, |text| text.lines().count())
    }

    pub(crate) fn all_runs(&self) -> [usize; 4] {
        ["left", "right", "join", "last"].map(|stage| self.runs(stage))
    }

    /// Every object of the cache.
    pub(crate) fn objects(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for dir in fs::read_dir(self.cache().join("objects-v1")).unwrap().flatten() {
            found.extend(fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.path()));
        }
        found.sort();
        found
    }
}

/// The same command, as the last arguments of another program.
pub(crate) fn through(program: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(program[0]);
    wrapped.args(&program[1..]).arg(command.get_program()).args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        wrapped.current_dir(folder);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    wrapped
}

pub(crate) fn ran(output: &Output) -> Ran {
    Ran {
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
