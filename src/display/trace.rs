//! A run as a Chrome trace, for Perfetto (<https://ui.perfetto.dev>) and `chrome://tracing`.
//!
//! Source of the format: "Trace Event Format", Google, JSON object format. Times are in
//! microseconds since the run started; each stage that runs takes the lowest free row.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use contract::Progress;
use serde_json::{Value, json};

use crate::event::Event;

/// The one process that all rows belong to.
const PROCESS: u32 = 1;

/// Collects the events of one run.
#[derive(Debug)]
pub struct Trace {
    started: Instant,
    events: Vec<Value>,
    running: BTreeMap<String, Open>,
    rows: usize,
}

/// A stage that runs.
#[derive(Debug)]
struct Open {
    row: usize,
    since: Duration,
    arguments: Value,
}

impl Default for Trace {
    fn default() -> Self {
        let name = json!({"name": "process_name", "ph": "M", "pid": PROCESS, "tid": 0,
            "args": {"name": "pipe run"}});
        let running = BTreeMap::new();
        Self { started: Instant::now(), events: vec![name], running, rows: 0 }
    }
}

impl Trace {
    /// Takes one event that happened just now.
    pub fn add(&mut self, event: &Event) {
        self.add_at(event, self.started.elapsed());
    }

    fn add_at(&mut self, event: &Event, now: Duration) {
        match event {
            Event::StageStarted { stage, fingerprint, reasons, log } => {
                let arguments = json!({"fingerprint": fingerprint, "reasons": reasons, "log": log});
                self.open(stage, now, arguments);
            }
            Event::StageFinished { stage, unchanged, .. } => {
                let outcome = if *unchanged { "made the same as last time" } else { "done" };
                self.close(stage, now, outcome);
            }
            Event::StageFailed { stage, message, .. } => self.close(stage, now, message),
            Event::StageReused { stage, fingerprint, saved_seconds, .. } => {
                // A stage that waited for another process may have been started here.
                self.close(stage, now, "reused");
                let arguments = json!({"fingerprint": fingerprint, "saved_seconds": saved_seconds});
                self.instant(&format!("{stage}: reused"), now, arguments);
            }
            Event::StageSkipped { stage, because_of } => {
                let arguments = json!({"because_of": because_of});
                self.instant(&format!("{stage}: skipped"), now, arguments);
            }
            Event::StageWaiting { stage, holder } => {
                self.instant(&format!("{stage}: waiting"), now, json!({"holder": holder}));
            }
            Event::Interrupted => self.instant("interrupted", now, json!({})),
            Event::StageProgress { stage, progress: Progress::Metrics { values } } => {
                for (name, value) in values.iter().filter(|(_, v)| v.is_number()) {
                    self.events.push(json!({"name": format!("{stage}: {name}"), "ph": "C",
                        "ts": microseconds(now), "pid": PROCESS, "args": {name: value}}));
                }
            }
            Event::RunFinished { .. } => {
                let left: Vec<String> = self.running.keys().cloned().collect();
                for stage in left {
                    self.close(&stage, now, "stopped");
                }
            }
            Event::StageFetched { stage, bytes, .. } => {
                self.instant(&format!("{stage}: fetched"), now, json!({"bytes": bytes}));
            }
            Event::StagePushed { stage, stored, .. } => {
                self.instant(&format!("{stage}: pushed"), now, json!({"stored": stored}));
            }
            Event::RemoteWarning { message } => {
                self.instant("remote", now, json!({"message": message}));
            }
            Event::RunStarted { .. }
            | Event::StageProgress { .. }
            | Event::StageFetching { .. }
            | Event::StageNotFound { .. }
            | Event::StagePushing { .. }
            | Event::PushFinished { .. } => {}
        }
    }

    fn open(&mut self, stage: &str, since: Duration, arguments: Value) {
        let taken = |row: &usize| self.running.values().any(|open| open.row == *row);
        let row = (1..=self.running.len()).find(|row| !taken(row));
        let row = row.unwrap_or(self.running.len() + 1);
        while self.rows < row {
            self.rows += 1;
            self.events.push(json!({"name": "thread_name", "ph": "M", "pid": PROCESS,
                "tid": self.rows, "args": {"name": format!("job {}", self.rows)}}));
        }
        self.running.insert(stage.to_owned(), Open { row, since, arguments });
    }

    fn close(&mut self, stage: &str, now: Duration, outcome: &str) {
        let Some(Open { row, since, mut arguments }) = self.running.remove(stage) else { return };
        arguments["outcome"] = json!(outcome);
        self.events.push(json!({"name": stage, "cat": "stage", "ph": "X",
            "ts": microseconds(since), "dur": microseconds(now.saturating_sub(since)),
            "pid": PROCESS, "tid": row, "args": arguments}));
    }

    fn instant(&mut self, name: &str, now: Duration, arguments: Value) {
        self.events.push(json!({"name": name, "cat": "run", "ph": "i", "s": "p",
            "ts": microseconds(now), "pid": PROCESS, "tid": 0, "args": arguments}));
    }

    /// The whole trace as JSON.
    pub fn to_json(&self) -> Value {
        json!({"displayTimeUnit": "ms", "traceEvents": self.events})
    }
}

/// A trace on its way to a file.
#[derive(Debug)]
pub struct TraceFile {
    trace: Trace,
    file: File,
}

impl TraceFile {
    /// Opens the file before there is anything to lose.
    ///
    /// # Errors
    /// What the file system said.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { trace: Trace::default(), file: File::create(path)? })
    }

    /// Takes one event that happened just now.
    pub fn add(&mut self, event: &Event) {
        self.trace.add(event);
    }

    /// Writes the trace.
    ///
    /// # Errors
    /// What the file system said.
    pub fn finish(mut self) -> io::Result<()> {
        writeln!(self.file, "{}", self.trace.to_json())
    }
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Fingerprint;

    fn started(stage: &str) -> Event {
        Event::StageStarted {
            stage: stage.to_owned(),
            fingerprint: Fingerprint([7; 32]),
            reasons: vec!["forced".to_owned()],
            log: "s.log".into(),
        }
    }

    fn failed(stage: &str) -> Event {
        let (stage, message) = (stage.to_owned(), "broke".to_owned());
        Event::StageFailed { stage, message, help: None, log: None, log_tail: Vec::new() }
    }

    #[test]
    fn stages_side_by_side_take_rows_of_their_own_and_free_them() {
        let mut trace = Trace::default();
        let at = Duration::from_millis;
        trace.add_at(&started("a"), at(1));
        trace.add_at(&started("b"), at(2));
        trace.add_at(&failed("a"), at(5));
        trace.add_at(&started("c"), at(6));
        trace.add_at(&failed("c"), at(9));
        trace.add_at(&failed("b"), at(10));
        let trace = trace.to_json();
        let spans: Vec<(&str, u64, f64, f64)> = trace["traceEvents"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|e| e["ph"] == "X")
            .filter_map(|e| {
                let (start, length) = (e["ts"].as_f64()?, e["dur"].as_f64()?);
                Some((e["name"].as_str()?, e["tid"].as_u64()?, start.round(), length.round()))
            })
            .collect();
        let wanted = [("a", 1, 1e3, 4e3), ("c", 1, 6e3, 3e3), ("b", 2, 2e3, 8e3)];
        assert_eq!(spans, wanted);
    }
}
