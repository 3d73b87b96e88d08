//! A run on a terminal: one bar a running stage, one line for everything that is over.

use std::collections::BTreeMap;
use std::time::Duration;

use contract::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::plain::{lasting, said};
use super::size;
use crate::event::Event;

const REFRESH: Duration = Duration::from_millis(200);

pub(super) struct Terminal {
    bars: MultiProgress,
    running: BTreeMap<String, ProgressBar>,
    verbose: bool,
}

impl Terminal {
    pub(super) fn new(verbose: bool) -> Self {
        Self { bars: MultiProgress::new(), running: BTreeMap::new(), verbose }
    }

    pub(super) fn show(&mut self, event: &Event) {
        match event {
            Event::StageProgress { stage, progress } => self.progress(stage, progress),
            Event::StageStarted { stage, .. }
            | Event::StageFetching { stage, .. }
            | Event::StagePushing { stage, .. } => {
                self.line(lasting(event));
                let bar = self.bars.add(ProgressBar::new_spinner());
                bar.set_style(style("{prefix} {spinner} {msg} {elapsed}"));
                bar.set_prefix(stage.clone());
                bar.enable_steady_tick(REFRESH);
                // A stage that was not fetched after all runs.
                if let Some(earlier) = self.running.insert(stage.clone(), bar) {
                    earlier.finish_and_clear();
                }
            }
            Event::StageFinished { stage, .. }
            | Event::StageFailed { stage, .. }
            | Event::StageFetched { stage, .. }
            | Event::StageNotFound { stage, .. }
            | Event::StagePushed { stage, .. } => {
                if let Some(bar) = self.running.remove(stage) {
                    bar.finish_and_clear();
                }
                self.line(lasting(event));
            }
            Event::RunFinished { .. } | Event::PushFinished { .. } => {
                for bar in std::mem::take(&mut self.running).into_values() {
                    bar.finish_and_clear();
                }
                self.line(lasting(event));
            }
            _ => self.line(lasting(event)),
        }
    }

    fn progress(&self, stage: &str, progress: &Progress) {
        let Progress::Advance { done, total, unit, note } = progress else {
            return self.line(said(stage, progress, self.verbose));
        };
        let Some(bar) = self.running.get(stage) else { return };
        if *total > 0 {
            bar.set_length(*total);
            bar.set_style(style(if unit == "bytes" {
                "{prefix} {bar:24} {bytes}/{total_bytes} {bytes_per_sec} {msg} left {eta}"
            } else {
                "{prefix} {bar:24} {pos}/{len} {msg} {elapsed} left {eta}"
            }));
            bar.set_position(*done);
            let unit = if unit == "bytes" { "" } else { unit.as_str() };
            let gap = if note.is_empty() { "" } else { " · " };
            bar.set_message(format!("{unit}{gap}{note}"));
        } else {
            let done = if unit == "bytes" { size(*done) } else { format!("{done} {unit}") };
            bar.set_message(format!("{done} {note}"));
        }
    }

    fn line(&self, line: Option<String>) {
        if let Some(line) = line {
            // Goes above the bars, and is kept when there are none.
            if self.running.is_empty() {
                super::note(&line);
            } else {
                let _ = self.bars.println(line);
            }
        }
    }
}

/// The templates are constants of this file.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸ ")
}
