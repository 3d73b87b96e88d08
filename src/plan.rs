//! What would run and why: graph + cache -> [`Plan`].
//!
//! Pure: reads the cache and the local inputs, writes nothing, opens no device and no network. The
//! runner asks the same [`Planner::decide`] once a stage's inputs are known, so that plan and run
//! cannot disagree.

mod change;
mod files;
mod history;
mod identity;
mod reason;
mod records;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use serde::Serialize;

pub(crate) use change::beside;
pub use files::FileChanges;
pub use history::Comparison;
pub use reason::Reason;
pub use records::Records;

use crate::cache::{Cache, CacheError};
use crate::digest::Fingerprint;
use crate::fingerprint::Identity;
use crate::gather;
use crate::graph::StageGraph;
use crate::lockfile::Lockfile;
use crate::pipeline::{InputRef, Pipeline, PipelineError, Stage};
use crate::record::{OutputRecord, Record};
use crate::threads;

/// A thread pays from this many stages on.
const STAGES_PER_THREAD: usize = 32;

/// What the user asked for beyond the selection.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// Stages that run although a record exists.
    pub force: BTreeSet<String>,
    /// Only these may run; everything upstream of them must be cached.
    pub only: Option<BTreeSet<String>>,
}

/// Plans one pipeline against one cache.
#[derive(Clone, Copy)]
pub struct Planner<'a> {
    /// The pipeline.
    pub pipeline: &'a Pipeline,
    /// Its graph.
    pub graph: &'a StageGraph,
    /// The cache.
    pub cache: &'a Cache,
    /// What the user asked for.
    pub options: &'a PlanOptions,
}

/// What would happen to every stage, producers first.
#[derive(Debug, Serialize)]
pub struct Plan {
    /// The stages that the selection needs.
    pub stages: Vec<PlannedStage>,
}

/// One stage of a plan.
#[derive(Debug, Serialize)]
pub struct PlannedStage {
    /// Stage.
    pub stage: String,
    /// Kind.
    pub kind: String,
    /// Fingerprint; none while an input is not known.
    pub fingerprint: Option<Fingerprint>,
    /// What would happen.
    #[serde(flatten)]
    pub decision: Decision,
}

/// What would happen to one stage.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "decision", rename_all = "kebab-case")]
pub enum Decision {
    /// Its artifacts are in the cache.
    Reuse {
        /// The execution that made them.
        #[serde(serialize_with = "by_reference")]
        record: Arc<Record>,
    },
    /// It runs.
    Run {
        /// Why.
        reasons: Vec<Reason>,
    },
    /// It runs unless the stages upstream turn out to make what they made before, or what is
    /// needed is in the cache after all.
    Maybe {
        /// Stages upstream that run or may run.
        waits_for: Vec<String>,
        /// What is known to differ from the last execution.
        reasons: Vec<Reason>,
    },
}

fn by_reference<S: serde::Serializer>(record: &Arc<Record>, to: S) -> Result<S::Ok, S::Error> {
    record.as_ref().serialize(to)
}

/// The decision on a stage whose inputs are known.
#[derive(Debug)]
pub struct Decided {
    /// Everything that can change its outputs.
    pub identity: Identity,
    /// The hash of that.
    pub fingerprint: Fingerprint,
    /// Reuse or run.
    pub decision: Decision,
}

/// A plan cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The pipeline asks for something that is not there.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// The cache or a local input cannot be read.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// `--only` leaves out a stage that is not cached.
    #[error("stage `{stage}` is not in the cache and `--only` keeps it from running")]
    NotCached {
        /// Stage.
        stage: String,
    },
}

