//! What a running stage says to the outside.

use std::io::Write;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One line of JSON on the stage's event descriptor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Progress {
    /// A sentence for the stage's log; shown live with `-v`.
    Log {
        /// The sentence.
        message: String,
    },
    /// A sentence the user should see although the stage goes on.
    Warning {
        /// The sentence.
        message: String,
    },
    /// How long and how much memory the rest will take, said before the work starts.
    Estimate {
        /// Seconds, where known.
        seconds: Option<f64>,
        /// Peak bytes, where known.
        bytes: Option<u64>,
        /// How it was arrived at, such as `measured on one micro-batch`.
        basis: String,
    },
    /// The work is `done` of `total` `unit`s.
    Advance {
        /// Units done.
        done: u64,
        /// Units in all, 0 where unknown.
        total: u64,
        /// `bytes`, `rows`, `steps`, `tokens`.
        unit: String,
        /// A few words shown beside the bar, such as `loss 0.412 · 431 tok/s`.
        note: String,
    },
    /// Measured values at one step, for programs that listen.
    Metrics {
        /// Values by name.
        values: Map<String, Value>,
    },
}

/// Sends [`Progress`] to the engine. Never fails: a stage does not stop because nobody listens.
pub struct Reporter {
    sink: Box<dyn Write + Send>,
    log: Option<Box<dyn Write + Send>>,
}

impl Reporter {
    /// Writes JSON lines to `sink`.
    pub fn new(sink: Box<dyn Write + Send>) -> Self {
        Self { sink, log: None }
    }

    /// Also writes the text of messages and warnings to `log`: from here, so that it stands in order
    /// with what the stage's own programs print there.
    #[must_use]
    pub fn with_log(self, log: Box<dyn Write + Send>) -> Self {
        Self { log: Some(log), ..self }
    }

    /// Drops everything; for tests.
    pub fn silent() -> Self {
        Self::new(Box::new(std::io::sink()))
    }

    /// Sends one event.
    pub fn send(&mut self, progress: &Progress) {
        if let (Progress::Log { message } | Progress::Warning { message }, Some(log)) =
            (progress, &mut self.log)
        {
            let _ = writeln!(log, "{message}");
            let _ = log.flush();
        }
        if let Ok(mut line) = serde_json::to_vec(progress) {
            line.push(b'\n');
            let _ = self.sink.write_all(&line);
            let _ = self.sink.flush();
        }
    }

    /// Sends [`Progress::Log`].
    pub fn log(&mut self, message: impl Into<String>) {
        self.send(&Progress::Log { message: message.into() });
    }

    /// Sends [`Progress::Warning`].
    pub fn warn(&mut self, message: impl Into<String>) {
        self.send(&Progress::Warning { message: message.into() });
    }

    /// Sends [`Progress::Advance`].
    pub fn advance(&mut self, done: u64, total: u64, unit: &str, note: impl Into<String>) {
        let (unit, note) = (unit.to_owned(), note.into());
        self.send(&Progress::Advance { done, total, unit, note });
    }
}
