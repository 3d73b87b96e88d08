//! Which stages may start, and what is decided on each of them.

use std::collections::BTreeMap;

use contract::StageError;

use super::execute::Job;
use super::{Run, Running, slots};
use crate::cache::{CacheError, unique_name};
use crate::lockfile::Lockfile;
use crate::pipeline::Stage;
use crate::plan::{Decided, Decision, PlanError};

impl<'a> Run<'a> {
    /// Starts what can be started, and takes reused and skipped stages off the list.
    pub(super) fn start_ready(
        &mut self,
        lock: &Lockfile,
        spawn: &dyn Fn(Job<'a>),
    ) -> Result<(), PlanError> {
        loop {
            let before = self.open.len();
            for name in std::mem::take(&mut self.open) {
                if !self.try_start(&name, lock, spawn)? {
                    self.open.push(name);
                }
            }
            if self.open.len() == before {
                return Ok(());
            }
        }
    }

    /// Whether stages of this run that go on leave too little of what a stage asks for: as many GPUs
    /// as there are, and one of everything else.
    fn is_busy(&self, asked: &BTreeMap<String, u32>) -> bool {
        let running = || self.running.values().map(|running| &running.resources);
        let gpus = slots::Wanted::of(asked).count();
        let held: usize = running().map(|held| slots::Wanted::of(held).count()).sum();
        let no_gpu = gpus > 0 && held > 0 && held + gpus > slots::gpus().len();
        let others = asked.keys().filter(|name| *name != "gpu");
        no_gpu || others.clone().any(|name| running().any(|held| held.contains_key(name)))
    }

    /// Whether the stage is off the list: reused, started, skipped or failed.
    fn try_start(
        &mut self,
        name: &str,
        lock: &Lockfile,
        spawn: &dyn Fn(Job<'a>),
    ) -> Result<bool, PlanError> {
        let Some(stage) = self.planner.pipeline.stage(name) else { return Ok(true) };
        let waits_for = self.planner.waits_for(stage, &self.records);
        if let Some(cause) = waits_for.iter().find_map(|n| self.stopped.get(n)).cloned() {
            self.skip(name, cause);
            return Ok(true);
        }
        let stopping =
            self.interrupted_at.is_some() || (!self.stopped.is_empty() && !self.options.keep_going);
        let busy = !self.options.fetch_only && self.is_busy(&stage.signature.resources);
        let full = self.running.len() >= self.options.jobs;
        // A full house must not keep cached stages from being seen as such; they cost nothing
        // and are decided when a place is free.
        if !waits_for.is_empty() || stopping || busy || full {
            return Ok(false);
        }
        match self.decide(stage, lock) {
            Ok(Decided { decision: Decision::Maybe { .. }, .. }) => return Ok(false),
            Ok(Decided { decision: Decision::Reuse { record }, .. }) => self.reuse(stage, record),
            Ok(decided) => {
                if let Err(error) = self.start(stage, decided, spawn) {
                    self.fail(name, error.into(), None);
                }
            }
            // What runs goes on; where nothing does, the error has its own report and exit code.
            Err(error) if self.begun || (self.options.keep_going && !self.options.fetch_only) => {
                self.fail(name, failure(error), None);
            }
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    fn decide(&self, stage: &Stage, lock: &Lockfile) -> Result<Decided, PlanError> {
        let decided = self.planner.decide(stage, &self.records, lock)?;
        match &decided.decision {
            // Collected this very moment.
            Decision::Reuse { record } if !self.planner.cache.keep(record) => {
                self.planner.decide(stage, &self.records, lock)
            }
            _ => Ok(decided),
        }
    }

    fn start(
        &mut self,
        stage: &'a Stage,
        decided: Decided,
        spawn: &dyn Fn(Job<'a>),
    ) -> Result<(), CacheError> {
        let log = self.planner.cache.create_log(&unique_name(), &stage.name)?;
        let reasons = match &decided.decision {
            Decision::Run { reasons } => reasons.iter().map(ToString::to_string).collect(),
            _ => Vec::new(),
        };
        let resources = stage.signature.resources.clone();
        let fingerprint = decided.fingerprint;
        let running = Running { stopper: None, resources, log: log.clone(), fingerprint, reasons };
        self.running.insert(stage.name.clone(), running);
        self.begun = true;
        spawn(Job {
            stage,
            identity: decided.identity,
            records: self.records.of(self.planner.needed(stage).iter().map(String::as_str)),
            log,
            forced: self.planner.options.force.contains(&stage.name),
            remote: self.options.read.clone(),
            fetch_only: self.options.fetch_only,
        });
        Ok(())
    }
}

/// What a decision that cannot be made is as the failure of its stage.
fn failure(error: PlanError) -> StageError {
    match error {
        PlanError::Cache(error) => error.into(),
        PlanError::Pipeline(error) => {
            let help = error.problems().iter().find_map(miette::Diagnostic::help);
            let help = help.map(|help| help.to_string());
            StageError { help, ..StageError::input(error.to_string()) }
        }
        PlanError::NotCached { .. } => {
            StageError::input(error.to_string()).help("run it first, or leave `--only` out")
        }
    }
}