impl Planner<'_> {
    /// The plan for some stages and everything upstream of them.
    ///
    /// # Errors
    /// [`PlanError`] for a missing local input or an unusable cache.
    pub fn plan(&self, selection: &[String], lock: &Lockfile) -> Result<Plan, PlanError> {
        let order = self.graph.with_upstream(selection);
        let mut known = Records::new();
        let mut planned: HashMap<String, PlannedStage> = HashMap::with_capacity(order.len());
        for wave in self.graph.waves(&order) {
            let stages: Vec<&Stage> =
                wave.into_iter().filter_map(|name| self.pipeline.stage(name)).collect();
            let plan = |stage: &&Stage| self.planned(stage, &known, lock);
            for found in threads::map(&stages, STAGES_PER_THREAD, plan) {
                let found = found?;
                if let Decision::Reuse { record } = &found.decision {
                    known.insert(found.stage.clone(), Arc::clone(record));
                }
                planned.insert(found.stage.clone(), found);
            }
        }
        Ok(Plan { stages: order.iter().filter_map(|name| planned.remove(name)).collect() })
    }

    fn planned(
        &self,
        stage: &Stage,
        known: &Records,
        lock: &Lockfile,
    ) -> Result<PlannedStage, PlanError> {
        let kind = stage.kind.clone();
        let waits_for = self.waits_for(stage, known);
        if !waits_for.is_empty() {
            self.local_inputs(stage)?;
            let reasons = self.known_reasons(stage, known, lock)?;
            let decision = if self.options.force.contains(&stage.name) {
                Decision::Run { reasons: vec![Reason::Forced] }
            } else {
                Decision::Maybe { waits_for, reasons }
            };
            return Ok(PlannedStage {
                stage: stage.name.clone(),
                kind,
                fingerprint: None,
                decision,
            });
        }
        let Decided { fingerprint, decision, .. } = self.decide(stage, known, lock)?;
        Ok(PlannedStage {
            stage: stage.name.clone(),
            kind,
            fingerprint: Some(fingerprint),
            decision,
        })
    }

    /// Names of all stages upstream.
    fn upstream(&self, stage: &Stage) -> Vec<String> {
        let mut names = self.graph.with_upstream(std::slice::from_ref(&stage.name));
        names.retain(|n| *n != stage.name);
        names
    }

    /// Stages whose records must be known before `stage` can be decided on.
    pub fn needed(&self, stage: &Stage) -> Vec<String> {
        if stage.signature.reads_records {
            self.upstream(stage)
        } else {
            stage.needs().map(str::to_owned).collect()
        }
    }

    /// Those of [`Planner::needed`] whose records are not known.
    pub fn waits_for(&self, stage: &Stage, known: &Records) -> Vec<String> {
        if stage.signature.reads_records {
            let mut waits_for = self.upstream(stage);
            waits_for.retain(|name| known.get(name).is_none());
            return waits_for;
        }
        let mut waits_for = BTreeSet::new();
        for input in stage.inputs.values() {
            match &input.from {
                InputRef::Gathered(gathered) if known.gathered(gathered).is_some() => {}
                from => {
                    waits_for.extend(from.stages().into_iter().filter(|n| known.get(n).is_none()));
                }
            }
        }
        waits_for.into_iter().map(str::to_owned).collect()
    }

    /// Decides on a stage whose upstream records are all known.
    ///
    /// # Errors
    /// [`PlanError`], also where `--only` forbids what is needed.
    pub fn decide(
        &self,
        stage: &Stage,
        records: &Records,
        lock: &Lockfile,
    ) -> Result<Decided, PlanError> {
        let identity = self.identity(stage, records, lock)?;
        let fingerprint = identity.fingerprint();
        let decision = self.decision(stage, &identity, fingerprint, records)?;
        let may_run = self.options.only.as_ref().is_none_or(|only| only.contains(&stage.name));
        if !may_run && matches!(decision, Decision::Run { .. }) {
            return Err(PlanError::NotCached { stage: stage.name.clone() });
        }
        Ok(Decided { identity, fingerprint, decision })
    }

    fn decision(
        &self,
        stage: &Stage,
        identity: &Identity,
        fingerprint: Fingerprint,
        records: &Records,
    ) -> Result<Decision, PlanError> {
        let run = |reason| Ok(Decision::Run { reasons: vec![reason] });
        if self.options.force.contains(&stage.name) {
            return run(Reason::Forced);
        }
        if stage.signature.lock_key.is_some() && identity.lock.is_none() {
            return run(Reason::SourceUnresolved);
        }
        let Some(record) = self.cache.record(&stage.kind, fingerprint)? else {
            let last = self.cache.last(&self.pipeline.name, &stage.name);
            let mut reasons = match last {
                Some(last) => self.changes(stage, &last.identity, identity, records),
                None => vec![self.without_history(stage)],
            };
            if let Some(what) = self.cache.unreadable(&stage.kind, fingerprint) {
                reasons.retain(|r| !matches!(r, Reason::NeverRan | Reason::NotCached));
                reasons.push(Reason::Unreadable { what });
            }
            let refused = self.cache.refusal(fingerprint);
            reasons.extend(refused.map(|what| Reason::RemoteRefused { what }));
            return Ok(Decision::Run { reasons });
        };
        if let Err(fault) = self.cache.check(&record) {
            if let Some(denial) = fault.denial(&stage.name) {
                return Err(denial.into());
            }
            return run(Reason::Incomplete { output: fault.output, what: fault.what });
        }
        for (key, wanted) in &stage.require {
            let found = record.provenance.get(key);
            if found != Some(wanted) {
                let found = found.cloned().unwrap_or_default();
                return run(Reason::Required { key: key.clone(), wanted: wanted.clone(), found });
            }
        }
        Ok(Decision::Reuse { record: Arc::new(record) })
    }

    /// What differs from the last execution, as far as inputs are known.
    fn known_reasons(
        &self,
        stage: &Stage,
        records: &Records,
        lock: &Lockfile,
    ) -> Result<Vec<Reason>, PlanError> {
        match self.cache.last(&self.pipeline.name, &stage.name) {
            Some(last) => self.known_changes(stage, &last.identity, records, lock),
            None => Ok(vec![self.without_history(stage)]),
        }
    }

    /// Why a stage runs that there is no earlier record of.
    fn without_history(&self, stage: &Stage) -> Reason {
        if self.cache.has_run(&self.pipeline.name, &stage.name) {
            Reason::NotCached
        } else {
            Reason::NeverRan
        }
    }

    /// What differs from an earlier identity; an input that is not known yet counts as unchanged.
    fn known_changes(
        &self,
        stage: &Stage,
        earlier: &Identity,
        records: &Records,
        lock: &Lockfile,
    ) -> Result<Vec<Reason>, PlanError> {
        let mut inputs = self.local_inputs(stage)?;
        for (name, input) in &stage.inputs {
            let old = earlier.inputs.get(name).copied();
            let new = match &input.from {
                InputRef::Local(_) => continue,
                InputRef::Gathered(gathered) => gather::digest(gathered, records).ok().or(old),
                InputRef::Output { stage: from, output } => match records.get(from) {
                    Some(record) => record.outputs.get(output).map(OutputRecord::identity),
                    None => old,
                },
            };
            inputs.extend(new.map(|digest| (name.clone(), digest)));
        }
        let upstream = earlier.upstream.clone();
        let identity = Self::without_inputs(stage, lock, inputs, upstream);
        let changed = identity.fingerprint() != earlier.fingerprint();
        Ok(if changed { self.changes(stage, earlier, &identity, records) } else { Vec::new() })
    }
}

impl Plan {
    /// Whether anything would or might run.
    pub fn would_run(&self) -> bool {
        self.stages.iter().any(|s| !matches!(s.decision, Decision::Reuse { .. }))
    }
}
