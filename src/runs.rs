//! Runs as the cache remembers them: when, what was asked, and what ran, was reused or failed.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::digest::Fingerprint;
use crate::event::Event;
use crate::pipeline::Pipeline;

/// One run that did something: `runs/<id>.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// UTC time and a few random digits, such as `20260131-142530.123-9f3c`: sorts by time.
    pub id: String,
    /// Unix time in seconds.
    pub started_at: u64,
    /// Wall time.
    pub seconds: f64,
    /// Name of the pipeline.
    pub pipeline: String,
    /// Stages and targets as they were asked for; empty for the default.
    pub selection: Vec<String>,
    /// Every `--set`.
    pub set: Vec<String>,
    /// Stages in the order of the pipeline file.
    pub stages: Vec<RunStage>,
}

/// One stage of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunStage {
    /// Stage.
    pub stage: String,
    /// Kind.
    pub kind: String,
    /// What became of it.
    pub status: RunStatus,
    /// Fingerprint, where it was known.
    pub fingerprint: Option<Fingerprint>,
    /// Wall time of the execution that made the artifacts, in this run or before.
    pub seconds: f64,
}

/// What became of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunStatus {
    /// It ran.
    Ran,
    /// Its artifacts were in the cache.
    Reused,
    /// It failed or was stopped.
    Failed,
    /// A stage upstream failed.
    Skipped,
}

impl RunStatus {
    /// For people.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ran => "ran",
            Self::Reused => "reused",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

impl RunRecord {
    /// How many stages came to that.
    pub fn count(&self, status: RunStatus) -> usize {
        self.stages.iter().filter(|s| s.status == status).count()
    }
}

/// Listens to a run and writes its record.
#[derive(Debug)]
pub struct RunLog {
    record: RunRecord,
    /// Position in the pipeline and kind by stage.
    known: BTreeMap<String, (usize, String)>,
    /// Fingerprints of stages that were started.
    started: BTreeMap<String, Fingerprint>,
    clock: Instant,
}

impl RunLog {
    /// Before the run.
    pub fn new(pipeline: &Pipeline, selection: &[String], set: &[String]) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (started_at, millis) = (now.as_secs(), now.subsec_millis());
        let stages = pipeline.stages.iter().enumerate();
        let known = stages.map(|(i, s)| (s.name.clone(), (i, s.kind.clone())));
        let unique = blake3::hash(crate::cache::unique_name().as_bytes()).to_hex();
        Self {
            record: RunRecord {
                id: format!("{}.{millis:03}-{}", utc(started_at), &unique[..4]),
                started_at,
                seconds: 0.0,
                pipeline: pipeline.name.clone(),
                selection: selection.to_vec(),
                set: set.to_vec(),
                stages: Vec::new(),
            },
            known: known.collect(),
            started: BTreeMap::new(),
            clock: Instant::now(),
        }
    }

    /// Takes note of an event.
    pub fn observe(&mut self, event: &Event) {
        match event {
            Event::StageStarted { stage, fingerprint, .. } => {
                self.started.insert(stage.clone(), *fingerprint);
            }
            Event::StageReused { stage, fingerprint, saved_seconds, .. } => {
                self.add(stage, RunStatus::Reused, Some(*fingerprint), *saved_seconds);
            }
            Event::StageFinished { stage, fingerprint, seconds, .. } => {
                self.add(stage, RunStatus::Ran, Some(*fingerprint), *seconds);
            }
            Event::StageFailed { stage, .. } => self.add(stage, RunStatus::Failed, None, 0.0),
            Event::StageSkipped { stage, .. } => self.add(stage, RunStatus::Skipped, None, 0.0),
            _ => {}
        }
    }

    fn add(&mut self, stage: &str, status: RunStatus, known: Option<Fingerprint>, seconds: f64) {
        let started = self.started.remove(stage);
        self.record.stages.push(RunStage {
            stage: stage.to_owned(),
            kind: self.known.get(stage).map(|(_, kind)| kind.clone()).unwrap_or_default(),
            status,
            fingerprint: known.or(started),
            seconds,
        });
    }

    /// The record, unless the run only found everything in place.
    pub fn finish(mut self) -> Option<RunRecord> {
        let stopped: Vec<String> = self.started.keys().cloned().collect();
        for stage in stopped {
            self.add(&stage, RunStatus::Failed, None, 0.0);
        }
        let known = &self.known;
        self.record.stages.sort_by_key(|s| known.get(&s.stage).map(|(i, _)| *i));
        // What was lost and made again counts once, as it ended.
        self.record.stages.dedup_by(|later, earlier| {
            let same = later.stage == earlier.stage;
            if same {
                std::mem::swap(later, earlier);
            }
            same
        });
        self.record.seconds = self.clock.elapsed().as_secs_f64();
        let did = self.record.stages.iter().any(|s| s.status != RunStatus::Reused);
        did.then_some(self.record)
    }
}

/// `20260131-142530` of a Unix time. Civil date from days after Howard Hinnant,
/// "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest % 3600 / 60, rest % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_civil_dates() {
        assert_eq!(utc(0), "19700101-000000");
        assert_eq!(utc(951_782_400), "20000229-000000");
        assert_eq!(utc(1_767_225_599), "20251231-235959");
        assert_eq!(utc(4_107_542_400), "21000301-000000");
    }
}
